"""Affine maps that are not layers with a weight: batch norm, average pools, padding, scales, shifts, selections."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from fxexpand.algebra.affine import Affine
from fxexpand.algebra.channelwise import averaging, depthwise, normalizing
from fxexpand.algebra.kernel import Kernel, pad_sides
from fxexpand.algebra.refusal import Refusal
from fxexpand.graph.geometry import spread
from fxexpand.regions.parts import CONFLICT, Made, Signal, Unary

PASS_INPUTS = "pass example inputs, from which it is known"


def shaped(signal: Signal) -> tuple[int, int] | Refusal:
    """(dims, channels) of a signal, where they are known."""
    if signal.dims is None:
        return Refusal("no convolution or linear layer beside it tells its channels")
    if signal.channels is None:
        return Refusal(f"nothing beside it tells how many channels it has; {PASS_INPUTS}")
    if CONFLICT in (signal.dims, signal.channels):
        return Refusal("what reads the same value disagrees on which axis the channels are")
    if signal.channels < 1:
        return Refusal("it has no channels")
    return signal.dims, signal.channels


def batch_norm_map(
    signal: Signal, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Made:
    """(x - mean) / sqrt(var + eps) · weight + bias (Ioffe and Szegedy 2015, algorithm 2), computed in float64."""
    known = shaped(signal)
    if isinstance(known, Refusal):
        return known
    dims, _ = known
    if dims == 0 and signal.rank != 2:
        where = "" if signal.rank is None else f" of {signal.rank} axes"
        return Refusal(
            f"it normalises axis 1 of its input{where}, and a linear layer works on the last axis: they are the same "
            f"where there are two axes only; {PASS_INPUTS}"
        )
    if signal.rank not in (None, CONFLICT, dims + 2):
        return Refusal(
            f"it normalises axis 1 of {signal.rank} axes, which is no channel of the {dims} spatial axes beside it"
        )
    factor, term = (None if tensor is None else tensor.detach().double() for tensor in (weight, bias))
    scale, shift = normalizing(mean.double(), var.double(), factor, term, eps)
    return Affine(depthwise(scale, shift, dims))


def average(
    source: fx.Node,
    d: int,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
) -> Unary | Refusal:
    """An average pool with a fixed window, a depthwise kernel of equal weights."""
    window, sides = spread(kernel_size, d), spread(padding, d)
    steps = window if stride is None or stride == [] else spread(stride, d)
    if ceil_mode:
        return Refusal("ceil_mode=True: its last windows average over fewer samples than the others")
    if any(sides) and not count_include_pad and divisor is None:
        return Refusal("count_include_pad=False: its windows at the border average over fewer samples than the others")

    def make(signal: Signal) -> Made:
        known = shaped(signal)
        if isinstance(known, Refusal):
            return known
        pool = averaging(known[1], window, steps, divisor, dtype=torch.float64)
        return Affine(replace(pool, padding=tuple((p, p) for p in sides)))

    return Unary(source, make, reads=Signal(dims=d), gives=Signal(dims=d))


def padding_map(source: fx.Node, amounts: tuple[int, ...], known: Signal) -> Unary:
    """Padding with zeros; ``amounts`` as for ``F.pad``, last axis first."""

    def make(signal: Signal) -> Made:
        shape = shaped(signal)
        if isinstance(shape, Refusal):
            return shape
        dims, channels = shape
        every = ((0, 0),) * dims + pad_sides(amounts)
        sides = every[len(every) - dims :]
        if any(map(any, every[: len(every) - dims])):
            return Refusal("it pads the axis of the channels")
        ones = torch.ones(channels, 1, *(1,) * dims, dtype=torch.float64)
        return Affine(Kernel(ones, padding=sides, groups=channels)) if any(map(any, sides)) else None

    return Unary(source, make, reads=known, gives=known, pads=True)


def scale_and_shift(source: fx.Node, scale: Any, shift: Any) -> Unary:
    """x · scale + shift, of which each is a number or a tensor with a number a channel."""

    def make(signal: Signal) -> Made:
        known = shaped(signal)
        if isinstance(known, Refusal):
            return known
        dims, channels = known
        factors = _per_channel(scale, signal, channels)
        terms = _per_channel(shift, signal, channels)
        if isinstance(factors, Refusal) or isinstance(terms, Refusal):
            return factors if isinstance(factors, Refusal) else terms  # type: ignore[return-value]  # one is
        if not (factors.is_meta or bool(factors.isfinite().all())):
            return Refusal("its constant holds infinity or NaN: what that gives depends on the order of operations")
        return Affine(depthwise(factors, None if _is_number(shift, 0) else terms, dims))

    promotes = any(v.is_floating_point() if isinstance(v, Tensor) else isinstance(v, float) for v in (scale, shift))
    if _is_number(scale, 1) and _is_number(shift, 0):
        return Unary(source, lambda _: None, promotes=promotes)
    # A tensor without axes takes the dtype of the signal, as a number does.
    held = tuple(value for value in (scale, shift) if isinstance(value, Tensor) and value.dim() > 0)
    return Unary(source, make, tensors=held, broadcasts=bool(held), promotes=promotes)


def _is_number(value: Any, number: int) -> bool:
    return not isinstance(value, Tensor) and value == number


def _per_channel(value: Any, signal: Signal, channels: int) -> Tensor | Refusal:
    """A number for each channel, in float64, from a constant that is broadcast to the signal."""
    if not isinstance(value, Tensor):
        return torch.full((channels,), float(value), dtype=torch.float64)
    assert signal.dims is not None
    rank = value.dim()
    least = signal.dims + 1  # an input without batch has no more axes
    if rank > least and (signal.rank is None or rank > signal.rank):
        return Refusal(
            f"a constant of shape {tuple(value.shape)} adds an axis to an input without batch; {PASS_INPUTS}"
        )
    expected = (channels, *(1,) * signal.dims)
    shape = (1,) * (least - rank) + tuple(value.shape)
    if value.numel() > 1 and (shape[-least:] != expected or prod(shape) != channels):
        return Refusal(f"its constant of shape {tuple(value.shape)} is not one number a channel")
    return value.detach().double().reshape(-1).expand(channels)


def selection(source: fx.Node, pick: Callable[[int], slice], axis: int) -> Unary:
    """Some channels of the signal: those that ``pick`` gives for their number.

    ``axis`` is the axis that it speaks of, counted from the first or the last one as in torch.
    """

    def chosen(channels: int) -> range:
        return range(channels)[pick(channels)]

    def make(signal: Signal) -> Made:
        known = shaped(signal)
        if isinstance(known, Refusal):
            return known
        dims, channels = known
        refusal = axis_refusal(signal, axis)
        if refusal is not None:
            return refusal
        rows = torch.eye(channels, dtype=torch.float64)[list(chosen(channels))]
        if len(rows) == 0:
            return Refusal("it selects no channel")
        return Affine(Kernel(rows.reshape(*rows.shape, *(1,) * dims)))

    return Unary(source, make, channels=lambda channels: len(chosen(channels)))


def axis_refusal(signal: Signal, axis: int) -> Refusal | None:
    """Why ``axis`` is not, or not surely, the axis of the channels; or None where it is."""
    assert signal.dims is not None
    least = signal.dims + 1
    if axis < 0:
        return None if axis == -least else Refusal(f"axis {axis} is not the axis of the channels")
    if signal.rank is None or signal.rank == CONFLICT:
        return Refusal(f"whether axis {axis} is that of the channels depends on the number of axes; {PASS_INPUTS}")
    return None if axis == signal.rank - least else Refusal(f"axis {axis} is not the axis of the channels")
