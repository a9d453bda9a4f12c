"""How long do the passes take, beside what any FX pass must do: copy the model and trace it?

Each pass is timed in turn with ``copy.deepcopy`` followed by ``torch.fx.symbolic_trace`` of the same model, in one
process; the table shows medians and the median of the ratios, round by round. Expected: ``trace`` costs two structural
copies and one symbolic trace, so 1 to 3 times the baseline, more for models with parts that no graph can stand for.
``expand`` computes every factor in float64, and ``contract`` composes them: what these two add is the arithmetic of the
widest layers. ``fuse`` is timed beside ``torch.fx.experimental.optimization.fuse``, which folds batch norm alone, and
should take no longer.

A second table shows ``fuse`` on chains of convolution, batch norm and ReLU: the time a layer should stay the same.

Run as ``python -m benchmarks.rewrite_time [--rounds N] [--layers N ...] [--json FILE]``.
"""

from __future__ import annotations

import argparse
import copy
import json
import operator
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import fx, nn
from torch.fx.experimental import optimization

import fxexpand
from fxexpand import CL, FC

MODELS = ("resnet18", "mobilenet_v2", "shufflenet_v2_x0_5", "resnet50")
LAYERS = (100, 1_000, 10_000)


def baseline(model: nn.Module) -> fx.GraphModule:
    """What every pass has to pay: a copy, and its graph."""
    return fx.symbolic_trace(copy.deepcopy(model))


def groups(model: nn.Module) -> list[dict[str, Callable[[], object]]]:
    """The passes to time on ``model``, by name; those of a group in turn, after what every pass has to pay.

    The slow ones are apart: what they leave behind in the caches and in the allocator is nothing to time ``fuse`` in.
    """
    rules = [CL(2), FC(1)]
    big = fxexpand.expand(model, rules)
    model.eval()  # else there is nothing to fold
    fusing: dict[str, Callable[[], object]] = {
        "fuse of torch.fx": lambda: optimization.fuse(model),
        "fuse": lambda: fxexpand.fuse(model),
    }
    others: dict[str, Callable[[], object]] = {
        "trace": lambda: fxexpand.trace(model),
        "expand, standard": lambda: fxexpand.expand(model, rules, init="standard"),
        "expand, preserve": lambda: fxexpand.expand(model, rules),
        "contract": lambda: fxexpand.contract(big),
    }
    return [{"baseline": lambda: baseline(model), **group} for group in (fusing, others)]


def seconds(call: Callable[[], object], device: str = "cpu") -> float:
    """Wall time of one call, with all that it starts on ``device``."""
    wait: Callable[[], object] = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def measure(name: str, rounds: int) -> list[dict[str, Any]]:
    """One row for each pass on the torchvision model ``name``, after two rounds that are not counted."""
    model: nn.Module = getattr(torchvision.models, name)()
    times: dict[str, list[float]] = {}
    against: dict[str, list[float]] = {}
    for number, calls in enumerate(groups(model)):
        spent = in_turn(calls, rounds if number else 2 * rounds)  # they are quick, and compared with each other
        for label in [label for label in calls if label not in times]:
            times[label], against[label] = spent[label], spent["baseline"]
    theirs = times["fuse of torch.fx"]
    return [
        {
            "model": name,
            "pass": label,
            "milliseconds": 1000 * statistics.median(times[label]),
            "ratio": statistics.median(a / b for a, b in zip(times[label], against[label], strict=True)),
        }
        | (
            {"beside torch.fx": statistics.median(map(operator.truediv, times[label], theirs))}
            if label == "fuse"
            else {}
        )
        for label in times
    ]


def in_turn(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Wall times of ``rounds`` rounds of ``calls``, by name."""
    times: dict[str, list[float]] = {label: [] for label in calls}
    for counted in range(-2, rounds):
        for label, call in calls.items():
            spent = seconds(call)
            if counted >= 0:
                times[label].append(spent)
    return times


def chain(layers: int) -> nn.Module:
    """Convolution, batch norm and ReLU in turn: ``layers`` of them."""
    made = [nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*(copy.deepcopy(made[i % 3]) for i in range(layers))).eval()


def growth(layers: int, rounds: int) -> dict[str, Any]:
    """The row of a chain of ``layers``; the first round is not counted."""
    model = chain(layers)
    times = [seconds(lambda: fxexpand.fuse(model)) for _ in range(rounds + 1)]
    milliseconds = 1000 * statistics.median(times[1:])
    return {"layers": layers, "milliseconds": milliseconds, "a layer": milliseconds / layers}


def machine() -> dict[str, Any]:
    """What the figures hold for."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table; write it to a file where asked to."""
    parser = argparse.ArgumentParser(description="Time the passes beside copying and tracing.")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (default: 5)")
    parser.add_argument("--json", type=Path, help="write the figures and the machine to this file")
    parser.add_argument("--models", nargs="+", default=MODELS, help="torchvision classification models")
    parser.add_argument(
        "--layers", nargs="*", type=int, default=LAYERS, help="lengths of chains (default: 100 to 10,000)"
    )
    given = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    print(f"{'model':<20} {'pass':<18} {'ms':>10} {'ratio':>8}")
    for name in given.models:
        for row in measure(name, given.rounds):
            rows.append(row)
            beside = f"  {row['beside torch.fx']:.2f} beside torch.fx" if "beside torch.fx" in row else ""
            shown = f"{row['milliseconds']:>10.1f} {row['ratio']:>8.2f}{beside}"
            print(f"{row['model']:<20} {row['pass']:<18} {shown}", flush=True)
    chains: list[dict[str, Any]] = []
    print(f"\n{'layers':<20} {'pass':<18} {'ms':>10} {'ms/layer':>8}")
    for layers in given.layers:
        row = growth(layers, given.rounds)
        chains.append(row)
        print(f"{layers:<20,} {'fuse':<18} {row['milliseconds']:>10.1f} {row['a layer']:>8.3f}", flush=True)
    if given.json:
        figures = {"machine": machine(), "rows": rows, "chains": chains}
        given.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
