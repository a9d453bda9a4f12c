"""The bound on rounding is above what rounding does, and far below what errors do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

from fxexpand.testing import (
    Case,
    PropertyError,
    Residual,
    ToleranceError,
    assert_equivalent,
    gamma,
    linear_chains,
    networks,
)
from fxexpand.testing.tolerance import TF32, UNIT_ROUNDOFF, distance, measured


def test_gamma_is_highams() -> None:
    assert gamma(10, 2.0**-53) == 10 * 2.0**-53 / (1 - 10 * 2.0**-53)
    assert gamma(0, 0.5) == 0
    with pytest.raises(ToleranceError, match="expected k·u < 1, found a sum of 256 terms"):
        gamma(256, 2.0**-8)


@pytest.mark.parametrize("dtype", UNIT_ROUNDOFF, ids=str)
def test_units_are_half_of_torchs_eps(dtype: torch.dtype) -> None:
    assert UNIT_ROUNDOFF[dtype] == torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("terms", [3, 300])
def test_gamma_counts_the_terms_of_each_sum(terms: int) -> None:
    u = UNIT_ROUNDOFF[torch.float32]
    x, w = torch.randn(4, terms), torch.ones(terms, 2)
    _, rounding = measured(lambda: x @ w)
    assert rounding.operations == 1
    assert rounding.gamma == gamma(terms + 1 + 2, u)  # a bias; operands and result


def test_sums_in_half_precision_are_accumulated_in_float32() -> None:
    x, w = torch.randn(4, 3000, dtype=torch.bfloat16), torch.ones(3000, 2, dtype=torch.bfloat16)
    _, rounding = measured(lambda: x @ w)
    assert rounding.gamma == gamma(3001, UNIT_ROUNDOFF[torch.float32]) + gamma(2, UNIT_ROUNDOFF[torch.bfloat16])


def test_kappa_is_the_condition_of_the_sum() -> None:
    """Of w·x it is |w|·|x| for the worst signs; random ones, of both, reach the root of 2·Σ w²·x²."""
    torch.manual_seed(0)
    x, w = torch.randn(1, 400, dtype=torch.float64), torch.randn(400, 50, dtype=torch.float64)
    _, rounding = measured(lambda: x @ w)
    expected = float((2 * (x.square() @ w.square())).sum().sqrt())
    assert rounding.amplification[0] == pytest.approx(expected, rel=0.3)


def test_cancellation_is_amplified() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 8, dtype=torch.float64)
    _, plain = measured(lambda: x @ x)
    y = x @ x
    _, cancelling = measured(lambda: (x @ x - y) * 1.0)
    assert cancelling.amplification[0] > 0.3 * plain.amplification[0] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@given(case=networks())
def test_rounding_of_a_network_stays_within_its_bound(dtype: torch.dtype, case: Case) -> None:
    """The same weights, which ``dtype`` holds exactly, in ``dtype`` and in float64."""
    short = copy.deepcopy(case.module).to(dtype)
    inputs = tuple(x.to(dtype).double() for x in case.inputs)
    if "Picky" in repr(case):
        return  # a decision that depends on data may fall otherwise
    assert_equivalent(copy.deepcopy(short).double(), short, *inputs)


@given(case=linear_chains())
def test_an_error_of_a_millionth_is_found(case: Case) -> None:
    """In any one parameter that makes a difference to the output, all its entries off by 1e-6."""
    for i, parameter in enumerate(case.module.parameters()):
        wrong = copy.deepcopy(case.module)
        with torch.no_grad():
            list(wrong.parameters())[i].mul_(1 + 1e-6)
            moved = distance(case.module(*case.inputs), wrong(*case.inputs))
            size = float(case.module(*case.inputs).norm())
        if moved > 1e-9 * size and parameter.numel():
            with pytest.raises(PropertyError, match="expected an error of at most"):
                assert_equivalent(case.module, wrong, *case.inputs)


def test_the_first_layer_that_differs_is_named() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong.get_parameter("2.bias").add_(0.1)
    with pytest.raises(PropertyError, match=r"The first layer that differs is 2 \(Linear\)"):
        assert_equivalent(model, wrong, torch.randn(4, 3, dtype=torch.float64))


class _Says(nn.Module):
    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor) -> Any:
        return self.answer(x)


@pytest.mark.parametrize(
    ("a", "b", "found"),
    [
        (lambda x: x, lambda x: x[:1], "shape"),
        (lambda x: x, lambda x: (x, x), "expected"),
        (lambda x: x, lambda x: x.float(), "expected dtype torch.float64, found torch.float32"),
        (lambda x: x > 0, lambda x: x >= -1, "boolean"),
        (lambda x: {"y": x}, lambda x: {"z": x}, "mapping"),
        (lambda x: x, lambda x: x * float("nan"), "found inf"),
        (lambda x: x.clone(), lambda x: x.mul_(2) / 2, r"inputs\[0\]"),
        (lambda x: 3, lambda x: 4, "expected 3, found 4"),
    ],
)
def test_anything_that_differs_beyond_rounding_is_found(a: Any, b: Any, found: str) -> None:
    x = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3)
    assert_equivalent(_Says(a), _Says(a), x)
    with pytest.raises(PropertyError, match=found):
        assert_equivalent(_Says(a), _Says(b), x)


def test_nan_and_infinity_are_equal_to_themselves() -> None:
    x = torch.tensor([1.0, float("nan"), float("inf")], dtype=torch.float64)
    assert assert_equivalent(nn.Identity(), nn.Identity(), x).error == 0


def test_a_model_is_as_it_was_also_its_training_flag_and_statistics() -> None:
    model = nn.Sequential(Residual(nn.Conv2d(2, 2, 1)), nn.BatchNorm2d(2), nn.Dropout()).double()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    assert_equivalent(model, copy.deepcopy(model), torch.randn(2, 2, 3, 3, dtype=torch.float64))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not torch.equal(torch.get_rng_state(), state)  # torch.randn above; the models have drawn nothing


def test_a_model_that_counts_its_calls_keeps_its_count() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.tensor(3.0, dtype=torch.float64))
            self.count: Tensor

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            return x * self.count

    model = Counting()
    assert_equivalent(model, copy.deepcopy(model), torch.randn(3, dtype=torch.float64))
    assert float(model.count) == 3


def test_inputs_that_stay_as_they_are_have_to_be_equal() -> None:
    def touched(x: Tensor) -> Tensor:
        y = x * 2
        x.mul_(1 + 2.0**-52)
        return y

    with pytest.raises(PropertyError, match=r"inputs\[0\]: expected an error of at most 0"):
        assert_equivalent(_Says(lambda x: x * 2), _Says(touched), torch.ones(3, dtype=torch.float64))


def test_decisions_that_always_fall_otherwise_have_no_bound() -> None:
    torch.manual_seed(0)
    x = torch.ones(2000, dtype=torch.float64)

    def close_call() -> Tensor:
        y = x * 1.0
        return y[y > 1]

    with pytest.raises(ToleranceError, match="found another each time"):
        measured(close_call)


def test_tf32_is_a_setting_of_cuda_alone() -> None:
    """Rounding operands to 11 bits, as cuDNN may, counts only where it happens."""
    assert TF32 == 2.0**-11
    _, rounding = measured(lambda: nn.functional.conv2d(torch.randn(1, 2, 4, 4), torch.ones(2, 2, 3, 3)))
    assert rounding.gamma < 1e-5
