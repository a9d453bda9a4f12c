"""What fuse must not merge stays as it is, and explain says why."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fxexpand
from drawing import random
from fusing import Layers, calls, fused, left_alone, randomised, refusals, same_function
from fxexpand import FxExpandError
from fxexpand.testing import assert_equivalent


def image() -> Tensor:
    return random(2, 4, 4, 4)


def chain(*layers: nn.Module) -> nn.Module:
    return randomised(nn.Sequential(*layers))


# Layers that are more than one affine map, or another one than they seem.


def test_depthwise_then_pointwise_is_dearer() -> None:
    model = chain(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 16, 1))
    x = random(1, 8, 7, 7)
    left_alone(model, x, because=r'when="always"', when="cheaper")
    assert calls(fused(model, x, when="always")) == ["Conv2d"]


def test_a_bottleneck_of_linear_layers_is_dearer() -> None:
    model = chain(nn.Linear(16, 2), nn.Linear(2, 16))
    left_alone(model, random(3, 16), because=r'when="always"', when="cheaper")
    assert calls(fused(model, random(3, 16), when="always")) == ["Linear"]


def test_a_strided_layer_after_a_large_kernel_is_compared_per_output() -> None:
    """3×3 at stride 1, then 1×1 at stride 2: the first computes four outputs for each one that is used."""
    model = chain(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Conv2d(8, 16, 1, stride=2))
    assert calls(fused(model, random(1, 8, 9, 9))) == ["Conv2d"]


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, padding=1)],
        [nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1, bias=False)],
        [nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.AvgPool2d(2, padding=1)],
        [nn.Conv2d(4, 4, 3, bias=False), nn.ZeroPad2d(1)],
    ],
)
def test_padding_in_a_middle_layer(layers: list[nn.Module]) -> None:
    model = chain(*layers)
    found = fused(model, image(), when="always")
    assert calls(found)[-1] == type(layers[-1]).__name__
    assert any("pad" in reason for reason in refusals(model, when="always").values())


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_another_padding_mode_in_the_middle(mode: Any) -> None:
    model = chain(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1, padding_mode=mode))
    left_alone(model, image(), because=mode)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_another_padding_mode_in_a_branch(mode: Any) -> None:
    model = Layers(lambda m, x: m.conv(x) + m.other(x))
    model.conv = nn.Conv2d(4, 4, 3, padding=1, padding_mode=mode).double()
    left_alone(model, image(), because=mode)


def test_other_padding_modules() -> None:
    for pad in (nn.ReflectionPad2d(1), nn.ConstantPad2d(1, 3.0)):
        model = chain(nn.Conv2d(4, 4, 1), pad, nn.Conv2d(4, 4, 3))
        assert calls(fused(model, image(), when="always")) == ["Conv2d", type(pad).__name__, "Conv2d"]


@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool2d(3, 2, padding=1, count_include_pad=False),
        nn.AvgPool2d(3, 2, ceil_mode=True),
    ],
)
def test_average_pools_that_divide_by_different_counts(pool: nn.AvgPool2d) -> None:
    cause = "ceil_mode" if pool.ceil_mode else "count_include_pad"
    model = chain(nn.Conv2d(4, 4, 3, padding=1, bias=False), pool)
    left_alone(model, random(1, 4, 6, 6), random(1, 4, 7, 7), because=cause)


def test_average_pools_without_a_fixed_window() -> None:
    model = chain(nn.Conv2d(4, 4, 3, padding=1), nn.AdaptiveAvgPool2d(2))
    assert calls(fused(model, random(1, 4, 6, 6), random(1, 4, 7, 7), when="always")) == ["Conv2d", "AdaptiveAvgPool2d"]


def test_branches_of_different_strides_or_sizes() -> None:
    x = random(1, 4, 3, 3)
    for other in (nn.Conv2d(4, 4, 3, padding=1, stride=3), nn.Conv2d(4, 4, 3)):  # 1 × 1, which broadcasts
        model = Layers(lambda m, x: m.conv(x) + m.other(x))
        model.other = other.double()
        left_alone(model, x, because="stride|size|pad|offset|taps")


def test_a_branch_of_one_channel_broadcasts() -> None:
    model = Layers(lambda m, x: m.conv(x) + m.other(x))
    model.other = nn.Conv2d(4, 1, 3, padding=1).double()
    left_alone(model, image(), because="channels")


def test_batch_norm_without_running_statistics() -> None:
    model = chain(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    left_alone(model, image(), because="statistics")


class TestTrainingMode:
    def test_batch_norm_is_refused_with_one_warning(self) -> None:
        convs = [nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(3)]
        model = chain(*(layer for conv in convs for layer in (conv, nn.BatchNorm2d(4), nn.ReLU()))).train()
        with pytest.warns(UserWarning, match=r"\.eval\(\)") as caught:
            fxexpand.fuse(model)
        assert len(caught) == 1
        assert caught[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            left_alone(model, image(), because=r"training mode.*\.eval\(\)")

    def test_dropout_is_refused(self) -> None:
        model = chain(nn.Linear(8, 4), nn.Dropout(0.5), nn.Linear(4, 2)).train()
        left_alone(model, random(3, 8), because=r"training mode.*\.eval\(\)")
        assert calls(fused(model.eval(), random(3, 8))) == ["Linear"]

    def test_functional_dropout_is_random_whatever_the_mode(self) -> None:
        model = Layers(lambda m, x: m.last(F.dropout(m.dense(x), 0.5)))
        assert calls(fused(model, random(3, 4))) == ["Linear", "dropout", "Linear"]

    def test_functional_batch_norm_goes_on_changing_its_statistics(self) -> None:
        def run(m: Any, x: Tensor) -> Any:
            y = F.batch_norm(m.conv(x), m.bn.running_mean, m.bn.running_var, training=True)
            return y, m.bn.running_mean + 0, m.bn.running_var + 0

        with warnings.catch_warnings():
            warnings.simplefilter("error")  # model.eval() would change nothing
            fused(Layers(run), image())

    def test_an_eval_mode_model_gives_no_warning(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fxexpand.fuse(chain(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))


def hooked(register: str, hook: Any) -> Any:
    def change(conv: nn.Conv2d) -> None:
        getattr(conv, register)(hook)

    return change


@pytest.mark.parametrize(
    ("change", "because"),
    [
        (hooked("register_forward_hook", lambda _module, _inputs, output: 2 * output), "hook"),
        (hooked("register_forward_pre_hook", lambda _module, inputs: (2 * inputs[0],)), "hook"),
        (hooked("register_full_backward_hook", lambda *_: None), "hook"),
        (parametrizations.weight_norm, "parametri"),
        (parametrizations.spectral_norm, "parametri"),
        (parametrizations.orthogonal, "parametri"),
        (lambda conv: prune.l1_unstructured(conv, "weight", 0.5), "hook|prun"),
    ],
    ids=["forward hook", "pre-hook", "backward hook", "weight norm", "spectral norm", "orthogonal", "pruning"],
)
def test_what_hangs_on_a_layer(change: Any, because: str) -> None:
    for index in (0, 1):
        model = chain(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1)).requires_grad_(False)  # a pruned weight copies only so
        assert isinstance(model, nn.Sequential)
        change(model[index])
        left_alone(model.eval(), image(), because=because)


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.Identity, nn.Dropout])
def test_hooks_on_what_has_no_weight(kind: type[nn.Module]) -> None:
    between = kind(4) if kind is nn.BatchNorm2d else kind()
    model = chain(nn.Conv2d(4, 4, 3), between, nn.Conv2d(4, 4, 1))
    between.register_forward_hook(lambda _module, _inputs, output: output.square())
    left_alone(model, image(), because="hook")


def test_a_hook_on_a_container_still_runs() -> None:
    model = chain(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)), nn.ReLU())
    assert isinstance(model, nn.Sequential)
    model[0].register_forward_hook(lambda _module, _inputs, output: output.square())
    fused(model, image())


def test_batch_norm_after_a_linear_layer_on_three_axes() -> None:
    """Batch norm works on axis 1, the linear layer on the last: with 4 × 4 the shapes do not tell."""
    model = Layers(lambda m, x: m.bn1d(m.dense(x)))
    rows, sequences = random(3, 4), random(3, 4, 4)
    assert calls(fused(model, sequences, rows)) in (["Linear", "BatchNorm1d"], ["Linear"])
    assert calls(fused(model, sequences, examples=(sequences,))) == ["Linear", "BatchNorm1d"]
    assert re.search("ax[ie]s", refusals(model, sequences)["bn1d"])
    assert calls(fused(model, rows, examples=(rows,))) == ["Linear"]


class TestArguments:
    @pytest.mark.parametrize("when", ["sometimes", "", None, True])
    def test_when(self, when: Any) -> None:
        for task in (fxexpand.fuse, fxexpand.explain):
            with pytest.raises(FxExpandError, match=r"cheaper.*always"):
                task(nn.Linear(2, 2), when=when)

    @pytest.mark.parametrize("model", [None, lambda x: x, nn.Linear, [nn.Linear(2, 2)]])
    def test_model(self, model: Any) -> None:
        for task in (fxexpand.fuse, fxexpand.explain):
            with pytest.raises(FxExpandError, match="Module"):
                task(model)

    @pytest.mark.parametrize("lifts", [{"Conv2d": lambda _: None}, {nn.Conv2d: 3}, 5])
    def test_lifts(self, lifts: Any) -> None:
        for task in (fxexpand.fuse, fxexpand.explain):
            with pytest.raises(FxExpandError, match="lifts"):
                task(nn.Linear(2, 2), lifts=lifts)

    def test_examples_that_do_not_run(self) -> None:
        for task in (fxexpand.fuse, fxexpand.explain):
            with pytest.raises(FxExpandError, match="example"):
                task(nn.Linear(2, 2), torch.ones(3, 3))


def test_batch_norm_of_one_dimension_after_a_convolution_of_two_without_batch() -> None:
    """It normalises the rows there, which are as many as the channels."""
    model = randomised(nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm1d(4)))
    fused = fxexpand.fuse(model)
    x = random(2, 4, 5)
    assert torch.equal(fused(x), model(x))
    assert "no batch" in fxexpand.explain(model).refused[1].reason


@pytest.mark.parametrize("informed", [False, True])
def test_functional_batch_norm_before_a_convolution_of_two_without_batch(informed: bool) -> None:
    """Axis 1 has as many rows as axis 0 has channels: nothing but the values would tell."""

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(6, 1, 1, bias=False)
            self.register_buffer("mean", torch.randn(6))
            self.register_buffer("var", torch.rand(6) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(F.batch_norm(x, self.mean, self.var))  # type: ignore[arg-type]
            return y

    model = Rows().double().eval()
    rows, images = random(6, 6, 6), random(2, 6, 6, 6)
    examples = (rows,) if informed else ()
    assert torch.equal(fxexpand.fuse(model, *examples, when="always")(rows), model(rows))
    reason = refusals(model, *examples)["batch_norm"]
    assert "no channel" in reason
    assert calls(fused(model, images, examples=(images,))) == ["Conv2d"]


def test_the_channels_of_batch_norm_of_one_dimension_are_not_those_of_a_convolution_without_batch() -> None:
    """6 rows and 2 channels: the slice takes one of 2."""

    class Sliced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.conv = nn.BatchNorm1d(6), nn.Conv2d(1, 1, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv((self.bn(x) * 1.5)[..., -1:, :, :])
            return y

    model = randomised(Sliced())
    x = random(2, 6, 6)
    for examples in ((), (x,)):
        same_function(fxexpand.fuse(model, *examples, when="always"), model, x)


def test_a_value_that_layers_read_along_different_axes() -> None:
    """The linear layer's one feature is the last axis; the slice takes channels of two."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool, self.other, self.dense = nn.AvgPool3d((1, 1, 3)), nn.AvgPool3d(1), nn.Linear(1, 3, bias=False)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.pool(x)
            return self.other(y[:, 1:]), self.dense(y)

    model = randomised(Both())
    x = random(2, 2, 4, 4, 4)
    for expected, found in zip(model(x), fxexpand.fuse(model)(x), strict=True):
        assert torch.equal(found, expected)


class Run(nn.Module):
    """``run(a(x), b(x))`` of two convolutions."""

    def __init__(self, run: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, dtype=torch.float64), nn.Conv2d(4, 4, 3, dtype=torch.float64)
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self.a(x), self.b(x))


OLD_FORMS: list[Callable[[Any, Any], Any]] = [
    lambda a, b: torch.add(a, 2, b),
    lambda a, b: torch.sub(a, 2, b),
    lambda a, b: a.add(2, b),
    lambda a, b: a.add_(2, b),
]


@pytest.mark.filterwarnings("ignore:This overload of")
@pytest.mark.parametrize("run", OLD_FORMS, ids=["add", "sub", "method", "in place"])
def test_a_sum_in_its_old_form_is_left_alone(run: Callable[[Any, Any], Any]) -> None:
    """With the factor between the two, as torch still takes them."""
    model, x = Run(run), image()
    for made in (fxexpand.fuse(model), fxexpand.fuse(model, x, when="always"), fxexpand.collapse(model, x)):
        assert_equivalent(model, made, x)


@pytest.mark.parametrize("factor", [float("inf"), float("nan")])
def test_a_factor_that_is_not_finite_is_left_alone(factor: float) -> None:
    """Infinite weights would make NaN of what cancels."""
    model, x = Run(lambda a, b: a * factor), image()
    assert torch.equal(fxexpand.fuse(model, when="always")(x).isnan(), model(x).isnan())
    assert any("infinity or NaN" in entry.reason for entry in fxexpand.explain(model).refused)
