"""The bias that batch norm in branches adds to a layer without one goes to the batch norm behind it, or nowhere."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxexpand
from drawing import random
from fxexpand import ACNet, ContractionError, DiverseBranch, ExpansionError, MobileOne, RepVGG, layer
from fxexpand.strategies import Strategy
from fxexpand.testing import as_trained


def kernels(model: nn.Module) -> int:
    return sum(isinstance(module, nn.Conv2d) for module in model.modules())


def normed(*after: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return as_trained(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), *after).double()).eval()


@pytest.mark.parametrize("strategy", [ACNet(True), RepVGG(True), MobileOne(2, True), DiverseBranch(True)], ids=str)
def test_the_bias_of_branches_goes_to_the_batch_norm_behind_a_layer_without_one(strategy: Strategy) -> None:
    model, x = normed(nn.BatchNorm2d(4), nn.ReLU()), random(2, 4, 7, 7)
    big = fxexpand.expand(model, strategy)
    assert fxexpand.verify(model, big, x) < 1e-12
    big = as_trained(big)
    before = {name: value.clone() for name, value in big.state_dict().items()}
    small = fxexpand.contract(big)
    assert fxexpand.verify(big, small, x) < 1e-12
    assert list(small.state_dict()) == list(model.state_dict())
    assert not torch.equal(small.state_dict()["1.running_mean"], before["1.running_mean"])
    assert all(torch.equal(value, before[name]) for name, value in big.state_dict().items())
    model.load_state_dict(small.state_dict(), strict=True)
    assert fxexpand.verify(big, model, x) < 1e-12
    fast = fxexpand.collapse(big)
    assert fxexpand.verify(fast, fxexpand.contract(fast), x) < 1e-12
    assert kernels(fxexpand.fuse(big)) == 1


class Twice(nn.Module):
    """One layer before two batch norms, or two layers before one."""

    def __init__(self, layers: int, norms: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(layers))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(norms))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(2):
            x = self.norms[i % len(self.norms)](self.convs[i % len(self.convs)](x)).relu()
        return x


def test_each_call_needs_a_batch_norm_of_its_own() -> None:
    model, x = as_trained(Twice(1, 2).double()).eval(), random(2, 4, 7, 7)
    big = as_trained(fxexpand.expand(model, ACNet(True))).eval()
    assert fxexpand.verify(big, fxexpand.contract(big), x) < 1e-12
    for other in (Twice(2, 1), normed(nn.ReLU()), normed(nn.BatchNorm2d(4, track_running_stats=False))):
        with pytest.raises(ExpansionError, match="there is no place for one"):
            fxexpand.expand(other, ACNet(True))


def test_a_batch_norm_that_is_gone_is_an_error() -> None:
    big: Any = as_trained(fxexpand.expand(normed(nn.BatchNorm2d(4), nn.ReLU()), ACNet(True))).eval()
    (node,) = [node for node in big.graph.nodes if node.target == "1"]
    node.replace_all_uses_with(node.args[0])
    big.graph.erase_node(node)
    big.recompile()
    with pytest.raises(ContractionError, match="does not follow any more"):
        fxexpand.contract(big)


class Block(nn.Module):
    """A layer without bias and batch norm, which may be somebody else's too."""

    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm: Any = nn.BatchNorm2d(4) if norm is None else norm

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(x)).relu()
        return out


class Code(nn.Module):
    """Has no graph; its blocks have."""

    def __init__(self, use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first = Block()
        self.second = Block(self.first.norm)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 1e9 else self.use(self, x)


class Reads(Block):
    def forward(self, x: Tensor) -> Tensor:
        mean: Tensor = self.norm.running_mean
        return super().forward(x) + mean.reshape(1, -1, 1, 1)


class Tied(Block):
    def __init__(self) -> None:
        super().__init__(nn.BatchNorm2d(4, dtype=torch.float64))
        self.other = nn.BatchNorm2d(4, dtype=torch.float64)
        self.other.running_mean = self.norm.running_mean

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.other(super().forward(x))
        return out


def hooked() -> nn.Module:
    block = Block()
    block.norm.register_forward_pre_hook(lambda _, given: (given[0].relu(),))
    return block


@pytest.mark.parametrize(
    "model",
    [
        Code(lambda self, x: self.second(self.first(x))),
        Code(lambda self, x: self.first(x) + self.first.norm(x)),
        Code(lambda self, x: self.first(x) + self.first.conv(x)),
        Reads(),
        Tied(),
        hooked(),
    ],
    ids=["called by two graphs", "called by code", "layer called by code", "read", "tied", "hooked"],
)
def test_a_batch_norm_that_others_use_takes_no_bias(model: nn.Module) -> None:
    with pytest.raises(ExpansionError, match="there is no place for one"):
        fxexpand.expand(model.double().eval(), ACNet(True))


def test_a_batch_norm_that_others_use_later_takes_no_bias() -> None:
    big: Any = as_trained(fxexpand.expand(Block().double(), ACNet(True))).eval()
    big.norm.register_forward_pre_hook(lambda _, given: (given[0].relu(),))
    with pytest.raises(ContractionError, match="or is not its alone"):
        fxexpand.contract(big)


def test_expanded_twice_and_collapsed_it_contracts() -> None:
    model, x = normed(nn.BatchNorm2d(4)), random(2, 4, 7, 7)
    big = fxexpand.expand(model, ACNet(True))
    big = as_trained(fxexpand.expand(big, fxexpand.Rule(RepVGG(True), where=layer(name="*.square.*")))).eval()
    fast = fxexpand.collapse(big)
    assert fxexpand.verify(big, fxexpand.contract(big), x) < 1e-12
    assert fxexpand.verify(big, fxexpand.contract(fast), x) < 1e-12


def test_synchronised_batch_norm() -> None:
    big = fxexpand.expand(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()).double(), ACNet(True))
    x = random(2, 4, 7, 7)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(as_trained(big)).eval()
    assert fxexpand.verify(synchronised, fxexpand.contract(synchronised), x) < 1e-12


def test_batch_norm_in_float32_beside_half_precision() -> None:
    big = fxexpand.expand(nn.Sequential(nn.Conv2d(4, 4, 3)).bfloat16(), ACNet(True)).eval()
    for module in big.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    x = random(2, 4, 7, 7).bfloat16()
    fast = fxexpand.collapse(big)
    assert fast(x).dtype == torch.bfloat16
    assert fxexpand.verify(big, fast, x, rtol=0.05) < 0.05


def test_the_weight_can_be_read_while_batch_norm_trains() -> None:
    big: Any = as_trained(fxexpand.expand(nn.Sequential(nn.Conv2d(4, 4, 3)), RepVGG(True))).train()
    small: Any = fxexpand.contract(copy.deepcopy(big).eval())
    assert torch.allclose(big.get_submodule("0").weight, small.get_submodule("0").weight, atol=1e-6)
    assert big.get_submodule("0").training
