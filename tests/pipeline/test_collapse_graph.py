"""Regions of captured graphs, composed in the graph: float64, against the model as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from fxexpand import CL, FC, expand
from fxexpand.pipeline.collapse_graph import collapse_graph

LAYERS = (torch.conv2d, torch.conv3d, F.linear, F.batch_norm)


class Block(nn.Module):
    """RepVGG's block without batch norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.square = nn.Conv2d(channels, channels, 3, padding=1)
        self.point = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.square(x) + self.point(x) + x)


class Captured:
    """A backend that keeps the graphs it is given and what became of them, and runs the latter."""

    def __init__(self) -> None:
        self.given: list[fx.GraphModule] = []
        self.made: list[fx.GraphModule | None] = []

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.given.append(gm)
        self.made.append(collapse_graph(gm))
        return (self.made[-1] or gm).forward

    def layers(self) -> tuple[int, int]:
        """How many layers the last graph called, and calls now."""
        made = self.made[-1] or self.given[-1]
        before, after = (sum(n.target in LAYERS for n in gm.graph.nodes) for gm in (self.given[-1], made))
        return before, after


def captured(model: nn.Module, *inputs: Tensor, dynamic: bool | None = None) -> tuple[Captured, Any]:
    torch._dynamo.reset()
    found = Captured()
    compiled = torch.compile(model, backend=found, fullgraph=True, dynamic=dynamic)
    compiled(*inputs)
    return found, compiled


def images(channels: int = 8, batch: int = 4, size: int = 48) -> Tensor:
    return torch.randn(batch, channels, size, size, dtype=torch.float64)


def chain() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 3, stride=2, bias=False), nn.Conv2d(16, 8, 1))


def norms() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    norm: Any = model[1]
    nn.init.uniform_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 1, 2)
    return model.eval()


def assert_same(model: nn.Module, compiled: Any, x: Tensor) -> None:
    """Output and gradients of every parameter, to 1e-10."""
    expected, found = model(x), compiled(x)
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(expected)
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours = torch.autograd.grad(found, parameters, upstream)
    theirs = torch.autograd.grad(expected, parameters, upstream)
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-9) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("model", "x", "layers"),
    [
        pytest.param(chain(), images(), (3, 1), id="chain"),
        pytest.param(Block(8), images(), (2, 1), id="branches"),
        pytest.param(norms(), images(), (2, 1), id="batch-norm"),
        pytest.param(
            nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 64)), torch.randn(512, 64).double(), (2, 1), id="linear"
        ),
        pytest.param(
            expand(nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 46 * 46, 4)), CL(4)),
            images(),
            (4, 2),
            id="expanded",
        ),
    ],
)
def test_one_layer_a_region(model: nn.Module, x: Tensor, layers: tuple[int, int]) -> None:
    model.double()
    found, compiled = captured(model, x)
    assert found.layers() == layers
    assert_same(model, compiled, x)


def test_inputs_and_the_graph_given_stay() -> None:
    model = chain().double()
    found, _ = captured(model, images())
    given, made = found.given[-1], found.made[-1]
    assert made is not None
    names = [[n.target for n in gm.graph.nodes if n.op == "placeholder"] for gm in (given, made)]
    assert names[0] == names[1]
    assert sum(n.target in LAYERS for n in given.graph.nodes) == 3
    held = {n.op for n in made.graph.nodes}
    assert held == {"placeholder", "call_function", "output"}, "no module, no tensor of ours: caches key by the code"


def test_a_graph_without_regions() -> None:
    found, _ = captured(nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).double(), images())
    assert found.made == [None]


def test_dearer_stays() -> None:
    """On few signals, composing costs more than applying both."""
    found, _ = captured(nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 16)).double(), torch.randn(2, 16).double())
    assert found.made == [None]


def test_batches_stay_dynamic() -> None:
    model = chain().double()
    found, compiled = captured(model, images(), dynamic=True)
    for batch in (2, 5, 7):
        assert_same(model, compiled, images(batch=batch, size=40 + batch))
    assert len(found.given) == 1
    assert found.layers() == (3, 1)


class Switched(nn.Module):
    """A mode that is switched between two layers."""

    def __init__(self, context: Callable[[], Any]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1)
        self.context = context

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        with self.context():
            y: Tensor = self.second(x)
            return y


@pytest.mark.parametrize(
    "context", [torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)], ids=["no-grad", "autocast"]
)
def test_a_mode_that_is_switched_ends_a_region(context: Callable[[], Any]) -> None:
    model, x = Switched(context), images().float()
    found, compiled = captured(model, x)
    assert found.made == [None]
    expected = model(x)
    assert torch.equal(compiled(x), expected)


def test_regions_beside_a_switched_mode() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.outside, self.inside = chain(), chain()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                frozen = self.inside(x)
            return self.outside(x), frozen

    model, x = Both().double(), images()
    found, compiled = captured(model, x)
    assert found.layers() == (6, 2)
    for ours, theirs in zip(compiled(x), model(x), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10)
        assert ours.requires_grad == theirs.requires_grad


def test_composes_in_the_dtype_of_the_parameters_under_autocast() -> None:
    model, x = chain(), images().float()
    torch._dynamo.reset()
    found = Captured()
    compiled = torch.compile(model, backend=found, fullgraph=True)
    exact = model.double()(x.double())
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        ours = compiled(x)
    weight_first = sum(
        n.target is torch.amp.autocast_mode._enter_autocast for n in (found.made[-1] or found.given[-1]).graph.nodes
    )
    assert weight_first == 1
    assert ours.dtype == torch.bfloat16
    # One layer in bfloat16: its weight and its input rounded once, 2⁻⁹ each, the output once more.
    assert float((ours - exact).detach().norm() / exact.detach().norm()) < 3 * 2**-9


def test_training_batch_norm_and_weights_that_the_graph_changes_stay() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = chain()
            self.scale = nn.Buffer(torch.ones(16, 16, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            self.scale.mul_(0.5)
            first: Any = self.layers[0]
            return F.conv2d(F.conv2d(x, first.weight), self.scale)

    for model, x in ((norms().train(), images()), (Counting(), images())):
        found, _ = captured(model.double(), x)
        assert found.made == [None]


def test_weights_that_are_handed_in_and_the_same_one_twice() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            return F.conv2d(self.layer(self.layer(x)), weight)

    model, x, weight = Tied().double(), images(), torch.randn(8, 8, 3, 3, dtype=torch.float64)
    found, compiled = captured(model, x, weight)
    assert found.layers() == (3, 1)
    assert torch.allclose(compiled(x, 2 * weight), model(x, 2 * weight), rtol=1e-10)


def test_what_is_checkpointed_is_left_alone() -> None:
    class Saved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.outside = chain(), Block(8)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = checkpoint(self.inside, self.outside(x), use_reentrant=False)
            return y

    model, x = Saved().double(), images()
    found, compiled = captured(model, x)
    assert found.layers() == (2, 1)
    assert_same(model, compiled, x)


def test_several_layers_and_a_hidden_chain_of_a_user() -> None:
    model = expand(nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)), FC(2, depth=3)).double()
    x = torch.randn(2048, 64, dtype=torch.float64)
    found, compiled = captured(model, x)
    assert found.layers()[0] == 6
    assert found.layers()[1] < 6
    assert_same(model, compiled, x)


def test_tensors_of_another_class_are_left_alone() -> None:
    """Weights that are several tensors each, as where they are spread over processes."""
    model: Any = nn.Sequential(nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1)).double()
    for layer in model:
        layer.weight = nn.Parameter(TwoTensor(layer.weight.detach(), layer.weight.detach().clone()))
    found, _ = captured(model, images())
    assert found.made == [None]


def written_between(x: Tensor, first: Tensor, second: Tensor, view: Tensor) -> Tensor:
    y = F.linear(x, first)
    view.mul_(0.5)
    return F.linear(y, second)


def written_before_the_skip(x: Tensor, weight: Tensor, _: Tensor, view: Tensor) -> Tensor:
    x = x.view(8, 64, 8, 8)
    y = F.conv2d(x, weight.view(64, 64, 1, 1))
    view.mul_(0.5)
    return y + x


def written_before_the_second_branch(x: Tensor, weight: Tensor, other: Tensor, view: Tensor) -> Tensor:
    y = F.linear(x, weight)
    view.mul_(0.5)
    return y + F.linear(x, other)


@pytest.mark.parametrize(
    "run", [written_between, written_before_the_skip, written_before_the_second_branch], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("shared", ["x", "first", "second"])
def test_inputs_that_share_memory_one_of_which_is_written_in_the_middle(
    run: Callable[..., Tensor], shared: str
) -> None:
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        given = {"x": torch.randn(512, 64), "first": torch.randn(64, 64), "second": torch.randn(64, 64)}
        inputs = (*given.values(), given[shared].view(-1))
        torch._dynamo.reset()
        results.append(torch.compile(run, backend=Captured(), fullgraph=True)(*inputs) if compiled else run(*inputs))
    assert torch.equal(*results)


def test_written_before_and_after_a_region() -> None:
    def run(x: Tensor, first: Tensor, second: Tensor, view: Tensor) -> Tensor:
        view.mul_(0.5)
        y = F.linear(F.linear(x, first), second)
        view.mul_(3)
        return y

    results, found = [], Captured()
    for compiled in (False, True):
        torch.manual_seed(0)
        x, first, second = torch.randn(512, 64).double(), torch.randn(256, 64).double(), torch.randn(64, 256).double()
        torch._dynamo.reset()
        function = torch.compile(run, backend=found, fullgraph=True) if compiled else run
        results.append(function(x, first, second, second.view(-1)))
    assert found.layers() == (2, 1)
    assert torch.allclose(results[0], results[1], rtol=1e-10)


@pytest.mark.parametrize(
    "divide",
    [
        lambda x, s: x / s,
        torch.div,
        lambda x, s: x.mul(2).div_(s),
        lambda x, s: x.relu() / s,
        lambda x, s: x / s.exp(),
    ],
    ids=["operator", "function", "in-place", "activation", "computed"],
)
@pytest.mark.parametrize("shape", [(), (1,), (64,)])
def test_a_quotient_by_a_weight(divide: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...]) -> None:
    class Quotient(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.by = nn.Linear(64, 64), nn.Parameter(torch.rand(shape) + 1)

        def forward(self, x: Tensor) -> Tensor:
            return divide(self.layer(x), self.by)

    model = Quotient().double()
    _, compiled = captured(model, torch.randn(8, 64, dtype=torch.float64))
    assert_same(model, compiled, torch.randn(8, 64, dtype=torch.float64))


@pytest.mark.parametrize(
    "part",
    [
        lambda y: y[..., :8],
        lambda y: y[:, 3:20:2],
        lambda y: y.chunk(3, -1)[1],
        lambda y: y.split(24, -1)[0],
        lambda y: torch.narrow(y, -1, 8, 8),
    ],
    ids=["last-axis", "steps", "chunk", "split", "narrow"],
)
def test_channels_of_which_some_are_read(part: Callable[[Tensor], Tensor]) -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 192)

        def forward(self, x: Tensor) -> Tensor:
            return part(self.layer(x))

    model, x = Part().double(), torch.randn(4096, 64, dtype=torch.float64)
    _, compiled = captured(model, x)
    assert_same(model, compiled, x)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_integers_that_a_scale_makes_floating(dtype: torch.dtype) -> None:
    class Images(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.second(self.first((x / 255 - 0.5) * 2))
            return y

    model, x = Images(), torch.randint(0, 255, (4, 8, 48, 48)).to(dtype)
    found, compiled = captured(model, x)
    assert found.layers() == (2, 1)
    assert torch.allclose(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: m.conv(x) + x,
        lambda m, x: m.conv(x) + m.norm(x),
        lambda m, x: torch.cat([m.conv(x), x], 1),
        lambda m, x: m.conv(x) + F.avg_pool2d(x, 1),
        lambda m, x: m.other(m.conv(x)) + x,
        lambda m, x: m.norm(m.conv(x)),
    ],
)
def test_dtypes_under_autocast(run: Callable[[Any, Tensor], Tensor]) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.other, self.norm = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            return run(self, x)

    model, x = Mixed().eval(), images().float()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=Captured(), fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = compiled(x), model(x)
    assert ours.dtype == theirs.dtype
    # Two bfloat16 layers against one.
    assert float((ours - theirs).detach().norm() / theirs.detach().norm()) < 3 * 2**-8


@pytest.mark.parametrize("layers", [slice(0, 2), slice(0, 1), slice(1, 2)], ids=["both", "first", "second"])
@pytest.mark.parametrize(
    "pair",
    [
        (nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 3)),
        (nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1)),
        (nn.Conv3d(8, 16, 1), nn.Conv3d(16, 8, 3)),
        (nn.Conv3d(8, 16, 3), nn.Conv3d(16, 8, 1)),
    ],
    ids=["3x3", "1x1", "3d", "3d-pointwise-last"],
)
def test_weights_in_channels_last_give_such_an_output(pair: tuple[nn.Module, nn.Module], layers: slice) -> None:
    """Who reads the output may rely on its strides: a view of it, say."""
    solid = isinstance(pair[0], nn.Conv3d)
    model: Any = nn.Sequential(*copy.deepcopy(pair)).double()
    model[layers].to(memory_format=torch.channels_last_3d if solid else torch.channels_last)
    x = torch.randn(4, 8, 12, 12, 12, dtype=torch.float64) if solid else images()
    found, compiled = captured(model, x)
    assert found.layers() == (2, 1)
    assert compiled(x).stride() == model(x).stride()
    assert torch.allclose(compiled(x), model(x), rtol=1e-10, atol=1e-10)
