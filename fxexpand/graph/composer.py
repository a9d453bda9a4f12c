"""A chain multiplied out at every step of training, with as little as can be between torch's operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fxexpand.algebra.composition import Composition
from fxexpand.algebra.kernel import Kernel
from fxexpand.algebra.order import Order, compose_in
from fxexpand.algebra.refusal import Refusal
from fxexpand.graph.lines import in_lines
from fxexpand.graph.modes import exact_products, is_followed


@dataclass(frozen=True, eq=False)
class Composer:
    """Composes a chain as its ``plan`` says: in a training step by one function of autograd, in straight lines.

    Autograd would record a node for every view, which for small weights costs more than the products.
    """

    plan: Composition

    @staticmethod
    def of(order: Order, chain: Sequence[Kernel]) -> Composer | None:
        """That of ``chain``, kernels with shapes at least, in ``order``; None where there is no plan."""
        plan = Composition.of(order, chain)
        return None if plan is None else Composer(plan)

    def numbers(
        self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
    ) -> tuple[Tensor, Tensor | None] | None:
        """(weight, bias) of the whole, from those of the layers; None where other layers have a bias than planned."""
        plan = self.plan
        if not plan.fits(biases):
            return None
        if not plan.steps:
            return weights[0], biases[0]
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            whole = plan.numbers((*weights, *biases))
            return whole[0][-1], whole[1][-1]
        weight, bias = _Composed.apply(self, *weights, *biases)
        source = plan.sources[-1]
        return weight, bias if plan.has_own_bias or source is None else biases[source]

    @cached_property
    def lines(self) -> tuple[Callable[..., list[Any]], Callable[..., list[Any]]]:
        """Forward and backward, each in straight lines.

        (*weights, *biases) of the layers -> (weight, bias, *between): of the whole, and what the backward pass needs
        besides; the bias is None where it is not the whole's own. (*weights, *biases, *between, weight's gradient,
        bias's gradient) -> the gradients of the first two.
        """
        plan = self.plan

        def forward(*tensors: Any) -> list[Any]:
            numbers = plan.numbers(tensors)
            return [numbers[0][-1], numbers[1][-1] if plan.has_own_bias else None, *plan.between(numbers)]

        def backward(*tensors: Any) -> list[Any]:
            *saved, weight, bias = tensors
            return plan.pulled(plan.kept(saved), weight, bias if plan.has_own_bias else None)

        inputs, between = 2 * plan.layers, 3 * len(plan.steps) - 2
        return in_lines(forward, inputs), in_lines(backward, inputs + between + 2)

    def __getstate__(self) -> dict[str, Any]:  # without the lines, which are made again
        return {"plan": self.plan}

    def __deepcopy__(self, memo: dict[int, Any]) -> Composer:  # nothing in it changes
        return self


class _Composed(torch.autograd.Function):
    """(weight, bias) of the whole; the bias is None where it is that of a layer, or none.

    What lies between is kept for the backward pass without derivatives of its own; where that pass is differentiated in
    turn, it is computed once more.
    """

    @staticmethod
    def forward(ctx: Any, how: Composer, *tensors: Tensor | None) -> tuple[Any, Any]:
        weight, bias, *between = how.lines[0](*tensors)
        ctx.how = how
        ctx.save_for_backward(*tensors, *between)
        ctx.set_materialize_grads(False)
        return weight, bias

    @staticmethod
    def backward(ctx: Any, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, ...]:
        how: Composer = ctx.how
        saved, plan = ctx.saved_tensors, how.plan
        with exact_products(saved[0].device.type):
            if torch.is_grad_enabled() or forward_ad._current_level >= 0:
                return (None, *plan.pulled(plan.numbers(saved[: 2 * plan.layers]), weight, bias))
            whole = weight is not None and (bias is not None or not plan.has_own_bias)
            if whole and not torch._C._are_functorch_transforms_active():
                return (None, *how.lines[1](*saved, weight, bias))
            return (None, *plan.pulled(plan.kept(saved), weight, bias))


def composed(order: Order, how: Composer | None, chain: Sequence[Kernel]) -> tuple[Tensor, Tensor | None] | Refusal:
    """(weight, bias) of ``chain`` in ``order``: by ``how``, planned for it, where that fits and no compiler follows."""
    if how is not None and not is_followed():
        numbers = how.numbers([kernel.weight for kernel in chain], [kernel.bias for kernel in chain])
        if numbers is not None:
            return numbers
    whole = compose_in(order, chain)
    return whole if isinstance(whole, Refusal) else (whole.weight, whole.bias)
