"""Whether a pass has changed anything: copies are the same, and each difference is seen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

import fxexpand
from fxexpand.pipeline.same import same


def model() -> Any:
    found = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
    vars(found[3])["scale"] = torch.ones(1)  # a tensor in a plain attribute
    with torch.no_grad():
        found.get_parameter("0.weight")[0] = float("nan")
    return fxexpand.trace(fxexpand.collapse(fxexpand.expand(found, fxexpand.CL(2), init="standard")))


def other_graph(m: Any) -> None:
    (relu,) = (node for node in m.graph.nodes if node.target == "2")
    relu.replace_all_uses_with(relu.args[0])
    m.graph.erase_node(relu)


CHANGES: dict[str, Callable[[Any], object]] = {
    "a value": lambda m: m[3].weight.data[0].add_(1e-6),
    "a buffer": lambda m: m[1].running_mean.add_(1),
    "a plain tensor": lambda m: m[3].scale.add_(1),
    "a dtype": lambda m: m[3].double(),
    "a flag": lambda m: m[3].weight.requires_grad_(False),
    "no tensor": lambda m: setattr(m[3], "bias", None),
    "a mode": lambda m: m[1].eval(),
    "a setting": lambda m: setattr(m[3], "stride", (2, 2)),
    "a class": lambda m: setattr(m, "2", nn.ReLU6()),
    "a layer more": lambda m: m.append(nn.ReLU()),
    "another name": lambda m: m.register_module("three", m._modules.pop("3")),
    "a tied weight": lambda m: setattr(m[3], "weight", nn.Parameter(m[3].weight.detach().clone())),
    "explicit layers": lambda m: m[0].release(),
    "a node less": other_graph,
}


def test_a_copy_is_the_same() -> None:
    before = model()
    assert same(before, before)
    assert same(before, copy.deepcopy(before))
    plain = fx.symbolic_trace(before)
    assert same(plain, copy.deepcopy(plain))
    assert not same(before, plain)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen(change: Callable[[Any], object]) -> None:
    before = model()
    before[0].register_parameter("second", before[3].weight)  # held at two places
    after = copy.deepcopy(before)
    change(after)
    assert not same(before, after)
    assert not same(after, before)


def test_what_one_module_is_is_not_two() -> None:
    relu = nn.ReLU()
    once, twice = nn.Sequential(relu, nn.Identity(), relu), nn.Sequential(nn.ReLU(), nn.Identity(), nn.ReLU())
    assert not same(once, twice)
    assert not same(twice, once)
