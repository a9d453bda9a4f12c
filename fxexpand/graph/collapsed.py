"""An expansion that runs as one layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, fx, nn

from fxexpand.algebra.kernel import Ints, Kernel
from fxexpand.algebra.memory_format import common_format, in_format
from fxexpand.algebra.refusal import Refusal
from fxexpand.algebra.step_cost import StepCost, applied_step
from fxexpand.graph.assembly import Assembly, Path, at
from fxexpand.graph.expanded import Expanded, ExpandedChain, ExpandedSum
from fxexpand.graph.fingerprint import Fingerprint
from fxexpand.graph.memory import KernelMemory
from fxexpand.graph.modes import exact_products, is_followed


class Collapsed(Expanded):
    """An expansion that composes its layers' weights at each call, and applies the one layer that they make up.

        y = reduce(kernel(expand(x)))  becomes  y = (reduce ∘ kernel ∘ expand)(x)

    The same children, parameters and ``state_dict`` keys, the same gradients, and no wide activations. It composes in
    the dtype of the parameters, also under autocast, and never uses a result again in a forward: weights may change in
    ways that no version counter sees. When a layer is not as it was (it has hooks, is another one, or is batch norm in
    training mode) all run in turn. Hooks for all modules there are see this one, not its layers: counters of operations
    are such hooks.

    The weight of the last forward can be had once, for the penalty that belongs to the same training step.
    """

    if TYPE_CHECKING:  # TorchScript reads the annotations of classes, and knows no such types
        _assembly: Assembly
        _expected: tuple[tuple[Path, Fingerprint], ...]
        _memory: KernelMemory

    @staticmethod
    def adopt(expanded: Expanded, assembly: Assembly) -> None:
        """Make ``expanded`` run as the one layer of its ``assembly``; it stays the same object."""
        expanded.__class__ = CollapsedSum if isinstance(expanded, ExpandedSum) else CollapsedChain
        inside = [(path, module) for path, module in expanded.named_modules() if path]
        state: dict[str, Any] = vars(expanded)
        state["_assembly"] = assembly
        state["_expected"] = tuple((tuple(path.split(".")), Fingerprint.of(module)) for path, module in inside)
        state["_memory"] = KernelMemory()

    @staticmethod
    def step_costs(assembly: Assembly, size: Ints, batch: int) -> tuple[StepCost, StepCost]:
        """What a training step costs layer by layer, and as one layer, for ``batch`` signals of spatial ``size``."""
        explicit, composing = assembly.steps(size, batch)
        applied = applied_step(assembly.like, size, batch)
        return explicit, composing + StepCost(applied.macs, applied.activations)

    def release(self) -> None:
        """Make it run layer by layer again."""
        for name in ("_assembly", "_expected", "_memory"):
            del vars(self)[name]
        self.__class__ = ExpandedSum if isinstance(self, ExpandedSum) else ExpandedChain  # type: ignore[assignment]

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 -- the name that layers of torch have
        """One layer's output: (batch, m, *size) -> (batch, n, *size), or (*, m) -> (*, n)."""
        layers = None if isinstance(cast(object, input), fx.Proxy) else self._as_they_were()
        if layers is None:
            return self._in_turn(input)
        kernel = self._composed(input.device.type)
        if isinstance(kernel, Refusal):
            return self._in_turn(input)
        weight = kernel.weight
        if self._memory.wanted and not is_followed():
            self._memory.keep(weight, self._sources())
        if weight.dim() > 2:
            held = [layer._parameters.get("weight") for layer in layers]
            weight = in_format(weight, common_format(held))
        return self._assembly.like.apply_with(input, weight, kernel.bias)

    def weight_of_step(self) -> Tensor | Refusal:
        """The weight of the one layer, (n, m / groups, *k): the last forward's if it still holds, else composed now.

        The last forward's comes with that forward's graph, and is given once: who asks again gets one of their own.
        """
        kept = None if is_followed() else self._memory.take(self._sources())
        if kept is not None:
            return kept
        device = next(self.parameters()).device.type
        if self._as_they_were() is not None:
            whole = self._composed(device)
        else:
            with exact_products(device):
                whole = self.as_kernel(running=True)
        return whole if isinstance(whole, Refusal) else whole.weight

    def _as_they_were(self) -> list[nn.Module] | None:
        """The modules inside, if each is what it was when the layers were planned."""
        modules: list[nn.Module] = []
        for path, expected in self._expected:
            module = at(self, path)
            if not expected.matches(module):
                return None
            modules.append(module)
        return modules

    def _sources(self) -> list[Tensor]:
        """The tensors that the weight depends on, and those that the bias does."""
        modules = [at(self, path) for path, _ in self._expected]
        held = [[*module._parameters.values(), *module._buffers.values()] for module in modules]
        return [tensor for tensors in held for tensor in tensors if tensor is not None]

    def _in_turn(self, x: Tensor) -> Tensor:
        if not is_followed():
            self._memory.forget()
        found: Tensor = super().forward(x)
        return found

    def _composed(self, device: str) -> Kernel | Refusal:
        with exact_products(device):
            return self._assembly.kernel(self, _as_it_is)


class CollapsedChain(Collapsed, ExpandedChain):
    """Layers one after another that run as one."""


class CollapsedSum(Collapsed, ExpandedSum):
    """Branches side by side that run as one layer."""


def _as_it_is(tensor: Tensor | None) -> Tensor | None:
    return tensor
