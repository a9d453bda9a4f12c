"""A user's strategy that is not what it should be gets an error that says so, and the model is as it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxexpand
from drawing import random
from fxexpand import CL, ACNet, ExpansionError, MobileOne, Overparam, RepVGG
from fxexpand.algebra import Kernel
from fxexpand.algebra.factorize import before_points
from fxexpand.strategies import Series, Strategy, Sum


@dataclass(frozen=True)
class Own(Strategy):
    """Whatever a test wants."""

    make: Callable[[Any], Any]
    weights: Callable[[Kernel, Sequence[Kernel]], Any] | None = None

    def layers(self, site: Any) -> Any:
        return self.make(site)

    def factorize(self, target: Kernel, fresh: Sequence[Kernel]) -> Any:
        return super().factorize(target, fresh) if self.weights is None else self.weights(target, fresh)


class Doubled(Sum):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return 2 * super().forward(input)


NAMES = ("append", "training", "class", "_modules", "stride", "weight", "")


def named(name: str) -> Callable[[Any], Any]:
    return lambda site: {name: site.branch(3)}


def beside(module: nn.Module) -> Callable[[Any], Any]:
    return lambda site: Sum({"a": site.branch(3), "b": module})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        *((named(name), "no free name") for name in NAMES),
        (lambda site: Sum({}), "must give a mapping of names to modules, or a Sum"),
        (lambda site: [site.branch(3)], "must give a mapping of names to modules, or a Sum"),
        (beside(nn.LazyConv2d(4, 1)), "b: expected parameters of torch.float64, found a lazy one"),
        (beside(nn.Conv2d(4, 4, 1)), "b: expected parameters of torch.float64, found torch.float32"),
        (beside(nn.ReLU()), "b: ReLU is no convolution or linear layer"),
        (beside(nn.Conv2d(4, 4, 1, padding=1).double()), "the branches give outputs of different size"),
        (lambda site: Sum({"a": site.branch(3), "b": Series({"c": site.branch(1), "n": nn.BatchNorm1d(4).double()})}),
         "b.n: BatchNorm1d is not for signals with 2 spatial axes"),
        (lambda site: Sum({"a": site.branch(3), "b": Doubled({"c": site.branch(1)})}),
         "b: Doubled may have a forward of its own; use Series or Sum"),
        (lambda site: Sum({"a": Series({"c": site.branch(3, bias=False),
                                        "n": nn.BatchNorm2d(4, affine=False).double()}), "b": site.branch(1)}),
         "cannot keep the function: its first layer has no bias"),
        (lambda site: Sum({"a": site.branch(1), "b": site.branch(3)}), "the first branch has a kernel of"),
    ],
)  # fmt: skip
def test_layers(make: Callable[[Any], Any], message: str) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ExpansionError, match=message) as failure:
        fxexpand.expand(model, Own(make))
    assert str(failure.value).startswith("0 (Conv2d 3×3, 4 -> 4)")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "weights",
    [lambda target, fresh: None, lambda target, fresh: fresh[:1], lambda target, fresh: [fresh[1], fresh[0]]],
)
def test_kernels_of_other_shapes(weights: Any) -> None:
    with pytest.raises(ExpansionError, match="must give a kernel of the same shape for each of its 2 parts"):
        fxexpand.expand(
            nn.Conv2d(4, 4, 3, padding=1), Own(lambda site: Sum({"a": site.branch(3), "b": site.branch(1)}), weights)
        )


def test_batch_norm_beside_a_linear_layer_is_refused() -> None:
    """It normalises axis 1, and a linear layer may be called on more than two axes."""
    own = Own(lambda site: Sum({"a": Series({"l": site.layer(6, 5), "n": site.norm()}), "b": site.layer(6, 5)}))
    with pytest.raises(ExpansionError, match="where a linear layer has its features on the last one"):
        fxexpand.expand(nn.Linear(6, 5), own)


@pytest.mark.parametrize("padding", [0, 1, 2])
def test_a_chain_that_begins_with_branches(padding: int) -> None:
    def make(site: Any) -> Any:
        return {"mix": Sum({"a": site.branch(3), "b": site.branch(1)}), "reduce": site.layer(4, 4)}

    conv = nn.Conv2d(4, 4, 3, padding=padding).double()
    big = fxexpand.expand(conv, Own(make, before_points))
    assert fxexpand.verify(conv, big, random(2, 4, 7, 7)) < 1e-12
    assert fxexpand.verify(big, fxexpand.contract(big), random(2, 4, 7, 7)) < 1e-12


@pytest.mark.parametrize(
    ("strategy", "size"),
    [
        *((strategy, 0.0) for strategy in (ACNet(), RepVGG(), MobileOne(2), CL(2), Overparam(2))),
        *((strategy, 1e-12) for strategy in (ACNet(), RepVGG(identity=False), CL(2), Overparam(2))),
    ],
)
def test_layers_of_zeros_and_small_ones_keep_their_function(strategy: Strategy, size: float) -> None:
    conv = nn.Conv2d(4, 4, 3, padding=1).double()
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.mul_(size)
    big, x = fxexpand.expand(conv, strategy), random(2, 4, 7, 7)
    assert float((big(x) - conv(x)).abs().max()) <= 1e-14 * max(1.0, float(x.abs().max())) * 10
    assert fxexpand.verify(big, fxexpand.collapse(big), x, rtol=1.0) <= 1.0
    if isinstance(strategy, ACNet):
        assert max(float(p.abs().max()) for p in big.parameters()) <= 4 * max(size, 1e-3)


def test_the_signal_itself_can_drown_a_small_layer() -> None:
    """Nothing makes it smaller: where that costs too many digits, there is an error."""
    conv = nn.Conv2d(4, 4, 3, padding=1).double()
    with torch.no_grad():
        conv.weight.mul_(1e-12)
        conv.bias.zero_() if conv.bias is not None else None
    with pytest.raises(ExpansionError, match="differ from the layer by"):
        fxexpand.expand(conv, RepVGG())


def test_half_precision_keeps_small_layers_too() -> None:
    conv = nn.Conv2d(16, 16, 3, padding=1)
    with torch.no_grad():
        conv.weight.mul_(0.01)
    conv = conv.bfloat16()
    big = fxexpand.expand(conv, ACNet())
    assert fxexpand.verify(conv.double(), big.double(), random(2, 16, 7, 7), rtol=0.02) < 0.02


def test_hooks_on_branches_would_be_lost() -> None:
    def make(site: Any) -> Sum:
        branches = Sum({"a": site.branch(3), "b": site.branch(1)})
        branches.register_forward_hook(lambda *_: None)
        return branches

    with pytest.raises(ExpansionError, match="gives a Sum with hooks, which would be lost"):
        fxexpand.expand(nn.Conv2d(4, 4, 3), Own(make))


def test_what_a_rule_can_exclude_is_the_layer_of_the_model() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False))
    with pytest.raises(ExpansionError, match="there is no place for one") as failure:
        fxexpand.expand(model, CL(2).then(ACNet(True)))
    assert str(failure.value).startswith("0.kernel (Conv2d 3×3, 8 -> 8)")
    assert str(failure.value).endswith('exclude it with where=~layer(name="0").')


def test_an_expansion_that_code_calls_is_one_kernel_behind_padding_that_no_layer_does() -> None:
    class Code(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 4, padding="same")

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.conv(x) if x.sum() < 1e9 else x
            return out

    big, x = fxexpand.expand(Code().double(), RepVGG()).eval(), random(2, 4, 9, 9)
    fused = fxexpand.fuse(big)
    assert sum(isinstance(module, nn.Conv2d) for module in fused.modules()) == 1
    assert fxexpand.verify(big, fused, x) < 1e-12
