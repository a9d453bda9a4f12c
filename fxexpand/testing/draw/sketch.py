"""A graph under construction: calls of modules and functions, each with the shape of what it gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

Shape: TypeAlias = tuple[int, ...]

_MOST_ELEMENTS = 6000


class Misfit(Exception):  # noqa: N818 - no error: the step is left out
    """A step cannot stand where it was to be added."""


class Sketch:
    """A graph while it grows: its values with their shapes."""

    def __init__(self, shape: Shape, inputs: int, *, batched: bool) -> None:
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.batched = batched
        self.values = [self.graph.placeholder(name) for name in ("x", "y")[:inputs]]
        self.shapes: dict[fx.Node, Any] = dict.fromkeys(self.values, shape)
        self._count = 0

    def tried(self, add: Callable[[Sketch, fx.Node], fx.Node], value: fx.Node) -> fx.Node | None:
        """The value that ``add`` makes of ``value``; None where it cannot stand there."""
        try:
            return add(self, value)
        except Misfit:
            return None

    def dims(self, value: fx.Node) -> int:
        """The spatial axes of ``value``."""
        return max(len(self.shapes[value]) - (2 if self.batched else 1), 0)

    def module(self, module: nn.Module, value: fx.Node) -> fx.Node:
        """A call of a new ``module``."""
        shape = self._shape_of(module.eval(), (value,), {})
        path = self._name(type(module).__name__.lower())
        self.root.add_module(path, module)
        return self.again(path, value, shape)

    def again(self, path: str, value: fx.Node, shape: Any = None) -> fx.Node:
        """A call of a module that is there."""
        shape = shape or self._shape_of(self.root.get_submodule(path), (value,), {})
        return self._with_shape(self.graph.call_module(path, (value,)), shape)

    def call(self, function: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of a function, or of a method by its name."""
        method = isinstance(function, str)
        shape = self._shape_of(getattr(torch.Tensor, function) if method else function, args, kwargs)
        node = (self.graph.call_method if method else self.graph.call_function)(function, args, kwargs)
        return self._with_shape(node, shape)

    def constant(self, tensor: Tensor | None, *, buffer: bool = False) -> fx.Node | None:
        """A read of a new parameter or buffer."""
        if tensor is None:
            return None
        path = self._name("buffer" if buffer else "parameter")
        held = tensor.detach().clone(memory_format=torch.contiguous_format)
        if buffer:
            self.root.register_buffer(path, held)
        else:
            self.root.register_parameter(path, nn.Parameter(held))
        return self._with_shape(self.graph.get_attr(path), tuple(tensor.shape))

    def finish(self, outputs: list[fx.Node]) -> fx.GraphModule:
        self.graph.output(outputs[0] if len(outputs) == 1 else tuple(outputs))
        for node in reversed(self.graph.nodes):
            if node.op == "get_attr" and not node.users:
                self.graph.erase_node(node)
        return fx.GraphModule(self.root, self.graph).eval()

    def _name(self, stem: str) -> str:
        self._count += 1
        return f"{stem}_{self._count}"

    def _with_shape(self, node: fx.Node, shape: Any) -> fx.Node:
        self.shapes[node] = shape
        return node

    def _shape_of(self, function: Any, args: Any, kwargs: Any) -> Any:
        """The shape of what a call gives, or those of its parts."""

        def stand_in(node: fx.Node) -> Any:
            shape = self.shapes[node]
            if isinstance(shape, list):
                return [torch.zeros(part) for part in shape]
            return torch.zeros(shape)

        args, kwargs = fx.node.map_arg((args, kwargs), stand_in)
        try:
            with torch.no_grad():
                out = function(*args, **kwargs)
        except (RuntimeError, ValueError, IndexError) as error:
            raise Misfit from error
        parts = out if isinstance(out, (list, tuple)) else [out]
        if not all(0 < part.numel() <= _MOST_ELEMENTS for part in parts):
            raise Misfit
        return tuple(out.shape) if isinstance(out, Tensor) else [tuple(part.shape) for part in parts]
