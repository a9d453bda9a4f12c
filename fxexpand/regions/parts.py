"""What a node does, where it is linear."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor, fx

from fxexpand.algebra.affine import Affine
from fxexpand.algebra.refusal import Refusal

# Two nodes say different things about one value: a linear layer reads the last axis of what a convolution gives.
CONFLICT = -1


@dataclass(frozen=True)
class Signal:
    """What is known of a value: its spatial axes (0: features are the last axis), channels, and all axes.

    None where nothing tells it, ``CONFLICT`` where nodes disagree.
    """

    dims: int | None = None
    channels: int | None = None
    rank: int | None = None

    def known_with(self, other: Signal) -> Signal:
        """Both at once; ``self`` where the other one says nothing new."""
        dims, channels, rank = self.dims, self.channels, self.rank
        both = _both(dims, other.dims), _both(channels, other.channels), _both(rank, other.rank)
        return self if both == (dims, channels, rank) else Signal(*both)

    def of_channels(self, channels: int | None) -> Signal:
        return self if channels == self.channels else Signal(self.dims, channels, self.rank)

    def agreed(self) -> Signal:
        """What is known without a conflict: where axes disagree, each side counts channels of its own."""
        if self.dims == CONFLICT:
            return Signal(rank=None if self.rank == CONFLICT else self.rank)
        if CONFLICT not in (self.dims, self.channels, self.rank):
            return self
        return Signal(*(None if value == CONFLICT else value for value in (self.dims, self.channels, self.rank)))


def _both(a: int | None, b: int | None) -> int | None:
    if a is None or b is None:
        return b if a is None else a
    return a if a == b else CONFLICT


def same_channels(channels: int) -> int:
    """The number of channels after a node that keeps it."""
    return channels


Made: TypeAlias = "Affine | Refusal | None"


@dataclass(frozen=True, eq=False)
class Unary:
    """A node that applies one affine map to ``source``.

    ``make`` gives that map for the signal it reads: None where it leaves its input as it is. ``reads`` and ``gives``
    are what the node tells of the values before and after it; ``channels`` gives the number after from that before,
    where ``gives`` does not. ``computes`` says that it multiplies and accumulates, as convolutions and linear layers
    do. ``tensors`` are those of its tensors that have the dtype of the signal. ``whole`` is False for a node the value
    of which is a tuple of parts. ``promotes``: it may give a floating value of an integer one, or of another dtype
    where it also ``broadcasts`` a tensor.
    """

    source: fx.Node
    make: Callable[[Signal], Made]
    reads: Signal = Signal()
    gives: Signal = Signal()
    channels: Callable[[int], int] = same_channels
    computes: bool = False
    tensors: tuple[Tensor, ...] = ()
    whole: bool = True
    pads: bool = False
    broadcasts: bool = False
    promotes: bool = False

    @property
    def sources(self) -> tuple[fx.Node, ...]:
        return (self.source,)


@dataclass(frozen=True, eq=False)
class Join:
    """A node that adds branches, each times a factor, or concatenates them along ``axis`` (``factors`` is None)."""

    sources: tuple[fx.Node, ...]
    factors: tuple[float, ...] | None
    axis: int = 0

    whole = True


Part: TypeAlias = "Unary | Join"
Lifted: TypeAlias = "Unary | Join | Refusal | None"
