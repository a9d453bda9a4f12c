"""DiverseBranch: branches of different reach and depth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fxexpand.algebra.refusal import Refusal
from fxexpand.graph.site import Site
from fxexpand.strategies.branching import Branching


@dataclass(frozen=True)
class DiverseBranch(Branching):
    """A convolution gets a pointwise one, an average and a deeper one beside it (Ding, Zhang, Han and Ding 2021,
    "Diverse Branch Block: Building a Convolution as an Inception-like Unit", §3.3).

    Before:  y = conv(x)
    After:   y = kernel(x) + point(x) + pooled.pool(pooled.expand(x)) + deep.kernel(deep.expand(x))

    Identity: series and sums of convolutions are convolutions; an average pool is one with equal weights. Parameters
    without bias and groups: (2·K + 2)·m·n + m² for K taps. ``pooled`` and ``deep`` begin with pointwise layers, m -> n
    and m -> m, which do the padding: with batch norm, they pad with what it makes of zero, as the paper does, and its
    statistics see the border too.

    Reaches: convolutions with a kernel larger than 1 and no dilation.
    Exact when: always, for ``init="preserve"`` too.
    """

    batch_norm: bool = False

    source: ClassVar[str] = "Ding et al. 2021b"
    structure: ClassVar[str] = "k×k + 1×1 + (1×1, average) + (1×1, k×k)"
    formula: ClassVar[str] = "(2·K + 2)·m·n + m²"

    def reaches(self, site: Site) -> bool:
        return super().reaches(site) and set(site.dilation) <= {1}

    def branches(self, site: Site) -> Mapping[str, nn.Module] | Refusal:
        if any(step > 1 for step in site.dilation):
            return Refusal("DiverseBranch needs a layer without dilation, for an average pool has none. Use RepVGG()")
        m, n, bias = site.in_channels, site.out_channels, False if self.batch_norm else None
        kernel = site.layer(m, n, site.kernel_size, stride=site.stride, dilation=site.dilation, bias=bias)
        return {
            "kernel": self.branch(site, site.kernel_size),
            "point": self.branch(site, 1),
            "pooled": self.in_turn(site, {**self.pointwise(site, n), "pool": site.average()}),
            "deep": self.in_turn(site, {**self.pointwise(site, m), "kernel": kernel}),
        }
