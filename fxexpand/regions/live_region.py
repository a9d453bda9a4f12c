"""A linear region that runs as one layer while it is trained."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fxexpand.algebra.affine import Affine
from fxexpand.algebra.composition import Composition, exact_products
from fxexpand.algebra.order import Order, compose_in
from fxexpand.algebra.refusal import Refusal
from fxexpand.graph.layers import has_hooks
from fxexpand.graph.record import Record
from fxexpand.regions.live import LiveStep, map_of_steps


class LiveRegion(nn.Module):
    """Composes the weights of the layers of a region at each call, and applies the one layer that they make up.

        y = bn(conv_2(conv_1(x)))  becomes  y = (bn ∘ conv_2 ∘ conv_1)(x)

    The layers stay where they are in the model: this module has no parameters and no ``state_dict`` keys of its own.
    ``parts`` are composed in ``order``, ``like`` is the whole without numbers. As soon as one of ``switches`` (batch
    norm, dropout), which were in eval mode, is in training mode, the region is no one layer: ``record`` runs instead.
    So it does for a layer that has got hooks, which composing would not call.
    """

    if TYPE_CHECKING:
        _parts: tuple[tuple[LiveStep, ...], ...]
        _order: Order
        _composition: Composition | None
        _like: Affine
        _record: Record
        _switches: tuple[nn.Module, ...]

    def __init__(
        self,
        parts: tuple[tuple[LiveStep, ...], ...],
        order: Order,
        composition: Composition | None,
        like: Affine,
        record: Record,
        switches: tuple[nn.Module, ...],
    ) -> None:
        super().__init__()
        # In tuples and other values, not as children: they belong to the model, under the paths that they have there.
        self._parts, self._order, self._composition = parts, order, composition
        self._like, self._record, self._switches = like, record, switches

    @property
    def record(self) -> Record:
        """The nodes that it stands for."""
        return self._record

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 -- the name that layers of torch have
        """One layer's output, (batch, m, *size) -> (batch, n, *size), or (*, m) -> (*, n)."""
        if any(module.training for module in self._switches) or any(map(has_hooks, self._record.modules)):
            found: Tensor = self._record.run(input)
            return found
        with exact_products(input.device.type):
            weight, bias = self._composed()
        return replace(self._like, kernel=replace(self._like.kernel, weight=weight, bias=bias)).apply(input)

    def _composed(self) -> tuple[Tensor, Tensor | None]:
        maps = [map_of_steps(steps) for steps in self._parts]
        kernels = [found.kernel for found in maps if found is not None]
        if self._composition is not None and not torch.compiler.is_compiling():
            return self._composition([kernel.weight for kernel in kernels], [kernel.bias for kernel in kernels])
        whole = compose_in(self._order, kernels)
        if isinstance(whole, Refusal):
            raise RuntimeError(f"a region that was one layer is none any more: {whole}")
        return whole.weight, whole.bias
