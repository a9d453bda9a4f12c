"""A layer and where it stands: what rules match and strategies read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from fxexpand.algebra.kernel import Ints, Sides
from fxexpand.algebra.refusal import Refusal
from fxexpand.graph.geometry import Geometry, spread
from fxexpand.graph.lift import pad_module
from fxexpand.graph.structure import Series

_NORM = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_POOL = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
_LAYER = {0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@dataclass(frozen=True)
class Call:
    """One use of a layer in a graph: ``node`` of ``graph_module``, which stands at ``prefix`` in the model."""

    graph_module: fx.GraphModule
    node: fx.Node
    prefix: str


@dataclass(frozen=True, eq=False)
class Site:
    """A layer, and where it stands.

    ``path`` is its dotted path in the model; that of a functional call is its weight's. ``module`` is the layer, or
    None for a functional call, whose function is ``function``. ``calls`` are the graph nodes that use it: none in a
    parent that cannot be traced. ``refusal`` says why no strategy can replace it, where that is so. ``feeds_norm``: at
    each call, a batch norm of its own alone reads the output, so that a bias would be taken off again.
    """

    path: str
    geometry: Geometry
    module: nn.Module | None
    function: Any
    weight: Tensor | None
    bias: Tensor | None
    calls: tuple[Call, ...]
    reads_input: bool
    expanded: bool
    refusal: Refusal | None
    feeds_norm: bool = False

    @property
    def dims(self) -> int:
        """The number of spatial axes: 0 for a linear layer, 1 to 3 for a convolution."""
        return self.geometry.dims

    @property
    def in_channels(self) -> int:
        """Input channels; input features of a linear layer."""
        return self.geometry.in_channels

    @property
    def out_channels(self) -> int:
        """Output channels; output features of a linear layer."""
        return self.geometry.out_channels

    @property
    def kernel_size(self) -> Ints:
        return self.geometry.kernel_size

    @property
    def stride(self) -> Ints:
        return self.geometry.stride

    @property
    def padding(self) -> Sides:
        """(before, after) for each axis, in samples."""
        return self.geometry.padding

    @property
    def padding_mode(self) -> str:
        return self.geometry.padding_mode

    @property
    def dilation(self) -> Ints:
        return self.geometry.dilation

    @property
    def groups(self) -> int:
        return self.geometry.groups

    @property
    def depthwise(self) -> bool:
        return self.geometry.depthwise

    @property
    def has_bias(self) -> bool:
        return self.geometry.has_bias

    @property
    def node(self) -> fx.Node | None:
        """The first graph node that uses the layer; None in a parent that cannot be traced."""
        return self.calls[0].node if self.calls else None

    @property
    def users(self) -> tuple[fx.Node, ...]:
        """The nodes that read the layer's output, over all its calls."""
        return tuple(user for call in self.calls for user in call.node.users)

    def module_of(self, node: fx.Node) -> nn.Module | None:
        """The module that ``node`` calls, for a ``call_module`` node of a graph in which the layer is used."""
        if node.op != "call_module":
            return None
        return next(
            (call.graph_module.get_submodule(str(node.target)) for call in self.calls if call.node.graph is node.graph),
            None,
        )

    def layer(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Ints = 1,
        *,
        stride: int | Ints = 1,
        padding: int | Ints | Sides = 0,
        dilation: int | Ints = 1,
        groups: int | None = None,
        bias: bool | None = None,
    ) -> nn.Module:
        """A new layer of this site's kind (``Linear`` or ``ConvNd``), dtype and device.

        Its groups and whether it has a bias are the site's, unless given. ``padding`` may be the site's own; the site's
        padding mode goes with it. A linear layer has channels alone.
        """
        options: dict[str, Any] = {"bias": self.has_bias if bias is None else bias} | self._like_weight
        if self.dims == 0:
            return nn.Linear(in_channels, out_channels, **options)
        amounts = tuple(side if isinstance(side, int) else side[0] for side in _spread_sides(padding, self.dims))
        build: Any = _LAYER[self.dims]
        layer: nn.Module = build(
            in_channels,
            out_channels,
            spread(kernel_size, self.dims),
            stride=spread(stride, self.dims),
            padding=amounts,
            dilation=spread(dilation, self.dims),
            groups=self.groups if groups is None else groups,
            padding_mode=self.padding_mode if any(amounts) else "zeros",
            **options,
        )
        return layer

    def branch(self, kernel_size: int | Ints, *, bias: bool | None = None) -> nn.Module:
        """A layer with a kernel of ``kernel_size`` or less in the middle of this site's, and its channels, stride,
        dilation and groups; added to the site's own, it gives one kernel of the site's size.

        Where that takes other padding than a layer has (more on one side, or less than none), padding goes before it.
        """
        size, sides = spread(kernel_size, self.dims), self.beside(kernel_size)
        plain = all(before == after >= 0 for before, after in sides)
        layer = self.layer(
            self.in_channels,
            self.out_channels,
            size,
            stride=self.stride,
            padding=sides if plain else 0,
            dilation=self.dilation,
            bias=bias,
        )
        return layer if plain else Series({"pad": pad_module("zeros", sides), "conv": layer})

    def beside(self, kernel_size: int | Ints) -> Sides:
        """The padding of a kernel of ``kernel_size`` that stands in the middle of this site's; less than 0 crops."""
        size = spread(kernel_size, self.dims)
        return tuple(
            (before - step * ((k - own) // 2), after - step * (k - own - (k - own) // 2))
            for (before, after), step, k, own in zip(self.padding, self.dilation, self.kernel_size, size, strict=True)
        )

    def average(self) -> nn.Module:
        """An average pool with this site's kernel size and stride, without padding."""
        build: Any = _POOL[self.dims]
        pool: nn.Module = build(self.kernel_size, stride=self.stride)
        return pool

    def norm(self, channels: int | None = None) -> nn.Module:
        """Batch norm for ``channels``, the site's output channels by default."""
        build: Any = _NORM[self.dims]
        norm: nn.Module = build(self.out_channels if channels is None else channels, **self._like_weight)
        return norm

    def scale(self, value: float = 1.0) -> nn.Module:
        """A learnt number for each output channel, ``value`` at first: a depthwise, pointwise convolution."""
        n = self.out_channels
        layer: Any = self.layer(n, n, groups=n, bias=False)
        nn.init.constant_(layer.weight, value)
        scale: nn.Module = layer
        return scale

    @property
    def _like_weight(self) -> dict[str, Any]:
        if self.weight is None:
            raise TypeError(f"{self.path}: {self.refusal}")
        return {"dtype": self.weight.dtype, "device": self.weight.device}

    def __str__(self) -> str:
        """``features.0 (Conv2d 3×3, 16 -> 32, groups=4)``."""
        name = type(self.module).__name__ if self.module is not None else f"{self.function.__name__}()"
        size = " " + "×".join(map(str, self.kernel_size)) if self.dims else ""
        groups = f", groups={self.groups}" if self.groups > 1 else ""
        return f"{self.path or 'the model'} ({name}{size}, {self.in_channels} -> {self.out_channels}{groups})"


def _spread_sides(padding: Any, dims: int) -> tuple[Any, ...]:
    return (padding,) * dims if isinstance(padding, int) else tuple(padding)
