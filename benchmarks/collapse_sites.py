"""When is composing a chain dearer than applying its layers? Measured, and as the cost model of ``collapse`` says.

Forward and backward of single expanded layers, layer by layer and collapsed, from large maps with few channels, where
composing is nothing, to small maps with many, where it is everything. The model is fitted to these times (non-negative
least squares of relative errors); the table shows which form each one says is faster, with the model that the library
has. Expected: right wherever one form takes more than 1.3 times as long as the other (of 47, wrong at 1.04 to 1.20).

Run as ``python -m benchmarks.collapse_sites [--rounds N] [--json FILE]``, on one core for the figures in the library:
``OMP_NUM_THREADS=1``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor, nn

import fxexpand
from benchmarks.rewrite_time import machine
from fxexpand import CK, CL, FC
from fxexpand.algebra.step_cost import StepCost
from fxexpand.graph.collapsed import Collapsed
from fxexpand.strategies import Strategy


@dataclass(frozen=True)
class SiteSetting:
    """A layer, how it is expanded, and its input: ``kernel`` 0 is a linear layer, which has no ``size``."""

    strategy: Strategy
    kernel: int
    m: int
    n: int
    size: int
    batch: int
    stride: int = 1

    def layer(self) -> nn.Module:
        if self.kernel == 0:
            return nn.Linear(self.m, self.n)
        return nn.Conv2d(self.m, self.n, self.kernel, stride=self.stride, padding=self.kernel // 2)

    def shape(self) -> tuple[int, ...]:
        """Of the input, without the batch."""
        return (self.m,) if self.kernel == 0 else (self.m, self.size, self.size)

    def __str__(self) -> str:
        kernel = f"{self.kernel}×{self.kernel}" if self.kernel else "linear"
        stride = f", stride {self.stride}" if self.stride > 1 else ""
        return f"{self.strategy} {kernel} {self.m}->{self.n} at {self.size}{stride}, batch {self.batch}"


_CL = [
    *[
        (4, 7, 3, 8, 32, 128),
        (4, 7, 8, 16, 16, 128),
        (4, 7, 16, 32, 8, 128),
        (4, 7, 16, 32, 8, 8),
        (4, 7, 16, 32, 4, 2),
    ],
    *[(4, 3, 32, 32, 16, 32), (4, 3, 32, 32, 8, 4), (2, 3, 64, 64, 16, 8), (4, 3, 64, 64, 4, 8), (4, 3, 64, 64, 4, 1)],
    *[(2, 3, 128, 128, 8, 8), (2, 3, 128, 128, 2, 8), (2, 3, 256, 256, 4, 4), (2, 3, 256, 256, 2, 2)],
    *[(2, 3, 512, 512, 2, 2), (2, 3, 512, 512, 7, 2), (2, 3, 16, 16, 4, 1), (2, 3, 256, 256, 14, 4)],
    *[(2, 3, 512, 512, 2, 32), (2, 3, 512, 512, 7, 16)],
]
_CK = [
    (7, 8, 16, 16, 128),
    (7, 16, 32, 8, 128),
    (7, 16, 32, 8, 4),
    (5, 64, 64, 8, 8),
    (5, 64, 64, 4, 1),
    (5, 128, 128, 4, 4),
]
_FC = [(3, 4, 512, 64, 128), (3, 4, 512, 64, 4), (2, 2, 512, 512, 16), (2, 2, 1024, 1024, 8), (2, 2, 1024, 1024, 256)]
# The convolutions of ResNet-18 that CL reaches: kernel, m, n, size for images of 32, stride.
_RESNET = [
    *[(7, 3, 64, 32, 2), (3, 64, 64, 8, 1), (3, 64, 128, 8, 2), (3, 128, 128, 4, 1)],
    *[(3, 128, 256, 4, 2), (3, 256, 256, 2, 1), (3, 256, 512, 2, 2), (3, 512, 512, 1, 1)],
]


def resnet_settings() -> list[SiteSetting]:
    """The layers of ResNet-18, 16 images of 64 and of 224 pixels."""
    return [
        SiteSetting(CL(2), k, m, n, size * pixels // 32, 16, stride)
        for pixels in (64, 224)
        for k, m, n, size, stride in _RESNET
    ]


def settings() -> list[SiteSetting]:
    """What is measured."""
    found = [SiteSetting(CL(rate), k, m, n, size, batch) for rate, k, m, n, size, batch in _CL]
    found += [SiteSetting(CK(4), k, m, n, size, batch) for k, m, n, size, batch in _CK]
    found += [SiteSetting(FC(rate, depth), 0, m, n, 0, batch) for depth, rate, m, n, batch in _FC]
    return found + resnet_settings()


def measure(setting: SiteSetting, rounds: int) -> dict[str, Any]:
    """Medians of both forms, and what the model knows of them."""
    explicit = fxexpand.expand(nn.Sequential(setting.layer()), setting.strategy, init="standard")
    fast = fxexpand.collapse(explicit)
    x = torch.randn(setting.batch, *setting.shape(), requires_grad=True)
    times: dict[str, list[float]] = {"explicit": [], "collapsed": []}
    for counted in range(-2, rounds):
        for name, model in (("explicit", explicit), ("collapsed", fast)):
            spent = _seconds(model, x)
            if counted >= 0:
                times[name].append(spent)
    site = next(module for module in fast.modules() if isinstance(module, Collapsed))
    costs = Collapsed.step_costs(site._assembly, setting.shape()[1:], setting.batch)
    return {
        "site": str(setting),
        "seconds": {name: statistics.median(spent) for name, spent in times.items()},
        "work": {name: _work(cost) for name, cost in zip(times, costs, strict=True)},
        "predicted ratio": costs[0].total / costs[1].total,
    }


def fit(rows: list[dict[str, Any]]) -> list[float]:
    """Seconds of a multiply-accumulate, an element of an activation, one of a weight, and an operation."""
    pairs = [(row["work"][name], row["seconds"][name]) for row in rows for name in ("explicit", "collapsed")]
    work, seconds = np.array([w for w, _ in pairs], dtype=float), np.array([s for _, s in pairs])
    found, _ = nnls(work / seconds[:, None], np.ones(len(seconds)))
    return [float(value) for value in found]


def _work(cost: StepCost) -> list[int]:
    return [cost.macs, cost.activations, cost.weights, cost.operations]


def _seconds(model: nn.Module, x: Tensor) -> float:
    start = time.perf_counter()
    y = model(x)
    torch.autograd.grad(y, [x, *model.parameters()], torch.ones_like(y))
    return time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table and the fit; write them to a file where asked to."""
    parser = argparse.ArgumentParser(description="Time single sites, layer by layer and collapsed.")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count (default: 7)")
    parser.add_argument("--json", type=Path, help="write the figures and the machine to this file")
    given = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    print(f"{'site':<58} {'explicit':>9} {'collapsed':>9} {'ratio':>6} {'model':>6}")
    for setting in settings():
        row = measure(setting, given.rounds)
        rows.append(row)
        explicit, collapsed = row["seconds"]["explicit"], row["seconds"]["collapsed"]
        ratio, predicted = explicit / collapsed, row["predicted ratio"]
        wrong = "" if (ratio > 1) == (predicted > 1) else "  differs"
        shown = f"{1000 * explicit:>7.2f}ms {1000 * collapsed:>7.2f}ms {ratio:>6.2f} {predicted:>6.2f}"
        print(f"{row['site']:<58} {shown}{wrong}", flush=True)
    mac, activation, weight, operation = fit(rows)
    print(
        f"fit: {1e12 * mac:.1f} ps a multiply-accumulate; {activation / mac:.0f} of them an element of an activation, "
        f"{weight / mac:.0f} one of a weight, {operation / mac:.2g} an operation"
    )
    if given.json:
        fitted = {"mac": mac, "activation": activation, "weight": weight, "operation": operation}
        given.json.write_text(json.dumps({"machine": machine(), "seconds": fitted, "rows": rows}, indent=1), "utf-8")


if __name__ == "__main__":
    main()
