"""The bias of two kernels in series."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from fxexpand.algebra.kernel import Ints


def over_taps(weight: Tensor, shape: Ints) -> Tensor:
    """Σ_u W, (n, c/G): the sum over all taps, which is what a constant signal sees of a kernel.

    ``weight`` is W, of the shape (n, c/G, *k).
    """
    n, c, *size = shape
    taps = prod(size)
    return weight.reshape(n, c) if taps == 1 else weight.reshape(n, c, taps).sum(2)


def bias_after(first: Tensor, total: Tensor, second: Tensor | None, groups: int) -> Tensor:
    """b₂ + (Σ_u W₂) · b₁, (n,): what the second kernel makes of b₁, (c,), at each of its taps, with its own bias.

    ``total`` is Σ_u W₂, (n, c/G), with ``groups`` = G; ``second`` is b₂.
    """
    if groups == 1:
        return total @ first if second is None else second.addmv(total, first)
    # (G, n/G, c/G) @ (G, c/G, 1) -> (G, n/G, 1)
    through = (_grouped(total, groups) @ first.reshape(groups, -1, 1)).reshape(-1)
    return through if second is None else through + second


def pull_bias(first: Tensor, total: Tensor, gradient: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The gradients with respect to b₁, (c,), and to each tap of W₂, (n, c/G), for that of the bias, (n,)."""
    if groups == 1:  # products like those of the weights, whose code is at hand
        before, tap = torch.mm(gradient.reshape(1, -1), total), torch.mm(gradient.reshape(-1, 1), first.reshape(1, -1))
        return before.reshape(-1), tap
    g = gradient.reshape(groups, -1, 1)
    before, tap = g.mT @ _grouped(total, groups), g * first.reshape(groups, 1, -1)
    return before.reshape(-1), tap.reshape(total.shape)


def _grouped(total: Tensor, groups: int) -> Tensor:
    """(n, c/G) -> (G, n/G, c/G)."""
    return total.reshape(groups, -1, total.shape[1])
