"""An expansion that runs as one layer."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, fx, nn

from fxexpand.algebra.affine import Affine, Border
from fxexpand.algebra.composition import Composition, composed, exact_products, is_followed
from fxexpand.algebra.kernel import Ints, Kernel
from fxexpand.algebra.order import Order, cheapest_order
from fxexpand.algebra.refusal import Refusal
from fxexpand.algebra.step_cost import StepCost, collapsed_step, explicit_step
from fxexpand.graph.expanded import PAD, Expanded
from fxexpand.graph.fingerprint import Fingerprint
from fxexpand.graph.lift import lift_bare
from fxexpand.graph.memory import KernelMemory


class Collapsed(Expanded):
    """An expansion that composes its layers' weights at each call, and applies the one layer that they make up.

        y = reduce(kernel(expand(x)))  becomes  y = (reduce ∘ kernel ∘ expand)(x)

    The same children, parameters and ``state_dict`` keys, the same gradients, and no wide activations. It composes in
    the dtype of the parameters, also under autocast, and never uses a result again in a forward: weights may change in
    ways that no version counter sees. When a layer is not as it was (it has hooks, or is another one) all run in turn.
    Hooks for all modules there are see this one, not its layers: counters of operations are such hooks.

    The weight of the last forward can be had once, for the penalty that belongs to the same training step.
    """

    if TYPE_CHECKING:  # TorchScript reads the annotations of classes, and knows no such types
        _layers: tuple[tuple[tuple[str, ...], Kernel], ...]  # (path, kernel without numbers) of those in turn
        _like: Affine  # the one layer without numbers
        _expected: tuple[tuple[tuple[str, ...], Fingerprint], ...]
        _order: Order
        _composition: Composition | None
        _memory: KernelMemory

    @staticmethod
    def order_of(expanded: Expanded) -> Order | Refusal:
        """The order to compose the layers of ``expanded`` in, or why they cannot run as one layer."""
        whole = expanded.as_kernel(sketch=True)
        return whole if isinstance(whole, Refusal) else cheapest_order(_sketches(expanded))

    @staticmethod
    def adopt(expanded: Expanded, order: Order) -> None:
        """Make ``expanded`` run as one layer, composed in ``order``; it stays the same object."""
        whole, sketches = expanded.as_kernel(sketch=True), _sketches(expanded)
        assert isinstance(whole, Kernel), "an expansion with an order is one layer"
        expanded.__class__ = Collapsed
        state: dict[str, Any] = vars(expanded)
        inside = [(path, module) for path, module in expanded.named_modules() if path]
        state["_expected"] = tuple((tuple(path.split(".")), Fingerprint.of(module)) for path, module in inside)
        state["_order"] = order
        state["_composition"] = Composition.of(order, sketches)
        paths = [tuple(path.split(".")) for path, _ in _leaves(expanded)]
        state["_layers"] = tuple(zip(paths, sketches, strict=True))
        state["_like"] = _like(expanded, whole.detach())
        state["_memory"] = KernelMemory()

    @staticmethod
    def step_costs(expanded: Expanded, order: Order, size: Ints, batch: int) -> tuple[StepCost, StepCost]:
        """What a training step costs ``expanded`` layer by layer, and as one layer, for ``batch`` signals of a size."""
        first, *others = _sketches(expanded)
        chain = [replace(first, padding=expanded.origin.geometry.padding), *others]
        return explicit_step(chain, size, batch), collapsed_step(order, chain, size, batch)

    def release(self) -> None:
        """Make it run layer by layer again."""
        for name in ("_expected", "_order", "_composition", "_layers", "_like", "_memory"):
            del vars(self)[name]
        self.__class__ = Expanded  # type: ignore[assignment]  # that is the point

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 -- the name that layers of torch have
        """One layer's output: (batch, m, *size) -> (batch, n, *size), or (*, m) -> (*, n)."""
        if isinstance(cast(object, input), fx.Proxy) or not self._is_as_it_was():
            return self._in_turn(input)
        with exact_products(input.device.type):
            numbers = self._composed()
        if isinstance(numbers, Refusal):
            return self._in_turn(input)
        if not is_followed():
            self._memory.keep(numbers[0], self._sources())
        return self._like.over(*numbers).apply(input)

    def weight_of_step(self) -> Tensor | Refusal:
        """The weight of the one layer, (n, m / groups, *k): the last forward's if it still holds, else composed now.

        The last forward's comes with that forward's graph, and is given once: who asks again gets one of their own.
        """
        kept = None if is_followed() else self._memory.take(self._sources())
        if kept is not None:
            return kept
        with exact_products(next(self.parameters()).device.type):
            if not self._is_as_it_was():
                whole = self.as_kernel()
                return whole if isinstance(whole, Refusal) else whole.weight
            numbers = self._composed()
        return numbers if isinstance(numbers, Refusal) else numbers[0]

    def _is_as_it_was(self) -> bool:
        return all(expected.matches(self._at(path)) for path, expected in self._expected)

    def _sources(self) -> list[Tensor]:
        """The tensors that the weight depends on, and those that the bias does."""
        modules = [self._at(path) for path, _ in self._expected]
        held = [[*module._parameters.values(), *module._buffers.values()] for module in modules]
        return [tensor for tensors in held for tensor in tensors if tensor is not None]

    def _in_turn(self, x: Tensor) -> Tensor:
        if not is_followed():
            self._memory.forget()
        found: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return found

    def _composed(self) -> tuple[Tensor, Tensor | None] | Refusal:
        """(weight, bias) of the one layer."""
        layers = [(self._at(path), sketch) for path, sketch in self._layers]
        return composed(
            self._order, self._composition, [sketch.over(layer.weight, layer.bias) for layer, sketch in layers]
        )

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
    return [kernel.detach().to(device="meta") for kernel in lifted if isinstance(kernel, Kernel)]


def _like(expanded: Expanded, whole: Kernel) -> Affine:
    """``whole``, with the padding before the layers."""
    mode, sides = expanded.entry_padding or ("zeros", ())
    return Affine(replace(whole, padding=sides)) if mode == "zeros" else Affine(whole, Border(mode, sides))
