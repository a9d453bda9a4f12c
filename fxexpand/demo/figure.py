"""The training curves as a PNG."""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from numpy.typing import NDArray

from fxexpand.demo.compare import Result
from fxexpand.demo.settings import Settings

# Told apart without colour too; the colours are Okabe and Ito's, safe for colour-blind readers.
COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
LINES = ("-", "--", "-.", ":")


def curves_png(results: Sequence[Result], settings: Settings) -> bytes:
    """Training loss and test error by epoch, logarithmic: the mean over seeds, in a band from the least to the most."""
    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, error_axes = figure.subplots(1, 2)
    for index, result in enumerate(results):
        color, line = COLORS[index % len(COLORS)], LINES[index % len(LINES)]
        losses = np.array([run.curves.losses for run in result.runs])
        errors = 100 * np.array([run.curves.test_errors for run in result.runs])
        for axes, values in ((loss_axes, losses), (error_axes, errors)):
            _draw(axes, values, result.variant.label, color, line)
    _label(loss_axes, "Training loss", "cross-entropy (nats per image)")
    _label(error_axes, "Test error of the contracted network", "wrong test images (%)")
    loss_axes.legend(frameon=False)
    seeds = "1 seed" if settings.seeds == 1 else f"mean and range of {settings.seeds} seeds"
    figure.suptitle(f"SmallNet on {settings.train_size} handwritten digits, {seeds}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw(axes: Axes, values: NDArray[np.float64], label: str, color: str, line: str) -> None:
    """Draw `values` (seeds, epochs)."""
    epochs = np.arange(1, values.shape[1] + 1)
    axes.plot(epochs, values.mean(axis=0), color=color, linestyle=line, label=label, marker="o", markersize=2.5)
    axes.fill_between(epochs, values.min(axis=0), values.max(axis=0), color=color, alpha=0.15, linewidth=0)


def _label(axes: Axes, title: str, quantity: str) -> None:
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel("epoch")
    axes.set_ylabel(quantity)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
