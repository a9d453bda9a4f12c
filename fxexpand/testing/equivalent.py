"""Two models that compute the same, as far as rounding lets anyone tell."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor, nn

from fxexpand.errors import FxExpandError
from fxexpand.report.run import check_module, copied, undisturbed
from fxexpand.report.verify import Leaves, difference_of, first_layer, home_of, inputs_for, leaves_of, recorded
from fxexpand.testing.tolerance import Rounding, distance, measured


class PropertyError(FxExpandError, AssertionError):
    """A property does not hold: which one, where, and by how much against which bound."""


@dataclass(frozen=True)
class Agreement:
    """How far two models are apart, in the tensor that comes nearest to its bound.

    ``error`` is ‖b − a‖₂ / ‖a‖₂ and ``bound`` what it may be; ``share`` is their quotient. ``decisive`` says whether
    some tensor was held to less than its own norm: a bound above that would pass zeros.
    """

    error: float = 0.0
    bound: float = 0.0
    share: float = 0.0
    decisive: bool = True

    def __str__(self) -> str:
        return f"relative error {self.error:.1e}, bound {self.bound:.1e}"


@dataclass(frozen=True)
class Observed:
    """What a model returned and left in its inputs, and what rounding may have done to it."""

    model: nn.Module
    inputs: tuple[object, ...]
    leaves: Leaves
    rounding: Rounding


def assert_equivalent(a: nn.Module, b: nn.Module, *inputs: object) -> Agreement:
    """That ``b`` returns what ``a`` returns, and leaves the same in its inputs, to within rounding.

    Both run in eval mode on copies of ``inputs``; afterwards flags, buffers and random generators are as they were.
    Where the models differ in device or dtype, each gets the inputs in its own.

    The bound is ‖b − a‖₂ ≤ γ_a·κ_a + γ_b·κ_b for each tensor: γ from the terms that each model accumulates along its
    depth and from the unit roundoff of its dtype, κ from how much it amplifies errors of its data. The
    module ``fxexpand.testing.tolerance`` says how, and where in the literature. Shapes, dtypes, integers and structure
    have to be equal.

    Returns how close they are. Raises ``PropertyError`` when they are not close enough, naming the first layer that
    differs, and ``ToleranceError`` where there is no bound: sums so long, in a dtype so short, that rounding alone
    could leave nothing of them.
    """
    for name, model in (("a", a), ("b", b)):
        check_module(model, f"assert_equivalent: {name}", PropertyError)
    return agreement("assert_equivalent", observed(a, inputs_for(a, b, inputs)), observed(b, inputs_for(b, a, inputs)))


def observed(model: nn.Module, inputs: tuple[object, ...], like: Rounding | None = None) -> Observed:
    """What ``model`` does with ``inputs`` in eval mode; rounding is measured unless it is ``like`` what is known."""

    def call(*own: object) -> object:
        return {"output": model(*own), "inputs": own}

    if like is not None:
        with undisturbed(model, inputs):
            return Observed(model, inputs, list(leaves_of(call(*copied(inputs)), "output")), like)
    leaves, rounding = measured(call, inputs, model)
    return Observed(model, inputs, leaves, rounding)


def agreement(
    where: str, a: Observed, b: Observed, through: Iterable[Rounding] = (), *, merged: bool = False
) -> Agreement:
    """How close the two are; ``through`` is the rounding of what ``b`` was computed from by way of.

    A layer of ``b`` stands for that of ``a`` with its name; where layers were ``merged``, for the last of several.
    Raises ``PropertyError``, its message opening with ``where``.
    """
    if len(a.leaves) != len(b.leaves):
        raise PropertyError(f"{where}: expected {len(a.leaves)} values, found {len(b.leaves)}.")
    alike = home_of(a.model) == home_of(b.model)
    roundings = (a.rounding, b.rounding, *through)
    worst, decisive = Agreement(), None
    for i, ((path, x), (other, y)) in enumerate(zip(a.leaves, b.leaves, strict=True)):
        shown = path.replace("output['output']", "output").replace("output['inputs']", "inputs")
        difference = difference_of(shown, x, y)
        if path != other or difference.expected:
            found = difference.found if path == other else other
            raise PropertyError(f"{where}: {shown}: expected {difference.expected or path}, found {found}.")
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            continue
        if alike and x.dtype != y.dtype:
            raise PropertyError(f"{where}: {shown}: expected dtype {x.dtype}, found {y.dtype}.")
        apart, norm = distance(x, y), distance(x.new_zeros(()).expand_as(x), x)
        bound = sum(rounding.bound(i) for rounding in roundings)
        size = norm or 1.0
        if not apart <= bound:
            look = _first_new if merged else first_layer
            layer = look(a.model, b.model, a.inputs, b.inputs, bound / size)
            raise PropertyError(
                f"{where}: {shown}: expected an error of at most {bound / size:.1e} of its norm, found "
                f"{apart / size:.1e}. {layer} The bound is that of rounding ({'; '.join(map(str, roundings))}), times "
                "how much the models amplify it."
            )
        if bound:
            decisive = bool(decisive) or bound < norm or not norm
        share = apart / bound if bound else 0.0
        if share >= worst.share:
            worst = Agreement(apart / size, bound / size, share)
    return worst if decisive is not False else replace(worst, decisive=False)


def _first_new(
    a: nn.Module, b: nn.Module, inputs: tuple[object, ...], new_inputs: tuple[object, ...], rtol: float
) -> str:
    """A sentence that names the first layer of ``b`` after the last one that gives what some layer of ``a`` gives."""
    known = [leaves for _, leaves in recorded(a, _leaf_modules(a), inputs)]
    calls = recorded(b, _leaf_modules(b), new_inputs)
    agree = [any(_close(leaves, others, rtol) for others in known) for _, leaves in calls]
    last = max((i for i, agrees in enumerate(agree) if agrees), default=-1)
    if last + 1 == len(calls):
        return "Every layer gives what some layer did: look at what runs after the last one or between them."
    path = calls[last + 1][0]
    return f"The first layer that differs is {path} ({type(b.get_submodule(path)).__name__})."


def _leaf_modules(model: nn.Module) -> dict[str, nn.Module]:
    return {path: module for path, module in model.named_modules() if path and not any(module.children())}


def _close(x: Leaves, y: Leaves, rtol: float) -> bool:
    if len(x) != len(y):
        return False
    return all(difference_of(path, a, b).within(rtol) for (path, a), (_, b) in zip(x, y, strict=True))
