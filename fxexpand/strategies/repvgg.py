"""RepVGG: a pointwise layer and the identity beside the kernel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fxexpand.algebra.refusal import Refusal
from fxexpand.graph.site import Site
from fxexpand.strategies.branching import Branching
from fxexpand.strategies.strategy import check_flag


@dataclass(frozen=True)
class RepVGG(Branching):
    """A convolution gets a pointwise one beside it, and the signal itself where that fits (Ding, Zhang, Ma, Han, Ding
    and Sun 2021, "RepVGG: Making VGG-style ConvNets Great Again", §3.3).

    Before:  y = conv(x)
    After:   y = kernel(x) + point(x) + identity(x)

    Identity: the middle tap of the kernel takes the pointwise one, and the signal. Parameters without bias and groups:
    (K + 1)·m·n for K taps. ``identity=None`` has the signal itself among the branches where the layer gives as many
    channels as it takes, with stride 1; ``True`` insists on it, ``False`` leaves it out.

    Reaches: convolutions with a kernel larger than 1.
    Exact when: always, for ``init="preserve"`` too.
    Raises ``RuleError`` for an ``identity`` that is none of these.
    """

    batch_norm: bool = False
    identity: bool | None = None

    source: ClassVar[str] = "Ding et al. 2021a"
    structure: ClassVar[str] = "k×k + 1×1 + identity"
    formula: ClassVar[str] = "(K + 1)·m·n"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.identity is not None:
            check_flag(self, "identity", self.identity)

    def branches(self, site: Site) -> Mapping[str, nn.Module] | Refusal:
        found = {"kernel": self.branch(site, site.kernel_size), "point": self.branch(site, 1)}
        skip = self.skip(site) if self.identity is not False else Refusal("it is not asked for")
        if not isinstance(skip, Refusal):
            return {**found, "identity": skip}
        if self.identity:
            return Refusal(f"RepVGG: {skip.reason}. Use identity=None")
        return found
