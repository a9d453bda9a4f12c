"""State that is neither in a model nor an argument: a graph would freeze what it is while it is traced."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxexpand
from fxexpand import FC
from fxexpand.graph.outside import reaches_outside

X = torch.randn(3, 4, dtype=torch.float64)
SCALE, NAMES = 2.0, ("a", "b")
counts, steps = {"n": 0}, 0
counter, generator = itertools.count(1), random.Random(0)


class Meter:
    def __init__(self) -> None:
        self.n = 0

    def tick(self) -> int:
        self.n += 1
        return self.n


meter = Meter()


def ticked() -> int:
    return meter.tick()


class Block(nn.Module):
    """``linear(x) · factor()``."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, dtype=torch.float64)

    def factor(self) -> float:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x) * self.factor()
        return y


class CountsInADictionary(Block):
    def factor(self) -> float:
        counts["n"] += 1
        return counts["n"]


class CountsInAGlobal(Block):
    def factor(self) -> float:
        global steps  # noqa: PLW0603 -- what users do
        steps += 1
        return steps


class CountsOnItsClass(Block):
    def factor(self) -> float:
        type(self).calls += 1
        return type(self).calls


class TakesTheNext(Block):
    def factor(self) -> float:
        return next(counter)


class Draws(Block):
    def factor(self) -> float:
        return generator.random()


class AsksAnObject(Block):
    def factor(self) -> float:
        return meter.tick()


class AsksThroughAFunction(Block):
    def factor(self) -> float:
        return ticked()


class ReadsTheClock(Block):
    def factor(self) -> float:
        return time.perf_counter()


class CountsInADefault(Block):
    def factor(self, memo: list[int] = [1]) -> float:  # noqa: B006 -- what users do
        memo.append(1)
        return len(memo)


def counting_in_a_cell() -> nn.Module:
    calls = 0

    class CountsInACell(Block):
        def factor(self) -> float:
            nonlocal calls
            calls += 1
            return calls

    return CountsInACell()


CASES: list[Any] = [
    *(CountsInADictionary, CountsInAGlobal, CountsOnItsClass, TakesTheNext, Draws, AsksAnObject, AsksThroughAFunction),
    *(ReadsTheClock, CountsInADefault, counting_in_a_cell),
]


@pytest.mark.parametrize("make", CASES)
@pytest.mark.parametrize("run", [fxexpand.trace, fxexpand.fuse, lambda m: fxexpand.expand(m, FC(2))])
def test_what_changes_from_call_to_call_still_does(make: Callable[[], nn.Module], run: Any) -> None:
    for model in (make(), nn.Sequential(nn.Linear(4, 4, dtype=torch.float64), make(), nn.ReLU())):
        made = run(model)
        assert not torch.equal(made(X), made(X))


def test_a_parent_of_such_a_module_is_a_graph() -> None:
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.float64), CountsInADictionary(), nn.ReLU())
    traced = fxexpand.trace(model)
    assert isinstance(traced, fx.GraphModule)
    assert not isinstance(traced.get_submodule("1"), fx.GraphModule)


class Settled(Block):
    """Names constants, functions and modules outside of it, of which nothing changes."""

    def factor(self, names: tuple[str, ...] = NAMES) -> float:
        return SCALE * math.sqrt(len(names)) * float(isinstance(names, tuple)) * halved(SCALE)


def halved(value: float) -> float:
    return value / 2


class ReadsADictionary(Block):
    """It might change, and does not."""

    def factor(self) -> float:
        return len(counts)


def test_what_does_not_change_is_a_graph() -> None:
    assert not reaches_outside(Settled())
    assert reaches_outside(ReadsADictionary())
    for model in (Settled(), ReadsADictionary()):
        assert isinstance(fxexpand.trace(model), fx.GraphModule)
