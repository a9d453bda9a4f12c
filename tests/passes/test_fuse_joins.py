"""Chains, branches and calls that are one affine map become one layer, however they are written."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drawing import CONVOLUTIONS, random
from fusing import NORMS, Layers, becomes, calls, fused, images, randomised

# `run(model, x)` over the layers of `Layers`.


def subtraction(m: Any, x: Tensor) -> Any:
    return m.bn(m.conv(x) - m.other(x))


def subtraction_by_function(m: Any, x: Tensor) -> Any:
    return torch.sub(m.conv(x), m.other(x), alpha=3)


def addition_by_function(m: Any, x: Tensor) -> Any:
    return torch.add(m.conv(x), m.other(x), alpha=0.5)


def addition_by_method(m: Any, x: Tensor) -> Any:
    return m.conv(x).sub(m.other(x)).add(m.point(x), alpha=2).mul(3)


def subtraction_from_the_input(m: Any, x: Tensor) -> Any:
    return x - m.scale * m.conv(x)


def subtraction_from_a_constant(m: Any, x: Tensor) -> Any:
    return 1 - m.conv(x)


def arithmetic(m: Any, x: Tensor) -> Any:
    return -(2 * m.conv(x) / 3 - 1) + m.gain


def functional(m: Any, x: Tensor) -> Any:
    y = F.conv2d(x, m.other.weight, bias=m.vector, padding="same")
    return F.batch_norm(y, m.norm.running_mean, m.norm.running_var, m.norm.weight, m.norm.bias, eps=0.1)


def functional_by_torch(m: Any, x: Tensor) -> Any:
    return torch.conv2d(x, m.matrix[:, :, None, None], padding=1) + torch.conv2d(
        x, m.other.weight, padding=2, dilation=1
    )


def called_by_keyword(m: Any, x: Tensor) -> Any:
    return m.bn(input=m.conv(input=x))


def in_place_on_its_own(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    y += m.other(x)
    y *= m.scale
    return m.bn(y)


def padded_by_function(m: Any, x: Tensor) -> Any:
    return F.conv2d(F.pad(x, (2, 2, 1, 1)), m.other.weight)


def averaged_in_windows(m: Any, x: Tensor) -> Any:
    return F.avg_pool2d(m.bn(m.conv(x)), 2)


def chunked_and_summed(m: Any, x: Tensor) -> Any:
    a, b = torch.cat([m.conv(x), m.other(x)], 1).chunk(2, 1)
    return a + b


def split_and_summed(m: Any, x: Tensor) -> Any:
    a, b = torch.split(m.conv(x), [2, 2], dim=1)
    return a - b


def sliced_and_summed(m: Any, x: Tensor) -> Any:
    y = m.bn(m.conv(x))
    return y[:, :2] + y[:, 2:]


def concatenated_into_one_layer(m: Any, x: Tensor) -> Any:
    y = torch.cat((m.conv(x), m.other(x)), dim=1)
    return F.conv2d(y, torch.cat([m.matrix, m.matrix.t()], 1)[:, :, None, None])


def dropped_in_eval_mode(m: Any, x: Tensor) -> Any:
    return m.bn(F.dropout(m.conv(x), training=False))


@pytest.mark.parametrize(
    "run",
    [
        subtraction,
        subtraction_by_function,
        addition_by_function,
        addition_by_method,
        subtraction_from_the_input,
        subtraction_from_a_constant,
        arithmetic,
        functional,
        functional_by_torch,
        called_by_keyword,
        in_place_on_its_own,
        padded_by_function,
        averaged_in_windows,
        sliced_and_summed,
        dropped_in_eval_mode,
    ],
)
def test_joins_and_calls_become_one_convolution(run: Any) -> None:
    x = random(2, 4, 4, 4)
    examples = (x,) if run is functional else ()  # batch norm as a function also takes an image without batch
    becomes("Conv2d", Layers(run), x, examples=examples)


@pytest.mark.parametrize("run", [chunked_and_summed, split_and_summed, concatenated_into_one_layer])
def test_joins_of_channels_do_once_the_channels_are_known_to_be_axis_one(run: Any) -> None:
    x = random(2, 4, 4, 4)
    becomes("Conv2d", Layers(run), x, examples=(x,))


def weights_multiplied(m: Any, x: Tensor) -> Any:
    return torch.flatten(x, 1) @ m.matrix @ m.matrix.t()


def added_and_multiplied(m: Any, x: Tensor) -> Any:
    return torch.addmm(m.vector, m.dense(x), m.matrix, beta=2, alpha=0.5)


def linear_by_function(m: Any, x: Tensor) -> Any:
    return F.linear(torch.matmul(x, m.matrix), m.matrix, m.vector) * m.vector


def linear_chain(m: Any, x: Tensor) -> Any:
    return m.last(m.dense(m.last(x.flatten(1))))


def linear_branches(m: Any, x: Tensor) -> Any:
    return x + m.dense(x) - torch.mm(x, m.matrix)


def linear_with_batch_norm(m: Any, x: Tensor) -> Any:
    return F.dropout(m.bn1d(m.dense(x)), 0.5, False) + m.vector


@pytest.mark.parametrize(
    "run",
    [added_and_multiplied, linear_by_function, linear_branches, linear_with_batch_norm],
)
def test_linear_calls_become_one_linear_layer(run: Any) -> None:
    x = random(3, 4)
    becomes("Linear", Layers(run), x, examples=(x,))


@pytest.mark.parametrize("run", [weights_multiplied, linear_chain])
def test_linear_layers_after_a_flatten_become_one(run: Any) -> None:
    assert calls(fused(Layers(run), random(3, 4))) == ["flatten", "Linear"]


def chain(*layers: nn.Module) -> nn.Module:
    return randomised(nn.Sequential(*layers))


@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1])
def test_pointwise_layers_and_batch_norm_around_a_transposed_convolution(d: int, padding: int) -> None:
    conv, norm = CONVOLUTIONS[d - 1], NORMS[d - 1]
    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[d - 1]
    up = transposed(8, 8, 3, stride=2, padding=padding, output_padding=1, groups=2)
    model = chain(up, norm(8))
    becomes(f"ConvTranspose{d}d", model, *images(d))
    model = chain(conv(8, 8, 1, bias=False), up, norm(8), conv(8, 4, 1), norm(4))
    becomes(f"ConvTranspose{d}d", model, *images(d), when="always")


@pytest.mark.parametrize(
    "pool",
    [nn.AvgPool2d(2), nn.AvgPool2d(3, 2), nn.AvgPool2d((2, 3), (1, 2)), nn.AvgPool2d(2, divisor_override=3)],
    ids=str,
)
def test_average_pools_of_fixed_window(pool: nn.Module) -> None:
    becomes("Conv2d", chain(nn.Conv2d(8, 8, 3, padding=1), pool, nn.BatchNorm2d(8)), *images(), when="always")


@pytest.mark.parametrize("pad", [nn.ZeroPad2d((2, 2, 1, 1)), nn.ConstantPad2d(2, 0.0)], ids=str)
def test_zeros_padded_before_a_convolution_become_its_padding(pad: nn.Module) -> None:
    model = chain(pad, nn.Conv2d(8, 8, 3, padding=(0, 1)), nn.BatchNorm2d(8))
    becomes("Conv2d", model, *images())


def test_more_zeros_on_one_side_keep_the_function() -> None:
    model = chain(nn.ZeroPad2d((1, 0, 2, 1)), nn.Conv2d(8, 8, 2), nn.BatchNorm2d(8))
    found = fused(model, *images())
    assert calls(found).count("Conv2d") == 1
    assert "BatchNorm2d" not in calls(found)


def test_a_hand_made_grouped_convolution_and_the_layer_after_it_become_one() -> None:
    def run(m: Any, x: Tensor) -> Any:
        a, b = x[:, :4], x[:, 4:]
        return m.point(torch.cat([m.conv(a), m.other(b)], 1))

    model = Layers(run)
    model.point = nn.Conv2d(8, 2, 1)
    x = random(2, 8, 6, 5)
    becomes("Conv2d", randomised(model), x, examples=(x,))


def test_a_deep_linear_chain_becomes_one_layer() -> None:
    widths = [12, 64, 64, 48, 5]
    layers = [nn.Linear(m, n, bias=i != 2) for i, (m, n) in enumerate(pairwise(widths))]
    found = becomes("Linear", chain(*layers), random(7, 12), random(2, 3, 12))
    assert [tuple(t.shape) for t in found.state_dict().values()] == [(5, 12), (5,)]
