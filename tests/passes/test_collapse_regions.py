"""Regions that a user wrote by hand collapse too, and stay what they are: keys, gradients, modes, hooks, copies."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from torch import Tensor, fx, nn
from torch.nn.utils import prune

import fxexpand
from drawing import random
from fusing import randomised
from fxexpand import CL, ExpansionError, FxExpandError, collapse, contract, expand, explain, trace, uncollapse
from fxexpand.algebra import Kernel
from fxexpand.passes.collapse import regions_of
from fxexpand.regions.live_region import LiveRegion
from fxexpand.testing import Case, linear_graphs

IMAGE = (2, 4, 9, 9)


class RepVGG(nn.Module):
    """A block of branches without batch norm."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.wide = nn.Conv2d(4, 4, 3, padding=1, groups=groups)
        self.point = nn.Conv2d(4, 4, 1, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.wide(x) + self.point(x) + x)


class DeepLinear(nn.Module):
    """A deep linear network of functional calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(random(12, 6)), nn.Parameter(random(5, 12))
        self.bias = nn.Parameter(random(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.first), self.second, bias=self.bias)


class Products(nn.Module):
    """The same with matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(random(6, 12)), nn.Parameter(random(12, 5))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.first @ self.second


class Twice(nn.Module):
    """A module that no graph can stand for."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(random(4))

    def forward(self, x: Tensor) -> Tensor:
        factor: Tensor = self.factor.reshape(-1, 1, 1)
        scaled: Tensor = x * factor if x.sum() > 0 else factor * x
        return scaled


def twice(module: Twice) -> Kernel:
    return Kernel(module.factor.reshape(-1, 1, 1, 1), groups=4)


def frozen(*layers: nn.Module) -> nn.Module:
    """In training mode, all but batch norm and dropout."""
    model = randomised(nn.Sequential(*layers))
    model.train()
    for module in model.modules():
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.Dropout)):
            module.eval()
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "chain": (
        lambda: nn.Sequential(nn.Conv2d(4, 16, 1), nn.Conv2d(16, 16, 3, bias=False), nn.Conv2d(16, 4, 1), nn.ReLU()),
        IMAGE,
        1,
    ),
    "branches": (lambda: nn.Sequential(RepVGG(), RepVGG(groups=2)), IMAGE, 2),
    "deep linear": (lambda: nn.Sequential(*(nn.Linear(a, b) for a, b in ((6, 40), (40, 30), (30, 3)))), (5, 6), 1),
    "functions": (DeepLinear, (5, 6), 1),
    "products": (Products, (5, 6), 1),
    "batch norm": (
        lambda: frozen(nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1, bias=False)),
        IMAGE,
        1,
    ),
    "batch norm without affine": (lambda: frozen(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8, affine=False)), IMAGE, 1),
    "transposed": (lambda: frozen(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), nn.BatchNorm2d(6)), IMAGE, 1),
    "grouped": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=4, bias=False), nn.Conv2d(8, 4, 1, groups=2)),
        IMAGE,
        1,
    ),
    "pool": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.AvgPool2d(2), nn.Conv2d(8, 4, 1), nn.ReLU()),
        IMAGE,
        1,
    ),
    "dropout": (lambda: frozen(nn.Linear(6, 40), nn.Dropout(0.5), nn.Linear(40, 3)), (5, 6), 1),
    "border": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), nn.Conv2d(8, 4, 1)),
        IMAGE,
        1,
    ),
    "one module twice": (lambda: nn.Sequential(*[nn.Conv2d(4, 4, 1)] * 2, nn.ReLU(), nn.Conv2d(4, 4, 1)), IMAGE, 1),
}


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, int]:
    """(model, input, the number of its regions)."""
    build, shape, count = MODELS[request.param]
    return build().double(), random(*shape), count


def regions(model: nn.Module) -> list[LiveRegion]:
    graphs = [module for module in model.modules() if isinstance(module, fx.GraphModule)]
    return [region for gm in graphs for _, region in regions_of(gm)]


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.allclose(found[name], expected[name], rtol=1e-10, atol=1e-10) for name in expected
    )


# The same function and gradients


def test_function_gradients_and_keys(case: tuple[nn.Module, Tensor, int]) -> None:
    model, x, count = case
    fast = collapse(model)
    assert len(regions(fast)) == count
    assert list(fast.state_dict()) == list(model.state_dict())
    assert [id(p) for p in fast.parameters()] == [id(p) for p in model.parameters()]
    assert torch.allclose(fast(x), model(x), rtol=1e-12, atol=1e-12)
    assert same(gradients(fast, x), gradients(model, x))
    assert not regions(model)


def after(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """What ``model`` gives for copies of ``inputs``, and the gradients of the parameters that it uses."""
    outputs = model(*(x.clone() for x in inputs))
    found = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    used = [p for p in model.parameters() if p.requires_grad]
    total = torch.stack([y.square().sum() for y in found if y.is_floating_point()]).sum()
    if not (used and total.requires_grad):
        return found
    return [*found, *torch.autograd.grad(total, used, allow_unused=True, materialize_grads=True)]


@given(linear_graphs(), st.booleans())
def test_random_graphs(case: Case, informed: bool) -> None:
    try:
        expected = after(copy.deepcopy(case.module), case.inputs)
    except RuntimeError as error:  # autograd does not take all that runs without it
        assume("inplace" not in str(error))
        raise
    try:
        fast = collapse(copy.deepcopy(case.module), *(case.inputs if informed else ()))
    except ExpansionError:
        return  # there is no region in it
    assert sorted(fast.state_dict()) == sorted(case.module.state_dict())  # FX's own copies change the order
    for model in (fast, uncollapse(fast)):
        for ours, theirs in zip(after(model, case.inputs), expected, strict=True):
            assert float((ours - theirs).norm()) <= 1e-9 * float(theirs.norm() + 1)


def test_uncollapse_gives_the_nodes_back(case: tuple[nn.Module, Tensor, int]) -> None:
    model, x, _ = case
    back, traced = uncollapse(collapse(model)), trace(model)
    assert isinstance(back, fx.GraphModule)
    assert isinstance(traced, fx.GraphModule)
    described = [[(n.op, n.target, n.name, str(n.args)) for n in m.graph.nodes] for m in (back, traced)]
    assert described[0] == described[1]
    assert not regions(back)
    assert torch.equal(back(x), traced(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), collapse])
def test_a_copy_composes_its_own_parameters(
    case: tuple[nn.Module, Tensor, int], copied: Callable[[nn.Module], nn.Module]
) -> None:
    model, x, _ = case
    fast = copied(collapse(copy.deepcopy(model)))
    with torch.no_grad():
        for number, parameter in enumerate((*fast.parameters(), *model.parameters())):
            torch.manual_seed(number % len(list(model.parameters())))
            parameter.copy_(torch.randn_like(parameter))
    assert torch.allclose(fast(x), model(x), rtol=1e-12, atol=1e-12)


def test_one_graph_for_compile(case: tuple[nn.Module, Tensor, int]) -> None:
    model, x, _ = case
    torch._dynamo.reset()
    compiled = torch.compile(collapse(model), backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), model(x), rtol=1e-12, atol=1e-12)


def test_fuse_takes_it(case: tuple[nn.Module, Tensor, int]) -> None:
    model, x, _ = case
    expected = model(x)
    fused = fxexpand.fuse(collapse(model))
    assert not regions(fused)
    assert torch.allclose(fused(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), copy.copy])
def test_copies_of_a_graph_module_of_fx_keep_the_layers(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = fx.symbolic_trace(nn.Sequential(nn.Linear(3, 9), nn.Linear(9, 3)))
    fast, x = collapse(model), torch.randn(2, 3)
    twin = copied(fast)
    assert list(twin.state_dict()) == list(model.state_dict())
    assert torch.equal(twin(x), fast(x))
    assert torch.allclose(uncollapse(twin)(x), model(x), atol=1e-6)


# Modes and hooks that change after it


def test_batch_norm_that_goes_into_training_mode_normalises_the_batch() -> None:
    model = frozen(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).double()
    fast, slow, x = collapse(copy.deepcopy(model)), copy.deepcopy(model), random(*IMAGE)
    for both in (fast, slow):
        both.train()
    assert torch.allclose(fast(x), slow(x), rtol=1e-12, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(fast.state_dict().values(), slow.state_dict().values(), strict=True))
    for both in (fast, slow):
        both.eval()
    assert torch.allclose(fast(x), slow(x), rtol=1e-12, atol=1e-12)


def test_dropout_that_goes_into_training_mode_drops() -> None:
    fast = collapse(frozen(nn.Linear(6, 400), nn.Dropout(0.5), nn.Linear(400, 3))).double().train()
    x = random(1, 6)
    assert not torch.allclose(fast(x), fast(x))


@pytest.mark.parametrize(
    "model", [nn.Sequential(nn.Linear(3, 9), nn.Linear(9, 3)), expand(nn.Linear(3, 3), fxexpand.FC(2))]
)
def test_a_hook_that_comes_later_runs(model: nn.Module) -> None:
    fast, x = collapse(model), torch.randn(2, 3)
    last = [module for module in fast.modules() if isinstance(module, nn.Linear)][-1]
    before = fast(x)
    handle = last.register_forward_hook(lambda module, args, output: output + 1)
    assert torch.allclose(fast(x), before + 1, atol=1e-6)
    handle.remove()
    assert torch.equal(fast(x), before)


def test_pruning_that_comes_later_is_seen() -> None:
    fast, x = collapse(nn.Sequential(nn.Linear(3, 9), nn.Linear(9, 3))), torch.randn(2, 3)
    prune.l1_unstructured(fast.get_submodule("0"), "weight", 0.5)
    assert torch.allclose(fast(x), uncollapse(fast)(x), atol=1e-6)
    with torch.no_grad():
        fast.get_submodule("0").weight_orig.mul_(2)  # type: ignore[operator]
    assert torch.allclose(fast(x), uncollapse(fast)(x), atol=1e-6)


# Beside expansions


def test_expansions_and_regions_side_by_side() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.Conv2d(16, 4, 1)).double()
    big = expand(model, fxexpand.Rule(CL(2), where=fxexpand.layer(name="0")))
    fast, x = collapse(big), random(*IMAGE)
    assert len(regions(fast)) == 1
    assert same(gradients(fast, x), gradients(big, x))
    small = contract(fast)
    assert not regions(small)
    model.load_state_dict(small.state_dict(), strict=True)
    assert torch.allclose(model(x), fast(x), rtol=1e-12, atol=1e-12)


# What stays, and why


def test_with_inputs_a_region_collapses_where_a_step_gets_cheaper() -> None:
    model = nn.Sequential(nn.Conv2d(256, 256, 3, padding=1, bias=False), nn.Conv2d(256, 256, 1))
    assert len(regions(collapse(model, torch.randn(64, 256, 16, 16)))) == 1
    assert not regions(collapse(model, torch.randn(1, 256, 2, 2)))
    found = explain(model, torch.randn(1, 256, 2, 2)).trained
    assert [entry.nodes for entry in found] == [("0", "1")]
    assert "times as long" in found[0].reason
    assert found[0].costs is not None
    assert found[0].costs[1] > found[0].costs[0]
    assert "0 of 1 collapse in training" in str(explain(model, torch.randn(1, 256, 2, 2)))


def test_explain_shows_both_costs_of_expansions() -> None:
    big = expand(nn.Sequential(nn.Conv2d(3, 8, 3)), CL(4)).eval()
    (entry,) = explain(big, torch.randn(64, 3, 32, 32)).trained
    assert entry.path == "0"
    assert entry.costs is not None
    assert entry.costs[1] < entry.costs[0]
    assert f"{entry.costs[0]:,}" in str(entry)
    assert [(e.path, e.costs, e.reason) for e in explain(big).trained] == [("0", None, "")]


def test_what_costs_more_as_one_layer_stays_without_inputs_too() -> None:
    depthwise = nn.Conv2d(8, 8, 3, groups=8, bias=False)
    with pytest.raises(ExpansionError, match="linear layers in a row"):
        collapse(nn.Sequential(depthwise, nn.Conv2d(8, 8, 1), nn.ReLU()))


def test_what_code_makes_of_parameters_stays_and_explain_says_so() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)
            self.gain = nn.Parameter(torch.ones(4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            scaled: Tensor = self.conv(x) * self.gain
            return scaled

    with pytest.raises(ExpansionError):
        collapse(Scaled())
    (entry,) = explain(Scaled()).trained
    assert entry.nodes == ("mul",)
    assert "what code makes of them" in entry.reason


def test_lifts_teach_it_a_module() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), Twice(), nn.ReLU()).double()
    fast, x = collapse(model, lifts={Twice: twice}), random(*IMAGE)
    assert len(regions(fast)) == 1
    assert same(gradients(fast, x), gradients(model, x))
    with pytest.raises(FxExpandError, match="lifts"):
        collapse(model, lifts={Twice: 3})  # type: ignore[dict-item]
