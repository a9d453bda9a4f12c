"""LowRank: a layer becomes two thinner ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from fxexpand.algebra.factorize import truncated
from fxexpand.algebra.kernel import Kernel
from fxexpand.algebra.refusal import Refusal
from fxexpand.graph.site import Site
from fxexpand.strategies.strategy import Strategy, check_count


@dataclass(frozen=True)
class LowRank(Strategy):
    """A layer becomes two with ``rank`` channels between them: fewer parameters, for those who come with a fat layer
    (a linear or pointwise layer by its singular values; a k×k kernel as k×1, 1×k: Jaderberg, Vedaldi and Zisserman
    2014, "Speeding up Convolutional Neural Networks with Low Rank Expansions", §2).

    Before:  y = conv(x)                       m -> n channels, a×b
    After:   y = second(first(x))              m -> rank -> n channels, a×1 then 1×b; linear layers and 1×1: both 1×1

    Identity: none; W ≈ U·V is the nearest product of that rank (Eckart and Young 1936). Parameters without bias and
    groups, for r = ``rank``: r·(a·m + b·n). ``init="preserve"`` is as near as that comes, and warns with the relative
    error of the kernel, ‖U·V − W‖ / ‖W‖. The padding is the first layer's; ``rank`` counts inside each group.

    Reaches: the layers of these kinds that it makes smaller.
    Exact when: the rank is that of the kernel as an (a·m)×(b·n) matrix, or more.
    Raises ``RuleError`` for a rank that is no integer of at least 1.
    """

    rank: int

    exact: ClassVar[bool] = False
    source: ClassVar[str] = "Jaderberg et al. 2014"
    structure: ClassVar[str] = "k×1, 1×k"
    formula: ClassVar[str] = "r·(a·m + b·n)"

    def __post_init__(self) -> None:
        check_count(self, "rank", self.rank, 1)

    def reaches(self, site: Site) -> bool:
        a, b = _sides(site)
        m, n = site.in_channels // site.groups, site.out_channels // site.groups
        return self._refusal(site) is None and self.rank * (a * m + b * n) < a * b * m * n

    def layers(self, site: Site) -> Mapping[str, nn.Module] | Refusal:
        refusal = self._refusal(site)
        if refusal is not None:
            return refusal
        hidden, d = self.rank * site.groups, site.dims
        if d == 0:
            return {"first": site.layer(site.in_channels, hidden), "second": site.layer(hidden, site.out_channels)}
        a, b = ((1,) * d, (1,) * d) if d != 2 else ((site.kernel_size[0], 1), (1, site.kernel_size[1]))
        s, t = (site.stride, (1,) * d) if d != 2 else ((site.stride[0], 1), (1, site.stride[1]))
        first: Any = {"stride": s, "padding": site.padding, "dilation": site.dilation}
        return {
            "first": site.layer(site.in_channels, hidden, a, **first),
            "second": site.layer(hidden, site.out_channels, b, stride=t, dilation=site.dilation),
        }

    def factorize(self, target: Kernel, fresh: Sequence[Kernel]) -> Sequence[Kernel] | Refusal:
        return truncated(target, fresh)

    def _refusal(self, site: Site) -> Refusal | None:
        if site.dims in (1, 3) and any(k > 1 for k in site.kernel_size):
            size = "×".join(map(str, site.kernel_size))
            return Refusal(
                f"LowRank takes linear and pointwise layers, and kernels on two axes, found {size}. Use CL(1)"
            )
        return None


def _sides(site: Site) -> tuple[int, int]:
    return (site.kernel_size[0], site.kernel_size[1]) if site.dims == 2 else (1, 1)
