"""What is known of the dtypes of values, so that no layer reads another one than it has.

A scale, shift or quotient may give its output another dtype than its input has: images of bytes become floating when
they are divided by 255. The layer that takes it in does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import attrgetter
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor, fx, nn

from fxexpand.algebra.refusal import Refusal
from fxexpand.graph.expanded import StandIn
from fxexpand.graph.layers import BATCH_NORMS, is_layer
from fxexpand.regions.maps import PASS_INPUTS
from fxexpand.regions.parts import Join, Part, Unary

if TYPE_CHECKING:
    from fxexpand.regions.reading import Reading

# A dtype, or that it is some floating one; None where nothing tells it.
Known: TypeAlias = "torch.dtype | Literal['floating'] | None"
FLOATING: Literal["floating"] = "floating"

_CASTS = {
    "float": torch.float32,
    "double": torch.float64,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "long": torch.int64,
    "int": torch.int32,
    "short": torch.int16,
    "bool": torch.bool,
}
# What gives tensors of the dtype of its first argument.
_KEEPS = {
    *("relu", "relu_", "relu6", "gelu", "silu", "hardswish", "hardsigmoid", "leaky_relu", "elu", "mish", "softplus"),
    *("dropout", "batch_norm", "layer_norm", "group_norm", "instance_norm", "interpolate", "normalize", "pad"),
    *(f"{kind}_pool{d}d" for d in (1, 2, 3) for kind in ("max", "avg", "adaptive_avg", "adaptive_max")),
    *("clamp", "abs", "mean", "zeros_like", "ones_like", "to", "contiguous", "clone", "detach"),
    *("flatten", "reshape", "view", "permute", "transpose", "swapaxes", "movedim", "t", "squeeze", "unsqueeze"),
    *("expand", "repeat", "roll", "flip", "chunk", "split", "unbind", "getitem"),
}
# What gives floating tensors of floating ones and of integers alike.
_FLOATS = {"sigmoid", "tanh", "exp", "sqrt", "rsqrt", "softmax", "log_softmax", "log", "erf", "sin", "cos"}
# What promotes the dtypes of its operands to one.
_PROMOTES = {"add", "sub", "mul", "truediv", "div", "iadd", "isub", "imul", "matmul", "bmm", "einsum", "maximum", "cat"}


def dtypes_of(reading: Reading) -> dict[fx.Node, Known]:
    """The dtypes of the values of a graph: as the example inputs tell them, else as far as weights and calls do."""
    found: dict[fx.Node, Known] = {}
    for node in reading.gm.graph.nodes:
        known = reading.shapes.dtypes.get(node) or _given_by(reading, node, found)
        found[node] = known if isinstance(known, torch.dtype) else _asked_by_a_layer(reading, node) or known
    return found


def promotion(reading: Reading, source: fx.Node, nodes: Sequence[fx.Node], wanted: torch.dtype) -> Refusal | None:
    """Why no layer with weights of the dtype ``wanted`` can stand for ``nodes`` and read ``source``.

    Where one of the layers reads ``source`` itself, it is as wanted, or autocast makes it so.
    """
    parts = [reading.part(node) for node in nodes]
    if not any(isinstance(part, Unary) and part.promotes for part in parts):
        return None
    known = reading.dtypes.get(source)
    if known == wanted:
        return None
    first = _first_promoting(source, list(zip(nodes, parts, strict=True)), known)
    if first is None:
        return None
    if isinstance(known, torch.dtype):
        return Refusal(f"{first.name} makes {wanted} of {source.name}, which is {known}")
    return Refusal(f"{first.name} may give {wanted} where {source.name} is of another dtype; {PASS_INPUTS}")


def _first_promoting(source: fx.Node, nodes: Sequence[tuple[fx.Node, Part | None]], known: Known) -> fx.Node | None:
    as_it_is, first = {source}, None
    for node, part in nodes:
        if part is None or as_it_is.isdisjoint(part.sources):
            continue
        if isinstance(part, Join):
            if as_it_is.issuperset(part.sources):
                as_it_is.add(node)
        elif part.promotes and (part.broadcasts or not _floats(known)):
            first = first or node
        elif part.tensors and not part.broadcasts:
            return None  # a layer that reads it as it is
        else:
            as_it_is.add(node)
    return first


def _floats(known: Known) -> bool:
    return known.is_floating_point if isinstance(known, torch.dtype) else known is FLOATING


def _asked_by_a_layer(reading: Reading, node: fx.Node) -> torch.dtype | None:
    """The dtype without which a layer that reads ``node`` as it is would not run."""
    for user in node.users:
        part = reading.part(user)
        if isinstance(part, Unary) and part.computes and part.source is node:
            return part.tensors[0].dtype
    return None


def _given_by(reading: Reading, node: fx.Node, found: dict[fx.Node, Known]) -> Known:
    if node.op == "get_attr":
        value = attrgetter(str(node.target))(reading.gm)
        return value.dtype if isinstance(value, Tensor) else None
    part = reading.part(node)
    if isinstance(part, Unary):
        return _after(part, found[part.source])
    if isinstance(part, Join):
        return _together([found[source] for source in part.sources])
    if node.op == "call_module":
        source = found[node.all_input_nodes[0]] if node.all_input_nodes else None
        return _of_module(reading.effects.modules[node], source)
    return _of_call(node, found) if node.op in ("call_function", "call_method") else None


def _after(part: Unary, source: Known) -> Known:
    if part.computes:
        return part.tensors[0].dtype
    if not part.promotes:
        return source or (FLOATING if part.tensors and not part.broadcasts else None)
    if not isinstance(source, torch.dtype) or not (part.broadcasts or source.is_floating_point):
        return FLOATING
    return reduce(torch.promote_types, [tensor.dtype for tensor in part.tensors], source)


def _together(sources: list[Known]) -> Known:
    exact = [known for known in sources if isinstance(known, torch.dtype)]
    if exact and len(exact) == len(sources):
        return reduce(torch.promote_types, exact)
    return FLOATING if any(map(_floats, sources)) else None


def _of_module(module: nn.Module, source: Known) -> Known:
    first = next((tensor.dtype for tensor in module.parameters() if tensor.is_floating_point()), None)
    computes = (is_layer(module) and not isinstance(module, BATCH_NORMS)) or isinstance(module, (StandIn, nn.Embedding))
    if computes:
        return first
    if not type(module).__module__.startswith("torch.nn") or getattr(module, "return_indices", False):
        return None  # code that nobody has looked into, or integers beside the values
    return source or (FLOATING if first is not None else None)


def _of_call(node: fx.Node, found: dict[fx.Node, Known]) -> Known:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    asked = [value for value in (*node.args, *node.kwargs.values()) if isinstance(value, torch.dtype)]
    if name in _CASTS or asked:
        return asked[0] if asked else _CASTS[name]
    sources: list[Known] = [found[source] for source in node.all_input_nodes]
    if name in _PROMOTES:
        together = _together(sources)
        return together if _floats(together) or name not in ("truediv", "div") else FLOATING
    if not sources or node.kwargs.get("return_indices") or (name == "to" and len(sources) > 1):
        return None
    if name in _FLOATS:
        return sources[0] if _floats(sources[0]) else FLOATING
    return sources[0] if name in _KEEPS and not (name.startswith("max_pool") and len(node.args) > 6) else None
