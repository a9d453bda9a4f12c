"""Expand, train on real data, contract, save, load back: the whole way, with figures."""

import io
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fxexpand.demo.compare import Result, result
from fxexpand.demo.data import CLASSES, digits, split
from fxexpand.demo.experiment import Run, cost, experiment
from fxexpand.demo.figure import curves_png
from fxexpand.demo.files import write_files
from fxexpand.demo.machine import machine
from fxexpand.demo.record import results_json
from fxexpand.demo.report import tables
from fxexpand.demo.settings import Settings
from fxexpand.demo.smallnet import SmallNet
from fxexpand.demo.training import logits
from fxexpand.demo.variants import Variant, variants
from fxexpand.errors import VerificationError


def run_demo(settings: Settings, out: Path | None, console: Console) -> None:
    """Run the comparison and print it; the weights of the first seed, the figure and the results go into `out`.

    Without `out` they go into a temporary directory, so that saving and loading is checked all the same. Nothing is
    written before everything is measured. Raises `VerificationError` if the loaded weights predict anything else than
    the network that was saved, `OSError` if `out` cannot be written.
    """
    start = time.perf_counter()
    columns = variants(settings.rate, settings.kernel_size)
    size, names = settings.kernel_size, ", ".join(variant.label for variant in columns)
    console.print(f"SmallNet {size}×{size} on handwritten digits: {names}", style="bold")
    console.print(_machine_line(), highlight=False)
    results = _results(settings, columns, console)
    for table in tables(results, settings):
        console.print(table)
    with nullcontext(out) if out else tempfile.TemporaryDirectory(prefix="fxexpand-") as directory:
        write_files(Path(directory), _artefacts(results, settings))
        for each in results:
            check_saved(Path(directory) / weights_name(each.variant), each.runs[0], settings)
    where = f"{out}: the contracted weights (*.pt), curves.png, results.json" if out else "nothing (--out DIR keeps it)"
    console.print(f"Saved {where}", highlight=False, soft_wrap=True)
    console.print(
        f"All {len(results)} contracted networks were saved, loaded strictly into a fresh SmallNet, and predict the "
        f"same. {time.perf_counter() - start:.0f} s in all.",
        highlight=False,
    )


def weights_name(variant: Variant) -> str:
    """The file name of the contracted weights of `variant`."""
    return f"{variant.name}.pt"


def check_saved(path: Path, run: Run, settings: Settings) -> None:
    """Load `path` strictly into a fresh SmallNet; raises `VerificationError` if a prediction is not that of `run`."""
    network = SmallNet(CLASSES, settings.kernel_size)
    network.load_state_dict(torch.load(path, weights_only=True), strict=True)
    test_images = split(*digits(), settings.train_size, run.seed).test_images
    changed = int((logits(network.eval(), test_images).argmax(1) != run.predictions).sum())
    if changed:
        raise VerificationError(
            f"{path}: expected the saved weights to predict what the contracted network did, found {changed} of "
            f"{len(test_images)} test images predicted differently. Do not use the file; run the demo again."
        )


def _results(settings: Settings, columns: Sequence[Variant], console: Console) -> list[Result]:
    """Run the experiment behind a progress bar; one line per finished seed."""
    runs: list[list[Run]] = [[] for _ in columns]
    steps = settings.seeds * len(columns) * settings.epochs * settings.steps_per_epoch
    times = (TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), BarColumn(), *times, console=console, transient=True) as progress:
        task = progress.add_task("", total=steps)

        def on_step(variant: Variant, seed: int) -> None:
            progress.update(task, advance=1, description=f"seed {seed + 1} of {settings.seeds}, {variant.label}")

        for count, run in enumerate(experiment(settings, columns, on_step), start=1):
            runs[(count - 1) % len(columns)].append(run)
            if count % len(columns) == 0:
                errors = ", ".join(f"{own[-1].variant.label} {100 * own[-1].test_error:.1f} %" for own in runs)
                console.print(f"seed {run.seed + 1}, test error: {errors}", highlight=False)
    return [
        result(variant, own, runs[0], cost(variant, settings.kernel_size))
        for variant, own in zip(columns, runs, strict=True)
    ]


def _artefacts(results: Sequence[Result], settings: Settings) -> dict[str, bytes]:
    """Everything to save, by file name: weights of the first seed, the figure, the results."""
    files = {}
    for each in results:
        buffer = io.BytesIO()
        torch.save(each.runs[0].weights, buffer)
        files[weights_name(each.variant)] = buffer.getvalue()
    return {**files, "curves.png": curves_png(results, settings), "results.json": results_json(results, settings)}


def _machine_line() -> str:
    here = machine()
    return f"{here['processor']}, {here['threads']} of {here['cores']} cores, torch {here['torch']}"
