"""Maps of layers with a padding mode, and of transposed convolutions, compose as torch computes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from drawing import random
from fxexpand.algebra import Kernel, Refusal
from fxexpand.algebra.affine import (
    Affine,
    Border,
    Transposed,
    identity,
    in_concatenation,
    in_series,
    in_sum,
    scales,
    times,
    without_groups,
)

BORDER = Border("reflect", ((1, 1), (2, 0)))
SPREAD = Transposed((2, 1), (1, 0), (1, 0), (1, 2))


def apply(affine: Affine, x: Tensor) -> Tensor:
    """What torch makes of the map."""
    kernel = affine.kernel
    if affine.transposed is not None:
        t = affine.transposed
        weight = kernel.weight.unflatten(0, (kernel.groups, -1)).transpose(1, 2).flatten(0, 1)
        settings: dict[str, Any] = {"groups": kernel.groups, "dilation": t.dilation}
        y: Tensor = F.conv_transpose2d(x, weight, kernel.bias, t.stride, t.padding, t.output_padding, **settings)
        return y
    if affine.border is not None:
        amounts = [amount for sides in reversed(affine.border.sides) for amount in sides]
        x = F.pad(x, amounts, mode=affine.border.mode)
    return kernel.apply(x)


def conv(m: int, n: int, *taps: int, bias: bool = True, groups: int = 1, **settings: Any) -> Kernel:
    return Kernel(random(n, m // groups, *taps), random(n) if bias else None, groups=groups, **settings)


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).norm() <= 1e-13 * b.norm())


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Affine(conv(4, 6, 3, 3), BORDER), Affine(conv(6, 2, 2, 1, stride=(2, 1)))),
        (Affine(conv(4, 6, 3, 3), BORDER), Affine(conv(6, 6, 1, 1, groups=6))),
        (Affine(conv(4, 6, 3, 2), None, SPREAD), Affine(conv(6, 5, 1, 1))),
        (Affine(conv(4, 6, 3, 2, groups=2), None, SPREAD), Affine(conv(6, 4, 1, 1, groups=2))),
        (Affine(conv(4, 6, 1, 1, bias=False)), Affine(conv(6, 3, 3, 2), None, SPREAD)),
        (Affine(conv(4, 6, 1, 1, bias=False, groups=2)), Affine(conv(6, 3, 3, 2, groups=3), None, SPREAD)),
    ],
)
def test_two_maps_in_series_are_what_torch_computes(first: Affine, second: Affine) -> None:
    whole = in_series(first, second)
    assert isinstance(whole, Affine)
    x = random(2, 4, 7, 8)
    assert close(apply(whole, x), apply(second, apply(first, x)))


@pytest.mark.parametrize(
    ("first", "second", "word"),
    [
        (Affine(conv(4, 6, 3, 3)), Affine(conv(6, 2, 3, 3), BORDER), "reflect"),
        (Affine(conv(4, 6, 1, 1, bias=False), BORDER), Affine(conv(6, 2, 3, 3, padding=((1, 1), (1, 1)))), "reflect"),
        (Affine(conv(4, 6, 3, 2), None, SPREAD), Affine(conv(6, 5, 2, 1)), "pointwise"),
        (Affine(conv(4, 6, 3, 2), None, SPREAD), Affine(conv(6, 5, 1, 1, stride=(2, 1))), "pointwise"),
        (Affine(conv(4, 6, 3, 2), None, SPREAD), Affine(conv(6, 5, 1, 1, padding=((1, 1), (0, 0)))), "pointwise"),
        (Affine(conv(4, 6, 3, 2), None, SPREAD), Affine(conv(6, 5, 1, 1), None, SPREAD), "pointwise"),
        (Affine(conv(4, 6, 1, 1)), Affine(conv(6, 3, 3, 2), None, SPREAD), "bias"),
        (Affine(conv(4, 6, 1, 1, bias=False), BORDER), Affine(conv(6, 3, 3, 2), None, SPREAD), "pointwise"),
    ],
)
def test_what_no_layer_of_torch_can_be_is_refused(first: Affine, second: Affine, word: str) -> None:
    refusal = in_series(first, second)
    assert isinstance(refusal, Refusal)
    assert word in refusal.reason


def test_a_bias_before_a_transposed_convolution_is_seen_fewer_times_at_the_border() -> None:
    first, second = Affine(conv(4, 6, 1, 1)), Affine(conv(6, 3, 3, 2), None, SPREAD)
    x = random(1, 4, 5, 5)
    shift = apply(second, apply(first, x)) - apply(second, apply(first, torch.zeros_like(x)))
    constant = apply(second, apply(first, x)) - shift
    assert not close(constant, constant[..., 2:3, 2:3].expand_as(constant))


@pytest.mark.parametrize("special", [Affine(conv(4, 4, 3, 3), BORDER), Affine(conv(4, 4, 3, 2), None, SPREAD)])
def test_only_kernels_are_joined(special: Affine) -> None:
    plain = Affine(conv(4, 4, 3, 3))
    for join in (in_sum, in_concatenation):
        assert isinstance(join(plain, plain), Affine)
        assert isinstance(join(plain, special), Refusal)
        assert isinstance(join(special, plain), Refusal)


@pytest.mark.parametrize(
    ("affine", "layer"),
    [
        (Affine(conv(4, 6, 3, 2, stride=(2, 1))), nn.Conv2d(4, 6, (3, 2), (2, 1))),
        (
            Affine(conv(4, 6, 3, 2, groups=2), None, SPREAD),
            nn.ConvTranspose2d(4, 6, (3, 2), (2, 1), (1, 0), (1, 0), 2, dilation=(1, 2)),
        ),
        (Affine(conv(4, 6, 3, 3), Border("reflect", ((1, 1), (2, 2)))), nn.Conv2d(4, 6, 3, padding=(1, 2))),
    ],
)
def test_size_of_the_output_and_cost(affine: Affine, layer: nn.Module) -> None:
    x = torch.randn(1, 4, 9, 11)
    layer = (
        layer
        if affine.transposed is None
        else nn.ConvTranspose2d(4, 6, (3, 2), (2, 1), (1, 0), (1, 0), 2, dilation=(1, 2))
    )
    with FlopCounterMode(display=False) as counter:
        y = layer(x)
    assert affine.output_size((9, 11)) == tuple(y.shape[2:])
    assert affine.macs((9, 11)) == counter.get_total_flops() / 2


def test_a_linear_layer_has_no_groups() -> None:
    grouped = Affine(conv(4, 6, groups=2))
    dense = without_groups(grouped)
    x = random(3, 4)
    assert (dense.kernel.groups, dense.macs(()), grouped.macs(())) == (1, 24, 24)
    assert close(dense.kernel.apply(x), grouped.kernel.apply(x))


def test_scales_are_told_from_other_maps() -> None:
    assert scales(identity(2, 4))
    assert scales(times(identity(0, 3), 2.5))
    for other in (conv(4, 4, 1, 1), conv(4, 4, 3, 1, groups=4), conv(4, 4, 1, 1, groups=4, stride=(2, 1))):
        assert not scales(Affine(other))
    assert not scales(Affine(conv(4, 4, 1, 1, groups=4), BORDER))
