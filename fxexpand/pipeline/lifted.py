"""A captured graph the weights of which are inputs, seen as one the weights of which are attributes; and back."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fxexpand.regions.effects import nodes_in
from fxexpand.regions.shapes import Shapes

# Where capture notes the value of a node: Dynamo, and what is traced by dispatch.
_NOTES = ("example_value", "val")
_FIRST_IS_SIGNAL: frozenset[Any] = frozenset(
    (
        *(F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
        *(F.linear, F.batch_norm),
    )
)


@dataclass(frozen=True, eq=False)
class LiftedWeights:
    """``view`` is the graph of ``gm`` with an attribute, on the device "meta", in place of each input that is a weight,
    and of each tensor that is an attribute already, as where weights are frozen.

    ``names`` has the attribute's name -> the node of ``gm`` that gives the weight; ``shapes`` are those of the values
    of ``view``.
    """

    gm: fx.GraphModule
    view: fx.GraphModule
    names: dict[str, fx.Node]
    shapes: Shapes

    @staticmethod
    def of(gm: fx.GraphModule) -> LiftedWeights:
        """That of ``gm``, which stays as it is."""
        root, graph, names = nn.Module(), fx.Graph(), dict[str, fx.Node]()
        seen: dict[fx.Node, fx.Node] = {}
        shapes = Shapes()
        for node in gm.graph.nodes:
            value = _value(gm, node)
            if isinstance(value, Tensor) and _is_weight(node, value):
                name = f"weight_{len(names)}"
                names[name] = node
                root.register_buffer(name, _sketch(value))
                seen[node] = graph.get_attr(name)
            else:
                seen[node] = graph.node_copy(node, seen.__getitem__)
            shape = _hints(value.shape) if isinstance(value, Tensor) else None
            if shape is not None:
                shapes.note(seen[node], shape, value.dtype)
        for name in {str(node.target) for node in gm.graph.nodes if node.op in ("call_module", "get_attr")}:
            _share(root, gm, name)
        return LiftedWeights(gm, fx.GraphModule(root, graph, type(gm).__name__), names, shapes)

    def device_of(self, name: str) -> torch.device:
        """Where the weight is that the attribute ``name`` stands for."""
        value = _value(self.gm, self.names[name])
        assert isinstance(value, Tensor), "only tensors are weights"
        return value.device

    def layout_of(self, node: fx.Node) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """(shape, strides) of the value of a node of ``view``, where they are known."""
        value = noted(node)
        strides = _hints(value.stride()) if isinstance(value, Tensor) else None
        return None if strides is None or node not in self.shapes else (self.shapes[node], strides)

    def lowered(self) -> fx.GraphModule:
        """``gm`` with the graph of ``view``, its inputs as they were."""
        graph = fx.Graph()
        inputs = {node.target: _input(graph, node) for node in self.gm.graph.nodes if node.op == "placeholder"}
        seen: dict[fx.Node, fx.Node] = {}
        for node in self.view.graph.nodes:
            weight = self.names.get(str(node.target)) if node.op == "get_attr" else None
            if node.op == "placeholder":
                seen[node] = inputs[node.target]
            elif weight is not None:
                seen[node] = inputs[weight.target] if weight.op == "placeholder" else graph.node_copy(weight)
            else:
                seen[node] = graph.node_copy(node, seen.__getitem__)
        found = copy.copy(self.gm)
        _carry_over(self.gm, found)
        found.graph = graph
        found.graph.lint()
        return found


def _input(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """The input ``node`` put into ``graph``, with what Dynamo has noted on it: where it comes from."""
    made = graph.node_copy(node)
    _carry_over(node, made)
    return made


def _carry_over(old: object, new: object) -> None:
    """Give ``new`` what a compiler has noted on ``old`` besides what makes it up."""
    for name, fact in vars(old).items():
        if not hasattr(new, name):
            setattr(new, name, fact)


def noted(node: fx.Node) -> Any:
    """The value that capture has noted for ``node``: of tensors the shape, strides, dtype and device; or None."""
    return next((node.meta[name] for name in _NOTES if name in node.meta), None)


def _sketch(value: Tensor) -> Tensor:
    return torch.empty_strided(_ints(value.shape), _ints(value.stride()), dtype=value.dtype, device="meta")


def _value(gm: fx.GraphModule, node: fx.Node) -> Any:
    return attrgetter(str(node.target))(gm) if node.op == "get_attr" else noted(node)


def _is_weight(node: fx.Node, value: Tensor) -> bool:
    """Whether an input is a parameter, or is nothing but what layers are called with beside their signal."""
    if node.op not in ("placeholder", "get_attr") or is_traceable_wrapper_subclass(value):
        return False
    if any(map(_varies, (*value.shape, *value.stride()))):
        return False
    if isinstance(value, nn.Parameter) or node.op == "get_attr":
        return True
    return bool(node.users) and all(_is_beside(user, node) for user in node.users)


def _is_beside(user: fx.Node, node: fx.Node) -> bool:
    return user.target in _FIRST_IS_SIGNAL and bool(user.args) and node not in nodes_in(user.args[0])


def _hints(extents: Iterable[Any]) -> tuple[int, ...] | None:
    """The extents of a tensor; for one that varies, that which it was captured with, which guards nothing."""
    found = [extent.node.hint if _varies(extent) else extent for extent in extents]
    return None if any(extent is None for extent in found) else _ints(found)


def _varies(extent: object) -> bool:
    return isinstance(extent, torch.SymInt)


def _ints(extents: Iterable[Any]) -> tuple[int, ...]:
    return tuple(int(extent) for extent in extents)


def _share(root: nn.Module, gm: fx.GraphModule, path: str) -> None:
    """Put what stands at ``path`` in ``gm`` at the same path in ``root``."""
    *above, name = path.split(".")
    source: Any = gm
    for step in above:
        source = getattr(source, step)
        if step not in root._modules:
            root.add_module(step, nn.Module())
        root = root.get_submodule(step)
    value = getattr(source, name)
    if isinstance(value, nn.Module):
        root.add_module(name, value)
    elif isinstance(value, nn.Parameter):
        root.register_parameter(name, value)
    else:
        vars(root)[name] = value
