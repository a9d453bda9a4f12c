"""One strategy after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from fxexpand.algebra.kernel import Kernel
from fxexpand.algebra.refusal import Refusal
from fxexpand.errors import RuleError
from fxexpand.graph.site import Site
from fxexpand.graph.structure import Sum
from fxexpand.strategies.strategy import Strategy


@dataclass(frozen=True, repr=False)
class Then(Strategy):
    """The layers that ``first`` makes are expanded again by ``second``, those that it reaches: ``CL(4).then(ACNet())``.

    Before:  y = conv(x)
    After:   y = reduce(kernel.square(h) + kernel.vertical(h) + kernel.horizontal(h)), h = expand(x)

    Raises ``RuleError`` for what is no strategy.
    """

    first: Strategy
    second: Strategy

    def __post_init__(self) -> None:
        for strategy in (self.first, self.second):
            if not isinstance(strategy, Strategy):
                raise RuleError(f"then: expected a strategy, such as CL(rate=4), found {strategy!r}.")

    @property
    def dims(self) -> frozenset[int]:  # type: ignore[override]  # that of the first, not of the class
        return self.first.dims

    @property
    def stages(self) -> tuple[Strategy, ...]:
        return *self.first.stages, self.second

    @property
    def collapses(self) -> bool:
        return self.first.collapses and self.second.collapses

    def layers(self, site: Site) -> Mapping[str, nn.Module] | Sum | Refusal:
        return self.first.layers(site)

    def factorize(self, target: Kernel, fresh: Sequence[Kernel]) -> Sequence[Kernel] | Refusal:
        return self.first.factorize(target, fresh)

    def reaches(self, site: Site) -> bool:
        return self.first.reaches(site)

    def __str__(self) -> str:
        return f"{self.first}.then({self.second})"

    __repr__ = __str__
