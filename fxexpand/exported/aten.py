"""ATen calls as calls of the functions that the passes know."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, fx

aten = torch.ops.aten

Given: TypeAlias = "dict[str, Any]"
_Rule: TypeAlias = "Callable[[fx.Node, Given], Call | None]"


@dataclass(frozen=True)
class Call:
    """A call of a function of torch, or of a method of a tensor, over nodes of the exported graph."""

    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


def read_call(node: fx.Node) -> Call | None:
    """The call that gives what ``node``, an ATen call, gives; None for one that the passes know nothing of."""
    rule = _RULES.get(node.target)
    return None if rule is None else rule(node, arguments_of(node))


def read_constant(node: fx.Node) -> Call | None:
    """The same for ``node`` that is computed from parameters and buffers alone: only its value is asked for."""
    if node.target in _CONSTANT_FUNCTIONS:
        return Call("call_function", _CONSTANT_FUNCTIONS[node.target], node.args, dict(node.kwargs))
    if node.target in _COPIES:
        return Call("call_method", "clone", node.args[:1])
    if node.target is aten.expand.default:
        return Call("call_method", "expand", node.args[:2])
    return read_call(node)


def is_read_as_item(node: fx.Node) -> bool:
    """Whether the passes read ``node`` with the item that is taken of it, and never by itself.

    Batch norm in eval mode gives a tuple, in which nothing but the signal is of use.
    """
    if node.target is not aten._native_batch_norm_legit_no_training.default or len(node.users) != 1:
        return False
    return all(user.target is operator.getitem and user.args[1] == 0 for user in node.users)


def hides_changes(node: fx.Node) -> bool:
    """Whether the call may change what it gets although no schema says so: statistics, or code that nobody knows."""
    if isinstance(node.target, torch._ops.OpOverload):
        name = node.target.__name__
        pure = "functional" in name or "no_training" in name
        return not pure and ("batch_norm" in name or "instance_norm" in name)
    if node.target is operator.getitem:
        return False
    graphs = [graph for source in node.all_input_nodes for graph in _graph_at(source)]
    inner = [call for graph in graphs for call in graph.nodes if call.op == "call_function"]
    return not graphs or any(_changes_something(call) or hides_changes(call) for call in inner)


def _changes_something(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _graph_at(node: fx.Node) -> list[fx.Graph]:
    """The graph that ``node`` reads, for control flow to run."""
    owner = node.graph.owning_module
    if node.op != "get_attr" or owner is None:
        return []
    found = attrgetter(str(node.target))(owner)
    return [found.graph] if isinstance(found, fx.GraphModule) else []


def value_of(node: object) -> Any:
    """The fake value of a node; None where there is none."""
    return node.meta.get("val") if isinstance(node, fx.Node) else None


def weight_of(node: fx.Node) -> fx.Node | None:
    """The weight of a convolution or matrix product; None for any other node, and for a weight that is no node."""
    weight = arguments_of(node).get(_WEIGHTS.get(node.target, ""))
    return weight if isinstance(weight, fx.Node) else None


def arguments_of(node: fx.Node) -> Given:
    """The arguments of an ATen call by the names of its schema, with its defaults."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {}
    schema = node.target._schema.arguments
    given = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    return given | dict(zip((argument.name for argument in schema), node.args, strict=False)) | dict(node.kwargs)


def _same(function: Any, first: str = "input", **names: str) -> _Rule:
    """``function`` with the same arguments; ``names`` are those that it calls otherwise, by its own name."""

    def read(node: fx.Node, given: Given) -> Call:
        others = {name: value for name, value in given.items() if name != first}
        for ours, theirs in names.items():
            others[ours] = others.pop(theirs)
        return Call("call_function", function, (given[first],), others)

    return read


def _convolution(node: fx.Node, given: Given) -> Call | None:
    d = value_of(given["weight"]).dim() - 2
    function: Any
    plain = ("weight", "bias", "stride", "padding", "dilation", "groups")
    if not 1 <= d <= 3:
        return None
    if not given["transposed"]:
        function = (F.conv1d, F.conv2d, F.conv3d)[d - 1]
        return Call("call_function", function, (given["input"],), {name: given[name] for name in plain})
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[d - 1]
    names = (*plain, "output_padding")
    return Call("call_function", function, (given["input"],), {name: given[name] for name in names})


def _product(function: Any, *names: str) -> _Rule:
    def read(node: fx.Node, given: Given) -> Call:
        settings = {name: value for name, value in given.items() if name not in names}
        return Call("call_function", function, tuple(given[name] for name in names), settings)

    return read


def _batch_norm(node: fx.Node, given: Given) -> Call:
    names = ("running_mean", "running_var", "weight", "bias", "momentum", "eps")
    settings = {name: given[name] for name in names} | {"training": given["training"]}
    return Call("call_function", F.batch_norm, (given["input"],), settings)


def _batch_norm_in_training_mode(node: fx.Node, given: Given) -> Call | None:
    """It gives a tuple, and is refused."""
    return _batch_norm(node, given) if given["training"] is True else None


def _dropout(node: fx.Node, given: Given) -> Call:
    return Call("call_function", F.dropout, (given["input"],), {"p": given["p"], "training": given["train"]})


def _identity(source: Any) -> Call:
    return Call("call_function", F.dropout, (source,), {"training": False})


def _pad(node: fx.Node, given: Given) -> Call:
    settings = {"pad": given["pad"], "mode": given.get("mode", "constant"), "value": given["value"]}
    return Call("call_function", F.pad, (given["self"],), settings)


def _arithmetic(function: Any) -> _Rule:
    """A sum or product of tensors and numbers: a size that is computed is neither."""

    def read(node: fx.Node, given: Given) -> Call | None:
        operands = (given["self"], given["other"])
        if any(isinstance(value, fx.Node) and not isinstance(value_of(value), Tensor) for value in operands):
            return None
        alpha = given.get("alpha", 1)
        if isinstance(alpha, fx.Node):
            return None
        settings = {} if alpha == 1 else {"alpha": alpha}
        return Call("call_method" if isinstance(function, str) else "call_function", function, operands, settings)

    return read


def _negative(node: fx.Node, given: Given) -> Call:
    return Call("call_function", torch.neg, (given["self"],))


def _concatenation(node: fx.Node, given: Given) -> Call:
    return Call("call_function", torch.cat, (given["tensors"],), {"dim": given["dim"]})


def _parted(function: Any, number: str) -> _Rule:
    """``chunk`` or ``split``, of an axis with one length at every call."""

    def read(node: fx.Node, given: Given) -> Call | None:
        if _length(given["self"], given["dim"]) is None:
            return None
        return Call("call_function", function, (given["self"], given[number], given["dim"]))

    return read


def _item(node: fx.Node, given: Given) -> Call:
    source, key = node.args
    if isinstance(source, fx.Node) and is_read_as_item(source):
        return _batch_norm(source, {**arguments_of(source), "training": False})
    return Call("call_function", operator.getitem, (source, key))


def _slice(node: fx.Node, given: Given) -> Call | None:
    source, dim, start, end, step = (given[name] for name in ("self", "dim", "start", "end", "step"))
    if start in (None, 0) and step == 1 and (end is None or (isinstance(end, int) and end == sys.maxsize)):
        return _identity(source)
    if _length(source, dim) is None or not all(isinstance(bound, (int, type(None))) for bound in (start, end, step)):
        return None
    axis = dim % value_of(source).dim()
    return Call("call_function", operator.getitem, (source, (*(slice(None),) * axis, slice(start, end, step))))


def _narrow(node: fx.Node, given: Given) -> Call | None:
    if _length(given["self"], given["dim"]) is None:
        return None
    return Call("call_function", torch.narrow, tuple(given[name] for name in ("self", "dim", "start", "length")))


def _length(source: object, dim: int) -> int | None:
    """The length of an axis; None where it differs from call to call, so that one cannot count on a number of it."""
    value = value_of(source)
    if not isinstance(value, Tensor) or value.dim() == 0:
        return None
    length: object = value.shape[dim]
    return length if isinstance(length, int) else None


_RULES: dict[Any, _Rule] = {
    aten.conv1d.default: _same(F.conv1d),
    aten.conv2d.default: _same(F.conv2d),
    aten.conv3d.default: _same(F.conv3d),
    aten.conv1d.padding: _same(F.conv1d),
    aten.conv2d.padding: _same(F.conv2d),
    aten.conv3d.padding: _same(F.conv3d),
    aten.conv_transpose1d.default: _same(F.conv_transpose1d),
    aten.conv_transpose2d.input: _same(F.conv_transpose2d),
    aten.conv_transpose3d.input: _same(F.conv_transpose3d),
    aten.convolution.default: _convolution,
    aten.linear.default: _same(F.linear),
    aten.matmul.default: _product(torch.matmul, "self", "other"),
    aten.mm.default: _product(torch.mm, "self", "mat2"),
    aten.addmm.default: _product(torch.addmm, "self", "mat1", "mat2"),
    aten.batch_norm.default: _batch_norm,
    aten._native_batch_norm_legit_functional.default: _batch_norm_in_training_mode,
    aten.instance_norm.default: _same(F.instance_norm),
    aten.avg_pool1d.default: _same(F.avg_pool1d, "self"),
    aten.avg_pool2d.default: _same(F.avg_pool2d, "self"),
    aten.avg_pool3d.default: _same(F.avg_pool3d, "self"),
    **dict.fromkeys((aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default), _dropout),
    **dict.fromkeys((aten.pad.default, aten.constant_pad_nd.default), _pad),
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar), _arithmetic(torch.add)),
    **dict.fromkeys((aten.sub.Tensor, aten.sub.Scalar), _arithmetic(torch.sub)),
    **dict.fromkeys((aten.rsub.Tensor, aten.rsub.Scalar), _arithmetic(torch.rsub)),
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar), _arithmetic(torch.mul)),
    **dict.fromkeys((aten.div.Tensor, aten.div.Scalar), _arithmetic(torch.div)),
    **dict.fromkeys((aten.add_.Tensor, aten.add_.Scalar), _arithmetic("add_")),
    **dict.fromkeys((aten.sub_.Tensor, aten.sub_.Scalar), _arithmetic("sub_")),
    **dict.fromkeys((aten.mul_.Tensor, aten.mul_.Scalar), _arithmetic("mul_")),
    **dict.fromkeys((aten.div_.Tensor, aten.div_.Scalar), _arithmetic("div_")),
    aten.neg.default: _negative,
    **dict.fromkeys((aten.cat.default, aten.concat.default), _concatenation),
    **dict.fromkeys((aten.chunk.default, aten.unsafe_chunk.default), _parted(torch.chunk, "chunks")),
    **dict.fromkeys((aten.split.Tensor, aten.unsafe_split.Tensor), _parted(torch.split, "split_size")),
    aten.split_with_sizes.default: _parted(torch.split, "split_sizes"),
    aten.split.sizes: _parted(torch.split, "split_size"),
    operator.getitem: _item,
    aten.slice.Tensor: _slice,
    aten.narrow.default: _narrow,
}

_WEIGHTS: dict[Any, str] = {
    **{target: "weight" for target in _RULES if "conv" in str(target)},
    aten.linear.default: "weight",
    aten.matmul.default: "other",
    **dict.fromkeys((aten.mm.default, aten.addmm.default), "mat2"),
}

# What computes constants from constants; a signal that passes through stays as it is.
_CONSTANT_FUNCTIONS: dict[Any, Any] = {
    aten.t.default: torch.t,
    aten.permute.default: torch.permute,
    aten.transpose.int: torch.transpose,
    aten.view.default: torch.reshape,
    aten.reshape.default: torch.reshape,
    aten.flatten.using_ints: torch.flatten,
    aten.unsqueeze.default: torch.unsqueeze,
    aten.squeeze.dim: torch.squeeze,
    aten.squeeze.default: torch.squeeze,
    aten.abs.default: torch.abs,
    aten.exp.default: torch.exp,
    aten.reciprocal.default: torch.reciprocal,
    aten.rsqrt.default: torch.rsqrt,
    aten.sqrt.default: torch.sqrt,
    aten.square.default: torch.square,
    aten.sigmoid.default: torch.sigmoid,
    aten.tanh.default: torch.tanh,
    aten.pow.Tensor_Scalar: torch.pow,
    aten.sum.dim_IntList: torch.sum,
    aten.mean.dim: torch.mean,
    aten.stack.default: torch.stack,
}
_COPIES = frozenset(
    {
        aten.clone.default,
        aten.lift_fresh_copy.default,
        aten.contiguous.default,
        aten.alias.default,
        aten.detach.default,
        aten.detach_.default,
    }
)
