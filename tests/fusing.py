"""What tests of ``fuse`` ask of every model: the same function, less that runs, the model that came in untouched."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

import fxexpand
from behaviour import tensors_in
from drawing import random
from fxexpand.graph.tracer import ReplayTracer
from fxexpand.testing import as_trained
from fxexpand.testing.untouched import Untouched

M = TypeVar("M", bound=nn.Module)
CHANNELS = 8
NORMS: tuple[type[nn.BatchNorm1d], type[nn.BatchNorm2d], type[nn.BatchNorm3d]] = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
)


def randomised(model: M) -> M:
    """The model in float64 and eval mode, with batch norm as training might have left it."""
    return as_trained(model.double()).eval()


def graph_of(model: nn.Module) -> fx.GraphModule:
    """The graph that plain FX gives, in which reads of buffers are nodes too."""
    return fx.GraphModule(model, ReplayTracer().trace(model))


class Layers(nn.Module):
    """Layers of 4 channels, those that ``run`` names, and the forward that a test gives: ``run(model, x)``.

    Images of 4 × 4 suit it: what works on the wrong axis then shows in the values alone.
    """

    def __init__(self, run: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.run = run
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.other = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.point = nn.Conv2d(4, 4, 1)
        self.bn, self.norm = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.dense, self.last = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.bn1d = nn.BatchNorm1d(4)
        self.matrix = nn.Parameter(torch.randn(4, 4))
        self.vector = nn.Parameter(torch.randn(4))
        self.scale = nn.Parameter(torch.randn(4, 1, 1))
        self.register_buffer("gain", torch.randn(4, 1, 1))
        for name in {*self._modules, *self._parameters, *self._buffers} - {*run.__code__.co_names}:
            delattr(self, name)
        randomised(self)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def calls(model: nn.Module) -> list[str]:
    """What the graphs in ``model`` run, in order: class names of modules, names of functions and methods."""
    found = []
    for gm in model.modules():
        if not isinstance(gm, fx.GraphModule):
            continue
        for node in gm.graph.nodes:
            if node.op == "call_module" and not isinstance(gm.get_submodule(str(node.target)), fx.GraphModule):
                found.append(type(gm.get_submodule(str(node.target))).__name__)
            elif node.op in {"call_function", "call_method"}:
                found.append(getattr(node.target, "__name__", str(node.target)))
    return found


def same_function(found: nn.Module, expected: nn.Module, *inputs: Any, rtol: float = 1e-12) -> None:
    """That both give the same tensors, and change their inputs and buffers alike, at each of two calls."""
    found, expected = copy.deepcopy((found, expected))
    for call in range(2):
        ours, theirs = (_after(model, inputs, seed=call) for model in (found, expected))
        assert len(ours) == len(theirs)
        for x, y in zip(ours, theirs, strict=True):
            assert (x.shape, x.dtype) == (y.shape, y.dtype)
            error = float((x.double() - y.double()).norm() / y.double().norm().clamp(min=1e-300))
            assert error <= rtol, f"relative error {error:.1e} at call {call}"


def _after(model: nn.Module, inputs: tuple[Any, ...], seed: int) -> list[Tensor]:
    """The outputs of ``model``, then its inputs as the call leaves them."""
    torch.manual_seed(seed)
    inputs = copy.deepcopy(inputs)
    with torch.no_grad():
        out = model(*inputs)
    return [*tensors_in(out), *tensors_in(inputs)]


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """That what happens inside leaves ``model`` with the same modules, tensors, values and flags."""
    before = Untouched.of(model)
    yield
    before.check(model, "untouched")


def memory(model: nn.Module) -> set[int]:
    """Where the parameters and buffers of ``model`` are kept."""
    return {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}


def fused(
    model: nn.Module,
    *signals: Tensor,
    examples: tuple[Any, ...] = (),
    when: str = "cheaper",
    lifts: Any = None,
    rtol: float = 1e-12,
) -> nn.Module:
    """The fused model, after what must hold of any: same function, own memory, nothing left to do, input untouched."""
    options = {"when": when, "lifts": lifts}
    with untouched(model):
        found = fxexpand.fuse(model, *examples, **options)
        for x in signals:
            same_function(found, model, x, rtol=rtol)
    assert not memory(found) & memory(model)
    with untouched(found):
        again = fxexpand.fuse(found, *examples, **options)
    assert calls(again) == calls(found)
    assert list(again.state_dict()) == list(found.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), found.state_dict().values(), strict=True))
    return found


def becomes(kind: str, model: nn.Module, *signals: Tensor, examples: tuple[Any, ...] = (), **options: Any) -> nn.Module:
    """The fused model, after the check that it is a single layer of class ``kind`` that holds all state there is."""
    explanation = fxexpand.explain(model, *examples, **options)
    (merged,) = explanation.merged
    found = fused(model, *signals, examples=examples, **options)
    assert calls(found) == [kind]
    assert {"weight"} <= {key.removeprefix(f"{merged.path}.") for key in found.state_dict()} <= {"weight", "bias"}
    assert merged.path in str(explanation)
    return found


def images(d: int = 2) -> list[Tensor]:
    """Signals of two sizes, even and odd on each axis."""
    return [random(2, CHANNELS, *(9, 10, 11)[:d]), random(1, CHANNELS, *(14, 13, 12)[:d])]


def refusals(model: nn.Module, *examples: Any, **options: Any) -> dict[str, str]:
    """Why ``fuse`` leaves alone what it does, by node; nothing about the model changes by asking."""
    with untouched(model):
        explanation = fxexpand.explain(model, *examples, **options)
    for entry in explanation.refused:
        assert entry.nodes
        assert entry.reason
        assert entry.reason in str(explanation)
    return {node: entry.reason for entry in explanation.refused for node in entry.nodes}


def left_alone(model: nn.Module, *signals: Tensor, because: str, when: str = "always") -> None:
    """That ``fuse`` merges nothing, and ``explain`` gives a reason that matches ``because``."""
    before = calls(fxexpand.trace(model))
    assert calls(fused(model, *signals, when=when, rtol=0)) == before
    assert fxexpand.explain(model, when=when).merged == ()
    reasons = refusals(model, when=when).values()
    assert any(re.search(because, reason) for reason in reasons), reasons
