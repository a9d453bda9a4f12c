"""Compositions as functions with derivatives of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fxexpand.algebra.bias import over_taps
from fxexpand.algebra.modes import exact_products

if TYPE_CHECKING:
    from fxexpand.algebra.composition import Composition, Numbers


class Composed(torch.autograd.Function):
    """The composition of a chain, for transforms of ``torch.func``.

    Its intermediate results are results too, so that second derivatives see them: the weights of the steps, then the
    biases that are their own.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(how: Composition, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        weights, biases = list(tensors[: how.layers]), list(tensors[how.layers :])
        how.run(weights, biases)
        return (*weights[how.layers :], *(biases[slot] for slot in how.made))  # type: ignore[arg-type]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.how = inputs[0]
        ctx.save_for_backward(*inputs[1:], *output)
        ctx.save_for_forward(*inputs[1:], *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        how: Composition = ctx.how
        numbers = _numbers(how, ctx.saved_tensors)
        pulled: list[Any] = [*(None,) * how.layers, *gradients[: len(how.steps)]]
        fallen: list[Any] = [None] * len(pulled)
        for slot, gradient in zip(how.made, gradients[len(how.steps) :], strict=True):
            fallen[slot] = gradient
        with exact_products(numbers[0][0].device.type):
            how.pull(numbers, pulled, fallen)
        return (None, *pulled[: how.layers], *fallen[: how.layers])

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        how: Composition = ctx.how
        numbers = _numbers(how, ctx.saved_tensors)
        moved, risen = list(tangents[: how.layers]), list(tangents[how.layers :])
        how.push(numbers, moved, risen)
        weights, biases, _totals = numbers
        slots = [(moved[slot], weights[slot]) for slot in range(how.layers, len(weights))]
        slots += [(risen[slot], biases[slot]) for slot in how.made]
        return tuple(torch.zeros_like(primal) if tangent is None else tangent for tangent, primal in slots)


def _numbers(how: Composition, saved: Sequence[Any]) -> Numbers:
    """Those that go with the tensors given to ``Composed``, and what it gave."""
    n, results = how.layers, len(how.steps)
    weights, biases = [*saved[:n], *saved[2 * n : 2 * n + results]], list(saved[n : 2 * n])
    own = dict(zip(how.made, saved[2 * n + results :], strict=True))
    totals: list[Tensor | None] = []
    for slot, step in enumerate(how.steps, start=n):
        biases.append(own.get(slot, biases[step.second]))
        totals.append(None if biases[step.first] is None else over_taps(weights[step.second], step.shape))
    return weights, biases, totals


class ComposedAtOnce(torch.autograd.Function):
    """The same where no transform of ``torch.func`` is at work: (weight, bias) of the whole, the bias None where it is
    that of a layer, or none.

    Nothing here but what a training step needs, in straight lines. What lies between is kept for the backward pass
    without derivatives of its own; where that pass is differentiated in turn, it is computed once more.
    """

    @staticmethod
    def forward(ctx: Any, how: Composition, *tensors: Tensor | None) -> tuple[Any, Any]:
        weight, bias, *between = how.lines[0](*tensors)
        ctx.how = how
        ctx.save_for_backward(*tensors, *between)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)
        return weight, bias

    @staticmethod
    def backward(ctx: Any, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, ...]:
        how: Composition = ctx.how
        saved = ctx.saved_tensors
        differentiated = torch.is_grad_enabled() or forward_ad._current_level >= 0
        with exact_products(saved[0].device.type):
            if differentiated:
                return (None, *how.pulled(how.anew(saved[: 2 * how.layers]), weight, bias))
            whole = weight is not None and (bias is not None or not how.has_own_bias)
            if whole and not torch._C._are_functorch_transforms_active():
                return (None, *how.lines[1](*saved, weight, bias))
            return (None, *how.pulled(how.kept(saved), weight, bias))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor, Tensor | None]:
        how: Composition = ctx.how
        numbers = how.anew(ctx.saved_tensors)
        moved, risen = list(tangents[: how.layers]), list(tangents[how.layers :])
        how.push(numbers, moved, risen)
        weight = torch.zeros_like(numbers[0][-1]) if moved[-1] is None else moved[-1]
        if not how.has_own_bias:
            return weight, None
        return weight, torch.zeros_like(numbers[1][-1]) if risen[-1] is None else risen[-1]
