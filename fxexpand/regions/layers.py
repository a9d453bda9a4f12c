"""Modules that apply an affine map, and the map."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from fxexpand.algebra.affine import Affine, Border, Transposed, swapped
from fxexpand.algebra.kernel import Kernel
from fxexpand.algebra.refusal import Refusal
from fxexpand.graph.geometry import spread
from fxexpand.graph.layers import dtype_refusal, has_hooks, is_layer, peculiarity
from fxexpand.graph.lift import lift_padded
from fxexpand.regions.maps import average, batch_norm_map, padding_map
from fxexpand.regions.parts import Lifted, Made, Signal, Unary

_TRANSPOSED: dict[type[nn.Module], int] = {nn.ConvTranspose1d: 1, nn.ConvTranspose2d: 2, nn.ConvTranspose3d: 3}
_NORMS: dict[type[nn.Module], int | None] = {
    nn.BatchNorm1d: None,
    nn.BatchNorm2d: 2,
    nn.BatchNorm3d: 3,
    nn.SyncBatchNorm: None,
}
_POOLS: dict[type[nn.Module], int] = {nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3}
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_ZERO_PADS: dict[type[nn.Module], int] = {nn.ZeroPad1d: 1, nn.ZeroPad2d: 2, nn.ZeroPad3d: 3}
_CONSTANT_PADS: dict[type[nn.Module], int] = {
    nn.ConstantPad1d: 1,
    nn.ConstantPad2d: 2,
    nn.ConstantPad3d: 3,
    **_ZERO_PADS,
}


def lift_module(module: nn.Module, source: fx.Node) -> Lifted:
    """What calling ``module`` on ``source`` does: None for a module that is not affine."""
    if is_layer(module) or isinstance(module, nn.SyncBatchNorm):
        norm = isinstance(module, tuple(_NORMS))
        refusal = _norm_peculiarity(module) if norm else peculiarity(module)
        if refusal is not None:
            return refusal
        if norm:
            return _lift_norm(module, source)
        return _lift_transposed(module, source) if isinstance(module, tuple(_TRANSPOSED)) else _lift(module, source)
    if type(module) is nn.Identity or (type(module) in _DROPOUTS):
        lifted: Lifted = Unary(source, lambda _: None)
        if type(module) is not nn.Identity and module.training and vars(module)["p"] > 0:
            lifted = Refusal("training mode, in which it drops values at random; call model.eval() first")
    elif type(module) in _POOLS:
        lifted = _lift_pool(module, _POOLS[type(module)], source)
    elif type(module) in _CONSTANT_PADS:
        lifted = _lift_pad(module, _CONSTANT_PADS[type(module)], source)
    else:
        return None
    return Refusal("it has hooks, which would be lost; remove them first") if has_hooks(module) else lifted


def lift_as(module: nn.Module, kernel: object, source: fx.Node) -> Unary | Refusal:
    """What the user says that ``module`` does."""
    if not isinstance(kernel, Kernel):
        return Refusal(f"lifts: expected a Kernel for {type(module).__name__}, found {type(kernel).__name__}")
    if has_hooks(module):
        return Refusal("it has hooks, which would be lost; remove them first")
    known = fixed(source, Affine(kernel.detach()), computes=not (kernel.depthwise and kernel.pointwise))
    # Its own tensors tell dtype and device of the signal: the kernel may be given in float64.
    own = tuple(t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point())
    return replace(known, tensors=own or known.tensors)


def _lift(module: nn.Module, source: fx.Node) -> Unary | Refusal:
    lifted = lift_padded(module)
    if isinstance(lifted, Refusal):
        return lifted
    kernel, mode, sides = lifted
    if kernel.weight.numel() == 0:
        return Refusal("it has no channels")
    border = None if mode == "zeros" else Border(mode, sides)
    return fixed(source, Affine(kernel.detach(), border), computes=True)


def _lift_transposed(module: Any, source: fx.Node) -> Unary | Refusal:
    d = next(dims for base, dims in _TRANSPOSED.items() if isinstance(module, base))
    settings = Transposed(
        spread(module.stride, d),
        spread(module.padding, d),
        spread(module.output_padding, d),
        spread(module.dilation, d),
    )
    return fixed(source, transposed_map(module.weight.detach(), module.bias, settings, module.groups), computes=True)


def transposed_map(weight: Tensor, bias: Tensor | None, settings: Transposed, groups: int) -> Affine:
    """The map of a transposed convolution with ``weight`` (m, n / groups, *k)."""
    kernel = Kernel(swapped(weight, groups), None if bias is None else bias.detach(), groups=groups)
    return Affine(kernel, None, settings)


def fixed(source: fx.Node, affine: Affine, *, computes: bool) -> Unary:
    """A node that applies ``affine``, whatever it reads."""
    kernel = affine.kernel
    return Unary(
        source,
        lambda _: affine,
        reads=Signal(kernel.dims, kernel.in_channels),
        gives=Signal(kernel.dims, kernel.out_channels),
        channels=lambda _: kernel.out_channels,
        computes=computes,
        tensors=(kernel.weight,) if kernel.bias is None else (kernel.weight, kernel.bias),
    )


def _norm_peculiarity(module: nn.Module) -> Refusal | None:
    if parametrize.is_parametrized(module):
        return Refusal("it is parametrized; call torch.nn.utils.parametrize.remove_parametrizations first")
    if has_hooks(module):
        return Refusal("it has hooks, which would be lost; remove them first")
    norm = cast(nn.BatchNorm2d, module)
    if norm.training:
        return Refusal(TRAINING)
    if norm.running_mean is None or norm.running_var is None:
        return Refusal("it keeps no running statistics: it normalises each batch by its own")
    if torch.nn.parameter.is_lazy(norm.running_mean):
        return Refusal("its shape is not known yet; run the model once on a batch first")
    return dtype_refusal(norm.running_mean)


TRAINING = "training mode; call model.eval() first"


def _lift_norm(module: nn.Module, source: fx.Node) -> Unary:
    norm = cast(nn.BatchNorm2d, module)
    dims = next(d for base, d in _NORMS.items() if isinstance(module, base))
    mean, var = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)

    def make(signal: Signal) -> Made:
        if isinstance(module, nn.BatchNorm1d) and signal.dims in (2, 3):
            return Refusal("it takes 3 axes at most, so what it normalises here is no batch, and axis 1 no channels")
        return batch_norm_map(signal, mean, var, norm.weight, norm.bias, norm.eps)

    # BatchNorm1d counts axis 1, which is that of the channels only if there is a batch, or a linear layer.
    known = Signal() if dims is None else Signal(dims, mean.numel(), dims + 2)
    return Unary(source, make, reads=known, gives=known, tensors=(mean, var))


def _lift_pool(module: Any, d: int, source: fx.Node) -> Unary | Refusal:
    return average(
        source,
        d,
        module.kernel_size,
        module.stride,
        module.padding,
        module.ceil_mode,
        module.count_include_pad,
        getattr(module, "divisor_override", None),
    )


def _lift_pad(module: Any, d: int, source: fx.Node) -> Unary | Refusal | None:
    if module.value != 0:
        return Refusal(f"it pads with {module.value}, where a layer would pad with zeros")
    return padding_map(source, tuple(module.padding), Signal(dims=d))
