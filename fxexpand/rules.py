"""Which layers a strategy applies to."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from fxexpand.errors import RuleError, did_you_mean
from fxexpand.filters import Filter, Where, clause_of, globs_of, text_of
from fxexpand.graph.site import Site
from fxexpand.strategies.strategy import Strategy


@dataclass(frozen=True)
class Rule:
    """``strategy`` for the layers of its kind for which ``where`` holds; without ``where``, for those it reaches.

    ``str()`` is what ``parse_rules`` reads: ``CL(rate=4, keep_input=False) on features.*``.

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
        return str(self.strategy) if self.where is None else f"{self.strategy} on {clause_of(self.where)}"


def as_rules(rules: object) -> list[Rule]:
    """The rules that a caller means: a ``Rule``, a strategy, or a sequence of them. Raises ``RuleError``."""
    given = list(rules) if isinstance(rules, Iterable) and not isinstance(rules, str) else [rules]
    if not given:
        raise RuleError("rules: expected at least one rule or strategy, found none. Use CL(rate=4), for example.")
    found = []
    for rule in given:
        if not isinstance(rule, (Rule, Strategy)):
            raise RuleError(
                f"rules: expected a Rule or a strategy, such as CL(rate=4), found {rule!r:.60}.{_meant(rule)}"
            )
        found.append(rule if isinstance(rule, Rule) else Rule(rule))
    return found


def _meant(rule: object) -> str:
    """What is close to ``rule``, which is no rule."""
    if isinstance(rule, str):
        if rule.lstrip().startswith("{"):
            return " Use json.loads(...) for a manifest."
        return f" Use parse_rules({repr(rule) if len(rule) < 60 else '...'})."
    return f" Use {rule.__name__}(rate=4)." if isinstance(rule, type) and issubclass(rule, Strategy) else ""


def match(sites: Sequence[Site], rules: Sequence[Rule], done: Collection[object] = ()) -> list[tuple[Site, Rule]]:
    """Each site that a rule matches, with the first such rule.

    ``done`` are strategies by which something is expanded already: a rule for one of them may match none.

    Raises ``RuleError`` when no rule matches any site, or when a ``where`` is in vain: no rule that has it matches any.
    """
    # Each condition is asked once about each site: it may count, or remember what it has seen.
    matched = [[site for site in sites if rule.matches(site)] for rule in rules]
    for rule in rules:
        alike = [own for other, own in zip(rules, matched, strict=True) if _same(other.where, rule.where)]
        if rule.where is not None and not any(alike) and rule.strategy.stages[0] not in done:
            raise RuleError(f"{rule} matches no layer. {_nearest(rule, sites)}")
    first: dict[int, tuple[Site, Rule]] = {}
    for rule, own in zip(rules, matched, strict=True):
        for site in own:
            first.setdefault(id(site), (site, rule))
    if not first and not any(rule.strategy.stages[0] in done for rule in rules):
        raise RuleError(f"no rule matches any layer: {'; '.join(map(str, rules))}. {_overview(sites)}")
    return [first[id(site)] for site in sites if id(site) in first]


def _same(one: Where | None, other: Where | None) -> bool:
    return one is other or (isinstance(one, Filter) and one == other)


def _nearest(rule: Rule, sites: Sequence[Site]) -> str:
    """What the layers that the condition holds for are, or the path that is most like the one asked for."""
    held = [site for site in sites if rule.where is not None and rule.where(site)]
    if held:
        takes = "linear layers" if rule.strategy.dims == {0} else "convolutions"
        return f"Its where holds for {_some(held)}, but {type(rule.strategy).__name__} takes {takes}."
    asked = () if rule.where is None else globs_of(rule.where) or (text_of(rule.where).removeprefix("layer(name="),)
    hints = (did_you_mean(glob, (site.path for site in sites), 0.5) for glob in asked)
    return _overview(sites) + next(filter(None, hints), "")


def _overview(sites: Sequence[Site]) -> str:
    if not sites:
        return "The model has no convolution or linear layer that could be expanded."
    done = " (expanded already)" if all(site.expanded for site in sites) else ""
    return f"The model has {_some(sites)}{done}. Choose others with Rule(strategy, where=layer(...))."


def _some(sites: Sequence[Site], most: int = 4) -> str:
    more = f" and {len(sites) - most} more" if len(sites) > most else ""
    return ", ".join(map(str, sites[:most])) + more
