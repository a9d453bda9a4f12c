"""Values and calls, as Python writes them: numbers, strings, tuples, classes, ``CL(4, keep_input=True)``."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxexpand import strategies as library
from fxexpand.errors import RuleError, did_you_mean
from fxexpand.notation.scanner import Scanner
from fxexpand.strategies import Strategy

_NAME = r"[^\W\d]\w*"
_NUMBER = r"[+-]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?![\w.])"
_STRING = r"'(?:[^'\\\n]|\\.)*'" + "|" + r'"(?:[^"\\\n]|\\.)*"'
_ESCAPES = "\\'\"abfnrtvxuU0"
_WORDS = {"True": True, "False": False, "None": None}

# Texts that nest deeper than anybody writes are refused, before Python's own stack is full.
_DEEPEST = 50


@dataclass(frozen=True)
class _Placed:
    """A value that was read, and where it stands."""

    value: object
    at: int


class Reader(Scanner):
    """A scanner that reads values and calls. ``classes`` are strategies and kinds of layer of the user's."""

    def __init__(self, text: str, classes: Iterable[type]) -> None:
        super().__init__(text)
        own = {cls.__name__: cls for cls in classes}
        ours = {cls.__name__: cls for name in library.__all__ if _is_strategy(cls := getattr(library, name))}
        self.strategies = {name: cls for name, cls in {**ours, **own}.items() if issubclass(cls, Strategy)}
        self.kinds = {name: cls for name, cls in own.items() if issubclass(cls, nn.Module)}
        self._depth = 0

    def strategy(self) -> Strategy:
        """``CL(4)``, ``ACNet`` (without arguments), ``CL(4).then(ACNet())``."""
        with self.deeper():
            at, name = self.here(), self.take(_NAME)
            if name not in self.strategies:
                found = repr(name) if name else self.found()
                raise self.error(f"expected a strategy, found {found}.{self._known(name)}", at)
            made = self._checked(self.call(self.strategies[name], name, at), name, at)
            while dot := self.peek(rf"\.\s*(?:{_NAME})?"):
                made = self._then(made, dot)
            return made

    def call(self, function: Callable[..., Any], name: str, at: int) -> Any:
        """``function`` of the arguments that stand next, in parentheses, or of none. ``name`` stands ``at``."""
        given: list[_Placed] = []
        named: dict[str, _Placed] = {}
        if self.peek(r"\("):
            given, named = self._arguments()
        signature = inspect.signature(function).parameters
        self._check_names(name, signature, given, named)
        bound = {**dict(zip(signature, given, strict=False)), **named}
        missing = [p.name for p in signature.values() if p.name not in bound and _is_required(p)]
        if missing:
            example = f"{name}({missing[0]}={4 if missing[0] == 'rate' else '...'})"
            raise self.error(f"{name} needs {' and '.join(missing)}. Write {example}, for example.", at)
        try:
            return function(*[v.value for v in given], **{key: v.value for key, v in named.items()})
        except (RuleError, TypeError, ValueError) as error:
            blamed = [v.at for key, v in bound.items() if re.search(rf"\b{re.escape(key)}\b", str(error))]
            only = [v.at for v in bound.values()] if len(bound) == 1 else []
            raise self.error(str(error), [*blamed, *only, at][0]) from error

    def value(self) -> object:
        """A number, string, ``True``, ``False``, ``None``, tuple, list, class of layers, or strategy."""
        with self.deeper():
            at = self.here()
            if number := self.take(_NUMBER):
                return self._number(number, at)
            if self.peek("['\"]"):
                return self.string()
            if opening := self.take(r"[(\[]"):
                return self._sequence(opening, at)
            if self.peek(r"nn\s*\."):
                return self._kind()
            name = self.peek(_NAME)
            if name in self.strategies:
                return self.strategy()
            if name in _WORDS or name in self.kinds:
                self.take(_NAME)
                return _WORDS[name] if name in _WORDS else self.kinds[name]
            raise self.error(f"expected a value, found {self.found()}. {self._value_meant(name)}")

    def string(self) -> str:
        """A string in quotes, with Python's escapes."""
        at, text = self.here(), self.take(_STRING)
        if not text:
            raise self.error("this quote is never closed.", at)
        for escape in re.finditer(r"\\(.)", text):
            if escape[1] not in _ESCAPES:
                place = at + escape.start()
                raise self.error(
                    f"expected an escape of Python's, found {escape[0]}. Write \\\\ for a backslash.", place
                )
        try:
            return str(ast.literal_eval(text))
        except (SyntaxError, ValueError) as error:
            raise self.error(f"this string has an escape that is no character: {error}.", at) from error

    @contextmanager
    def deeper(self) -> Iterator[None]:
        """One level deeper. Raises ``RuleError`` for a text that nests too deep."""
        self._depth += 1
        if self._depth > _DEEPEST:
            raise self.error(f"expected at most {_DEEPEST} levels of parentheses and signs, found more.")
        yield
        self._depth -= 1

    def _then(self, first: Strategy, dot: str) -> Strategy:
        at = self.here()
        if not re.fullmatch(r"\.\s*then", dot):
            raise self.error(f"expected .then(strategy), found {dot!r}. A glob stands after 'on'.", at)
        self.at += len(dot)
        return self._checked(self.call(first.then, "then", at), "then", at)

    def _checked(self, made: object, name: str, at: int) -> Strategy:
        if not isinstance(made, Strategy):
            raise self.error(f"expected a strategy, found that {name} makes {made!r}.", at)
        return made

    def _arguments(self) -> tuple[list[_Placed], dict[str, _Placed]]:
        """What stands in parentheses: by position, and by name."""
        given: list[_Placed] = []
        named: dict[str, _Placed] = {}
        at = self.here()
        self.take(r"\(")
        while not self.take(r"\)"):
            self._open(at)
            place = self.here()
            keyword = self.peek(rf"{_NAME}\s*=").rstrip("=").rstrip()
            if keyword in named:
                raise self.error(f"expected each argument once, found {keyword} again.", place)
            if keyword:
                self.take(rf"{_NAME}\s*=")
                place = self.here()
                named[keyword] = _Placed(self.value(), place)
            elif named:
                raise self.error(f"expected name=value after an argument by name, found {self.found()}.", place)
            else:
                given.append(_Placed(self.value(), place))
            if not self.take(",") and not self.peek(r"\)"):
                self._open(at)
                raise self.error(f"expected ',' or ')', found {self.found()}.")
        return given, named

    def _open(self, at: int) -> None:
        """Raise ``RuleError`` at the end of the text: what was opened ``at`` is not closed."""
        if not self.peek("."):
            closing = ")" if self.text[at] == "(" else "]"
            raise self.error(f"expected {closing!r}, found the end: this is never closed.", at)

    def _check_names(
        self, name: str, signature: Mapping[str, inspect.Parameter], given: list[_Placed], named: Mapping[str, _Placed]
    ) -> None:
        """Raise ``RuleError`` for arguments that ``name`` does not take."""
        kinds = [parameter.kind for parameter in signature.values()]
        positional = [p.name for p in signature.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        takes = f"{name} takes {', '.join(signature) or 'no arguments'}."
        if len(given) > len(positional) and inspect.Parameter.VAR_POSITIONAL not in kinds:
            most = f"at most {len(positional)}" if positional else "none"
            surplus = given[len(positional)].at
            raise self.error(f"expected {most} without a name, found another. {takes}", surplus)
        for key, value in named.items():
            if key in positional[: len(given)]:
                raise self.error(f"expected each argument once, found {key} a second time, by name.", value.at)
            if key not in signature and inspect.Parameter.VAR_KEYWORD not in kinds:
                place = self.text.rindex(key, 0, value.at)
                raise self.error(f"{name} has no argument {key!r}.{did_you_mean(key, signature)} {takes}", place)

    def _number(self, text: str, at: int) -> int | float:
        try:
            return int(text) if re.fullmatch(r"[+-]?[\d_]+", text) else float(text)
        except ValueError as error:
            raise self.error(f"expected a number, found {text[:20]!r}: {error}.", at) from error

    def _sequence(self, opening: str, at: int) -> object:
        closing = r"\)" if opening == "(" else r"\]"
        values: list[object] = []
        comma = True
        while not self.take(closing):
            self._open(at)
            if not comma:
                raise self.error(f"expected ',' or {closing[1:]!r}, found {self.found()}.")
            values.append(self.value())
            comma = bool(self.take(","))
        if opening == "[":
            return values
        return values[0] if len(values) == 1 and not comma else tuple(values)

    def _kind(self) -> type[nn.Module]:
        """``nn.Conv2d``."""
        self.take(r"nn\s*\.")
        at, name = self.here(), self.take(_NAME)
        found = getattr(nn, name, None)
        if isinstance(found, type) and issubclass(found, nn.Module):
            return found
        modules = [key for key, value in vars(nn).items() if isinstance(value, type)]
        raise self.error(f"expected a class of torch.nn, found {name!r}.{did_you_mean(name, modules)}", at)

    def _known(self, name: str) -> str:
        if not self.peek("."):
            return " Write 'CL(4) on features.*', for example."
        known = ", ".join(sorted(self.strategies))
        return f"{did_you_mean(name, self.strategies)} Known are {known}; pass others as classes=[...]."

    def _value_meant(self, name: str) -> str:
        if isinstance(getattr(nn, name or " ", None), type):
            return f"Did you mean nn.{name}?"
        close = did_you_mean(name, [*_WORDS, *self.kinds, *self.strategies]).strip()
        return close or "Names and globs stand in quotes here; classes of yours are given as classes=[...]."


def _is_strategy(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Strategy) and not inspect.isabstract(value)


def _is_required(parameter: inspect.Parameter) -> bool:
    several = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    return parameter.default is parameter.empty and not several
