"""Which layers a strategy applies to."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import nn

from fxexpand.algebra.kernel import Ints
from fxexpand.errors import RuleError
from fxexpand.graph.site import Site
from fxexpand.strategies.strategy import Strategy

Where: TypeAlias = "Filter | Callable[[Site], bool]"


@dataclass(frozen=True)
class Filter:
    """A condition on sites that combines with others, or with any ``(site) -> bool``, by ``&``, ``|`` and ``~``."""

    test: Callable[[Site], bool]
    text: str

    def __call__(self, site: Site) -> bool:
        return bool(self.test(site))

    def __and__(self, other: object) -> Filter:
        if not callable(other):
            return NotImplemented
        return Filter(lambda site: self(site) and bool(other(site)), f"{self} & {_text(other)}")

    def __or__(self, other: object) -> Filter:
        if not callable(other):
            return NotImplemented
        return Filter(lambda site: self(site) or bool(other(site)), f"({self} | {_text(other)})")

    def __rand__(self, other: object) -> Filter:
        return _as_filter(other) & self if callable(other) else NotImplemented

    def __ror__(self, other: object) -> Filter:
        return _as_filter(other) | self if callable(other) else NotImplemented

    def __invert__(self) -> Filter:
        return Filter(lambda site: not self(site), f"~({self})" if " & " in self.text else f"~{self}")

    def __bool__(self) -> bool:
        raise RuleError(f"{self}: a filter is true or false of a layer only. Combine filters with &, | and ~.")

    def __str__(self) -> str:
        return self.text

    __repr__ = __str__


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
    given = {key: value for key, value in locals().items() if value is not None}
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if kind is not None and not all(isinstance(k, type) for k in kinds):
        raise RuleError(f"layer(kind=...): expected a module class, such as nn.Conv2d, found {kind!r}.")
    if name is not None and not isinstance(name, str):
        raise RuleError(f"layer(name=...): expected a glob, such as 'features.*', found {name!r}.")
    _check_values(given)
    sizes = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation}
    equal = {
        "groups": groups,
        "depthwise": depthwise,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "has_bias": bias,
    }

    def holds(site: Site) -> bool:
        if name is not None and not fnmatchcase(site.path, name):
            return False
        if kind is not None and not isinstance(site.module, kind):
            return False
        if any(v is not None and not _same_size(getattr(site, k), v) for k, v in sizes.items()):
            return False
        return all(v is None or getattr(site, k) == v for k, v in equal.items())

    return Filter(holds, f"layer({', '.join(f'{k}={_value(v)}' for k, v in given.items())})")


def _check_values(given: Mapping[str, object]) -> None:
    """Raise ``RuleError`` for a number, size or flag of another type, which no layer would have."""
    for key, value in given.items():
        if key in ("kernel_size", "stride", "dilation"):
            sizes = value if isinstance(value, (list, tuple)) else (value,)
            fits, expected = all(map(_is_integer, sizes)), "an integer, or one for each axis"
        elif key in ("groups", "in_channels", "out_channels"):
            fits, expected = _is_integer(value), "an integer"
        elif key in ("depthwise", "bias"):
            fits, expected = isinstance(value, bool), "True or False"
        else:
            continue
        if not fits:
            raise RuleError(f"layer({key}=...): expected {expected}, found {value!r}.")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class Rule:
    """``strategy`` for the layers of its kind for which ``where`` holds; without ``where``, for those it reaches.

    Raises ``RuleError`` for a strategy or a condition that is none.
    """

    strategy: Strategy
    where: Where | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.strategy, Strategy):
            raise RuleError(f"Rule: expected a strategy, such as CL(rate=4), found {self.strategy!r}.")
        if self.where is not None and not callable(self.where):
            raise RuleError(f"Rule: where must be layer(...) or a function of a site, found {self.where!r}.")

    def matches(self, site: Site) -> bool:
        """Whether the rule is for ``site``. The layers of an expansion are only for rules with a ``where``."""
        if site.dims not in self.strategy.dims:
            return False
        if self.where is None:
            return not site.expanded and self.strategy.reaches(site)
        return bool(self.where(site))

    def __str__(self) -> str:
        return repr(self.strategy) if self.where is None else f"Rule({self.strategy!r}, where={_text(self.where)})"


def as_rules(rules: object) -> list[Rule]:
    """The rules that a caller means: a ``Rule``, a strategy, or a sequence of them. Raises ``RuleError``."""
    given = list(rules) if isinstance(rules, Iterable) and not isinstance(rules, str) else [rules]
    if not given:
        raise RuleError("rules: expected at least one rule or strategy, found none. Use CL(rate=4), for example.")
    found = []
    for rule in given:
        if not isinstance(rule, (Rule, Strategy)):
            hint = f" Use {rule.__name__}(rate=4)." if isinstance(rule, type) and issubclass(rule, Strategy) else ""
            raise RuleError(f"rules: expected a Rule or a strategy, such as CL(rate=4), found {rule!r}.{hint}")
        found.append(rule if isinstance(rule, Rule) else Rule(rule))
    return found


def match(sites: Sequence[Site], rules: Sequence[Rule]) -> list[tuple[Site, Rule]]:
    """Each site that a rule matches, with the first such rule.

    Raises ``RuleError`` when no rule matches any site, or when a rule with a ``where`` of its own matches none.
    """
    # Each condition is asked once about each site: it may count, or remember what it has seen.
    matched = [[site for site in sites if rule.matches(site)] for rule in rules]
    for rule, own in zip(rules, matched, strict=True):
        if rule.where is not None and not own:
            raise RuleError(f"{rule} matches no layer. {_nearest(rule, sites)}")
    first: dict[int, tuple[Site, Rule]] = {}
    for rule, own in zip(rules, matched, strict=True):
        for site in own:
            first.setdefault(id(site), (site, rule))
    if not first:
        raise RuleError(f"no rule matches any layer: {', '.join(map(str, rules))}. {_overview(sites)}")
    return [first[id(site)] for site in sites if id(site) in first]


def _nearest(rule: Rule, sites: Sequence[Site]) -> str:
    """What the layers that the condition holds for are, or the path that is most like the one asked for."""
    held = [site for site in sites if rule.where is not None and rule.where(site)]
    if held:
        takes = "linear layers" if rule.strategy.dims == {0} else "convolutions"
        return f"Its where holds for {_some(held)}, but {type(rule.strategy).__name__} takes {takes}."
    close = difflib.get_close_matches(_text(rule.where).removeprefix("layer(name="), [s.path for s in sites], 1, 0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return _overview(sites) + hint


def _overview(sites: Sequence[Site]) -> str:
    if not sites:
        return "The model has no convolution or linear layer that could be expanded."
    done = " (expanded already)" if all(site.expanded for site in sites) else ""
    return f"The model has {_some(sites)}{done}. Choose others with Rule(strategy, where=layer(...))."


def _some(sites: Sequence[Site], most: int = 4) -> str:
    more = f" and {len(sites) - most} more" if len(sites) > most else ""
    return ", ".join(map(str, sites[:most])) + more


def _same_size(found: Ints, wanted: int | Ints) -> bool:
    return bool(found) and (all(f == wanted for f in found) if isinstance(wanted, int) else found == tuple(wanted))


def _value(value: object) -> str:
    if isinstance(value, tuple) and any(isinstance(v, type) for v in value):
        return f"({', '.join(map(_value, value))})"
    return f"nn.{value.__name__}" if isinstance(value, type) else repr(value)


def _as_filter(test: Callable[[Site], bool]) -> Filter:
    return Filter(test, _text(test))


def _text(where: object) -> str:
    return str(where) if isinstance(where, Filter) else getattr(where, "__name__", repr(where))
