"""Does every pass leave every model of torchvision the function that it had?

Runs ``fxexpand.testing.check_model`` over all classification, segmentation, detection and video models: expand
preserves, gradients flow, collapse agrees, contract restores, fuse agrees, torch.compile agrees (where ``--backend``
names a compiler), the model is untouched. Weights are random, batch norm is as training might have left it, inputs are
the smallest that a model takes; detection models are asked for what their layers compute, without the choice of boxes,
which rounding may turn. CL(2) expands the convolutions, FC(2) the linear layers of at most 1,280 features.

Each model runs in a process of its own, in float64; in float32 where that would take more than ``--memory`` GiB, and
not at all, with the reason in its row, where that would too. A row is written as soon as it is known, and is not run
again where the file has it, so an interrupted run goes on where it was. Exits with 1 if any model differs.

Run as ``python -m benchmarks.zoo [--models NAME ...] [--jobs N] [--json FILE] [--backend NAME] [--memory GiB]``.
Expected: no model differs; errors are those of rounding. All of them take hours on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import TASKS, build, cast, task_of
from benchmarks.rewrite_time import machine
from fxexpand import CL, FC, FxExpandError, Rule
from fxexpand.graph.site import Site
from fxexpand.testing import check_model

MODELS = [name for names in TASKS.values() for name in names]
# How often the battery holds the parameters of a model at once, its own, fused and restored ones and gradients.
_COPIES = 8
_WIDEST = 1280
_DTYPES = (torch.float64, torch.float32)
Row = dict[str, Any]


def narrow(site: Site) -> bool:
    """Linear layers that FC(2) makes no more than four times as large, of a size that memory has room for."""
    return site.dims == 0 and site.in_channels <= _WIDEST


def check(name: str, backend: str | None, memory: float) -> Row:
    """The row of one model. A property that fails is a row, too: ``differs`` says which, where and by how much."""
    torch.manual_seed(0)
    start = time.perf_counter()
    model, inputs = build(name, dtype=torch.float32)
    count = sum(parameter.numel() for parameter in model.parameters())
    row: Row = {"model": name, "task": task_of(name), "parameters": count}
    dtype = next((dtype for dtype in _DTYPES if count * dtype.itemsize * _COPIES <= memory * 2**30), None)
    if dtype is None:
        needed = count * _DTYPES[-1].itemsize * _COPIES / 2**30
        return row | {"skipped": {"all": f"would take about {needed:.0f} GiB, more than --memory {memory:g}"}}
    row["dtype"] = str(dtype).removeprefix("torch.")
    model, inputs = model.to(dtype), cast(inputs, dtype)  # in place: the battery would check a copy
    rules: list[Any] = [CL(2)]
    if any(isinstance(m, torch.nn.Linear) and m.in_features <= _WIDEST for m in model.modules()):
        rules.append(Rule(FC(2), where=narrow))
    try:
        report = check_model(model, *inputs, rules=rules, backend=backend)
    except FxExpandError as different:
        return row | {"differs": str(different), "seconds": time.perf_counter() - start}
    measured = [outcome.agreement for outcome in report.outcomes if outcome.agreement]
    return row | {
        "held": list(report.held),
        "skipped": report.skipped,
        "error": max((each.error for each in measured), default=0.0),
        "bound": max((each.bound for each in measured), default=0.0),
        "seconds": time.perf_counter() - start,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def in_a_process(name: str, options: argparse.Namespace) -> Row:
    """The row of one model, from a process that ends with it. One that dies says so in its row."""
    command = [sys.executable, "-m", "benchmarks.zoo", "--one", name, "--memory", str(options.memory)]
    command += ["--backend", options.backend] if options.backend else []
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // options.jobs))
    # Large tensors give their memory back, however many there were before.
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        row: Row = json.loads(lines[-1])
        return row
    last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    return {"model": name, "task": task_of(name), "differs": f"the process ended with {done.returncode}: {last}"}


def line(row: Row) -> str:
    """One row of the table."""
    start = f"{row['model']:<38} {row['task']:<15} {row.get('dtype', '-'):<8}"
    if "differs" in row:
        return f"{start} DIFFERS  {row['differs']}"
    if "held" not in row:
        return f"{start} skipped  {row['skipped']['all']}"
    skipped = "; ".join(f"{name}: {reason}" for name, reason in row["skipped"].items() if reason != "backend=None")
    figures = f"{row['error']:>8.1e} {row['bound']:>8.1e} {row['seconds']:>7.1f}"
    return f"{start} {len(row['held'])} hold   {figures}  {skipped}".rstrip()


def load(path: Path) -> dict[str, Row]:
    """The rows that are known, by model; those that differ are asked again."""
    if not path.exists():
        return {}
    rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return {row["model"]: row for row in rows if "differs" not in row}


def save(path: Path, rows: dict[str, Row]) -> None:
    """Write the file as a whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ordered = [rows[name] for name in MODELS if name in rows]
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps({"machine": machine(), "rows": ordered}, indent=1), encoding="utf-8")
    part.replace(path)


@contextmanager
def progress(total: int, done: int) -> Iterator[Callable[[Row], None]]:
    """What prints a row as soon as it is known, over a bar where the package rich is there."""
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        yield lambda row: print(line(row), flush=True)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("the zoo", total=total, completed=done)

        def show(row: Row) -> None:
            bar.console.print(line(row), highlight=False, markup=False, soft_wrap=True)
            bar.advance(task)

        yield show


def run(options: argparse.Namespace) -> dict[str, Row]:
    """The rows of all models asked for."""
    rows = load(options.json)
    waiting = [name for name in options.models if name not in rows]
    known = len(options.models) - len(waiting)
    with progress(len(options.models), known) as show, ThreadPoolExecutor(options.jobs) as pool:
        for name in options.models:
            if name in rows:
                print(line(rows[name]))
        futures = [pool.submit(in_a_process, name, options) for name in waiting]
        try:
            for future in as_completed(futures):
                row = future.result()
                rows[row["model"]] = row
                save(options.json, rows)
                show(row)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {name: rows[name] for name in options.models}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, and keep it in a file; 1 if any model differs."""
    parser = argparse.ArgumentParser(description="Hold every pass against every model of torchvision.")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS, metavar="NAME", help="(default: all)")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time (default: 1)")
    parser.add_argument("--json", type=Path, default=Path("build/zoo.json"), help="where the rows are kept")
    parser.add_argument("--backend", help="of torch.compile, such as inductor (default: nothing is compiled)")
    parser.add_argument("--memory", type=float, default=12.0, help="GiB that one model may take (default: 12)")
    parser.add_argument("--one", choices=MODELS, metavar="NAME", help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(check(options.one, options.backend, options.memory)))
        return 0
    rows = run(options)
    different = [name for name, row in rows.items() if "differs" in row]
    whole = sum("held" in row for row in rows.values())
    print(f"{whole} of {len(rows)} models checked, {len(different)} differ", *different)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
