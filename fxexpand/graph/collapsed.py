"""An expansion that runs as one layer."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxexpand.algebra.composition import Composition, exact_products, is_followed
from fxexpand.algebra.kernel import Ints, Kernel, pad_amounts
from fxexpand.algebra.order import Order, cheapest_order, compose_in
from fxexpand.algebra.refusal import Refusal
from fxexpand.algebra.step_cost import StepCost, collapsed_step, explicit_step
from fxexpand.graph.expanded import PAD, Expanded
from fxexpand.graph.fingerprint import Fingerprint
from fxexpand.graph.lift import lift_bare


class Collapsed(Expanded):
    """An expansion that composes its layers' weights at each call, and applies the one layer that they make up.

        y = reduce(kernel(expand(x)))  becomes  y = (reduce ∘ kernel ∘ expand)(x)

    The same children, parameters and ``state_dict`` keys, the same gradients, and no wide activations. It composes in
    the dtype of the parameters, also under autocast, and never keeps the result: weights may change in ways that no
    version counter sees. When a layer is not as it was (it has hooks, or is another one) all run in turn.
    Hooks for all modules there are see this one, not its layers: counters of operations are such hooks.
    """

    if TYPE_CHECKING:  # TorchScript reads the annotations of classes, and knows no such types
        _recipe: tuple[tuple[tuple[str, ...], Ints, Ints, int], ...]
        _expected: tuple[tuple[tuple[str, ...], Fingerprint], ...]
        _order: Order
        _composition: Composition | None
        _entry: tuple[list[int], str] | None

    @staticmethod
    def order_of(expanded: Expanded) -> Order | Refusal:
        """The order to compose the layers of ``expanded`` in, or why they cannot run as one layer."""
        whole = expanded.as_kernel(sketch=True)
        return whole if isinstance(whole, Refusal) else cheapest_order(_sketches(expanded))

    @staticmethod
    def adopt(expanded: Expanded, order: Order) -> None:
        """Make ``expanded`` run as one layer, composed in ``order``; it stays the same object."""
        expanded.__class__ = Collapsed
        state: dict[str, Any] = vars(expanded)
        sketches = _sketches(expanded)
        inside = [(path, module) for path, module in expanded.named_modules() if path]
        state["_expected"] = tuple((tuple(path.split(".")), Fingerprint.of(module)) for path, module in inside)
        state["_order"] = order
        state["_composition"] = Composition.of(order, sketches)
        state["_recipe"] = tuple(
            (tuple(path.split(".")), kernel.stride, kernel.dilation, kernel.groups)
            for (path, _), kernel in zip(_leaves(expanded), sketches, strict=True)
        )
        mode, sides = expanded.entry_padding or ("zeros", ())
        own = mode == "zeros" and all(before == after for before, after in sides)
        state["_entry"] = None if own else (pad_amounts(sides), "constant" if mode == "zeros" else mode)

    @staticmethod
    def step_costs(expanded: Expanded, order: Order, size: Ints, batch: int) -> tuple[StepCost, StepCost]:
        """What a training step costs ``expanded`` layer by layer, and as one layer, for ``batch`` signals of a size."""
        first, *others = _sketches(expanded)
        chain = [replace(first, padding=expanded.origin.geometry.padding), *others]
        return explicit_step(chain, size, batch), collapsed_step(order, chain, size, batch)

    def release(self) -> None:
        """Make it run layer by layer again."""
        for name in ("_expected", "_order", "_composition", "_recipe", "_entry"):
            del vars(self)[name]
        self.__class__ = Expanded  # type: ignore[assignment]  # that is the point

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 -- the name that layers of torch have
        """One layer's output: (batch, m, *size) -> (batch, n, *size), or (*, m) -> (*, n)."""
        geometry = self.origin.geometry
        traced = isinstance(cast(object, input), fx.Proxy)
        if traced or not all(expected.matches(self._at(path)) for path, expected in self._expected):
            found: Tensor = super().forward(input)  # type: ignore[no-untyped-call]
            return found
        with exact_products(input.device.type):
            weight, bias = self._composed()
        if geometry.dims == 0:
            return F.linear(input, weight, bias)
        padding = tuple(before for before, _ in geometry.padding)
        if self._entry is not None:
            amounts, mode = self._entry
            input, padding = F.pad(input, amounts, mode=mode), (0,) * geometry.dims  # noqa: A001
        convolve = (F.conv1d, F.conv2d, F.conv3d)[geometry.dims - 1]
        return convolve(input, weight, bias, geometry.stride, padding, geometry.dilation, geometry.groups)

    def _composed(self) -> tuple[Tensor, Tensor | None]:
        layers: list[Any] = [self._at(names) for names, *_ in self._recipe]
        # A compiler sees through the checks, and through plain operations better than through a function of ours.
        if self._composition is not None and not is_followed():
            return self._composition([layer.weight for layer in layers], [layer.bias for layer in layers])
        kernels = [
            Kernel(layer.weight, layer.bias, stride, (), dilation, groups)
            for layer, (_, stride, dilation, groups) in zip(layers, self._recipe, strict=True)
        ]
        whole = compose_in(self._order, kernels)
        if isinstance(whole, Refusal):
            raise RuntimeError(f"the layers of this {self.origin.description} are no longer one layer: {whole}")
        return whole.weight, whole.bias

    def _at(self, names: tuple[str, ...]) -> Any:
        module: Any = self
        for name in names:
            module = module._modules[name]
        return module


def _leaves(expanded: Expanded) -> list[tuple[str, nn.Module]]:
    """(path, layer) of the layers in turn; the padding before them is none."""
    return [(path, module) for path, module in expanded.in_turn() if path.rpartition(".")[2] != PAD]


def _sketches(expanded: Expanded) -> list[Kernel]:
    """The kernels of the layers in turn, with shapes and no numbers."""
    lifted = [lift_bare(layer) for _, layer in _leaves(expanded)]
    return [kernel.to(device="meta") for kernel in lifted if isinstance(kernel, Kernel)]
