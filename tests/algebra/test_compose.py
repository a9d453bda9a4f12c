"""A composition is exactly the two layers in turn."""

from __future__ import annotations

import sys
from dataclasses import replace
from math import prod

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given
from torch import Tensor

import drawing
from fxexpand.algebra import Kernel, Refusal, compose, compose_all
from fxexpand.algebra.compose import compose_rounded

Pair = tuple[Kernel, Kernel]


def _composed(*chain: Kernel) -> Kernel:
    whole = compose_all(chain)
    assert isinstance(whole, Kernel), whole
    return whole


def _assume_composed(first: Kernel, second: Kernel) -> Kernel:
    whole = compose(first, second)
    assume(isinstance(whole, Kernel))
    assert isinstance(whole, Kernel)
    return whole


# What is accepted


@given(drawing.pairs())
def test_the_matrix_is_the_product_of_the_matrices(pair: Pair) -> None:
    whole = _assume_composed(*pair)
    for size in drawing.sizes(*pair):
        drawing.assert_equal(drawing.dense(whole, size), drawing.dense_chain(list(pair), size))


@given(drawing.pairs(), st.data())
def test_output_size_for_every_input_size(pair: Pair, data: st.DataObject) -> None:
    first, second = pair
    whole = _assume_composed(*pair)
    size = data.draw(st.tuples(*[st.integers(1, 60)] * first.dims))
    assert whole.output_size(size) == second.output_size(first.output_size(size))


@given(drawing.pairs())
def test_settings_of_the_composition(pair: Pair) -> None:
    first, second = pair
    whole = _assume_composed(*pair)
    assert (whole.in_channels, whole.out_channels) == (first.in_channels, second.out_channels)
    assert first.groups % whole.groups == 0
    assert second.groups % whole.groups == 0
    assert whole.stride == tuple(a * b for a, b in zip(first.stride, second.stride, strict=True))
    assert (whole.bias is None) == (first.bias is None and second.bias is None)
    reach = tuple(a + s * b for a, s, b in zip(first.reach, first.stride, second.reach, strict=True))
    assert whole.reach == reach
    assert whole.weight.dtype == torch.float64
    assert whole.weight.is_contiguous()


@given(drawing.pairs())
def test_the_grid_is_no_finer_than_it_has_to_be(pair: Pair) -> None:
    """A tap that is zero for every output and input is one that no pair of taps meets; the rest are all met."""
    first, second = pair
    whole = _assume_composed(*pair)
    for axis in range(first.dims):
        met = {
            first.dilation[axis] * u + first.stride[axis] * second.dilation[axis] * v
            for u in range(first.kernel_size[axis])
            for v in range(second.kernel_size[axis])
        }
        others = [a for a in range(2, whole.weight.dim()) if a != axis + 2]
        used = whole.weight.abs().sum([0, 1, *others])
        assert {whole.dilation[axis] * tap for tap in used.nonzero().flatten().tolist()} == met


@given(drawing.pairs())
def test_gradients_are_those_of_the_two_layers(pair: Pair) -> None:
    first, second = pair
    _assume_composed(*pair)
    x = drawing.signal(first, drawing.sizes(*pair)[-1])
    parameters = [t.requires_grad_() for t in (first.weight, first.bias, second.weight, second.bias) if t is not None]
    y = second.apply(first.apply(x))
    towards = torch.randn_like(y)
    expected = torch.autograd.grad(y, parameters, towards)
    found = torch.autograd.grad(_composed(*pair).apply(x), parameters, towards)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("d", [0, 1, 2])
def test_gradcheck_and_functional_transforms(d: int) -> None:
    def weight_and_bias(w1: Tensor, b1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
        whole = _composed(Kernel(w1, b1, stride=(2,) * d, groups=2), Kernel(w2, dilation=(2,) * d, groups=1))
        assert whole.bias is not None
        return whole.weight, whole.bias

    taps = (2,) * d
    inputs = (drawing.random(4, 1, *taps), drawing.random(4), drawing.random(2, 4, *taps))
    assert torch.autograd.gradcheck(weight_and_bias, [t.requires_grad_() for t in inputs])

    def loss(w1: Tensor, b1: Tensor, w2: Tensor) -> Tensor:
        weight, bias = weight_and_bias(w1, b1, w2)
        return weight.square().sum() + bias.sum()

    transformed = torch.func.grad(loss, argnums=(0, 1, 2))(*(t.detach() for t in inputs))
    for a, b in zip(transformed, torch.autograd.grad(loss(*inputs), inputs), strict=True):
        torch.testing.assert_close(a, b)


@given(drawing.pairs())
def test_dtype_is_kept(pair: Pair) -> None:
    _assume_composed(*pair)
    whole = _composed(*(kernel.to(dtype=torch.float32) for kernel in pair))
    assert whole.weight.dtype == torch.float32
    assert whole.bias is None or whole.bias.dtype == torch.float32
    torch.testing.assert_close(whole.weight.double(), _composed(*pair).weight, rtol=1e-4, atol=1e-5)


@given(drawing.pairs(), st.data())
def test_associative(pair: Pair, data: st.DataObject) -> None:
    b, c = pair
    # A first layer that either way of composing accepts: its window stays in its own padding.
    a = data.draw(drawing.kernels(b.dims, n=b.in_channels, bias=False))
    a = replace(a, padding=tuple((reach, reach) for reach in a.reach))
    bc = _assume_composed(b, c)
    left, right = _composed(_composed(a, b), c), _composed(a, bc)
    settings = (left.stride, left.padding, left.dilation, left.groups)
    assert settings == (right.stride, right.padding, right.dilation, right.groups)
    torch.testing.assert_close(left.weight, right.weight, rtol=1e-10, atol=1e-10)
    assert (left.bias is None) == (right.bias is None)
    if left.bias is not None and right.bias is not None:
        torch.testing.assert_close(left.bias, right.bias, rtol=1e-10, atol=1e-10)


@given(drawing.kernels(), st.booleans())
def test_the_identity_is_neutral(kernel: Kernel, after: bool) -> None:
    channels = kernel.out_channels if after else kernel.in_channels
    identity = Kernel(torch.ones(channels, 1, *(1,) * kernel.dims, dtype=torch.float64), groups=channels)
    whole = _composed(kernel, identity) if after else _composed(identity, kernel)
    assert torch.equal(whole.weight, kernel.weight)
    assert (whole.stride, whole.padding, whole.reach) == (kernel.stride, kernel.padding, kernel.reach)
    assert whole.groups == kernel.groups
    assert (whole.bias is None) == (kernel.bias is None)
    if whole.bias is not None and kernel.bias is not None:
        assert torch.equal(whole.bias, kernel.bias)


# What is refused: see also test_padding_refusal.py


@given(drawing.kernels(padding=()), drawing.kernels(padding=()))
def test_layers_that_do_not_follow_on_are_refused(first: Kernel, second: Kernel) -> None:
    assume(first.dims != second.dims or first.out_channels != second.in_channels)
    refusal = compose(first, second)
    assert isinstance(refusal, Refusal)
    what = "spatial axes" if first.dims != second.dims else "channels"
    assert what in refusal.reason
    if (first.dims == 0) != (second.dims == 0):
        return  # a linear layer's features are the last axis, which a convolution's channels never are
    # Neither a batch of 7 nor an extent of 29 can be taken for channels.
    x = drawing.signal(first, (29,) * first.dims, batch=7)
    with pytest.raises(RuntimeError, match=r"channels|Expected|multiplied|multiply up to|subscript"):
        second.apply(first.apply(x))


# Chains


@given(drawing.pairs())
def test_compose_all(pair: Pair) -> None:
    found = compose(*pair)
    n, d = pair[1].out_channels, pair[1].dims
    doubled = Kernel(2 * torch.ones(n, 1, *(1,) * d, dtype=torch.float64), groups=n)
    chain = compose_all([*pair, doubled])
    if isinstance(found, Refusal):
        assert chain == found
    else:
        assert isinstance(chain, Kernel)
        assert torch.equal(chain.weight, 2 * found.weight)
    assert compose_all(iter(pair[:1])) is pair[0]


def test_an_empty_chain_has_no_kernel() -> None:
    with pytest.raises(ValueError, match="an empty chain has no kernel"):
        compose_all([])


def test_a_depthwise_then_pointwise_kernel_is_dense() -> None:
    """The groups of a composition are the gcd of both: 8 and 1 give 1, and the costs of a dense layer."""
    whole = _composed(Kernel(drawing.random(8, 1, 3, 3), groups=8), Kernel(drawing.random(4, 8, 1, 1)))
    assert whole.groups == 1
    assert prod(whole.weight.shape) == 4 * 8 * 9


def test_a_refusal_keeps_the_first_place_it_names() -> None:
    refusal = Refusal("no").at("conv1")
    assert refusal == Refusal("no", "conv1")
    assert refusal.at("conv2") == refusal
    assert (str(refusal), str(Refusal("no"))) == ("conv1: no", "no")


# Batch norm and the like


@given(drawing.with_depthwise())
def test_a_depthwise_kernel_beside_a_pointwise_one(pair: Pair) -> None:
    whole = _composed(*pair)
    assert whole.groups == min(pair, key=lambda kernel: kernel.groups).groups
    for size in drawing.sizes(*pair):
        drawing.assert_equal(drawing.dense(whole, size), drawing.dense_chain(list(pair), size))


@given(drawing.kernels(), st.booleans())
def test_scaling_in_blocks_is_composing(kernel: Kernel, has_bias: bool) -> None:
    n = kernel.out_channels
    shape = (n, 1, *(1,) * kernel.dims)
    scale = Kernel(drawing.random(*shape), drawing.random(n) if has_bias else None, groups=n)
    whole, expected = compose_rounded(kernel, scale, torch.float64), _composed(kernel, scale)
    for size in drawing.sizes(kernel)[:2]:
        drawing.assert_equal(drawing.dense(whole, size), drawing.dense(expected, size))


@pytest.mark.parametrize("block", [1, 40, 1 << 18])
def test_blocks_of_any_size_round_once(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[compose_rounded.__module__], "_BLOCK", block)
    first = Kernel(torch.randn(7, 3, 3, 3), torch.randn(7))
    scale = Kernel(drawing.random(7, 1, 1, 1), drawing.random(7), groups=7)
    whole, exact = compose_rounded(first, scale, torch.float32), _composed(first.to(dtype=torch.float64), scale)
    assert whole.bias is not None
    assert exact.bias is not None
    assert torch.equal(whole.weight, exact.weight.float())
    assert torch.equal(whole.bias, exact.bias.float())
