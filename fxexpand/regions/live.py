"""Linear nodes the maps of which are made anew at each call, of the parameters as they are then, differentiably.

What they compute with is handed in as ``held``: modules and tensors by position, as ``Record`` numbers them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxexpand.algebra.affine import Affine, identity, in_concatenation, in_series, in_sum, swapped, times
from fxexpand.algebra.channelwise import depthwise, normalizing
from fxexpand.algebra.kernel import Kernel
from fxexpand.algebra.refusal import Refusal
from fxexpand.graph.geometry import DIMS
from fxexpand.graph.layers import BATCH_NORMS
from fxexpand.graph.record import Record
from fxexpand.regions.functional import NORM_NAMES
from fxexpand.regions.maps import shaped
from fxexpand.regions.parts import Join
from fxexpand.regions.reading import Reading
from fxexpand.regions.region import Stretch

Held: TypeAlias = Sequence[Any]

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_PRODUCTS = ("matmul", "mm")


class LiveMap(Protocol):
    """What gives the map of a node."""

    def map(self, held: Held) -> Affine | None:
        """The map, of the tensors as they are now; None where it leaves its input as it is."""


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer that is a module; ``like`` is its map without numbers."""

    like: Affine
    module: int

    def weight(self, held: Held) -> Tensor:
        """As the layer has it."""
        weight: Tensor = held[self.module].weight
        return weight

    def map(self, held: Held) -> Affine:
        module, weight = held[self.module], self.weight(held)
        if self.like.transposed is not None:
            weight = swapped(weight, self.like.kernel.groups)
        return self.like.over(weight, module.bias)


@dataclass(frozen=True, eq=False)
class Called:
    """A call with a weight, and perhaps a bias; ``turned``: ``x @ w``, in which a linear layer's is transposed."""

    like: Affine
    at: int
    bias: int | None
    turned: bool

    def weight(self, held: Held) -> Tensor:
        """As the call has it."""
        weight: Tensor = held[self.at]
        return weight

    def map(self, held: Held) -> Affine:
        weight = self.weight(held)
        bias = None if self.bias is None else held[self.bias]
        return self.like.over(weight.t() if self.turned else weight, bias)


@dataclass(frozen=True, eq=False)
class Normalizing:
    """Batch norm in eval mode, on ``dims`` spatial axes."""

    module: int
    dims: int

    def map(self, held: Held) -> Affine:
        norm = held[self.module]
        scale, shift = normalizing(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
        return Affine(depthwise(scale, shift, self.dims))


@dataclass(frozen=True, eq=False)
class CalledNorm:
    """``F.batch_norm`` with running statistics, on ``dims`` spatial axes."""

    mean: int
    var: int
    weight: int | None
    bias: int | None
    eps: float
    dims: int

    def map(self, held: Held) -> Affine:
        weight, bias = (None if at is None else held[at] for at in (self.weight, self.bias))
        scale, shift = normalizing(held[self.mean], held[self.var], weight, bias, self.eps)
        return Affine(depthwise(scale, shift, self.dims))


@dataclass(frozen=True, eq=False)
class Constant:
    """A map without parameters, in the dtype and on the device that the weight of ``beside`` has.

    ``fills`` are the number that all of its weight holds, and that of its bias; None where they hold several.
    """

    affine: Affine | None
    beside: Layer | Called
    fills: tuple[float, float | None] | None

    @staticmethod
    def of(affine: Affine | None, beside: Layer | Called) -> Constant:
        """``affine``, beside a layer."""
        numbers = [] if affine is None else [affine.kernel.weight, affine.kernel.bias]
        uniform = bool(numbers) and all(t is None or bool((t == t.flatten()[0]).all()) for t in numbers)
        fills = [None if t is None else float(t.flatten()[0]) for t in numbers] if uniform else []
        return Constant(affine, beside, (fills[0], fills[1]) if fills and fills[0] is not None else None)

    def map(self, held: Held) -> Affine | None:
        beside = self.beside.map(held).kernel.weight
        if self.affine is None:
            return None
        if self.fills is None:
            return self.affine.to(dtype=beside.dtype, device=beside.device)
        # Made anew, not copied: what follows the composition then sees numbers, and no tensor of ours.
        kernel, (fill, shift) = self.affine.kernel, self.fills
        bias = None if shift is None or kernel.bias is None else beside.new_full(kernel.bias.shape, shift)
        return self.affine.over(beside.new_full(kernel.weight.shape, fill), bias)


@dataclass(frozen=True, eq=False)
class Taught:
    """A module of the user's, and what the user says that it does; in the dtype of its parameters."""

    module: int
    lift: Callable[[Any], Kernel]

    def map(self, held: Held) -> Affine:
        module = held[self.module]
        first = next((t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()), None)
        kernel = self.lift(module)
        return Affine(kernel if first is None else kernel.to(dtype=first.dtype))


@dataclass(frozen=True, eq=False)
class LiveStep:
    """One node of a stretch. Values are known by position: 0 is what the stretch reads, 1 the first node's, …

    With ``live`` it applies a map to its only source. Otherwise it joins its sources: adds them, each times a factor,
    or concatenates them (``factors`` is None).
    """

    sources: tuple[int, ...]
    live: LiveMap | None
    factors: tuple[float, ...] | None = None


def map_of_steps(steps: tuple[LiveStep, ...], held: Held) -> Affine | Refusal | None:
    """The one map of a stretch, as ``map_between`` composes it without numbers."""
    maps: list[Affine | Refusal | None] = [None]
    for step in steps:
        found = _joined(step, maps) if step.live is None else _applied(step.live.map(held), maps[step.sources[0]])
        if isinstance(found, Refusal):
            return found
        maps.append(found)
    return maps[-1]


def _applied(own: Affine | None, before: Affine | Refusal | None) -> Affine | Refusal | None:
    if isinstance(before, Refusal) or own is None:
        return before
    return own if before is None else in_series(before, own)


def _joined(step: LiveStep, maps: list[Affine | Refusal | None]) -> Affine | Refusal:
    factors = step.factors or (1.0,) * len(step.sources)
    combine = in_concatenation if step.factors is None else in_sum
    whole: Affine | None = None
    for i, factor in zip(step.sources, factors, strict=True):
        branch = maps[i]
        assert isinstance(branch, Affine), "a branch that is the input itself has an identity of its own"
        together = times(branch, factor) if whole is None else combine(whole, times(branch, factor))
        if isinstance(together, Refusal):
            return together
        whole = together
    assert whole is not None
    return whole


def live_steps(
    reading: Reading, stretch: Stretch, record: Record, beside: Layer | Called | None
) -> tuple[LiveStep, ...] | Refusal:
    """The steps of ``stretch``. A branch that is the input itself is an identity, of the dtype that ``beside`` has."""
    steps: list[LiveStep] = []
    positions = {stretch.source: 0}
    bare = {0}  # the values that are the input itself
    for node in stretch.nodes:
        part = reading.part(node)
        sources = [positions[source] for source in part.sources] if part is not None else []
        if isinstance(part, Join):
            for i, source in enumerate(sources):
                if source in bare:
                    known = shaped(reading.signal(stretch.source))
                    if isinstance(known, Refusal) or beside is None:
                        return known if isinstance(known, Refusal) else _NO_DTYPE
                    steps.append(LiveStep((0,), Constant.of(identity(*known), beside)))
                    sources[i] = len(steps)
            steps.append(LiveStep(tuple(sources), None, part.factors))
        else:
            live = live_map(reading, node, record, beside)
            if isinstance(live, Refusal):
                return live
            steps.append(LiveStep(tuple(sources), live))
            if sources[0] in bare and reading.sketch_of(node) is None:
                bare.add(len(steps))
        positions[node] = len(steps)
    return tuple(steps)


def live_map(reading: Reading, node: fx.Node, record: Record, beside: Layer | Called | None) -> LiveMap | Refusal:
    """What gives the map of a unary node at each call, or why nothing does."""
    like = reading.sketch_of(node)
    if isinstance(like, Refusal):
        return like
    if node.op == "call_module":
        module = reading.gm.get_submodule(str(node.target))
        held, lift = record.paths.index(str(node.target)), reading.lift_of(module)
        if lift is not None:
            return Taught(held, lift)
        if isinstance(module, BATCH_NORMS):
            return Normalizing(held, like.dims) if like is not None else Refusal("it does nothing")
        if like is not None and next(module.parameters(), None) is not None:
            own = isinstance(module, tuple(DIMS)) or like.transposed is not None
            return Layer(like, held) if own else CODE
    elif any(source in reading.constants for source in node.all_input_nodes):
        return _called(node, record, like)
    exact = reading.map_of(node)
    assert not isinstance(exact, Refusal)
    return Constant.of(exact, beside) if beside is not None else _NO_DTYPE


# Why what code makes of parameters is left alone.
CODE = Refusal(
    "collapse composes layers, F.conv, F.linear and matrix products of parameters, not what code makes of them"
)
_NO_DTYPE = Refusal("no layer beside it tells its dtype")


def weight_beside(reading: Reading, nodes: Sequence[fx.Node], record: Record) -> Layer | Called | None:
    """The first layer among ``nodes``."""
    for node in nodes:
        if reading.part(node) is not None and not isinstance(reading.part(node), Join):
            found = live_map(reading, node, record, None)
            if isinstance(found, (Layer, Called)):
                return found
    return None


def _called(node: fx.Node, record: Record, like: Affine | None) -> LiveMap | Refusal:
    """A call of a function with a weight, or statistics, that are attributes."""
    if node.target is F.batch_norm and like is not None:
        return _called_norm(node, record, like.dims)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    product = name in _PRODUCTS
    if like is None or not (node.target in _CONVOLUTIONS or node.target is F.linear or product):
        return CODE
    names = ("input", "mat2" if node.target is torch.mm else "other") if product else ("input", "weight", "bias")
    held = _attributes(node, names, names[1:], record)
    if held is None or held[0] is None:
        return CODE
    return Called(like, held[0], held[1] if len(held) > 1 else None, product)


def _called_norm(node: fx.Node, record: Record, dims: int) -> LiveMap | Refusal:
    held = _attributes(node, NORM_NAMES, ("running_mean", "running_var", "weight", "bias"), record)
    if held is None or held[0] is None or held[1] is None:
        return CODE
    eps: Any = (dict(zip(NORM_NAMES, node.args, strict=False)) | dict(node.kwargs)).get("eps", 1e-5)
    return CalledNorm(held[0], held[1], held[2], held[3], eps, dims)


def _attributes(node: fx.Node, names: Sequence[str], wanted: Sequence[str], record: Record) -> list[int | None] | None:
    """The positions in ``record`` of the ``wanted`` arguments; None where one is made by code."""
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    held: list[int | None] = []
    for name in wanted:
        value = given.get(name)
        if value is not None and not (isinstance(value, fx.Node) and value.op == "get_attr"):
            return None
        held.append(None if value is None else record.paths.index(str(value.target)))
    return held
