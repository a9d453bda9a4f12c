"""Series: one kernel that does what two do in turn, and when there is one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor

from fxexpand.algebra.kernel import Kernel, grouped, with_groups
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
    steps = [_step(first, second, axis) for axis in range(first.dims)]
    weight = _scaled_weight(first, second)
    if weight is None:
        weight = _weight(with_groups(first, groups), with_groups(second, groups), steps)
    return Kernel(
        weight=weight,
        bias=_bias(first, second),
        stride=tuple(a * b for a, b in zip(first.stride, second.stride, strict=True)),
        padding=tuple(
            (a[0] + s * b[0], a[1] + s * b[1])
            for a, s, b in zip(first.padding, first.stride, second.padding, strict=True)
        ),
        dilation=tuple(steps),
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


def compose_rounded(first: Kernel, scale: Kernel, dtype: torch.dtype) -> Kernel:
    """``compose(first, scale)`` in float64, rounded once to ``dtype``; not differentiable.

    For a depthwise and pointwise ``scale`` with stride 1 and no padding, such as batch norm. Works through the weight
    in blocks that fit a cache, all in the same memory: that takes a fraction of the time of whole copies in float64.
    """
    factors = scale.weight.detach().double().flatten()
    old = first.weight.detach()
    weight = torch.empty_like(old, dtype=dtype)
    n = first.out_channels
    rows = min(n, max(1, _BLOCK // max(1, old[0].numel())))
    exact = torch.empty_like(old[:rows], dtype=torch.float64)  # laid out as the weight is
    scales = factors.reshape(-1, *(1,) * (old.dim() - 1))
    for i in range(0, n, rows):
        block = exact[: n - i]
        torch.mul(block.copy_(old[i : i + rows]), scales[i : i + rows], out=block)
        weight[i : i + rows] = block
    bias = None if scale.bias is None else scale.bias.detach().to(torch.float64, copy=True)
    if first.bias is not None:
        scaled = first.bias.detach().double() * factors
        bias = scaled if bias is None else bias + scaled
    return replace(first, weight=weight, bias=None if bias is None else bias.to(dtype))


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


def _step(first: Kernel, second: Kernel, axis: int) -> int:
    """The distance between neighbouring taps of the composition: gcd(δ₁, s₁·δ₂), of those that have two taps."""
    spacings = []
    if first.kernel_size[axis] > 1:
        spacings.append(first.dilation[axis])
    if second.kernel_size[axis] > 1:
        spacings.append(first.stride[axis] * second.dilation[axis])
    return gcd(*spacings) if spacings else 1


def _scaled_weight(first: Kernel, second: Kernel) -> Tensor | None:
    """The weight where one kernel is depthwise and one pointwise, as batch norm is both: products without a sum.

    None for other kernels.
    """
    if not (first.pointwise or second.pointwise):
        return None
    if second.depthwise:
        if first.weight.is_meta and second.pointwise:
            return first.weight  # a shape is all there is to it, and torch takes its time over those
        return first.weight * second.weight  # (n, m/g, *k1) · (n, 1, *k2)
    if first.depthwise:
        taps = first.weight.reshape(second.groups, 1, -1, *first.kernel_size)
        # (g, n/g, c/g, *k2) · (g, 1, c/g, *k1) -> (n, c/g, *K)
        return (grouped(second.weight, second.groups) * taps).flatten(0, 1)
    return None


def _weight(first: Kernel, second: Kernel, steps: list[int]) -> Tensor:
    """The full convolution of the two kernels, (n, m/G, *K), for kernels of equal groups G.

    Contiguous: a convolution takes the memory format of its output from its weight, too.
    """
    w1 = grouped(first.weight, first.groups)  # (G, c/G, m/G, *k1)
    w2 = grouped(second.weight, second.groups)  # (G, n/G, c/G, *k2)
    if all(k == 1 for k in second.kernel_size):
        # (G, n/G, c/G) @ (G, c/G, m/G·k1) -> (G, n/G, m/G·k1)
        product = w2.flatten(2) @ w1.flatten(2)
        return product.reshape(second.out_channels, -1, *first.kernel_size)
    if all(k == 1 for k in first.kernel_size):
        # (G, n/G·k2, c/G) @ (G, c/G, m/G) -> (G, n/G·k2, m/G)
        product = w2.movedim(2, -1).flatten(1, -2) @ w1.flatten(2)
        taps_last = product.reshape(second.out_channels, *second.kernel_size, -1)
        return taps_last.movedim(-1, 1).contiguous()
    # A transposed convolution adds W₂ at every tap of W₁: batch m/G, channels c -> n, taps as the signal.
    signal = first.weight.transpose(0, 1)  # (m/G, c, *k1)
    kernel = w2.transpose(1, 2).flatten(0, 1)  # (c, n/G, *k2)
    spread = [a // s if k > 1 else 1 for a, s, k in zip(first.dilation, steps, first.kernel_size, strict=True)]
    dilation = [
        b * a // s if k > 1 else 1
        for b, a, s, k in zip(second.dilation, first.stride, steps, second.kernel_size, strict=True)
    ]
    convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[first.dims - 1]
    whole = convolve(signal, kernel, stride=spread, dilation=dilation, groups=first.groups)  # (m/G, n, *K)
    return whole.transpose(0, 1).contiguous()


def _bias(first: Kernel, second: Kernel) -> Tensor | None:
    """b₂ + (Σ_u W₂) · b₁."""
    if first.bias is None:
        return second.bias
    taps = tuple(range(2, second.weight.dim()))
    total = second.weight.sum(taps) if taps else second.weight  # (n, c/G)
    # (G, n/G, c/G) @ (G, c/G, 1) -> (G, n/G, 1)
    through = (grouped(total, second.groups) @ first.bias.reshape(second.groups, -1, 1)).reshape(-1)
    return through if second.bias is None else through + second.bias
