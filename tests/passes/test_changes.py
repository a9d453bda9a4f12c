"""What a model changes while it runs: values, statistics, weights. No pass takes for a constant what is none."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxexpand
from fxexpand import CL, FC
from fxexpand.testing import as_trained

DOUBLE = torch.float64


@fx.wrap
def bump(y: Tensor) -> Tensor:
    """Code of the user's that graphs call, and which changes what it is given."""
    y.add_(1.0)
    return y * 2


class Counter(nn.Module):
    """No graph stands for it; it counts in a buffer that others may read."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("n", torch.ones(1))
        self.n: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        self.n.add_(1)
        return x


class Layers(nn.Module):
    """Runs ``run`` over what it holds."""

    def __init__(self, run: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.instance = nn.BatchNorm2d(4), nn.InstanceNorm2d(4, track_running_stats=True)
        self.counter = Counter()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))
        self.register_buffer("gain", torch.ones(1, 4, 1, 1))
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def wrapped(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    c = m.b(y)
    bump(y)
    return c + y


def wrapped_on_the_input(m: Any, x: Tensor) -> Any:
    c = m.b(x)
    bump(x)
    return c + m.a(x)


def wrapped_on_a_buffer(m: Any, x: Tensor) -> Any:
    bump(m.gain)
    return m.a(x) * m.gain


def listed(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    c = m.b(y)
    torch._foreach_mul_([y, x], 2.0)
    return c + y


def initialised(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    c = m.b(y)
    nn.init.constant_(y, 3.0)
    return c + y


def counted(m: Any, x: Tensor) -> Any:
    return m.a(m.counter(x)) * m.counter.n


def statistics_of_a_module(m: Any, x: Tensor) -> Any:
    return m.norm(x), F.batch_norm(m.a(x), m.norm.running_mean, m.norm.running_var)


def statistics_of_instances(m: Any, x: Tensor) -> Any:
    return m.instance(x), m.a(x) * m.instance.running_var.reshape(1, -1, 1, 1)


def statistics_of_a_function(m: Any, x: Tensor) -> Any:
    z = F.batch_norm(x, m.mean, m.var, training=True)
    return F.batch_norm(m.a(x), m.mean, m.var), z


def statistics_of_torch(m: Any, x: Tensor) -> Any:
    z = torch.batch_norm(x, None, None, m.mean, m.var, True, 0.1, 1e-5, False)
    return m.a(x) * m.var.reshape(1, -1, 1, 1), z


def statistics_of_instances_of_a_function(m: Any, x: Tensor) -> Any:
    return F.instance_norm(x, m.mean, m.var), m.a(x) * m.var.reshape(1, -1, 1, 1)


CASES = [
    *(wrapped, wrapped_on_the_input, wrapped_on_a_buffer, listed, initialised, counted, statistics_of_a_module),
    *(statistics_of_instances, statistics_of_a_function, statistics_of_torch, statistics_of_instances_of_a_function),
]
PASSES: dict[str, Callable[..., nn.Module]] = {
    "fuse": lambda m, *x: fxexpand.fuse(m, when="always"),
    "fuse, with inputs": lambda m, *x: fxexpand.fuse(m, *x, when="always"),
    "expand": lambda m, *x: fxexpand.expand(m, [CL(2), FC(2)]),
    "expand, collapse": lambda m, *x: fxexpand.collapse(fxexpand.expand(m, [CL(2), FC(2)]), *x),
    "expand, contract, fuse": lambda m, *x: fxexpand.fuse(fxexpand.contract(fxexpand.expand(m, [CL(2), FC(2)]))),
}


def calls(model: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    """What ``model`` returns call after call, and what it leaves in its inputs."""
    found: list[Any] = []
    for x in inputs:
        own = x.clone()
        found += [model(own), own]
    return [leaf for leaf in torch.utils._pytree.tree_leaves(found) if isinstance(leaf, Tensor)]


def keeps(model: nn.Module, change: Callable[..., nn.Module], *inputs: Tensor) -> None:
    """``change`` leaves ``model`` as it is, and makes a model that does the same, call after call."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = calls(copy.deepcopy(model), list(inputs))
    made = change(model, inputs[0])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for x, y in zip(calls(made, list(inputs)), expected, strict=True):
        assert torch.allclose(x, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("change", PASSES.values(), ids=PASSES)
@pytest.mark.parametrize("run", CASES)
@pytest.mark.filterwarnings("ignore:fuse. batch norm in training mode")
def test_what_changes_is_no_constant(run: Callable[[Any, Tensor], Any], change: Callable[..., nn.Module]) -> None:
    model = as_trained(Layers(run).double().train())
    keeps(model, change, *(torch.randn(2, 4, 6, 6, dtype=DOUBLE) for _ in range(3)))


def beside_a_hook(m: Any, x: Tensor) -> Any:
    c = m.b(x)
    y = m.instance(x)
    y.add_(1)
    return c + m.a(x)


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Identity(), nn.Sequential(nn.Conv2d(4, 4, 1))])
@pytest.mark.parametrize(
    "hook",
    [
        lambda module: module.register_forward_hook(lambda m, args, y: args[0]),
        lambda module: module.register_forward_pre_hook(lambda m, args: args[0].mul_(2)),
        lambda module: module.register_forward_hook(lambda m, args, y: args[0].mul_(2)),
    ],
    ids=["gives the input", "changes the input before", "changes the input after"],
)
@pytest.mark.parametrize("change", PASSES.values(), ids=PASSES)
def test_what_a_hook_changes(layer: nn.Module, hook: Callable[[Any], Any], change: Callable[..., nn.Module]) -> None:
    model: Any = Layers(beside_a_hook)
    model.instance = copy.deepcopy(layer)
    hook(model.instance)
    with torch.no_grad():
        keeps(as_trained(model.double()).eval(), change, torch.randn(2, 4, 6, 6, dtype=DOUBLE))


class ShrinksWhatAListHolds(nn.Module):
    """No graph stands for it; its layers are a graph of their own, of which it holds a weight in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.held = [self.body.get_parameter("0.weight")]

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        with torch.no_grad():
            self.held[0].mul_(0.5)
        y: Tensor = self.body(x)
        return y


@pytest.mark.parametrize("change", [PASSES["fuse"], PASSES["fuse, with inputs"]])
def test_a_weight_that_a_list_holds_is_changed_in_the_result_alone(change: Callable[..., nn.Module]) -> None:
    model = as_trained(ShrinksWhatAListHolds().double()).eval()
    keeps(model, change, *(torch.randn(2, 4, 6, 6, dtype=DOUBLE) for _ in range(2)))
    made: Any = change(model, torch.randn(2, 4, 6, 6, dtype=DOUBLE))
    assert made.held[0] is made.body.get_parameter("0.weight")


class ShrinksAnother(nn.Module):
    """No graph stands for it; it writes to a layer that it holds as ``other``."""

    def __init__(self, layer: nn.Module, *, hidden: bool) -> None:
        super().__init__()
        self.held: Any = {"other": (layer,)} if hidden else nn.ModuleDict({"other": layer})

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        other = self.held["other"][0] if isinstance(self.held, dict) else self.held["other"]
        with torch.no_grad():
            other.weight.mul_(0.5)
        return x


@pytest.mark.parametrize("hidden", [False, True], ids=["a child", "in a plain attribute"])
@pytest.mark.parametrize("change", [PASSES["fuse"], PASSES["fuse, with inputs"]])
def test_a_weight_that_another_module_writes_to_is_no_constant(hidden: bool, change: Callable[..., nn.Module]) -> None:
    conv, norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    model = as_trained(nn.Sequential(ShrinksAnother(conv, hidden=hidden), conv, norm).double()).eval()
    keeps(model, change, *(torch.randn(2, 4, 6, 6, dtype=DOUBLE) for _ in range(2)))
    with pytest.raises(fxexpand.ExpansionError, match="write to its weight"):
        fxexpand.expand(model, CL(2))


class CountsInTwoGraphs(nn.Module):
    """No graph stands for it; one of the two in it changes a buffer that the other one reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Layers(counts), Layers(reads_the_count)
        self.second.gain = self.first.gain

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        y: Tensor = self.second(self.first(x))
        return y


def counts(m: Any, x: Tensor) -> Any:
    m.gain.add_(1)
    return m.a(x)


def reads_the_count(m: Any, x: Tensor) -> Any:
    return m.norm(m.a(x)) * m.gain


@pytest.mark.parametrize("change", PASSES.values(), ids=PASSES)
def test_what_another_graph_changes_is_no_constant(change: Callable[..., nn.Module]) -> None:
    model = as_trained(CountsInTwoGraphs().double()).eval()
    keeps(model, change, *(torch.randn(2, 4, 6, 6, dtype=DOUBLE) for _ in range(3)))


class TiedToAnEmbedding(nn.Module):
    """Rows longer than ``max_norm`` are made shorter when they are looked up, and the head reads all of them."""

    def __init__(self, *, function: bool) -> None:
        super().__init__()
        self.function = function
        self.embedding = nn.Embedding(6, 4, max_norm=0.5)
        self.fc = nn.Linear(4, 4)

    def forward(self, picked: Tensor) -> Tensor:
        weight = self.embedding.weight
        rows = F.embedding(picked, weight, max_norm=0.5) if self.function else self.embedding(picked)
        return F.linear(self.fc(rows), weight)


@pytest.mark.parametrize("function", [False, True], ids=["module", "function"])
@pytest.mark.parametrize("change", [PASSES["fuse"], PASSES["fuse, with inputs"]])
def test_an_embedding_that_shortens_its_rows(function: bool, change: Callable[..., nn.Module]) -> None:
    keeps(TiedToAnEmbedding(function=function).double(), change, *map(torch.tensor, ([0, 1], [3, 4], [0, 5])))


class Clamped(nn.Linear):
    """Keeps its weight small, in a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data.clamp_(-0.1, 0.1)
        return super().forward(x)


class Renormed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.1)
        return super().forward(x)


@pytest.mark.parametrize("layer", [Clamped, Renormed])
@pytest.mark.parametrize(
    "change",
    [
        fxexpand.fuse,
        lambda m, x: copy.deepcopy(fxexpand.collapse(m, x)),
        lambda m, x: (fxexpand.explain(m, x), copy.deepcopy(m))[1],
        lambda m, x: (fxexpand.verify(m, m, x), copy.deepcopy(m))[1],
    ],
    ids=["fuse", "collapse", "explain", "verify"],
)
def test_example_inputs_leave_weights_as_they_are(layer: Any, change: Callable[..., nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), layer(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)).double()
    keeps(model, change, torch.randn(3, 4, dtype=DOUBLE), torch.randn(3, 4, dtype=DOUBLE))


class TwoInputs(nn.Module):
    """Writes to one of its inputs before all of the other one is read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor, view: Tensor) -> Tensor:
        y = self.conv(x)
        view.add_(1)
        total: Tensor = y + x
        return total


@pytest.mark.parametrize("run", [fxexpand.fuse, fxexpand.collapse], ids=["fuse", "collapse"])
def test_inputs_that_share_memory(run: Callable[..., Any]) -> None:
    model, x = TwoInputs().eval(), torch.randn(2, 4, 8, 8)
    given = [x.clone() for _ in range(2)]
    changed = run(nn.ModuleDict({"two": model, "pair": nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))}))["two"]
    expected, found = (f(x, x.view(-1)) for f, x in zip((model, changed), given, strict=True))
    assert torch.equal(found, expected)
