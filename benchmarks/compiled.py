"""What does the backend save: torch.compile with plain Inductor, and with the regions composed in the graph?

Forward in eval mode without gradients, and a training step (forward, backward, SGD with momentum), of networks with
linear regions, compiled by plain Inductor and by ``backend="fxexpand"``, in turn in one process; medians, with the
quartiles of the ratios round by round. The table also counts the convolutions and matrix products that the generated
code of the forward calls; ours has products of weights among them, which do not grow with the batch.

Expected: as the regions are where these networks spend their time, between 3 and 7 times faster for the expanded
SmallNet, forward and training; less for RepVGG, whose 1×1 branch and identity are small beside the 3×3 one.

Run as ``python -m benchmarks.compiled [--rounds N] [--device cuda] [--json FILE]``.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from benchmarks.rewrite_time import machine, seconds
from fxexpand import CL, expand
from fxexpand.demo.smallnet import SmallNet

BACKENDS = ("inductor", "fxexpand")
_CONVOLUTION = re.compile(r"= (?:extern_kernels\.convolution|torch\.ops\.mkldnn\._convolution\w*\.default)\(")
_PRODUCT = re.compile(r"extern_kernels\.(?:mm|addmm|bmm|baddbmm)\(|mkldnn\._linear_pointwise|mkl\._mkl_linear")


class Block(nn.Module):
    """RepVGG's block without batch norm: 3×3, 1×1 and identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.square = nn.Conv2d(channels, channels, 3, padding=1)
        self.point = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same."""
        return F.relu(self.square(x) + self.point(x) + x)


@dataclass(frozen=True)
class Setting:
    """A network, and the shape of its inputs."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]


def settings() -> list[Setting]:
    """What is measured."""
    widths = [nn.Conv2d(3, 32, 3, padding=1), *(Block(32) for _ in range(6)), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return [
        Setting("SmallNet 7×7 CL(4), explicit", partial(_explicit, CL(4, keep_input=True)), (128, 3, 32, 32)),
        Setting("6 blocks of RepVGG", lambda: nn.Sequential(*widths, nn.Linear(32, 10)), (32, 3, 32, 32)),
    ]


def _explicit(strategy: CL) -> nn.Module:
    return expand(SmallNet(kernel_size=7), strategy, init="standard")


class Forward:
    """One compiled forward in eval mode, at each call."""

    def __init__(self, setting: Setting, backend: str, device: str) -> None:
        self.images = torch.randn(setting.shape, device=device)
        self.model = _compiled(setting, backend, device).eval()

    def __call__(self) -> Tensor:
        with torch.no_grad():
            found: Tensor = self.model(self.images)
            return found


class Training:
    """One compiled training step, at each call."""

    def __init__(self, setting: Setting, backend: str, device: str) -> None:
        self.images = torch.randn(setting.shape, device=device)
        self.labels = torch.arange(setting.shape[0], device=device) % 10
        self.model = _compiled(setting, backend, device).train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)

    def __call__(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(self.images), self.labels)
        loss.backward()
        self.optimizer.step()
        return loss


def _compiled(setting: Setting, backend: str, device: str) -> nn.Module:
    torch.manual_seed(0)
    model: Any = torch.compile(setting.build().to(device), backend=backend, fullgraph=True)
    return model  # type: ignore[no-any-return]


def measure(setting: Setting, task: Callable[..., Any], rounds: int, device: str) -> list[dict[str, Any]]:
    """A row for each backend."""
    torch._dynamo.reset()
    torch.manual_seed(1)
    steps = {backend: task(setting, backend, device) for backend in BACKENDS}
    code = {backend: run_and_get_code(step)[1][0] for backend, step in steps.items()}
    times: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
    for counted in range(-3, rounds):
        for backend, step in steps.items():
            step()  # not counted: what ran before has left other data in the caches
            spent = seconds(step, device)
            if counted >= 0:
                times[backend].append(spent)
    return [_row(setting, task, backend, times, code[backend]) for backend in BACKENDS]


def _row(setting: Setting, task: Any, backend: str, times: dict[str, list[float]], code: str) -> dict[str, Any]:
    ratios = [plain / ours for plain, ours in zip(times["inductor"], times[backend], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "network": setting.name,
        "task": task.__name__.lower(),
        "backend": backend,
        "milliseconds": 1000 * statistics.median(times[backend]),
        "times faster": statistics.median(ratios),
        "quartiles": [quartiles[0], quartiles[2]],
        "convolutions": len(_CONVOLUTION.findall(code)),
        "products": len(_PRODUCT.findall(code)),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table; write it to a file where asked to."""
    parser = argparse.ArgumentParser(description="Time compiled networks: plain Inductor, and regions composed.")
    parser.add_argument("--rounds", type=int, default=15, help="rounds that count (default: 15)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path, help="write the figures and the machine to this file")
    given = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    print(f"{'network':<30} {'task':<9} {'backend':<9} {'ms':>7} {'faster':>7} {'quartiles':>13} {'conv':>5} {'mm':>4}")
    for setting in settings():
        for task in (Forward, Training):
            for row in measure(setting, task, given.rounds, given.device):
                rows.append(row)
                low, high = row["quartiles"]
                print(
                    f"{row['network']:<30} {row['task']:<9} {row['backend']:<9} {row['milliseconds']:>7.1f} "
                    f"{row['times faster']:>7.2f} {low:>6.2f}-{high:<6.2f} "
                    f"{row['convolutions']:>5} {row['products']:>4}",
                    flush=True,
                )
    if given.json:
        given.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
