"""trace gives a graph that computes what the model computes, and leaves the model as it was."""

from __future__ import annotations

import copy
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations

import fxexpand
from behaviour import DOUBLE, Two, X, assert_alike, linear
from fxexpand import ExpansionError, trace

SEQUENCES = torch.linspace(-1, 2, 40, dtype=torch.float64).reshape(2, 5, 4)
IMAGES = torch.linspace(-1, 2, 150, dtype=torch.float64).reshape(2, 3, 5, 5)


def nodes(traced: nn.Module, op: str) -> list[str]:
    assert isinstance(traced, fx.GraphModule)
    return [str(node.target) for node in traced.graph.nodes if node.op == op]


def graphs(model: nn.Module) -> dict[str, fx.GraphModule]:
    return {path: module for path, module in model.named_modules() if isinstance(module, fx.GraphModule)}


# Models that are one graph.


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 3, 3, 3, **DOUBLE))
        self.weight, self.bias = nn.Parameter(torch.randn(2, 36, **DOUBLE)), nn.Parameter(torch.randn(2, **DOUBLE))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(F.conv2d(x, self.kernel, padding="valid"))
        return F.linear(y.flatten(1), self.weight, bias=self.bias)


class CalledTwice(Two):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(self.b(self.a(x).tanh()))
        return y


class TwoNames(Two):
    def __init__(self) -> None:
        super().__init__()
        self.alias = self.a
        self.tied = linear()
        self.tied.weight = self.b.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.alias(x) + self.a(self.b(x)) * self.tied(x)
        return y


class UserConv(nn.Conv2d):
    """Keeps torch's ``forward``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("mask", torch.ones(3))


class Standardized(nn.Conv2d):
    """Has a ``forward`` of its own."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Star(Two):
    def forward(self, *xs: Tensor, **named: Tensor) -> Tensor:
        y: Tensor = self.a(xs[0]) * self.b(xs[1]) + named["z"]
        return y


class KeywordOnly(Two):
    def forward(self, x: Tensor, *, shift: Tensor, scale: float = 2.0) -> Tensor:
        y: Tensor = self.b(self.a(x)) * scale + shift
        return y


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


class Outputs(Two):
    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        return {
            "dict": {"y": y, "depth": {"x": x, "n": 3}},
            "ordered": OrderedDict(b=self.b(y), a=[x, None]),
            "pair": Pair(y, x),
            "tuple": (y, (x, "text", 0.5, True)),
        }


class DefaultArguments(Two):
    def forward(
        self, x: Tensor, high: float = float("inf"), dtype: torch.dtype = torch.float64, sizes: tuple[int, int] = (2, 2)
    ) -> Tensor:
        y: Tensor = self.a(x).clamp(-1, high).to(dtype) * sizes[1]
        out: Tensor = self.b(y)
        return out


class Shapes(Two):
    def forward(self, x: Tensor) -> Tensor:
        n, length, m = x.shape
        rows = n * length
        rows += 0
        y: Tensor = self.a(x.reshape(rows, m)) * m**-0.5
        return y.view(*[n, length, 2, -1]).transpose(1, 2) / x.size(-1)


class InPlaceOnFresh(Two):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(F.relu(self.a(x), inplace=True))
        out += x
        out.mul_(2)
        view = out.view(-1)
        view -= 1
        return F.relu_(out)


class InPlaceOnInput(Two):
    def forward(self, x: Tensor) -> Tensor:
        x *= 2
        y: Tensor = self.a(x)
        return y


class CountsInBuffer(Two):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), **DOUBLE))
        self.calls: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        y: Tensor = self.a(x) * self.calls
        self.b.weight.data.clamp_(-0.2, 0.2)
        out: Tensor = self.b(y)
        return out


class PlainTensors(Two):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.full((4,), 3.0, **DOUBLE)
        self.register_buffer("table", torch.randn(9, 4, **DOUBLE), persistent=False)
        self.table: Tensor

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x) * self.scale + self.table[: x.size(0)]
        return y


class Noise(Two):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x) + torch.rand_like(x)
        return F.dropout(y, 0.5)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 3, 2, batch_first=True, bidirectional=True, **DOUBLE)
        self.cell = nn.GRUCell(6, 4, **DOUBLE)

    def forward(self, x: Tensor) -> Any:
        y, (h, _) = self.lstm(x)
        state = x.new_zeros(x.shape[0], 4)
        for step in range(3):
            state = self.cell(y[:, step], state)
        return state, h


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **DOUBLE)
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True, **DOUBLE)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.qkv = linear(4, 12)

    def forward(self, x: Tensor) -> Any:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
        return self.attention(y, x, x)[0], self.encoder(x)


class Containers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(linear(), nn.Tanh()) for _ in range(2)])
        self.heads = nn.ModuleDict({"1x1": linear(), "z": nn.ReLU()})
        self.scales = nn.ParameterList([torch.randn(4, **DOUBLE) for _ in range(2)])
        self.shifts = nn.ParameterDict({"a": torch.randn(4, **DOUBLE)})
        self.unused = linear()

    def forward(self, x: Tensor) -> Tensor:
        for block, scale in zip(self.blocks, self.scales, strict=True):
            x = block(x) * scale
        for _, head in sorted(self.heads.items()):
            x = head(x)
        out: Tensor = x + self.shifts["a"]
        return out


class OwnCall(Two):
    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = super().__call__(x) * 2
        return y

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x)
        return y


class HasGraphModule(Two):
    def __init__(self) -> None:
        super().__init__()
        self.inner = fx.symbolic_trace(nn.Sequential(linear(), nn.ReLU(), linear()))
        self.traced = trace(CalledTwice())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.traced(self.inner(self.a(x)))
        return y


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weighted = parametrizations.weight_norm(linear())
        self.spectral = parametrizations.spectral_norm(Inner(), "weight")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.spectral(self.weighted(x))
        return y


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, **DOUBLE))
        self.layer = linear()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = F.linear(x, self.weight) + self.layer(x)
        return y


class DirectForward(Two):
    """Calls a layer's ``forward``, and through ``super`` a method of its base."""

    def encode(self, x: Tensor) -> Tensor:
        return self.a.forward(x)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.encode(x))
        return y


class Inherits(DirectForward):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class KnowsItsParent(nn.Module):
    def __init__(self, parent: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "parent", parent)

    def forward(self, x: Tensor) -> Tensor:
        parent: Any = vars(self)["parent"]
        y: Tensor = parent.a(x) * parent.scale
        return y


class Family(Two):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4, **DOUBLE))
        self.child = KnowsItsParent(self)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.child(x))
        return y


Model = Callable[[], nn.Module]
ONE_GRAPH: list[tuple[Model, tuple[Any, ...], dict[str, Any]]] = [
    (Functional, (IMAGES,), {}),
    (CalledTwice, (X,), {}),
    (TwoNames, (X,), {}),
    (lambda: nn.Sequential(UserConv(3, 4, 3, **DOUBLE), Standardized(4, 2, 1, **DOUBLE)), (IMAGES,), {}),
    (Star, (X, X + 1), {"z": X}),
    (KeywordOnly, (X,), {"scale": 3.0, "shift": X}),
    (Outputs, (X,), {}),
    (DefaultArguments, (X,), {}),
    (DefaultArguments, (X, 0.1, torch.float64), {"sizes": (1, 3)}),
    (Shapes, (SEQUENCES,), {}),
    (InPlaceOnFresh, (X,), {}),
    (InPlaceOnInput, (X,), {}),
    (CountsInBuffer, (X,), {}),
    (PlainTensors, (X,), {}),
    (Noise, (X,), {}),
    (Recurrent, (SEQUENCES,), {}),
    (Attention, (SEQUENCES,), {}),
    (Containers, (X,), {}),
    (OwnCall, (X,), {}),
    (HasGraphModule, (X,), {}),
    (Normed, (X,), {}),
    (DirectForward, (X,), {}),
    (Inherits, (X,), {}),
    (Family, (X,), {}),
]


@pytest.mark.parametrize(("make", "inputs", "named"), ONE_GRAPH)
def test_the_graph_computes_what_the_model_computes(make: Model, inputs: Any, named: Any) -> None:
    model = make()
    traced = trace(model)
    assert isinstance(traced, fx.GraphModule)
    traced.graph.lint()
    assert_alike(traced, model, *inputs, **named)


@pytest.mark.parametrize(("make", "inputs", "named"), ONE_GRAPH)
def test_tracing_what_was_traced_changes_nothing(make: Model, inputs: Any, named: Any) -> None:
    once = trace(make())
    twice = trace(once)
    assert isinstance(once, fx.GraphModule)
    assert isinstance(twice, fx.GraphModule)
    assert twice.code == once.code
    assert [node.name for node in twice.graph.nodes] == [node.name for node in once.graph.nodes]
    assert_alike(twice, once, *inputs, **named)


# What is a node.


def test_layers_stay_modules_and_what_has_a_forward_of_its_own_is_traced_into() -> None:
    traced = trace(nn.Sequential(UserConv(3, 4, 3), Standardized(4, 2, 1), nn.BatchNorm2d(2)))
    assert nodes(traced, "call_module") == ["0", "2"]
    assert isinstance(traced, fx.GraphModule)
    assert [node.target for node in traced.graph.nodes if node.op == "call_function"][-1] is F.conv2d


def test_a_module_that_is_called_twice_is_two_calls_of_one_module() -> None:
    assert nodes(trace(CalledTwice()), "call_module") == ["a", "b", "a"]


def test_modules_of_torch_stay_whole() -> None:
    traced = trace(Attention())
    assert nodes(traced, "call_module") == ["qkv", "attention", "encoder"]
    assert not graphs(traced).keys() - {""}


def test_instances_of_leaves_stay_whole() -> None:
    class Block(Two):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(self.a(x))
            return y

    assert nodes(trace(nn.Sequential(Block(), nn.ReLU())), "call_module") == ["0.a", "0.b", "1"]
    traced = trace(nn.Sequential(Block(), nn.ReLU()), leaves=[Block])
    assert nodes(traced, "call_module") == ["0", "1"]
    assert type(traced.get_submodule("0")) is Block


@pytest.mark.parametrize("layer", [linear(), nn.LSTM(4, 4), nn.ReLU()], ids=lambda layer: type(layer).__name__)
def test_a_root_that_is_a_unit_comes_back_as_itself(layer: nn.Module) -> None:
    traced = trace(layer)
    assert type(traced) is type(layer)
    assert traced is not layer
    assert all(p is q for p, q in zip(traced.parameters(), layer.parameters(), strict=True))


# What the result keeps, and what stays as it was.


class Everything(Two):
    """Unused layers, aliases, buffers of all kinds, plain attributes and methods."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Sequential(linear(), nn.BatchNorm1d(4))
        self.alias = self.a
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("derived", torch.ones(2), persistent=False)
        self.register_buffer("nothing", None)
        self.register_parameter("none", None)
        self.note = {"version": 3}
        self.b.requires_grad_(False)
        self.unused.eval()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.a(x))
        return y

    def describe(self) -> int:
        return self.note["version"]


def test_everything_that_the_graph_does_not_use_stays() -> None:
    model = Everything()
    traced: Any = trace(model)
    assert list(traced.state_dict()) == list(model.state_dict())
    assert [n for n, _ in traced.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert [n for n, _ in traced.named_buffers()] == [n for n, _ in model.named_buffers()]
    assert [n for n, _ in traced.named_modules()] == [n for n, _ in model.named_modules()]
    assert isinstance(traced, Everything)
    assert traced.describe() == 3
    assert traced.alias is traced.a
    assert traced.training
    assert not traced.unused.training


def test_parameters_and_buffers_are_shared() -> None:
    model = Everything()
    traced = trace(model)
    for ours, theirs in ((traced.parameters(), model.parameters()), (traced.buffers(), model.buffers())):
        assert all(a is b for a, b in zip(ours, theirs, strict=True))
    optimizer = torch.optim.SGD(traced.parameters(), lr=0.1)
    traced(X).sum().backward()
    optimizer.step()
    assert torch.equal(model(X), traced(X))


def test_tensors_of_modules_hidden_in_a_list_are_shared() -> None:
    class Student(Two):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = [linear()]  # hidden from parameters()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(self.a(x)) - self.teacher[0](x)
            return y

    model = Student()
    traced: Any = trace(model)
    assert traced.teacher[0].weight is model.teacher[0].weight
    assert_alike(traced, model, X)


def picture(model: nn.Module) -> list[Any]:
    """All that can be seen of a model without running it."""
    return [
        (path, id(module), type(module), {k: (id(v), repr(v)) for k, v in vars(module).items() if k[0] != "_"},
         [(k, id(v)) for part in ("_parameters", "_buffers", "_modules") for k, v in vars(module)[part].items()])
        for path, module in model.named_modules()
    ]  # fmt: skip


class Gate(Two):
    """Cannot be traced, but what it calls can."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(linear(), nn.ReLU(), linear())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(self.a(x))
        return self.b(y) if y.sum() > 0 else y


class Fails(Two):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("always")


@pytest.mark.parametrize("make", [Everything, Gate, Fails, CountsInBuffer, HasGraphModule])
def test_the_model_that_came_in_and_torch_itself_stay_as_they_were(make: Model) -> None:
    model = make()
    before = picture(model), {k: v.clone() for k, v in model.state_dict().items()}
    patched = {name: getattr(torch, name) for name in ("is_grad_enabled", "manual_seed", "is_autocast_enabled")}
    call, random = nn.Module.__call__, torch.get_rng_state()
    trace(model)
    assert picture(model) == before[0]
    assert all(torch.equal(v, before[1][k]) for k, v in model.state_dict().items())
    assert "training" not in vars(nn.Module)
    assert nn.Module.__call__ is call
    assert {name: getattr(torch, name) for name in patched} == patched
    assert torch.equal(torch.get_rng_state(), random)


def test_an_exception_that_no_handler_may_catch_leaves_torch_as_it_was() -> None:
    class Interrupted(Two):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trace(Interrupted())
    assert "training" not in vars(nn.Module)
    assert torch.is_grad_enabled()
    model = nn.Sequential(linear())
    assert model.training
    assert not model.eval().training


def test_a_later_load_state_dict_is_seen() -> None:
    model, other = PlainTensors(), PlainTensors()
    traced: Any = trace(model)
    traced.load_state_dict(other.state_dict())
    traced.table.copy_(other.table)
    assert torch.equal(traced(X), other(X))
    traced.scale = torch.zeros(4, **DOUBLE)
    assert torch.equal(traced(X), other.table[:2])


def test_random_draws_stay_random() -> None:
    traced = trace(Noise())
    assert not torch.equal(traced(X), traced(X))


# Models of which only parts are graphs.


def test_the_largest_traceable_modules_of_a_root_that_cannot_be_traced_are_graphs() -> None:
    model = Gate()
    traced = trace(model)
    assert type(traced) is Gate
    assert graphs(traced).keys() == {"inner"}
    for x in (X, -10 * X):
        assert_alike(traced, model, x)


def test_a_block_that_cannot_be_traced_is_one_node_of_a_graph_and_holds_graphs() -> None:
    model = nn.Sequential(linear(), Gate(), linear())
    traced = trace(model)
    assert nodes(traced, "call_module") == ["0", "1", "2"]
    assert graphs(traced).keys() == {"", "1.inner"}
    for x in (X, -10 * X):
        assert_alike(traced, model, x)


def test_a_module_that_two_parents_share_is_traced_once_and_stays_shared() -> None:
    class Sharing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Gate(), Gate()
            self.two.inner = self.one.inner
            self.again = self.one

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.two(self.one(x)) + self.again(x)
            return y

    model = Sharing()
    traced: Any = trace(model)
    assert traced.two.inner is traced.one.inner
    assert traced.again is traced.one
    assert_alike(traced, model, X)


class Picky(nn.Module):
    """Iterates over a container, and calls a method, of traceable parts."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.Sequential(linear(), nn.ReLU(), linear())
        self.coder = Coder()

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x) if x.sum() < 1e9 else x
        out: Tensor = x + self.coder.decode(self.coder(x)) + self.steps(x) + len(self.steps)
        return out


class Coder(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.a(x))

    def decode(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(x)
        return y


def test_a_parent_that_cannot_be_traced_may_iterate_over_graphs_and_call_their_methods() -> None:
    model = Picky()
    traced = trace(model)
    assert graphs(traced).keys() == {"steps", "coder"}
    assert_alike(traced, model, X)
    big = fxexpand.expand(model, fxexpand.FC(2))
    assert torch.allclose(big(X), model(X), rtol=1e-11)


class Slicing(nn.Module):
    """Takes slices of a container that is also called, and makes another module of its class."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.Sequential(linear(), nn.ReLU(), linear())

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        other = type(self.steps)(self.steps[0], nn.Tanh())
        out: Tensor = self.steps[:1](x) + self.steps[1:](self.steps(x)) + other(x)
        return out


def test_a_parent_that_cannot_be_traced_may_take_slices_of_graphs() -> None:
    model = Slicing()
    traced: Any = trace(model)
    assert graphs(traced).keys() == {"steps"}
    assert type(traced.steps[:2]) is nn.Sequential
    assert_alike(traced, model, X)
    for made in (fxexpand.fuse(model), fxexpand.fuse(traced, when="always"), fxexpand.expand(model, fxexpand.FC(2))):
        assert torch.allclose(made(X), model(X), rtol=1e-11)


def test_stochastic_depth_follows_train_and_eval() -> None:
    class Block(Two):
        def __init__(self) -> None:
            super().__init__()
            self.depth = torchvision.ops.StochasticDepth(0.5, "row")

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = x + self.depth(self.a(x))
            return y

    model = Block()
    traced = trace(model)
    assert nodes(traced, "call_module") == ["a", "depth"]
    for mode in (True, False, True):
        assert_alike(traced.train(mode), model.train(mode), X, calls=4)


def test_functional_dropout_follows_train_and_eval() -> None:
    class Block(Two):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(F.dropout(self.a(x), 0.5, training=self.training))
            return y

    model = nn.Sequential(Block(), linear())
    for start in (True, False):
        traced = trace(model.train(start))
        assert nodes(traced, "call_module") == ["0", "1"]
        for mode in (not start, start):
            assert_alike(traced.train(mode), model.train(mode), X, calls=3)


# Hooks and forwards of single modules.


def test_hooks_run_and_see_what_they_saw() -> None:
    seen: list[Any] = []

    def note(kind: str) -> Callable[..., None]:
        return lambda module, *values: seen.append((kind, type(module).__name__.split(".")[-1], values[-1]))

    model = nn.Sequential(linear(), nn.Sequential(linear(), nn.ReLU()), linear())
    model[0].register_forward_pre_hook(note("before"))
    model[1].register_forward_hook(note("after"))
    model[1].register_full_backward_hook(note("backward"))
    model[2].register_forward_hook(lambda module, args, out: out * 2)
    model.register_forward_hook(note("root"))
    runs = []
    for one in (model, trace(model)):
        seen.clear()
        one(X).sum().backward()
        runs.append(list(seen))
    assert [kind for kind, *_ in runs[0]] == ["before", "after", "root", "backward"]
    assert [(kind, name) for kind, name, _ in runs[0]] == [(kind, name) for kind, name, _ in runs[1]]
    assert all(torch.equal(a[0], b[0]) for (*_, a), (*_, b) in zip(*runs, strict=True))


class Extractor(Two):
    """Keeps what a layer gives, by a hook that is a method."""

    def __init__(self) -> None:
        super().__init__()
        self.feature: Tensor | None = None
        self.b.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, args: Any, out: Tensor) -> None:
        self.feature = out

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.a(x))
        return y


def test_a_hook_that_is_a_method_writes_to_the_traced_model() -> None:
    model = Extractor()
    for traced in (trace(model), copy.deepcopy(trace(model))):
        assert isinstance(traced, Extractor)
        out = traced(X)
        assert isinstance(traced, fx.GraphModule)
        assert traced.feature is out
    assert model.feature is None


def test_a_forward_that_a_single_module_has_been_given_is_called() -> None:
    def doubled(self: nn.Linear, x: Tensor) -> Tensor:
        return F.linear(x, 2 * self.weight, self.bias)

    model = nn.Sequential(linear(), linear())
    vars(model[0])["forward"] = types.MethodType(doubled, model[0])
    traced = trace(model)
    assert nodes(traced, "call_module") == ["0", "1"]
    assert_alike(traced, model, X)
    vars(model)["forward"] = lambda x: x * 2
    assert type(trace(model)) is nn.Sequential
    assert torch.equal(trace(model)(X), 2 * X)


# Models of torchvision.


@pytest.mark.parametrize("training", [True, False])
def test_a_detection_model_keeps_its_class_and_function_with_a_graph_for_a_backbone(training: bool) -> None:
    model = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64
    )
    traced = trace(model.double().train(training))
    assert type(traced) is type(model)
    assert isinstance(traced.get_submodule("backbone"), fx.GraphModule)
    assert isinstance(traced.get_submodule("roi_heads.box_head"), fx.GraphModule)
    images = [torch.rand(3, 64, 64, **DOUBLE)]
    boxes = [{"boxes": torch.tensor([[4.0, 4, 40, 50]], **DOUBLE), "labels": torch.tensor([1])}]
    outputs = []
    for one in (model, traced):
        torch.manual_seed(0)
        outputs.append(one(images, boxes) if training else one(images)[0])
    assert outputs[0].keys() == outputs[1].keys()
    assert len(outputs[0]) >= 3
    assert all(torch.equal(outputs[0][key], outputs[1][key]) for key in outputs[0])


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("segmentation.lraspp_mobilenet_v3_large", (1, 3, 32, 32)),
        ("video.mc3_18", (1, 3, 2, 16, 16)),
        ("swin_v2_t", (1, 3, 32, 32)),
    ],
)
def test_models_of_torchvision_are_one_graph_around_what_reads_the_mode(name: str, shape: tuple[int, ...]) -> None:
    make: Any = torchvision.models
    for part in name.split("."):
        make = getattr(make, part)
    model = make(weights=None, **({"weights_backbone": None} if "segmentation" in name else {})).eval()
    traced = trace(model)
    assert isinstance(traced, fx.GraphModule)
    x = torch.randn(shape)
    found, expected = traced(x), model(x)
    if isinstance(expected, dict):
        found, expected = found["out"], expected["out"]
    assert torch.equal(found, expected)


def test_a_root_that_reads_the_mode_is_kept_and_its_parts_are_graphs() -> None:
    model = torchvision.models.googlenet(init_weights=False, num_classes=5).eval()
    traced = trace(model)
    assert type(traced) is type(model)
    assert "inception3a" in graphs(traced)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(traced(x), model(x))


# Bad input.


@pytest.mark.parametrize("thing", [nn.Linear, "model", None, X, lambda x: x])
def test_what_is_no_module_is_an_error_that_says_what_it_is(thing: Any) -> None:
    with pytest.raises(ExpansionError, match=rf"expected a torch\.nn\.Module, found {type(thing).__name__}"):
        trace(thing)


@pytest.mark.parametrize(
    ("wrap", "remedy"),
    [
        (lambda model: torch.compile(model, backend="eager"), r"compiled model.*_orig_mod"),
        (torch.jit.script, "scripted model.*Pass the model that was scripted"),
        (lambda model: torch.jit.trace(model, X), "scripted model"),
        (nn.DataParallel, r"data-parallel.*model\.module"),
    ],
    ids=["compiled", "scripted", "jit-traced", "parallel"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_wrapped_model_is_an_error_that_says_what_to_pass(wrap: Callable[[nn.Module], Any], remedy: str) -> None:
    with pytest.raises(ExpansionError, match=f"(?s){remedy}"):
        trace(wrap(nn.Sequential(linear())))


@pytest.mark.parametrize(
    "wrap", [lambda model: torch.compile(model, backend="eager"), torch.jit.script], ids=["compiled", "scripted"]
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_and_scripted_parts_stay_one_node(wrap: Callable[[nn.Module], Any]) -> None:
    model = nn.Sequential(linear(), wrap(nn.Sequential(linear(), nn.ReLU())), linear())
    traced = trace(model)
    assert nodes(traced, "call_module") == ["0", "1", "2"]
    assert torch.equal(traced(X), model(X))
    assert list(traced.state_dict()) == list(model.state_dict())
    assert all(p is q for p, q in zip(traced.parameters(), model.parameters(), strict=True))
