"""What to watch for while code is traced: all that a graph would freeze, and that may be different at the next call."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

Refuse: TypeAlias = Callable[[str], NoReturn]

# Functions of torch whose answer depends on where a graph is called, or which a graph would not call again.
_MODES = ("is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled")
_SEEDS = ("manual_seed", "seed", "set_rng_state")


class WatchedCalls(TorchFunctionMode):
    """Fails on what torch computes of a tensor while tracing, instead of recording it: it would never change again.

    Making a tensor is not computing: a graph that holds it is refused when it comes to an argument.
    """

    def __init__(self, refuse: Refuse) -> None:
        super().__init__()
        self.refuse = refuse

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = pytree.tree_leaves((args, kwargs))
        if any(isinstance(value, fx.Proxy) for value in given) or func is Tensor.__hash__:
            return func(*args, **kwargs)
        if any(isinstance(value, Tensor) for value in given):
            name = getattr(func, "__name__", str(func))
            self.refuse(f"it computes {name} of a tensor that is no input, parameter or buffer")
        return func(*args, **kwargs)


@contextmanager
def watched_modes(refuse: Refuse, *, evaluated: bool) -> Iterator[None]:
    """Make reading what may be different at the next call raise: train/eval flags and modes of torch.

    With ``evaluated``, the flag of a module in eval mode may be read.

    Works on torch itself, as FX does when it replaces ``Module.__call__`` while it traces.
    """

    def read(module: nn.Module) -> bool:
        if not evaluated or vars(module)["training"]:
            refuse(f"{type(module).__name__} reads self.training")
        return False

    def write(module: nn.Module, value: bool) -> None:
        refuse(f"{type(module).__name__} is made, or switched to train or eval, while it runs")

    def ask(*_: object) -> bool:
        refuse("it asks torch for its gradient or autocast mode")

    def seed(*_: object) -> None:
        refuse("it seeds random numbers")

    with ExitStack() as undo:
        watched: Any = nn.Module
        watched.training = property(read, write)
        undo.callback(delattr, nn.Module, "training")
        for name in (*_MODES, *_SEEDS):
            undo.callback(setattr, torch, name, getattr(torch, name))
            setattr(torch, name, ask if name in _MODES else seed)
        yield


@contextmanager
def no_random_draws(refuse: Refuse) -> Iterator[None]:
    """Fail when the code inside has drawn from Python's or NumPy's generator, or seeded torch's.

    A failure leaves them as they were. Draws from torch's generators are calls, which ``WatchedCalls`` sees.
    """
    seed, drawn = torch.initial_seed(), torch.default_generator.get_state()
    python, numpy = _random_states()
    try:
        yield
        others = _random_states()
        if torch.initial_seed() != seed or others[0] != python or _words(others[1]) != _words(numpy):
            refuse("it draws random numbers")
    except BaseException:
        random.setstate(python)
        torch.default_generator.set_state(drawn)
        if numpy:
            _numpy_random().set_state(numpy)
        raise


def _random_states() -> tuple[Any, Any]:
    """The states of Python's generator and of NumPy's, where there is one."""
    numpy = _numpy_random()
    return random.getstate(), numpy and numpy.get_state()


def _words(state: Any) -> object:
    """A state of NumPy's generator in a form that can be compared."""
    return state and (state[0], state[1].tobytes(), *state[2:])


def _numpy_random() -> Any:
    """NumPy's random module, where somebody has imported it."""
    return getattr(sys.modules.get("numpy"), "random", None)
