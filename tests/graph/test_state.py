"""Modules that keep state in plain attributes keep it up to date, and whoever reads it sees what is there now."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from behaviour import DOUBLE, Two, X, assert_alike, linear
from fxexpand import trace


class Counts(Two):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.a(x) * self.calls
        return y


class Remembers(Two):
    """Keeps a tensor, and uses it at the next call."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x)
        if self.last is not None:
            y = y + self.last
        self.last = y.detach()
        return y


class Box:
    def __init__(self) -> None:
        self.content: Any = None


class RemembersInObject(Two):
    def __init__(self) -> None:
        super().__init__()
        self.box = Box()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x)
        if self.box.content is not None:
            y = y * self.box.content
        self.box.content = y.detach().mean()
        return y


class RemembersInContainers(Two):
    def __init__(self) -> None:
        super().__init__()
        self.queue: deque[Tensor] = deque(maxlen=2)
        self.seen: set[int] = set()
        self.table: dict[str, Any] = {"list": [0]}

    def forward(self, x: Tensor) -> Tensor:
        self.queue.append(x)
        self.seen.add(len(self.seen))
        self.table["list"][0] += 1
        y: Tensor = self.a(sum(self.queue)) * len(self.seen) + self.table["list"][0]
        return y


class Averages(Two):
    """Assigns to a buffer, as running averages do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4, **DOUBLE))
        self.mean: Tensor

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x)
        self.mean = self.mean * 0.9 + 0.1 * y.detach().mean(0)
        return y - self.mean


class AddsToBuffer(Two):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), **DOUBLE))
        self.calls: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.a(x) * self.calls
        return y


class WritesToPlainTensor(Two):
    def __init__(self) -> None:
        super().__init__()
        self.total = torch.zeros(4, **DOUBLE)

    def forward(self, x: Tensor) -> Tensor:
        self.total.add_(1)
        y: Tensor = self.a(x) + self.total
        return y


class RunsThroughTheDictionary(AddsToBuffer):
    def forward(self, x: Tensor) -> Tensor:
        buffers: Any = self._buffers
        buffers["calls"] += 1
        y: Tensor = self.a(x) * self.calls
        return y


class DropsModule(Two):
    def forward(self, x: Tensor) -> Tensor:
        if "b" in self._modules:
            del self.b
        y: Tensor = self.a(x)
        return y


STATEFUL = [
    Counts, Remembers, RemembersInObject, RemembersInContainers, Averages, AddsToBuffer, WritesToPlainTensor,
    RunsThroughTheDictionary,
]  # fmt: skip


@pytest.mark.parametrize("make", STATEFUL)
def test_a_stateful_module_is_kept_and_goes_on_counting(make: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(linear(), make(), linear())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = {name: repr(value) for name, value in vars(model[1]).items() if name[0] != "_"}
    traced = trace(model)
    assert isinstance(traced, fx.GraphModule)
    assert type(traced.get_submodule("1")) is make
    assert {name: repr(value) for name, value in vars(model[1]).items() if name[0] != "_"} == plain
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert_alike(traced, model, X, calls=3)


def test_a_module_that_drops_a_module_is_kept() -> None:
    model = DropsModule()
    traced = trace(model)
    assert type(traced) is DropsModule
    assert torch.equal(traced(X), model.a(X))
    assert "b" in dict(model.named_modules())


class SetsTheChild(Two):
    """Parents that write what their children hold: the child alone is not to blame."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Sequential(linear())
        vars(self.child)["step"] = 0

    def forward(self, x: Tensor) -> Tensor:
        vars(self.child)["step"] += 1
        y: Tensor = self.child(self.a(x)) * vars(self.child)["step"]
        return y


class GivesTheChildAMask(Two):
    def __init__(self) -> None:
        super().__init__()
        self.child: Any = nn.Sequential(linear())

    def forward(self, x: Tensor) -> Tensor:
        self.child.mask = x > 0
        y: Tensor = self.child(self.a(x)) * self.child.mask
        return y


@pytest.mark.parametrize("make", [SetsTheChild, GivesTheChildAMask])
def test_a_parent_that_writes_to_its_child_is_kept(make: Callable[[], nn.Module]) -> None:
    model = make()
    traced = trace(model)
    assert type(traced) is make
    assert_alike(traced, model, X, calls=3)


# Reading what a kept module has changed.


class Mixture(nn.Module):
    """Leaves a loss behind for whoever asks."""

    aux_loss: Any

    def __init__(self) -> None:
        super().__init__()
        self.gate = linear(4, 2)
        self.experts = nn.ModuleList([linear(), linear()])

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        self.aux_loss = weights.var()
        y: Tensor = torch.stack([weights[:, i, None] * expert(x) for i, expert in enumerate(self.experts)]).sum(0)
        return y


class AddsUpLosses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Mixture(), nn.Tanh(), Mixture())

    def forward(self, x: Tensor) -> Any:
        y = self.layers(x)
        mixtures: list[Any] = [m for m in self.modules() if hasattr(m, "aux_loss")]
        return y, sum(m.aux_loss for m in mixtures)


class ReadsTheList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Keeps()

    def forward(self, x: Tensor) -> Any:
        y = self.block(x)
        return y + self.block.history[-1]


class CountsTheList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Keeps()

    def forward(self, x: Tensor) -> Any:
        y = self.block(x)
        return y * len(self.block.history)


class Keeps(nn.Module):
    """Cannot be traced; its width is the same at every call, its history is not."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()
        self.history: list[Tensor] = [torch.zeros(2, 4, **DOUBLE)]
        self.width = 4

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        self.history.append(y)
        return y if y.sum() > 0 else x


class Hub:
    def __init__(self) -> None:
        self.losses: list[Tensor] = []


class Reports(nn.Module):
    def __init__(self, hub: Hub) -> None:
        super().__init__()
        self.hub = hub
        self.layer = linear()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        self.hub.losses.append(y.mean())
        return y


class Collects(nn.Module):
    """Shares an object with its children, that they write to."""

    def __init__(self) -> None:
        super().__init__()
        self.hub = Hub()
        self.one, self.two = Reports(self.hub), Reports(self.hub)

    def forward(self, x: Tensor) -> Any:
        self.hub.losses = []
        y = self.two(self.one(x))
        return y, sum(self.hub.losses)


class Tap:
    """A hook that is an object."""

    def __init__(self, layer: nn.Module) -> None:
        self.seen: dict[str, Tensor] = {}
        layer.register_forward_hook(self)

    def __call__(self, module: nn.Module, args: Any, out: Tensor) -> None:
        self.seen["out"] = out


class ReadsHook(Two):
    def __init__(self) -> None:
        super().__init__()
        self.tap = Tap(self.a)

    def forward(self, x: Tensor) -> Any:
        y = self.b(self.a(x))
        return y, self.tap.seen.get("out")


class ReadsOwnHook(Two):
    def __init__(self) -> None:
        super().__init__()
        self.feature: Tensor | None = None
        self.a.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, args: Any, out: Tensor) -> None:
        self.feature = out

    def forward(self, x: Tensor) -> Any:
        y = self.b(self.a(x))
        return y if self.feature is None else y + self.feature


@pytest.mark.parametrize("make", [AddsUpLosses, ReadsTheList, CountsTheList, Collects, ReadsHook, ReadsOwnHook])
def test_who_reads_what_changes_while_the_model_runs_is_kept(make: Callable[[], nn.Module]) -> None:
    model = make()
    traced = trace(model)
    assert type(traced) is make
    assert_alike(traced, model, X)


def test_constants_of_a_kept_module_may_be_read() -> None:
    class ReadsTheWidth(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Keeps()

        def forward(self, x: Tensor) -> Any:
            return self.block(x) * self.block.width

    model = ReadsTheWidth()
    traced = trace(model)
    assert isinstance(traced, fx.GraphModule)
    assert_alike(traced, model, X)


def test_objects_that_do_not_change_do_not_keep_a_model_from_being_a_graph() -> None:
    class Configured(Two):
        def __init__(self) -> None:
            super().__init__()
            self.config = Box()
            self.config.content = {"scale": 2.0, "sizes": [1, 2], "names": {"a"}, "nan": float("nan")}
            self.stats = {"mean": torch.ones(4, **DOUBLE)}
            self.ring: list[Any] = []
            self.ring.append(self.ring)  # holds itself
            self.sparse = set(range(100))
            self.sparse -= self.sparse - {1, 8}  # in an order that copies do not have
            self.layers = [self.a, self.b]
            self.activation = torch.tanh

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = self.activation(layer(x) * self.config.content["scale"])
            return x

    model = Configured()
    traced = trace(model)
    assert isinstance(traced, fx.GraphModule)
    assert torch.equal(traced(X), model(X))
