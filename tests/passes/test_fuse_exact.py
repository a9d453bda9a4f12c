"""Where others are silently wrong: each of these models keeps its function, and merges as far as it can."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, fx, nn

import fxexpand
from drawing import random
from fusing import Layers, calls, fused, memory, randomised, refusals, same_function
from fxexpand.algebra import Kernel
from fxexpand.testing import UserConv


def image() -> Tensor:
    return random(2, 4, 4, 4)


def chain(*layers: nn.Module) -> nn.Sequential:
    return randomised(nn.Sequential(*layers))


# What has one layer, whatever the numbers: even kernels, strides, dilation, groups.

CHAINS: dict[str, Callable[[], list[nn.Module]]] = {
    "no bias after a bias": lambda: [nn.Conv2d(4, 6, 3), nn.Conv2d(6, 4, 1), nn.Conv2d(4, 4, 1, bias=False)],
    "stride before k×k": lambda: [nn.Conv2d(4, 4, 3, stride=2), nn.Conv2d(4, 4, 3, stride=(1, 2))],
    "dilation": lambda: [nn.Conv2d(4, 4, 2, dilation=2), nn.Conv2d(4, 4, 3, dilation=3)],
    "even and non-square": lambda: [nn.Conv2d(4, 4, (2, 3)), nn.Conv2d(4, 4, (1, 4), stride=(3, 1))],
    "padding=same": lambda: [nn.Conv2d(4, 4, 3, padding="same", bias=False), nn.Conv2d(4, 4, 1, padding="same")],
    "padding=valid": lambda: [nn.Conv2d(4, 4, 3, padding="valid"), nn.Conv2d(4, 4, 2, padding="valid")],
    "even padding=same": lambda: [nn.Conv2d(4, 4, 4, padding="same"), nn.BatchNorm2d(4)],
    "groups that differ": lambda: [nn.Conv2d(4, 12, 3, groups=4), nn.Conv2d(12, 6, 3, groups=6)],
    "groups without a common divisor": lambda: [nn.Conv2d(4, 6, 2, groups=2), nn.Conv2d(6, 9, 2, groups=3)],
    "padding in both": lambda: [nn.Conv2d(4, 4, 3, padding=2, bias=False), nn.Conv2d(4, 4, 3, padding=1)],
    "batch norm first": lambda: [nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)],
    "batch norm without affine": lambda: [nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, affine=False)],
    "batch norm twice": lambda: [nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4, eps=0.1, momentum=None)],
}


@pytest.mark.parametrize("layers", CHAINS)
def test_chains_that_are_one_layer(layers: str) -> None:
    signals = random(2, 4, 16, 17), random(1, 4, 15, 18)
    found = calls(fused(chain(*CHAINS[layers]()), *signals, when="always"))
    assert found == (["pad", "Conv2d"] if layers == "even padding=same" else ["Conv2d"])  # one side gets a zero more


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_the_padding_mode_of_the_first_layer_stays(mode: Any) -> None:
    first = nn.Conv2d(4, 4, 3, padding=(1, 2), padding_mode=mode)
    (conv,) = (
        module
        for module in fused(chain(first, nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)), image()).modules()
        if isinstance(module, nn.Conv2d)
    )
    assert (conv.padding_mode, conv.padding) == (mode, (1, 2))


# Layers and weights that are used more than once.


def called_twice(m: Any, x: Tensor) -> Any:
    return m.norm(m.conv(m.bn(m.conv(x)).relu()))


def batch_norm_called_twice(m: Any, x: Tensor) -> Any:
    return m.bn(m.conv(m.bn(m.other(x)).relu()))


def called_twice_once_alone(m: Any, x: Tensor) -> Any:
    return m.bn(m.conv(x)).relu() * m.conv(x).relu()


@pytest.mark.parametrize(
    ("run", "left"), [(called_twice, 0), (batch_norm_called_twice, 0), (called_twice_once_alone, 0)]
)
def test_a_module_called_at_two_places(run: Any, left: int) -> None:
    found = fused(Layers(run), image())
    assert calls(found).count("Conv2d") == 2
    assert calls(found).count("BatchNorm2d") == left


def test_one_module_under_two_names() -> None:
    model = Layers(lambda m, x: m.norm(m.alias(m.bn(m.conv(x)).relu())))
    model.alias = model.conv
    assert calls(fused(model, image())) == ["Conv2d", "relu", "Conv2d"]


def test_tied_weights() -> None:
    model = Layers(lambda m, x: m.other(m.norm(m.point(m.bn(m.conv(x)).relu()).relu())))
    model.other.weight = model.conv.weight
    model.point.weight = nn.Parameter(random(4, 4, 1, 1))
    assert calls(fused(model, image())).count("Conv2d") == 3


def test_tied_weights_that_remain_stay_tied() -> None:
    model = Layers(lambda m, x: m.last(m.dense(x).relu()))
    model.last.weight = model.dense.weight
    found = fused(model, random(3, 4))
    assert found.get_parameter("last.weight") is found.get_parameter("dense.weight")


# Other axes than those of channels: images of 4 × 4 with 4 channels, where the shapes do not tell.


def vector_along_the_width(m: Any, x: Tensor) -> Any:
    return m.bn(m.conv(x) + m.vector) * m.vector


def matrix_along_the_width(m: Any, x: Tensor) -> Any:
    return m.bn(m.conv(x) @ m.matrix)


def matrix_from_the_left(m: Any, x: Tensor) -> Any:
    return m.dense(m.matrix @ m.last(x))


def linear_along_the_width(m: Any, x: Tensor) -> Any:
    return m.bn(m.dense(m.conv(x))) + m.dense(x) + m.conv(x)


def concatenated_along_the_height(m: Any, x: Tensor) -> Any:
    return m.point(torch.cat([m.conv(x), m.other(x)], 2))


def sliced_along_the_height(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    return y[:, :, :2] + y[:, :, 2:]


def every_other_channel_backwards(m: Any, x: Tensor) -> Any:
    return m.point(m.conv(x)[:, [3, 2, 1, 0]]), m.conv(x)[:, ::2] + m.other(x)[:, -2:]


def samples_sliced(m: Any, x: Tensor) -> Any:
    return m.bn(m.conv(x)[:1]) + m.bn(m.conv(x)[1:])


def scale_for_each_position(m: Any, x: Tensor) -> Any:
    return m.bn(m.conv(x) * m.matrix) + m.conv(x) * m.scale.reshape(1, 1, 4, 1)


def batch_of_constants(m: Any, x: Tensor) -> Any:
    return m.conv(x) + m.matrix.reshape(4, 4, 1, 1)[:2]


def weight_from_the_input(m: Any, x: Tensor) -> Any:
    return F.conv2d(m.conv(x), x), F.linear(m.matrix, x[0, 0]), F.linear(x, m.matrix, m.last(x)[0, 0, 0])


def not_affine(m: Any, x: Tensor) -> Any:
    return m.conv(x) * m.other(x), 1 / m.conv(x), m.conv(x) ** 2, m.conv(x) / x, m.conv(x) // 2, 2 ** m.conv(x)


def rounded_between(m: Any, x: Tensor) -> Any:
    return m.bn(m.conv(x).float().double())


def two_outputs_of_one_region(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    return {"a": m.bn(y), "b": [m.norm(y), m.bn(m.norm(m.other(x)))]}


def the_input_itself(m: Any, x: Tensor) -> Any:
    return x * 1, x + 0, m.conv(x) * 0, x - x, m.conv(x) - m.conv(x)


def one_constant_for_all(m: Any, x: Tensor) -> Any:
    return m.bn(m.conv(x) + torch.ones_like(x)) + torch.zeros(4, 1, 1, dtype=torch.float64)


@pytest.mark.parametrize("when", ["cheaper", "always"])
@pytest.mark.parametrize(
    "run",
    [
        vector_along_the_width,
        matrix_along_the_width,
        matrix_from_the_left,
        linear_along_the_width,
        concatenated_along_the_height,
        sliced_along_the_height,
        every_other_channel_backwards,
        samples_sliced,
        scale_for_each_position,
        batch_of_constants,
        weight_from_the_input,
        not_affine,
        rounded_between,
        two_outputs_of_one_region,
        the_input_itself,
        one_constant_for_all,
    ],
)
@pytest.mark.parametrize("shown", [False, True], ids=["without examples", "with examples"])
def test_the_function_stays(run: Any, when: str, shown: bool) -> None:
    x = image()
    fused(Layers(run), x, when=when, examples=(x,) if shown else (), rtol=1e-10)


@pytest.mark.parametrize("kind", ["sum", "concatenation"])
@pytest.mark.parametrize("shown", [False, True], ids=["without examples", "with examples"])
def test_an_image_without_batch_axis(kind: str, shown: bool) -> None:
    """Then axis 1 is the height, which a slice or a concatenation of "channels" means as well."""

    def halves(m: Any, x: Tensor) -> Any:
        y = m.conv(x)
        return y[:, :2] + y[:, 2:]

    def joined(m: Any, x: Tensor) -> Any:
        a, b = torch.cat([m.conv(x), m.other(x)], 1).chunk(2, 1)
        return m.point(a - b)

    x = random(4, 4, 4)
    fused(Layers(halves if kind == "sum" else joined), x, examples=(x,) if shown else ())


def test_one_channel_and_a_constant_of_four() -> None:
    model = Layers(lambda m, x: m.conv(x) + m.scale)
    model.conv = nn.Conv2d(4, 1, 3).double()
    fused(model, image())


# Subclasses, precision, flags.


def test_a_subclass_that_keeps_forward_is_a_layer() -> None:
    assert calls(fused(chain(UserConv(4, 4, 3), nn.BatchNorm2d(4)), image())) == ["Conv2d"]


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class BatchNormAct(nn.BatchNorm2d):
    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps)
        act: Tensor = self.act(y)
        return act


class Doubling(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_subclass_with_a_forward_of_its_own_is_traced_into() -> None:
    model = chain(Standardized(4, 4, 3), BatchNormAct(4), Doubling(4, 4, 2), nn.BatchNorm2d(4))
    assert calls(fused(model, random(2, 4, 9, 9))) == ["Conv2d", "ReLU", "Conv2d"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_weights_are_composed_in_double_and_rounded_once(dtype: torch.dtype) -> None:
    model = chain(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)).to(dtype)
    found, exact = fxexpand.fuse(model), fxexpand.fuse(copy.deepcopy(model).double())
    assert calls(found) == ["Conv2d"]
    for value, reference in zip(found.state_dict().values(), exact.state_dict().values(), strict=True):
        assert value.dtype == dtype
        assert torch.equal(value, reference.to(dtype))


def test_mixed_precision_keeps_the_dtype_of_the_output() -> None:
    scale = Layers(lambda m, x: m.conv(x) * m.scale)
    scale.conv.float()
    norm = chain(nn.Conv2d(4, 4, 3, bias=False).bfloat16(), nn.BatchNorm2d(4))
    norm[0].bfloat16()
    norm[1].float()
    same_function(fxexpand.fuse(scale), scale, image().float(), rtol=1e-6)
    same_function(fxexpand.fuse(norm), norm, image().bfloat16(), rtol=1e-2)


def test_memory_format_of_the_new_layer() -> None:
    model = chain(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)).to(memory_format=torch.channels_last)
    (weight,) = (p for p in fused(model, image()).parameters() if p.dim() == 4)
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_flags_of_what_remains_and_of_what_is_new() -> None:
    model = chain(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Dropout(), nn.GELU())
    model[3].weight.requires_grad = False
    model.train()
    model[0:2].eval()
    found = fxexpand.fuse(model)
    assert calls(found) == ["Conv2d", "ReLU", "Conv2d", "Dropout", "GELU"]
    kept = found.get_submodule("3")
    assert (kept.weight.requires_grad, kept.bias.requires_grad) == (False, True)
    for index in (2, 3, 4, 5):
        assert found.get_submodule(str(index)).training
    (new,) = (m for path, m in found.named_modules() if isinstance(m, nn.Conv2d) and path != "3")
    assert not new.training


# The result as an object, and models that are no single graph.


class Stem(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(self.bn(self.conv(x)))
        return y


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(16, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.narrow(self.wide(x.flatten(1)))
        return y


class Gated(nn.Module):
    """Its root cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = Stem(), Head()

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        for _ in range(int(y.sum() > 0)):
            y = 2 * y
        result: Tensor = self.head(y)
        return result


def test_what_can_be_traced_of_a_model_that_cannot() -> None:
    model = randomised(Gated())
    merged = {entry.path: set(entry.nodes) for entry in fxexpand.explain(model).merged}
    assert merged == {"stem.conv": {"stem.conv", "stem.bn"}, "head.wide": {"head.wide", "head.narrow"}}
    found = fused(model, image(), image())
    assert sorted(calls(found)) == ["Conv2d", "Linear", "ReLU", "flatten"]
    assert {f"{path}.{key}" for path in merged for key in ("weight", "bias")} == set(found.state_dict())


@pytest.mark.parametrize("build", [Gated, Stem], ids=["no single graph", "one graph"])
def test_the_result_copies_pickles_and_loads(build: Any) -> None:
    found = fxexpand.fuse(randomised(build()))
    for other in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        same_function(other, found, image(), rtol=0)
        assert not memory(other) & memory(found)
    rebuilt = fxexpand.fuse(randomised(build()))
    rebuilt.load_state_dict(found.state_dict(), strict=True)
    same_function(rebuilt, found, image(), rtol=0)


def test_a_graph_module_is_fused_as_any_other_model() -> None:
    model = fxexpand.trace(chain(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    assert isinstance(model, fx.GraphModule)
    assert calls(fused(model, image())) == ["Conv2d"]


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Identity(), nn.BatchNorm2d(4)], ids=str)
def test_a_single_layer_is_left_as_it_is(layer: nn.Module) -> None:
    found = fused(randomised(layer), image())
    assert len(list(found.parameters())) == len(list(layer.parameters()))


def test_an_untouched_resnet() -> None:
    model = randomised(torchvision.models.resnet18(num_classes=10))
    explanation = fxexpand.explain(model)
    assert len(explanation.merged) == 20
    pairs = {frozenset(entry.nodes) for entry in explanation.merged}
    assert {frozenset(("conv1", "bn1")), frozenset(("layer2.0.downsample.0", "layer2.0.downsample.1"))} <= pairs
    assert all(node in str(explanation) for pair in pairs for node in pair)
    assert not refusals(model).keys() & {node for pair in pairs for node in pair}
    found = fused(model, random(1, 3, 32, 32))
    names = calls(found)
    assert (names.count("Conv2d"), names.count("Linear"), names.count("BatchNorm2d")) == (20, 1, 0)


def test_a_model_on_another_device() -> None:
    """The device "meta" stands for any other than the CPU, on which scales, pools and identities are made."""

    def run(m: Any, x: Tensor) -> Tensor:
        y = F.avg_pool2d(m.bn(m.conv(x)) * 2 + x, 1)
        out: Tensor = m.point(torch.cat([y[:, 2:], y[:, :2]], 1) - 1) * m.scale
        return out

    model = Layers(run)
    expected = fxexpand.fuse(model, torch.randn(1, 4, 4, 4, dtype=torch.float64)).state_dict()
    found = fxexpand.fuse(model.to("meta"), torch.randn(1, 4, 4, 4, dtype=torch.float64, device="meta")).state_dict()
    assert list(found) == list(expected)
    assert len(found) == 2
    assert all(value.device.type == "meta" and value.shape == expected[key].shape for key, value in found.items())


def test_a_lift_in_another_dtype_than_the_module() -> None:
    class Doubles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.full((), 2.0))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.factor if x.sum() > -1e9 else x

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Doubles()).eval()
    ones = torch.ones(4, 1, 1, 1, dtype=torch.float64)
    fused = fxexpand.fuse(model, lifts={Doubles: lambda m: Kernel(m.factor.double() * ones, groups=4)})
    assert [type(module) for module in fused.children()] == [nn.Conv2d]
    x = torch.randn(1, 3, 2, 2)
    assert fused(x).dtype == torch.float32
    assert torch.allclose(fused(x), model(x), rtol=1e-6)
