"""What does a training step cost: compact, expanded layer by layer, and collapsed?

Forward, backward and an SGD step of each network, in turn in one process; the table shows medians, with the quartiles
of the ratios to the compact network, round by round. Peak memory is that of a child process that takes a few steps of
one network alone (on CUDA, of the allocator). All networks get contiguous inputs. While steps are timed, the C library
keeps the memory that it has had: else it returns some to the system and takes it again, a thousand page faults a step
and 4 % of its time, of one network and not of the other, as addresses happen to lie.

Expected: the explicit chain costs several times the compact network. Collapsed it costs the compact step and the
composition, the multiply-accumulates of which are shown as the floor: what no order of products saves.

Run as ``python -m benchmarks.train_step [--rounds N] [--device cuda] [--compile] [--json FILE] [--plot FILE]``.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from torch import Tensor, nn

import fxexpand
from benchmarks.rewrite_time import machine, seconds
from fxexpand import CK, CL, FC, Rule, layer
from fxexpand.demo.smallnet import SmallNet
from fxexpand.graph.collapsed import Collapsed
from fxexpand.strategies import Strategy

CLASSES = 10
COLORS, MARKERS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7"), "sodv"
TICKS = (0.8, 1, 1.25, 2, 4, 8)


@dataclass(frozen=True)
class Setting:
    """A compact network, the inputs of a step, and the rules that expand it. ``chosen``: collapse for these inputs."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    rules: tuple[Rule | Strategy, ...]
    chosen: bool = False


def smallnet(*rules: Rule | Strategy) -> Setting:
    """SmallNet 7×7 on 128 images; its first layer keeps 3 channels, as in the authors' code."""
    return Setting(
        f"SmallNet {'+'.join(map(_short, rules))}", partial(SmallNet, kernel_size=7), (128, 3, 32, 32), rules
    )


def settings() -> list[Setting]:
    """What is measured, in the order of the table."""
    found = [smallnet(strategy(rate, keep_input=True)) for rate in (2, 4, 8) for strategy in (CL, CK)]
    hidden = Rule(FC(4, depth=3), where=layer(name="classifier.hidden"))
    found += [smallnet(CL(4, keep_input=True), hidden), smallnet(CK(4, keep_input=True), hidden)]
    mobilenet = partial(torchvision.models.mobilenet_v2, num_classes=CLASSES)
    found.append(Setting("MobileNetV2 CL(4) on 3×3", mobilenet, (32, 3, 96, 96), (Rule(CL(4), layer(kernel_size=3)),)))
    resnet = partial(torchvision.models.resnet18, num_classes=CLASSES)
    for size in (64, 224):
        found.append(Setting(f"ResNet-18 CL(2) at {size}", resnet, (16, 3, size, size), (CL(2),), chosen=True))
    return found


def forms(setting: Setting, device: str, *, compiled: bool) -> dict[str, nn.Module]:
    """The networks to time, by name."""
    torch.manual_seed(0)
    compact = setting.build()
    explicit = fxexpand.expand(compact, setting.rules, init="standard")
    example = (torch.randn(setting.shape),) if setting.chosen else ()
    found = {"compact": compact, "explicit": explicit, "collapsed": fxexpand.collapse(explicit, *example)}
    if setting.chosen:
        found["all collapsed"] = fxexpand.collapse(explicit)
    found = {name: fxexpand.trace(model).to(device) for name, model in found.items()}
    if compiled:
        found |= {f"{name}, compiled": torch.compile(found[name]) for name in ("compact", "collapsed")}  # type: ignore[misc]
    return found


class Step:
    """One training step of a network on one batch, at each call."""

    def __init__(self, model: nn.Module, shape: tuple[int, ...], device: str) -> None:
        self.model = model.train()
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        self.images: Tensor = torch.randn(shape, device=device)
        self.labels: Tensor = torch.arange(shape[0], device=device) % CLASSES

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.images), self.labels).backward()
        self.optimizer.step()


def measure(setting: Setting, rounds: int, device: str, *, compiled: bool) -> list[dict[str, Any]]:
    """One row for each form of a network."""
    _keep_memory()
    models = forms(setting, device, compiled=compiled)
    steps = {name: Step(model, setting.shape, device) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for counted in range(-3, rounds):
        for name, step in steps.items():
            for _ in range(2):  # not counted: what ran before has left other data in the caches, and other holes
                step()
            spent = seconds(step, device)
            if counted >= 0:
                times[name].append(spent)
    memory = {name: peak_memory(setting, name, device) for name in models if "compiled" not in name}
    return [_row(setting, name, models[name], times, memory) for name in models]


def _keep_memory() -> None:
    """Have glibc give no memory back to the system, by its two thresholds; other C libraries are left as they are."""
    configure = getattr(ctypes.CDLL(None), "mallopt", None)
    if configure is not None:
        for threshold in (-1, -3):  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
            configure(threshold, 1 << 30)


def peak_memory(setting: Setting, name: str, device: str) -> float:
    """MiB that three steps need beyond what the process has before: of a child process, or of CUDA's allocator."""
    if device != "cpu":
        torch.cuda.empty_cache()
        model = forms(setting, device, compiled=False)[name]
        torch.cuda.reset_peak_memory_stats()
        _three_steps(model, setting, device)
        return torch.cuda.max_memory_allocated() / 2**20
    receiver, sender = multiprocessing.get_context("spawn").Pipe(duplex=False)
    child = multiprocessing.get_context("spawn").Process(target=_child, args=(sender, setting.name, name))
    child.start()
    found = float(receiver.recv())
    child.join()
    return found


def _child(sender: Any, setting_name: str, name: str) -> None:
    setting = next(found for found in settings() if found.name == setting_name)
    model = forms(setting, "cpu", compiled=False)[name]
    _forget_building()
    before = _memory("VmRSS")
    _three_steps(model, setting, "cpu")
    sender.send((_memory("VmHWM") - before) / 1024)


def _three_steps(model: nn.Module, setting: Setting, device: str) -> None:
    step = Step(model, setting.shape, device)
    for _ in range(3):
        step()


def _forget_building() -> None:
    """Give back what building the networks needed, and begin to look for the highest mark anew; of Linux alone."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _memory(what: str) -> int:
    """KiB of memory that the process holds (VmRSS), or has held at most (VmHWM); of Linux alone."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what))


def _row(
    setting: Setting, name: str, model: nn.Module, times: dict[str, list[float]], memory: dict[str, float]
) -> dict[str, Any]:
    against = "compact, compiled" if "compiled" in name else "compact"
    ratios = [spent / base for spent, base in zip(times[name], times[against], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    median = statistics.median(times[name])
    return {
        "network": setting.name,
        "form": name,
        "milliseconds": 1000 * median,
        "images per second": setting.shape[0] / median,
        "ratio": statistics.median(ratios),
        "quartiles": [quartiles[0], quartiles[2]],
        "peak MiB": memory.get(name),
        "floor": _floor(setting, model) if name == "collapsed" else None,
    }


def _floor(setting: Setting, model: nn.Module) -> float:
    """1 + the composition's own multiply-accumulates over those of a compact step."""
    whole = fxexpand.summary(setting.build(), torch.randn(1, *setting.shape[1:])).macs
    assert whole is not None
    composing = 0
    for module in model.modules():
        if isinstance(module, Collapsed):
            size = module.origin.geometry.kernel_size  # the least signal there is: what remains is the composition
            composing += Collapsed.step_costs(module._assembly, size, 0)[1].macs
    return 1 + composing / (3 * whole * setting.shape[0])


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the step time of each form beside the compact network's, with the quartiles of the rounds."""
    networks = list(dict.fromkeys(row["network"] for row in rows))
    names = [
        name for name in dict.fromkeys(row["form"] for row in rows) if name not in ("compact", "compact, compiled")
    ]
    figure = Figure(figsize=(9, 1.2 + 0.5 * len(networks)), dpi=150, layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(names):
        points = [row for row in rows if row["form"] == name]
        heights = [-networks.index(row["network"]) - 0.6 * number / len(names) for row in points]
        spread = [[abs(row["ratio"] - row["quartiles"][side]) for row in points] for side in (0, 1)]
        color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
        ratios = [row["ratio"] for row in points]
        axes.errorbar(ratios, heights, xerr=spread, label=name, color=color, fmt=marker, capsize=2)
    axes.set_yticks([-i - 0.25 for i in range(len(networks))], networks, fontsize="small")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axes.set_xlabel("time of a training step beside the compact network's (quartiles of the rounds)")
    axes.grid(axis="x", alpha=0.25)
    figure.legend(frameon=False, fontsize="small", loc="outside upper center", ncols=len(names))
    figure.savefig(path)


def _short(rule: Rule | Strategy) -> str:
    strategy: Any = rule.strategy if isinstance(rule, Rule) else rule
    return f"{type(strategy).__name__}({strategy.rate:g})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table; write it to a file where asked to."""
    parser = argparse.ArgumentParser(description="Time training steps: compact, explicit, collapsed.")
    parser.add_argument("--rounds", type=int, default=15, help="rounds that count (default: 15)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--compile", action="store_true", help="also compact and collapsed under torch.compile")
    parser.add_argument("--json", type=Path, help="write the figures and the machine to this file")
    parser.add_argument("--plot", type=Path, help="draw the ratios into this file (PNG, PDF or SVG)")
    parser.add_argument("--only", default="", help="networks whose name contains this")
    given = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    print(
        f"{'network':<26} {'form':<20} {'ms':>8} {'images/s':>9} {'ratio':>6} {'quartiles':>13} {'MiB':>6} {'floor':>6}"
    )
    for setting in settings():
        if given.only not in setting.name:
            continue
        for row in measure(setting, given.rounds, given.device, compiled=given.compile):
            rows.append(row)
            low, high = row["quartiles"]
            memory = "" if row["peak MiB"] is None else f"{row['peak MiB']:.0f}"
            floor = "" if row["floor"] is None else f"{row['floor']:.3f}"
            print(
                f"{row['network']:<26} {row['form']:<20} {row['milliseconds']:>8.1f} {row['images per second']:>9.0f} "
                f"{row['ratio']:>6.3f} {low:>6.3f}-{high:<6.3f} {memory:>6} {floor:>6}",
                flush=True,
            )
    if given.plot:
        plot(rows, given.plot)
    if given.json:
        given.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
