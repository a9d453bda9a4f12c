"""Kernels with a number for each channel: batch norm, scales, identities, average pools."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from fxexpand.algebra.kernel import Ints, Kernel


def depthwise(scale: Tensor, shift: Tensor | None, dims: int) -> Kernel:
    """scale · x + shift, with a number a channel: (n,)."""
    return Kernel(scale.reshape(-1, 1, *(1,) * dims), shift, groups=scale.numel())


def normalizing(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(scale, shift) of (x - mean) / sqrt(var + eps) · weight + bias, a number a channel each: batch norm with running
    statistics (Ioffe and Szegedy 2015, algorithm 2).
    """
    scale = (var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias


def averaging(channels: int, window: Ints, stride: Ints, divisor: int | None = None, **options: Any) -> Kernel:
    """The mean over ``window``, or the sum over it divided by ``divisor``; ``options`` as for ``torch.full``."""
    weight = torch.full((channels, 1, *window), 1 / (divisor or prod(window)), **options)
    return Kernel(weight, None, stride, groups=channels)
