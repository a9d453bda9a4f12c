import io

from rich.console import Console

from fxexpand.demo.compare import Difference, Result
from fxexpand.demo.experiment import Cost
from fxexpand.demo.report import tables
from fxexpand.demo.settings import Settings
from fxexpand.demo.variants import variants

COMPACT, CL, *_ = variants(rate=2.5, kernel_size=7)
COST = Cost(training_parameters=547_104, deployed_parameters=66_186, training_macs=57_350_000, deployed_macs=4_450_000)
RESULTS = (
    Result(COMPACT, (), COST, 0.0874, 0.0101, None, 0.0256, 1.0, 0.0, 2.4e-7),
    Result(CL, (), COST, 0.0512, 0.0049, Difference(-0.0362, -0.0493, -0.0231, 5, 5), 0.2084, 8.14, 3.1e-8, 2.6e-7),
)


def printed(results: tuple[Result, ...], settings: Settings) -> str:
    console = Console(file=io.StringIO(), width=80)
    for table in tables(results, settings):
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def row(text: str, label: str, table: int) -> list[str]:
    """The cells of the row of `label` in the table of that number."""
    return [line.split() for line in text.splitlines() if line.split()[:1] == [label]][table]


def test_every_figure_stands_in_its_row() -> None:
    text = printed(RESULTS, Settings(seeds=5, epochs=20, train_size=300))
    assert "Test error after 20 epochs on 300 images, 5 seeds" in text
    assert " ".join(row(text, "CL(2.5)", 0)) == "CL(2.5) 5.1 ± 0.5 % -3.6 -4.9 to -2.3 5 of 5"
    assert row(text, "CL(2.5)", 1) == ["CL(2.5)", "208.4", "8.14", "547.10", "66.19", "57.35", "4.45"]
    assert row(text, "CL(2.5)", 2) == ["CL(2.5)", "3.1e-08", "2.6e-07"]


def test_the_compact_network_has_no_difference_and_no_contraction() -> None:
    text = printed(RESULTS, Settings())
    assert row(text, "compact", 0) == ["compact", "8.7", "±", "1.0", "%"]
    assert row(text, "compact", 2) == ["compact", "0", "2.4e-07"]


def test_no_line_is_wider_than_80_columns_and_nothing_is_cut() -> None:
    text = printed(RESULTS, Settings())
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text


def test_one_seed_shows_no_interval() -> None:
    alone = Result(CL, (), COST, 0.05, 0.0, Difference(-0.03, None, None, 1, 1), 0.2, 8.0, 3e-8, 3e-7)
    text = printed((alone,), Settings(seeds=1, epochs=1))
    assert "after 1 epoch on 300 images, 1 seed" in text
    assert "needs 2 seeds" in text
