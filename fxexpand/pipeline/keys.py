"""A key for what a pass does, the same in every process."""

from __future__ import annotations

import ctypes
import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from fxexpand.version import library_version

_LIBRARY = __name__.partition(".")[0]


class _NoKeyError(Exception):
    """There is a value that two processes cannot be told to have alike."""


def key_of(made_by: object, arguments: object) -> str | None:
    """A text that stands for a class or function of the library and its ``arguments``; None where none can.

    It is another one for each version of the library and of torch, and whenever the code of the library changes.
    Strategies, rules and filters are keyed by their classes and fields, classes by their full names, tensors by their
    values. What a function of the user's does depends on more than its code: on what it calls, on globals, on what it
    has seen. So a ``where``, an ``init`` or a lift of the user's has no key, and neither have strategies and filters of
    classes of the user's, and classes that are not found by their names.
    """
    if not _is_ours(made_by):
        return None
    try:
        what = [_plain(made_by), _plain(arguments)]
    except _NoKeyError:
        return None
    text = json.dumps([*what, library_version(), _code_of_the_library(), torch.__version__])
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    """``value`` in lists and texts, such that values that differ are written differently. Raises ``_NoKeyError``."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Integral):  # numbers of other libraries, too
        return int(value)
    if isinstance(value, Real) and float(value) == value:
        return ["float", float(value).hex()]
    if isinstance(value, Tensor):
        return _tensor(value)
    if isinstance(value, (torch.dtype, torch.device)):
        return ["torch", str(value)]
    if type(value) in (tuple, list, torch.Size):
        return [type(value).__name__, *map(_plain, value)]
    if isinstance(value, Mapping):
        return ["mapping", *([_plain(key), _plain(held)] for key, held in value.items())]
    if isinstance(value, (type, FunctionType)):
        return _found_by_name(value)
    if is_dataclass(value) and _is_ours(type(value)):
        held = [[field.name, _plain(getattr(value, field.name))] for field in fields(value)]
        return [_found_by_name(type(value)), *held]
    raise _NoKeyError


def _found_by_name(value: type | FunctionType) -> list[str]:
    """The full name of a class, or of a function of the library."""
    module = sys.modules.get(value.__module__)
    known = isinstance(value, type) or _is_ours(value)
    found: Any = module
    for name in value.__qualname__.split("."):
        found = getattr(found, name, None)
    if not known or found is not value or value.__module__ == "__main__":
        raise _NoKeyError
    return ["name", value.__module__, value.__qualname__]


def _is_ours(value: object) -> bool:
    """Whether a class or function is the library's own: its code is in the key."""
    return str(getattr(value, "__module__", "")).partition(".")[0] == _LIBRARY


def _tensor(value: Tensor) -> list[Any]:
    """The form and the values of a tensor."""
    plain = type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided
    if not plain or value.is_meta or value.is_quantized:
        raise _NoKeyError
    held = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
    digest = hashlib.sha256(ctypes.string_at(held.data_ptr(), held.nbytes)).hexdigest() if held.nbytes else ""
    form = (tuple(value.shape), value.stride(), str(value.dtype), str(value.device), value.requires_grad)
    return ["tensor", repr(form), digest]


@cache
def _code_of_the_library() -> str:
    """A digest of all its modules: while somebody works on it, its version does not change."""
    digest = hashlib.sha256()
    for package in (_LIBRARY, f"{_LIBRARY}.passes"):  # which may stand in another folder
        for folder in sys.modules[package].__path__:
            for file in sorted(Path(folder).rglob("*.py")):
                digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()
