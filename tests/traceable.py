"""Models to trace, in a module that is imported by name: pickle finds their classes in it."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from behaviour import DOUBLE, Two, linear


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


class Kept(Two):
    """Cannot be traced, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.a(x) if x.sum() > 0 else self.b(x)
        return y


def double(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out * 2


class Everything(Two):
    """All that a graph may hold, and much that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, **DOUBLE))
        self.conv = nn.Conv1d(1, 1, 3, padding=1, **DOUBLE)
        self.kept = Kept()
        self.dropout = torchvision.ops.StochasticDepth(0.5, "row")
        self.alias = self.a
        self.unused = nn.Sequential(linear(), nn.BatchNorm1d(4))
        self.register_buffer("calls", torch.zeros((), **DOUBLE))
        self.register_buffer("derived", torch.ones(4, **DOUBLE), persistent=False)
        self.calls: Tensor
        self.derived: Tensor
        self.scale = torch.full((4,), 0.5, **DOUBLE)
        self.note = {"version": 3}
        self.seen: Any = None
        self.b.register_forward_hook(double)
        self.register_forward_hook(Everything.look)
        self.kept.register_forward_hook(self.keep)
        self.unused.eval()
        self.b.requires_grad_(False)

    def look(self, args: Any, out: dict[str, Any]) -> dict[str, Any]:
        return {**out, "looked": out["pair"].left * 0}

    def keep(self, module: nn.Module, args: Any, out: Tensor) -> None:
        self.seen = True

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Any:
        self.calls.add_(1)
        y = self.dropout(self.b(self.a(x))) * self.calls * 2
        y += F.linear(x, self.weight)
        z = self.conv(self.alias(y)[:, None])[:, 0] * self.scale
        z += self.derived * scale
        z = self.kept(z)
        return OrderedDict(pair=Pair(z, x), more=[y.relu(), {"text": "t"}], rand=torch.rand_like(x))

    def describe(self) -> int:
        return self.note["version"]
