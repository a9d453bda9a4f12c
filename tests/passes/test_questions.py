"""Code that asks a layer for more than its output: an expansion in its place would answer in another way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxexpand
from fxexpand import CL, FC, ExpansionError, Rule, layer
from fxexpand.testing import assert_equivalent

DOUBLE = torch.float64


class Asking(nn.Module):
    """Control flow that depends on data, so that no graph stands for it; ``ask`` is where subclasses differ."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: Any = nn.ModuleList([nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)])
        self.head: Any = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 1e9 else self.ask(x)

    def ask(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class AsksForTheClass(Asking):
    def ask(self, x: Tensor) -> Tensor:
        for one in self.layers:
            x = one(x) * 3 if isinstance(one, nn.Linear) else one(x)
        return x


class AsksForTheType(Asking):
    def ask(self, x: Tensor) -> Tensor:
        for one in self.layers:
            x = one(x) * 3 if type(one) is nn.Linear else one(x)
        return x


class AsksForAContainer(Asking):
    def ask(self, x: Tensor) -> Tensor:
        for one in self.layers:
            x = one(x) * 3 if isinstance(one, nn.Sequential) else one(x)
        return x


class AsksInAProperty(Asking):
    @property
    def linear(self) -> list[nn.Module]:
        return [one for one in self.layers if isinstance(one, nn.Linear)]

    def ask(self, x: Tensor) -> Tensor:
        for one in self.linear:
            x = one(x).tanh()
        return x


class RunsThroughModules(Asking):
    def ask(self, x: Tensor) -> Tensor:
        for one in self.layers.modules():
            if one is not self.layers:
                x = one(x)
        return x


class RunsThroughParameters(Asking):
    def ask(self, x: Tensor) -> Tensor:
        total: Tensor = sum(p.sum() for p in self.layers.parameters())
        return x * total


class ClampsAWeight(Asking):
    def ask(self, x: Tensor) -> Tensor:
        self.layers[0].weight.data.clamp_(-0.1, 0.1)
        y: Tensor = self.head(self.layers[0](x))
        return y


class HalvesAWeight(Asking):
    def ask(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.head.weight.mul_(0.5)
        y: Tensor = self.head(self.layers[0](x))
        return y


@pytest.mark.parametrize(
    ("make", "because"),
    [
        (AsksForTheClass, "class of layers"),
        (AsksForTheType, "class of layers"),
        (AsksForAContainer, "class of layers"),
        (AsksInAProperty, "class of layers"),
        (RunsThroughModules, "runs through modules"),
        (RunsThroughParameters, "runs through parameters"),
        (ClampsAWeight, "write to its weight"),
        (HalvesAWeight, "write to its weight"),
    ],
)
def test_a_layer_that_code_asks_for_more_is_refused(make: type[Asking], because: str) -> None:
    with pytest.raises(ExpansionError, match=rf"code of {make.__name__}.*{because}.*where=~layer"):
        fxexpand.expand(make(), FC(2))


class ReadsAWeight(Asking):
    """All of this is as good with expansions: a device, a weight that is read, another layer that is written to."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def ask(self, x: Tensor) -> Tensor:
        x = x.to(next(self.parameters()).device)
        if isinstance(x, Tensor):
            self.clamp()
        for one in self.layers:
            x = one(x)
        y: Tensor = self.norm(x) * self.head.weight.sum() + self.head(x)
        return y

    def clamp(self) -> None:
        self.norm.weight.data.clamp_(0, 1)


def test_a_layer_that_code_asks_for_no_more_expands() -> None:
    model, x = ReadsAWeight().double(), torch.randn(3, 4, dtype=DOUBLE)
    big = fxexpand.expand(model, FC(2))
    assert_equivalent(model, big, x)
    assert_equivalent(model, fxexpand.contract(big), x)


def test_only_the_layer_that_is_written_to_is_refused() -> None:
    model, x = HalvesAWeight().double(), torch.randn(3, 4, dtype=DOUBLE)
    big = fxexpand.expand(model, Rule(FC(2), where=~layer(name="head")))
    assert isinstance(big.get_submodule("head"), nn.Linear)
    assert torch.allclose(big(x), HalvesAWeight.forward(model, x), rtol=1e-9)


# Classes of layers whose weight is not the parameter of that name, or which are called in a way of their own.


class Standardised(nn.Conv2d):
    @property
    def weight(self) -> Any:
        raw = self._parameters["weight"]
        assert raw is not None
        return raw / raw.std((1, 2, 3), keepdim=True)

    @weight.setter
    def weight(self, value: Any) -> None:
        self._parameters["weight"] = value

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        self._parameters[name] = param

    def reset_parameters(self) -> None:
        nn.init.normal_(self._parameters["weight"])  # type: ignore[arg-type]


class Doubled(nn.Conv2d):
    def __getattr__(self, name: str) -> Any:
        found: Any = super().__getattr__(name)
        return 2 * found if name == "weight" else found

    def reset_parameters(self) -> None:
        nn.init.normal_(self._parameters["weight"])  # type: ignore[arg-type]
        nn.init.normal_(self._parameters["bias"])  # type: ignore[arg-type]


class BufferedBias(nn.Conv2d):
    def __init__(self, m: int, n: int, k: int) -> None:
        super().__init__(m, n, k, bias=False)
        del self._parameters["bias"]
        self.register_buffer("bias", torch.ones(4))


@pytest.mark.parametrize("cls", [Standardised, Doubled, BufferedBias])
def test_a_weight_that_is_no_parameter_is_refused(cls: type[nn.Conv2d]) -> None:
    model, x = nn.Sequential(cls(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)).double(), torch.randn(2, 4, 6, 6)
    with pytest.raises(ExpansionError, match="is no parameter"):
        fxexpand.expand(model, CL(2))
    assert_equivalent(model, fxexpand.fuse(model.eval()), x.double())
    assert any("is no parameter" in entry.reason for entry in fxexpand.explain(model).refused)


class CalledTwice(nn.Linear):
    def _call_impl(self, *arguments: Any, **named: Any) -> Any:
        return 2 * super()._call_impl(*arguments, **named)  # type: ignore[no-untyped-call]


def test_a_layer_that_is_called_in_a_way_of_its_own_is_none() -> None:
    model, x = nn.Sequential(CalledTwice(4, 4), nn.Linear(4, 4)).double(), torch.randn(3, 4, dtype=DOUBLE)
    assert_equivalent(model, fxexpand.fuse(model), x)
    assert_equivalent(model, fxexpand.expand(model, FC(2)), x)
