"""Does it matter how an expanded network starts: afresh, from its nonlinear counterpart, or from the compact network?

SmallNet 7×7 on the digits of scikit-learn, its three convolutions expanded, as in the demo: 300 training images, 1,497
for testing, SGD 0.01 with momentum 0.9. Every variant gets the same number of epochs in all, and sees the same batches
in the same order, from the same compact network; differences are paired by seed, with 95 % intervals.

    compact      the compact network itself
    standard     expanded, each new layer with its class's own initialisation
    init         the nonlinear counterpart of that for the first half of the epochs, then the expanded network with its
                 weights, and a fresh momentum ("+Init" of Guo et al. 2020, who train both for all epochs)
    preserve     expanded such that it computes at first what the compact network does
    contracted   the compact network, started from the contracted untrained expanded one: the reverse experiment

Expected: in the paper "+Init" adds 0.5 points on CIFAR-10, with twice the epochs. With the same number in all, and tens
of errors in 1,497 images, it should lie within the spread of "standard". "contracted" should be no better than
"compact", for what expansion adds is said to be in the training. "preserve" starts from other factors, and should be
nearer to "standard" than to "compact".

Run as ``python -m benchmarks.initialisation [--seeds N] [--epochs N] [--starts standard init …] [--json FILE]``. With
``--epochs 40`` "init" has as many epochs for each of its two networks as the demo has for one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fxexpand
from fxexpand import CK, CL
from fxexpand.demo.compare import difference
from fxexpand.demo.data import Split, digits, split
from fxexpand.demo.machine import machine
from fxexpand.demo.settings import Settings
from fxexpand.demo.smallnet import SmallNet
from fxexpand.demo.training import error_rate
from fxexpand.strategies import Strategy

STRATEGIES = (CL(4), CK(4))
STARTS = ("standard", "init", "preserve", "contracted")


class Training:
    """Some epochs of SGD after others: the order of the images goes on from one call to the next."""

    def __init__(self, part: Split, settings: Settings, seed: int) -> None:
        self.part, self.settings = part, settings
        self.order = torch.Generator().manual_seed(seed)

    def __call__(self, model: nn.Module, epochs: int) -> nn.Module:
        """``model``, trained in place with a momentum of its own, in eval mode."""
        optimizer = torch.optim.SGD(
            model.train().parameters(), lr=self.settings.learning_rate, momentum=self.settings.momentum
        )
        for _ in range(epochs):
            shuffled = torch.randperm(len(self.part.train_labels), generator=self.order)
            for batch in shuffled.split(self.settings.batch_size):
                optimizer.zero_grad()
                F.cross_entropy(model(self.part.train_images[batch]), self.part.train_labels[batch]).backward()
                optimizer.step()
        return model.eval()


def trained(start: str, strategy: Strategy | None, train: Training, seed: int) -> nn.Module:
    """The compact network that a variant ends with, in eval mode."""
    epochs = train.settings.epochs
    torch.manual_seed(seed)
    compact = SmallNet(kernel_size=7)
    if strategy is None:
        return train(compact, epochs)
    expanded = fxexpand.expand(compact, strategy, init="preserve" if start == "preserve" else "standard")
    if start == "contracted":
        return train(fxexpand.contract(expanded), epochs)
    if start == "init":
        nonlinear = train(fxexpand.counterpart(expanded), epochs // 2)
        expanded, epochs = fxexpand.transfer(nonlinear, expanded), epochs - epochs // 2
    return fxexpand.contract(train(fxexpand.collapse(expanded), epochs))


def variants(starts: Sequence[str]) -> dict[str, Callable[[Training, int], nn.Module]]:
    """What is compared, by name; ``starts`` beside the compact network and the standard start."""

    def of(start: str, strategy: Strategy | None) -> Callable[[Training, int], nn.Module]:
        return lambda train, seed: trained(start, strategy, train, seed)

    found = {"compact": of("", None)}
    for strategy in STRATEGIES:
        for start in [start for start in STARTS if start in ("standard", *starts)]:
            found[f"{type(strategy).__name__}({strategy.rate:g}) {start}"] = of(start, strategy)
    return found


def measure(settings: Settings, starts: Sequence[str]) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Test errors, as shares, one a seed, and the seconds of all seeds, by variant."""
    images, labels = digits()
    compared = variants(starts)
    errors: dict[str, list[float]] = {name: [] for name in compared}
    seconds = dict.fromkeys(errors, 0.0)
    for seed in range(settings.seeds):
        part = split(images, labels, settings.train_size, seed)
        for name, run in compared.items():
            begun = time.perf_counter()
            errors[name].append(error_rate(run(Training(part, settings, seed), seed), part))
            seconds[name] += time.perf_counter() - begun
            print(f"seed {seed}  {name:<18} {errors[name][-1]:.2%}", flush=True)
    return errors, seconds


def rows(errors: dict[str, list[float]], seconds: dict[str, float]) -> list[dict[str, Any]]:
    """One row for each variant: beside the compact network, and beside the standard start of the same strategy."""
    found = []
    for name, own in errors.items():
        strategy, _, start = name.partition(" ")
        standard = errors[f"{strategy} standard"] if start and start != "standard" else None
        found.append(
            {
                "variant": name,
                "errors": own,
                "mean": statistics.fmean(own),
                "deviation": statistics.stdev(own) if len(own) > 1 else 0.0,
                "beside compact": asdict(difference(own, errors["compact"])) if start else None,
                "beside standard": None if standard is None else asdict(difference(own, standard)),
                "seconds": seconds[name],
            }
        )
    return found


def shown(row: dict[str, Any]) -> str:
    """A line of the table, in percent and points."""
    cells = [f"{row['variant']:<18} {100 * row['mean']:5.2f} ± {100 * row['deviation']:4.2f} %"]
    for other in ("beside compact", "beside standard"):
        given = row[other]
        if given is None:
            cells.append(" " * 40)
            continue
        low, high = (None if end is None else 100 * end for end in (given["low"], given["high"]))
        interval = "" if low is None else f" ({low:+.2f} to {high:+.2f})"
        cells.append(f"{100 * given['mean']:+.2f}{interval}, better in {given['better']} of {given['seeds']}".ljust(40))
    return "  ".join(cells).rstrip()


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table; write it to a file where asked to."""
    parser = argparse.ArgumentParser(description="Compare the ways to start an expanded network.")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20, help="epochs of each variant in all (default: 20)")
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=STARTS, help="which to compare (default: all)")
    parser.add_argument("--json", type=Path, help="write the figures and the machine to this file")
    given = parser.parse_args(arguments)
    settings = Settings(seeds=given.seeds, epochs=given.epochs)
    table = rows(*measure(settings, given.starts))
    print(f"\n{'variant':<18} {'test error':<16} {'beside compact, points':<40}  beside standard, points")
    for row in table:
        print(shown(row))
    if given.json:
        figures = {"machine": machine(), "settings": asdict(settings), "rows": table}
        given.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
