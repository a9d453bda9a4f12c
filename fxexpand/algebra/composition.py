"""A chain multiplied out at every step of training: the checks once, then the products and their derivatives alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxexpand.algebra.bias import bias_after, pull_bias
from fxexpand.algebra.compose import compose
from fxexpand.algebra.kernel import Kernel
from fxexpand.algebra.order import Order, compose_in
from fxexpand.algebra.product import Product, product_of
from fxexpand.algebra.refusal import Refusal


@dataclass(frozen=True, eq=False)
class Composition:
    """How the weights and biases of a chain give those of the one kernel that it is.

    The numbers are those of ``compose_in``. That checks every pair at every call, and records a node for autograd at
    every view, which for small weights costs more than the products; here one function stands for the whole, with its
    derivatives written out. All transforms of ``torch.func`` go through it, and second derivatives.

    A kernel is known by its slot: those of the chain, then the results of the steps. ``sources`` has for each slot the
    one whose bias it has: another's where a layer without bias comes first, None where there is none. ``given`` and
    ``made`` are the slots with a bias of their own, of the chain and of the steps.
    """

    layers: int
    steps: tuple[_Step, ...]
    sources: tuple[int | None, ...]
    given: tuple[int, ...]
    made: tuple[int, ...]

    @staticmethod
    def of(order: Order, chain: Sequence[Kernel]) -> Composition | None:
        """That of ``chain``, kernels with shapes at least, in ``order``.

        None where kernels of different groups meet, which ``compose`` writes with equal ones first.
        """
        steps: list[_Step] = []
        whole = _planned(order, chain, steps)
        return None if whole is None else _laid_out(tuple(steps), [kernel.bias is not None for kernel in chain])

    def fits(self, biases: Sequence[Tensor | None]) -> bool:
        """Whether the layers that had a bias have one, and no others: with more of them it may not be exact."""
        return [slot for slot, bias in enumerate(biases) if bias is not None] == list(self.given)

    def __call__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, Tensor | None]:
        """(weight, bias) of the whole, from those of the layers. Raises ``ValueError`` where biases do not fit."""
        if not self.fits(biases):
            raise ValueError(f"expected biases of the layers {self.given}, and no others")
        if not self.steps:
            return weights[0], biases[0]
        function = _Composed if torch._C._are_functorch_transforms_active() else _ComposedAtOnce
        made = function.apply(self, *weights, *(biases[slot] for slot in self.given))
        last = self.sources[-1]
        if last is None or last < self.layers:
            return made[len(self.steps) - 1], None if last is None else biases[last]
        return made[len(self.steps) - 1], made[-1]

    def inputs(self, tensors: Sequence[Tensor | None]) -> tuple[list[Any], dict[int | None, Any]]:
        """The weights by slot and the biases by the slot that owns them, from those of the chain."""
        return list(tensors[: self.layers]), dict(zip(self.given, tensors[self.layers :], strict=True))

    def everything(self, tensors: Sequence[Tensor | None]) -> tuple[list[Any], dict[int | None, Any]]:
        """The same for those of the chain and, after them, of the steps."""
        inputs = self.layers + len(self.given)
        weights, biases = self.inputs(tensors[:inputs])
        weights += tensors[inputs : inputs + len(self.steps)]
        return weights, biases | dict(zip(self.made, tensors[inputs + len(self.steps) :], strict=True))

    def results(self, weights: list[Any], biases: dict[int | None, Any]) -> tuple[Any, ...]:
        """The weights and biases of the steps."""
        return (*weights[self.layers :], *(biases[slot] for slot in self.made))


def _laid_out(steps: tuple[_Step, ...], biased: Sequence[bool]) -> Composition:
    """The composition by ``steps`` of as many layers as ``biased`` has entries: whether each has a bias."""
    sources = [slot if has_bias else None for slot, has_bias in enumerate(biased)]
    given = tuple(slot for slot in sources if slot is not None)
    for step in steps:
        sources.append(sources[step.second] if sources[step.first] is None else len(sources))
    made = tuple(slot for slot in range(len(biased), len(sources)) if sources[slot] == slot)
    return Composition(len(biased), steps, tuple(sources), given, made)


@dataclass(frozen=True, eq=False)
class _Step:
    """Two kernels, by their position: those of the chain first, then the results of the steps before."""

    first: int
    second: int
    product: Product
    groups: int  # of the second


class _Composed(torch.autograd.Function):
    """The composition of a chain; its intermediate results are results too, so that second derivatives see them."""

    generate_vmap_rule = True

    @staticmethod
    def forward(how: Composition, *tensors: Tensor) -> tuple[Tensor, ...]:
        weights, biases = how.inputs(tensors)
        for step in how.steps:
            slot, second = len(weights), weights[step.second]
            weights.append(step.product.weight(weights[step.first], second))
            if how.sources[slot] == slot:
                biases[slot] = bias_after(
                    biases[how.sources[step.first]], second, biases.get(how.sources[step.second]), step.groups
                )
        return how.results(weights, biases)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.how = inputs[0]
        ctx.save_for_backward(*inputs[1:], *output)
        ctx.save_for_forward(*inputs[1:], *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        with exact_products(tensors[0].device.type):
            return None, *_pulled(ctx.how, tensors, gradients)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        return _pushed(ctx.how, ctx.saved_tensors, tangents)


class _ComposedAtOnce(torch.autograd.Function):
    """The same, where no transform of ``torch.func`` asks for the context apart: ``apply`` then binds the arguments to
    the signature at each call, which takes longer than a small product.
    """

    @staticmethod
    def forward(ctx: Any, how: Composition, *tensors: Tensor) -> tuple[Tensor, ...]:
        made = _Composed.forward(how, *tensors)
        _Composed.setup_context(ctx, (how, *tensors), made)
        return made

    backward, jvp = staticmethod(_Composed.backward), staticmethod(_Composed.jvp)


def _pulled(how: Composition, tensors: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients of what is given, from those of what is made."""
    weights, biases = how.everything(tensors)
    pulled, fallen = how.everything((*(None,) * (how.layers + len(how.given)), *gradients))
    for slot, step in reversed(list(enumerate(how.steps, start=how.layers))):
        first, second = weights[step.first], weights[step.second]
        after: Tensor | None = None
        if pulled[slot] is not None:
            before, after = step.product.pull(first, second, pulled[slot])
            pulled[step.first] = _sum(pulled[step.first], before)
        gradient = fallen.get(slot)
        if gradient is not None:
            source, beside = how.sources[step.first], how.sources[step.second]
            before, after = pull_bias(biases[source], second, gradient, step.groups, after)
            fallen[source] = _sum(fallen[source], before)
            if beside is not None:
                fallen[beside] = _sum(fallen[beside], gradient)
        pulled[step.second] = _sum(pulled[step.second], after)
    return [*pulled[: how.layers], *(fallen[slot] for slot in how.given)]


def _pushed(how: Composition, tensors: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """The tangents of what is made, from those of what is given: the product rule."""
    weights, biases = how.everything(tensors)
    moved, risen = how.inputs(tangents)
    for slot, step in enumerate(how.steps, start=how.layers):
        first, second = weights[step.first], weights[step.second]
        d_first, d_second = moved[step.first], moved[step.second]
        by_first = None if d_first is None else step.product.weight(d_first, second)
        moved.append(_sum(by_first, None if d_second is None else step.product.weight(first, d_second)))
        if how.sources[slot] == slot:
            source, d_beside = how.sources[step.first], risen.get(how.sources[step.second])
            by_weight = None if d_second is None else bias_after(biases[source], d_second, d_beside, step.groups)
            rest = d_beside if by_weight is None else None
            by_bias = rest if risen[source] is None else bias_after(risen[source], second, rest, step.groups)
            risen[slot] = _sum(by_weight, by_bias)
    found = how.results(moved, risen)
    made = how.results(weights, biases)
    return tuple(torch.zeros_like(p) if t is None else t for p, t in zip(made, found, strict=True))


_NOTHING = nullcontext()


def composed(order: Order, how: Composition | None, chain: Sequence[Kernel]) -> tuple[Tensor, Tensor | None] | Refusal:
    """(weight, bias) of ``chain`` in ``order``: by ``how``, planned for it, where that fits and no compiler follows."""
    biases = [kernel.bias for kernel in chain]
    if how is not None and how.fits(biases) and not is_followed():
        return how([kernel.weight for kernel in chain], biases)
    whole = compose_in(order, chain)
    return whole if isinstance(whole, Refusal) else (whole.weight, whole.bias)


def is_followed() -> bool:
    """Whether a compiler follows what runs: it sees through checks, and through plain operations better than through
    a function of ours.
    """
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


def exact_products(device: str) -> AbstractContextManager[None]:
    """No autocast: bfloat16 products would lose four digits."""
    if not torch._C._is_any_autocast_enabled():
        return _NOTHING
    enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if enabled else _NOTHING


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _planned(order: Order, chain: Sequence[Kernel], steps: list[_Step]) -> tuple[int, Kernel] | None:
    """(slot, kernel) of the chain composed in ``order``; its steps are added to ``steps``."""
    if isinstance(order, int):
        return order, chain[order]
    first = _planned(order[0], chain, steps)
    second = None if first is None else _planned(order[1], chain, steps)
    if first is None or second is None:
        return None
    product, whole = product_of(first[1], second[1]), compose(first[1], second[1])
    if product is None or isinstance(whole, Refusal):
        return None
    steps.append(_Step(first[0], second[0], product, second[1].groups))
    return len(chain) + len(steps) - 1, whole
