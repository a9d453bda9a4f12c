"""A chain multiplied out at every step of training: the checks once, then the products and their gradients alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fxexpand.algebra.bias import bias_after, over_taps, pull_bias
from fxexpand.algebra.compose import compose
from fxexpand.algebra.kernel import Ints, Kernel
from fxexpand.algebra.order import Order
from fxexpand.algebra.product import Product, product_of
from fxexpand.algebra.refusal import Refusal

# The weights and biases by slot, and Σ_u W₂ by step, where a bias comes before W₂.
Numbers: TypeAlias = tuple[Sequence[Any], Sequence[Any], Sequence[Any]]


@dataclass(frozen=True, eq=False)
class Composition:
    """How the weights and biases of a chain give those of the one kernel that it is, and its gradients theirs.

    The numbers are those of ``compose_in``, without its checks of every pair at every call. All shapes are known
    beforehand: nothing here asks a tensor, so that it can be traced.

    A kernel is known by its slot: those of the chain, then the results of the steps. ``sources`` has for each slot the
    one whose bias it has: another's where a layer without bias comes first, None where there is none.
    """

    layers: int
    steps: tuple[_Step, ...]
    sources: tuple[int | None, ...]

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
        return [bias is None for bias in biases] == [source is None for source in self.sources[: self.layers]]

    @property
    def has_own_bias(self) -> bool:
        """Whether the whole has a bias that is none of the layers'."""
        source = self.sources[-1]
        return source is not None and source >= self.layers

    def numbers(self, tensors: Sequence[Any]) -> Numbers:
        """The numbers of all slots, from (*weights, *biases) of the layers."""
        weights, biases = list(tensors[: self.layers]), self._present(tensors[self.layers :])
        totals: list[Tensor | None] = []
        for step in self.steps:
            second, first_bias, second_bias = weights[step.second], biases[step.first], biases[step.second]
            weights.append(step.product.weight(weights[step.first], second))
            total = None if first_bias is None else over_taps(second, step.shape)
            biases.append(second_bias if total is None else bias_after(first_bias, total, second_bias, step.groups))
            totals.append(total)
        return weights, biases, totals

    def between(self, numbers: Numbers) -> list[Any]:
        """What ``pulled`` needs of ``numbers`` besides those of the layers."""
        weights, biases, totals = numbers
        return [*weights[self.layers : -1], *biases[self.layers : -1], *totals]

    def kept(self, tensors: Sequence[Any]) -> Numbers:
        """The numbers of all slots but the last, from (*weights, *biases) of the layers and those ``between``."""
        n, inner = self.layers, len(self.steps) - 1
        weights, biases, between = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
        totals = [
            None if self.sources[step.first] is None else total
            for step, total in zip(self.steps, between[2 * inner :], strict=True)
        ]
        return [*weights, *between[:inner]], self._present([*biases, *between[inner : 2 * inner]]), totals

    def pulled(self, numbers: Numbers, weight: Tensor | None, bias: Tensor | None) -> list[Any]:
        """The gradients of (*weights, *biases) of the layers, from those of the whole; None where there is none."""
        weights, biases, totals = numbers
        inner: list[Any] = [None] * (len(self.sources) - 1)
        pulled, fallen = [*inner, weight], [*inner, bias]  # the gradients of weights and of biases, by slot
        for slot in range(len(inner), self.layers - 1, -1):
            step, total = self.steps[slot - self.layers], totals[slot - self.layers]
            first, second, gradient, after = step.first, step.second, fallen[slot], None
            if pulled[slot] is not None:
                before, after = step.product.pull(weights[first], weights[second], pulled[slot])
                pulled[first] = _sum(pulled[first], before)
            if gradient is not None and total is not None:
                before, tap = pull_bias(biases[first], total, gradient, step.groups)
                fallen[first] = _sum(fallen[first], before)
                after = _at_each_tap(after, tap, step.shape)
            if gradient is not None and biases[second] is not None:
                fallen[second] = _sum(fallen[second], gradient)
            pulled[second] = _sum(pulled[second], after)
        return [*pulled[: self.layers], *fallen[: self.layers]]

    def _present(self, biases: Sequence[Any]) -> list[Any]:
        """``biases`` of the first slots, with None where there is none: a function that is traced gets proxies."""
        sources = self.sources[: len(biases)]
        return [None if source is None else bias for bias, source in zip(biases, sources, strict=True)]


def _laid_out(steps: tuple[_Step, ...], biased: Sequence[bool]) -> Composition:
    """The composition by ``steps`` of as many layers as ``biased`` has entries: whether each has a bias."""
    sources = [slot if has_bias else None for slot, has_bias in enumerate(biased)]
    for step in steps:
        sources.append(sources[step.second] if sources[step.first] is None else len(sources))
    return Composition(len(biased), steps, tuple(sources))


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
