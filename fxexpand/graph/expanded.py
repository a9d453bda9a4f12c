"""The place of an expanded layer: its new layers, and what it takes to have the old one back."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fxexpand.algebra.compose import compose_all
from fxexpand.algebra.kernel import Ints, Kernel, Sides
from fxexpand.algebra.refusal import Refusal
from fxexpand.graph.geometry import Geometry
from fxexpand.graph.layers import peculiarity
from fxexpand.graph.lift import lift_bare, padding_of

# What marks the layers of expansions, so that they are known where some other pass has dropped what holds them.
_MARK = "part_of_expansion"

# The name of the padding module that stands before the layers where no layer can pad as asked.
PAD = "pad"


@dataclass(frozen=True)
class LayerOrigin:
    """A layer that was a module. ``template`` is that module without its weight and bias."""

    geometry: Geometry
    template: nn.Module

    @staticmethod
    def of(layer: nn.Module, geometry: Geometry) -> LayerOrigin:
        template = copy.copy(layer)
        vars(template)["_parameters"] = dict.fromkeys(layer._parameters)
        vars(template)["_buffers"] = dict.fromkeys(layer._buffers)
        return LayerOrigin(geometry, template)

    @property
    def description(self) -> str:
        return type(self.template).__name__


@dataclass(frozen=True)
class CallOrigin:
    """A layer that was a functional call, ``function(x, weight, bias, **settings)``.

    ``bias`` is the name of the bias in the module that owns both; ``parameters`` are all the names that this module
    had for its parameters, in their order.
    """

    geometry: Geometry
    function: Callable[..., Tensor]
    bias: str | None
    settings: tuple[tuple[str, Any], ...]
    parameters: tuple[str, ...]

    @property
    def description(self) -> str:
        return f"{self.function.__name__}()"


class Expanded(nn.Sequential):
    """The layers that stand for one layer, under its path: ``features.0.expand``, ``features.0.kernel``, …

    Calling it applies them in turn. It also answers for the layer that it replaces: ``weight`` and ``bias`` are
    composed from the layers, differentiably, and hyperparameters (``in_channels``, …) are the old layer's. So code
    that reads a layer's weight instead of calling it keeps its function. ``strategy`` is what said which layers these
    are.
    """

    if TYPE_CHECKING:  # TorchScript reads the annotations of classes, and knows no such types
        origin: LayerOrigin | CallOrigin
        strategy: object

    def __init__(self, layers: Mapping[str, nn.Module], origin: LayerOrigin | CallOrigin, strategy: object) -> None:
        super().__init__(OrderedDict(layers))
        self.origin = origin
        self.strategy = strategy
        for layer in layers.values():
            setattr(layer, _MARK, True)

    @property
    def weight(self) -> Tensor:
        """The weight of the one layer that these are: (n, m / groups, *k), in the dtype of the layers."""
        return self._kernel().weight

    @property
    def bias(self) -> Tensor | None:
        """The bias of the one layer that these are: (n,), or None."""
        return self._kernel().bias

    def as_kernel(self, dtype: torch.dtype | None = None, *, sketch: bool = False) -> Kernel | Refusal:
        """The kernel that the layers compose to, computed in ``dtype``, without the padding of the first.

        A ``sketch`` is on the device "meta": it has shapes, and no numbers. Refuses when the layers no longer form one
        layer with the hyperparameters of the old one.
        """
        kernels: list[Kernel] = []
        for position, (name, layer) in enumerate(self.named_children()):
            if name == PAD and position == 0:
                continue
            lifted = _lift_inner(layer, first=position == 0, sketch=sketch)
            if isinstance(lifted, Refusal):
                return lifted.at(name)
            kernels.append(lifted if dtype is None else lifted.to(dtype=dtype))
        devices = sorted({str(parameter.device) for parameter in self.parameters()})
        if len(devices) != 1:
            return Refusal(f"its layers are on {len(devices)} devices ({', '.join(devices)}), expected one")
        whole = compose_all(kernel.to(device="meta") for kernel in kernels) if sketch else compose_all(kernels)
        return whole if isinstance(whole, Refusal) else self._as_before(whole)

    def in_turn(self) -> list[tuple[str, nn.Module]]:
        """(path, module) of all that is called in turn: padding and layers, also those of expansions inside."""
        found: list[tuple[str, nn.Module]] = []
        for name, child in self.named_children():
            inner = child.in_turn() if isinstance(child, Expanded) else [("", child)]
            found += [(f"{name}.{path}".rstrip("."), module) for path, module in inner]
        return found

    @property
    def entry_padding(self) -> tuple[str, Sides] | None:
        """(mode, sides) that pads the input: by the first layer, or by a padding module before it."""
        first = next(iter(self._modules.values()))
        return first.entry_padding if isinstance(first, Expanded) else padding_of(first)

    def _as_before(self, whole: Kernel) -> Kernel | Refusal:
        geometry = self.origin.geometry
        shape = (geometry.out_channels, geometry.in_channels // geometry.groups, *geometry.kernel_size)
        facts = [
            ("weight of shape", tuple(whole.weight.shape), shape),
            ("stride", whole.stride, geometry.stride),
            ("dilation", _where_it_counts(whole.dilation, shape), _where_it_counts(geometry.dilation, shape)),
            ("groups", whole.groups, geometry.groups),
            ("inner padding", any(map(any, whole.padding)), False),
            ("padding", self.entry_padding, (geometry.padding_mode, geometry.padding) if geometry.padded else None),
            ("bias", whole.bias is not None, geometry.has_bias),
        ]
        for what, found, expected in facts:
            if found != expected:
                return Refusal(f"its layers form one with {what} {found}, where the layer had {expected}")
        return Kernel(whole.weight, whole.bias, geometry.stride, (), geometry.dilation, geometry.groups)

    def _kernel(self) -> Kernel:
        device = next(self.parameters()).device
        with torch.autocast(device.type, enabled=False):  # bfloat16 products would lose four digits
            kernel = self.as_kernel()
        if isinstance(kernel, Refusal):
            raise RuntimeError(f"the layers of this {self.origin.description} are no longer one layer: {kernel}")
        return kernel

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            origin = vars(self).get("origin")
            if isinstance(origin, LayerOrigin) and not name.startswith("_") and name in vars(origin.template):
                return vars(origin.template)[name]
            raise


def strays(model: nn.Module) -> list[str]:
    """The paths of layers of an expansion that no longer stand in one."""
    held = {id(layer) for module in model.modules() if isinstance(module, Expanded) for layer in module.children()}
    return [path for path, module in model.named_modules() if hasattr(module, _MARK) and id(module) not in held]


def _lift_inner(layer: nn.Module, *, first: bool, sketch: bool) -> Kernel | Refusal:
    """The kernel of one layer of an expansion; the first one's padding is the expansion's own, and left out."""
    if isinstance(layer, Expanded):
        kernel, padding = layer.as_kernel(sketch=sketch), layer.entry_padding
    else:
        kernel, padding = lift_bare(layer), padding_of(layer)
        if isinstance(kernel, Kernel):
            kernel = peculiarity(layer) or kernel
    if first or padding is None or isinstance(kernel, Refusal):
        return kernel
    mode, sides = padding
    if mode != "zeros":
        return Refusal(f"it pads with mode {mode!r} inside the expansion, where one layer would see zeros")
    return replace(kernel, padding=sides)


def _where_it_counts(dilation: Ints, shape: tuple[int, ...]) -> Ints:
    """The dilation of the axes that have more than one tap."""
    return tuple(step for step, k in zip(dilation, shape[2:], strict=True) if k > 1)
