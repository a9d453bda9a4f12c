"""The oracle against torch's layers, and the matrix that the paper prints."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given
from torch import Tensor, nn

import drawing
from fxexpand.testing import chain_matrix, conv_matrix, matrix
from fxexpand.testing.draw.layers import convolutions
from fxexpand.testing.draw.sizes import PADDING_MODES

SMALL = {1: 8, 2: 5, 3: 3}  # the most samples an axis, by number of axes


def _assert_is(layer: nn.Module, channels: int, size: tuple[int, ...], found: tuple[Tensor, Tensor]) -> None:
    x = drawing.random(2, channels, *size)
    M, b = found
    with torch.no_grad():
        expected = layer(x).flatten(1)
    torch.testing.assert_close(x.flatten(1) @ M.T + b, expected, rtol=1e-12, atol=1e-12)


def _takes(layer: nn.Module, channels: int, size: tuple[int, ...]) -> bool:
    try:
        layer(drawing.random(1, channels, *size))
    except RuntimeError:
        return False
    return True


def test_the_matrix_that_the_paper_prints() -> None:
    k11, k12, k21, k22 = 2.0, 3.0, 5.0, 7.0
    layer = nn.Conv2d(1, 1, 2, bias=False)
    layer.weight.data = torch.tensor([[[[k11, k12], [k21, k22]]]])
    expected = [
        [k11, k12, 0, k21, k22, 0, 0, 0, 0],
        [0, k11, k12, 0, k21, k22, 0, 0, 0],
        [0, 0, 0, k11, k12, 0, k21, k22, 0],
        [0, 0, 0, 0, k11, k12, 0, k21, k22],
    ]
    M, b = matrix(layer, (3, 3))
    assert M.tolist() == expected
    assert b.tolist() == [0.0] * 4
    assert conv_matrix(layer.weight, size=(3, 3))[0].tolist() == expected


@given(convolutions(), st.data())
def test_convolutions_with_every_option(layer: Any, data: st.DataObject) -> None:
    layer = layer.double()
    d = len(layer.kernel_size)
    size = data.draw(st.tuples(*[st.integers(1, SMALL[d])] * d))
    if _takes(layer, layer.in_channels, size):
        _assert_is(layer, layer.in_channels, size, matrix(layer, size))
    else:
        with pytest.raises(ValueError, match=r"does not fit|can pad"):
            matrix(layer, size)


@pytest.mark.parametrize("mode", PADDING_MODES)
@pytest.mark.parametrize("d", [1, 2, 3])
def test_padding_modes_reach_as_far_as_torch_lets_them(d: int, mode: Any) -> None:
    for padding in (1, 2, 3):
        layer = drawing.CONVOLUTIONS[d - 1](2, 2, 2, padding=padding, padding_mode=mode, dtype=torch.float64)
        accepted = [_takes(layer, 2, (length,) * d) for length in (1, 2, 3, 4)]
        for length, takes in zip((1, 2, 3, 4), accepted, strict=True):
            if takes:
                _assert_is(layer, 2, (length,) * d, matrix(layer, (length,) * d))
            else:
                with pytest.raises(ValueError, match="can pad"):
                    matrix(layer, (length,) * d)
        assert any(accepted)


@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("taps", [2, 3, 4])
def test_same_padding_of_even_windows_is_larger_after_the_signal(d: int, taps: int) -> None:
    for mode, dilation in product(PADDING_MODES, (1, 3)):
        window: Any = (taps, *[2] * (d - 1))
        options: dict[str, Any] = {"padding": "same", "dilation": dilation, "padding_mode": mode}
        layer = drawing.CONVOLUTIONS[d - 1](1, 2, window, dtype=torch.float64, **options)
        size = (10, *[4] * (d - 1))
        _assert_is(layer, 1, size, matrix(layer, size))


@given(st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_linear_is_its_weight(m: int, n: int, bias: bool) -> None:
    layer = nn.Linear(m, n, bias=bias)
    M, b = matrix(layer, ())
    assert M.dtype == torch.float64
    assert not M.requires_grad
    assert torch.equal(M, layer.weight.detach().double())
    assert torch.equal(b, layer.bias.detach().double() if bias else torch.zeros(n).double())


@given(st.sampled_from(["Zero", "Constant", "Reflection", "Replication", "Circular"]), st.integers(1, 3), st.data())
def test_padding_modules(name: str, d: int, data: st.DataObject) -> None:
    least = -1 if name in ("Zero", "Constant") else 0
    padding = data.draw(st.tuples(*[st.integers(least, 3)] * (2 * d)))
    layer: nn.Module = getattr(nn, f"{name}Pad{d}d")(padding, *([2.5] if name == "Constant" else []))
    size = data.draw(st.tuples(*[st.integers(1, SMALL[d])] * d))
    channels = data.draw(st.integers(1, 2))
    if _takes(layer, channels, size) and layer(drawing.random(1, channels, *size)).numel():
        _assert_is(layer, channels, size, matrix(layer, size, channels=channels))
    else:
        with pytest.raises(ValueError, match=r"does not fit|can pad"):
            matrix(layer, size, channels=channels)


@given(drawing.kernels())
def test_plain_numbers(kernel: Any) -> None:
    """Torch's convolution on a signal padded side by side."""
    assume(kernel.dims > 0)
    size = drawing.sizes(kernel)[0]
    x = drawing.random(1, kernel.in_channels, *size)
    amounts = [amount for sides in reversed(kernel.padding) for amount in sides]
    padded = nn.functional.pad(x, [max(amount, 0) for amount in amounts])
    padded = nn.functional.pad(padded, [min(amount, 0) for amount in amounts])
    convolve = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[kernel.dims - 1]
    y = convolve(padded, kernel.weight, kernel.bias, kernel.stride, 0, kernel.dilation, kernel.groups)
    M, b = drawing.dense(kernel, size)
    torch.testing.assert_close(M @ x.flatten() + b, y.flatten(), rtol=1e-12, atol=1e-12)


def test_one_number_stands_for_every_axis() -> None:
    weight = drawing.random(2, 2, 2, 2)
    short = conv_matrix(weight, size=(5, 6), stride=2, padding=1, dilation=2)
    long = conv_matrix(weight, size=(5, 6), stride=(2, 2), padding=((1, 1), (1, 1)), dilation=(2, 2))
    drawing.assert_equal(short, long, tolerance=0.0)
    mixed = conv_matrix(weight, size=(5, 6), padding=(1, (0, 2)))
    drawing.assert_equal(mixed, conv_matrix(weight, size=(5, 6), padding=((1, 1), (0, 2))), tolerance=0.0)
    same = conv_matrix(weight, size=(5, 6), padding="same")
    drawing.assert_equal(same, conv_matrix(weight, size=(5, 6), padding=((0, 1), (0, 1))), tolerance=0.0)
    valid = conv_matrix(weight, size=(5, 6), padding="valid")
    drawing.assert_equal(valid, conv_matrix(weight, size=(5, 6)), tolerance=0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_of_any_precision_are_taken_as_they_are(dtype: torch.dtype) -> None:
    layer = nn.Conv1d(2, 3, 3, dtype=dtype)
    M, b = matrix(layer, (3,))
    assert torch.equal(M, layer.weight.detach().double().flatten(1))
    assert layer.bias is not None
    assert torch.equal(b, layer.bias.detach().double())


# Chains


def test_a_chain_is_the_network() -> None:
    layers = [
        nn.ReflectionPad2d((1, 0, 2, 1)),
        nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=1, groups=2),
        nn.Identity(),
        nn.Conv2d(4, 3, 2, dilation=2, padding="same", padding_mode="circular", bias=False),
        nn.ConstantPad2d(1, -0.5),
        nn.Flatten(),
        nn.Linear(144, 5),
        nn.Linear(5, 2),
    ]
    network = nn.Sequential(*layers).double()
    _assert_is(network, 2, (5, 4), chain_matrix(network, (5, 4), channels=2))
    product_of_two = matrix(layers[7], ())[0] @ matrix(layers[6], ())[0]
    assert torch.equal(chain_matrix(layers[6:], ())[0], product_of_two)


@given(drawing.kernels(d=1))
def test_a_chain_of_one_is_its_layer(kernel: Any) -> None:
    layer = nn.Conv1d(kernel.in_channels, kernel.out_channels, kernel.kernel_size, groups=kernel.groups)
    size = (kernel.kernel_size[0] + 2,)
    drawing.assert_equal(chain_matrix([layer], size), matrix(layer, size), tolerance=0.0)


def test_gradients_and_buffers_of_the_layer_are_left_alone() -> None:
    layer = nn.Conv1d(1, 1, 3)
    before = layer.weight.detach().clone()
    M, _ = matrix(layer, (5,))
    M.add_(1.0)
    assert torch.equal(layer.weight, before)
    assert layer.weight.requires_grad


# Errors


class _Louder(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(2 * x, self.weight, self.bias)


class _Named(nn.Linear):
    """Keeps ``forward``."""


class _Shifted(nn.Conv1d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002  # torch's name
        return nn.functional.conv1d(input, weight, bias) + 1


def test_subclasses_that_keep_forward_are_their_base_class() -> None:
    layer = _Named(2, 3)
    assert torch.equal(matrix(layer, ())[0], layer.weight.detach().double())


@pytest.mark.parametrize(
    "layer",
    [nn.ReLU(), _Louder(2, 2), _Shifted(2, 2, 1), nn.BatchNorm1d(2), nn.Flatten(0), nn.ConvTranspose1d(2, 2, 1)],
    ids=lambda layer: type(layer).__name__,
)
def test_other_layers(layer: nn.Module) -> None:
    with pytest.raises(TypeError, match=f"expected a convolution.*found {re.escape(str(layer))}"):
        matrix(layer, (2,), channels=2)


@pytest.mark.parametrize(
    ("layer", "size", "channels", "message"),
    [
        (nn.Conv2d(2, 2, 3), (5,), None, r"Conv2d\(2, 2.*size must have 2 positive entries.*found \(5,\)"),
        (nn.Conv1d(2, 2, 3), (0,), None, r"size must have 1 positive entries.*found \(0,\)"),
        (nn.Conv1d(2, 2, 3), (2,), None, r"Conv1d\(2, 2.*a window of \(3,\) taps .* does not fit .*size \(2,\)"),
        (nn.Conv1d(2, 2, 3), (5,), 3, "takes 2 channels, found 3"),
        (nn.Linear(2, 2), (5,), None, "takes a vector.*Flatten the signal first"),
        (nn.Linear(2, 2), (), 3, "takes 2 channels, found 3"),
        (nn.ZeroPad1d(1), (5,), None, r"ZeroPad1d\(.*any number of channels: say how many"),
        (nn.Identity(), (5,), None, "any number of channels"),
        (nn.ReflectionPad1d(5), (5,), 1, r"can pad a signal of size \(5,\) by at most \[4\], found \(\(5, 5\),\)"),
        (nn.CircularPad1d(6), (5,), 1, r"by at most \[5\]"),
        (nn.ReplicationPad1d((-1, 2)), (5,), 1, "only padding_mode='zeros' can crop"),
    ],
)
def test_signals_that_a_layer_cannot_take(
    layer: nn.Module, size: Sequence[int], channels: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        matrix(layer, size, channels=channels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding_mode": "mirror"}, "must be one of zeros, reflect, replicate, circular, found 'mirror'"),
        ({"padding": "full"}, "must be 'same', 'valid' or numbers, found 'full'"),
        ({"padding": (1, 2)}, "padding must have one entry for each of the 1 spatial axes"),
        ({"stride": (1, 2)}, "stride must have one entry for each of the 1 spatial axes"),
        ({"stride": 0}, "must be at least 1"),
        ({"dilation": 0}, "must be at least 1"),
        ({"groups": 3}, r"a weight of shape \(4, 2, 3\) cannot have groups=3"),
        ({"groups": 0}, "cannot have groups=0"),
        ({"bias": torch.zeros(3)}, r"bias must have shape \(4,\), found \(3,\)"),
    ],
)
def test_numbers_that_disagree(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conv_matrix(torch.zeros(4, 2, 3), size=(5,), **options)


def test_weights_that_are_not_real() -> None:
    with pytest.raises(TypeError, match=r"Conv1d.*real floating-point weights, found torch.complex64"):
        matrix(nn.Conv1d(1, 1, 2, dtype=torch.complex64), (3,))


def test_chains_that_do_not_follow_on() -> None:
    with pytest.raises(ValueError, match="an empty chain has no matrix"):
        chain_matrix([], (5,))
    with pytest.raises(ValueError, match=r"Linear\(in_features=9.*takes 9 channels, found 8"):
        chain_matrix([nn.Conv1d(2, 2, 2), nn.Flatten(), nn.Linear(9, 1)], (5,))
