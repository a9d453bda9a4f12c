"""Does an expanded layer learn faster than the layer it stands for, and does it want another learning rate?

Steps: one small step of SGD, and of AdamW without decay, on an expanded network and on the compact network of the same
function (``contract`` of it), on the same batch, in float64. Per layer ‖ΔW‖ of the weight that the factors make up over
‖ΔW‖ of the compact layer's weight, and the cosine between the two. Errors: the test error of SmallNet 7×7 on the digits
after a short training, compact and with CL(4), over multiples of a base rate: 0.01 for SGD with momentum 0.9, 0.001 for
AdamW. Equal seeds have equal images in equal order.

Expected: for W = W_N···W_1 a small step of SGD moves W by −η Σ_j (W_N···W_{j+1})(W_N···W_{j+1})ᵀ·∇W·
(W_{j−1}···W_1)ᵀ(W_{j−1}···W_1): as many terms as factors, each scaled by the factors around (Arora, Cohen and Hazan
2018, theorem 1, for balanced factors). So the ratio depends on how the factors were started, layer by layer, and no one
number holds for all; above 1 where the preserving start leaves large factors. With AdamW each entry of each factor
moves by η, so that the sum over the inner channels moves W by far more than η an entry: a larger ratio. If a faster
step were all that expanding does, the compact network would do as well with a larger learning rate, and the best
multiple for CL(4) would be below the compact network's. What came out is in the README.

Run as ``python -m benchmarks.learning_rate [--seeds N] [--epochs N] [--json FILE]``.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxexpand import CK, CL, FC, Rule, collapse, contract, expand, layer
from fxexpand.demo.data import Split, digits, split
from fxexpand.demo.machine import machine
from fxexpand.demo.settings import Settings
from fxexpand.demo.smallnet import SmallNet
from fxexpand.demo.training import error_rate
from fxexpand.graph.expanded import Expanded
from fxexpand.strategies import Strategy

BATCH = 128
BASES = {"SGD": 0.01, "AdamW": 0.001}
MULTIPLES = (0.25, 0.5, 1.0, 2.0, 4.0)
RULES: dict[str, Rule | Strategy] = {
    "CL(4)": CL(4),
    "CK(4)": CK(4),
    "FC(2)": Rule(FC(2), where=layer(name="classifier.hidden")),
}
OPTIMISERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=1e-6),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0),
}


def step_rows(data: Sequence[Split]) -> Iterator[dict[str, Any]]:
    """A row for each rule, start, optimiser and layer: medians over the seeds, with the least and the largest ratio."""
    for rule in RULES:
        for start in ("preserve", "standard"):
            for optimiser in OPTIMISERS:
                found = [_moves(rule, start, optimiser, part, seed) for seed, part in enumerate(data)]
                for path in found[0]:
                    ratios, cosines = zip(*(moves[path] for moves in found), strict=True)
                    yield {
                        "rule": rule,
                        "start": start,
                        "optimiser": optimiser,
                        "layer": path,
                        "ratio": statistics.median(ratios),
                        "range": [min(ratios), max(ratios)],
                        "cosine": statistics.median(cosines),
                    }


def _moves(rule: str, start: str, optimiser: str, part: Split, seed: int) -> dict[str, tuple[float, float]]:
    """(ratio, cosine) of the moves of each expanded layer's weight."""
    torch.manual_seed(seed)
    big = expand(SmallNet(kernel_size=7).double(), RULES[rule], init=start)
    compact = contract(big)
    paths = [path for path, module in big.named_modules() if isinstance(module, Expanded)]
    ours, theirs = (_step(model, paths, part, OPTIMISERS[optimiser]) for model in (big, compact))
    found: dict[str, tuple[float, float]] = {}
    for path in paths:
        a, b = ours[path].flatten(), theirs[path].flatten()
        found[path] = float(a.norm() / b.norm()), float(F.cosine_similarity(a, b, dim=0))
    return found


def _step(
    model: nn.Module, paths: Sequence[str], part: Split, make: Callable[[nn.Module], torch.optim.Optimizer]
) -> dict[str, Tensor]:
    """How far one step moves the weight of each of the layers."""
    before = _weights(model, paths)
    F.cross_entropy(model.train()(part.train_images[:BATCH].double()), part.train_labels[:BATCH]).backward()
    make(model).step()
    return {path: weight - before[path] for path, weight in _weights(model, paths).items()}


def _weights(model: nn.Module, paths: Sequence[str]) -> dict[str, Tensor]:
    return {path: cast(Tensor, model.get_submodule(path).weight).detach().clone() for path in paths}


def trained_as() -> dict[str, Callable[[nn.Module], nn.Module]]:
    """What is trained, of the compact network. CL runs collapsed: the same gradients, at less cost."""
    strategy = RULES["CL(4)"]
    return {
        "compact": lambda net: net,
        "CL(4), standard": lambda net: collapse(expand(net, strategy, init="standard")),
        "CL(4), preserve": lambda net: collapse(expand(net, strategy)),
    }


def error_rows(data: Sequence[Split], settings: Settings) -> Iterator[dict[str, Any]]:
    """A row for each optimiser, network and learning rate: the errors by seed, None where the training diverged."""
    for optimiser, base in BASES.items():
        for name, build in trained_as().items():
            for multiple in MULTIPLES:
                there = replace(settings, learning_rate=multiple * base)
                errors = [_error(build, optimiser, part, there, seed) for seed, part in enumerate(data)]
                named = {"optimiser": optimiser, "network": name, "multiple": multiple}
                yield {**named, "learning rate": there.learning_rate, "errors": errors}


def _error(
    build: Callable[[nn.Module], nn.Module], optimiser: str, part: Split, settings: Settings, seed: int
) -> float | None:
    """The share of test images that the network gets wrong, in [0, 1]; None if its loss is no finite number."""
    torch.manual_seed(seed)
    model = build(SmallNet(kernel_size=settings.kernel_size)).train()
    made: torch.optim.Optimizer = (
        torch.optim.SGD(model.parameters(), settings.learning_rate, settings.momentum)
        if optimiser == "SGD"
        else torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=0)
    )
    order = torch.Generator().manual_seed(seed)
    for _ in range(settings.epochs):
        for batch in torch.randperm(len(part.train_labels), generator=order).split(settings.batch_size):
            made.zero_grad()
            loss = F.cross_entropy(model(part.train_images[batch]), part.train_labels[batch])
            if not loss.isfinite():
                return None
            loss.backward()
            made.step()
    return error_rate(model.eval(), part)


def _error_line(row: dict[str, Any]) -> str:
    found = [100 * error for error in row["errors"] if error is not None]
    spread = statistics.stdev(found) if len(found) > 1 else 0.0
    mean = f"{statistics.mean(found):5.2f} ± {spread:4.2f} %" if found else "diverged"
    lost = len(row["errors"]) - len(found)
    return f"{row['optimiser']:<6} {row['network']:<16} {row['multiple']:>5} × {mean}" + (
        f", {lost} diverged" if lost else ""
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print both tables, a line as soon as it is known; write them to a file where asked to."""
    parser = argparse.ArgumentParser(description="Learning rates of expanded networks.")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of both tables (default: 5)")
    parser.add_argument("--epochs", type=int, default=20, help="epochs of the trainings (default: 20)")
    parser.add_argument("--json", type=Path, help="write the figures and the machine to this file")
    given = parser.parse_args(arguments)
    settings = Settings(seeds=given.seeds, epochs=given.epochs)
    images, labels = digits()
    data = [split(images, labels, settings.train_size, seed) for seed in range(settings.seeds)]
    steps: list[dict[str, Any]] = []
    print(f"{'rule':<6} {'start':<9} {'optimiser':<10} {'layer':<18} {'ratio':>8} {'range':>17} {'cosine':>7}")
    for row in step_rows(data):
        steps.append(row)
        low, high = row["range"]
        print(
            f"{row['rule']:<6} {row['start']:<9} {row['optimiser']:<10} {row['layer']:<18} {row['ratio']:>8.2f} "
            f"{low:>8.2f}-{high:<8.2f} {row['cosine']:>7.2f}",
            flush=True,
        )
    errors: list[dict[str, Any]] = []
    for row in error_rows(data, settings):
        errors.append(row)
        print(_error_line(row), flush=True)
    if given.json:
        used = ("seeds", "epochs", "train_size", "kernel_size", "batch_size", "momentum")
        setting = {name: getattr(settings, name) for name in used} | {"base rates": BASES}
        found = {"machine": machine(), "settings": setting, "steps": steps, "errors": errors}
        given.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
