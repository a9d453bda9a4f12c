"""Merged layers stand under the names of what they replace; what is no longer used goes, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxexpand
from drawing import random
from fusing import Layers, randomised


def keys(model: nn.Module) -> list[str]:
    return list(model.state_dict())


def pair(m: int = 4, n: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(m, n, 1), nn.BatchNorm2d(n))


@pytest.mark.parametrize(
    ("model", "paths"),
    [
        (pair(), ["0"]),
        (nn.Sequential(pair(), nn.ReLU(), pair()), ["0", "2"]),
        (nn.Sequential(nn.Sequential(pair(), pair()), nn.ReLU()), ["0"]),
        (nn.Sequential(nn.Sequential(pair(), nn.ReLU()), pair()), ["0.0", "1"]),
        (nn.Sequential(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)), nn.Tanh()), ["0"]),
    ],
)
def test_the_layer_or_the_whole_container(model: nn.Module, paths: list[str]) -> None:
    fused = fxexpand.fuse(randomised(model))
    assert keys(fused) == [f"{path}.{name}" for path in paths for name in ("weight", "bias")]
    called = [module for module in fused.modules() if isinstance(module, nn.BatchNorm2d)]
    assert called == []


class Own(nn.Module):
    """A container with a parameter of its own, which stays."""

    def __init__(self) -> None:
        super().__init__()
        self.block = pair()
        self.block.register_parameter("note", nn.Parameter(torch.zeros(1)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(x)
        return out


def test_a_container_with_a_parameter_that_nothing_reads() -> None:
    assert keys(fxexpand.fuse(randomised(Own()))) == ["block.note", "block.0.weight", "block.0.bias"]


def test_a_layer_that_is_also_called_alone_keeps_its_name() -> None:
    model = Layers(lambda m, x: m.bn(m.conv(x)) * m.conv(x).relu())
    fused = fxexpand.fuse(model)
    assert keys(fused) == ["conv.weight", "conv.bias", "conv_bn.weight", "conv_bn.bias"]
    assert torch.equal(fused.conv.weight, model.conv.weight)  # type: ignore[union-attr, arg-type]


def test_a_chain_that_is_called_twice_is_one_layer() -> None:
    fused = fxexpand.fuse(Layers(lambda m, x: m.bn(m.conv(m.bn(m.conv(x)).relu())).relu()))
    assert keys(fused) == ["conv.weight", "conv.bias"]


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (
            lambda m, x: m.bn(F.conv2d(x, m.other.weight)),
            ["other.weight.weight", "other.weight.bias"],
        ),
        (lambda m, x: m.last(x @ m.matrix).relu(), ["last.weight"]),
        (lambda m, x: (x @ m.matrix @ m.matrix).relu(), ["matrix.weight"]),
    ],
)
def test_functional_calls(run: Callable[[Any, Tensor], Any], expected: list[str]) -> None:
    assert keys(fxexpand.fuse(Layers(run))) == expected


class Reaches(nn.Module):
    """Cannot be traced, and comes by the layers of its blocks in its own ways."""

    def __init__(self, how: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.how = how
        self.block = pair()
        self.named = Named()

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        y: Tensor = self.block(self.named(x))
        if y.sum() > 1e9:
            y = self.named.conv(y)
        return self.how(self, y)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(x))
        return out


def iterates(m: Any, x: Tensor) -> Tensor:
    for layer in m.block:
        x = layer(x)
    return x


def names(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.named.conv(x)
    return y


@pytest.mark.parametrize("how", [iterates, names])
def test_code_without_a_graph_finds_what_it_found(how: Callable[[Any, Tensor], Tensor]) -> None:
    model = randomised(Reaches(how))
    fused = fxexpand.fuse(model)
    x = random(2, 4, 3, 3)
    with torch.no_grad():
        assert (fused(x) - model(x)).norm() <= 1e-14 * model(x).norm()
