"""Linear nodes the maps of which are made anew at each call, of the parameters as they are then, differentiably."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxexpand.algebra.affine import Affine, identity, in_concatenation, in_series, in_sum, times
from fxexpand.algebra.kernel import Kernel
from fxexpand.algebra.refusal import Refusal
from fxexpand.graph.geometry import DIMS
from fxexpand.regions.maps import depthwise, normalizing, shaped
from fxexpand.regions.parts import Join, Unary
from fxexpand.regions.reading import Reading
from fxexpand.regions.region import Stretch

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_PRODUCTS = ("matmul", "mm")


class LiveMap(Protocol):
    """What gives the map of a node."""

    def map(self) -> Affine | None:
        """The map, of the tensors as they are now; None where it leaves its input as it is."""


@dataclass(frozen=True, eq=False)
class Weighted:
    """A layer: ``weight`` and ``bias`` are the owner and the name of a tensor, ``like`` is the map without numbers.

    ``turned``: the weight of a matrix product ``x @ w`` is that of a linear layer, transposed.
    """

    like: Affine
    weight: tuple[nn.Module, str]
    bias: tuple[nn.Module, str] | None
    turned: bool = False

    def map(self) -> Affine:
        weight = cast(Tensor, getattr(*self.weight))
        bias = None if self.bias is None else cast("Tensor | None", getattr(*self.bias))
        if self.turned:
            weight = weight.t()
        elif self.like.transposed is not None:  # (m, n/g, *k) -> (n, m/g, *k)
            weight = weight.unflatten(0, (self.like.kernel.groups, -1)).transpose(1, 2).flatten(0, 1)
        return replace(self.like, kernel=replace(self.like.kernel, weight=weight, bias=bias))


@dataclass(frozen=True, eq=False)
class Normalizing:
    """Batch norm in eval mode, on ``dims`` spatial axes."""

    norm: Any
    dims: int

    def map(self) -> Affine:
        norm = self.norm
        scale, shift = normalizing(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
        return depthwise(scale, shift, self.dims)


@dataclass(frozen=True, eq=False)
class Constant:
    """A map without parameters, in the dtype and on the device of the tensor that ``beside`` owns."""

    affine: Affine | None
    beside: tuple[nn.Module, str]

    def map(self) -> Affine | None:
        tensor = cast(Tensor, getattr(*self.beside))
        return None if self.affine is None else self.affine.to(dtype=tensor.dtype, device=tensor.device)


@dataclass(frozen=True, eq=False)
class Taught:
    """A module of the user's, and what the user says that it does."""

    module: nn.Module
    lift: Callable[[Any], Kernel]

    def map(self) -> Affine:
        return Affine(self.lift(self.module))


@dataclass(frozen=True, eq=False)
class LiveStep:
    """One node of a stretch. Values are known by position: 0 is what the stretch reads, 1 the first node's, …

    With ``live`` it applies a map to its only source. Otherwise it joins its sources: adds them, each times a factor,
    or concatenates them (``factors`` is None).
    """

    sources: tuple[int, ...]
    live: LiveMap | None
    factors: tuple[float, ...] | None = None


def map_of_steps(steps: tuple[LiveStep, ...]) -> Affine | None:
    """The one map of a stretch. Its exactness is known: ``map_between`` has composed the same without numbers."""
    maps: list[Affine | None] = [None]
    for step in steps:
        if step.live is not None:
            own, before = step.live.map(), maps[step.sources[0]]
            maps.append(own if before is None else before if own is None else _one(in_series(before, own)))
        else:
            factors = step.factors or (1.0,) * len(step.sources)
            combine = in_concatenation if step.factors is None else in_sum
            branches = [times(cast(Affine, maps[i]), f) for i, f in zip(step.sources, factors, strict=True)]
            whole = branches[0]
            for branch in branches[1:]:
                whole = _one(combine(whole, branch))
            maps.append(whole)
    return maps[-1]


def live_steps(reading: Reading, stretch: Stretch, beside: tuple[nn.Module, str]) -> tuple[LiveStep, ...] | Refusal:
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
                    if isinstance(known, Refusal):
                        return known
                    steps.append(LiveStep((0,), Constant(identity(*known), beside)))
                    sources[i] = len(steps)
            steps.append(LiveStep(tuple(sources), None, part.factors))
        else:
            live = live_map(reading, node, beside)
            if isinstance(live, Refusal):
                return live
            steps.append(LiveStep(tuple(sources), live))
            if sources[0] in bare and reading.sketch_of(node) is None:
                bare.add(len(steps))
        positions[node] = len(steps)
    return tuple(steps)


def live_map(reading: Reading, node: fx.Node, beside: tuple[nn.Module, str] | None) -> LiveMap | Refusal:
    """What gives the map of a unary node at each call, or why nothing does."""
    like = reading.sketch_of(node)
    if isinstance(like, Refusal):
        return like
    if node.op == "call_module":
        module = reading.gm.get_submodule(str(node.target))
        lift = reading.lift_of(module)
        if lift is not None:
            return Taught(module, lift)
        if isinstance(module, _NORMS):
            return Normalizing(module, like.dims) if like is not None else Refusal("it does nothing")
        if like is not None and next(module.parameters(), None) is not None:
            own = isinstance(module, tuple(DIMS)) or like.transposed is not None
            return Weighted(like, (module, "weight"), (module, "bias")) if own else Refusal(_CODE)
    elif any(source in reading.constants for source in node.all_input_nodes):
        return _called(reading, node, like)
    exact = reading.map_of(node)
    assert not isinstance(exact, Refusal)
    return Constant(exact, beside) if beside is not None else Refusal("nothing tells its dtype")


_CODE = "collapse composes layers, F.conv, F.linear and matrix products of parameters, not what code makes of them"


def weight_beside(reading: Reading, nodes: tuple[fx.Node, ...]) -> tuple[nn.Module, str] | None:
    """The owner and name of the first weight that ``nodes`` compute with."""
    for node in nodes:
        part = reading.part(node)
        if isinstance(part, Unary) and part.computes:
            found = live_map(reading, node, None)
            if isinstance(found, Weighted):
                return found.weight
            if isinstance(found, Taught):
                tensors = dict(found.module.named_parameters())
                return next((_owner(found.module, name) for name in tensors), None)
    return None


def _called(reading: Reading, node: fx.Node, like: Affine | None) -> LiveMap | Refusal:
    """A call of a function with a weight that is an attribute."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    product = name in _PRODUCTS
    if like is None or not (node.target in _CONVOLUTIONS or node.target is F.linear or product):
        return Refusal(_CODE)
    names = ("input", "mat2" if node.target is torch.mm else "other") if product else ("input", "weight", "bias")
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    owners = []
    for key in names[1:]:
        value = given.get(key)
        if value is None:
            continue
        if not (isinstance(value, fx.Node) and value.op == "get_attr"):
            return Refusal(_CODE)
        owners.append(_owner(reading.gm, str(value.target)))
    return Weighted(like, owners[0], owners[1] if len(owners) > 1 else None, turned=product)


def _owner(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    above, _, name = path.rpartition(".")
    return module.get_submodule(above), name


def _one(found: Affine | Refusal) -> Affine:
    if isinstance(found, Refusal):
        raise RuntimeError(f"a region that was one layer is none any more: {found}")
    return found
