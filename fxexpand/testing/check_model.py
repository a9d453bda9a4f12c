"""Every property of every pass, asked of one model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxexpand.errors import FxExpandError
from fxexpand.graph.expanded import Expanded
from fxexpand.graph.layers import is_layer
from fxexpand.passes.collapse import collapse
from fxexpand.passes.contract import contract
from fxexpand.passes.expand import expand
from fxexpand.passes.fuse import fuse
from fxexpand.report.run import check_module, copied
from fxexpand.report.summary import summary
from fxexpand.rules import Rule
from fxexpand.strategies import CK, CL, FC, Strategy
from fxexpand.testing.equivalent import Observed, PropertyError, agreement, observed
from fxexpand.testing.gradients import gradients, gradients_agree, gradients_flow
from fxexpand.testing.report import Outcome, Report
from fxexpand.testing.tolerance import ToleranceError
from fxexpand.testing.untouched import Untouched

RULES: tuple[Strategy, ...] = (CK(4), CL(2), FC(2))

Rules = Rule | Strategy | Sequence[Rule | Strategy]


def check_model(
    model: nn.Module,
    *inputs: object,
    rules: Rules = RULES,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    backend: str | Callable[..., Any] | None = "inductor",
) -> Report:
    """The whole battery on one architecture; ``inputs`` are the arguments of ``model(...)``.

    - expand preserves: ``expand(model, rules)`` computes what the model computes;
    - gradients flow: every new parameter has a gradient that is finite, and not zero where the old one's is not;
    - collapse agrees: the same outputs and gradients as layer by layer;
    - contract restores: the same keys, shapes, dtypes and classes, which load strictly, and the same function;
    - fuse agrees: the same function, at no more multiply-accumulates;
    - torch.compile agrees: the fused model, compiled by ``backend``, computes the same; None leaves it out;
    - the model is untouched: modules, tensors, values, gradients, flags and hooks are those it had.

    With ``device`` or ``dtype``, a copy that is moved there is checked. Functions are compared in eval mode, by
    ``assert_equivalent``'s bound. What cannot be asked of the model is reported as skipped, with the reason: no rule
    matches, say, a layer is refused, or the bound is larger than the result, as it may be in half precision.

    Returns a report, which prints as a table. Raises ``PropertyError`` for the first property that fails: which one,
    the first layer that differs, the error and the bound.
    """
    check_module(model, "check_model", PropertyError)
    if device is not None or dtype is not None:
        model, inputs = _moved(model, inputs, device, dtype)
    untouched = Untouched.of(model)
    battery = _Battery(model, inputs, rules, backend)
    outcomes = [
        _asked("expand preserves", battery.expand_preserves),
        _asked("gradients flow", battery.gradients_flow),
        _asked("collapse agrees", battery.collapse_agrees),
        _asked("contract restores", battery.contract_restores),
        _asked("fuse agrees", battery.fuse_agrees),
        _asked("torch.compile agrees", battery.compile_agrees),
        _asked("the model is untouched", lambda where: Outcome(where, untouched.check(model, where))),
    ]
    return Report(_described(model), tuple(outcomes))


def _asked(name: str, ask: Callable[[str], Outcome]) -> Outcome:
    """The outcome of a property; a pass that refuses the model, saying why, has skipped it."""
    try:
        found = ask(name)
        if found.agreement is None or found.agreement.decisive:
            return found
        reason = f"rounding alone may move the result by {found.agreement.bound:.1e} of its norm; ask in a wider dtype"
        return Outcome(name, skipped=reason)
    except (PropertyError, ToleranceError):
        raise
    except FxExpandError as refused:
        return Outcome(name, skipped=str(refused))
    except Exception as error:
        raise PropertyError(f"{name}: expected the pass to run, it raised {type(error).__name__}: {error}") from error


class _Battery:
    """The models that the passes make of one, made as they are asked for, and what they were observed to do."""

    def __init__(self, model: nn.Module, inputs: tuple[object, ...], rules: Rules, backend: Any) -> None:
        self.model, self.inputs, self.rules, self.backend = model, inputs, rules, backend
        self._before: Observed | None = None
        self._big: Observed | None = None
        self._fused: Observed | None = None
        self._nothing: FxExpandError | None = None

    @property
    def before(self) -> Observed:
        if self._before is None:
            self._before = observed(self.model, self.inputs)
        return self._before

    def big(self) -> Observed:
        """The expanded model. Raises ``FxExpandError`` where there is none."""
        if self._nothing is not None:
            raise FxExpandError(f"nothing was expanded: {self._nothing}")
        if self._big is None:
            try:
                expanded = expand(self.model, self.rules)
            except FxExpandError as reason:
                self._nothing = reason
                raise
            self._big = observed(expanded, self.inputs)
        return self._big

    def expand_preserves(self, where: str) -> Outcome:
        big = self.big()
        count = sum(isinstance(module, Expanded) for module in big.model.modules())
        return Outcome(where, f"{count} layers expanded", agreement=agreement(where, self.before, big))

    def gradients_flow(self, where: str) -> Outcome:
        self.big()
        _must_have_gradients(self.model, self.inputs)
        return Outcome(where, gradients_flow(where, self.model, self.big().model, self.inputs))

    def collapse_agrees(self, where: str) -> Outcome:
        big = self.big()
        fast = observed(collapse(big.model), self.inputs)
        found = agreement(where, big, fast)
        try:
            _must_have_gradients(self.model, self.inputs)
        except FxExpandError as reason:
            return Outcome(where, str(reason), agreement=found)
        backward = gradients_agree(where, big.model, fast.model, self.inputs)
        return Outcome(where, f"gradients to {backward.error:.1e}", agreement=found)

    def contract_restores(self, where: str) -> Outcome:
        big = self.big()
        small = contract(big.model)
        _same_state(where, self.model, small)
        _same_modules(where, self.model, small)
        restored = copy.deepcopy(self.model)
        restored.load_state_dict(small.state_dict(), strict=True)
        agreement(where, big, observed(small, self.inputs))
        after = observed(restored, self.inputs)
        found = agreement(where, self.before, after, through=[big.rounding])
        self._big = None  # the last property that looks at it: large models need the room
        return Outcome(where, f"{len(small.state_dict())} tensors under their names", agreement=found)

    def fuse_agrees(self, where: str) -> Outcome:
        self._fused = observed(fuse(copy.deepcopy(self.model).eval(), *copied(self.inputs)), self.inputs)
        found = agreement(where, self.before, self._fused, merged=True)
        macs = [summary(each, *self.inputs).macs for each in (self.model, self._fused.model)]
        before, after = macs
        if before is None or after is None:
            return Outcome(where, "MACs unknown", agreement=found)
        if after > before:
            raise PropertyError(f"{where}: expected at most {before} multiply-accumulates, found {after}.")
        return Outcome(where, f"{before} -> {after} MACs", agreement=found)

    def compile_agrees(self, where: str) -> Outcome:
        if self.backend is None:
            return Outcome(where, skipped="backend=None")
        fused = self._fused
        if fused is None:
            return Outcome(where, skipped="there is no fused model")
        try:
            compiled = self._compiled(fused)
        except Exception as error:
            reason = self._why_it_does_not_compile()
            if reason is None:
                raise PropertyError(f"{where}: the model compiles, and fused it raises {error!r}") from error
            return Outcome(where, skipped=f"torch.compile does not take the model itself: {reason}")
        return Outcome(where, f"by {self.backend}", agreement=agreement(where, self.before, compiled))

    def _compiled(self, plain: Observed) -> Observed:
        torch.compiler.reset()
        compiled: Any = torch.compile(plain.model, backend=self.backend)
        return replace(observed(compiled, self.inputs, like=plain.rounding), model=plain.model)

    def _why_it_does_not_compile(self) -> str | None:
        try:
            self._compiled(replace(self.before, model=copy.deepcopy(self.model)))
        except Exception as error:  # noqa: BLE001 -- compilers raise what they like
            return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        return None


def _must_have_gradients(model: nn.Module, inputs: tuple[object, ...]) -> None:
    """Raise ``FxExpandError`` where autograd cannot go through the model as it came, which changes values in place."""
    try:
        gradients(model, inputs)
    except RuntimeError as error:
        reason = str(error).partition(":")[0]
        raise FxExpandError(f"the model itself has no gradients in eval mode: {reason}") from error


def _same_state(where: str, model: nn.Module, small: nn.Module) -> None:
    before, after = model.state_dict(), small.state_dict()
    if list(before) != list(after):
        missing, more = [k for k in before if k not in after], [k for k in after if k not in before]
        raise PropertyError(f"{where}: expected the keys of the state_dict, without: {missing}, beyond them: {more}.")
    for key, old in before.items():
        new = after[key]
        if isinstance(old, Tensor) and (old.shape, old.dtype, old.device) != (new.shape, new.dtype, new.device):
            raise PropertyError(
                f"{where}: {key}: expected {old.dtype} of shape {tuple(old.shape)} on {old.device}, "
                f"found {new.dtype} of shape {tuple(new.shape)} on {new.device}."
            )


def _same_modules(where: str, model: nn.Module, small: nn.Module) -> None:
    """The layers have their old classes and names; what holds them may have become a graph."""
    after = dict(small.named_modules(remove_duplicate=False))
    for path, module in model.named_modules(remove_duplicate=False):
        if not is_layer(module) or not path or path not in after:
            continue  # a graph keeps only what it calls
        if not isinstance(after[path], type(module)):
            raise PropertyError(
                f"{where}: {path}: expected a {type(module).__name__}, found a {type(after[path]).__name__}."
            )


def _moved(
    model: nn.Module, inputs: tuple[object, ...], device: torch.device | str | None, dtype: torch.dtype | None
) -> tuple[nn.Module, tuple[object, ...]]:
    def move(x: Tensor) -> Tensor:
        return x.to(device=device, dtype=dtype if x.is_floating_point() else None)

    moved: tuple[object, ...] = pytree.tree_map_only(Tensor, move, copied(inputs))
    return copy.deepcopy(model).to(device=device, dtype=dtype), moved


def _described(model: nn.Module) -> str:
    first = next(model.parameters(), None)
    where = "" if first is None else f", {str(first.dtype).removeprefix('torch.')} on {first.device}"
    count = sum(parameter.numel() for parameter in model.parameters())
    return f"{type(model).__name__}: {count} parameters{where}"
