"""Plain layers as ATen calls, with what exported graphs record of their values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fxexpand.exported.aten import aten, value_of

# What is recorded of the value of one node, and holds for no other.
_OF_VALUES = frozenset({"val", "tensor_meta", "unbacked_bindings", "example_value"})
_CORE = (aten.convolution.default, aten.addmm.default, aten.mm.default)
_CONVOLUTIONS: dict[type[nn.Module], Any] = {
    nn.Conv1d: aten.conv1d.default,
    nn.Conv2d: aten.conv2d.default,
    nn.Conv3d: aten.conv3d.default,
}
_TRANSPOSED: dict[type[nn.Module], Any] = {
    nn.ConvTranspose1d: aten.conv_transpose1d.default,
    nn.ConvTranspose2d: aten.conv_transpose2d.input,
    nn.ConvTranspose3d: aten.conv_transpose3d.input,
}


@dataclass(frozen=True, eq=False)
class Emitter:
    """Adds calls to ``graph``, with the fake values that ``mode`` computes; no guard is added to its shapes.

    ``taken`` are the names that no new node may have; those of new nodes join them.
    """

    graph: fx.Graph
    mode: FakeTensorMode
    taken: set[str]

    def placeholder(self, name: str, tensor: Tensor) -> fx.Node:
        """An input for a parameter."""
        node = self._named(self.graph.placeholder(name), name)
        node.meta["val"] = self.mode.from_tensor(tensor, static_shapes=True)
        return node

    def pad(self, value: fx.Node, amounts: list[int], main: fx.Node) -> fx.Node:
        """Padding with zeros, ``amounts`` as for ``F.pad``."""
        return self._call(aten.constant_pad_nd.default, (value, amounts, 0.0), main, f"{main.name}_pad")

    def layer(
        self, layer: nn.Module, value: fx.Node, parameters: Mapping[str, fx.Node], main: fx.Node, last: fx.Node
    ) -> fx.Node:
        """``layer`` on ``value``, in the operators that ``main``, the largest call that it replaces, is written in.

        Its value is that of ``last``, the last one: the shapes are the same, and written alike.
        """
        weight, bias = parameters["weight"], parameters.get("bias")
        if isinstance(layer, nn.Linear):
            made = self._linear(value, weight, bias, main)
        else:
            made = self._convolution(layer, value, weight, bias, main)
        expected = value_of(last)
        if not _same_shape(value_of(made), expected):
            made.meta["val"] = expected
        return made

    def _linear(self, value: fx.Node, weight: fx.Node, bias: fx.Node | None, main: fx.Node) -> fx.Node:
        if main.target not in _CORE or value_of(value).dim() != 2:
            return self._call(aten.linear.default, (value, weight, bias), main, main.name)
        turned = self._call(aten.permute.default, (weight, [1, 0]), main, f"{main.name}_weight")
        if bias is None:
            return self._call(aten.mm.default, (value, turned), main, main.name)
        return self._call(aten.addmm.default, (bias, value, turned), main, main.name)

    def _convolution(self, layer: Any, value: fx.Node, weight: fx.Node, bias: fx.Node | None, main: fx.Node) -> fx.Node:
        stride, padding, dilation, groups = list(layer.stride), list(layer.padding), list(layer.dilation), layer.groups
        more, transposed = list(layer.output_padding), type(layer) in _TRANSPOSED
        first = (value, weight, bias, stride, padding)
        if main.target in _CORE:
            args: tuple[Any, ...] = (*first, dilation, transposed, more, groups)
            return self._call(aten.convolution.default, args, main, main.name)
        if transposed:
            return self._call(_TRANSPOSED[type(layer)], (*first, more, groups, dilation), main, main.name)
        return self._call(_CONVOLUTIONS[type(layer)], (*first, dilation, groups), main, main.name)

    def _call(self, target: Any, args: tuple[Any, ...], main: fx.Node, name: str) -> fx.Node:
        node = self._named(self.graph.create_node("call_function", target, args, {}), name)
        node.meta = {key: fact for key, fact in main.meta.items() if key not in _OF_VALUES}
        given = fx.node.map_arg(args, value_of)
        with _unguarded(self.mode):
            node.meta["val"] = target(*given)
        return node

    def _named(self, node: fx.Node, name: str) -> fx.Node:
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        node.name = name
        if node.op == "placeholder":
            node.target = name
        return node


def mode_of(graph: fx.Graph) -> FakeTensorMode:
    """The mode that computed the fake values in ``graph``; a new one where there are none."""
    values = (value_of(node) for node in graph.nodes)
    return next((value.fake_mode for value in values if isinstance(value, FakeTensor)), FakeTensorMode())


@contextmanager
def _unguarded(mode: FakeTensorMode) -> Iterator[None]:
    """Compute with fake values, and learn nothing of the shapes: the program is for those that it was for."""
    with mode, torch.no_grad():
        if mode.shape_env is None:
            yield
        else:
            with mode.shape_env.suppress_guards():
                yield


def _same_shape(a: Tensor, b: Tensor) -> bool:
    """Whether two shapes are the same, and written alike."""
    return a.dim() == b.dim() and all(_written(x) == _written(y) for x, y in zip(a.shape, b.shape, strict=True))


def _written(length: Any) -> Any:
    return length.node.expr if isinstance(length, torch.SymInt) else length
