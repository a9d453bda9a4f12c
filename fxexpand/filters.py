"""Conditions on layers: values that combine, compare, and print as they are written."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import nn

from fxexpand.algebra.kernel import Ints
from fxexpand.errors import RuleError
from fxexpand.graph.site import Site

Where: TypeAlias = "Filter | Callable[[Site], bool]"

# A glob that needs no quotes in the text of a rule: no space, no sign of the grammar, except inside of [...].
GLOB = re.compile(r"""(?:\[!?\]?[^]\s;]*\]|[^\s,;()"'&|~])+""")

_SIZES = ("kernel_size", "stride", "dilation")
_COUNTS = ("groups", "in_channels", "out_channels")
_FLAGS = ("depthwise", "bias")


@dataclass(frozen=True)
class Filter(ABC):
    """A condition on sites that combines with others, or with any ``(site) -> bool``, by ``&``, ``|`` and ``~``.

    Conditions that are written alike are equal. ``str()`` is what ``parse_rules`` reads after ``on``; a function stands
    in it by its name, ``<function>``, which cannot be read.
    """

    @abstractmethod
    def __call__(self, site: Site) -> bool: ...

    def __and__(self, other: object) -> Filter:
        return _All.of(self, _as_filter(other)) if callable(other) else NotImplemented

    def __or__(self, other: object) -> Filter:
        return _Any.of(self, _as_filter(other)) if callable(other) else NotImplemented

    def __rand__(self, other: object) -> Filter:
        return _All.of(_as_filter(other), self) if callable(other) else NotImplemented

    def __ror__(self, other: object) -> Filter:
        return _Any.of(_as_filter(other), self) if callable(other) else NotImplemented

    def __invert__(self) -> Filter:
        return _Not(self)

    def __bool__(self) -> bool:
        raise RuleError(f"{self}: a filter is true or false of a layer only. Combine filters with &, | and ~.")

    def __repr__(self) -> str:
        return str(self)


def layer(
    name: str | None = None,
    *,
    kind: type[nn.Module] | tuple[type[nn.Module], ...] | None = None,
    kernel_size: int | Ints | None = None,
    stride: int | Ints | None = None,
    dilation: int | Ints | None = None,
    groups: int | None = None,
    depthwise: bool | None = None,
    in_channels: int | None = None,
    out_channels: int | None = None,
    bias: bool | None = None,
) -> Filter:
    """The layers for which everything given holds; without arguments, all.

    ``name`` is a shell-style glob over the dotted path, in which ``*`` crosses dots. ``kind`` is a module class, or
    several; functional calls have none. One number for ``kernel_size``, ``stride`` or ``dilation`` holds for all axes.
    Features of a linear layer count as channels. Raises ``RuleError`` for an argument of the wrong type.
    """
    given = {key: _frozen(value) for key, value in locals().items() if value is not None}
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if kind is not None and not all(isinstance(k, type) for k in kinds):
        raise RuleError(f"layer(kind=...): expected a module class, such as nn.Conv2d, found {kind!r}.")
    if name is not None and not isinstance(name, str):
        raise RuleError(f"layer(name=...): expected a glob, such as 'features.*', found {name!r}.")
    _check_values(given)
    return _Layer(tuple(given.items()))


def text_of(where: Where) -> str:
    """The condition as it is written: ``layer(groups=1) & <function>``."""
    if isinstance(where, Filter):
        return str(where)
    return f"<{getattr(where, '__name__', type(where).__name__).strip('<>')}>"


def clause_of(where: Where) -> str:
    """The condition as it stands after ``on``, in which ``features.*, head`` says that the name is one of these."""
    globs = globs_of(where)
    return ", ".join(glob if is_bare(glob) else repr(glob) for glob in globs) if globs else text_of(where)


def globs_of(where: Where) -> tuple[str, ...]:
    """The globs of which the name must fit one, where the condition asks nothing else; otherwise none."""
    tests = where.tests if isinstance(where, _Any) else (where,)
    globs = [dict(test.criteria) for test in tests if isinstance(test, _Layer)]
    if len(globs) < len(tests) or any(criteria.keys() != {"name"} for criteria in globs):
        return ()
    return tuple(str(criteria["name"]) for criteria in globs)


def is_bare(glob: str) -> bool:
    """Whether the glob needs no quotes."""
    return GLOB.fullmatch(glob) is not None and strange_at(glob) is None


def strange_at(glob: str) -> int | None:
    r"""Where the glob has a sign that looks meant and means nothing, as ``{``, ``\\`` or an open bracket; or None."""
    found = re.search(r"[][{}<>\\^$+=`]", re.sub(r"\[!?\]?[^]]*\]", lambda letters: "x" * len(letters[0]), glob))
    return None if found is None else found.start()


@dataclass(frozen=True, repr=False)
class _Layer(Filter):
    """What ``layer(...)`` gives: its arguments, each a condition."""

    criteria: tuple[tuple[str, object], ...]

    def __call__(self, site: Site) -> bool:
        return all(_holds(site, key, value) for key, value in self.criteria)

    def __str__(self) -> str:
        return f"layer({', '.join(f'{key}={_value(value)}' for key, value in self.criteria)})"


@dataclass(frozen=True, repr=False)
class _Function(Filter):
    """A function of the user's."""

    function: Callable[[Site], Any]

    def __call__(self, site: Site) -> bool:
        return bool(self.function(site))

    def __str__(self) -> str:
        return text_of(self.function)


@dataclass(frozen=True, repr=False)
class _All(Filter):
    tests: tuple[Filter, ...]

    @staticmethod
    def of(first: Filter, second: Filter) -> _All:
        return _All(tuple(t for f in (first, second) for t in (f.tests if isinstance(f, _All) else (f,))))

    def __call__(self, site: Site) -> bool:
        return all(test(site) for test in self.tests)

    def __str__(self) -> str:
        return " & ".join(map(str, self.tests))


@dataclass(frozen=True, repr=False)
class _Any(Filter):
    tests: tuple[Filter, ...]

    @staticmethod
    def of(first: Filter, second: Filter) -> _Any:
        return _Any(tuple(t for f in (first, second) for t in (f.tests if isinstance(f, _Any) else (f,))))

    def __call__(self, site: Site) -> bool:
        return any(test(site) for test in self.tests)

    def __str__(self) -> str:
        return f"({' | '.join(map(str, self.tests))})"


@dataclass(frozen=True, repr=False)
class _Not(Filter):
    test: Filter

    def __call__(self, site: Site) -> bool:
        return not self.test(site)

    def __str__(self) -> str:
        return f"~({self.test})" if isinstance(self.test, _All) else f"~{self.test}"


def _as_filter(test: Callable[[Site], Any]) -> Filter:
    return test if isinstance(test, Filter) else _Function(test)


def _holds(site: Site, key: str, wanted: Any) -> bool:
    if key == "name":
        return fnmatchcase(site.path, wanted)
    if key == "kind":
        return isinstance(site.module, wanted)
    found: Any = site.has_bias if key == "bias" else getattr(site, key)
    return _same_size(found, wanted) if key in _SIZES else bool(found == wanted)


def _same_size(found: Ints, wanted: int | Ints) -> bool:
    return bool(found) and (all(f == wanted for f in found) if isinstance(wanted, int) else found == wanted)


def _check_values(given: Mapping[str, object]) -> None:
    """Raise ``RuleError`` for a number, size or flag of another type, which no layer would have."""
    for key, value in given.items():
        if key in _SIZES:
            sizes = value if isinstance(value, tuple) else (value,)
            fits, expected = all(map(_is_integer, sizes)), "an integer, or one for each axis"
        elif key in _COUNTS:
            fits, expected = _is_integer(value), "an integer"
        elif key in _FLAGS:
            fits, expected = isinstance(value, bool), "True or False"
        else:
            continue
        if not fits:
            raise RuleError(f"layer({key}=...): expected {expected}, found {value!r}.")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _frozen(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _value(value: object) -> str:
    """A value as it is written: classes of torch as ``nn.Conv2d``, others by their name."""
    if isinstance(value, tuple) and any(isinstance(v, type) for v in value):
        return f"({', '.join(map(_value, value))}{',' if len(value) == 1 else ''})"
    if not isinstance(value, type):
        return repr(value)
    name = value.__name__
    return f"nn.{name}" if getattr(nn, name, None) is value else name
