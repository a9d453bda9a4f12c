"""An expansion that runs as one layer."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxexpand.algebra.kernel import Ints, Kernel
from fxexpand.algebra.order import Order, cheapest_order, compose_in
from fxexpand.algebra.refusal import Refusal
from fxexpand.algebra.step_cost import StepCost, collapsed_step, explicit_step
from fxexpand.graph.expanded import PAD, Expanded
from fxexpand.graph.layers import peculiarity
from fxexpand.graph.lift import lift_bare


class Collapsed(Expanded):
    """An expansion that composes its layers' weights at each call, and applies the one layer that they make up.

        y = reduce(kernel(expand(x)))  becomes  y = (reduce ∘ kernel ∘ expand)(x)

    The same children, parameters and ``state_dict`` keys, the same gradients, and no wide activations. It composes in
    the dtype of the parameters, also under autocast, and never keeps the result: weights may change in ways that no
    version counter sees.
    """

    if TYPE_CHECKING:  # TorchScript reads the annotations of classes, and knows no such types
        _recipe: tuple[tuple[str, Ints, Ints, int], ...]
        _order: Order
        _entry: tuple[list[int], str] | None

    @staticmethod
    def refusal(expanded: Expanded) -> Refusal | None:
        """Why ``expanded`` cannot run as one layer, or None where it can."""
        whole = expanded.as_kernel(torch.float64)
        if isinstance(whole, Refusal):
            return whole
        for path, layer in _leaves(expanded):
            found = peculiarity(layer)
            if found is not None:
                return found.at(path)
        order = cheapest_order(_kernels(expanded))
        return order if isinstance(order, Refusal) else None

    @staticmethod
    def adopt(expanded: Expanded) -> None:
        """Make ``expanded`` run as one layer; it stays the same object."""
        order = cheapest_order([kernel.to(device="meta") for kernel in _kernels(expanded)])
        if isinstance(order, Refusal):
            raise TypeError(f"no layer is all of these: {order}")
        expanded.__class__ = Collapsed
        state: dict[str, Any] = vars(expanded)
        names = [path for path, _ in _leaves(expanded)]
        state["_order"] = order
        state["_recipe"] = tuple(
            (path, kernel.stride, kernel.dilation, kernel.groups)
            for path, kernel in zip(names, _kernels(expanded), strict=True)
        )
        padding = expanded.entry_padding
        zeros = padding is None or (padding[0] == "zeros" and all(a == b for a, b in padding[1]))
        state["_entry"] = None if zeros or padding is None else _pad_arguments(*padding)

    @staticmethod
    def step_costs(expanded: Expanded, size: Ints, batch: int) -> tuple[StepCost, StepCost]:
        """What a training step costs ``expanded`` layer by layer, and as one layer, for ``batch`` signals of a size."""
        chain = [kernel.to(device="meta") for kernel in _kernels(expanded)]
        order = cheapest_order(chain)
        if isinstance(order, Refusal):
            raise TypeError(f"no layer is all of these: {order}")
        padded = [replace(chain[0], padding=expanded.origin.geometry.padding), *chain[1:]]
        return explicit_step(padded, size, batch), collapsed_step(order, padded, size, batch)

    def release(self) -> None:
        """Make it run layer by layer again."""
        for name in ("_order", "_recipe", "_entry"):
            del vars(self)[name]
        self.__class__ = Expanded  # type: ignore[assignment]  # that is the point

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 -- the name that layers of torch have
        """One layer's output: (batch, m, *size) -> (batch, n, *size), or (*, m) -> (*, n)."""
        geometry = self.origin.geometry
        with torch.autocast(input.device.type, enabled=False):  # bfloat16 products would lose four digits
            kernel = self._composed()
        if geometry.dims == 0:
            return F.linear(input, kernel.weight, kernel.bias)
        padding = tuple(before for before, _ in geometry.padding)
        if self._entry is not None:
            amounts, mode = self._entry
            input, padding = F.pad(input, amounts, mode=mode), (0,) * geometry.dims  # noqa: A001
        convolve = (F.conv1d, F.conv2d, F.conv3d)[geometry.dims - 1]
        return convolve(input, kernel.weight, kernel.bias, geometry.stride, padding, geometry.dilation, geometry.groups)

    def _composed(self) -> Kernel:
        kernels = []
        for path, stride, dilation, groups in self._recipe:
            layer: Any = self.get_submodule(path)
            kernels.append(Kernel(layer.weight, layer.bias, stride, (), dilation, groups))
        whole = compose_in(self._order, kernels)
        if isinstance(whole, Refusal):
            raise RuntimeError(f"the layers of this {self.origin.description} are no longer one layer: {whole}")
        return whole


def _leaves(expanded: Expanded) -> list[tuple[str, nn.Module]]:
    """(path, layer) of the layers in turn; the padding before them is none."""
    return [(path, module) for path, module in expanded.in_turn() if path.rpartition(".")[2] != PAD]


def _kernels(expanded: Expanded) -> list[Kernel]:
    lifted = [lift_bare(layer) for _, layer in _leaves(expanded)]
    return [kernel for kernel in lifted if isinstance(kernel, Kernel)]


def _pad_arguments(mode: str, sides: tuple[tuple[int, int], ...]) -> tuple[list[int], str]:
    """What ``F.pad`` takes for (before, after) pairs, one an axis."""
    amounts = [amount for pair in reversed(sides) for amount in pair]
    return amounts, "constant" if mode == "zeros" else mode
