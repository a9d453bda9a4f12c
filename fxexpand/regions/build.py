"""A map -> the plain layer of torch that applies it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fxexpand.algebra.affine import Affine, pads_itself, swapped, without_groups
from fxexpand.algebra.kernel import Sides, pad_amounts
from fxexpand.graph.copying import bare_twin
from fxexpand.graph.rewrite import FunctionStep

_CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


@dataclass(frozen=True)
class Flags:
    """What a new layer takes over from the ones it replaces."""

    dtype: torch.dtype
    memory_format: torch.memory_format
    requires_grad: bool
    training: bool


def layer_of(affine: Affine, flags: Flags, *, copy: bool) -> tuple[FunctionStep | None, nn.Module]:
    """The layer that applies ``affine``, in the dtype of ``flags``; before it, the padding that it cannot do itself.

    Without ``copy`` it takes the tensors of ``affine`` for its own where they fit.
    """
    kernel = without_groups(affine).kernel
    weight = kernel.weight if affine.transposed is None else swapped(kernel.weight, kernel.groups)
    mode, sides = ("zeros", kernel.padding) if affine.border is None else (affine.border.mode, affine.border.sides)
    own = pads_itself(affine)
    layer = _blank(affine, mode, sides if own else ((0, 0),) * affine.dims)
    layout = flags.memory_format if weight.dim() in (4, 5) else torch.contiguous_format
    held = weight.detach().to(dtype=flags.dtype, memory_format=layout, copy=copy)
    layer._parameters["weight"] = nn.Parameter(held, requires_grad=flags.requires_grad)
    if kernel.bias is not None:
        bias = kernel.bias.detach().to(dtype=flags.dtype, copy=copy)
        layer._parameters["bias"] = nn.Parameter(bias, requires_grad=flags.requires_grad)
    layer.training = flags.training
    return (None if own else _padding(mode, sides)), layer


def _blank(affine: Affine, mode: str, sides: Sides) -> nn.Module:
    """The layer with its settings, and no parameters yet."""
    kernel = affine.kernel
    m, n, has_bias = kernel.in_channels, kernel.out_channels, kernel.bias is not None
    if affine.dims == 0:
        return _uninitialized(nn.Linear, m, n, bias=has_bias)
    if affine.transposed is not None:
        t = affine.transposed
        settings = {
            "stride": t.stride,
            "padding": t.padding,
            "output_padding": t.output_padding,
            "dilation": t.dilation,
        }
    else:
        settings = {
            "stride": kernel.stride,
            "padding": tuple(before for before, _ in sides),
            "dilation": kernel.dilation,
        }
        settings["padding_mode"] = mode if any(map(any, sides)) else "zeros"  # type: ignore[assignment]
    build = (_CONVOLUTIONS if affine.transposed is None else _TRANSPOSED)[affine.dims]
    return _uninitialized(build, m, n, kernel.kernel_size, groups=kernel.groups, bias=has_bias, **settings)


def _uninitialized(cls: Any, *arguments: Any, **settings: Any) -> nn.Module:
    """A layer of ``cls`` without parameters yet, as its constructor would make it."""
    return bare_twin(_pattern(cls, arguments, tuple(settings.items())))


@lru_cache(maxsize=256)  # a network has many layers with few settings, and constructors take their time
def _pattern(cls: Any, arguments: tuple[Any, ...], settings: tuple[tuple[str, Any], ...]) -> nn.Module:
    """On the device "meta", without the random numbers that its constructor would draw."""
    layer: nn.Module = _without_numbers(cls)(*arguments, device="meta", **dict(settings))
    layer.__class__ = cls
    layer._parameters.update(dict.fromkeys(layer._parameters))
    return layer


@cache
def _without_numbers(cls: Any) -> Any:
    return type(cls.__name__, (cls,), {"reset_parameters": lambda _: None})


def _padding(mode: str, sides: Sides) -> FunctionStep:
    settings: tuple[tuple[str, Any], ...] = (("pad", pad_amounts(sides)),)
    return FunctionStep(F.pad, (), settings if mode == "zeros" else (*settings, ("mode", mode)))
