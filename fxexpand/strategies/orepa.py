"""Orepa: branches with learnt scales, which collapse while they train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import cos, pi
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fxexpand.algebra.kernel import Ints
from fxexpand.algebra.refusal import Refusal
from fxexpand.graph.site import Site
from fxexpand.graph.structure import Series, Sum, parts_of
from fxexpand.strategies.strategy import Strategy, check_count


@dataclass(frozen=True)
class Orepa(Strategy):
    """A convolution becomes six branches, each with a learnt number for each channel in place of batch norm (Hu, Feng,
    Hua, Lai, Huang, Gong and Hua 2022, "Online Convolutional Re-parameterization", §3.2 and §3.3). So they are one
    layer at every step, and ``collapse`` trains them at its cost.

    Before:  y = conv(x)
    After:   y = Σ scale_j · branch_j(x): kernel, point, pooled (1×1, average), prior (1×1, fixed cosines),
             deep (1×1, k×k) and separable (depthwise k×k, 1×1)

    Identity: series and sums of convolutions are convolutions, scaling one included. Parameters without bias and
    groups: (2·K + 3 + e)·m·n + m² + e·K·m + 6·n for K taps and e = ``width``, the depthwise layer's channels for each
    channel in. The prior filters are not learnt: half of the channels have cos(π·(t + ½)·f/k) along one axis, the
    others along the other, for f = 1, 2, … without the multiples of k, some of which vanish. All scales start at 1/√6:
    six branches of one size, drawn independently, then add up to that size.

    The paper adds batch norm after the sum: expand a layer that has it behind it.

    Reaches: convolutions with a kernel larger than 1, without dilation or groups.
    Exact when: always, for ``init="preserve"`` too: the branches start as they are drawn, and the first takes what the
    others leave.
    Raises ``RuleError`` for a width that is no integer of at least 1.
    """

    width: int = 8

    dims: ClassVar[frozenset[int]] = frozenset({1, 2, 3})
    source: ClassVar[str] = "Hu et al. 2022"
    structure: ClassVar[str] = "scaled: k×k + 1×1 + (1×1, average) + (1×1, cosines) + (1×1, k×k) + (depthwise, 1×1)"
    formula: ClassVar[str] = "(2·K + 3 + e)·m·n + m² + e·K·m + 6·n"

    def __post_init__(self) -> None:
        check_count(self, "width", self.width, 1)

    def reaches(self, site: Site) -> bool:
        return any(k > 1 for k in site.kernel_size) and set(site.dilation) <= {1} and site.groups == 1

    def layers(self, site: Site) -> Mapping[str, nn.Module] | Sum | Refusal:
        if any(step > 1 for step in site.dilation) or site.groups > 1:
            return Refusal("Orepa needs a layer without dilation and groups. Use RepVGG()")
        m, n, k = site.in_channels, site.out_channels, site.kernel_size
        pad: dict[str, Any] = {"padding": site.padding, "bias": False}
        taps: dict[str, Any] = {"stride": site.stride, "bias": False}
        wide = self.width * m
        branches: dict[str, dict[str, nn.Module]] = {
            "kernel": parts_of(site.branch(k), "conv"),  # with the bias of all
            "point": parts_of(site.branch(1, bias=False), "conv"),
            "pooled": {"expand": site.layer(m, n, **pad), "pool": site.average()},
            "prior": {"expand": site.layer(m, n, **pad), "cosines": _cosines(site)},
            "deep": {"expand": site.layer(m, m, **pad), "kernel": site.layer(m, n, k, **taps)},
            "separable": {
                "depthwise": site.layer(m, wide, k, stride=site.stride, groups=m, **pad),
                "point": site.layer(wide, n, bias=False),
            },
        }
        return Sum({name: Series({**parts, "scale": site.scale(6**-0.5)}) for name, parts in branches.items()})


def _cosines(site: Site) -> nn.Module:
    """A depthwise layer with a cosine for each channel, along one axis; it is not learnt."""
    n = site.out_channels
    layer = site.layer(n, n, site.kernel_size, stride=site.stride, groups=n, bias=False)
    weight = cast(Tensor, layer.weight)
    share = -(-n // site.dims)  # channels along one axis
    with torch.no_grad():
        for channel in range(n):
            axis, number = divmod(channel, share)
            k = site.kernel_size[axis]
            frequency = number + 1 + number // (k - 1) if k > 1 else 0  # no multiples of k, some of which vanish
            wave = torch.tensor([cos(pi * (t + 0.5) * frequency / k) for t in range(k)])
            shape: Ints = tuple(k if i == axis else 1 for i in range(site.dims))
            weight[channel, 0] = wave.reshape(shape).expand(site.kernel_size)
    weight.requires_grad_(False)
    return layer
