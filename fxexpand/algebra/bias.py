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


def pull_bias(
    first: Tensor, weight: Tensor, gradient: Tensor, groups: int, beside: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradients with respect to b₁ and W₂, for that of the bias.

    The second is added to ``beside``, what W₂ has from its product, in place where no transform may have one of them
    in a batch and the other not: another tensor of its size costs as much as the product.
    """
    ones = (1,) * (weight.dim() - 2)
    if groups == 1:
        before, spread = gradient @ weight.flatten(1), torch.outer(gradient, first)
    else:
        g = gradient.reshape(groups, -1, 1)
        before, spread = g.mT @ grouped(weight.flatten(1), groups), g * first.reshape(groups, 1, -1)
    if weight.dim() > 2:
        before = before.reshape(first.shape[0], -1).sum(1)
    spread = spread.reshape(*weight.shape[:2], *ones)
    before = before.reshape(first.shape)
    if beside is None:
        return before, spread.expand(weight.shape)
    added = beside + spread if torch._C._are_functorch_transforms_active() else beside.add_(spread)
    return before, added


def _over_taps(weight: Tensor) -> Tensor:
    """(n, c/G): the sum over all taps."""
    taps = weight.shape[2:].numel()
    return weight.flatten(1) if taps == 1 else weight.flatten(2).sum(2)
