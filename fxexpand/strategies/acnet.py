"""ACNet: a cross beside the square."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fxexpand.algebra.refusal import Refusal
from fxexpand.graph.site import Site
from fxexpand.strategies.branching import Branching


@dataclass(frozen=True)
class ACNet(Branching):
    """A convolution with a k×k kernel gets a k×1 and a 1×k one beside it (Ding, Guo, Ding and Han 2019, "ACNet:
    Strengthening the Kernel Skeletons", §3.2, "asymmetric convolution block").

    Before:  y = conv(x)
    After:   y = square(x) + vertical(x) + horizontal(x)

    Identity: the taps of a cross are taps of the square. Parameters of an a×b kernel, without bias and groups:
    (a·b + a + b)·m·n. All branches have the stride, dilation and groups of the original; an even side has its cross
    after the middle.

    Reaches: two-dimensional convolutions with both sides larger than 1.
    Exact when: always, for ``init="preserve"`` too.
    """

    batch_norm: bool = False

    dims: ClassVar[frozenset[int]] = frozenset({2})
    source: ClassVar[str] = "Ding et al. 2019"
    structure: ClassVar[str] = "k×k + k×1 + 1×k"
    formula: ClassVar[str] = "(a·b + a + b)·m·n"

    def reaches(self, site: Site) -> bool:
        return all(k > 1 for k in site.kernel_size)

    def branches(self, site: Site) -> Mapping[str, nn.Module] | Refusal:
        a, b = site.kernel_size
        if not self.reaches(site):
            return Refusal(f"ACNet needs a kernel larger than 1 on both axes, found {a}×{b}. Use RepVGG()")
        return {
            "square": self.branch(site, (a, b)),
            "vertical": self.branch(site, (a, 1)),
            "horizontal": self.branch(site, (1, b)),
        }
