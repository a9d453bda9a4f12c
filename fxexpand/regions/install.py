"""Putting merged layers into a model: the edits of its graphs, and what is no longer used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor, fx, nn

from fxexpand.algebra.affine import Affine
from fxexpand.algebra.compose import Blocks
from fxexpand.algebra.memory_format import Laid, format_after
from fxexpand.algebra.refusal import Refusal
from fxexpand.graph.rewrite import Edit, FunctionStep, ModuleStep, rewrite
from fxexpand.regions.build import Flags, layer_of
from fxexpand.regions.naming import Places
from fxexpand.regions.parts import Join, Unary
from fxexpand.regions.plan import Merge
from fxexpand.regions.reading import Reading
from fxexpand.regions.region import map_of_parts, scaled_layer

# How far float16 may round a weight, relative to its norm: 8 units roundoff, so what it still holds as normal numbers.
_MOST_IN_HALF = 8 * 2.0**-11

# Where the node of a merged layer says what was merged: the names of the nodes that it stands for.
MERGED = "merged"

Work: TypeAlias = "list[tuple[Reading, list[Merge]]]"


@dataclass(frozen=True, eq=False)
class Made:
    """A new layer, and the map that it was made of, in float64; None where that has been rounded."""

    layer: nn.Module
    exact: Affine | None


def install(model: nn.Module, work: Work) -> list[Made]:
    """Carry out the merges in the graphs of ``model``; modules and parameters that nothing uses any more go."""
    places, alike = _places(model, work), _alike(work)
    edits: list[Edit] = []
    made: list[Made] = []
    # All weights first: what comes after them in a loop would find nothing of its own in the processor's caches.
    blocks = Blocks()
    maps = [_map(*same[0], blocks) for same in alike]
    for same, (exact, affine) in zip(alike, maps, strict=True):
        reading, first = same[0]
        main = _main(reading, first)
        flags = _flags(reading, first, main)
        padding, layer = layer_of(affine, flags, copy=exact is not None)
        path = places.path(reading.gm, [merge.stretch for _, merge in same], main)
        for _, merge in same:
            edits.append(_edit(reading, merge, padding, path))
        nodes = [node for _, merge in same for node in (*merge.stretch.nodes, *_constants(reading, merge))]
        places.put(reading.gm, path, layer, nodes)
        made.append(Made(layer, exact if exact is None or padding is None else _unpadded(exact)))
    rewrite(edits)
    places.clean_up()
    return made


def _map(reading: Reading, merge: Merge, blocks: Blocks) -> tuple[Affine | None, Affine]:
    """The map of a merge in float64, where it is kept, and the one to make a layer of."""
    dtype = _weight(reading, _main(reading, merge)).dtype
    rounded = scaled_layer(reading, merge.stretch, dtype, blocks)
    if rounded is not None:
        return None, rounded
    exact = map_of_parts(reading, merge.parts, merge.order)
    if not isinstance(exact, Affine):
        raise RuntimeError(f"{merge.stretch.last.name}: planned as one layer, and not one: {exact}")
    return exact, exact


def range_refusal(reading: Reading, merge: Merge) -> Refusal | None:
    """Why the numbers of a merge do not fit its dtype, or None where they do; only float16 is that narrow."""
    if _weight(reading, _main(reading, merge)).dtype is not torch.float16:
        return None
    found = map_of_parts(reading, merge.parts, merge.order)
    if not isinstance(found, Affine) or found.kernel.weight.is_meta:
        return None
    weight, bias = found.kernel.weight, found.kernel.bias
    error = (weight.half().double() - weight).norm()
    if bool(error <= _MOST_IN_HALF * weight.norm()) and (bias is None or bool(bias.half().isfinite().all())):
        return None
    return Refusal("one layer would need numbers that float16 does not hold; fuse in float32, and cast where they fit")


def _edit(reading: Reading, merge: Merge, padding: FunctionStep | None, path: str) -> Edit:
    step = ModuleStep(path)
    return Edit(
        graph_module=reading.gm,
        nodes=merge.stretch.nodes,
        steps=(step,) if padding is None else (padding, step),
        source=merge.stretch.source,
        constants=frozenset(_constants(reading, merge)),
        meta={MERGED: _names(merge)},
    )


def paths_of(model: nn.Module, work: Work) -> dict[fx.Node, str]:
    """The last node of each merge -> the path, in its graph module, that the layer will have."""
    places = _places(model, work)
    found: dict[fx.Node, str] = {}
    for same in _alike(work):
        reading, first = same[0]
        path = places.path(reading.gm, [merge.stretch for _, merge in same], _main(reading, first))
        found.update({merge.stretch.last: path for _, merge in same})
    return found


def _places(model: nn.Module, work: Work) -> Places:
    merged = {node for _, merges in work for merge in merges for node in merge.stretch.nodes}
    constants = {node for reading, merges in work for merge in merges for node in _constants(reading, merge)}
    return Places(model, merged | constants, work[0][0].reach if work else None)


def _names(merge: Merge) -> tuple[str, ...]:
    """The nodes of a merge, and those that had been merged into them before."""
    names: list[str] = []
    for node in merge.stretch.nodes:
        names += node.meta.get(MERGED, (label(node),))
    return tuple(names)


def label(node: fx.Node) -> str:
    """The path of the module that ``node`` calls, or its own name."""
    return str(node.target) if node.op == "call_module" else node.name


def _layers_called(reading: Reading, merge: Merge) -> tuple[object, ...]:
    """What tells the layer of a merge from others: chains of the same modules give one layer, called several times."""
    nodes = merge.stretch.nodes
    parts = [reading.part(node) for node in nodes]
    if all(node.op == "call_module" and isinstance(part, Unary) for node, part in zip(nodes, parts, strict=True)):
        signal = reading.signal(merge.stretch.source)
        return (signal.dims, *(id(reading.effects.modules[node]) for node in nodes), id(reading.gm))
    return (merge.stretch.last,)


def _alike(work: Work) -> Iterable[list[tuple[Reading, Merge]]]:
    """The merges in the order of the graphs, those together that give one layer, called several times."""
    found: dict[tuple[object, ...], list[tuple[Reading, Merge]]] = {}
    for reading, merges in work:
        order = reading.effects.order
        for merge in sorted(merges, key=lambda found: order[found.stretch.nodes[0]]):
            found.setdefault(_layers_called(reading, merge), []).append((reading, merge))
    return found.values()


def _main(reading: Reading, merge: Merge) -> fx.Node:
    """The node that gives a merged layer its name and flags: the largest, of equals the first module."""

    def rank(node: fx.Node) -> tuple[int, bool]:
        part = reading.part(node)
        weights = [t.numel() for t in part.tensors] if isinstance(part, Unary) and part.computes else [-1]
        return max(weights, default=0), node.op == "call_module"

    return max(merge.stretch.nodes, key=rank)


def _weight(reading: Reading, main: fx.Node) -> Tensor:
    """The weight that a merged layer takes its dtype and memory format from."""
    part = reading.part(main)
    assert isinstance(part, Unary)
    return part.tensors[0]


def _flags(reading: Reading, merge: Merge, main: fx.Node) -> Flags:
    weight = _weight(reading, main)
    module = reading.effects.modules[main] if main.op == "call_module" else reading.gm
    return Flags(
        dtype=weight.dtype,
        memory_format=_memory_format(reading, merge),
        requires_grad=any(
            tensor.requires_grad for node in merge.stretch.nodes for tensor in _parameters(reading, node)
        ),
        training=module.training,
    )


def _memory_format(reading: Reading, merge: Merge) -> torch.memory_format:
    """That of what the nodes of a merge give in turn."""
    positions = {merge.stretch.source: 0}
    laid: list[Laid] = []
    for node in merge.stretch.nodes:
        part = reading.part(node)
        assert part is not None
        weight = part.tensors[0] if isinstance(part, Unary) and part.computes else None
        joins = isinstance(part, Join) and part.factors is None
        laid.append(Laid(tuple(positions[source] for source in part.sources), weight, joins))
        positions[node] = len(laid)
    return format_after(laid)


def _parameters(reading: Reading, node: fx.Node) -> Iterator[Tensor]:
    """The parameters that a node computes with."""
    if node.op == "call_module":
        yield from reading.effects.modules[node].parameters()
        return
    for source in node.all_input_nodes:
        if source in reading.constants:
            yield from reading.constants.parameters(source)


def _constants(reading: Reading, merge: Merge) -> list[fx.Node]:
    """The constant nodes that the nodes of a merge are computed with."""
    found: dict[fx.Node, None] = {}
    waiting = [source for node in merge.stretch.nodes for source in node.all_input_nodes]
    while waiting:
        node = waiting.pop()
        if node in reading.constants and node not in found:
            found[node] = None
            waiting += node.all_input_nodes
    return list(found)


def _unpadded(affine: Affine) -> Affine:
    kernel = replace(affine.kernel, padding=((0, 0),) * affine.dims)
    return replace(affine, kernel=kernel, border=None)
