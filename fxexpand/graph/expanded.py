"""The place of an expanded layer: its new layers, and what it takes to have the old one back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fxexpand.algebra.affine import Affine, Border
from fxexpand.algebra.kernel import Ints, Kernel
from fxexpand.algebra.refusal import Refusal
from fxexpand.graph.assembly import Assembly, assembly_of
from fxexpand.graph.geometry import Geometry
from fxexpand.graph.structure import Series, Sum, leaves

# What marks the layers of expansions, so that they are known where some other pass has dropped what holds them.
MARK = "part_of_expansion"

# The name of the padding module that stands before the layers where no layer can pad as asked.
PAD = "pad"

# Where branches stand in an expansion that pads before them.
BRANCHES = "branches"


@dataclass(frozen=True)
class LayerOrigin:
    """A layer that was a module. ``template`` is that module without its weight and bias.

    ``feeds_norm``: nothing but batch norm read its output, so that its layers may have a bias that it had not.
    """

    geometry: Geometry
    template: nn.Module
    feeds_norm: bool = False

    @staticmethod
    def of(layer: nn.Module, geometry: Geometry, *, feeds_norm: bool) -> LayerOrigin:
        template = copy.copy(layer)
        vars(template)["_parameters"] = dict.fromkeys(layer._parameters)
        vars(template)["_buffers"] = dict.fromkeys(layer._buffers)
        return LayerOrigin(geometry, template, feeds_norm)

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
    feeds_norm: bool = False

    @property
    def description(self) -> str:
        return f"{self.function.__name__}()"


class StandIn(nn.Module):
    """What stands in the place of one layer, ``origin``, and has its hyperparameters (``in_channels``, …).

    ``strategy`` is what said which layers it holds, ``fixed`` are the names of the parameters that it gave to stay.
    """

    if TYPE_CHECKING:  # TorchScript reads the annotations of classes, and knows no such types
        origin: LayerOrigin | CallOrigin
        strategy: object
        fixed: frozenset[str]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            origin = vars(self).get("origin")
            if isinstance(origin, LayerOrigin) and not name.startswith("_") and name in vars(origin.template):
                return vars(origin.template)[name]
            raise


class Expanded(StandIn):
    """The layers that stand for one layer, under its path: ``features.0.expand``, ``features.0.kernel``, …

    Calling it applies them, in turn or side by side. It also answers for the layer that it replaces: ``weight`` and
    ``bias`` are composed from the layers, differentiably, and hyperparameters are the old layer's. So code that reads a
    layer's weight instead of calling it keeps its function; batch norm counts there by its running statistics.
    """

    @staticmethod
    def of(structure: Series | Sum, origin: LayerOrigin | CallOrigin, strategy: object) -> Expanded:
        """The expansion that holds the parts of ``structure``."""
        expanded: Expanded = (ExpandedSum if isinstance(structure, Sum) else ExpandedChain)(structure._modules)
        expanded.origin, expanded.strategy = origin, strategy
        expanded.fixed = frozenset(name for name, p in expanded.named_parameters() if not p.requires_grad)
        for _, layer in leaves(expanded):
            setattr(layer, MARK, True)
        return expanded

    @property
    def weight(self) -> Tensor:
        """The weight of the one layer that these are: (n, m / groups, *k), in the dtype of the layers."""
        return self._kernel().weight

    @property
    def bias(self) -> Tensor | None:
        """The bias of the one layer that these are: (n,), or None."""
        return self._kernel().bias

    def assembly(self, *, running: bool = False) -> Assembly | Refusal:
        """How the layers make up one layer with the hyperparameters of the old one, or why they do not.

        ``running``: batch norm counts as it does in eval mode, whatever mode it is in.
        """
        found = assembly_of(self, self.origin.geometry.in_channels, self.origin.geometry.dims, running=running)
        if isinstance(found, Refusal):
            return found
        devices = sorted({str(parameter.device) for parameter in self.parameters()})
        if len(devices) != 1:
            return Refusal(f"its layers are on {len(devices)} devices ({', '.join(devices)}), expected one")
        return self._unlike(found.like) or found

    def as_kernel(self, dtype: torch.dtype | None = None, *, running: bool = False) -> Kernel | Refusal:
        """The kernel that the layers make up, computed in ``dtype``, without the padding.

        Refuses when the layers no longer form one layer with the hyperparameters of the old one; so does batch norm in
        training mode, unless its ``running`` statistics are asked for.
        """
        whole = self.as_affine(dtype, running=running)
        if isinstance(whole, Refusal):
            return whole
        geometry, (weight, bias) = self.origin.geometry, (whole.kernel.weight, whole.kernel.bias)
        return Kernel(weight, bias, geometry.stride, (), geometry.dilation, geometry.groups)

    def as_affine(self, dtype: torch.dtype | None = None, *, running: bool = False) -> Affine | Refusal:
        """The map that the layers make up, computed in ``dtype``, with its padding; refuses as ``as_kernel`` does."""
        found = self.assembly(running=running)
        if isinstance(found, Refusal):
            return found
        whole = found.kernel(self, lambda tensor: tensor if tensor is None or dtype is None else tensor.to(dtype))
        return whole if isinstance(whole, Refusal) else found.like.over(whole.weight, whole.bias)

    def _unlike(self, whole: Affine) -> Refusal | None:
        geometry, kernel = self.origin.geometry, whole.kernel
        shape = (geometry.out_channels, geometry.in_channels // geometry.groups, *geometry.kernel_size)
        border = whole.border or (Border("zeros", kernel.padding) if any(map(any, kernel.padding)) else None)
        has_bias = kernel.bias is not None
        facts = [
            ("weight of shape", tuple(kernel.weight.shape), shape),
            ("stride", kernel.stride, geometry.stride),
            ("dilation", _where_it_counts(kernel.dilation, shape), _where_it_counts(geometry.dilation, shape)),
            ("groups", kernel.groups, geometry.groups),
            ("padding", border, Border(geometry.padding_mode, geometry.padding) if geometry.padded else None),
            ("bias", has_bias, geometry.has_bias or (has_bias and self.origin.feeds_norm)),
        ]
        for what, found, expected in facts:
            if found != expected:
                return Refusal(f"its layers form one with {what} {found}, where the layer had {expected}")
        return None

    def _kernel(self) -> Kernel:
        device = next(self.parameters()).device
        with torch.autocast(device.type, enabled=False):  # bfloat16 products would lose four digits
            kernel = self.as_kernel(running=True)
        if isinstance(kernel, Refusal):
            raise RuntimeError(f"the layers of this {self.origin.description} are no longer one layer: {kernel}")
        return kernel


class ExpandedChain(Expanded, Series):
    """An expansion into layers one after another: y = reduce(kernel(expand(x)))."""


class ExpandedSum(Expanded, Sum):
    """An expansion into branches side by side: y = square(x) + horizontal(x) + vertical(x)."""


def outermost(model: nn.Module) -> list[tuple[str, Expanded]]:
    """(path, expansion) of those that are in no other one, each once, in the order of ``named_modules``."""
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, Expanded)]
    inner = {id(child) for _, module in found for child in module.modules() if child is not module}
    return [(path, module) for path, module in found if id(module) not in inner]


def strays(model: nn.Module) -> list[str]:
    """The paths of layers of an expansion that no longer stand in one."""
    held = {id(layer) for module in model.modules() if isinstance(module, Expanded) for layer in module.modules()}
    return [path for path, module in model.named_modules() if MARK in vars(module) and id(module) not in held]


def _where_it_counts(dilation: Ints, shape: tuple[int, ...]) -> Ints:
    """The dilation of the axes that have more than one tap."""
    return tuple(step for step, k in zip(dilation, shape[2:], strict=True) if k > 1)
