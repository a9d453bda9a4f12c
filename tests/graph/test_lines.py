"""Functions in straight lines give what they give, and ask nothing."""

from __future__ import annotations

import torch
from torch import Tensor

import drawing
from fxexpand.graph.lines import in_lines


def powers(x: Tensor, y: Tensor | None) -> list[Tensor | None]:
    return [*(x**exponent for exponent in range(3) if exponent != 1), y]


def test_they_give_the_same() -> None:
    x = drawing.random(4)
    first, second, nothing = in_lines(powers, 2)(x, None)
    assert torch.equal(first, torch.ones_like(x))
    assert torch.equal(second, x**2)
    assert nothing is None


def test_what_is_not_needed_is_not_computed() -> None:
    def wasteful(x: Tensor) -> list[Tensor]:
        x.exp()
        return [x + 1]

    lines, x = in_lines(wasteful, 1), drawing.random(3)
    with torch.profiler.profile() as profile:
        lines(x)
    called = {event.name for event in profile.events()}
    assert "aten::add" in called
    assert "aten::exp" not in called
