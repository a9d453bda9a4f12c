"""The weight that an expansion composed last, for who needs it again in the same training step."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class _Kept:
    weight: Tensor
    sources: tuple[tuple[Tensor, int, int], ...]  # (tensor, its version, where its numbers are)
    thread: int


class KernelMemory:
    """Keeps a composed weight with its graph, from a forward to whoever takes it: at most one, and at most once.

    It is forgotten at the next forward, and when a backward pass comes to it, because that frees its graph. It is not
    handed out when a tensor that it was composed of is another one, has other memory, or was written to as torch counts
    it. So what is taken can be differentiated, and is the weight of now. What torch does not count is not seen here
    either: numbers written in place through ``.data``, or by another process. Autograd itself relies on the same count.

    Copies of it, also pickled ones, are empty: no graph can be copied. Nothing is kept before someone has asked once.
    """

    __slots__ = ("__weakref__", "_kept", "wanted")

    def __init__(self) -> None:
        self._kept: _Kept | None = None
        self.wanted = False

    def __reduce__(self) -> tuple[Any, ...]:
        return KernelMemory, ()

    def keep(self, weight: Tensor, sources: Sequence[Tensor]) -> None:
        """Remember ``weight``, composed of ``sources``, if it has a graph of its own; forget what was kept before."""
        self._kept = None
        if not (_has_plain_graph(weight) and sources):
            return
        kept = _Kept(weight, tuple(map(_mark, sources)), threading.get_ident())
        # A backward pass that frees what is before the weight comes by it: the layer's output depends on the weight.
        weight.register_hook(_forgetting(weakref.ref(self), weakref.ref(kept)))
        self._kept = kept

    def take(self, sources: Sequence[Tensor]) -> Tensor | None:
        """The weight kept, if it is what ``sources`` give now, in this thread; it is forgotten."""
        self.wanted = True
        kept, self._kept = self._kept, None
        if kept is None or kept.thread != threading.get_ident() or len(kept.sources) != len(sources):
            return None
        for (tensor, version, address), source in zip(kept.sources, sources, strict=True):
            if tensor is not source or version != source._version or address != source.data_ptr():
                return None
        return kept.weight

    def forget(self) -> None:
        """Let go of the weight and its graph."""
        self._kept = None

    def _forget_this(self, kept: _Kept | None) -> None:
        if kept is not None and self._kept is kept:
            self._kept = None


def _forgetting(memory: weakref.ref[KernelMemory], kept: weakref.ref[_Kept]) -> Any:
    """A hook for the weight of ``kept``; it holds neither, so that they are freed without the cycle collector."""

    def forget(_: Tensor) -> None:
        found = memory()
        if found is not None:
            found._forget_this(kept())

    return forget


def _has_plain_graph(weight: Tensor) -> bool:
    """Whether ``weight`` was computed, with gradients, in a forward and by plain autograd alone.

    A parameter was not computed. Tensors of ``torch.func`` and fake ones end with what made them; what checkpointing
    computes once more, in a backward pass, belongs to that.
    """
    if weight.grad_fn is None or type(weight) is not Tensor:
        return False
    return not torch._C._are_functorch_transforms_active() and torch._C._current_graph_task_id() == -1


def _mark(source: Tensor) -> tuple[Tensor, int, int]:
    return source, source._version, source.data_ptr()
