"""What happens to a collapsed model later: whatever is changed in it, it computes what its layers compute in turn."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from drawing import random
from fxexpand import CK, CL, FC, ExpansionError, collapse, expand, explain, summary, trace, uncollapse
from fxexpand.algebra import Kernel
from fxexpand.graph.collapsed import Collapsed


class Head(nn.Module):
    """Two linear layers in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(6, 40)
        self.head = nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.wide(x))
        return out


class Blocks(nn.Module):
    """Walks through a block that is also called."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        for layer in self.block:
            x = layer(x)
        return x


def chain() -> nn.Module:
    return collapse(nn.Sequential(nn.Conv2d(4, 8, 1, bias=False), nn.Conv2d(8, 4, 3, padding=1), nn.ReLU()).double())


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).double()
    model.get_submodule("1").eval()
    return collapse(model)


def expansion() -> nn.Module:
    return collapse(expand(nn.Sequential(nn.Conv2d(4, 4, 5, padding=1)).double(), CK(4)))


def padded() -> nn.Module:
    """Its expansion starts with a padding module."""
    conv = nn.Conv2d(4, 4, 4, padding="same")
    return collapse(expand(nn.Sequential(conv).double(), CL(2)))


def agrees(model: nn.Module, x: Tensor | None = None) -> bool:
    """Whether it computes what its layers compute in turn, and follows them when they change."""
    given = random(2, 4, 9, 9) if x is None else x
    first = torch.allclose(model(given), uncollapse(copy.deepcopy(model))(given), rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    return first and torch.allclose(model(given), uncollapse(copy.deepcopy(model))(given), rtol=1e-11, atol=1e-11)


class Doubled(nn.Conv2d):
    """A convolution that does more."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return 2 * super().forward(input)


def other_settings(model: nn.Module) -> None:
    conv: Any = model.get_submodule("1")
    conv.stride, conv.padding = (2, 2), (0, 0)


def other_layer(model: nn.Module) -> None:
    conv: Any = model.get_submodule("0.kernel_1")
    new = Doubled(conv.in_channels, conv.out_channels, 3).double()
    model.get_submodule("0").register_module("kernel_1", new)


def other_forward(model: nn.Module) -> None:
    conv: Any = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    old = conv.forward
    conv.forward = lambda x: old(x) + 1


def without_statistics(model: nn.Module) -> None:
    norm: Any = model.get_submodule("1")
    norm.running_mean = norm.running_var = None


def other_channels(model: nn.Module) -> None:
    conv, norm = (model.get_submodule(name) for name in "01")
    conv.weight, conv.bias = nn.Parameter(random(5, 4, 3, 3)), nn.Parameter(random(5))
    norm.weight, norm.bias = nn.Parameter(random(5)), nn.Parameter(random(5))
    norm.running_mean, norm.running_var = random(5), random(5).square() + 1


def with_bias(model: nn.Module) -> None:
    model.get_submodule("0").bias = nn.Parameter(random(8))


def spectral(model: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(next(m for m in model.modules() if isinstance(m, nn.Conv2d)))


def hooked_padding(model: nn.Module) -> None:
    model.get_submodule("0.pad").register_forward_hook(lambda module, args, output: output + 1)


@pytest.mark.parametrize(
    ("build", "change"),
    [
        (chain, other_settings),
        (chain, with_bias),
        (chain, other_forward),
        (chain, spectral),
        (chain, lambda m: m.register_module("1", Doubled(8, 3, 3).double())),
        (frozen, without_statistics),
        (frozen, other_channels),
        (frozen, lambda m: m.train()),
        (frozen, lambda m: m.register_module("1", nn.BatchNorm2d(8).double())),
        (frozen, nn.SyncBatchNorm.convert_sync_batchnorm),
        (expansion, other_layer),
        (expansion, other_forward),
        (padded, hooked_padding),
    ],
)
def test_a_layer_that_is_another_one(build: Callable[[], nn.Module], change: Callable[[nn.Module], object]) -> None:
    model = build()
    change(model)
    assert agrees(model)


def test_a_new_head_is_used_and_trains() -> None:
    model: Any = collapse(Head())
    model.head = nn.Linear(40, 7)
    out = model(torch.randn(2, 6))
    assert out.shape == (2, 7)
    out.sum().backward()
    assert model.head.weight.grad is not None


@pytest.mark.parametrize("build", [Head, lambda: expand(Head(), FC(2))])
def test_counting_operations_counts_what_runs(build: Callable[[], nn.Module]) -> None:
    model, x = build(), torch.randn(64, 6)
    layers, one = summary(model, x).macs, summary(collapse(model), x).macs
    assert layers is not None
    assert one is not None
    assert one < layers


def test_code_that_walks_through_a_block_walks_through_its_layers() -> None:
    with pytest.raises(ExpansionError, match="linear layers in a row"):
        collapse(Blocks())
    fast: Any = collapse(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.ReLU()))
    assert len(fast) == 3
    x = torch.randn(2, 6)
    assert torch.allclose(nn.Sequential(*fast.children())(x), fast(x), atol=1e-6)


@pytest.mark.parametrize("again", [lambda m: fx.GraphModule(m, m.graph), lambda m: fx.Transformer(m).transform()])
def test_passes_of_fx_keep_the_layers(again: Callable[[Any], nn.Module]) -> None:
    fast = collapse(Head())
    made = again(fast)
    assert sorted(made.state_dict()) == sorted(fast.state_dict())
    x = torch.randn(2, 6)
    with torch.no_grad():
        next(iter(made.parameters())).mul_(2)
    assert torch.allclose(made(x), uncollapse(made)(x), atol=1e-6)


def test_unused_modules_are_others() -> None:
    fast: Any = collapse(Head())
    keys = list(fast.state_dict())
    fast.delete_all_unused_submodules()
    assert list(fast.state_dict()) == keys


@pytest.mark.filterwarnings("ignore")  # torch.jit.trace is deprecated, and warns of every check
@pytest.mark.parametrize("build", [Head, lambda: expand(Head(), FC(2))])
def test_tracing_by_others_follows_the_layers(build: Callable[[], nn.Module]) -> None:
    fast, x = collapse(build()), torch.randn(2, 6)
    assert torch.allclose(fx.symbolic_trace(fast)(x), fast(x), atol=1e-6)
    assert torch.allclose(torch.jit.trace(fast, x)(x), fast(x), atol=1e-6)


@pytest.mark.parametrize("make", [trace, collapse])
def test_replicas_leave_the_model_alone(make: Callable[[nn.Module], nn.Module]) -> None:
    model: Any = make(Head())
    keys = list(model.state_dict())
    replica = model._replicate_for_data_parallel()
    for name, child in model._modules.items():
        twin = child._replicate_for_data_parallel()
        for key, parameter in child._parameters.items():
            setattr(twin, key, 2 * parameter.detach())
        setattr(replica, name, twin)
    x = torch.randn(2, 6)
    doubled = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in doubled.parameters():
            parameter.mul_(2)
    assert torch.allclose(replica(x), doubled(x), atol=1e-5)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("build", [Head, lambda: expand(Head(), FC(2))])
def test_on_the_device_meta(build: Callable[[], nn.Module]) -> None:
    assert collapse(build()).to("meta")(torch.empty(2, 6, device="meta")).shape == (2, 3)


def test_batch_norm_in_another_dtype() -> None:
    model = frozen().to(torch.bfloat16)
    model.get_submodule("1").float()
    x = torch.randn(2, 4, 9, 9, dtype=torch.bfloat16)
    assert torch.equal(model(x), uncollapse(model)(x))


def test_axes_that_the_plan_did_not_know_of() -> None:
    norm = nn.BatchNorm1d(5).eval()
    norm.running_mean = torch.randn(5)
    model = nn.Sequential(nn.Linear(5, 9), nn.Linear(9, 5), norm)
    fast = collapse(model, torch.randn(4000, 5))
    assert len([node for node in fast.graph.nodes if "collapsed" in str(node.target)]) == 1  # type: ignore[union-attr]
    x = torch.randn(5, 5, 5)  # batch norm takes axis 1 for the channels, linear layers the last one
    assert torch.allclose(fast(x), model(x), atol=1e-5)


class Noisy(nn.Module):
    """A module that no graph can stand for, with dropout inside."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.drop(x * self.gain.reshape(-1, 1, 1)) if x.dim() == 4 and x.sum() < 1e9 else x
        return out


def test_a_taught_module_in_training_mode_and_with_hooks() -> None:
    def lift(module: Noisy) -> Kernel:
        return Kernel(module.gain.double().reshape(-1, 1, 1, 1), groups=4)  # cast to what the module has

    model = nn.Sequential(nn.Conv2d(4, 4, 3), Noisy()).eval()
    fast, x = collapse(model, lifts={Noisy: lift}), torch.randn(2, 4, 9, 9)
    assert torch.allclose(fast(x), model(x), atol=1e-6)
    handle = fast.get_submodule("1.drop").register_forward_hook(lambda module, args, output: output + 1)
    assert torch.allclose(fast(x), uncollapse(fast)(x), atol=1e-6)
    handle.remove()
    fast.train()
    assert not torch.allclose(fast(x), fast(x))


def test_collapsing_again_chooses_again() -> None:
    big = expand(nn.Sequential(nn.Conv2d(256, 256, 3, padding=1)), CL(2), init="standard")
    x = torch.randn(1, 256, 2, 2)
    assert not any(isinstance(m, Collapsed) for m in collapse(collapse(big), x).modules())
    assert any(isinstance(m, Collapsed) for m in collapse(collapse(big, x)).modules())


def test_dropout_that_drops_nothing_is_no_switch() -> None:
    fast: Any = collapse(nn.Sequential(nn.Linear(6, 40), nn.Dropout(0.0), nn.Linear(40, 3)))
    (region,) = [m for m in vars(fast).values() if type(m).__name__ == "LiveRegion"]
    assert region._is_as_planned(torch.randn(2, 6), [fast.get_submodule(name) for name in "012"])


def test_a_bias_that_is_broadcast_and_layers_without_channels_are_left_alone() -> None:
    class Broadcast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(1))
            self.last = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(F.linear(x, self.weight, self.bias))
            return out

    assert "is not one number a feature" in str(explain(Broadcast()))
    with pytest.raises(ExpansionError):
        collapse(Broadcast())
    with pytest.raises(ExpansionError):
        collapse(nn.Sequential(nn.Conv2d(4, 0, 1), nn.Conv2d(0, 3, 3)))
