"""CK: expand the kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fxexpand.algebra.factorize import shift_copies, shift_taps, shifts
from fxexpand.algebra.kernel import Kernel
from fxexpand.algebra.refusal import Refusal
from fxexpand.graph.site import Site
from fxexpand.strategies.strategy import Widening


@dataclass(frozen=True)
class CK(Widening):
    """A convolution with a large kernel becomes several of 3×3 (Guo, Alvarez and Salzmann 2020, §3.3, "expanding
    convolutional kernels").

    Before:  y = conv(x)                              k×k, k odd and larger than 3, m -> n channels
    After:   y = kernel_l(… kernel_1(kernel_0(x)))    (k − 1)/2 layers of 3×3, m -> rate·m -> rate·n … -> n channels

    Identity: l layers of 3 taps, one after another, reach 2·l + 1 taps. Parameters without bias and groups, for l ≥ 3
    layers: 9·(m·p + p·q + (l − 3)·q² + q·n), with p = rate·m and q = rate·n. An axis shorter than the longest takes 1
    tap in the layers it does not need. The padding is the first layer's, the stride is the last one's; every layer has
    the dilation and the groups of the original. ``keep_input=True`` leaves the first hidden width at m in a layer that
    reads a network input, as the authors' networks do.

    Reaches: convolutions with odd kernels, the largest side larger than 3.
    Exact when: the rate is at least 4 for kernels of 5×5, 7×7 and 9×9, for ``init="preserve"`` (2 in one dimension,
    8 in three); as layers, always.
    Raises ``RuleError`` for a rate that is not positive.
    """

    source: ClassVar[str] = "Guo et al. 2020"
    structure: ClassVar[str] = "3×3, …, 3×3"
    formula: ClassVar[str] = "9·(m·p + p·q + (l − 3)·q² + q·n)"

    def reaches(self, site: Site) -> bool:
        return max(site.kernel_size) > 3 and all(k % 2 for k in site.kernel_size)

    def layers(self, site: Site) -> Mapping[str, nn.Module] | Refusal:
        if not self.reaches(site):
            size = "×".join(map(str, site.kernel_size))
            kind = "an odd kernel" if max(site.kernel_size) > 3 else "a kernel larger than 3"
            return Refusal(f"CK needs {kind}, found {size}. Use CL(rate={self.rate:g})")
        p, q = self.widths(site)
        sizes = shift_taps(site.kernel_size)
        widths = [site.in_channels, p, *[q] * (len(sizes) - 2), site.out_channels]
        last = len(sizes) - 1
        return {
            f"kernel_{i}": site.layer(
                widths[i],
                widths[i + 1],
                size,
                stride=site.stride if i == last else 1,
                padding=site.padding if i == 0 else 0,
                dilation=site.dilation,
            )
            for i, size in enumerate(sizes)
        }

    def factorize(self, target: Kernel, fresh: Sequence[Kernel]) -> Sequence[Kernel] | Refusal:
        found = shifts(target, fresh)
        if not isinstance(found, Refusal):
            return found
        copies_in, copies_out = shift_copies(target.kernel_size)
        enough = f"rate={max(copies_in, copies_out)}"
        kept = self.keep_input and fresh[0].out_channels == target.in_channels
        return Refusal(f"{found.reason}; {f'keep_input=False with {enough}' if kept else enough} is enough")
