"""What the runs say about each variant: statistics over seeds, paired with the compact network."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import t as student

from fxexpand.demo.experiment import Cost, Run
from fxexpand.demo.variants import Variant

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """Test error minus the compact network's, paired by seed: negative is better. Shares of the test images.

    `low` and `high` bound the mean difference with 95 % confidence (Student's t over seeds); None with one seed, from
    which no interval follows. `better` counts the seeds with a strictly lower error, out of `seeds`.
    """

    mean: float
    low: float | None
    high: float | None
    better: int
    seeds: int


@dataclass(frozen=True)
class Result:
    """One variant over all seeds. `difference` is None for the compact network itself.

    `mean_error` and `deviation` (over seeds, 0 with one seed) are shares of the test images. `step_seconds` is the
    median over seeds of each run's median, `step_ratio` the median over seeds of its ratio to the compact network's.
    `rounding` and `float32` are the largest contraction errors of any seed.
    """

    variant: Variant
    runs: tuple[Run, ...]
    cost: Cost
    mean_error: float
    deviation: float
    difference: Difference | None
    step_seconds: float
    step_ratio: float
    rounding: float
    float32: float


def result(variant: Variant, runs: Sequence[Run], baseline: Sequence[Run], cost: Cost) -> Result:
    """Summarise `runs` of `variant`, paired by position with `baseline`, the compact network's runs."""
    errors = [run.test_error for run in runs]
    return Result(
        variant=variant,
        runs=tuple(runs),
        cost=cost,
        mean_error=statistics.fmean(errors),
        deviation=statistics.stdev(errors) if len(errors) > 1 else 0.0,
        difference=None if runs is baseline else difference(errors, [run.test_error for run in baseline]),
        step_seconds=statistics.median(run.curves.step_seconds for run in runs),
        step_ratio=statistics.median(
            run.curves.step_seconds / other.curves.step_seconds for run, other in zip(runs, baseline, strict=True)
        ),
        rounding=max(run.contraction.rounding for run in runs),
        float32=max(run.contraction.float32 for run in runs),
    )


def difference(errors: Sequence[float], baseline: Sequence[float]) -> Difference:
    """The paired difference of two sequences of equal length, one entry per seed."""
    differences = [error - other for error, other in zip(errors, baseline, strict=True)]
    mean, seeds = statistics.fmean(differences), len(differences)
    low = high = None
    if seeds > 1:
        half = student.ppf((1 + CONFIDENCE) / 2, seeds - 1) * statistics.stdev(differences) / math.sqrt(seeds)
        low, high = mean - float(half), mean + float(half)
    return Difference(mean, low, high, sum(d < 0 for d in differences), seeds)
