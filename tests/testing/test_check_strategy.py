"""A strategy that is right passes, and each way of being wrong is found, shrunk and printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

import fxexpand
from fxexpand import CK, CL, FC, DiverseBranch, MobileOne, RepVGG
from fxexpand.algebra import Kernel, Refusal
from fxexpand.strategies import Series, Strategy, Sum
from fxexpand.testing import PropertyError, as_trained, check_strategy

OURS = (CL(1), CL(2), CK(4), FC(1.5, depth=3), MobileOne(2, True), DiverseBranch(True), RepVGG().then(CL(2)))


@pytest.mark.parametrize("strategy", OURS, ids=str)
def test_those_of_the_library(strategy: Strategy) -> None:
    report = check_strategy(strategy, max_examples=20)
    assert 0 < report.expanded <= 20
    assert report.expanded + sum(report.refused.values()) >= 20
    assert str(report).startswith(f"{strategy}: {report.expanded} layers expanded")


def test_what_a_strategy_refuses_is_counted_by_its_reason() -> None:
    report = check_strategy(CL(0.5), max_examples=60)
    reasons = [reason for reason in report.refused if "hidden layers need" in reason]
    assert reasons
    assert all("#" in reason and not any(map(str.isdigit, reason)) for reason in reasons)
    assert set(report.refused) - set(reasons) <= {"it does not reach them"}


@dataclass(frozen=True)
class Tail(Strategy):
    """A layer, then a pointwise one."""

    wrong: str = ""

    def layers(self, site: Any) -> Mapping[str, nn.Module] | Refusal:
        if self.wrong == "refuses all":
            return Refusal("not today")
        n = site.out_channels
        padding = 0 if self.wrong == "padding" else site.padding
        own = site.layer(
            site.in_channels, n, site.kernel_size, stride=site.stride, padding=padding, dilation=site.dilation
        )
        return {"own": own, "tail": site.layer(n, n)}

    def factorize(self, target: Kernel, fresh: Sequence[Kernel]) -> Sequence[Kernel] | Refusal:
        own, tail = fresh
        if self.wrong == "crashes":
            raise RuntimeError("oh")
        inside = target.weight.unflatten(0, (target.groups, -1)).flatten(2)
        weight = torch.linalg.solve(tail.weight.unflatten(0, (target.groups, -1)).flatten(2), inside)
        if self.wrong == "weight":
            weight = weight * (1 + 1e-4)
        bias = None if own.bias is None else torch.zeros_like(own.bias)
        tail_bias = None if self.wrong == "bias" and target.bias is not None else target.bias
        return [replace(own, weight=weight.reshape(target.weight.shape), bias=bias), replace(tail, bias=tail_bias)]


def test_a_user_s_own() -> None:
    assert check_strategy(Tail(), max_examples=50).refused == {}


@dataclass(frozen=True)
class Pyramid(Strategy):
    """Branches of a user's own, with nothing said of their weights."""

    batch_norm: bool = False

    def reaches(self, site: Any) -> bool:
        return any(k > 1 for k in site.kernel_size) and (site.has_bias or not self.batch_norm)

    def layers(self, site: Any) -> Sum:
        half = tuple((k + 1) // 2 for k in site.kernel_size)
        branches = {"whole": site.branch(site.kernel_size), "inner": site.branch(half), "point": site.branch(1)}
        if not self.batch_norm:
            return Sum(branches)
        return Sum({name: Series({"part": branch, "norm": site.norm()}) for name, branch in branches.items()})


@pytest.mark.parametrize("strategy", [Pyramid(), Pyramid(batch_norm=True), CL(2).then(Pyramid())], ids=str)
def test_branches_of_a_user_s_own_work_with_every_pass(strategy: Strategy) -> None:
    assert check_strategy(strategy, max_examples=10).expanded
    layers = nn.Conv2d(3, 4, 5, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2)
    model = as_trained(nn.Sequential(*layers).double()).eval()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    big = as_trained(fxexpand.expand(model, strategy)).eval()
    fused = fxexpand.fuse(big, x)
    assert sum(isinstance(module, nn.Conv2d) for module in fused.modules()) == 2
    for made in (fused, fxexpand.contract(big), fxexpand.collapse(big), fxexpand.uncollapse(fxexpand.collapse(big, x))):
        assert fxexpand.verify(big, made, x) < 1e-11
    assert "whole" in str(fxexpand.explain(big, x)) + str(fxexpand.summary(big, x))


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        ("padding", "do not make up this one"),
        ("weight", "differ from the layer by"),
        ("bias", "differ from the layer by"),
        ("crashes", "expected the pass to run, it raised RuntimeError: oh"),
        ("refuses all", "expected it to take some of .* random layers, found none: not today"),
    ],
)
def test_one_that_is_wrong(wrong: str, found: str) -> None:
    with pytest.raises(PropertyError, match=found) as failure:
        check_strategy(Tail(wrong), max_examples=60)
    if wrong != "refuses all":
        assert "case=Case(nn." in "\n".join(vars(failure.value)["__notes__"])
