"""Layers that are called as functions, and the affine maps they apply."""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxexpand.algebra.affine import Affine, Transposed
from fxexpand.algebra.kernel import Kernel
from fxexpand.algebra.refusal import Refusal
from fxexpand.graph.geometry import padding_sides, spread
from fxexpand.graph.layers import dtype_refusal
from fxexpand.regions.arguments import Arguments, Rule
from fxexpand.regions.layers import fixed, transposed_map
from fxexpand.regions.maps import PASS_INPUTS, average, batch_norm_map, padding_map
from fxexpand.regions.parts import Lifted, Made, Signal, Unary

_CONVOLUTIONS: dict[Any, int] = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}
_TRANSPOSED: dict[Any, int] = {F.conv_transpose1d: 1, F.conv_transpose2d: 2, F.conv_transpose3d: 3}
_POOLS: dict[Any, int] = {F.avg_pool1d: 1, F.avg_pool2d: 2, F.avg_pool3d: 3}
_CONV_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED_NAMES = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_POOL_NAMES = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
NORM_NAMES = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")

BY_BATCH = "training=True: it normalises each batch by its own statistics"


def _convolution(arguments: Arguments, node: fx.Node, target: Any) -> Lifted:
    given = arguments.by_name(node, _CONV_NAMES)
    if given is None:
        return None
    d, weight = _CONVOLUTIONS[target], given["weight"]
    dilation = spread(given.get("dilation", 1), d)
    kernel = Kernel(
        weight,
        given.get("bias"),
        spread(given.get("stride", 1), d),
        padding_sides(given.get("padding", 0), tuple(weight.shape[2:]), dilation),
        dilation,
        given.get("groups", 1),
    )
    return dtype_refusal(weight) or fixed(given["input"], Affine(kernel), computes=True)


def _transposed(arguments: Arguments, node: fx.Node, target: Any) -> Lifted:
    given = arguments.by_name(node, _TRANSPOSED_NAMES)
    if given is None:
        return None
    d, weight = _TRANSPOSED[target], given["weight"]
    stride, padding, more, dilation = (
        spread(given.get(name, default), d)
        for name, default in (("stride", 1), ("padding", 0), ("output_padding", 0), ("dilation", 1))
    )
    affine = transposed_map(
        weight, given.get("bias"), Transposed(stride, padding, more, dilation), given.get("groups", 1)
    )
    return dtype_refusal(weight) or fixed(given["input"], affine, computes=True)


def _linear(arguments: Arguments, node: fx.Node, target: Any) -> Lifted:
    given = arguments.by_name(node, ("input", "weight", "bias"))
    if given is None or given["weight"].dim() != 2:
        return None
    return _product(given["input"], given["weight"], given.get("bias"))


def _matmul(arguments: Arguments, node: fx.Node, target: Any) -> Lifted:
    second = "mat2" if target is torch.mm else "other"
    given = arguments.by_name(node, ("input", second))
    if given is None or not isinstance(given[second], Tensor) or given[second].dim() != 2:
        return None
    return _product(given["input"], given[second].t(), None)


def _addmm(arguments: Arguments, node: fx.Node, target: Any) -> Lifted:
    names = {"input": 0, "mat1": 1, "mat2": 2}
    given = {name: node.kwargs.get(name, node.args[i] if i < len(node.args) else None) for name, i in names.items()}
    if not arguments.varies(given["mat1"]) or arguments.varies(given["input"]) or arguments.varies(given["mat2"]):
        return None
    bias, weight = arguments.value(given["input"]), arguments.value(given["mat2"])
    if not isinstance(bias, Tensor) or bias.dim() != 1 or bias.numel() != weight.shape[1]:
        return None
    alpha, beta = (cast(float, node.kwargs.get(name, 1)) for name in ("alpha", "beta"))
    source = given["mat1"]
    assert isinstance(source, fx.Node)
    lifted = _product(source, weight.t() * alpha, bias * beta)
    return lifted if isinstance(lifted, Refusal) else _with_rank(lifted, 2)


def _batch_norm(arguments: Arguments, node: fx.Node, target: Any) -> Lifted:
    # Asked first: in training mode it changes the statistics, which are no constants then.
    training = node.kwargs.get("training", node.args[5] if len(node.args) > 5 else False)
    if training is True and node.args and arguments.varies(node.args[0]):
        return Refusal(BY_BATCH)
    given = arguments.by_name(node, NORM_NAMES)
    if given is None:
        return None
    mean, var = given.get("running_mean"), given.get("running_var")
    if given.get("training", False):
        return Refusal(BY_BATCH)
    if mean is None or var is None:
        return Refusal("it has no running statistics: it normalises each batch by its own")
    weight, bias, eps = given.get("weight"), given.get("bias"), given.get("eps", 1e-5)

    def make(signal: Signal) -> Made:
        if signal.rank is None and signal.dims in (2, 3):
            return Refusal(f"the function takes inputs without batch, of which axis 1 is no channel; {PASS_INPUTS}")
        return batch_norm_map(signal, mean, var, weight, bias, eps)

    return Unary(given["input"], make, tensors=(mean, var))


def _pool(arguments: Arguments, node: fx.Node, target: Any) -> Lifted:
    given = arguments.by_name(node, _POOL_NAMES)
    if given is None:
        return None
    return average(
        given["input"],
        _POOLS[target],
        given["kernel_size"],
        given.get("stride"),
        given.get("padding", 0),
        given.get("ceil_mode", False),
        given.get("count_include_pad", True),
        given.get("divisor_override"),
    )


def _dropout(arguments: Arguments, node: fx.Node, target: Any) -> Lifted:
    given = arguments.by_name(node, ("input", "p", "training", "inplace"))
    if given is None:
        return None
    if given.get("training", True) and given.get("p", 0.5) > 0:
        return Refusal("training mode, in which it drops values at random; call model.eval() first")
    return Unary(given["input"], lambda _: None)


def _pad(arguments: Arguments, node: fx.Node, target: Any) -> Lifted:
    given = arguments.by_name(node, ("input", "pad", "mode", "value"))
    if given is None:
        return None
    if given.get("mode", "constant") != "constant":
        return Refusal(f"it pads with mode {given['mode']!r}; zeros are what a layer pads with by itself")
    if given.get("value"):
        return Refusal(f"it pads with {given['value']}, where a layer would pad with zeros")
    return padding_map(given["input"], tuple(given["pad"]), Signal())


def _product(source: fx.Node, weight: Tensor, bias: Tensor | None) -> Unary | Refusal:
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        return Refusal(f"its bias of shape {tuple(bias.shape)} is not one number a feature; expand it to that")
    return dtype_refusal(weight) or fixed(source, Affine(Kernel(weight, bias)), computes=True)


def _with_rank(part: Unary, rank: int) -> Unary:
    known = Signal(rank=rank)
    return Unary(
        part.source,
        part.make,
        part.reads.known_with(known),
        part.gives.known_with(known),
        part.channels,
        part.computes,
        part.tensors,
    )


RULES: dict[Any, Rule] = {
    **dict.fromkeys(_CONVOLUTIONS, _convolution),
    **dict.fromkeys(_TRANSPOSED, _transposed),
    **dict.fromkeys(_POOLS, _pool),
    F.linear: _linear,
    **dict.fromkeys((operator.matmul, torch.matmul, torch.mm), _matmul),
    torch.addmm: _addmm,
    F.batch_norm: _batch_norm,
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout), _dropout),
    F.pad: _pad,
}
