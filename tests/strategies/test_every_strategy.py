"""What holds for every strategy of the library: its formula, one kernel again, the errors of its options."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fxexpand
from drawing import random
from expansions import Expansion, branch_expansions, chain_expansions
from fxexpand import CK, CL, FC, ContractionError, ExpansionError, RuleError
from fxexpand.graph.collapsed import Collapsed
from fxexpand.strategies import ACNet, DiverseBranch, LowRank, MobileOne, Orepa, Overparam, RepVGG, Strategy
from fxexpand.testing import as_trained

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
CROSS = ["square", "vertical.pad", "vertical.conv", "horizontal.pad", "horizontal.conv"]
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def kernels(model: nn.Module) -> int:
    return sum(isinstance(module, LAYERS) for module in model.modules())


def relative(found: Any, expected: Any) -> float:
    return float((found - expected).norm() / (expected.norm() + 1e-300))


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad(model(x).square().sum(), learnt))


# Structure


EXAMPLES: list[tuple[Strategy, nn.Module, dict[str, float]]] = [
    (CL(3), nn.Conv2d(4, 6, (3, 5)), {"K": 15, "p": 12, "q": 18}),
    (CK(4), nn.Conv2d(4, 6, 9), {"K": 81, "p": 16, "q": 24, "l": 4}),
    (FC(2, depth=4), nn.Linear(4, 6), {"p": 8, "q": 12, "l": 4}),
    (ACNet(), nn.Conv2d(4, 6, (3, 5)), {"a": 3, "b": 5}),
    (RepVGG(), nn.Conv3d(4, 6, (3, 1, 2)), {"K": 6}),
    (MobileOne(3), nn.Conv2d(4, 6, 3), {"K": 9, "b": 3}),
    (DiverseBranch(), nn.Conv2d(4, 6, (2, 3)), {"K": 6}),
    (Orepa(5), nn.Conv2d(4, 6, 3), {"K": 9, "e": 5}),
    (Overparam(2, depth=4), nn.Conv1d(4, 6, 3), {"K": 3, "w": 12, "l": 4}),
    (LowRank(2), nn.Conv2d(4, 6, (3, 5)), {"a": 3, "b": 5, "r": 2}),
]


@pytest.mark.parametrize(("strategy", "layer", "known"), EXAMPLES, ids=lambda value: str(value)[:24])
@pytest.mark.filterwarnings("ignore:expand")
def test_weights_are_as_many_as_its_formula_says(strategy: Strategy, layer: Any, known: dict[str, float]) -> None:
    plain = strategy.formula.replace("·", "*").replace("−", "-").replace("²", "**2")
    expected = eval(plain, {"m": 4, "n": 6, **known})
    big = fxexpand.expand(layer, strategy)
    found = sum(p.numel() for name, p in big.named_parameters() if name.endswith("weight") and p.requires_grad)
    assert found == expected


def test_all_of_them_say_where_they_come_from_and_what_they_make() -> None:
    classes = [cls for cls in vars(fxexpand.strategies).values() if inspect.isclass(cls) and issubclass(cls, Strategy)]
    own = [cls for cls in classes if cls.__name__ not in ("Strategy", "Then")]
    assert {type(strategy) for strategy, *_ in EXAMPLES} == set(own)
    for cls in own:
        assert cls.source
        assert cls.structure
        assert cls.formula in " ".join(str(cls.__doc__).split()), cls.__name__


@pytest.mark.parametrize(
    ("strategy", "names"),
    [
        (ACNet(), CROSS),
        (RepVGG(), ["kernel", "point.pad", "point.conv", "identity"]),
        (RepVGG(identity=False), ["kernel", "point.pad", "point.conv"]),
        (MobileOne(2), ["conv_0", "conv_1", "scale.pad", "scale.conv", "skip"]),
        (Overparam(1, depth=3), ["layer_0", "layer_1", "layer_2"]),
        (
            CL(1).then(RepVGG(identity=False)),
            ["expand", "kernel.kernel", "kernel.point.pad", "kernel.point.conv", "reduce"],
        ),
    ],
    ids=str,
)
def test_names(strategy: Strategy, names: list[str]) -> None:
    big = fxexpand.expand(nn.Sequential(nn.Conv2d(4, 4, 3)), strategy)
    leaves = [name for name, module in big.named_modules() if name.count(".") and not list(module.children())]
    assert leaves == [f"0.{name}" for name in names]


def test_padding_that_fits_needs_no_module_of_its_own() -> None:
    big = fxexpand.expand(nn.Conv2d(4, 4, 3, padding=1), RepVGG())
    assert [name for name, _ in big.named_children()] == ["kernel", "point", "identity"]
    assert not any("Pad" in type(module).__name__ for module in big.modules())


def test_padding_of_another_mode_stands_before_the_branches() -> None:
    conv = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect").double()
    big = fxexpand.expand(conv, ACNet())
    assert [name for name, _ in big.named_children()] == ["pad", "branches"]
    assert fxexpand.verify(conv, big, random(2, 4, 7, 7)) < 1e-12


# One kernel again


@given(branch_expansions(batch_norm=False) | branch_expansions(batch_norm=True) | chain_expansions())
def test_as_training_left_it_it_is_one_kernel(case: Expansion) -> None:
    layer = case.layer.eval()
    big = as_trained(fxexpand.expand(nn.Sequential(layer), case.strategy).double()).eval()
    x = case.signal()
    expected = big(x).detach()
    small = fxexpand.contract(big)
    assert type(small.get_submodule("0")) is type(layer)
    assert list(small.state_dict()) == [f"0.{name}" for name in layer.state_dict()]
    fused = fxexpand.fuse(big, x, when="always")
    assert kernels(fused) == 1
    assert not any(isinstance(module, NORMS) for module in fused.modules())
    fast = fxexpand.collapse(big)
    assert sum(isinstance(module, Collapsed) for module in fast.modules()) == 1
    for made in (small, fused, fast, fxexpand.contract(fast), fxexpand.uncollapse(fast)):
        assert relative(made(x), expected) < 1e-10
    ours, theirs = gradients(fast, x), gradients(big, x)
    whole = torch.stack([g.norm() for g in theirs]).norm()
    assert max(float((a - b).norm() / whole) for a, b in zip(ours, theirs, strict=True)) < 1e-10


@given(branch_expansions(batch_norm=True))
def test_batch_norm_in_training_mode_keeps_the_branches_apart(case: Expansion) -> None:
    big = fxexpand.expand(nn.Sequential(case.layer), case.strategy)
    fast = fxexpand.collapse(big.eval()).train()
    x = case.signal(batch=4)
    big.train()
    assert relative(fast(x), big(x)) < 1e-12  # it runs them in turn
    assert not any(isinstance(module, Collapsed) for module in fxexpand.collapse(big, x).modules())
    assert "training mode" in str(fxexpand.explain(big, x))
    with pytest.raises(ContractionError, match=r"batch norm in training mode; call model.eval\(\) first"):
        fxexpand.contract(big)
    with pytest.raises(ExpansionError, match=r"batch norm in training mode; call model.eval\(\) first"):
        fxexpand.collapse(big)


@pytest.mark.parametrize(
    "strategy",
    [ACNet(), RepVGG(), MobileOne(2), DiverseBranch(), Orepa(2), Overparam(2, depth=3, residual=True)],
    ids=str,
)
def test_collapsed_branches_train_as_they_do_apart(strategy: Strategy) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3)).double()
    start = fxexpand.expand(model, strategy)
    twin = fxexpand.collapse(fxexpand.expand(model, strategy))
    twin.load_state_dict(start.state_dict())
    data = [random(5, 4, 9, 9) for _ in range(20)]
    for net in (start, twin):
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
        for x in data:
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    for (name, a), b in zip(start.state_dict().items(), twin.state_dict().values(), strict=True):
        assert relative(a, b) < 1e-8, name


def test_whole_networks_with_branches_everywhere() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 25, 5),
    )
    x = random(4, 3, 9, 9)
    for strategy in (ACNet(True), RepVGG(True), MobileOne(3, True), DiverseBranch(True), Orepa(2), CL(2).then(ACNet())):
        start = as_trained(model.double()).eval()
        big = fxexpand.expand(start, [strategy, FC(2)])
        assert fxexpand.verify(start, big, x) < 1e-11
        big = as_trained(big)
        fused = fxexpand.fuse(big, x)
        assert kernels(fused) == 3
        assert fxexpand.verify(big, fused, x) < 1e-11
        small = fxexpand.contract(big)
        start.load_state_dict(small.state_dict(), strict=True)
        assert fxexpand.verify(big, start, x) < 1e-11


# Nearest, not exact


FAT = (nn.Linear(6, 5), nn.Conv2d(6, 4, 1), nn.Conv2d(4, 6, (3, 5), 2))


@given(st.integers(1, 3), st.booleans(), st.sampled_from(FAT))
def test_low_rank_is_the_nearest_product(rank: int, double: bool, layer: Any) -> None:
    layer = layer.double() if double else layer.float()
    with pytest.warns(UserWarning, match="differs from the layer by") as caught:
        big: Any = fxexpand.expand(layer, fxexpand.Rule(LowRank(rank), where=lambda _: True))
    weight = layer.weight.detach().double()
    n, m, *taps = weight.shape
    matrix = weight.reshape(n, m, *(taps or (1, 1)))
    values = torch.linalg.svdvals(matrix.permute(1, 2, 0, 3).reshape(m * matrix.shape[2], -1))
    expected = float(values[rank:].norm() / values.norm())
    assert relative(big.weight.detach().double(), weight) == pytest.approx(expected, rel=1e-3 if not double else 1e-9)
    said = float(str(caught[0].message).split("by ")[1].split()[0])
    assert said <= 1.1 * expected  # the bias, which is kept, counts too
    assert type(fxexpand.contract(big)) is type(layer)


def test_low_rank_of_full_rank_is_exact() -> None:
    layer = nn.Conv2d(3, 4, 3, groups=1, padding=1).double()
    with pytest.warns(UserWarning, match="differs from the layer by"):
        big = fxexpand.expand(layer, fxexpand.Rule(LowRank(12), where=lambda _: True))
    assert fxexpand.verify(layer, big, random(2, 3, 8, 8)) < 1e-12


def test_low_rank_reaches_what_it_makes_smaller() -> None:
    fat, other = [nn.Conv2d(64, 64, 3), nn.Linear(64, 64)], [nn.Conv2d(2, 2, 3), nn.Conv1d(64, 64, 3), nn.Linear(3, 3)]
    model = nn.Sequential(*fat, *other)
    with pytest.warns(UserWarning, match="differs"):
        big = fxexpand.expand(model, LowRank(4))
    assert {name.split(".")[0] for name, _ in big.named_parameters() if "first" in name} == {"0", "1"}


# Errors


UNTYPED: Any = fxexpand.strategies  # as code without types sees it


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UNTYPED.ACNet("yes"), "ACNet: batch_norm must be True or False, found 'yes'"),
        (lambda: UNTYPED.RepVGG(identity=1), "RepVGG: identity must be True or False, found 1"),
        (lambda: MobileOne(0), "MobileOne: convolutions must be an integer of at least 1, found 0"),
        (lambda: UNTYPED.MobileOne(1.5), "MobileOne: convolutions must be an integer of at least 1, found 1.5"),
        (lambda: Orepa(width=0), "Orepa: width must be an integer of at least 1, found 0"),
        (lambda: Overparam(0), "Overparam: rate must be a positive number, found 0"),
        (lambda: Overparam(2, depth=1), "Overparam: depth must be an integer of at least 2, found 1"),
        (lambda: UNTYPED.Overparam(2, residual=None), "Overparam: residual must be True or False, found None"),
        (lambda: UNTYPED.LowRank(0.5), "LowRank: rank must be an integer of at least 1, found 0.5"),
        (lambda: UNTYPED.CL(2).then(3), r"then: expected a strategy, such as CL\(rate=4\), found 3"),
    ],
)
def test_options_that_are_none(make: Any, message: str) -> None:
    with pytest.raises(RuleError, match=message):
        make()


@pytest.mark.parametrize(
    ("layer", "strategy", "message"),
    [
        (nn.Conv2d(4, 4, 3, stride=2), RepVGG(identity=True), "an identity beside it needs stride 1, found 2×2"),
        (nn.Conv2d(4, 8, 3), RepVGG(identity=True), "needs as many channels out as in, found 4 -> 8"),
        (nn.Conv2d(4, 4, 3, bias=False), RepVGG(batch_norm=True), "adds a bias, and there is no place for one"),
        (nn.Conv2d(4, 4, (1, 3)), ACNet(), "ACNet needs a kernel larger than 1 on both axes, found 1×3"),
        (nn.Conv2d(4, 4, 3, dilation=2), DiverseBranch(), "DiverseBranch needs a layer without dilation"),
        (nn.Conv2d(4, 4, 3, groups=2), Orepa(), "Orepa needs a layer without dilation and groups"),
        (nn.Conv1d(4, 4, 3), LowRank(2), "LowRank takes linear and pointwise layers, and kernels on two axes, found 3"),
        (nn.Conv2d(4, 4, 3), Overparam(0.5), "cannot keep the function: .* rate=1 is enough"),
        (nn.Conv2d(4, 4, 3), CL(2).then(FC(2)), "reaches none of the layers that it was to expand again"),
    ],
)
def test_layers_that_do_not_fit(layer: nn.Module, strategy: Strategy, message: str) -> None:
    model = nn.Sequential(layer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ExpansionError, match=message) as failure:
        fxexpand.expand(model, fxexpand.Rule(strategy, where=lambda _: True))
    assert str(failure.value).startswith("0 (")
    assert "exclude it with" in str(failure.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_bare_strategy_leaves_alone_what_does_not_fit() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, dilation=2), nn.Conv2d(4, 4, 3, groups=2))
    for strategy, reached in ((DiverseBranch(), {"0", "2"}), (Orepa(), {"0"})):
        big = fxexpand.expand(model, strategy)
        assert {name.split(".")[0] for name, _ in big.named_parameters() if "point" in name} == reached


SOME = (ACNet(True), RepVGG(identity=False), MobileOne(2), CL(4).then(ACNet(batch_norm=True)))


@pytest.mark.parametrize("strategy", SOME)
def test_they_are_frozen_values_that_print_as_they_are_written(strategy: Any) -> None:
    names = {cls.__name__: cls for cls in (ACNet, RepVGG, MobileOne, CL)}
    assert eval(repr(strategy), names) == strategy
    assert len({strategy, eval(repr(strategy), names)}) == 1
