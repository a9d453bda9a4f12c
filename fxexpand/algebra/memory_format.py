"""The memory format of weights: what a convolution of torch takes for channels last gives an output laid out so."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def memory_format_of(tensor: Tensor) -> torch.memory_format:
    """The format that torch takes ``tensor`` to be in, by its strides: a pointwise weight has strides of its own in
    each, though it is contiguous in all.
    """
    shape, strides = tensor.shape, tensor.stride()
    wanted = _CHANNELS_LAST.get(len(shape))
    if wanted is None or strides[1] != 1:
        return torch.contiguous_format
    least = 1
    for axis in (1, *range(len(shape) - 1, 1, -1), 0):
        if shape[axis] == 0 or strides[axis] < least or (axis == 0 and least == strides[1]):
            return torch.contiguous_format
        least = strides[axis] * max(shape[axis], 1)
    return wanted


def common_format(weights: Iterable[Tensor | None]) -> torch.memory_format:
    """Channels last where one of ``weights`` is: they stand for one layer, and were laid out together."""
    for weight in weights:
        found = torch.contiguous_format if weight is None else memory_format_of(weight)
        if found is not torch.contiguous_format:
            return found
    return torch.contiguous_format


@dataclass(frozen=True, eq=False)
class Laid:
    """A step of a linear region, as far as it tells the format of its output for a contiguous input of the region.

    ``sources`` are the steps it reads, counted from 1, and 0 for what the region reads; ``weight`` is a convolution's.
    """

    sources: tuple[int, ...]
    weight: Tensor | None = None
    concatenates: bool = False


def format_after(steps: Sequence[Laid]) -> torch.memory_format:
    """The format of what the last of ``steps`` gives, as torch runs them one by one.

    A convolution gives channels last where its input or its weight is; a sum has the format of its first branch, a
    concatenation that of all, if they agree. (On a CPU a pointwise one of three dimensions is an exception, or is none,
    by the number of threads and images.)
    """
    formats = [torch.contiguous_format]
    for step in steps:
        before = [formats[source] for source in step.sources]
        found = before[0] if not step.concatenates or len(set(before)) == 1 else torch.contiguous_format
        if step.weight is not None and found is torch.contiguous_format:
            found = memory_format_of(step.weight)
        formats.append(found)
    return formats[-1]


def in_format(weight: Tensor, wanted: torch.memory_format) -> Tensor:
    """``weight`` in the format ``wanted``, where that is channels last and it has the axes for it."""
    if wanted is not _CHANNELS_LAST.get(weight.dim()) or memory_format_of(weight) is wanted:
        return weight
    if torch._C._are_functorch_transforms_active():  # a weight of several models at once has an axis more
        return weight
    return weight.to(memory_format=wanted)
