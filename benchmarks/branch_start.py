"""Should new branches start as they are drawn, with the first branch making up for them, or at zero?

Both keep the function. SmallNet (7×7, the demo's schedule) on the digits, its convolutions expanded into branches from
the same fresh compact network; with batch norm in the branches, zero is the weight of each branch's last norm. The
table shows the training loss and the test error at the end, mean ± standard deviation over the seeds, and the compact
network's. Expected: as drawn is no worse, for a branch of several layers that starts at zero trains one layer at first.

Run as ``python -m benchmarks.branch_start [--seeds N] [--epochs N] [--json FILE]``; ten minutes on one core. A row is
written as soon as it is known, and what the file has is not trained again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.rewrite_time import machine
from fxexpand import expand
from fxexpand.demo.data import CLASSES, digits, split
from fxexpand.demo.settings import Settings
from fxexpand.demo.smallnet import SmallNet
from fxexpand.demo.training import train
from fxexpand.graph.site import Site
from fxexpand.strategies import ACNet, DiverseBranch, Orepa, RepVGG, Strategy

STRATEGIES: tuple[Strategy, ...] = (
    Orepa(),
    ACNet(),
    ACNet(batch_norm=True),
    RepVGG(),
    RepVGG(batch_norm=True),
    DiverseBranch(),
    DiverseBranch(batch_norm=True),
)


def zeroed(site: Site, layers: Mapping[str, nn.Module]) -> None:
    """The first branch computes what the layer did, the others nothing."""
    main, *others = layers.values()
    with torch.no_grad():
        for branch in others:
            holding = [
                module for module in branch.modules() if next(module.parameters(recurse=False), None) is not None
            ]
            for parameter in (p for module in holding[-1:] for p in module.parameters()):
                parameter.zero_()
        convolution, *after = (module for module in main.modules() if not list(module.children()))
        weight, bias, first = cast(Tensor, site.weight), cast(Tensor, site.bias), cast(Any, convolution)
        last: Any = after[-1] if after else first
        if isinstance(last, nn.BatchNorm2d):
            last.weight.fill_((1 + last.eps) ** 0.5)
        scale = last.weight if after and isinstance(last, nn.Conv2d) else torch.ones(1, 1, 1, 1)
        first.weight.copy_(weight / scale)
        (first if first.bias is not None else last).bias.copy_(bias / scale.flatten())


def trained(strategy: Strategy | None, start: str, seed: int, settings: Settings, data: tuple[Tensor, Tensor]) -> Any:
    """(training loss, test error) at the end."""
    part = split(*data, settings.train_size, seed)
    torch.manual_seed(seed)
    model: nn.Module = SmallNet(CLASSES, settings.kernel_size)
    if strategy is not None:
        model = expand(model, strategy, init=zeroed if start == "zero" else "preserve")
    curves = train(model, part, settings, seed, lambda m: m, lambda: None)
    return curves.losses[-1], curves.test_errors[-1]


def main() -> None:
    """Train them all, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write the rows to FILE, with the machine named")
    options = parser.parse_args()
    settings, data = Settings(epochs=options.epochs), digits()
    facts: dict[str, Any] = {"machine": machine(), "seeds": options.seeds, "epochs": options.epochs, "rows": []}
    if options.json is not None and options.json.exists():
        before = json.loads(options.json.read_text(encoding="utf-8"))
        facts["rows"] = before["rows"] if all(before[key] == facts[key] for key in ("seeds", "epochs")) else []
    cases: list[tuple[Strategy | None, str]] = [(None, "")]
    cases += [(strategy, start) for strategy in STRATEGIES for start in ("drawn", "zero")]
    print(f"{'':42}{'start':8}{'training loss':>20}{'test error, %':>20}")
    for strategy, start in cases:
        name = str(strategy or "compact")
        row = next((row for row in facts["rows"] if (row["strategy"], row["start"]) == (name, start)), None)
        if row is None:
            runs = [trained(strategy, start, seed, settings, data) for seed in range(options.seeds)]
            losses, errors = zip(*runs, strict=True)
            row = {"strategy": name, "start": start, "losses": losses, "errors": errors}
            facts["rows"].append(row)
            if options.json is not None:
                options.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        print(f"{name:42}{start:8}{_cell(row['losses'], 4)}{_cell([100 * e for e in row['errors']], 2)}", flush=True)


def _cell(values: list[float], digits_shown: int) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits_shown}f} ± {deviation:.{digits_shown}f}".rjust(20)


if __name__ == "__main__":
    main()
