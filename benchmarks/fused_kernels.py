"""What does ``fuse`` save in the classification models of torchvision?

Each model gets random weights, and batch norm the statistics that training might have left. The table shows how often
one forward calls a convolution, a linear layer and a batch norm, before and after; the multiply-accumulates for one
image, before and after; the time of ``fuse``; and ‖after − before‖ / ‖before‖ of the output in float64. Attention does
its own products inside one call, which counts as none. Expected: no batch norm behind a layer is left, no model costs
more, and errors are those of rounding, below 1e-10.

Run as ``python -m benchmarks.fused_kernels [--models NAME ...] [--json FILE]``; all models take some minutes, and the
largest 12 GiB of memory.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fxexpand
from benchmarks.models import TASKS, build
from benchmarks.rewrite_time import machine

MODELS = TASKS["classification"]
KERNELS = {"conv2d": "convolutions", "linear": "linear", "batch_norm": "batch_norms"}


class Calls(TorchFunctionMode):
    """Counts the calls of the functions that layers are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[KERNELS.get(getattr(func, "__name__", ""), "")] += 1
        return func(*args, **(kwargs or {}))


def run(model: nn.Module, image: Any) -> tuple[Tensor, dict[str, int]]:
    """The output of ``model``, and the calls it takes."""
    with torch.no_grad(), Calls() as calls:
        out: Tensor = model(image)
    return out, {kind: calls.counts[kind] for kind in KERNELS.values()}


def measure(name: str) -> dict[str, Any]:
    """One row of the table."""
    torch.manual_seed(0)
    model, (image,) = build(name, batch=1)
    expected, before = run(model, image)
    macs_before = fxexpand.summary(model, image).macs
    start = time.perf_counter()
    fused = fxexpand.fuse(model, image)
    seconds = time.perf_counter() - start
    found, after = run(fused, image)
    return {
        "model": name,
        "before": {**before, "macs": macs_before},
        "after": {**after, "macs": fxexpand.summary(fused, image).macs},
        "seconds": seconds,
        "error": float((found - expected).norm() / expected.norm()),
    }


def lines(rows: Iterator[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], str]]:
    """Each row with its line of the table."""
    for row in rows:
        old, new = row["before"], row["after"]
        counts = " ".join(f"{old[kind]:>6} → {new[kind]:<5}" for kind in KERNELS.values())
        millions = f"{old['macs'] / 1e6:>10.1f} → {new['macs'] / 1e6:<10.1f}"
        yield row, f"{row['model']:<20} {counts} {millions} {row['seconds']:>7.2f} {row['error']:>9.1e}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, a line as soon as it is known; write it to a file where asked to."""
    parser = argparse.ArgumentParser(description="Count the layers of torchvision's models before and after fuse.")
    parser.add_argument("--models", nargs="+", default=MODELS, help="torchvision classification models (default: all)")
    parser.add_argument("--json", type=Path, help="write the figures and the machine to this file")
    given = parser.parse_args(arguments)
    titles = " ".join(f"{title:^14}" for title in ("convolutions", "linear layers", "batch norms"))
    print(f"{'model':<20} {titles} {'million MACs':^23} {'s':>7} {'error':>9}")
    rows: list[dict[str, Any]] = []
    for row, line in lines(map(measure, given.models)):
        rows.append(row)
        print(line, flush=True)
    if given.json:
        given.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
