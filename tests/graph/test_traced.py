"""A traced model stays what it is when it is copied, pickled, saved, compiled and exported."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, fx, nn

import fxexpand
from behaviour import DOUBLE, Two, X, assert_alike, linear
from fxexpand import CK, CL, FC, trace
from traceable import Everything, Kept


def saved(model: nn.Module) -> nn.Module:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    loaded: nn.Module = torch.load(stream, weights_only=False)
    return loaded


JOURNEYS: list[Callable[[nn.Module], nn.Module]] = [
    copy.deepcopy,
    copy.copy,
    lambda model: pickle.loads(pickle.dumps(model)),
    saved,
    lambda model: saved(copy.deepcopy(pickle.loads(pickle.dumps(model)))),
]
NAMES = ["deepcopy", "copy", "pickle", "save and load", "all of them"]


@pytest.mark.parametrize("journey", JOURNEYS, ids=NAMES)
@pytest.mark.parametrize("training", [True, False])
def test_a_copy_behaves_like_the_traced_model_and_the_original(journey: Any, training: bool) -> None:
    model = Everything().train(training)
    traced = journey(trace(model))
    assert isinstance(traced, fx.GraphModule)
    traced.graph.lint()
    assert_alike(traced, model, X, calls=3, scale=2.0)


@pytest.mark.parametrize("journey", JOURNEYS, ids=NAMES)
def test_a_copy_keeps_all_that_is_beside_the_graph(journey: Any) -> None:
    model = Everything()
    traced = journey(trace(model))
    assert isinstance(traced, Everything)
    assert type(traced).__name__ == "Everything"
    assert traced.describe() == 3
    assert list(traced.state_dict()) == list(model.state_dict())
    assert [n for n, _ in traced.named_modules()] == [n for n, _ in model.named_modules()]
    assert [n for n, _ in traced.named_buffers()] == [n for n, _ in model.named_buffers()]
    assert [(n, p.requires_grad) for n, p in traced.named_parameters()] == [
        (n, p.requires_grad) for n, p in model.named_parameters()
    ]
    assert [m.training for m in traced.modules()] == [m.training for m in model.modules()]
    assert vars(traced).keys() >= vars(model).keys()
    assert traced.alias is traced.a
    traced(X)
    assert traced.kept.calls == 1


@pytest.mark.parametrize("journey", JOURNEYS[:1] + JOURNEYS[2:], ids=NAMES[:1] + NAMES[2:])
def test_a_copy_and_its_hooks_are_apart_from_the_first(journey: Any) -> None:
    traced: Any = trace(Everything())
    expected = {name: value.clone() for name, value in traced.state_dict().items()}
    twin = journey(traced)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin(X)
    assert twin.seen
    assert traced.seen is None
    assert all(torch.equal(value, expected[name]) for name, value in traced.state_dict().items())


def test_a_shallow_copy_shares_its_layers_and_has_a_graph_of_its_own() -> None:
    traced: Any = trace(Everything())
    twin = copy.copy(traced)
    assert twin.a is traced.a
    for node in list(twin.graph.nodes):
        if node.op == "output":
            node.args = (next(iter(twin.graph.nodes)),)
    twin.recompile()
    assert torch.equal(twin.forward(X), X)
    assert traced.forward(X).keys() == {"pair", "more", "rand"}


def test_the_state_goes_from_one_to_the_other_strictly() -> None:
    model, other = Everything(), Everything()
    traced: Any = trace(model)
    traced.load_state_dict(other.state_dict(), strict=True)
    other.load_state_dict(traced.state_dict(), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(traced.parameters(), other.parameters(), strict=True))


def test_a_copy_can_be_traced_and_expanded_again() -> None:
    model = Everything().eval()
    twin = pickle.loads(pickle.dumps(trace(model)))
    big = fxexpand.expand(twin, [CL(2), fxexpand.Rule(FC(2), where=fxexpand.layer(name="a"))])
    assert len(list(big.modules())) > len(list(twin.modules()))
    torch.testing.assert_close(big(X)["pair"].left, twin(X)["pair"].left, rtol=1e-10, atol=1e-12)
    assert_alike(trace(twin), twin, X)


class WithRegistry(Two):
    """Registers its subclasses, as plug-in systems do; and wants to know more of each."""

    subclasses: list[str] = []  # noqa: RUF012 -- shared on purpose

    def __init_subclass__(cls, *, label: str) -> None:
        WithRegistry.subclasses.append(label)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.a(x))
        return y


class Registered(WithRegistry, label="mine"):
    pass


def test_tracing_does_not_register_classes() -> None:
    traced = trace(Registered())
    assert isinstance(copy.deepcopy(traced), Registered)
    assert WithRegistry.subclasses == ["mine"]


class OverridesTrain(Two):
    """Keeps one layer frozen, as detection backbones do."""

    def train(self, mode: bool = True) -> OverridesTrain:
        super().train(mode)
        self.b.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.a(x))
        return y


def test_overridden_methods_of_the_class_stay() -> None:
    traced: Any = trace(OverridesTrain())
    traced.train()
    assert traced.a.training
    assert not traced.b.training


def test_a_part_can_be_replaced() -> None:
    traced: Any = trace(nn.Sequential(linear(), nn.ReLU(), linear()))
    traced[2] = linear(4, 2)
    assert traced(X).shape == (2, 2)


def test_moving_to_another_dtype_moves_everything() -> None:
    model = nn.Sequential(linear(), Kept(), linear())
    traced = copy.deepcopy(trace(model)).float()
    assert torch.allclose(traced(X.float()), model(X).float(), atol=1e-5)


# Compiling and exporting.


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 7, stride=2, padding=3, **DOUBLE)
        self.norm = nn.BatchNorm2d(4, **DOUBLE)
        self.body = nn.Conv2d(4, 4, 3, padding="same", groups=2, **DOUBLE)
        self.weight = nn.Parameter(torch.randn(2, 4, **DOUBLE))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.stem(x))
        z = self.body(y.relu())
        z += y
        return nn.functional.linear(z.mean((2, 3)), self.weight)


RULES = [CK(4), CL(2), FC(2)]


@pytest.mark.parametrize("prepare", [trace, lambda model: fxexpand.expand(model, RULES)], ids=["traced", "expanded"])
def test_torch_compile_takes_the_whole_graph(prepare: Callable[[nn.Module], nn.Module]) -> None:
    model = prepare(ConvNet())
    compiled: Any = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    x = torch.randn(2, 3, 12, 12, **DOUBLE)
    for _ in range(2):
        found, expected = compiled(x), model(x)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    found.sum().backward()
    expected.sum().backward()
    for p, q in zip(compiled.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("prepare", [trace, lambda model: fxexpand.expand(model, RULES)], ids=["traced", "expanded"])
def test_torch_export_takes_it(prepare: Callable[[nn.Module], nn.Module]) -> None:
    model = prepare(ConvNet()).eval()
    x = torch.randn(2, 3, 12, 12, **DOUBLE)
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), model(x), rtol=1e-12, atol=1e-12)
    assert set(exported.state_dict) == set(model.state_dict())


def test_functional_call_takes_other_parameters() -> None:
    traced = trace(ConvNet().eval())
    x = torch.randn(2, 3, 12, 12, **DOUBLE)
    zeros = {name: torch.zeros_like(p) for name, p in traced.named_parameters()}
    assert not torch.func.functional_call(traced, zeros, (x,)).any()
    assert traced(x).any()


def test_a_model_with_wrapped_functions_pickles() -> None:
    model = torchvision.models.swin_t(weights=None).eval()
    twin = pickle.loads(pickle.dumps(trace(model)))
    x = torch.randn(1, 3, 32, 32)
    assert isinstance(twin, fx.GraphModule)
    assert torch.equal(twin(x), model(x))
