"""What one training step costs a chain of layers, applied in turn or composed first: forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from fxexpand.algebra.affine import Affine
from fxexpand.algebra.compose import compose
from fxexpand.algebra.kernel import Ints, Kernel
from fxexpand.algebra.order import Order, composition_work
from fxexpand.algebra.refusal import Refusal

# Multiply-accumulates that take as long as one element of an activation, one of a weight, and one operation. Fitted
# (non-negative least squares of relative errors) to the times of 47 layers on one core of a Xeon with AVX-512, from
# 0.2 to 1,100 ms a step; benchmarks/collapse_sites.py measures and fits them again.
_ACTIVATION, _WEIGHT, _OPERATION = 590, 84, 4_400_000


@dataclass(frozen=True)
class StepCost:
    """The work of one step: multiply-accumulates of forward and backward, elements of activations and weights that
    are written, and operations that run.
    """

    macs: int = 0
    activations: int = 0
    weights: int = 0
    operations: int = 0

    def __add__(self, other: StepCost) -> StepCost:
        return StepCost(
            self.macs + other.macs,
            self.activations + other.activations,
            self.weights + other.weights,
            self.operations + other.operations,
        )

    @property
    def total(self) -> int:
        """The time it takes, in multiply-accumulates."""
        terms = _ACTIVATION * self.activations + _WEIGHT * self.weights + _OPERATION * self.operations
        return self.macs + terms


def applied_step(layer: Affine, size: Ints, batch: int) -> StepCost:
    """The cost of applying one layer to ``batch`` signals of spatial size ``size``."""
    outputs = layer.kernel.out_channels * prod(layer.output_size(size)) * batch
    # Backward multiplies twice: for the gradient of the input, and of the weight.
    return StepCost(3 * layer.macs(size) * batch, outputs, layer.kernel.weight.numel(), 1)


def composed_step(order: Order, chain: Sequence[Kernel]) -> StepCost:
    """The cost of composing the layers in ``order``."""
    weights = sum(kernel.weight.numel() for kernel in chain)
    # An operation for each layer's weight, for its bias, and for the gradients of both.
    return _composed(order, chain)[0] + StepCost(0, 0, weights, 3 * len(chain))


def added_step(branches: int, elements: int) -> StepCost:
    """The cost of laying out ``branches`` weights of that many ``elements`` alike, and adding them; and back."""
    return StepCost(0, 0, 2 * branches * elements, 3 * branches)


def _composed(order: Order, chain: Sequence[Kernel]) -> tuple[StepCost, Kernel | Refusal]:
    if isinstance(order, int):
        return StepCost(), chain[order]
    (a, first), (b, second) = _composed(order[0], chain), _composed(order[1], chain)
    if isinstance(first, Refusal) or isinstance(second, Refusal):
        return a + b, first if isinstance(first, Refusal) else second
    whole = compose(first, second)
    if isinstance(whole, Refusal):
        return a + b, whole
    macs, moved = composition_work(first, second)
    return a + b + StepCost(3 * macs, 0, moved + whole.weight.numel(), 0), whole
