"""A strategy of a user's own, asked of random layers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import hypothesis.strategies as st
from hypothesis import HealthCheck, given, settings
from torch import nn

from fxexpand.algebra.kernel import Kernel
from fxexpand.algebra.refusal import Refusal
from fxexpand.graph.site import Site
from fxexpand.graph.structure import Sum
from fxexpand.strategies import Strategy
from fxexpand.testing.case import Case
from fxexpand.testing.check_model import check_model
from fxexpand.testing.draw.layers import expandable_layers
from fxexpand.testing.draw.sizes import tuples
from fxexpand.testing.equivalent import PropertyError

T = TypeVar("T")
_EXPANDED = ("expand preserves", "gradients flow", "collapse agrees", "contract restores")


@dataclass(frozen=True)
class StrategyReport:
    """How many random layers a strategy has expanded, and for what reasons it left how many alone."""

    strategy: Strategy
    expanded: int
    refused: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.strategy}: {self.expanded} layers expanded, collapsed and contracted"]
        return "\n".join([*lines, *(f"{count:>5} left alone: {why}" for why, count in sorted(self.refused.items()))])


def check_strategy(strategy: Strategy, *, max_examples: int | None = None) -> StrategyReport:
    """That ``strategy`` is right about every layer that it takes, asked of random ones.

    Draws ``Linear`` and ``ConvNd`` layers with any options, as many as the Hypothesis profile says unless
    ``max_examples`` does. Of each that the strategy reaches: what it makes computes the same, has gradients, collapses
    and contracts to the layer that it was. What it refuses, saying why, is counted by the reason.

    Returns a report. Raises ``PropertyError`` for a layer of which that is not true, shrunk, and printed as the code
    that makes it; and where it takes none of the layers at all.
    """
    watched = _Watched(strategy)
    expanded = 0
    refused: Counter[str] = Counter()

    def holds(case: Case) -> None:
        nonlocal expanded
        watched.refusals.clear()
        vars(watched)["asked"] = False
        report = check_model(nn.Sequential(case.module), *case.inputs, rules=watched, backend=None)
        unasked = [name for name in _EXPANDED if name in report.skipped]
        if not unasked:
            expanded += 1
        elif watched.refusals:
            refused[watched.refusals[-1]] += 1
        elif watched.asked:
            raise PropertyError(f"{unasked[0]}: {report.skipped[unasked[0]]}")
        else:
            refused["it does not reach them"] += 1

    examples = max_examples or settings().max_examples
    for count in (examples, 10 * examples):  # few are enough for most; a strategy for few layers may reach none of them
        options = settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))
        options(given(case=_layers())(holds))()
        if expanded:
            break
    else:
        reasons = "; ".join(refused) or "no layer was drawn"
        raise PropertyError(
            f"{strategy}: expected it to take some of {sum(refused.values())} random layers, found none: {reasons}. "
            "Look at its dims and its reaches(site)."
        )
    return StrategyReport(strategy, expanded, dict(refused))


class _Watched(Strategy):
    """A strategy, of which it is known whether it was asked, and what it refused: all else that fails is wrong."""

    inner: Strategy
    refusals: list[str]
    asked: bool

    def __init__(self, inner: Strategy) -> None:
        vars(self).update(inner=inner, refusals=[], dims=inner.dims, asked=False)  # it is frozen

    @property
    def stages(self) -> tuple[Strategy, ...]:
        later = [_Watched(stage) for stage in self.inner.stages[1:]]
        for stage in later:
            vars(stage)["refusals"] = self.refusals
        return self, *later

    def reaches(self, site: Site) -> bool:
        return self.inner.reaches(site)

    def layers(self, site: Site) -> Mapping[str, nn.Module] | Sum | Refusal:
        vars(self)["asked"] = True
        return self._noted(self.inner.layers(site))

    def factorize(self, target: Kernel, fresh: Sequence[Kernel]) -> Sequence[Kernel] | Refusal:
        return self._noted(self.inner.factorize(target, fresh))

    def __repr__(self) -> str:
        return repr(self.inner)

    def _noted(self, answer: T) -> T:
        if isinstance(answer, Refusal):
            self.refusals.append(re.sub(r"\d+(\.\d+)?", "#", answer.reason))  # like reasons are counted together
        return answer


@st.composite
def _layers(draw: st.DrawFn) -> Any:
    d = draw(st.integers(0, 3))
    sizes = (1, 3, 2, 5, 4, 7) if d < 3 else (1, 3, 2)
    return draw(expandable_layers(draw(tuples(d, st.sampled_from(sizes)))))
