"""The memory format of weights: what a convolution of torch takes for channels last gives an output laid out so."""

from __future__ import annotations

from collections.abc import Iterable

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


def common_format(weights: Iterable[Tensor]) -> torch.memory_format:
    """The format of what is made of ``weights``: channels last where one of them is, as their output would be."""
    for weight in weights:
        found = memory_format_of(weight)
        if found is not torch.contiguous_format:
            return found
    return torch.contiguous_format


def like_the_layers(weight: Tensor, weights: Iterable[Tensor]) -> Tensor:
    """``weight``, composed of ``weights``, in their format, so that its output has that of theirs."""
    wanted = common_format(weights) if weight.dim() in _CHANNELS_LAST else torch.contiguous_format
    if wanted is torch.contiguous_format or memory_format_of(weight) is wanted:
        return weight
    if torch._C._are_functorch_transforms_active():  # a weight of several models at once has an axis more
        return weight
    return weight.to(memory_format=wanted)
