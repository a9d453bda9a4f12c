"""The inverse of composing: weights for a chain, such that it equals a given kernel.

One mechanism serves every chain. A *bare chain* computes the target in as few channels as it takes: identities and
shifts around one layer that holds the target's values. ``_embed`` then hides it in the wider layers that are wanted:
each hidden signal h becomes Q·h with a random isometry Q, and the directions that Q leaves free keep the fresh random
weights. So the function is the target's, and the layers look and train like freshly initialised ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor

from fxexpand.algebra.kernel import Ints, Kernel, grouped
from fxexpand.algebra.refusal import Refusal

# The side of the random rotations that wide isometries are made of.
_BLOCK = 64
_ALL = slice(None)


def around_kernel(target: Kernel, fresh: Sequence[Kernel]) -> list[Kernel] | Refusal:
    """Pointwise A, a kernel B, pointwise C with C ∘ B ∘ A = ``target`` (Guo et al. 2020, §3.2: the CL chain).

    Before:  W of m -> n channels
    After:   A of m -> p, B of p -> q with the taps of W, C of q -> n

    Identity: C·B·A = (Qₙᵀ)·(Qₙ·W·Qₘᵀ)·(Qₘ) = W for isometries Qₘ (p×m), Qₙ (q×n).
    Exact when: p ≥ m and q ≥ n, counted inside each group; refuses otherwise.
    """
    weight = grouped(target.weight, target.groups)  # (g, n, m, *k)
    return _embed(target, [_identity(weight, 2), weight, _identity(weight, 1)], fresh, solved=1)


def matrices(target: Kernel, fresh: Sequence[Kernel]) -> list[Kernel] | Refusal:
    """Linear layers W₁, …, W_l with W_l ··· W₁ = ``target`` (Guo et al. 2020, §3.1: the FC chain).

    Before:  W of m -> n features
    After:   one layer for each of ``fresh``

    Identity: W₁ … W_{j−1} carry the m inputs, W_j applies W, W_{j+1} … W_l carry its n outputs.
    Exact when: some j has hidden widths of at least m before it and of at least n after it, which is when every
    hidden width is at least min(m, n); refuses otherwise.
    """
    n, m = target.out_channels, target.in_channels
    widths = [kernel.out_channels for kernel in fresh[:-1]]
    solvable = [j for j in range(len(fresh)) if all(w >= m for w in widths[:j]) and all(w >= n for w in widths[j:])]
    if not solvable:
        return Refusal(f"hidden layers need at least {min(m, n)} features each, found {', '.join(map(str, widths))}")
    weight = target.weight.unsqueeze(0)  # one group: (1, n, m)
    solved = min(solvable, key=lambda j: abs(2 * j - len(widths)))
    chain = [_identity(weight, 2)] * solved + [weight] + [_identity(weight, 1)] * (len(widths) - solved)
    return _embed(target, chain, fresh, solved)


def before_points(target: Kernel, fresh: Sequence[Kernel]) -> list[Kernel] | Refusal:
    """A kernel B and pointwise C₁, …, C_l with C_l ∘ ··· ∘ C₁ ∘ B = ``target`` (Huh et al. 2023, §5).

    Before:  W of m -> n channels
    After:   B of m -> w with the taps of W, then pointwise layers to n

    Identity: B applies W, the others carry its n outputs. Exact when: every hidden width is at least n, counted inside
    each group; refuses otherwise.
    """
    weight = grouped(target.weight, target.groups)
    return _embed(target, [weight] + [_identity(weight, 1)] * (len(fresh) - 1), fresh, solved=0)


def truncated(target: Kernel, fresh: Sequence[Kernel]) -> list[Kernel]:
    """The two layers of given width the product of which is nearest to ``target`` (Eckart and Young 1936).

    Before:  W of m -> n channels with a×b taps, or one
    After:   V of m -> r with a×1 taps, U of r -> n with 1×b taps

    Identity: W, as an (n·b)×(m·a) matrix inside each group, is U·Σ·Vᵀ; the r largest singular values are kept, and
    their roots go to both layers. The error is the root of the sum of the squares of the others.
    """
    first, second = fresh
    g, d = target.groups, target.dims
    rank = first.out_channels // g
    blocks = grouped(target.weight, g)  # (g, n, m, *k)
    a, b = (target.kernel_size[0], target.kernel_size[1]) if d == 2 else (1, 1)
    n, m = blocks.shape[1:3]
    matrix = blocks.reshape(g, n, m, a, b).permute(0, 1, 4, 2, 3).reshape(g, n * b, m * a)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    kept = min(rank, s.shape[-1])
    root = s[:, :kept].sqrt()
    left, right = matrix.new_zeros(g, n * b, rank), matrix.new_zeros(g, rank, m * a)
    left[..., :kept], right[:, :kept] = u[..., :kept] * root[:, None], root[..., None] * v[:, :kept]
    shape = (g * rank, m, a, 1) if d == 2 else (g * rank, m, *(1,) * d)
    other = (g, n, b, rank)
    outer = left.reshape(other).permute(0, 1, 3, 2).reshape((g * n, rank, 1, b) if d == 2 else (g * n, rank, *(1,) * d))
    bias = None if first.bias is None else torch.zeros_like(first.bias)
    return [replace(first, weight=right.reshape(shape), bias=bias), replace(second, weight=outer, bias=target.bias)]


def shifts(target: Kernel, fresh: Sequence[Kernel]) -> list[Kernel] | Refusal:
    """Layers of at most 3 taps an axis whose chain is ``target`` (Guo et al. 2020, §3.3: the CK chain).

    Before:  W of odd taps k on every axis
    After:   one layer for each of ``fresh``, with the taps that ``shift_taps`` says

    Identity: the first layer copies every input with shifts 0 and 2 on each axis; the second picks 3 neighbouring
    taps from each copy, which together are 5; the layers after it carry copies of every output, which they shift by
    different amounts and add. Every tap of ``target`` is read by exactly one such path.
    Exact when: the hidden layers hold the copies that ``shift_copies`` counts; refuses otherwise.
    """
    return _embed(target, _shift_chain(target, [kernel.kernel_size for kernel in fresh]), fresh, solved=1)


def shift_taps(kernel_size: Ints) -> list[Ints]:
    """The kernel sizes of the layers of ``shifts``, first to last, for odd ``kernel_size``.

    An axis of k taps takes (k − 1)/2 layers of 3 and 1 tap in the rest. The second layer holds the target's values,
    so that is where an axis of 3 taps has its 3.
    """
    length = max(2, *((k - 1) // 2 for k in kernel_size))
    return [
        tuple(3 if (layer == 1 if k == 3 else layer < (k - 1) // 2) else 1 for k in kernel_size)
        for layer in range(length)
    ]


def shift_copies(kernel_size: Ints) -> tuple[int, int]:
    """How many copies of each input, and of each output, the chain of ``shifts`` carries."""
    return prod(len(_input_shifts(k)) for k in kernel_size), prod(len(_output_shifts(k)) for k in kernel_size)


def _input_shifts(k: int) -> tuple[int, ...]:
    return (0, 2) if k > 3 else (0,)


def _output_shifts(k: int) -> tuple[int, ...]:
    """Shifts that, with the 5 taps of the first two layers, cover k taps; none beyond k − 5."""
    return tuple(min(5 * i, k - 5) for i in range(ceil(k / 5))) if k > 5 else (0,)


def _identity(weight: Tensor, axis: int) -> Tensor:
    """The identity on the channels of ``axis`` of a grouped weight, with one tap: (g, c, c, 1…)."""
    c = weight.shape[axis]
    eye = torch.eye(c, dtype=weight.dtype, device=weight.device)
    return eye.reshape(1, c, c, *(1,) * (weight.dim() - 3)).expand(weight.shape[0], *(-1,) * (weight.dim() - 1))


def _shift_chain(target: Kernel, taps: Sequence[Ints]) -> list[Tensor]:
    """The bare chain of ``shifts``: zeros and ones, but for the second layer, which holds the target's values."""
    weight = grouped(target.weight, target.groups)
    g, n, m = weight.shape[:3]
    starts_in = list(product(*map(_input_shifts, target.kernel_size)))
    starts_out = list(product(*map(_output_shifts, target.kernel_size)))

    first = weight.new_zeros(g, len(starts_in), m, m, *taps[0])
    for copy, start in enumerate(starts_in):
        first[_at(_ALL, copy, ..., *start)] = torch.eye(m, dtype=weight.dtype, device=weight.device)

    second = weight.new_zeros(g, len(starts_out), n, len(starts_in), m, *taps[1])
    for (c_out, c_in, tap), whole in _paths(target.kernel_size, starts_out, starts_in, taps[1]).items():
        second[_at(_ALL, c_out, _ALL, c_in, _ALL, *tap)] = weight[_at(..., *whole)]

    chain = [first.flatten(1, 2), second.flatten(3, 4).flatten(1, 2)]
    for layer in range(2, len(taps)):
        carry = weight.new_zeros(g, len(starts_out), n, len(starts_out), n, *taps[layer])
        for copy, shift in enumerate(starts_out):
            step = tuple(min(2, max(0, s - 2 * (layer - 2))) for s in shift)  # up to 2 a layer, the first ones first
            carry[_at(_ALL, copy, _ALL, copy, _ALL, *step)] = torch.eye(n, dtype=weight.dtype, device=weight.device)
        if layer == len(taps) - 1:
            carry = carry.sum(1, keepdim=True)  # the last layer adds the copies
        chain.append(carry.flatten(3, 4).flatten(1, 2))
    return chain


def _at(*index: Any) -> Any:
    """An index of some fixed places and as many taps as there are axes."""
    return index


def _paths(
    kernel_size: Ints, starts_out: Sequence[Ints], starts_in: Sequence[Ints], taps: Ints
) -> dict[tuple[int, int, Ints], Ints]:
    """(copy out, copy in, tap of the second layer) -> the tap of the whole kernel that this path alone reads."""
    paths: dict[Ints, tuple[int, int, Ints]] = {}
    for (c_out, shift), (c_in, start) in product(enumerate(starts_out), enumerate(starts_in)):
        for tap in product(*map(range, taps)):
            whole = tuple(map(sum, zip(shift, start, tap, strict=True)))
            if all(t < k for t, k in zip(whole, kernel_size, strict=True)):
                paths.setdefault(whole, (c_out, c_in, tap))
    return {path: whole for whole, path in paths.items()}


def _embed(target: Kernel, chain: Sequence[Tensor], fresh: Sequence[Kernel], solved: int) -> list[Kernel] | Refusal:
    """``fresh`` with weights such that it computes what the bare ``chain`` does, and the bias of ``target``.

    Identity: W_j -> Q_j·W_j·Q_{j−1}ᵀ + Z_j·(1 − Q_{j−1}·Q_{j−1}ᵀ), with Z_j the fresh weight and the columns of Q_j
    orthonormal: hidden signals are Q_j·h, and nothing arrives along the directions that Z_j acts on. In each layer but
    ``solved`` the first term takes the root mean square of the fresh weight, so that both together have at most √2
    times as much; ``solved`` makes up for it.
    """
    groups = target.groups
    widths = [kernel.out_channels // groups for kernel in fresh[:-1]]
    needed = [weight.shape[1] for weight in chain[:-1]]
    if any(width < least for width, least in zip(widths, needed, strict=True)):
        inside = f" in each of the {groups} groups" if groups > 1 else ""
        return Refusal(
            f"hidden layers need at least {', '.join(map(str, needed))} channels{inside}, "
            f"found {', '.join(map(str, widths))}"
        )
    mixers = [_isometry(target, width, least) for width, least in zip(widths, needed, strict=True)]
    drawn = [grouped(kernel.weight, groups) for kernel in fresh]
    weights, made_up = [], 1.0
    for j, weight in enumerate(chain):
        if j < len(mixers):
            weight = torch.einsum("gwn,gnm...->gwm...", mixers[j], weight)
        if j > 0:
            weight = torch.einsum("gnm...,gwm->gnw...", weight, mixers[j - 1])
        gain = _gain(weight, drawn[j]) if j != solved else 1.0
        made_up *= gain
        weights.append(weight * gain)
    weights[solved] = weights[solved] / made_up
    # Free directions much larger than what the layer computes would drown it in their rounding.
    drawn[solved] = drawn[solved] * min(1.0, _size(weights[solved]) / (_size(drawn[solved]) or 1.0))
    for j, mixer in enumerate(mixers, start=1):
        # Z − (Z·Q)·Qᵀ
        through = torch.einsum("gnw...,gwm->gnm...", drawn[j], mixer)
        weights[j] = weights[j] + drawn[j] - torch.einsum("gnm...,gwm->gnw...", through, mixer)
    biases = [None if kernel.bias is None else torch.zeros_like(kernel.bias) for kernel in fresh[:-1]]
    return [
        replace(kernel, weight=weight.flatten(0, 1).contiguous(), bias=bias)
        for kernel, weight, bias in zip(fresh, weights, [*biases, target.bias], strict=True)
    ]


def _isometry(target: Kernel, rows: int, columns: int) -> Tensor:
    """(g, rows, columns) with orthonormal columns, random.

    Uniformly random (up to signs) where that is cheap; else random rotations of blocks of rows, a shuffle and rotations
    again, which mixes up to ``_BLOCK``² rows at a cost that grows with the matrix and not with its cube.
    """
    options: dict[str, Any] = {"dtype": target.weight.dtype, "device": target.weight.device}
    if rows <= _BLOCK:
        return _orthonormal((target.groups, rows, columns), options)
    q = torch.eye(rows, columns, **options).expand(target.groups, rows, columns)
    whole = rows // _BLOCK * _BLOCK
    for _ in range(2):
        q = q[:, torch.randperm(rows, device=target.weight.device)]
        # (b, B, B) @ (g, b, B, columns), then once more for the rows that make up no whole block
        blocks = _orthonormal((whole // _BLOCK, _BLOCK, _BLOCK), options) @ q[:, :whole].unflatten(1, (-1, _BLOCK))
        q = torch.cat([blocks.flatten(1, 2), q[:, whole:]], dim=1)
        q = torch.cat([q[:, :-_BLOCK], _orthonormal((_BLOCK, _BLOCK), options) @ q[:, -_BLOCK:]], dim=1)
    return q


def _orthonormal(shape: tuple[int, ...], options: dict[str, Any]) -> Tensor:
    columns: Tensor = torch.linalg.qr(torch.randn(shape, **options))[0]
    return columns


def _gain(weight: Tensor, drawn: Tensor) -> float:
    """What gives ``weight`` the root mean square of ``drawn``; 1 where either is zero."""
    return _size(drawn) / _size(weight) if _size(drawn) and _size(weight) else 1.0


def _size(weight: Tensor) -> float:
    """The root mean square."""
    return float(weight.square().mean().sqrt())
