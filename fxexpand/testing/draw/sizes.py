"""Numbers that layers are made with: small, so that failing examples are, and so that matrices stay small."""

from __future__ import annotations

from typing import TypeVar

import hypothesis.strategies as st

T = TypeVar("T")
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")

# The extent of a signal by its number of axes, in which every window and padding below fits.
LENGTHS = {0: 1, 1: 17, 2: 13, 3: 9}


def tuples(d: int, entries: st.SearchStrategy[T]) -> st.SearchStrategy[tuple[T, ...]]:
    """``d`` entries, one an axis."""
    return st.tuples(*[entries] * d)


def divisors(m: int, n: int) -> list[int]:
    """The numbers of groups that ``m`` input and ``n`` output channels can have."""
    return [g for g in range(1, m + 1) if m % g == n % g == 0]
