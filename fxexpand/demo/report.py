"""The tables at the end of the demo, narrow enough for 80 columns."""

from collections.abc import Iterable, Sequence

from rich import box
from rich.table import Table

from fxexpand.demo.compare import Difference, Result
from fxexpand.demo.settings import Settings


def tables(results: Sequence[Result], settings: Settings) -> tuple[Table, ...]:
    """Accuracy, cost and the error of contracting; one row per variant."""
    return accuracy_table(results, settings), cost_table(results), contraction_table(results)


def accuracy_table(results: Sequence[Result], settings: Settings) -> Table:
    """Test errors, and the differences to the compact network in percentage points."""
    seeds = _count(settings.seeds, "seed")
    title = f"Test error after {_count(settings.epochs, 'epoch')} on {settings.train_size} images, {seeds}"
    rows = [
        (
            result.variant.label,
            _mean_and_deviation(result),
            *_difference(result.difference),
        )
        for result in results
    ]
    return _table(title, ("variant", "mean ± deviation", "difference, points", "95 % interval", "better in"), rows)


def cost_table(results: Sequence[Result]) -> Table:
    """Time, parameters and multiply-accumulates, in training and deployed."""
    rows = [
        (
            result.variant.label,
            f"{1000 * result.step_seconds:.1f}",
            f"{result.step_ratio:.2f}",
            f"{result.cost.training_parameters / 1e3:.2f}",
            f"{result.cost.deployed_parameters / 1e3:.2f}",
            f"{result.cost.training_macs / 1e6:.2f}",
            f"{result.cost.deployed_macs / 1e6:.2f}",
        )
        for result in results
    ]
    columns = (
        "variant",
        "step,\nms",
        "step,\n× compact",
        "trained,\nK params",
        "deployed,\nK params",
        "trained,\nM MACs",
        "deployed,\nM MACs",
    )
    return _table("Cost: time of a training step, parameters, MACs of one image and composing", columns, rows)


def contraction_table(results: Sequence[Result]) -> Table:
    """The largest error over seeds, against the trained network evaluated in float64."""
    rows = [(result.variant.label, _error(result.rounding), _error(result.float32)) for result in results]
    columns = ("variant", "float32 weights,\nfloat64 arithmetic", "float32 weights,\nfloat32 arithmetic")
    return _table("Largest relative error of the contracted network", columns, rows)


def _error(error: float) -> str:
    return f"{error:.1e}" if error else "0"


def _mean_and_deviation(result: Result) -> str:
    mean = f"{100 * result.mean_error:.1f}"
    return f"{mean} %" if len(result.runs) == 1 else f"{mean} ± {100 * result.deviation:.1f} %"


def _difference(difference: Difference | None) -> tuple[str, str, str]:
    if difference is None:
        return "", "", ""
    interval = "needs 2 seeds"
    if difference.low is not None and difference.high is not None:
        interval = f"{100 * difference.low:+.1f} to {100 * difference.high:+.1f}"
    return f"{100 * difference.mean:+.1f}", interval, f"{difference.better} of {difference.seeds}"


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    return table


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
