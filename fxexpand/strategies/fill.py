"""Weights for the layers of an expansion, such that they make up a given kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from fxexpand.algebra.combine import remainder
from fxexpand.algebra.kernel import Kernel
from fxexpand.algebra.refusal import Refusal
from fxexpand.graph.assembly import assembly_of
from fxexpand.graph.expanded import BRANCHES, PAD, Expanded, ExpandedSum
from fxexpand.graph.geometry import DIMS
from fxexpand.graph.layers import BATCH_NORMS
from fxexpand.graph.structure import Series, Sum
from fxexpand.strategies.strategy import Strategy


def fill(expanded: Expanded, weight: Tensor, bias: Tensor | None) -> Refusal | None:
    """Give the layers of ``expanded`` weights that make up ``weight`` and ``bias``, computed in float64.

    Which ones is for its strategy to say; batch norm that its layers hold starts as the identity of eval mode. Changes
    the layers in place. Refuses as the strategy does, or where a part can be given no kernel.
    """
    for norm in expanded.modules():
        if isinstance(norm, BATCH_NORMS) and norm.running_var is not None and norm.affine:
            norm.weight.data.copy_((norm.running_var + norm.eps).sqrt())
    geometry = expanded.origin.geometry
    whole = Kernel(_exact(weight), _exact(bias), geometry.stride, (), geometry.dilation, geometry.groups)
    return _fill(expanded, whole)


def body(expanded: Expanded) -> Series | Sum:
    """The structure that the strategy made; there may be padding before it."""
    branches = expanded._modules.get(BRANCHES)
    structure = branches if PAD in expanded._modules and isinstance(branches, Sum) else expanded
    return cast("Series | Sum", structure)


def _fill(expanded: Expanded, target: Kernel) -> Refusal | None:
    structure, strategy = body(expanded), cast(Strategy, expanded.strategy)
    parts = [part for name, part in structure._modules.items() if name != PAD]
    if isinstance(expanded, ExpandedSum):
        target = replace(target, padding=expanded.origin.geometry.padding)
    side_by_side = isinstance(structure, Sum)
    if side_by_side:
        _quieten(parts[1:], target)
    own = _kernels(parts, target, side_by_side=side_by_side)
    if isinstance(own, Refusal):
        return own
    fresh = own if side_by_side else [replace(kernel, padding=()) for kernel in own]
    found: Any = strategy.factorize(target, fresh)
    if isinstance(found, Refusal):
        return found
    if not (isinstance(found, Sequence) and len(found) == len(parts) and all(map(_fits, found, fresh))):
        return Refusal(
            f"{strategy}.factorize() must give a kernel of the same shape for each of its {len(parts)} parts"
        )
    for part, kernel, given, whole in zip(parts, found, fresh, own, strict=True):
        refusal = None if kernel is given else _assign(part, replace(kernel, padding=whole.padding))
        if refusal is not None:
            return refusal
    return None


def _fits(found: object, fresh: Kernel) -> bool:
    return isinstance(found, Kernel) and found.weight.shape == fresh.weight.shape


def _quieten(branches: Sequence[nn.Module], target: Kernel) -> None:
    """Let ``branches`` start without biases, and no larger than ``target``, which would drown in what they cancel: the
    last weight of a branch is made smaller where that is needed.
    """
    most = float(target.weight.square().sum().sqrt())
    with torch.no_grad():
        for branch in branches:
            for layer in branch.modules():
                if isinstance(layer, tuple(DIMS)) and layer.bias is not None:
                    cast(Tensor, layer.bias).zero_()
            kernel = _kernel(branch, target.in_channels, target)
            size = 0.0 if isinstance(kernel, Refusal) else float(kernel.weight.square().sum().sqrt())
            weights = [p for name, p in branch.named_parameters() if name.endswith("weight") and p.requires_grad]
            if size > most and weights:
                weights[-1].mul_(most / size)


def _kernels(parts: Sequence[nn.Module], target: Kernel, *, side_by_side: bool) -> list[Kernel] | Refusal:
    """The kernels of ``parts`` as they are."""
    found: list[Kernel] = []
    for part in parts:
        channels = found[-1].out_channels if found and not side_by_side else target.in_channels
        kernel = _kernel(part, channels, target)
        if isinstance(kernel, Refusal):
            return kernel
        found.append(kernel)
    return found


def _kernel(part: nn.Module, channels: int, beside: Kernel) -> Kernel | Refusal:
    assembly = assembly_of(part, channels, beside.dims)
    return assembly if isinstance(assembly, Refusal) else assembly.kernel(part, _exact, beside.weight)


def _assign(part: nn.Module, kernel: Kernel) -> Refusal | None:
    """Make ``part`` compute ``kernel``."""
    if isinstance(part, Expanded):
        return _fill(part, replace(kernel, padding=()))
    if isinstance(part, Sum):
        branches = list(part.values())
        _quieten(branches[1:], kernel)
        fresh = _kernels(branches, kernel, side_by_side=True)
        found = fresh if isinstance(fresh, Refusal) else remainder(kernel, fresh)
        return found if isinstance(found, Refusal) else _assign(branches[0], found[0])
    if isinstance(part, Series):
        return _assign_series(part, kernel)
    if not isinstance(part, tuple(DIMS)):
        return Refusal(f"a {type(part).__name__} can be given no kernel; let a layer come first among the branches")
    with torch.no_grad():
        layer = cast(Any, part)
        layer.weight.copy_(kernel.weight)
        if layer.bias is not None:
            layer.bias.zero_() if kernel.bias is None else layer.bias.copy_(kernel.bias)
    return None if layer.bias is not None or _is_zero(kernel.bias) else Refusal("its first layer has no bias")


def _assign_series(series: Series, kernel: Kernel) -> Refusal | None:
    """Make a layer, with what scales its channels after it, compute ``kernel``: W = K / s, b = (b_K − t) / s."""
    parts = [part for name, part in series._modules.items() if name != PAD]
    layer, *after = parts
    scale, shift = kernel.weight.new_ones(kernel.out_channels), kernel.weight.new_zeros(kernel.out_channels)
    for part in after:
        own = _kernel(part, kernel.out_channels, kernel)
        if isinstance(own, Refusal) or not (own.depthwise and own.pointwise and set(own.stride) <= {1}):
            return Refusal(f"the {type(part).__name__} after its first layer is no number for each channel")
        factor = own.weight.flatten()
        scale, shift = scale * factor, shift * factor + (0.0 if own.bias is None else own.bias)
    if bool((scale == 0).any()):
        return Refusal("what comes after its first layer multiplies by zero")
    wanted = -shift if kernel.bias is None else kernel.bias - shift
    last = getattr(after[-1], "bias", None) if after and isinstance(after[-1], BATCH_NORMS) else None
    if last is not None and getattr(layer, "bias", None) is None:
        with torch.no_grad():
            last.add_(wanted.to(last.dtype))
        wanted = torch.zeros_like(wanted)
    weight = kernel.weight / scale.reshape(-1, *(1,) * (kernel.weight.dim() - 1))
    return _assign(layer, kernel.over(weight, wanted / scale))


def _exact(tensor: Any) -> Any:
    return None if tensor is None else tensor.detach().double()


def _is_zero(bias: Tensor | None) -> bool:
    return bias is None or not bool(bias.any())
