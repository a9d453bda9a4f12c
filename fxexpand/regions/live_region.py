"""A linear region that runs as one layer while it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx, nn

from fxexpand.algebra.affine import Affine
from fxexpand.algebra.memory_format import Laid, common_format, format_after, in_format
from fxexpand.algebra.order import Order
from fxexpand.algebra.refusal import Refusal
from fxexpand.graph.composer import Composer, composed
from fxexpand.graph.fingerprint import Fingerprint
from fxexpand.graph.modes import exact_products
from fxexpand.graph.record import Record
from fxexpand.regions.live import Called, Layer, LiveStep, map_of_steps


@dataclass(frozen=True, eq=False)
class Recipe:
    """How a region is composed: the steps of its ``parts``, in ``order``; ``like`` is the whole without numbers.

    ``rank`` is the number of axes that its input has to have, where that matters.
    """

    parts: tuple[tuple[LiveStep, ...], ...]
    order: Order
    composer: Composer | None
    like: Affine
    rank: int | None


class LiveRegion(nn.Module):
    """Composes the weights of the layers of a region at each call, and applies the one layer that they make up.

        y = bn(conv_2(conv_1(x)))  becomes  y = (bn ∘ conv_2 ∘ conv_1)(x)

    The layers stay where they are in the model, and are handed in: ``forward(x, conv_1, conv_2, bn)``. So whoever reads
    the graph sees what it depends on, and this module has no parameters of its own. When anything is not as it was
    planned (a layer that is another one, or has hooks, batch norm in training mode), the layers run in turn.
    """

    if TYPE_CHECKING:
        _recipe: Recipe
        _record: Record
        _expected: tuple[Fingerprint | tuple[int, ...], ...]

    def __init__(self, recipe: Recipe, record: Record, held: Sequence[Any]) -> None:
        super().__init__()
        self._recipe, self._record = recipe, record
        self._expected = tuple(tuple(x.shape) if isinstance(x, Tensor) else Fingerprint.of(x) for x in held)

    @property
    def like(self) -> Affine:
        """The one layer, without numbers."""
        return self._recipe.like

    @property
    def rank(self) -> int | None:
        """The number of axes that its input has to have, where that matters."""
        return self._recipe.rank

    @property
    def record(self) -> Record:
        """The nodes that it stands for."""
        return self._record

    def forward(self, input: Tensor, *held: Any) -> Tensor:  # noqa: A002 -- the name that layers of torch have
        """One layer's output, (batch, m, *size) -> (batch, n, *size), or (*, m) -> (*, n)."""
        if not self._is_as_planned(input, held):
            return self._in_turn(input, held)
        with exact_products(input.device.type):
            numbers = self.composed(held)
        if isinstance(numbers, Refusal):
            return self._in_turn(input, held)
        weight, bias = numbers
        return self._recipe.like.apply_with(input, in_format(weight, self.memory_format(held)), bias)

    def _in_turn(self, x: Tensor, held: Sequence[Any]) -> Tensor:
        found: Tensor = self._record.run(x, held)
        return found

    def _is_as_planned(self, x: Tensor, held: Sequence[Any]) -> bool:
        if isinstance(cast(object, x), fx.Proxy) or self._recipe.rank not in (None, x.dim()):
            return False
        pairs = list(zip(self._expected, held, strict=True))
        tensors = [(shape, tensor) for shape, tensor in pairs if isinstance(shape, tuple)]
        if any(tensor is None or tensor.shape != shape for shape, tensor in tensors):
            return False
        return all(expected.matches(module) for expected, module in pairs if isinstance(expected, Fingerprint))

    def memory_format(self, held: Sequence[Any]) -> torch.memory_format:
        """That of what the layers give in turn, of a contiguous input."""
        weights = [x if isinstance(x, Tensor) else x._parameters.get("weight") for x in held]
        if common_format(weight for weight in weights if weight is not None) is torch.contiguous_format:
            return torch.contiguous_format
        laid: list[Laid] = []
        for steps in self._recipe.parts:
            start = len(laid)  # the last step of the part before, which is what this part reads
            for step in steps:
                weight = step.live.weight(held) if isinstance(step.live, (Layer, Called)) else None
                sources = tuple(start + source for source in step.sources)
                laid.append(Laid(sources, weight, step.live is None and step.factors is None))
        return format_after(laid)

    def composed(self, held: Sequence[Any]) -> tuple[Tensor, Tensor | None] | Refusal:
        """(weight, bias) of the one layer."""
        maps: list[Affine] = []
        for steps in self._recipe.parts:
            found = map_of_steps(steps, held)
            if not isinstance(found, Affine):
                return found or Refusal("it leaves its input as it is")
            maps.append(found)
        kernels = [found.kernel for found in maps]
        if len({kernel.weight.dtype for kernel in kernels}) > 1:
            return Refusal("its layers have several dtypes")
        return composed(self._recipe.order, self._recipe.composer, kernels)
