"""A chain multiplied out at every step of training: the checks once, then the products and their derivatives alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fxexpand.algebra.bias import bias_after, over_taps, pull_bias
from fxexpand.algebra.compose import compose
from fxexpand.algebra.composing import Composed, ComposedAtOnce
from fxexpand.algebra.kernel import Ints, Kernel
from fxexpand.algebra.lines import in_lines
from fxexpand.algebra.modes import is_followed
from fxexpand.algebra.order import Order, compose_in
from fxexpand.algebra.product import Product, product_of
from fxexpand.algebra.refusal import Refusal

# The weights and biases by slot, and Σ_u W₂ by step, where a bias comes before W₂.
Numbers: TypeAlias = tuple[Sequence[Any], Sequence[Any], Sequence[Any]]


@dataclass(frozen=True, eq=False)
class Composition:
    """How the weights and biases of a chain give those of the one kernel that it is.

    The numbers are those of ``compose_in``. That checks every pair at every call, and records a node for autograd at
    every view, which for small weights costs more than the products; here one function stands for the whole, with its
    derivatives written out, second ones and all transforms of ``torch.func`` included.

    A kernel is known by its slot: those of the chain, then the results of the steps. ``sources`` has for each slot the
    one whose bias it has: another's where a layer without bias comes first, None where there is none. ``given`` are the
    slots of the layers that have one.
    """

    layers: int
    steps: tuple[_Step, ...]
    sources: tuple[int | None, ...]
    given: tuple[int, ...]

    @staticmethod
    def of(order: Order, chain: Sequence[Kernel]) -> Composition | None:
        """That of ``chain``, kernels with shapes at least, in ``order``.

        None where kernels of different groups meet, which ``compose`` writes with equal ones first.
        """
        steps: list[_Step] = []
        whole = _planned(order, chain, steps)
        return None if whole is None else _laid_out(tuple(steps), [kernel.bias is not None for kernel in chain])

    def __call__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, Tensor | None]:
        """(weight, bias) of the whole, from those of the layers. Raises ``ValueError`` where biases do not fit."""
        numbers = self.numbers(weights, biases)
        if numbers is None:
            raise ValueError(f"expected biases of the layers {self.given}, and no others")
        return numbers

    def numbers(
        self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
    ) -> tuple[Tensor, Tensor | None] | None:
        """The same, or None where biases do not fit: with more of them than planned it may not be exact."""
        if tuple([slot for slot, bias in enumerate(biases) if bias is not None]) != self.given:
            return None
        if not self.steps:
            return weights[0], biases[0]
        if torch._C._are_functorch_transforms_active():
            made = Composed.apply(self, *weights, *biases)
            weight, bias = made[len(self.steps) - 1], made[-1]
        else:
            weight, bias = ComposedAtOnce.apply(self, *weights, *biases)
        source = self.sources[-1]
        if source is None or source >= self.layers:
            return weight, None if source is None else bias
        return weight, biases[source]

    @property
    def has_own_bias(self) -> bool:
        """Whether the whole has a bias that is none of the layers'."""
        source = self.sources[-1]
        return source is not None and source >= self.layers

    @property
    def made(self) -> tuple[int, ...]:
        """The slots of steps with a bias of their own."""
        return tuple(slot for slot in range(self.layers, len(self.sources)) if self.sources[slot] == slot)

    @cached_property
    def lines(self) -> tuple[Callable[..., list[Any]], Callable[..., list[Any]]]:
        """Forward and backward, each in straight lines.

        (*weights, *biases) of the layers -> (weight, bias, *between): of the whole, and what the backward pass needs
        besides; the bias is None where it is not the whole's own. (*weights, *biases, *between, weight's gradient,
        bias's gradient) -> the gradients of the first two.
        """

        def forward(*tensors: Any) -> list[Any]:
            weights, biases, totals = self.anew(tensors)
            own = biases[-1] if self.has_own_bias else None
            return [weights[-1], own, *weights[self.layers : -1], *biases[self.layers : -1], *totals]

        def backward(*tensors: Any) -> list[Any]:
            *saved, weight, bias = tensors
            return self.pulled(self.kept(saved), weight, bias if self.has_own_bias else None)

        inputs, between = 2 * self.layers, 3 * len(self.steps) - 2
        return in_lines(forward, inputs), in_lines(backward, inputs + between + 2)

    def __getstate__(self) -> dict[str, Any]:  # without the lines, which are made again
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __deepcopy__(self, memo: dict[int, Any]) -> Composition:  # nothing in it changes
        return self

    def anew(self, tensors: Sequence[Any]) -> Numbers:
        """The numbers of all slots, from (*weights, *biases) of the layers."""
        weights, biases = list(tensors[: self.layers]), self._present(tensors[self.layers :])
        return weights, biases, self.run(weights, biases)

    def kept(self, tensors: Sequence[Any]) -> Numbers:
        """The numbers of all slots but the last, from (*weights, *biases) of the layers and what ``lines`` gives."""
        n, inner = self.layers, len(self.steps) - 1
        weights, biases, between = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
        totals = [
            None if self.sources[step.first] is None else total
            for step, total in zip(self.steps, between[2 * inner :], strict=True)
        ]
        return [*weights, *between[:inner]], self._present([*biases, *between[inner : 2 * inner]]), totals

    def pulled(self, numbers: Numbers, weight: Tensor | None, bias: Tensor | None) -> list[Any]:
        """The gradients of (*weights, *biases) of the layers, from those of the whole."""
        inner = self.layers + len(self.steps) - 1
        pulled, fallen = [*(None,) * inner, weight], [*(None,) * inner, bias]
        self.pull(numbers, pulled, fallen)
        return [*pulled[: self.layers], *fallen[: self.layers]]

    def _present(self, biases: Sequence[Any]) -> list[Any]:
        """``biases`` of the first slots, with None where there is none: a function that is traced gets proxies."""
        sources = self.sources[: len(biases)]
        return [None if source is None else bias for bias, source in zip(biases, sources, strict=True)]

    def run(self, weights: list[Any], biases: list[Any]) -> list[Tensor | None]:
        """Adds the results of the steps to the ``weights`` and ``biases`` of the layers.

        Gives for each step Σ_u W₂, or None where no bias comes before W₂.
        """
        totals: list[Tensor | None] = []
        for step in self.steps:
            second, first_bias, second_bias = weights[step.second], biases[step.first], biases[step.second]
            weights.append(step.product.weight(weights[step.first], second))
            total = None if first_bias is None else over_taps(second, step.shape)
            biases.append(second_bias if total is None else bias_after(first_bias, total, second_bias, step.groups))
            totals.append(total)
        return totals

    def pull(self, numbers: Numbers, pulled: list[Any], fallen: list[Any]) -> None:
        """Adds to the gradients of the layers' weights, ``pulled``, and biases, ``fallen``, what the results' give.

        One entry a slot in each, None where there is no gradient.
        """
        weights, biases, totals = numbers
        for slot in range(len(pulled) - 1, self.layers - 1, -1):
            step = self.steps[slot - self.layers]
            first, second, after = step.first, step.second, None
            if pulled[slot] is not None:
                before, after = step.product.pull(weights[first], weights[second], pulled[slot])
                pulled[first] = _sum(pulled[first], before)
            gradient, total = fallen[slot], totals[slot - self.layers]
            if gradient is not None:
                if total is not None:
                    before, tap = pull_bias(biases[first], total, gradient, step.groups)
                    fallen[first] = _sum(fallen[first], before)
                    after = _at_each_tap(after, tap, step.shape)
                if biases[second] is not None:
                    fallen[second] = _sum(fallen[second], gradient)
            pulled[second] = _sum(pulled[second], after)

    def push(self, numbers: Numbers, moved: list[Any], risen: list[Any]) -> None:
        """Adds the tangents of the results to those of the layers' weights, ``moved``, and biases, ``risen``."""
        weights, biases, totals = numbers
        for step, total in zip(self.steps, totals, strict=True):
            first, second = weights[step.first], weights[step.second]
            d_first, d_second, d_beside = moved[step.first], moved[step.second], risen[step.second]
            by_first = None if d_first is None else step.product.weight(d_first, second)
            moved.append(_sum(by_first, None if d_second is None else step.product.weight(first, d_second)))
            if total is None:
                risen.append(d_beside)
                continue
            through = None
            if d_second is not None:
                through = bias_after(biases[step.first], over_taps(d_second, step.shape), None, step.groups)
            if risen[step.first] is not None:
                through = _sum(through, bias_after(risen[step.first], total, None, step.groups))
            risen.append(_sum(through, d_beside))


def _laid_out(steps: tuple[_Step, ...], biased: Sequence[bool]) -> Composition:
    """The composition by ``steps`` of as many layers as ``biased`` has entries: whether each has a bias."""
    sources = [slot if has_bias else None for slot, has_bias in enumerate(biased)]
    given = tuple(slot for slot in sources if slot is not None)
    for step in steps:
        sources.append(sources[step.second] if sources[step.first] is None else len(sources))
    return Composition(len(biased), steps, tuple(sources), given)


@dataclass(frozen=True, eq=False)
class _Step:
    """Two kernels, by their position: those of the chain first, then the results of the steps before."""

    first: int
    second: int
    product: Product
    groups: int  # of the second
    shape: Ints  # of the second's weight


def _at_each_tap(after: Tensor | None, tap: Tensor, shape: Ints) -> Tensor:
    """``after``, (n, c/G, *k), with ``tap``, (n, c/G), added to each tap: in place where no transform may have one of
    them in a batch and the other not. Another tensor of its size costs as much as the product.
    """
    spread = tap.reshape(*shape[:2], *(1,) * (len(shape) - 2))
    if after is None:
        return spread.expand(shape)
    return after + spread if torch._C._are_functorch_transforms_active() else after.add_(spread)


def composed(order: Order, how: Composition | None, chain: Sequence[Kernel]) -> tuple[Tensor, Tensor | None] | Refusal:
    """(weight, bias) of ``chain`` in ``order``: by ``how``, planned for it, where that fits and no compiler follows."""
    biases = [kernel.bias for kernel in chain]
    if how is not None and not is_followed():
        numbers = how.numbers([kernel.weight for kernel in chain], biases)
        if numbers is not None:
            return numbers
    whole = compose_in(order, chain)
    return whole if isinstance(whole, Refusal) else (whole.weight, whole.bias)


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
    shape = tuple(second[1].weight.shape)
    steps.append(_Step(first[0], second[0], product, second[1].groups, shape))
    return len(chain) + len(steps) - 1, whole
