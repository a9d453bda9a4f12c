"""Costs against two other ways of counting: the entries of the matrix, and torch's FLOP counter."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

from hypothesis import assume, given
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import drawing
from fxexpand.algebra import Kernel
from fxexpand.algebra.cost import macs, macs_per_output, parameters
from fxexpand.testing.draw.layers import convolutions


@given(drawing.kernels())
def test_macs_are_the_entries_of_the_matrix(kernel: Kernel) -> None:
    """Without padding, a multiplication is one nonzero entry."""
    kernel = replace(kernel, padding=())
    size = drawing.sizes(kernel)[-1]
    M, _ = drawing.dense(kernel, size)
    assert macs(kernel, size) == int(M.count_nonzero())
    assert macs_per_output(kernel) * prod(kernel.output_size(size)) == macs(kernel, size)


@given(drawing.kernels())
def test_macs_are_half_of_torchs_flops(kernel: Kernel) -> None:
    assume(kernel.dims > 0 or kernel.groups == 1)  # torch has no grouped linear layer
    size = drawing.sizes(kernel)[-1]
    x = drawing.signal(kernel, size, batch=1)
    with FlopCounterMode(display=False) as counter:
        replace(kernel, bias=None).apply(x)
    assert counter.get_total_flops() == 2 * macs(kernel, size)


@given(convolutions())
def test_parameters_are_those_of_the_layer(layer: Any) -> None:
    kernel = Kernel(layer.weight, layer.bias, groups=layer.groups)
    assert parameters(kernel) == sum(parameter.numel() for parameter in layer.parameters())


def test_a_linear_layer() -> None:
    layer = nn.Linear(5, 7)
    kernel = Kernel(layer.weight, layer.bias)
    assert (parameters(kernel), macs(kernel, ())) == (42, 35)
