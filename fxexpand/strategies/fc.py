"""FC: expand a fully-connected layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import ClassVar

from torch import nn

from fxexpand.algebra.factorize import matrices
from fxexpand.algebra.kernel import Kernel
from fxexpand.algebra.refusal import Refusal
from fxexpand.graph.site import Site
from fxexpand.strategies.strategy import Strategy, check_count, check_rate, widened


@dataclass(frozen=True)
class FC(Strategy):
    """A linear layer becomes ``depth`` of them (Guo, Alvarez and Salzmann 2020, §3.1, "expanding fully-connected
    layers"; Arora et al. 2018).

    Before:  y = linear(x)                                 m -> n features
    After:   y = linear_{depth−1}(… linear_1(linear_0(x)))    m -> rate·m -> rate·n … -> n features

    Identity: (W_l ··· W₁)·x = W_l·(··· (W₁·x)). Parameters without bias, for a depth l ≥ 3:
    m·p + p·q + (l − 3)·q² + q·n, with p = rate·m and q = rate·n.

    Reaches: every linear layer.
    Exact when: every hidden width is at least min(m, n), so at any rate ≥ 1, for ``init="preserve"``; as layers,
    always.
    Raises ``RuleError`` for a rate that is not positive, or a depth that is no integer of at least 2.
    """

    rate: float
    depth: int = 2

    dims: ClassVar[frozenset[int]] = frozenset({0})
    source: ClassVar[str] = "Guo et al. 2020"
    structure: ClassVar[str] = "linear, …, linear"
    formula: ClassVar[str] = "m·p + p·q + (l − 3)·q² + q·n"

    def __post_init__(self) -> None:
        check_rate(self, self.rate)
        check_count(self, "depth", self.depth, 2)

    def layers(self, site: Site) -> Mapping[str, nn.Module]:
        m, n = site.in_channels, site.out_channels
        widths = [m, widened(m, self.rate), *[widened(n, self.rate)] * (self.depth - 2), n]
        return {f"linear_{i}": site.layer(widths[i], widths[i + 1]) for i in range(self.depth)}

    def factorize(self, target: Kernel, fresh: Sequence[Kernel]) -> Sequence[Kernel] | Refusal:
        found = matrices(target, fresh)
        if not isinstance(found, Refusal):
            return found
        m, n = target.in_channels, target.out_channels
        least = min(m, n)
        rate = least / m if self.depth == 2 else 1.0
        return Refusal(f"{found.reason}; rate={ceil(rate * 1000) / 1000:g} is enough")
