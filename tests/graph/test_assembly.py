"""What a structure of layers costs in a training step, layer by layer and composed first: counted by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch import nn

from fxexpand.algebra.step_cost import StepCost
from fxexpand.graph.assembly import Chain, assembly_of
from fxexpand.graph.collapsed import Collapsed
from fxexpand.graph.structure import Series


def chain() -> Chain:
    """1×1, 3×3, 1×1 with padding of 1 in the first: 4 -> 8 -> 6 -> 2 channels."""
    layers = {"a": nn.Conv2d(4, 8, 1, padding=1), "b": nn.Conv2d(8, 6, 3), "c": nn.Conv2d(6, 2, 1)}
    found = assembly_of(Series(layers), 4, 2)
    assert isinstance(found, Chain)
    return found


def test_layer_by_layer() -> None:
    macs = 8 * 4 * 9 * 9 + 6 * 8 * 9 * 7 * 7 + 2 * 6 * 7 * 7
    activations = 8 * 9 * 9 + 6 * 7 * 7 + 2 * 7 * 7
    explicit, _ = Collapsed.step_costs(chain(), (7, 7), 5)
    assert explicit == StepCost(3 * 5 * macs, 5 * activations, 8 * 4 + 6 * 8 * 9 + 2 * 6, 3)


@pytest.mark.parametrize(
    ("order", "composing", "written"),
    [
        (((0, 1), 2), 6 * 8 * 9 * 4 + 2 * 6 * 9 * 4, 6 * 8 * 9 + 6 * 4 * 9 + 2 * 4 * 9),
        ((0, (1, 2)), 2 * 6 * 8 * 9 + 2 * 8 * 9 * 4, 2 * 8 * 9 + 2 * 8 * 9 + 2 * 4 * 9),
    ],
)
def test_composed_first(order: Any, composing: int, written: int) -> None:
    """The whole is 3×3, 4 -> 2 channels; a pointwise kernel before one with taps moves the taps of the other."""
    applied = 2 * 4 * 9 * 7 * 7 * 5
    held = 8 * 4 + 6 * 8 * 9 + 2 * 6
    expected = StepCost(3 * (composing + applied), 2 * 7 * 7 * 5, written + held, 9)
    _, collapsed = Collapsed.step_costs(replace(chain(), order=order), (7, 7), 5)
    assert collapsed == expected
