"""The layer that is built for a map applies it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drawing import random
from fxexpand.algebra import Kernel
from fxexpand.algebra.affine import Affine, Border, Transposed
from fxexpand.regions.build import Flags, layer_of

PLAIN = Flags(torch.float64, torch.contiguous_format, requires_grad=True, training=False)


def conv(m: int, n: int, *taps: int, groups: int = 1, **settings: object) -> Kernel:
    return Kernel(random(n, m // groups, *taps), random(n), groups=groups, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kernel", "cls", "padded"),
    [
        (conv(4, 6), nn.Linear, False),
        (conv(4, 6, groups=2), nn.Linear, False),
        (conv(4, 6, 3, stride=(2,), padding=((1, 1),)), nn.Conv1d, False),
        (conv(4, 6, 3, 2, dilation=(2, 1), padding=((1, 1), (2, 2)), groups=2), nn.Conv2d, False),
        (conv(4, 6, 3, 2, padding=((1, 0), (2, 2))), nn.Conv2d, True),
        (conv(4, 6, 3, 2, padding=((-1, -1), (0, 2))), nn.Conv2d, True),
        (conv(4, 6, 2, 2, 1, padding=((1, 1),) * 3), nn.Conv3d, False),
    ],
)
def test_a_kernel(kernel: Kernel, cls: type[nn.Module], padded: bool) -> None:
    before, layer = layer_of(Affine(kernel), PLAIN, copy=True)
    assert type(layer) is cls
    assert (before is not None) == padded
    x = random(2, 4, *(7,) * kernel.dims)
    y = x if before is None else before.function(x, **dict(before.settings))
    assert torch.equal(layer(y), kernel.apply(x)) or kernel.dims == 0
    assert torch.allclose(layer(y), kernel.apply(x), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("sides", [((1, 1), (2, 2)), ((1, 0), (2, 1))])
def test_padding_with_a_mode(sides: tuple[tuple[int, int], ...]) -> None:
    kernel = conv(4, 6, 3, 2)
    before, layer = layer_of(Affine(kernel, Border("reflect", sides)), PLAIN, copy=True)
    x = random(2, 4, 6, 7)
    y = layer(x if before is None else before.function(x, **dict(before.settings)))
    amounts = [amount for pair in reversed(sides) for amount in pair]
    assert torch.equal(y, kernel.apply(F.pad(x, amounts, mode="reflect")))
    assert layer.padding_mode == ("reflect" if before is None else "zeros")


def test_a_transposed_convolution() -> None:
    old = nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2, dilation=1).double()
    swapped: Tensor = old.weight.detach().unflatten(0, (2, 2)).transpose(1, 2).flatten(0, 1)
    settings = Transposed((2, 2), (1, 1), (1, 1), (1, 1))
    assert old.bias is not None
    _, layer = layer_of(Affine(Kernel(swapped, old.bias.detach(), groups=2), None, settings), PLAIN, copy=True)
    x = random(2, 4, 5, 5)
    assert type(layer) is nn.ConvTranspose2d
    assert torch.equal(layer(x), old(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_flags(dtype: torch.dtype) -> None:
    flags = Flags(dtype, torch.channels_last, requires_grad=False, training=True)
    _, layer = layer_of(Affine(conv(4, 6, 3, 3)), flags, copy=True)
    assert layer.training
    for parameter in layer.parameters():
        assert parameter.dtype == dtype
        assert not parameter.requires_grad
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[operator]


@pytest.mark.parametrize("copy", [False, True])
def test_a_copy_shares_nothing(copy: bool) -> None:
    kernel = conv(4, 6, 3, 3)
    _, layer = layer_of(Affine(kernel), PLAIN, copy=copy)
    assert kernel.bias is not None
    held = zip(layer.parameters(), (kernel.weight, kernel.bias), strict=True)
    shared = [parameter.data_ptr() == tensor.data_ptr() for parameter, tensor in held]
    assert shared == [not copy] * 2


def test_no_random_number_is_drawn() -> None:
    torch.manual_seed(3)
    expected = torch.get_rng_state()
    layer_of(Affine(conv(4, 6)), PLAIN, copy=True)
    kernel = Kernel(torch.ones(2, 2, 3))
    torch.manual_seed(3)
    layer_of(Affine(kernel), PLAIN, copy=True)
    assert torch.equal(torch.get_rng_state(), expected)
