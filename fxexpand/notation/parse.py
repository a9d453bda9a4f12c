"""parse_rules: the grammar of rules."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from fxexpand.errors import RuleError
from fxexpand.filters import GLOB, Filter, layer, strange_at
from fxexpand.notation.calls import Reader
from fxexpand.rules import Rule
from fxexpand.strategies import Strategy


def parse_rules(text: str, *, classes: Iterable[type] = ()) -> list[Rule]:
    """The rules that ``text`` says, in the notation of the paper, for command lines and configuration files.

        CK(4)+FC(2) on classifier.*; CL(4) on features.*, stem; FC(rate=2, depth=3)

    ``;`` separates clauses. In a clause, strategies are joined by ``+``: each takes the layers of its kind. Arguments
    are written as in Python; without any, parentheses may be left out. ``on`` says which layers: globs over their
    paths, in which ``*`` crosses dots, separated by commas, or conditions as ``layer`` takes them, combined by ``&``,
    ``|`` and ``~``: ``CL(4) on features.* & ~layer(depthwise=True)``. Without ``on`` a strategy takes those that it
    reaches. A glob with other signs than letters, digits, ``. _ - * ? [ ]`` may need quotes.

    ``str(rule)`` is read back as the same rule, unless its ``where`` is a function. Names are the strategies of this
    library, ``nn.Conv2d`` and the like, and ``classes``: strategies and kinds of layers of yours. Nothing is evaluated.

    Raises ``RuleError``, which points at the character.
    """
    if not isinstance(text, str):
        raise RuleError(f"parse_rules: expected text, such as 'CL(4) on features.*', found {text!r}.")
    reader = _Rules(text, _classes(classes))
    rules = reader.clause()
    while reader.take(";") and reader.peek("."):  # the last one may end with a semicolon
        rules += reader.clause()
    if reader.peek("."):
        raise reader.error(f"expected ';' or the end, found {reader.found()}.{reader.remedy()}")
    return rules


_QUOTES = "Separate globs by commas and rules by ';', and put quotes around a name that has this sign."


class _Rules(Reader):
    """A reader of clauses."""

    def clause(self) -> list[Rule]:
        """``CK(4)+FC(2) on classifier.*``."""
        places = [self.here()]
        strategies = [self.strategy()]
        while self.take(r"\+"):
            places.append(self.here())
            strategies.append(self.strategy())
        if not self.take(r"on\b"):
            return [Rule(strategy) for strategy in strategies]
        self._check_kinds(strategies, places)
        where = self.where()
        return [Rule(strategy, where) for strategy in strategies]

    def where(self) -> Filter:
        """``features.*, stem``: loosest are commas and ``|``, which both mean or, then ``&``, then ``~``."""
        with self.deeper():
            found = self._both()
            while self.take(r"[,|]"):
                found |= self._both()
            return found

    def remedy(self) -> str:
        """What the next sign, which cannot stand here, may be meant to be."""
        if self.peek(r"[+,]"):
            return " Strategies that share an 'on' are joined by '+' before it; other rules come after ';'."
        if self.peek(r"\)"):
            return " No parenthesis is open here."
        before = self.text[: self.at].rstrip()
        if self.peek(r"[\w*]") and before.endswith(")"):
            return " Write 'on' before a glob, '+' or ';' before another strategy."
        return ""

    def _both(self) -> Filter:
        found = self._condition()
        while self.take("&"):
            found &= self._condition()
        return found

    def _condition(self) -> Filter:
        with self.deeper():
            at = self.here()
            if self.take("~"):
                return ~self._condition()
            if self.take(r"\("):
                found = self.where()
                if not self.take(r"\)"):
                    self._open(at)
                    raise self.error(f"expected ')', found {self.found()}.")
                return found
            if self.peek(r"layer\s*\("):
                self.take("layer")
                made: Filter = self.call(layer, "layer", at)
                return made
            return layer(self.string() if self.peek("['\"]") else self._glob())

    def _glob(self) -> str:
        at, glob = self.here(), self.take(GLOB)
        if not glob:
            raise self.error(f"expected a glob, such as features.*, or layer(...), found {self.found()}.")
        if glob.startswith("<"):
            raise self.error(
                "expected a glob or layer(...), found a function as a rule prints it. "
                "Give Rule(strategy, where=function) in Python.",
                at,
            )
        strange = strange_at(glob)
        if strange is not None:
            raise self.error(
                f"expected a glob of *, ?, [abc] and [!abc], found {glob[strange]!r}. {_QUOTES}", at + strange
            )
        return glob

    def _check_kinds(self, strategies: Sequence[Strategy], places: Sequence[int]) -> None:
        """Raise ``RuleError`` for a strategy that gets no layer, as those before it take all of its kind."""
        taken: frozenset[int] = frozenset()
        for strategy, at in zip(strategies, places, strict=True):
            if strategy.dims <= taken:
                raise self.error(
                    f"expected a strategy for another kind of layer, found {type(strategy).__name__}: with 'on', those "
                    "before it take all that it could. Give each a clause of its own, as in "
                    "'CK(4) on layer(kernel_size=5); CL(4) on features.*'.",
                    at,
                )
            taken |= strategy.dims


def _classes(classes: Iterable[object]) -> list[type]:
    found: list[type] = []
    for cls in classes:
        if not (isinstance(cls, type) and issubclass(cls, (Strategy, nn.Module))):
            raise RuleError(f"parse_rules: classes must be strategies or kinds of layer, found {cls!r}.")
        found.append(cls)
    return found
