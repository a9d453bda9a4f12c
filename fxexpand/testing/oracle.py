"""A layer as a matrix: slow and obviously right (Guo et al. 2020, §3: a convolution as a structured matrix).

With its signals flattened a linear layer is y = M·x + b, and a chain of layers is the product of their matrices. Here M
is filled in tap by tap from the definition, in float64, so that cleverer code can be tested against it. Nothing is
shared with ``fxexpand.algebra``, and torch's own convolutions are not called.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor, nn

Ints: TypeAlias = tuple[int, ...]
Sides: TypeAlias = tuple[tuple[int, int], ...]
_Index: TypeAlias = tuple[slice | int, ...]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PADS: dict[str, tuple[type[nn.Module], ...]] = {
    "zeros": (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),  # ZeroPad1d, … are subclasses
    "reflect": (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    "replicate": (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    "circular": (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
}


def matrix(layer: nn.Module, size: Sequence[int], *, channels: int | None = None) -> tuple[Tensor, Tensor]:
    """M and b with ``layer(x).flatten() == M @ x.flatten() + b`` for one sample x of shape (m, *size).

    ``layer`` is an ``nn.Conv1d``, ``Conv2d`` or ``Conv3d`` with any options, an ``nn.Linear`` (``size`` is ``()``), one
    of torch's padding modules, ``nn.Identity`` or ``nn.Flatten()``, or a subclass that keeps ``forward``. ``channels``
    is m; it is needed for the modules that take any number of channels, and checked for the others. Hooks are not seen.

    Returns float64 tensors on the CPU, cut off from autograd: M is (n·ΠT, m·ΠN) and b is (n·ΠT,) for an input of m
    channels of size N and an output of n channels of size T.

    Raises ``TypeError`` for any other layer and for weights that are not real, and ``ValueError`` for a signal that the
    layer cannot take.
    """
    return _fill(_describe(layer, _Signal(channels, tuple(size))), tuple(size))


def chain_matrix(
    layers: Iterable[nn.Module], size: Sequence[int], *, channels: int | None = None
) -> tuple[Tensor, Tensor]:
    """M and b as in ``matrix``, of layers called one after the other, first to last: M = M_l ··· M₂·M₁.

    ``size`` is the spatial size of the input of the first layer. Raises what ``matrix`` raises, and ``ValueError`` for
    an empty chain.
    """
    signal = _Signal(channels, tuple(size))
    whole: tuple[Tensor, Tensor] | None = None
    for layer in layers:
        conv = _describe(layer, signal)
        step, offset = _fill(conv, signal.size)
        whole = (step, offset) if whole is None else (step @ whole[0], step @ whole[1] + offset)
        signal = conv.output(signal.size)
        if isinstance(layer, nn.Flatten):  # the vector is flat as it is; only its shape is another
            signal = _Signal(len(offset), ())
    if whole is None:
        raise ValueError("an empty chain has no matrix: its channels are unknown")
    return whole


def conv_matrix(
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    size: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int | tuple[int, int]] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> tuple[Tensor, Tensor]:
    """M and b as in ``matrix``, of a convolution with d ≥ 0 spatial axes given by its numbers.

        y[o, t] = bias[o] + Σ_i Σ_u  weight[o, i, u] · x[i, stride·t + dilation·u − before]

    ``weight`` is (n, m / groups, k₁, …, k_d) and ``bias`` is (n,) or None. ``stride`` and ``dilation`` are one number,
    or one for each axis; ``padding`` is "same", "valid", one number, or for each axis a number or a pair (before,
    after), where a negative number crops. ``padding_mode`` is "zeros", "reflect", "replicate" or "circular"; only
    "zeros" crops.

    Raises ``ValueError`` when these disagree, or leave no output.
    """
    d = weight.dim() - 2
    if padding_mode not in _PADS:
        raise ValueError(f"padding_mode must be one of {', '.join(_PADS)}, found {padding_mode!r}")
    if d < 0 or groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"a weight of shape {tuple(weight.shape)} cannot have groups={groups}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},), found {tuple(bias.shape)}")
    steps, dilations = _per_axis("stride", stride, d), _per_axis("dilation", dilation, d)
    if min(steps + dilations, default=1) < 1:
        raise ValueError(f"stride and dilation must be at least 1, found {steps} and {dilations}")
    sides = _sides(padding, dilations, tuple(weight.shape[2:]))
    where = f"convolution with a weight of shape {tuple(weight.shape)}"
    return _fill(_Conv(where, weight, bias, steps, sides, dilations, groups, padding_mode), tuple(size))


@dataclass(frozen=True)
class _Signal:
    channels: int | None  # None: any
    size: Ints


@dataclass(frozen=True)
class _Conv:
    where: str
    weight: Tensor
    bias: Tensor | None
    stride: Ints
    padding: Sides
    dilation: Ints
    groups: int = 1
    mode: str = "zeros"
    beyond: float = 0.0  # what "zeros" pads with

    def output(self, size: Ints) -> _Signal:
        lengths = zip(size, self.weight.shape[2:], self.stride, self.padding, self.dilation, strict=True)
        # The window, δ·(k − 1) + 1 samples long, moves in steps of `stride` as long as it stays inside.
        places = [(n + sum(sides) - (step * (k - 1) + 1)) // stride + 1 for n, k, stride, sides, step in lengths]
        return _Signal(self.weight.shape[0], tuple(places))


def _fill(conv: _Conv, size: Ints) -> tuple[Tensor, Tensor]:
    """M and b, one entry of M for each place t of the window, tap u and pair of channels in one group."""
    _check(conv, size)
    n, per_group, *taps = conv.weight.shape
    m, out_size = per_group * conv.groups, conv.output(size).size
    weight = conv.weight.detach().to("cpu", torch.float64)
    M = torch.zeros(n, *out_size, m, *size, dtype=torch.float64)
    b = torch.zeros(n, *out_size, dtype=torch.float64)
    if conv.bias is not None:
        b += conv.bias.detach().to("cpu", torch.float64).reshape(n, *(1,) * len(size))
    blocks = [
        (slice(g * n // conv.groups, (g + 1) * n // conv.groups), slice(g * per_group, (g + 1) * per_group))
        for g in range(conv.groups)
    ]
    for t, u in product(product(*map(range, out_size)), product(*map(range, taps))):
        found = [_source(conv, size, axis, t[axis], u[axis]) for axis in range(len(size))]
        source = [position for position in found if position is not None]
        for outputs, inputs in blocks:
            row: _Index = (outputs, *t)
            entry: _Index = (outputs, slice(None), *u)
            if len(source) == len(size):
                column: _Index = (inputs, *source)
                M[row + column] += weight[entry]
            else:
                b[row] += conv.beyond * weight[entry].sum(1)
    return M.reshape(n * prod(out_size), m * prod(size)), b.reshape(-1)


def _source(conv: _Conv, size: Ints, axis: int, t: int, u: int) -> int | None:
    """Which sample of the input tap u reads when the window is at place t; None beside the input."""
    length = size[axis]
    position = conv.stride[axis] * t + conv.dilation[axis] * u - conv.padding[axis][0]
    if 0 <= position < length:
        return position
    if conv.mode == "reflect":  # about the first and the last sample: -1 -> 1, length -> length - 2
        return -position if position < 0 else 2 * (length - 1) - position
    if conv.mode == "replicate":
        return 0 if position < 0 else length - 1
    if conv.mode == "circular":
        return position % length
    return None


def _check(conv: _Conv, size: Ints) -> None:
    d = conv.weight.dim() - 2
    if not conv.weight.is_floating_point():
        raise TypeError(f"{conv.where}: expected real floating-point weights, found {conv.weight.dtype}")
    if len(size) != d or min(size, default=1) < 1:
        raise ValueError(f"{conv.where}: size must have {d} positive entries, one for each spatial axis, found {size}")
    if conv.mode != "zeros":
        most = [length - 1 if conv.mode == "reflect" else length for length in size]
        too_much = any(max(sides) > limit for sides, limit in zip(conv.padding, most, strict=True))
        if too_much and conv.mode != "replicate":
            raise ValueError(
                f"{conv.where}: padding_mode={conv.mode!r} can pad a signal of size {size} by at most {most}, "
                f"found {conv.padding}"
            )
        if any(min(sides) < 0 for sides in conv.padding):
            raise ValueError(f"{conv.where}: only padding_mode='zeros' can crop, found padding {conv.padding}")
    if min(conv.output(size).size, default=1) < 1:
        raise ValueError(
            f"{conv.where}: a window of {tuple(conv.weight.shape[2:])} taps with dilation {conv.dilation} does not fit "
            f"into a signal of size {size} with padding {conv.padding}"
        )


def _describe(layer: nn.Module, signal: _Signal) -> _Conv:
    """The numbers of a layer: a linear layer has no axes, padding is one tap of 1 on each channel."""
    conv = _describe_by_class(layer, signal)
    m = conv.weight.shape[1] * conv.groups
    if signal.channels not in (None, m):
        raise ValueError(f"{layer} takes {m} channels, found {signal.channels}")
    return conv


def _describe_by_class(layer: nn.Module, signal: _Signal) -> _Conv:
    if isinstance(layer, _CONVOLUTIONS) and _keeps(layer, _CONVOLUTIONS, "forward", "_conv_forward"):
        steps, dilations = tuple(layer.stride), tuple(layer.dilation)
        padding = layer.padding if isinstance(layer.padding, str) else tuple(layer.padding)
        sides = _sides(padding, dilations, tuple(layer.weight.shape[2:]))
        return _Conv(str(layer), layer.weight, layer.bias, steps, sides, dilations, layer.groups, layer.padding_mode)
    if isinstance(layer, nn.Linear) and _keeps(layer, (nn.Linear,), "forward"):
        if signal.size:
            raise ValueError(f"{layer} takes a vector, size (), found size {signal.size}. Flatten the signal first.")
        return _Conv(str(layer), layer.weight, layer.bias, (), (), ())
    if isinstance(layer, nn.Identity) and _keeps(layer, (nn.Identity,), "forward"):
        return _one_tap(layer, signal, ((0, 0),) * len(signal.size))
    if isinstance(layer, nn.Flatten) and (layer.start_dim, layer.end_dim) == (1, -1):
        return _one_tap(layer, signal, ((0, 0),) * len(signal.size))
    for mode, classes in _PADS.items():
        if isinstance(layer, classes) and _keeps(layer, classes, "forward"):
            amounts: list[int] = list(layer.padding)  # type: ignore[arg-type]  # last axis first
            sides = tuple(zip(amounts[-2::-2], amounts[::-2], strict=True))
            beyond = float(getattr(layer, "value", 0.0))
            return _one_tap(layer, signal, sides, mode, beyond)
    raise TypeError(
        f"expected a convolution, nn.Linear, a padding module, nn.Identity or nn.Flatten() with the forward of its "
        f"class, found {layer}. Write its matrix by hand, or describe it with conv_matrix."
    )


def _one_tap(layer: nn.Module, signal: _Signal, padding: Sides, mode: str = "zeros", beyond: float = 0.0) -> _Conv:
    """Every channel for itself, as it is."""
    if signal.channels is None:
        raise ValueError(f"{layer} takes any number of channels: say how many with channels=")
    d = len(padding)
    weight = torch.ones(signal.channels, 1, *(1,) * d)
    return _Conv(str(layer), weight, None, (1,) * d, padding, (1,) * d, signal.channels, mode, beyond)


def _keeps(layer: nn.Module, classes: Sequence[type[nn.Module]], *methods: str) -> bool:
    """Whether the class of ``layer`` takes these methods from one of torch's ``classes``."""
    return any(
        all(getattr(type(layer), method) is getattr(known, method) for method in methods)
        for known in classes
        if isinstance(layer, known)
    )


def _per_axis(name: str, value: int | Sequence[int], d: int) -> Ints:
    values = (value,) * d if isinstance(value, int) else tuple(value)
    if len(values) != d:
        raise ValueError(f"{name} must have one entry for each of the {d} spatial axes, found {value}")
    return values


def _sides(padding: int | str | Sequence[int | tuple[int, int]], dilation: Ints, taps: Ints) -> Sides:
    """(before, after) for each axis."""
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f"padding must be 'same', 'valid' or numbers, found {padding!r}")
        totals = [step * (k - 1) if padding == "same" else 0 for step, k in zip(dilation, taps, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)  # the larger half after the signal
    amounts = (padding,) * len(taps) if isinstance(padding, int) else tuple(padding)
    if len(amounts) != len(taps):
        raise ValueError(f"padding must have one entry for each of the {len(taps)} spatial axes, found {padding}")
    return tuple((amount, amount) if isinstance(amount, int) else amount for amount in amounts)
