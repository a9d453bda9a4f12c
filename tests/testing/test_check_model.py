"""The battery holds for what is right, says what it could not ask, and finds each pass that is wrong."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import fxexpand
from fxexpand import CL, FC
from fxexpand.testing import Case, Picky, PropertyError, Report, as_trained, check_model, graph, linear_graphs

PROPERTIES = (
    *("expand preserves", "gradients flow", "collapse agrees", "contract restores"),
    *("fuse agrees", "torch.compile agrees", "the model is untouched"),
)
BATTERY = sys.modules["fxexpand.testing.check_model"]


def network() -> nn.Module:
    return as_trained(
        nn.Sequential(
            nn.Conv2d(3, 6, 5, padding=2),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 4, 3, stride=2, bias=False),
            nn.Flatten(),
            nn.Linear(36, 5),
        ).double()
    )


X = torch.linspace(-1, 1, 2 * 3 * 8 * 8, dtype=torch.float64).sin().reshape(2, 3, 8, 8)


def check(model: nn.Module, *inputs: Any, **options: Any) -> Report:
    return check_model(model, *inputs, **{"backend": "eager", **options})


def test_everything_holds_and_prints_as_a_table() -> None:
    report = check(network(), X, backend="aot_eager")
    assert report.held == PROPERTIES
    assert not report.skipped
    table = str(report).splitlines()
    assert table[0].startswith("Sequential: ")
    assert [line[:22].strip() for line in table[2:]] == list(PROPERTIES)
    assert report["expand preserves"].detail == "3 layers expanded"
    agreements = [outcome.agreement for outcome in report.outcomes if outcome.agreement]
    assert len(agreements) == 5
    assert all(0 <= each.error <= each.bound < 1e-9 for each in agreements)


@settings(max_examples=max(5, settings().max_examples // 2))  # random networks: see test_devices.py
@given(case=linear_graphs())
def test_random_graphs(case: Case) -> None:
    report = check(case.module, *case.inputs, rules=[CL(2), FC(2)], backend=None)
    assert set(report.skipped) <= set(PROPERTIES)
    assert {"fuse agrees", "the model is untouched"} <= set(report.held)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_in_another_dtype_a_copy_is_checked(dtype: torch.dtype) -> None:
    model = network()
    report = check(model, X, dtype=dtype)
    assert str(dtype).removeprefix("torch.") in report.subject
    assert report.held == PROPERTIES
    assert {p.dtype for p in model.parameters()} == {torch.float64}


# What cannot be asked


def test_a_model_that_no_rule_matches_is_said_to_be_so() -> None:
    report = check(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)).double(), X)
    assert report.held == ("fuse agrees", "torch.compile agrees", "the model is untouched")
    assert "no rule matches any layer" in report.skipped["expand preserves"]
    assert report.skipped["collapse agrees"].startswith("nothing was expanded: no rule matches")
    assert "skipped  nothing was expanded" in str(report)


def test_a_layer_that_is_refused_is_a_reason() -> None:
    model = network()
    model.get_submodule("0").register_forward_hook(lambda module, args, out: out * 2)
    report = check(model, X)
    assert "hooks" in report.skipped["expand preserves"]
    assert "fuse agrees" in report.held


def test_a_model_without_gradients_is_said_to_be_so() -> None:
    gm = graph(
        "def forward(self, x): y = torch.relu(self.conv(x)); return torch.nn.functional.relu(y * y, inplace=True)",
        conv=nn.Conv2d(3, 3, 3),
    )
    assert "gradients flow" in check(gm.double(), X).held
    broken = graph("def forward(self, x): y = torch.sigmoid(self.conv(x)); y *= 2; return y", conv=nn.Conv2d(3, 3, 3))
    report = check(broken.double(), X)
    assert "the model itself has no gradients" in report.skipped["gradients flow"]
    assert "the model itself has no gradients" in report["collapse agrees"].detail


def test_what_torch_cannot_compile_itself_is_a_reason() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(x)
            return y

    def refusing(gm: Any, inputs: Any) -> Callable[..., Any]:
        raise NotImplementedError("not today")

    report = check(Odd().double(), X, backend=refusing)
    assert "torch.compile does not take the model itself" in report.skipped["torch.compile agrees"]


def test_a_bound_that_is_larger_than_the_result_is_no_proof() -> None:
    """A difference of two that are equal but for one hundredth: three digits lose two of them."""

    class Cancelling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)
            self.b = copy.deepcopy(self.a)
            with torch.no_grad():
                self.b.weight.mul_(1.01)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.a(x) - self.b(x)
            return y

    report = check(Cancelling(), torch.randn(4, 8), dtype=torch.bfloat16)
    assert "ask in a wider dtype" in report.skipped["fuse agrees"]
    assert "fuse agrees" in check(Cancelling(), torch.randn(4, 8), dtype=torch.float64).held


# What is wrong


def _parameter(model: nn.Module, part: str) -> Tensor:
    return next(p for name, p in model.named_parameters() if part in name)


def scaled(run: Callable[..., nn.Module], part: str, by: float = 1 + 1e-6) -> Callable[..., nn.Module]:
    """A pass that gets one parameter of its result wrong by a millionth."""

    def wrong(*args: Any) -> nn.Module:
        found = run(*args)
        with torch.no_grad():
            _parameter(found, part).mul_(by)
        return found

    return wrong


def on_a_copy(run: Callable[..., nn.Module], part: str) -> Callable[..., nn.Module]:
    """A ``collapse`` that shares nothing, one parameter of which is wrong."""
    return scaled(lambda *args: copy.deepcopy(run(*args)), part)


def touching(run: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def wrong(model: nn.Module, *args: Any) -> nn.Module:
        with torch.no_grad():
            next(model.parameters()).add_(0)
            next(model.parameters()).mul_(1 + 1e-15)
        return run(model, *args)

    return wrong


def frozen(run: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def wrong(*args: Any) -> nn.Module:
        found = run(*args)
        _parameter(found, "0.kernel").requires_grad_(False)
        return found

    return wrong


def renamed(run: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    return lambda model: nn.Sequential(run(model))


def dearer(run: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    eye = nn.Conv2d(3, 3, 1, bias=False, dtype=torch.float64)
    nn.init.dirac_(eye.weight)
    return lambda model, *inputs: nn.Sequential(eye, run(model, *inputs))


def crashing(run: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def wrong(*_: Any) -> nn.Module:
        raise KeyError("no such thing")

    return wrong


WRONG: list[tuple[str, Callable[..., Any], str]] = [
    ("expand", lambda run: scaled(run, "0.kernel"), r"expand preserves: output: .* The first layer that differs is 1"),
    ("expand", frozen, r"gradients flow: 0\.kernel_0\.weight: expected a gradient .*, found none"),
    ("collapse", lambda run: on_a_copy(run, "3.kernel"), r"collapse agrees: output: expected an error of at most"),
    ("contract", lambda run: scaled(run, "5.weight"), r"contract restores: output: expected an error of at most"),
    ("contract", renamed, r"contract restores: expected the keys of the state_dict, without: \['0\.weight'"),
    (
        "fuse",
        lambda run: scaled(run, "3.weight"),
        r"fuse agrees: output: .* The first layer that differs is 3 \(Conv2d\)",
    ),
    ("fuse", dearer, r"fuse agrees: expected at most \d+ multiply-accumulates, found \d+"),
    ("fuse", crashing, r"fuse agrees: expected the pass to run, it raised KeyError"),
    ("expand", touching, r"the model is untouched: 0\.weight: expected the values it had, found others"),
]


@pytest.mark.parametrize(("task", "make", "message"), WRONG)
def test_a_wrong_pass_is_found(
    task: str, make: Callable[..., Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BATTERY, task, make(getattr(fxexpand, task)))
    with pytest.raises(PropertyError, match=message):
        check(network(), X)


def test_a_wrong_compiler_is_found() -> None:
    def wrong(gm: Any, inputs: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            return tuple(x * (1 + 1e-6) for x in gm(*args))

        return run

    with pytest.raises(PropertyError, match=r"torch\.compile agrees: output: expected an error of at most"):
        check(network(), X, backend=wrong)


class _Multiplied(torch.autograd.Function):
    """The value as it is, and ``by`` times its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, by: float) -> Tensor:
        ctx.by = by
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.by * gradients[0], None


class WrongGradient(nn.Module):
    """Returns what ``inner`` returns; the gradient of the bias of its last layer is another, by a millionth."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.named_parameters(*args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.inner.get_parameter("5.linear_1.bias")
        y: Tensor = self.inner(x) + _Multiplied.apply(bias, 1e-6) - bias.detach()
        return y


@pytest.mark.parametrize("bytes_at_once", [2**29, 500, 0], ids=["together", "in parts", "one by one"])
def test_gradients_that_differ_where_outputs_agree_are_found(
    bytes_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxexpand.testing.gradients._BYTES_AT_ONCE", bytes_at_once)
    assert check(network(), X).held == PROPERTIES
    monkeypatch.setattr(BATTERY, "collapse", lambda model: WrongGradient(fxexpand.collapse(model)))
    with pytest.raises(PropertyError, match=r"collapse agrees: gradients: output\['5\.linear_1\.bias'\]"):
        check(network(), X)


def test_a_model_that_cannot_be_traced_goes_through_all_of_it() -> None:
    report = check(Picky(network()), X)
    assert report.held == PROPERTIES


def test_it_takes_a_module_alone() -> None:
    with pytest.raises(PropertyError, match=r"check_model: expected a torch\.nn.Module, found str"):
        check_model("model")  # type: ignore[arg-type]
