"""The command line, as Typer reads it."""

import math
import os
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from fxexpand.demo.settings import Settings
from fxexpand.demo.smallnet import PADDING
from fxexpand.errors import FxExpandError
from fxexpand.version import library_version

DEFAULTS = Settings()
INTERRUPTED = 130
LARGEST_RATE = 32.0
# Every class needs an image on either side of the stratified split.
TRAIN_SIZES = (10, 1797 - 10)

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fxexpand {library_version()}")
        raise typer.Exit


def _rate(value: float) -> float:
    if not (math.isfinite(value) and 0 < value <= LARGEST_RATE):
        raise typer.BadParameter(f"expected a number above 0 and at most {LARGEST_RATE:g}, found {value}.")
    return value


def _kernel_size(value: int) -> int:
    if value not in PADDING:
        raise typer.BadParameter(f"SmallNet has kernels of size {' or '.join(map(str, PADDING))}, found {value}.")
    return value


def _directory(value: Path | None) -> Path | None:
    """Make the directory now: better to fail here than after minutes of training."""
    if value is None:
        return None
    try:
        value.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"expected a directory that can be made, found {value} ({error.strerror}).") from error
    if not os.access(value, os.W_OK | os.X_OK):
        raise typer.BadParameter(f"expected a directory that can be written, found {value} (no permission).")
    return value


@app.callback()
def fxexpand(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Expand linear layers for training, contract them back exactly."""


@app.command()
def demo(
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", callback=_directory, help="Keep the contracted weights, a figure and the results."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many times each network is trained.")] = DEFAULTS.seeds,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = DEFAULTS.epochs,
    train_size: Annotated[
        int, typer.Option(min=TRAIN_SIZES[0], max=TRAIN_SIZES[1], help="Training images; all others are for testing.")
    ] = DEFAULTS.train_size,
    rate: Annotated[float, typer.Option(callback=_rate, help="Expansion rate of CL and CK.")] = DEFAULTS.rate,
    kernel_size: Annotated[
        int, typer.Option(callback=_kernel_size, help="SmallNet's kernel size: 3 or 7.")
    ] = DEFAULTS.kernel_size,
    threads: Annotated[
        int | None, typer.Option(min=1, max=os.cpu_count(), help="Threads for torch.", show_default="torch's choice")
    ] = None,
) -> None:
    """Train SmallNet on handwritten digits, compact and expanded; contract, save, load back and compare.

    The digits ship inside scikit-learn; nothing is downloaded. The defaults take under three minutes on two cores.
    """
    settings = Settings(seeds=seeds, epochs=epochs, train_size=train_size, rate=rate, kernel_size=kernel_size)
    try:
        # Imported here, so that --help and --version do not wait for scikit-learn, SciPy and Matplotlib.
        from fxexpand.demo.demo import run_demo

        if threads is not None:
            torch.set_num_threads(threads)
        run_demo(settings, out, Console())
    except KeyboardInterrupt as interrupt:
        typer.echo("fxexpand demo: interrupted; no half-written file is left.", err=True)
        raise typer.Exit(INTERRUPTED) from interrupt
    except (FxExpandError, OSError) as error:
        typer.echo(f"fxexpand demo: {error}", err=True)
        raise typer.Exit(1) from error
