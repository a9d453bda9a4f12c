import pytest
from scipy.stats import ttest_rel

from fxexpand.demo.compare import difference, result
from fxexpand.demo.experiment import ContractionError, Cost, Run
from fxexpand.demo.training import Curves
from fxexpand.demo.variants import Variant, variants

COMPACT, CL, *_ = variants(rate=4, kernel_size=7)
COST = Cost(2, 1, 4, 3)


def run(variant: Variant, seed: int, error: float, seconds: float, contraction: float) -> Run:
    curves = Curves((1.0,), (error,), seconds)
    return Run(variant, seed, curves, error, ContractionError(contraction, 2 * contraction), {}, None)  # type: ignore[arg-type]


def test_the_interval_is_the_paired_t_interval() -> None:
    errors, baseline = [0.05, 0.04, 0.07, 0.03], [0.08, 0.09, 0.06, 0.08]
    found = difference(errors, baseline)
    expected = ttest_rel(errors, baseline).confidence_interval(0.95)
    assert found.mean == pytest.approx(-0.03)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert (found.better, found.seeds) == (3, 4)


def test_equal_errors_are_not_better_and_their_interval_is_a_point() -> None:
    found = difference([0.1, 0.2], [0.1, 0.2])
    assert (found.mean, found.low, found.high, found.better) == (0, 0, 0, 0)


def test_one_seed_gives_no_interval() -> None:
    found = difference([0.1], [0.2])
    assert (found.low, found.high) == (None, None)
    assert (found.better, found.seeds) == (1, 1)


def test_runs_of_different_seeds_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match="zip"):
        difference([0.1, 0.2], [0.1])


def test_a_result_pairs_times_by_seed_and_keeps_the_worst_contraction() -> None:
    # The machine is half as fast during the second seed, for both: the ratio is 3 all the same.
    baseline = [run(COMPACT, 0, 0.2, 1.0, 0.0), run(COMPACT, 1, 0.4, 2.0, 0.0), run(COMPACT, 2, 0.3, 1.0, 0.0)]
    runs = [run(CL, 0, 0.1, 3.0, 1e-8), run(CL, 1, 0.2, 6.0, 3e-8), run(CL, 2, 0.3, 3.0, 2e-8)]
    found = result(CL, runs, baseline, COST)
    assert found.mean_error == pytest.approx(0.2)
    assert found.deviation == pytest.approx(0.1)
    assert (found.step_seconds, found.step_ratio) == (3.0, 3.0)
    assert (found.rounding, found.float32) == (3e-8, 6e-8)
    assert found.difference is not None
    assert found.difference.better == 2


def test_the_compact_network_is_not_compared_with_itself() -> None:
    baseline = [run(COMPACT, 0, 0.2, 1.0, 0.0)]
    found = result(COMPACT, baseline, baseline, COST)
    assert (found.difference, found.step_ratio, found.deviation) == (None, 1.0, 0.0)
