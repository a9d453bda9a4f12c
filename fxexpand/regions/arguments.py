"""The arguments of calls in a graph: which of them vary, and the values of the others."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import fx

from fxexpand.regions.constants import Constants
from fxexpand.regions.effects import nodes_in
from fxexpand.regions.parts import Lifted

# The functions that methods of tensors are.
METHODS: dict[str, Any] = {
    **{
        name: getattr(torch, name)
        for name in ("add", "sub", "mul", "div", "neg", "matmul", "mm", "chunk", "split", "narrow")
    },
    "add_": torch.add,
    "sub_": torch.sub,
    "mul_": torch.mul,
    "div_": torch.div,
    "__getitem__": operator.getitem,
}


class Arguments:
    """Reads the arguments of the nodes of one graph."""

    def __init__(self, constants: Constants) -> None:
        self.constants = constants

    def varies(self, value: Any) -> bool:
        """Whether ``value`` is a node that depends on the inputs of the graph."""
        return isinstance(value, fx.Node) and value not in self.constants

    def value(self, argument: Any) -> Any:
        """The value of a constant argument."""
        return self.constants.value(argument)

    def by_name(self, node: fx.Node, names: tuple[str, ...]) -> dict[str, Any] | None:
        """The arguments of ``node`` by name: the first one a variable node, the values of all others.

        None where others vary too.
        """
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        source = given.pop(names[0], None)
        flat = fx.node.map_arg(given, lambda used: used)  # a copy
        if not self.varies(source) or any(self.varies(used) for used in nodes_in(flat)):
            return None
        return {names[0]: source, **{k: fx.node.map_arg(v, self.value) for k, v in given.items()}}


Rule: TypeAlias = "Callable[[Arguments, fx.Node, Any], Lifted]"
