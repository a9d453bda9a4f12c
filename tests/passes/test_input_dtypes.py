"""Inputs that become floating on the way: no layer is made to read integers, or another dtype than its weights have."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxexpand
from fxexpand.testing import assert_equivalent


class Images(nn.Module):
    """Standardises its input by ``scale``, then two layers."""

    def __init__(self, scale: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.register_buffer("mean", torch.rand(1, 3, 1, 1))
        self.register_buffer("deviation", torch.rand(1, 3, 1, 1) + 0.5)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(self.scale(self, x)))
        return y


SCALES = {
    "quotient": lambda m, x: x / 255,
    "steps": lambda m, x: (x / 255 - 0.5) * 2,
    "factor": lambda m, x: x * 0.5,
    "factor of one": lambda m, x: x * 1.0,
    "quotient by one": lambda m, x: x / 1,
    "sum": lambda m, x: 1.5 + x,
    "tensors": lambda m, x: (x - m.mean) / m.deviation,
    "permuted": lambda m, x: x.permute(0, 1, 3, 2) / 255,
    "both": lambda m, x: x + x / 255,
    "cast": lambda m, x: x.float() / 255,
    "cast to": lambda m, x: (x.to(torch.float32) - m.mean) / m.deviation,
}
PASSES: dict[str, Callable[..., Any]] = {"fuse": fxexpand.fuse, "collapse": fxexpand.collapse}


def integers(dtype: torch.dtype) -> Tensor:
    return torch.randint(0, 100, (2, 3, 9, 9)).to(dtype)


@pytest.mark.parametrize("shown", [True, False], ids=["with-example", "without"])
@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_integers(dtype: torch.dtype, scale: str, name: str, shown: bool) -> None:
    model, x = Images(SCALES[scale]).eval(), integers(dtype)
    result = PASSES[name](model, *([x] if shown else []))
    assert torch.allclose(result(x), model(x), rtol=1e-4, atol=1e-4)


def convolves_its_input(model: nn.Module) -> bool:
    """Whether the first layer reads what the model is given."""
    return any(node.op == "placeholder" for node in first_call(model).all_input_nodes)


def first_call(model: nn.Module) -> fx.Node:
    assert isinstance(model, fx.GraphModule)
    nodes: list[fx.Node] = [node for node in model.graph.nodes if node.op == "call_module"]
    return nodes[0]


@pytest.mark.parametrize("scale", ["quotient", "steps", "factor", "sum", "tensors"])
def test_an_example_tells_that_the_input_is_floating(scale: str) -> None:
    model, x = Images(SCALES[scale]).eval(), torch.rand(2, 3, 9, 9)
    assert not convolves_its_input(fxexpand.fuse(model))
    fused = fxexpand.fuse(model, x)
    assert convolves_its_input(fused)
    assert_equivalent(fused, model, x)


def test_a_cast_tells_it_too() -> None:
    model = Images(SCALES["cast"]).eval()
    fused = fxexpand.fuse(model)
    assert isinstance(fused, fx.GraphModule)
    assert [node.target for node in fused.graph.nodes if node.op != "output"] == ["x", "float", "first"]


class Middle(nn.Module):
    """A layer, ``run`` that may give integers, and a layer."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
        self.register_buffer("threshold", torch.zeros(4, 1, 1))
        self.register_buffer("count", torch.zeros(4, 1, 1, dtype=torch.long))
        self.register_buffer("whole", torch.tensor(3))
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.run(self, self.first(x)))
        return y


def counted(m: Any, y: Tensor) -> Tensor:
    m.count.add_(1)
    shift: Tensor = m.second(m.count * 0.5)
    return y + shift


@pytest.mark.parametrize(
    "run",
    [
        lambda m, y: (y > 0) * 2.0,
        lambda m, y: (y > m.threshold) * 0.5,
        lambda m, y: y.gt(0) / 2,
        lambda m, y: (16 * y).round().to(torch.int8) / 16,
        lambda m, y: y.long() * 0.5,
        lambda m, y: y.long() * m.whole * 0.5,
        lambda m, y: y.argsort(-1) * 0.5,
        lambda m, y: torch.max(y, -1, keepdim=True)[1] * 0.5,
        lambda m, y: torch.nn.functional.max_pool2d(y, 2, return_indices=True)[1] * 0.5,
        lambda m, y: torch.ones_like(y, dtype=torch.int32) * 0.5,
        lambda m, y: y.new_ones(y.shape, dtype=torch.int32) * 0.5,
        counted,
    ],
)
@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("shown", [True, False], ids=["with-example", "without"])
def test_integers_that_come_up_inside(run: Callable[[Any, Tensor], Tensor], name: str, shown: bool) -> None:
    model, x = nn.ModuleDict({"model": Middle(run), "pair": nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2))}), images()
    whole = Both(model).eval()
    result = PASSES[name](whole, *([x] if shown else []))
    expected = copy.deepcopy(whole)(x)
    assert torch.allclose(result(x), expected, rtol=1e-4, atol=1e-4)


class Both(nn.Module):
    """The model, and a chain beside it that collapses in any case."""

    def __init__(self, parts: nn.ModuleDict) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.parts["model"](x).sum() + self.parts["pair"](x.new_ones(3, 2)).sum()
        return y


def images() -> Tensor:
    return torch.rand(2, 3, 9, 9)


@pytest.mark.parametrize("operate", [torch.mul, torch.add, torch.div], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("narrow", "wide"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.float64)],
)
def test_a_tensor_that_widens_what_a_layer_gives(operate: Any, narrow: torch.dtype, wide: torch.dtype) -> None:
    class Widened(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 1).to(narrow), nn.Conv2d(4, 4, 1).to(wide)
            self.register_buffer("tensor", torch.rand(4, 1, 1, dtype=wide) + 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.first(x)
            return self.second(operate(y, self.tensor)), y

    model, x = Widened().eval(), images().to(narrow)
    for result in (fxexpand.fuse(model), fxexpand.fuse(model, x)):
        for ours, theirs in zip(result(x), model(x), strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "keep",
    [
        lambda y: y,
        lambda y: y.relu(),
        torch.nn.functional.gelu,
        lambda y: torch.nn.functional.max_pool2d(y, 2).flip(-1),
        lambda y: y * y.sigmoid(),
        lambda y: torch.cat([y.tanh(), y.exp()], 1).chunk(2, 1)[0],
        lambda y: y.permute(0, 1, 3, 2).contiguous(),
        lambda y: y.double().float(),
    ],
)
def test_what_keeps_the_dtype_of_a_layer_needs_no_example(keep: Callable[[Tensor], Tensor]) -> None:
    """A scale behind an activation goes into the layer behind it."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.first(x)
            return self.second(keep(y) / 1.7), y

    merged = {node for entry in fxexpand.explain(Scaled().eval()).merged for node in entry.nodes}
    assert {"truediv", "second"} <= merged


def test_half_precision_that_a_tensor_makes_single() -> None:
    model, x = Images(SCALES["tensors"]).eval(), torch.rand(2, 3, 9, 9).half()
    fused = fxexpand.fuse(model, x)
    assert torch.allclose(fused(x), model(x), atol=1e-4)


def test_a_layer_that_reads_the_input_itself_tells_it() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = x * 0.5 + self.conv(x)
            return y

    assert convolves_its_input(fxexpand.fuse(Branches().eval()))


def test_a_layer_that_reads_the_input_tells_what_comes_after_another() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.norm = nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4, affine=False)
            self.scale = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x + self.mix(x))
            z: Tensor = self.mix(y + y * self.scale)
            return z

    once = fxexpand.fuse(Residual().eval())
    again = fxexpand.fuse(once)
    assert isinstance(once, fx.GraphModule)
    assert isinstance(again, fx.GraphModule)
    assert {"mul", "add_1"}.isdisjoint(node.name for node in once.graph.nodes)
    assert [node.target for node in again.graph.nodes] == [node.target for node in once.graph.nodes]


def test_the_reason() -> None:
    text = str(fxexpand.explain(Images(SCALES["quotient"]).eval()))
    assert "truediv may give torch.float32 where x is of another dtype; pass example inputs" in " ".join(text.split())
    shown = str(fxexpand.explain(Images(SCALES["quotient"]).eval(), integers(torch.uint8)))
    assert "truediv makes torch.float32 of x, which is torch.uint8" in " ".join(shown.split())


def test_an_exported_program_of_bytes() -> None:
    model, x = Images(SCALES["steps"]).eval(), integers(torch.uint8)
    program = torch.export.export(model, (x,))
    fused = fxexpand.fuse(program)
    assert torch.allclose(fused.module()(x), model(x), rtol=1e-4, atol=1e-4)
    calls = [str(node.target) for node in fused.graph.nodes if "conv" in str(node.target)]
    assert len(calls) == 1
