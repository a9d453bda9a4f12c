"""Whether two models behave alike: what they return, their gradients, and their state after each call."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

X = torch.linspace(-1, 2, 8, dtype=torch.float64).reshape(2, 4)
DOUBLE: dict[str, Any] = {"dtype": torch.float64}


def linear(m: int = 4, n: int = 4) -> nn.Linear:
    return nn.Linear(m, n, **DOUBLE)


class Two(nn.Module):
    """The start of most models here: two linear layers of 4 features."""

    def __init__(self) -> None:
        super().__init__()
        self.a = linear()
        self.b = linear()


def assert_alike(found: nn.Module, expected: nn.Module, *inputs: Any, calls: int = 2, **named: Any) -> None:
    """That calls with the same inputs and random numbers give the same, with and without gradients.

    Runs ``expected`` on a copy, so that the two can share their parameters. Equal means equal: the operations are the
    same, in the same order.
    """
    expected = copy.deepcopy(expected)
    assert list(found.state_dict()) == list(expected.state_dict())
    for call in range(calls):
        ours, theirs = (_behaviour(model, inputs, named, seed=call) for model in (found, expected))
        for what, x in theirs.items():
            _assert_same(ours[what], x, f"{what} at call {call}")


def _behaviour(model: nn.Module, inputs: Any, named: dict[str, Any], seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    random.seed(seed)
    model.zero_grad()
    inputs, named = copy.deepcopy((inputs, named))
    out = model(*inputs, **named)
    differentiable = [t for t in tensors_in(out) if t.requires_grad]
    if differentiable:
        torch.stack([t.square().sum() for t in differentiable]).sum().backward()
    with torch.no_grad():
        without = model(*copy.deepcopy(inputs), **named)
    return {
        "output": out,
        "gradients": [p.grad for p in model.parameters()],
        "output without gradients": without,
        "inputs": (inputs, named),
        "state": OrderedDict((k, v.clone()) for k, v in model.state_dict().items()),
    }


def tensors_in(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _assert_same(x: Any, y: Any, where: str) -> None:
    if isinstance(y, Tensor):
        assert isinstance(x, Tensor), f"{where}: expected a tensor, found {x!r}"
        assert x.dtype == y.dtype, where
        assert torch.equal(x.detach(), y.detach()), f"{where}: {x} is not {y}"
        return
    assert type(x) is type(y), f"{where}: expected {type(y).__name__}, found {type(x).__name__}"
    if isinstance(y, dict):
        assert list(x) == list(y), where
        x, y = list(x.values()), list(y.values())
    if isinstance(y, (list, tuple)):
        assert len(x) == len(y), where
        for i, (a, b) in enumerate(zip(x, y, strict=True)):
            _assert_same(a, b, f"{where}[{i}]")
    else:
        assert x == y, where
