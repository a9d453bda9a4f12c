"""Series: one kernel that does what two do in turn, and when there is one."""

from __future__ import annotations

from collections.abc import Iterable
from math import gcd

import torch
from torch import Tensor

from fxexpand.algebra.bias import bias_after, over_taps
from fxexpand.algebra.kernel import Kernel, with_groups
from fxexpand.algebra.product import product_of, tap_spacing
from fxexpand.algebra.refusal import Refusal

# Elements of a weight that are computed at a time: 1 MiB in float64, within the second cache of most processors.
_BLOCK = 1 << 17


def compose(first: Kernel, second: Kernel) -> Kernel | Refusal:
    """The kernel of ``second ∘ first``.

    Before:  h = first(x); y = second(h)
    After:   y = compose(first, second)(x)

    Identity: with a convolution written as a matrix, W₂ · (W₁ · x) = (W₂ · W₁) · x. The weight is the full
    convolution of the two dilated kernels, the second one's taps spread by s₁; stride s₁·s₂; padding p₁ + s₁·p₂;
    groups gcd(g₁, g₂); bias b₂ + (Σ_u W₂) · b₁. Dilation is the gcd of the distances between taps.

    Exact when: the zeros that ``second`` pads with are what ``first`` would have computed there, on each side of each
    axis and for every input size (see ``padding_refusal``). Differentiable in both kernels.
    """
    refusal = _mismatch(first, second) or padding_refusal(first, second)
    if refusal is not None:
        return refusal
    groups = gcd(first.groups, second.groups)
    return Kernel(
        weight=_weight(first, second, groups),
        bias=_bias(first, second),
        stride=tuple(a * b for a, b in zip(first.stride, second.stride, strict=True)),
        padding=tuple(
            (a[0] + s * b[0], a[1] + s * b[1])
            for a, s, b in zip(first.padding, first.stride, second.padding, strict=True)
        ),
        dilation=tap_spacing(first, second),
        groups=groups,
    )


def compose_all(kernels: Iterable[Kernel]) -> Kernel | Refusal:
    """The kernel of a chain, first to last. Refuses as its first pair that cannot be composed does.

    Raises ``ValueError`` for an empty chain.
    """
    chain = list(kernels)
    if not chain:
        raise ValueError("an empty chain has no kernel: its channels are unknown")
    whole: Kernel | Refusal = chain[0]
    for kernel in chain[1:]:
        if isinstance(whole, Refusal):
            return whole
        whole = compose(whole, kernel)
    return whole


class Blocks:
    """Memory for blocks of weights in float64, the same for one weight after another.

    New memory of this size can come from the system each time, which takes longer than the products do.
    """

    def __init__(self) -> None:
        self._held: dict[torch.device, Tensor] = {}

    def like(self, block: Tensor) -> Tensor:
        """Numbers of no meaning in the shape of ``block``, on its device and laid out as it is."""
        count, held = block.numel(), self._held.get(block.device)
        if held is None or held.numel() < count:
            held = torch.empty(max(count, _BLOCK), dtype=torch.float64, device=block.device)
            self._held[block.device] = held
        layout = torch.empty_like(block, device="meta")
        return held[:count].as_strided(layout.shape, layout.stride())


def compose_rounded(first: Kernel, scale: Kernel, dtype: torch.dtype, blocks: Blocks | None = None) -> Kernel:
    """``compose(first, scale)`` in float64, rounded once to ``dtype``; not differentiable.

    For a depthwise and pointwise ``scale`` with stride 1 and no padding, such as batch norm. Works through the weight
    in blocks that fit a cache, all in the same memory: that takes a fraction of the time of whole copies in float64.
    With ``blocks``, which several calls can share, in theirs.
    """
    factors = scale.weight.detach().double().flatten()
    old = first.weight.detach()
    weight = torch.empty_like(old, dtype=dtype)
    n = first.out_channels
    rows = min(n, max(1, _BLOCK // max(1, old[0].numel())))
    exact = (blocks or Blocks()).like(old[:rows])
    scales = factors.reshape(-1, *(1,) * (old.dim() - 1))
    for part, factor, rounded in zip(old.split(rows), scales.split(rows), weight.split(rows), strict=True):
        rounded.copy_(exact[: len(part)].copy_(part).mul_(factor))
    bias = None if scale.bias is None else scale.bias.detach().to(torch.float64, copy=True)
    if first.bias is not None:
        scaled = first.bias.detach().double() * factors
        bias = scaled if bias is None else bias + scaled
    return first.over(weight, None if bias is None else bias.to(dtype))


def padding_refusal(first: Kernel, second: Kernel) -> Refusal | None:
    """Why the padding of ``second`` rules out a single kernel, or None when it does not.

    ``second`` sees zeros beside the output of ``first``. A single kernel sees there what ``first`` computes from
    beyond its own output: its bias, and the input that its window still touches. These are zero exactly when ``first``
    has no bias and its window lies wholly outside the input: p₁ ≥ δ₁·(k₁ − 1) − (s₁·j − 1) before the signal, where
    j ≥ 1 is the nearest padded position that a tap of ``second`` falls on, and p₁ ≥ δ₁·(k₁ − 1) after it, where some
    input size makes the windows of ``first`` end at any distance from the border. Padding of 0, or cropping, asks
    nothing.
    """
    for axis, (before, after) in enumerate(second.padding):
        if before <= 0 and after <= 0:
            continue
        if first.bias is not None:
            return Refusal(
                f"the second layer pads axis {axis} with zeros where one layer would see the first layer's bias; "
                "pad in the first layer, or drop its bias"
            )
        reach, stride = first.reach[axis], first.stride[axis]
        needed = reach + 1 - stride * _nearest_padded_tap(second, axis) if before > 0 else None
        for side, least in (("before", needed), ("after", reach if after > 0 else None)):
            found = first.padding[axis][0 if side == "before" else 1]
            if least is not None and found < least:
                return Refusal(
                    f"the second layer pads axis {axis} with zeros {side} the signal, where one layer would see the "
                    f"input through the first layer's window: that needs padding of at least {least} in the first "
                    f"layer, found {found}"
                )
    return None


def _nearest_padded_tap(second: Kernel, axis: int) -> int:
    """The least distance (≥ 1) before the signal at which a tap of ``second`` falls, over all its windows."""
    before, stride = second.padding[axis][0], second.stride[axis]
    taps = range(0, min(second.reach[axis], before - 1) + 1, second.dilation[axis])
    # Windows move right by `stride`: a tap at distance a also falls on a − stride, a − 2·stride, …
    return min((before - tap - 1) % stride + 1 for tap in taps)


def _mismatch(first: Kernel, second: Kernel) -> Refusal | None:
    if first.dims != second.dims:
        return Refusal(f"the first layer has {first.dims} spatial axes, the second {second.dims}")
    if first.out_channels != second.in_channels:
        return Refusal(f"the first layer gives {first.out_channels} channels, the second takes {second.in_channels}")
    return None


def _weight(first: Kernel, second: Kernel, groups: int) -> Tensor:
    """The full convolution of the two kernels, (n, m/G, *K)."""
    if first.weight.is_meta and second.depthwise and second.pointwise:
        return first.weight  # a shape is all there is to it, and torch takes its time over those
    product = product_of(first, second)
    if product is None:
        first, second = with_groups(first, groups), with_groups(second, groups)
        product = product_of(first, second)
        assert product is not None, "kernels of equal groups have a product"
    return product.weight(first.weight, second.weight)


def _bias(first: Kernel, second: Kernel) -> Tensor | None:
    if first.bias is None:
        return second.bias
    total = over_taps(second.weight, tuple(second.weight.shape))
    return bias_after(first.bias, total, second.bias, second.groups)
