"""What a graph would freeze or lose is not traced: the module that does it stays as it is, and works."""

from __future__ import annotations

import functools
import math
import random
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from behaviour import DOUBLE, Two, X, assert_alike, linear
from fxexpand import trace

GLOBAL = torch.full((4,), 3.0, **DOUBLE)


class Net(nn.Module):
    """A parent that can be traced, around a block whose code is given as a function of the block and its input."""

    def __init__(self, code: Callable[..., Any], setup: Callable[[Any], None] = lambda block: None) -> None:
        super().__init__()
        self.before = linear()
        self.block = Block(code)
        setup(self.block)

    def forward(self, x: Tensor) -> Any:
        return self.block(self.before(x).tanh())


class Block(Two):
    def __init__(self, code: Callable[..., Any]) -> None:
        super().__init__()
        self.code = code

    def forward(self, x: Tensor) -> Any:
        return self.code(self, x)


def assert_only_the_block_is_kept(model: nn.Module, *inputs: Any, same: bool = True) -> nn.Module:
    traced = trace(model)
    assert isinstance(traced, fx.GraphModule)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["before", "block"]
    assert type(traced.get_submodule("block")) is type(model.get_submodule("block"))
    if same:
        assert_alike(traced, model, *inputs)
    return traced


# Tensors that the code makes for itself.


def adds_to_zeros(self: Any, x: Tensor) -> Any:
    total = torch.zeros((), **DOUBLE)
    total += self.a(x).mean()
    return total


def writes_into_zeros(self: Any, x: Tensor) -> Any:
    out = torch.zeros(2, 4, **DOUBLE)
    out[:, 0] = self.a(x)[:, 1]
    return out


def moves_zeros(self: Any, x: Tensor) -> Any:
    total = torch.zeros(4, **DOUBLE).to(x.device)
    total += self.a(x).sum(0)
    return total


def multiplies_by_constant(self: Any, x: Tensor) -> Any:
    return self.a(x) * torch.tensor([1.0, 2, 3, 4], **DOUBLE)


def from_numpy(self: Any, x: Tensor) -> Any:
    return self.a(x) * torch.from_numpy(np.arange(4.0))


def global_tensor(self: Any, x: Tensor) -> Any:
    return self.a(x) * GLOBAL


def sums_parameters(self: Any, x: Tensor) -> Any:
    return self.a(x), sum(p.pow(2).sum() for p in self.parameters())


def follows_dtype_of_parameters(self: Any, x: Tensor) -> Any:
    return self.a(x.to(next(self.parameters()).dtype))


def updates_through_the_dictionary(self: Any, x: Tensor) -> Any:
    self._parameters["scale"].data.mul_(1.5)
    return self.a(x) * self.scale


# Random numbers.


def torch_draw(self: Any, x: Tensor) -> Any:
    return self.a(x) * torch.rand(4, **DOUBLE)


def python_draw(self: Any, x: Tensor) -> Any:
    return random.choice([self.a, self.b])(x)


def numpy_draw(self: Any, x: Tensor) -> Any:
    return self.a(x) * float(np.random.rand())


def seeds(self: Any, x: Tensor) -> Any:
    torch.manual_seed(3)
    return self.a(x) + torch.rand_like(x)


def seeds_for_a_while(self: Any, x: Tensor) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return self.a(x) + torch.rand_like(x)


def draws_a_number(self: Any, x: Tensor) -> Any:
    return self.a(x) * torch.rand(()).item() + int(torch.randint(9, ()))


# Modes.


def without_gradients(self: Any, x: Tensor) -> Any:
    with torch.no_grad():
        y = self.a(x)
    return self.b(y)


@torch.no_grad()
def decorated(self: Any, x: Tensor) -> Any:
    return self.a(x)


def inference(self: Any, x: Tensor) -> Any:
    with torch.inference_mode():
        y = self.a(x)
    return self.b(y.clone())


def without_autocast(self: Any, x: Tensor) -> Any:
    with torch.autocast("cpu", enabled=False):
        return self.b(self.a(x))


def asks_for_gradients(self: Any, x: Tensor) -> Any:
    return self.a(x) if torch.is_grad_enabled() else self.b(x)


def checkpoints(self: Any, x: Tensor) -> Any:
    return checkpoint(self.a, x, use_reentrant=False)


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 3


def own_gradient(self: Any, x: Tensor) -> Any:
    return self.b(StraightThrough.apply(self.a(x)))


def reads_training(self: Any, x: Tensor) -> Any:
    return self.a(x) if self.training else self.b(x)


def switches_to_eval(self: Any, x: Tensor) -> Any:
    self.norm.eval()
    return self.norm(self.a(x))


# What a value is.


def depends_on_data(self: Any, x: Tensor) -> Any:
    return self.a(x) if x.sum() > 0 else self.b(x)


def hides_that_it_fails(self: Any, x: Tensor) -> Any:
    try:
        if x.sum() > -1e9:
            return self.a(x)
    except Exception:  # noqa: BLE001 -- what the test is about
        pass
    return self.b(x)


def asks_for_the_type(self: Any, x: Any) -> Any:
    return self.a(x) if isinstance(x, Tensor) else self.b(x)


def asks_torch_for_the_type(self: Any, x: Any) -> Any:
    return self.a(x) if torch.is_tensor(x) else self.b(x)


def asks_for_an_attribute(self: Any, x: Any) -> Any:
    return self.a(x.tensors) if hasattr(x, "tensors") else self.b(x)


def reads_an_attribute_it_has_set(self: Any, x: Any) -> Any:
    y = self.a(x)
    y.note = 2.0
    return self.b(y) * y.note


def looks_up(self: Any, x: Tensor) -> Any:
    return self.a(x) if x.shape[0] in {2, 3} else self.b(x)


@functools.cache
def table(n: int) -> float:
    return 1.0 / n


def caches(self: Any, x: Tensor) -> Any:
    return self.a(x) * table(x.shape[0])


def iterates(self: Any, x: Tensor) -> Any:
    return sum(self.a(row) for row in x)


def counts(self: Any, x: Tensor) -> Any:
    return self.a(x) / len(x)


def converts(self: Any, x: Tensor) -> Any:
    return self.a(x) * int(x.shape[0]) * float(x.shape[1])


def assigns_to_a_part(self: Any, x: Tensor) -> Any:
    y = self.a(x)
    y[:, 0] = 0
    return self.b(y)


def keeps_the_old_name(self: Any, x: Tensor) -> Any:
    y = self.a(x)
    z = y
    y += 1
    return y * z


def counts_up_beside_the_old_number(self: Any, x: Tensor) -> Any:
    n = x.shape[0]
    m = n
    n += 1
    return self.a(x) * n + m


def builds_modules(self: Any, x: Tensor) -> Any:
    return nn.Softplus()(self.a(x))


KEPT: list[Callable[..., Any]] = [
    adds_to_zeros, writes_into_zeros, moves_zeros, multiplies_by_constant, from_numpy, global_tensor, sums_parameters,
    follows_dtype_of_parameters, torch_draw, draws_a_number, python_draw, numpy_draw, seeds, seeds_for_a_while,
    without_gradients, decorated, inference, without_autocast, asks_for_gradients, checkpoints, own_gradient,
    reads_training, depends_on_data,
    hides_that_it_fails, asks_for_the_type, asks_torch_for_the_type, asks_for_an_attribute,
    reads_an_attribute_it_has_set, looks_up, caches, iterates, counts, converts, assigns_to_a_part, keeps_the_old_name,
    counts_up_beside_the_old_number, builds_modules,
]  # fmt: skip


@pytest.mark.parametrize("code", KEPT, ids=lambda code: code.__name__)
def test_the_block_stays_as_it_is_and_the_parent_is_a_graph(code: Callable[..., Any]) -> None:
    assert_only_the_block_is_kept(Net(code), X, same=code is not numpy_draw)


def test_a_tensor_read_past_its_module_is_seen_when_it_changes() -> None:
    def scaled(block: Any) -> None:
        block.scale = nn.Parameter(torch.ones(4, **DOUBLE))

    model = Net(updates_through_the_dictionary, scaled)
    before = model.get_parameter("block.scale").clone()
    traced = trace(model)
    assert torch.equal(model.get_parameter("block.scale"), before)
    assert_alike(traced, model, X)


def test_a_module_that_is_switched_to_eval_while_it_runs_is_switched_in_a_graph_too() -> None:
    def normed(block: Any) -> None:
        block.norm = nn.BatchNorm1d(4, **DOUBLE)

    traced = assert_only_the_block_is_kept(Net(switches_to_eval, normed), X)
    traced.train()
    traced(X)
    assert not traced.get_submodule("block.norm").training


class Output(OrderedDict[str, Tensor]):
    @property
    def logits(self) -> Tensor:
        return self["logits"]


class Head(Two):
    def forward(self, x: Tensor) -> Output:
        return Output(logits=self.a(x))


class UsesOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = Head()

    def forward(self, x: Tensor) -> Tensor:
        output: Output = self.head(x)
        return output.logits + 1


def test_a_model_that_returns_a_type_of_its_own_still_does() -> None:
    model = nn.Sequential(linear(), Head())
    assert type(trace(model)(X)) is Output
    assert_alike(trace(model), model, X)


def test_a_type_of_its_own_between_modules_does_not_keep_a_model_from_being_a_graph() -> None:
    model = UsesOutput()
    traced = trace(model)
    assert isinstance(traced, fx.GraphModule)
    assert_alike(traced, model, X)


def test_an_own_gradient_is_the_one_of_its_author() -> None:
    model = Net(own_gradient)
    x = X.clone().requires_grad_()
    slopes = [torch.autograd.grad(one(x).sum(), x)[0] for one in (trace(model), model)]
    assert slopes[0].any()
    assert torch.equal(*slopes)


def test_autocast_around_a_traced_model_reaches_what_it_reached_before() -> None:
    def protected(self: Any, x: Tensor) -> Any:
        with torch.autocast("cpu", enabled=False):
            return self.a(x.float())

    model = Net(protected).float()
    traced = trace(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(traced(X.float()), model(X.float()))


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_mode_in_which_trace_is_called_does_not_matter(around: Callable[[], Any]) -> None:
    for code in (without_gradients, own_gradient, adds_to_zeros):
        with around():
            traced = trace(Net(code))
        assert type(traced.get_submodule("block")) is Block
    with around():
        assert isinstance(trace(nn.Sequential(linear(), nn.ReLU())), fx.GraphModule)


def test_tracing_draws_no_random_numbers_from_anybody() -> None:
    draws = (torch_draw, draws_a_number, python_draw, numpy_draw, seeds, seeds_for_a_while)
    models = [nn.Sequential(nn.Sequential(Net(code)), linear()) for code in draws]
    states = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())
    for model in models:
        traced = trace(model)
        assert isinstance(traced, fx.GraphModule)
        assert type(traced.get_submodule("0.0.block")) is Block
        assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["0.0.before", "0.0.block", "1"]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert repr(np.random.get_state()) == states[2]


# Signatures and names that no graph module can have.


class StarAndKeyword(Two):
    def forward(self, x: Tensor, *rest: Tensor, scale: float = 2.0) -> Tensor:
        y: Tensor = self.a(x) * scale
        return y + rest[0]


class RequiredAfterDefault(Two):
    def forward(self, x: Tensor, y: float = 1.0, *, z: Tensor) -> Tensor:
        out: Tensor = self.a(x) * y + z
        return out


class FunctionByDefault(Two):
    def forward(self, x: Tensor, y: float = 1.0, *, z: Callable[[Tensor], Tensor] = F.relu) -> Tensor:
        return z(self.a(x)) * y


@pytest.mark.parametrize(
    ("make", "inputs", "named"),
    [
        (StarAndKeyword, (X, X), {}),
        (StarAndKeyword, (X, X), {"scale": 3.0}),
        (RequiredAfterDefault, (X,), {"z": X}),
        (FunctionByDefault, (X,), {}),
        (FunctionByDefault, (X,), {"z": torch.tanh}),
    ],
)
def test_a_signature_that_generated_code_cannot_have_is_kept(make: Any, inputs: Any, named: Any) -> None:
    model = make()
    traced = trace(model)
    assert type(traced) is make
    assert_alike(traced, model, *inputs, **named)


class UsesNames(nn.Module):
    """Layers, an attribute and a method under names that graph modules have."""

    def __init__(self) -> None:
        super().__init__()
        self.graph, self.code = linear(), linear()
        self.meta = {"scale": 2.0}

    def recompile(self) -> float:
        return self.meta["scale"]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.code(self.graph(x)) * self.recompile()
        return y


class LocksItself(Two):
    """Is copied in its own way."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "lock"}

    def __init__(self) -> None:
        super().__init__()
        self.lock = (i for i in range(3))  # like a lock, cannot be copied

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.a(x))
        return y


class StaticForward(nn.Module):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * 2


@pytest.mark.parametrize("make", [UsesNames, LocksItself, StaticForward])
def test_a_class_that_no_graph_module_can_be_is_kept(make: Any) -> None:
    model = nn.Sequential(make(), nn.Tanh())
    traced = trace(model)
    assert isinstance(traced, fx.GraphModule)
    assert type(traced.get_submodule("0")) is make
    assert_alike(traced, model, X)


def test_a_failure_deep_inside_keeps_the_innermost_module_only() -> None:
    model = nn.Sequential(nn.Sequential(linear(), Net(depends_on_data)), nn.Sequential(linear(), nn.ReLU()))
    traced = trace(model)
    assert isinstance(traced, fx.GraphModule)
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert called == ["0.0", "0.1.before", "0.1.block", "1.0", "1.1"]
    assert_alike(traced, model, X)


def test_numbers_computed_from_shapes_stay_computed() -> None:
    class Scaled(Two):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.a(x) / math.sqrt(x.shape[-1] * x.shape[0])
            return y

    model = Scaled()
    traced = trace(model)
    assert isinstance(traced, fx.GraphModule)
    for x in (X, torch.cat([X, X])):
        assert_alike(traced, model, x)
