"""What is known of the dtypes of values, as far as a layer may not read in another's place."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxexpand.algebra.refusal import Refusal
from fxexpand.regions.maps import PASS_INPUTS
from fxexpand.regions.parts import Unary

if TYPE_CHECKING:
    from fxexpand.regions.reading import Reading

# What gives floating values of whatever it gets, or fails.
_FLOATING: frozenset[Any] = frozenset(
    (
        *(F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
        *(F.batch_norm, F.layer_norm, F.group_norm, F.instance_norm, F.softmax, F.embedding, F.interpolate),
        *(torch.sigmoid, torch.tanh, torch.exp, torch.sqrt, torch.rsqrt, torch.softmax, torch.randn_like),
        *("float", "double", "half", "bfloat16", "sigmoid", "tanh", "exp", "sqrt", "rsqrt", "softmax"),
    )
)


def whole_numbers(reading: Reading) -> frozenset[fx.Node]:
    """The nodes the values of which may be integers or booleans: inputs, and what keeps their dtype."""
    found: set[fx.Node] = set()
    for node in reading.gm.graph.nodes:
        known = reading.shapes.dtypes.get(node)
        if known is not None:
            may = not known.is_floating_point
        elif node.op == "placeholder":
            may = True
        else:
            may = not found.isdisjoint(node.all_input_nodes) and not _is_floating(reading, node)
        if may:
            found.add(node)
    return frozenset(found)


def promotion(reading: Reading, source: fx.Node, nodes: Sequence[fx.Node], wanted: torch.dtype) -> Refusal | None:
    """Why no layer with weights of the dtype ``wanted`` can stand for ``nodes`` and read ``source``.

    A scale, shift or quotient may give its output another dtype than its input has: images of bytes become floating
    when they are divided by 255. A layer does not. Where one of the layers reads ``source`` itself, it is as wanted.
    """
    known = reading.shapes.dtypes.get(source)
    if known == wanted or (known is None and source not in reading.whole_numbers):
        return None
    as_it_is, first = {source}, None
    for node in nodes:
        part = reading.part(node)
        if part is None or as_it_is.isdisjoint(part.sources):
            continue
        if not isinstance(part, Unary):
            if as_it_is.issuperset(part.sources):
                as_it_is.add(node)
        elif part.promotes and (part.broadcasts or known is None or not known.is_floating_point):
            first = first or node
        elif part.tensors:
            return None
        else:
            as_it_is.add(node)
    if first is None:
        return None
    if known is None:
        return Refusal(f"{first.name} makes integers floating, and {source.name} may hold some; {PASS_INPUTS}")
    return Refusal(f"{first.name} makes {wanted} of {source.name}, which is {known}")


def _is_floating(reading: Reading, node: fx.Node) -> bool:
    """Whether ``node`` gives floating values of integers."""
    part = reading.part(node)
    if isinstance(part, Unary) and part.promotes:
        return True
    if node.op == "call_module":
        return any(map(_floats, reading.effects.modules[node].parameters()))
    if node.target in _FLOATING or any(_dtype_floats(value) for value in (*node.args, *node.kwargs.values())):
        return True
    attributes = [source for source in node.all_input_nodes if source.op == "get_attr"]
    return any(_floats(attrgetter(str(source.target))(reading.gm)) for source in attributes)


def _floats(value: object) -> bool:
    return isinstance(value, (Tensor, nn.Parameter)) and value.is_floating_point()


def _dtype_floats(value: object) -> bool:
    return isinstance(value, torch.dtype) and value.is_floating_point
