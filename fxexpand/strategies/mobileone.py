"""MobileOne: the kernel several times over, a scale branch and a skip."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fxexpand.algebra.refusal import Refusal
from fxexpand.graph.site import Site
from fxexpand.strategies.branching import Branching
from fxexpand.strategies.strategy import check_count


@dataclass(frozen=True)
class MobileOne(Branching):
    """A convolution becomes several of its kind, a pointwise one (the scale branch) and the signal itself where that
    fits (Vasu, Gabriel, Zhu, Tuzel and Ranjan 2023, "MobileOne: An Improved One Millisecond Mobile Backbone", §3.3).

    Before:  y = conv(x)
    After:   y = conv_0(x) + … + conv_{b−1}(x) + scale(x) + skip(x)

    Identity: kernels of one shape add up. Parameters without bias and groups: (b·K + 1)·m·n for K taps and
    b = ``convolutions``; a pointwise layer has no scale branch, and b·m·n. The skip is there where the layer gives as
    many channels as it takes, with stride 1. The paper has batch norm at the end of each branch: without it the
    branches of one shape get the same gradients, and differ by what they start with alone.

    Reaches: all convolutions.
    Exact when: always, for ``init="preserve"`` too.
    Raises ``RuleError`` for a number of branches that is no integer of at least 1.
    """

    convolutions: int = 4
    batch_norm: bool = False

    source: ClassVar[str] = "Vasu et al. 2023"
    structure: ClassVar[str] = "b × (k×k) + 1×1 + identity"
    formula: ClassVar[str] = "(b·K + 1)·m·n"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "convolutions", self.convolutions, 1)

    def reaches(self, site: Site) -> bool:
        return True

    def branches(self, site: Site) -> Mapping[str, nn.Module] | Refusal:
        found = {f"conv_{i}": self.branch(site, site.kernel_size) for i in range(self.convolutions)}
        if any(k > 1 for k in site.kernel_size):
            found["scale"] = self.branch(site, 1)
        skip = self.skip(site)
        return found if isinstance(skip, Refusal) else {**found, "skip": skip}
