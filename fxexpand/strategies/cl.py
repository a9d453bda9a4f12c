"""CL: expand the convolution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fxexpand.algebra.factorize import around_kernel
from fxexpand.algebra.kernel import Kernel
from fxexpand.algebra.refusal import Refusal
from fxexpand.graph.site import Site
from fxexpand.strategies.strategy import Widening


@dataclass(frozen=True)
class CL(Widening):
    """A convolution becomes pointwise, k×k, pointwise (Guo, Alvarez and Salzmann 2020, §3.2, "expanding convolutional
    layers").

    Before:  y = conv(x)                          m -> n channels
    After:   y = reduce(kernel(expand(x)))        m -> p -> q -> n channels, p = rate·m, q = rate·n

    Identity: (C ∘ B ∘ A) * x = C * (B * (A * x)). Parameters without bias and groups, for K taps: m·p + K·p·q + q·n.
    The padding is the first layer's, stride and dilation are the k×k layer's; every layer has the groups of the
    original. ``keep_input=True`` leaves p = m in a layer that reads a network input, as the authors' networks do.

    Reaches: convolutions with a kernel larger than 1.
    Exact when: p ≥ m and q ≥ n, so at any rate ≥ 1, for ``init="preserve"``; as layers, always.
    Raises ``RuleError`` for a rate that is not positive.
    """

    source: ClassVar[str] = "Guo et al. 2020"
    structure: ClassVar[str] = "1×1, k×k, 1×1"
    formula: ClassVar[str] = "m·p + K·p·q + q·n"

    def reaches(self, site: Site) -> bool:
        return any(k > 1 for k in site.kernel_size)

    def layers(self, site: Site) -> Mapping[str, nn.Module]:
        m, n = site.in_channels, site.out_channels
        p, q = self.widths(site)
        return {
            "expand": site.layer(m, p, padding=site.padding),
            "kernel": site.layer(p, q, site.kernel_size, stride=site.stride, dilation=site.dilation),
            "reduce": site.layer(q, n),
        }

    def factorize(self, target: Kernel, fresh: Sequence[Kernel]) -> Sequence[Kernel] | Refusal:
        found = around_kernel(target, fresh)
        return Refusal(f"{found.reason}; rate=1 is enough") if isinstance(found, Refusal) else found
