"""An activation, made and tried out: what a network has between its layers, so that they are not one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fxexpand.errors import ExpansionError
from fxexpand.graph.layers import is_layer

# A class or another function without arguments, called once for each place; or a module, copied for each.
Activation: TypeAlias = "Callable[[], nn.Module] | nn.Module"

# Far enough from zero that what is linear around it (tanh, a threshold) shows that it is not everywhere.
_REACH = 8.0
_REMEDY = "Use nn.ReLU, or a function that makes one: lambda: nn.LeakyReLU(0.2)."


def check_activation(activation: object, where: str) -> None:
    """Raise ``ExpansionError`` for what can make no activation anywhere."""
    if not callable(activation):  # modules are
        raise ExpansionError(f"{where}: expected an activation, found {activation!r}. {_REMEDY}")


def make_activation(activation: Activation, where: str, channels: int, dims: int) -> nn.Module:
    """A new activation for signals of ``channels`` and ``dims`` axes, to stand at ``where``.

    Raises ``ExpansionError`` for what is no activation: no module, or one that is or holds a layer, does not take such
    a signal, gives one of another shape or dtype, or is affine in eval mode (identity, dropout).
    """
    made = _made(activation, where)
    layers = [type(module).__name__ for module in made.modules() if is_layer(module)]
    if layers:
        raise ExpansionError(f"{where}: expected an activation, found a layer, {layers[0]}. {_REMEDY}")
    own = next(chain(made.parameters(), made.buffers()), torch.empty((), dtype=torch.float64))
    dtype = own.dtype if own.is_floating_point() else torch.float64
    shape = (2, channels, *(3,) * dims)
    signal = torch.linspace(-_REACH, _REACH, torch.Size(shape).numel(), dtype=dtype, device=own.device).reshape(shape)
    trial = copy.deepcopy(made).eval()  # a call may leave something behind
    values = [_applied(trial, x, made, where) for x in (signal, -signal / 2, signal / 2, 0 * signal)]
    if next(made.parameters(), None) is None:  # what it may learn is not told by how it starts
        a, b, total, zero = values
        if torch.allclose(total + zero, a + b, rtol=1e-4, atol=1e-4):
            raise ExpansionError(f"{where}: expected an activation, found {_of(made)}, which is linear. {_REMEDY}")
    return made


def _made(activation: Any, where: str) -> nn.Module:
    if isinstance(activation, nn.Module):
        return copy.deepcopy(activation)
    try:
        made = activation()
    except Exception as error:  # the user's function
        raise ExpansionError(
            f"{where}: expected a class of activations, or a function that makes one, to call without arguments; "
            f"{_name(activation)}() raised {type(error).__name__}: {error}. {_REMEDY}"
        ) from error
    if not isinstance(made, nn.Module):
        raise ExpansionError(f"{where}: expected {_name(activation)}() to give a module, found {made!r}. {_REMEDY}")
    return made


def _applied(trial: nn.Module, x: Tensor, made: nn.Module, where: str) -> Tensor:
    shape, dtype = tuple(x.shape), x.dtype
    try:
        with torch.no_grad():
            y: Any = trial(x.clone())
    except Exception as error:  # the user's module
        raise ExpansionError(
            f"{where}: expected an activation for signals of shape {shape}; {_of(made)} raised "
            f"{type(error).__name__}: {error}. {_REMEDY}"
        ) from error
    if not isinstance(y, Tensor):
        raise ExpansionError(f"{where}: expected {_of(made)} to give a tensor, found {type(y).__name__}. {_REMEDY}")
    if tuple(y.shape) != shape or y.dtype != dtype:
        raise ExpansionError(
            f"{where}: expected {_of(made)} to give a signal of the shape {shape} that it takes, in {dtype}; "
            f"found shape {tuple(y.shape)}, {y.dtype}. {_REMEDY}"
        )
    return y


def _name(activation: Any) -> str:
    return str(getattr(activation, "__name__", None) or repr(activation))


def _of(module: nn.Module) -> str:
    return str(module).splitlines()[0].removesuffix("(")
