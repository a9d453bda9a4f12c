"""What each strategy makes of a layer, and a strategy of a user's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import FrozenInstanceError, dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fxexpand
from fxexpand import CK, CL, FC
from fxexpand.algebra import Kernel
from fxexpand.graph.geometry import Geometry, geometry_of
from fxexpand.strategies import Strategy
from fxexpand.strategies.strategy import widened


def geometries(layer: nn.Module, strategy: Strategy) -> list[Geometry]:
    expanded = fxexpand.expand(layer, strategy, init="standard")
    return [geometry_of(child) for child in expanded.children()]


@given(st.integers(1, 600), st.integers(1, 4), st.sampled_from((0.1, 0.25, 0.29, 0.7, 1 / 3, 1, 1.5, 4)))
def test_channels_are_floored_inside_each_group_and_at_least_one(inside: int, groups: int, rate: float) -> None:
    width = widened(inside * groups, rate, groups)
    assert width % groups == 0
    exact = rate * inside
    assert width // groups == max(1, int(exact + 1e-9))


def test_rates_that_are_decimal_fractions_make_the_channels_they_say() -> None:
    assert [widened(100, rate) for rate in (0.29, 0.57, 0.58, 1.1, 2.3)] == [29, 57, 58, 110, 230]


def test_cl_is_pointwise_kernel_pointwise() -> None:
    conv = nn.Conv2d(4, 6, (3, 5), stride=2, padding=(1, 2), dilation=(1, 2), groups=2, padding_mode="circular")
    expand, kernel, reduce = geometries(conv, CL(2))
    assert expand == Geometry(4, 8, True, (1, 1), (1, 1), ((1, 1), (2, 2)), (1, 1), 2, "circular")
    assert kernel == Geometry(8, 12, True, (3, 5), (2, 2), ((0, 0), (0, 0)), (1, 2), 2)
    assert reduce == Geometry(12, 6, True, (1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1), 2)


def test_a_depthwise_layer_expands_inside_each_channel() -> None:
    sizes = [(g.in_channels, g.out_channels, g.groups) for g in geometries(nn.Conv2d(5, 5, 3, groups=5), CL(3))]
    assert sizes == [(5, 15, 5), (15, 15, 5), (15, 5, 5)]


def test_ck_is_threes_with_the_padding_first_and_the_stride_last() -> None:
    conv = nn.Conv2d(4, 6, 7, stride=2, padding=3, dilation=2, bias=False)
    found = geometries(conv, CK(4))
    assert [(g.in_channels, g.out_channels) for g in found] == [(4, 16), (16, 24), (24, 6)]
    assert [g.kernel_size for g in found] == [(3, 3)] * 3
    assert [g.stride for g in found] == [(1, 1), (1, 1), (2, 2)]
    assert [g.padding for g in found] == [((3, 3), (3, 3)), ((0, 0), (0, 0)), ((0, 0), (0, 0))]
    assert {g.dilation for g in found} == {(2, 2)}
    assert not any(g.has_bias for g in found)


@pytest.mark.parametrize("size", [(1, 7), (7, 1), (5, 3), (9, 5), (11, 1)])
def test_ck_of_a_rectangle_adds_up_on_each_axis(size: tuple[int, int]) -> None:
    found = geometries(nn.Conv2d(2, 2, size), CK(4))
    assert len(found) == (max(size) - 1) // 2
    for axis, taps in enumerate(size):
        assert 1 + sum(g.kernel_size[axis] - 1 for g in found) == taps


def test_fc_is_a_chain_of_matrices() -> None:
    found = geometries(nn.Linear(10, 6), FC(0.5, depth=4))
    assert [(g.in_channels, g.out_channels) for g in found] == [(10, 5), (5, 3), (3, 3), (3, 6)]


@pytest.mark.parametrize("strategy", [CL(2), CK(4, keep_input=True), FC(2, depth=3)])
def test_strategies_are_frozen_values(strategy: Any) -> None:
    assert strategy == eval(repr(strategy), {"CL": CL, "CK": CK, "FC": FC})
    assert len({strategy, replace(strategy)}) == 1
    with pytest.raises(FrozenInstanceError):
        strategy.rate = 3


def test_preserved_layers_start_with_the_spread_of_fresh_ones() -> None:
    """So that one learning rate suits them as it suits a fresh initialisation."""
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 32, 7)
    for strategy in (CL(4), CK(4)):
        kept, fresh = fxexpand.expand(conv, strategy), fxexpand.expand(conv, strategy, init="standard")
        for name, weight in fresh.named_parameters():
            if name.endswith("weight"):
                assert 0.5 < float(kept.get_parameter(name).detach().std() / weight.detach().std()) < 4, name


@dataclass(frozen=True)
class Twist(Strategy):
    """A pointwise layer after the layer itself: the smallest strategy a user may write."""

    def layers(self, site: Any) -> Mapping[str, nn.Module]:
        n = site.out_channels
        own = site.layer(site.in_channels, n, site.kernel_size, stride=site.stride, padding=site.padding,
                         dilation=site.dilation)  # fmt: skip
        return {"own": own, "twist": site.layer(n, n)}

    def factorize(self, target: Kernel, fresh: Sequence[Kernel]) -> Sequence[Kernel]:
        own, twist = fresh
        inside = target.weight.unflatten(0, (target.groups, -1))
        mixed = torch.linalg.solve(twist.weight.unflatten(0, (target.groups, -1)).flatten(2), inside.flatten(2))
        bias = None if own.bias is None else torch.zeros_like(own.bias)
        weight = mixed.reshape(target.weight.shape)
        return [replace(own, weight=weight, bias=bias), replace(twist, bias=target.bias)]


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(5, 4), nn.Conv1d(4, 6, 3, groups=2), nn.Conv2d(3, 4, (2, 3), padding="same"), nn.Conv3d(2, 2, 2)],
    ids=lambda layer: type(layer).__name__,
)
def test_a_user_s_own_strategy_expands_and_contracts(layer: nn.Module) -> None:
    layer = layer.double()
    geometry = geometry_of(layer)
    x = torch.randn(2, geometry.in_channels, *[6] * geometry.dims, dtype=torch.float64)
    big = fxexpand.expand(layer, Twist())
    assert [name for name, _ in big.named_children()][-2:] == ["own", "twist"]
    assert fxexpand.verify(layer, big, x) < 1e-10
    assert fxexpand.verify(layer, fxexpand.contract(big), x) < 1e-10
