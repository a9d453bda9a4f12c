"""Layers as they are before their shapes are known: options are drawn first, and the layer is made where it stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import hypothesis.strategies as st
from torch import nn

from fxexpand.testing.draw.sizes import PADDING_MODES, divisors

Triple: TypeAlias = tuple[int, int, int]

_CONVOLUTIONS: Any = (None, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED: Any = (None, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class ConvDraft:
    """A convolution with any options, of whatever number of axes and channels turns out to be needed."""

    taps: Triple = (1, 1, 1)
    stride: Triple = (1, 1, 1)
    padding: str | Triple = "none"
    dilation: Triple = (1, 1, 1)
    out: int = 0
    group: int = 0
    bias: bool = True
    mode: str = "zeros"
    transposed: bool = False

    def build(self, d: int, m: int) -> nn.Module:
        """The ``ConvNd`` or ``ConvTransposeNd`` of ``d`` axes for ``m`` channels; it gives as many unless drawn so."""
        n = self.out or m
        k, steps, dilation = self.taps[:d], self.stride[:d], self.dilation[:d]
        reach = tuple(step * (taps - 1) for step, taps in zip(dilation, k, strict=True))
        named: dict[Any, Any] = {"none": (0,) * d, "half": tuple(r // 2 for r in reach), "full": reach}
        sides: Any = named.get(self.padding, self.padding)
        groups = divisors(m, n)
        options: dict[str, Any] = {
            "groups": groups[self.group % len(groups)],
            "bias": self.bias,
            "dilation": dilation,
        }
        if self.transposed:
            sides = (0,) * d if isinstance(sides, str) else sides[:d]
            more = int(min(steps) > 1 and self.group == 1)
            return cast(nn.Module, _TRANSPOSED[d](m, n, k, steps, sides, more, **options))
        steps = (1,) * d if sides == "same" else steps  # torch has no other "same"
        sides = sides if isinstance(sides, str) else sides[:d]
        return cast(nn.Module, _CONVOLUTIONS[d](m, n, k, steps, sides, padding_mode=self.mode, **options))


def triples(entries: st.SearchStrategy[int]) -> st.SearchStrategy[Triple]:
    """One entry for each axis that there may be."""
    return st.tuples(entries, entries, entries)


def conv_drafts(
    *,
    taps: st.SearchStrategy[int] | None = None,
    transposed: bool = False,
    modes: tuple[str, ...] = (*("zeros",) * 6, *PADDING_MODES),
) -> st.SearchStrategy[ConvDraft]:
    """Drafts of convolutions, most of them with zero padding and few of their options set."""
    return st.builds(
        ConvDraft,
        taps=triples(st.sampled_from((1, 3, 2)) if taps is None else taps),
        stride=st.just((1, 1, 1)) | triples(st.sampled_from((1, 1, 2, 3))),
        padding=st.sampled_from(("none", "half", "full", "same")) | triples(st.integers(0, 2)),
        dilation=triples(st.sampled_from((1, 1, 2))),
        out=st.sampled_from((0, 0, 1, 2, 3, 4)),
        group=st.sampled_from((0, 0, 1, -1)),
        bias=st.booleans(),
        mode=st.just("zeros") if transposed else st.sampled_from(modes),
        transposed=st.just(transposed),
    )
