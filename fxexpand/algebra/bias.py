"""The bias of two kernels in series."""

from __future__ import annotations

import torch
from torch import Tensor

from fxexpand.algebra.kernel import grouped


def bias_after(first: Tensor, weight: Tensor, second: Tensor | None, groups: int) -> Tensor:
    """b₂ + (Σ_u W₂) · b₁, (n,): what the second kernel makes of b₁, (c,), at each of its taps, with its own bias.

    ``weight`` is W₂, (n, c/G, *k₂), with ``groups`` = G; ``second`` is b₂.
    """
    total = _over_taps(weight)
    if groups == 1:
        return total @ first if second is None else torch.addmv(second, total, first)
    # (G, n/G, c/G) @ (G, c/G, 1) -> (G, n/G, 1)
    through = (grouped(total, groups) @ first.reshape(groups, -1, 1)).reshape(-1)
    return through if second is None else through + second


def pull_bias(first: Tensor, weight: Tensor, gradient: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The gradients with respect to b₁ and W₂, for that of the bias."""
    g = gradient.reshape(groups, -1, 1)
    before = (grouped(_over_taps(weight), groups).mT @ g).reshape(-1)
    spread = (g @ first.reshape(groups, 1, -1)).reshape(*weight.shape[:2], *(1,) * (weight.dim() - 2))
    return before, spread.expand(weight.shape)


def _over_taps(weight: Tensor) -> Tensor:
    """(n, c/G): the sum over all taps."""
    taps = weight.shape[2:].numel()
    return weight.flatten(1) if taps == 1 else weight.flatten(2).sum(2)
