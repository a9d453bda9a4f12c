"""Overparam: a chain as deep and wide as asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fxexpand.algebra.factorize import before_points, matrices
from fxexpand.algebra.kernel import Kernel
from fxexpand.algebra.refusal import Refusal
from fxexpand.graph.site import Site
from fxexpand.graph.structure import Sum
from fxexpand.strategies.strategy import Strategy, check_count, check_flag, check_rate, widened


@dataclass(frozen=True)
class Overparam(Strategy):
    """A layer becomes a chain: itself with more channels, then pointwise layers (Huh, Mobahi, Zhang, Cheung, Agrawal
    and Isola 2023, "The Low-Rank Simplicity Bias in Deep Networks", §5).

    Before:  y = conv(x)                                              m -> n channels
    After:   y = layer_{l−1}(… layer_1(layer_0(x)))                   m -> w -> w … -> n channels, w = rate·n

    Identity: (W_l ··· W₁)·x = W_l·(··· (W₁·x)). Parameters without bias and groups, for K taps and depth l:
    K·m·w + (l − 2)·w² + w·n. With ``residual=True`` the square layers have the signal itself beside them: h + W·h.
    Padding, stride and dilation are the first layer's; every layer has the groups of the original.

    Reaches: all layers.
    Exact when: w ≥ n, so at any rate ≥ 1, for ``init="preserve"``; as layers, always.
    Raises ``RuleError`` for a depth that is no integer of at least 2, a rate that is not positive, or a ``residual``
    that is neither True nor False.
    """

    rate: float
    depth: int = 2
    residual: bool = False

    source: ClassVar[str] = "Huh et al. 2023"
    structure: ClassVar[str] = "k×k, 1×1, …, 1×1"
    formula: ClassVar[str] = "K·m·w + (l − 2)·w² + w·n"

    def __post_init__(self) -> None:
        check_rate(self, self.rate)
        check_count(self, "depth", self.depth, 2)
        check_flag(self, "residual", self.residual)

    def layers(self, site: Site) -> Mapping[str, nn.Module]:
        n = site.out_channels
        w = widened(n, self.rate, site.groups)
        first = site.layer(
            site.in_channels, w, site.kernel_size or 1, stride=site.stride or 1, padding=site.padding or 0,
            dilation=site.dilation or 1,
        )  # fmt: skip
        inner = {f"layer_{i}": self._square(site, w) for i in range(1, self.depth - 1)}
        return {"layer_0": first, **inner, f"layer_{self.depth - 1}": site.layer(w, n)}

    def factorize(self, target: Kernel, fresh: Sequence[Kernel]) -> Sequence[Kernel] | Refusal:
        found = matrices(target, fresh) if target.dims == 0 else before_points(target, fresh)
        return Refusal(f"{found.reason}; rate=1 is enough") if isinstance(found, Refusal) else found

    def _square(self, site: Site, channels: int) -> nn.Module:
        layer = site.layer(channels, channels)
        return Sum({"layer": layer, "identity": nn.Identity()}) if self.residual else layer
