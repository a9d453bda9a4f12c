"""The one layer that a structure of layers makes up: planned once, and made of the layers' weights as they are then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from math import prod
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from fxexpand.algebra.affine import Affine, Border, identity, in_series, in_sum
from fxexpand.algebra.channelwise import averaging, normalizing
from fxexpand.algebra.combine import add
from fxexpand.algebra.kernel import Ints, Kernel
from fxexpand.algebra.order import Order, cheapest_order
from fxexpand.algebra.refusal import Refusal
from fxexpand.algebra.step_cost import StepCost, added_step, applied_step, composed_step
from fxexpand.graph.composer import Composer, composed
from fxexpand.graph.geometry import DIMS, spread
from fxexpand.graph.layers import has_hooks, peculiarity
from fxexpand.graph.lift import lift_padded, padding_of
from fxexpand.graph.modes import is_followed
from fxexpand.graph.structure import Series, Sum

Path: TypeAlias = tuple[str, ...]
Cast: TypeAlias = Callable[[Any], Any]

# Why batch norm is no part of a layer while it trains.
TRAINING = "batch norm in training mode; call model.eval() first"
_NORMS: dict[type[nn.Module], int | None] = {
    nn.BatchNorm1d: 1,
    nn.BatchNorm2d: 2,
    nn.BatchNorm3d: 3,
    nn.SyncBatchNorm: None,
}
_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


@dataclass(frozen=True, eq=False)
class Leaf:
    """A module, its map without numbers, and the one number that its weight holds where it has no tensors.

    ``bare``: that number is 1, and the map is padding at most. ``layer``: its weight and bias are those of the map.
    """

    path: Path
    like: Affine
    fill: float | None = None
    bare: bool = False
    layer: bool = False

    def kernel(self, root: nn.Module, cast: Cast, beside: Tensor | None = None) -> Kernel:
        """The map of the module as it is now; padding of another mode than zeros is left out.

        ``cast`` is what becomes of its tensors first. ``beside`` tells dtype and device where it has none; a parameter
        of ``root`` by default.
        """
        module, like = at(root, self.path), self.like.kernel
        if self.layer:
            return like.over(cast(module.weight), cast(module.bias))
        beside = cast(next(root.parameters())) if beside is None else beside
        if self.fill is not None:
            return like.over(torch.full(like.weight.shape, self.fill, dtype=beside.dtype, device=beside.device), None)
        mean, var, weight, bias = map(cast, (module.running_mean, module.running_var, module.weight, module.bias))
        scale, shift = normalizing(mean, var, weight, bias, module.eps)
        # Batch norm is often kept in float32 beside layers in half precision.
        return like.over(scale.to(beside.dtype).reshape(like.weight.shape), shift.to(beside.dtype))

    def steps(self, size: Ints, batch: int) -> tuple[StepCost, StepCost]:
        """What a training step costs: applying it to ``batch`` signals of spatial size ``size``, and composing it."""
        return StepCost() if self.bare else applied_step(self.like, size, batch), StepCost()


@dataclass(frozen=True, eq=False)
class Chain:
    """Parts one after another. ``order`` is how those that are no bare padding are composed."""

    like: Affine
    parts: tuple[Assembly, ...]
    composed: tuple[Assembly, ...]
    order: Order
    how: Composer | None
    layers: tuple[Path, ...]  # those of ``composed``, where all are layers with a weight

    def kernel(self, root: nn.Module, cast: Cast, beside: Tensor | None = None) -> Kernel | Refusal:
        if self.layers and self.how is not None and not is_followed():
            modules = [at(root, path) for path in self.layers]
            weights, biases = [cast(module.weight) for module in modules], [cast(module.bias) for module in modules]
            found = self.how.numbers(weights, biases)
            if found is not None:
                return self.like.kernel.over(*found)
        kernels: list[Kernel] = []
        for part in self.composed:
            kernel = part.kernel(root, cast, beside)
            if isinstance(kernel, Refusal):
                return kernel
            kernels.append(kernel)
        numbers = composed(self.order, self.how, kernels)
        return numbers if isinstance(numbers, Refusal) else self.like.kernel.over(*numbers)

    def steps(self, size: Ints, batch: int) -> tuple[StepCost, StepCost]:
        explicit, composing = StepCost(), composed_step(self.order, [part.like.kernel for part in self.composed])
        for part in self.parts:
            own, inner = part.steps(size, batch)
            explicit, composing = explicit + own, composing + inner
            size = part.like.output_size(size)
        return explicit, composing


@dataclass(frozen=True, eq=False)
class Total:
    """Branches side by side."""

    like: Affine
    parts: tuple[Assembly, ...]

    def kernel(self, root: nn.Module, cast: Cast, beside: Tensor | None = None) -> Kernel | Refusal:
        return reduce(_added, (part.kernel(root, cast, beside) for part in self.parts))

    def steps(self, size: Ints, batch: int) -> tuple[StepCost, StepCost]:
        branches, weight = len(self.parts), self.like.kernel.weight.numel()
        outputs = self.like.kernel.out_channels * prod(self.like.output_size(size)) * batch
        explicit = StepCost(0, (branches - 1) * outputs, 0, branches - 1)
        composing = added_step(branches, weight)
        for part in self.parts:
            own, inner = part.steps(size, batch)
            explicit, composing = explicit + own, composing + inner
        return explicit, composing


Assembly: TypeAlias = "Leaf | Chain | Total"


def at(root: nn.Module, path: Path) -> Any:
    """The module at ``path``, as it is now."""
    module: Any = root
    for name in path:
        module = module._modules[name]
    return module


def assembly_of(root: nn.Module, channels: int, dims: int, *, running: bool = False) -> Assembly | Refusal:
    """What ``root``, made of Series, Sum and layers, makes up for a signal of ``channels`` and ``dims`` axes.

    Or why that is no one layer. ``running``: batch norm counts as it does in eval mode, whatever mode it is in.
    """
    return _Planner(dims, running).planned(root, (), channels)


@dataclass(frozen=True)
class _Planner:
    dims: int
    running: bool

    def planned(self, module: nn.Module, path: Path, channels: int) -> Assembly | Refusal:
        if path and isinstance(module, (Series, Sum)):
            where = ".".join(path)
            if has_hooks(module):
                return Refusal("it has hooks, which would be lost; remove them first", where)
            if type(module) not in (Series, Sum) and not hasattr(module, "origin"):  # as an expansion has
                return Refusal(f"{type(module).__name__} may have a forward of its own; use Series or Sum", where)
        if isinstance(module, (Series, Sum)):
            found = self._parts(module, path, channels)
            if isinstance(found, Refusal):
                return found
            like, parts = found
            return _chain(like, parts) if isinstance(module, Series) else Total(like, parts)
        leaf = self._leaf(module, path, channels)
        return leaf.at(".".join(path)) if isinstance(leaf, Refusal) else leaf

    def _parts(self, module: Series | Sum, path: Path, channels: int) -> tuple[Affine, tuple[Assembly, ...]] | Refusal:
        """The map of the parts together, and the parts."""
        in_turn = isinstance(module, Series)
        parts: list[Assembly] = []
        like: Affine | None = None
        for name, child in module._modules.items():
            part = self.planned(child, (*path, name), channels)
            if isinstance(part, Refusal):
                return part
            joined = part.like if like is None else (in_series if in_turn else in_sum)(like, part.like)
            if isinstance(joined, Refusal):
                return joined if in_turn else joined.at(".".join((*path, name)))
            like, channels = joined, joined.kernel.out_channels if in_turn else channels
            parts.append(part)
        return Refusal("it holds nothing") if like is None else (like, tuple(parts))

    def _leaf(self, module: nn.Module, path: Path, channels: int) -> Leaf | Refusal:
        if isinstance(module, tuple(DIMS)):
            return _layer(module, path)
        if has_hooks(module):
            return Refusal("it has hooks, which would be lost; remove them first")
        neutral = identity(self.dims, channels).to(device="meta").kernel  # float64, as all sketches are
        padding = padding_of(module)
        if padding is not None:
            mode, sides = padding
            own = replace(neutral, padding=sides) if mode == "zeros" else neutral
            return Leaf(path, Affine(own, None if mode == "zeros" else Border(mode, sides)), 1.0, bare=True)
        if type(module) is nn.Identity:
            return Leaf(path, Affine(neutral), 1.0, bare=True)
        if type(module) in _NORMS:
            return _norm(cast(nn.BatchNorm2d, module), path, neutral, running=self.running)
        if type(module) in _POOLS:
            return _pool(module, path, channels, self.dims)
        return Refusal(f"{type(module).__name__} is no convolution or linear layer")


def _chain(like: Affine, parts: tuple[Assembly, ...]) -> Chain | Refusal:
    kept = tuple(part for part in parts if not (isinstance(part, Leaf) and part.bare)) or parts[:1]
    kernels = [part.like.kernel for part in kept]
    order = cheapest_order(kernels)
    if isinstance(order, Refusal):
        return order
    plain = all(isinstance(part, Leaf) and part.layer for part in kept)
    layers = tuple(part.path for part in kept if isinstance(part, Leaf)) if plain else ()
    return Chain(like, parts, kept, order, Composer.of(order, kernels), layers)


def _layer(module: nn.Module, path: Path) -> Leaf | Refusal:
    lifted = lift_padded(module)
    if isinstance(lifted, Refusal):
        return lifted
    refusal = peculiarity(module)
    if refusal is not None:
        return refusal
    kernel, mode, sides = lifted
    border = None if mode == "zeros" else Border(mode, sides)
    return Leaf(path, Affine(kernel.detach().to(dtype=torch.float64, device="meta"), border), layer=True)


def _norm(norm: nn.BatchNorm2d, path: Path, neutral: Kernel, *, running: bool) -> Leaf | Refusal:
    if norm.running_mean is None or norm.running_var is None:
        return Refusal("it keeps no running statistics: it normalises each batch by its own")
    if neutral.dims == 0:
        return Refusal("it normalises axis 1, where a linear layer has its features on the last one")
    if _NORMS[type(norm)] not in (None, neutral.dims):
        return Refusal(f"{type(norm).__name__} is not for signals with {neutral.dims} spatial axes")
    if norm.training and not running:
        return Refusal(TRAINING)
    shift = torch.empty(norm.num_features, dtype=torch.float64, device="meta")
    if norm.num_features != neutral.out_channels:
        return Refusal(f"it normalises {norm.num_features} channels, found {neutral.out_channels}")
    return Leaf(path, Affine(neutral.over(neutral.weight, shift)))


def _pool(pool: Any, path: Path, channels: int, dims: int) -> Leaf | Refusal:
    window, stride = spread(pool.kernel_size, dims), spread(pool.stride, dims)
    if any(spread(pool.padding, dims)) or pool.ceil_mode or getattr(pool, "divisor_override", None):
        return Refusal("it pads, rounds up or has a divisor of its own; expected a plain average pool")
    return Leaf(path, Affine(averaging(channels, window, stride, dtype=torch.float64, device="meta")), 1 / prod(window))


def _added(a: Kernel | Refusal, b: Kernel | Refusal) -> Kernel | Refusal:
    if isinstance(a, Refusal) or isinstance(b, Refusal):
        return a if isinstance(a, Refusal) else b
    return add(a, b)
