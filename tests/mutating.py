"""Code with one thing wrong in it: a function's source with a piece replaced, running wherever the function is used."""

from __future__ import annotations
import __future__

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from textwrap import dedent
from types import FunctionType
from typing import Any


@dataclass(frozen=True)
class Mutant:
    """What goes wrong, where (``module:function``, or ``module:Class.method``), and how: ``old`` becomes ``new``."""

    what: str
    where: str
    old: str
    new: str

    @property
    def function(self) -> Any:
        module, _, path = self.where.partition(":")
        found: Any = import_module(f"fxexpand.{module}")
        for name in path.split("."):
            found = _plain(vars(found)[name])
        assert isinstance(found, FunctionType), f"{self.where} is no plain function"
        return found


def _plain(found: Any) -> Any:
    """The function of a static method."""
    return found.__func__ if isinstance(found, staticmethod) else found


@contextmanager
def mutated(mutant: Mutant) -> Iterator[None]:
    """Within it the function runs the changed code, also where it was imported by name: its code object is swapped.

    Fails unless ``old`` stands in the source exactly once: a mutant that changes nothing would prove nothing.
    """
    function = mutant.function
    source = dedent(inspect.getsource(function))
    count = source.count(mutant.old)
    assert count == 1, f"{mutant.where}: expected {mutant.old!r} in its source once, found it {count} times"
    names: dict[str, Any] = {}
    changed = source.replace(mutant.old, mutant.new)
    code = compile(changed, mutant.where, "exec", flags=__future__.annotations.compiler_flag, dont_inherit=True)
    exec(code, function.__globals__, names)
    original = function.__code__
    function.__code__ = _plain(names[function.__name__]).__code__
    try:
        yield
    finally:
        function.__code__ = original
