"""trace keeps what code asks with ``is None``: of arguments, of their parts, and of what modules return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from behaviour import DOUBLE, Two, X, assert_alike, linear
from fxexpand import trace

SEQUENCES = torch.linspace(-1, 2, 40, dtype=torch.float64).reshape(2, 5, 4)


class Masked(Two):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y: Tensor = self.a(x)
        out: Tensor = self.b(y) if mask is None else self.b(y * mask)
        return out


class PassesOn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **DOUBLE)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y: Tensor = self.attention(x, x, x, attn_mask=mask)[0]
        return y


class Required(Two):
    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y: Tensor = self.a(x) if mask is None else self.b(x)
        return y


class OneOfTwo(Two):
    def forward(self, x: Tensor, p: Tensor | None = None, q: Tensor | None = None) -> Tensor:
        y: Tensor = self.a(x) if p is not None and q is None else self.b(x)
        return y


class OneOfThree(Two):
    def forward(self, x: Tensor, p: Tensor | None = None, q: Tensor | None = None, r: Tensor | None = None) -> Tensor:
        y: Tensor = self.a(x) if p is not None and q is None and r is None else self.b(x)
        return y


class Switch(Two):
    def forward(self, x: Tensor, flag: bool = False) -> Tensor:
        y: Tensor = self.a(x) if flag is True else self.b(x)
        return y


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (Masked, [(X,), (X, None), (X, X)]),
        (lambda: nn.Sequential(Masked(), linear()), [(X,)]),
        (PassesOn, [(SEQUENCES,), (SEQUENCES, torch.ones(5, 5, dtype=torch.bool).triu(1))]),
        (Required, [(X, None), (X, X)]),
        (OneOfTwo, [(X,), (X, X), (X, X, X), (X, None, X)]),
        (OneOfThree, [(X,), (X, X), (X, X, X), (X, X, X, X)]),
        (Switch, [(X,), (X, True), (X, False)]),
    ],
)
def test_arguments_may_be_given_or_left_out(make: Callable[[], nn.Module], arguments: list[Any]) -> None:
    model = make()
    traced = trace(model)
    for given in arguments:
        assert_alike(traced, model, *given)


def test_an_optional_argument_that_is_only_passed_on_does_not_keep_a_model_from_being_a_graph() -> None:
    assert isinstance(trace(PassesOn()), fx.GraphModule)


class OnePart(Two):
    def forward(self, xs: tuple[Tensor, Tensor | None]) -> Tensor:
        y: Tensor = self.a(xs[0])
        out: Tensor = y if xs[1] is None else self.b(y + xs[1])
        return out


@pytest.mark.parametrize("other", [None, X])
def test_a_part_of_an_argument_may_be_none(other: Tensor | None) -> None:
    model = OnePart()
    assert_alike(trace(model), model, (X, other))


class Attends(nn.Module):
    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **DOUBLE)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        y, weights = self.attention(x, x, x, need_weights=self.need_weights)
        out: Tensor = y if weights is None else y * weights.sum()
        return out


class ReturnsAttention(Attends):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.attention(x, x, x, need_weights=self.need_weights)
        return result


class AsksAtCall(Attends):
    def forward(self, x: Tensor, need_weights: bool = True) -> Tensor:
        y, weights = self.attention(x, x, x, need_weights=need_weights)
        out: Tensor = y if weights is None else y * 2
        return out


@pytest.mark.parametrize("make", [Attends, ReturnsAttention])
@pytest.mark.parametrize("need_weights", [False, True])
def test_attention_returns_no_weights_where_none_are_needed(make: type[Attends], need_weights: bool) -> None:
    model = make(need_weights)
    traced = trace(model)
    assert isinstance(traced, fx.GraphModule)
    assert_alike(traced, model, SEQUENCES)


def test_whether_weights_are_needed_may_be_an_argument() -> None:
    model = AsksAtCall(need_weights=True)
    traced = trace(model)
    for arguments in ((), (True,), (False,)):
        assert_alike(traced, model, SEQUENCES, *arguments)


class Maybe(Two):
    """Cannot be traced, and returns a tensor or nothing, alone or as a part of something."""

    def __init__(self, nothing: bool, wrap: Callable[[Any], Any]) -> None:
        super().__init__()
        self.nothing, self.wrap = nothing, wrap

    def forward(self, x: Tensor) -> Any:
        if x.sum() > 1e9:
            return x
        return self.wrap(None if self.nothing else self.a(x))


def alone(value: Any) -> Any:
    return value


def in_a_list(value: Any) -> Any:
    return [value]


def in_a_dict(value: Any) -> Any:
    return {"y": value}


class UsesMaybe(Two):
    def __init__(self, nothing: bool, wrap: Callable[[Any], Any], take: Callable[[Any], Any]) -> None:
        super().__init__()
        self.maybe, self.take = Maybe(nothing, wrap), take

    def forward(self, x: Tensor) -> Tensor:
        y = self.take(self.maybe(x))
        out: Tensor = self.b(x) if y is None else self.b(y) * 2
        return out


@pytest.mark.parametrize("nothing", [False, True])
@pytest.mark.parametrize(
    ("wrap", "take"),
    [(alone, alone), (in_a_list, lambda r: r[0]), (in_a_dict, lambda r: r["y"]), (in_a_dict, lambda r: r.get("y"))],
)
def test_what_a_module_returns_may_be_none(
    nothing: bool, wrap: Callable[[Any], Any], take: Callable[[Any], Any]
) -> None:
    model = UsesMaybe(nothing, wrap, take)
    assert_alike(trace(model), model, X)


@fx.wrap
def nothing_or(x: Tensor, nothing: bool) -> Tensor | None:
    return None if nothing else x.tanh()


class UsesFunction(Two):
    def __init__(self, nothing: bool) -> None:
        super().__init__()
        self.nothing = nothing

    def forward(self, x: Tensor) -> Tensor:
        y = nothing_or(x, self.nothing)
        out: Tensor = self.b(x) if y is None else self.b(y) * 2
        return out


@pytest.mark.parametrize("nothing", [False, True])
def test_what_a_function_returns_may_be_none(nothing: bool) -> None:
    model = UsesFunction(nothing)
    assert_alike(trace(model), model, X)


@fx.wrap
def annotated(x: Tensor) -> Tensor:
    return x.tanh()


class UsesAnnotated(Two):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(annotated(self.a(x)))
        return out


def test_a_wrapped_function_that_says_it_returns_a_tensor_is_a_node() -> None:
    model = UsesAnnotated()
    traced = trace(model)
    assert isinstance(traced, fx.GraphModule)
    assert_alike(traced, model, X)


class PassesOnMaybe(UsesMaybe):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.take(self.maybe(x)))
        return out


def test_what_nobody_asks_about_does_not_keep_a_model_from_being_a_graph() -> None:
    assert isinstance(trace(PassesOnMaybe(False, in_a_list, lambda r: r[0])), fx.GraphModule)
