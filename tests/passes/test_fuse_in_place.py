"""Values and weights that more than one place sees, or changes: what they are to each stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxexpand
from drawing import random
from fusing import Layers, calls, fused, left_alone, randomised


def image() -> Tensor:
    return random(2, 4, 4, 4)


# `run(model, x)` over the layers of `Layers`. In each, conv and bn cannot merge.


def returned_too(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    return m.bn(y), y


def read_by_another(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    return m.bn(y).relu() * torch.sigmoid(y)


def changed_after(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    z = m.bn(y)
    y += 1
    return z * y.relu()


@pytest.mark.parametrize("run", [returned_too, read_by_another, changed_after])
def test_a_value_that_is_used_elsewhere(run: Any) -> None:
    left_alone(Layers(run), image(), because="used|elsewhere|return|another|also|more than")


def in_place_method(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    y.relu_()
    return m.bn(y)


def in_place_function(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    F.relu(y, inplace=True)
    return m.bn(y)


def in_place_out(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    torch.square(y, out=y)
    return m.bn(y)


def in_place_through_a_view(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    y.view(-1).exp_()
    return m.bn(y)


def in_place_through_a_slice(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    y[:, 0].zero_()
    return m.bn(y)


def in_place_through_detach(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    y.detach().abs_()
    return m.bn(y)


def in_place_through_a_chunk(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    first, _ = y.chunk(2, 1)
    first.sigmoid_()
    return m.bn(y)


@pytest.mark.parametrize(
    "run",
    [
        in_place_method,
        in_place_function,
        in_place_out,
        in_place_through_a_view,
        in_place_through_a_slice,
        in_place_through_detach,
        in_place_through_a_chunk,
    ],
)
def test_a_value_that_is_modified_in_place(run: Any) -> None:
    left_alone(Layers(run), image(), because="in place|used|read")


def input_modified_between_reads(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    x.mul_(2)
    return y + m.other(x)


def input_modified_through_a_view_between_reads(m: Any, x: Tensor) -> Any:
    flat, y = x.view(-1), m.conv(x)
    flat.mul_(2)
    return y + m.other(x)


def residual_into_the_callers_tensor(m: Any, x: Tensor) -> Any:
    x += m.conv(x)
    return x


def scaled_in_the_callers_tensor(m: Any, x: Tensor) -> Any:
    x *= 2
    return m.conv(x)


def shifted_in_the_callers_tensor(m: Any, x: Tensor) -> Any:
    return m.conv(x.add_(m.gain))


@pytest.mark.parametrize(
    "run",
    [
        input_modified_between_reads,
        input_modified_through_a_view_between_reads,
        residual_into_the_callers_tensor,
        scaled_in_the_callers_tensor,
        shifted_in_the_callers_tensor,
    ],
)
def test_an_input_that_is_modified_in_place(run: Any) -> None:
    left_alone(Layers(run), image(), because="in place")


def in_place_by_itself(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    y *= y
    return m.bn(y)


def reading_a_view_of_the_sum(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    z = y[:, :2]
    y += m.other(x)
    return z


def identity_of_the_callers_tensor(m: Any, x: Tensor) -> Any:
    y = F.dropout(x, training=False).contiguous()
    y += m.conv(x)
    return y


@pytest.mark.parametrize("run", [in_place_by_itself, reading_a_view_of_the_sum, identity_of_the_callers_tensor])
def test_a_result_in_a_tensor_that_another_name_sees(run: Any) -> None:
    found = fused(Layers(run), image(), when="always")
    assert calls(found) == calls(fxexpand.trace(Layers(run)))


def test_an_input_that_is_modified_between_a_layer_and_its_batch_norm() -> None:
    def run(m: Any, x: Tensor) -> Any:
        y = m.conv(x)
        x.zero_()
        return m.bn(y)

    fused(Layers(run), image())


# Weights that change while the model runs are no constants.


def scale_changes(m: Any, x: Tensor) -> Any:
    m.gain.mul_(2)
    return m.conv(x) * m.gain


def weight_changes(m: Any, x: Tensor) -> Any:
    m.conv.weight.data.add_(1)
    return m.bn(m.conv(x))


def statistics_change(m: Any, x: Tensor) -> Any:
    m.bn.running_mean.add_(1)
    return m.bn(m.conv(x))


@pytest.mark.parametrize("run", [scale_changes, weight_changes, statistics_change])
def test_constants_that_the_model_changes(run: Any) -> None:
    model = Layers(run)
    found = fused(model, image(), when="always")
    assert len(calls(found)) == len(calls(fxexpand.trace(model)))


# Weights that are read elsewhere keep their values.


def weight_read(m: Any, x: Tensor) -> Any:
    return m.bn(m.conv(x)), m.conv.weight.square().sum(), m.conv.bias.norm()


def weight_returned(m: Any, x: Tensor) -> Any:
    return m.conv.weight, m.bn(m.conv(x))


def statistics_read(m: Any, x: Tensor) -> Any:
    return m.bn(m.conv(x)) * torch.sigmoid(m.bn.running_mean.mean()), m.bn.running_var


def weight_used_in_another_call(m: Any, x: Tensor) -> Any:
    y = F.conv2d(m.bn(m.conv(x)).relu(), m.conv.weight)
    return F.batch_norm(y, m.bn.running_mean, m.bn.running_var).relu()


@pytest.mark.parametrize("run", [weight_read, weight_returned, statistics_read, weight_used_in_another_call])
def test_weights_that_something_else_reads(run: Any) -> None:
    assert "BatchNorm2d" not in calls(fused(Layers(run), image()))


def test_a_change_behind_an_alias() -> None:
    """The identity gives its input itself, which changes before the convolution reads it."""

    class Aliases(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.same, self.relu, self.conv = nn.Identity(), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.same(x)
            self.relu(x)
            out: Tensor = self.conv(y)
            return out

    model = fx.symbolic_trace(randomised(Aliases()))
    fused = fxexpand.fuse(model)
    x = random(2, 4, 3, 3)
    assert torch.equal(fused(x.clone()), model(x.clone()))


def test_nothing_shares_memory_with_a_shift() -> None:
    model = Layers(lambda m, x: m.other(x) + m.scale)
    fused = fxexpand.fuse(model)
    assert isinstance(fused, fx.GraphModule)
    assert [node.op for node in fused.graph.nodes] == ["placeholder", "call_module", "output"]
    before = fused(torch.ones(1, 4, 4, 4, dtype=torch.float64))
    model.get_parameter("scale").data.mul_(3)
    assert torch.equal(fused(torch.ones(1, 4, 4, 4, dtype=torch.float64)), before)


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (4, 4), (2, 4, 4, 4)])
def test_a_scale_that_may_broadcast_its_input(shape: tuple[int, ...]) -> None:
    """It makes 4 channels of one, and an image of a row; of what the layer after it reads, only examples tell."""
    model = Layers(lambda m, x: m.conv(x * m.scale))
    x = random(*shape)
    assert torch.equal(fxexpand.fuse(model)(x), model(x))
    fused = fxexpand.fuse(model, x)
    assert (fused(x) - model(x)).norm() <= 1e-14 * model(x).norm()
