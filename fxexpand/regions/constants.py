"""What of a graph does not depend on its inputs: parameters, buffers, and what is computed from them alone."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

_OPERATORS = ("add", "sub", "mul", "truediv", "matmul", "neg", "pow", "getitem")
_BOTH = (
    *("abs", "add", "div", "exp", "flatten", "matmul", "mean", "mul", "neg", "norm", "permute", "pow", "reciprocal"),
    *("reshape", "rsqrt", "sigmoid", "softmax", "sqrt", "square", "squeeze", "sub", "sum", "swapaxes", "t", "tanh"),
    *("transpose", "unsqueeze", "var"),
)
_FUNCTIONS = (*_BOTH, "cat", "concat", "diag", "einsum", "mm", "multiply", "stack")
_METHODS = {
    *(*_BOTH, "clone", "contiguous", "detach", "double", "expand", "expand_as", "float", "half", "repeat", "view"),
    "view_as",
}
_PURE = {
    *(getattr(operator, name) for name in _OPERATORS),
    *(getattr(torch, name) for name in _FUNCTIONS),
    F.normalize,
    F.softmax,
    F.softplus,
    F.pad,
}


class Constants:
    """The constant values of ``gm``, computed when they are asked for.

    ``changed`` are the nodes the values of which the graph itself changes in place: a counter, a running mean.
    ``written`` is the memory that something else writes to when the model runs, as ``memory_of`` tells it.
    """

    def __init__(self, gm: fx.GraphModule, changed: frozenset[fx.Node], written: frozenset[int] = frozenset()) -> None:
        self.gm = gm
        self._values: dict[fx.Node, Any] = {}
        self._constant: set[fx.Node] = set()
        self._memory = written | memory_read(gm, changed)
        for node in gm.graph.nodes:
            fixed = (
                not self.changes(attrgetter(str(node.target))(gm)) if node.op == "get_attr" else self._is_computed(node)
            )
            if fixed and node not in changed:
                self._constant.add(node)

    def changes(self, tensor: object) -> bool:
        """Whether something changes ``tensor``, or one that shares its memory, in place."""
        return not self._memory.isdisjoint(memory_of(tensor))

    def changes_any_of(self, module: nn.Module) -> bool:
        """Whether something changes a parameter or buffer of ``module`` in place."""
        return bool(self._memory) and any(map(self.changes, (*module.parameters(), *module.buffers())))

    def __contains__(self, node: object) -> bool:
        return node in self._constant

    def value(self, node: Any) -> Any:
        """The value of a constant node; what is no node stands for itself."""
        if not isinstance(node, fx.Node):
            return node
        if node not in self._values:
            with torch.no_grad():
                self._values[node] = self._evaluate(node)
        return self._values[node]

    def parameters(self, node: object) -> list[Tensor]:
        """The parameters and buffers that a constant is computed from."""
        if not isinstance(node, fx.Node):
            return []
        if node.op == "get_attr":
            value = attrgetter(str(node.target))(self.gm)
            return [value] if isinstance(value, Tensor) else []
        return [tensor for source in node.all_input_nodes for tensor in self.parameters(source)]

    def _is_computed(self, node: fx.Node) -> bool:
        pure = node.target in (_PURE if node.op == "call_function" else _METHODS if node.op == "call_method" else ())
        sources = node.all_input_nodes
        return pure and bool(sources) and all(source in self._constant for source in sources)

    def _evaluate(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            value = attrgetter(str(node.target))(self.gm)
            return value.detach() if isinstance(value, Tensor) else value
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.value)
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)


def memory_read(gm: fx.GraphModule, nodes: Iterable[fx.Node]) -> frozenset[int]:
    """The memory of the attributes of ``gm`` that some of ``nodes`` read."""
    reads = [node for node in nodes if node.op == "get_attr"]
    return frozenset(memory for node in reads for memory in memory_of(attrgetter(str(node.target))(gm)))


def memory_of(value: object) -> tuple[int, ...]:
    """What tells whether tensors share memory."""
    return (value.untyped_storage()._cdata,) if isinstance(value, Tensor) and value.layout is torch.strided else ()
