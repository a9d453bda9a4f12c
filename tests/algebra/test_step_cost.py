"""The cost model of a training step counts what it says, and is right about what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fxexpand.algebra import Kernel
from fxexpand.algebra.step_cost import StepCost, collapsed_step, explicit_step

MEASURED = Path(__file__).parents[2] / "benchmarks" / "results" / "collapse_sites.json"


def chain() -> list[Kernel]:
    """1×1, 3×3, 1×1 with padding of 1 in the first: 4 -> 8 -> 6 -> 2 channels."""
    shapes = ((8, 4, 1, 1), (6, 8, 3, 3), (2, 6, 1, 1))
    kernels = [Kernel(torch.empty(shape, device="meta"), torch.empty(shape[0], device="meta")) for shape in shapes]
    return [Kernel(kernels[0].weight, kernels[0].bias, (), ((1, 1), (1, 1))), *kernels[1:]]


def test_layer_by_layer() -> None:
    macs = 8 * 4 * 9 * 9 + 6 * 8 * 9 * 7 * 7 + 2 * 6 * 7 * 7
    activations = 8 * 9 * 9 + 6 * 7 * 7 + 2 * 7 * 7
    assert explicit_step(chain(), (7, 7), 5) == StepCost(3 * 5 * macs, 5 * activations, 8 * 4 + 6 * 8 * 9 + 2 * 6, 3)


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
    assert collapsed_step(order, chain(), (7, 7), 5) == expected


def test_it_says_which_form_is_faster_wherever_the_difference_is_plain() -> None:
    rows = json.loads(MEASURED.read_text(encoding="utf-8"))["rows"]
    plain = 0
    for row in rows:
        explicit, collapsed = row["seconds"]["explicit"], row["seconds"]["collapsed"]
        said = [StepCost(*row["work"][name]).total for name in ("explicit", "collapsed")]
        if max(explicit, collapsed) > 1.3 * min(explicit, collapsed):
            plain += 1
            assert (said[0] > said[1]) == (explicit > collapsed), row["site"]
    assert plain > 20
