"""What the strategies that put branches side by side have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from fxexpand.algebra.refusal import Refusal
from fxexpand.graph.lift import pad_module
from fxexpand.graph.site import Site
from fxexpand.graph.structure import Series, Sum, parts_of
from fxexpand.strategies.strategy import Strategy, check_flag


@dataclass(frozen=True)
class Branching(Strategy):
    """A strategy for convolutions that makes branches of one, the first of which has the kernel of the whole.

    With ``batch_norm=True`` there is batch norm at the end of each branch, and after each layer inside it. Then
    training normalises each branch by itself, and the branches are one layer in eval mode only: ``collapse`` leaves
    them as they are while they train, and ``contract`` takes the model in eval mode. The bias that batch norm adds goes
    to the layer's; where it has none, to the running mean of the batch norm behind it.

    With ``init="preserve"`` all branches but the first start as they are drawn, without biases and no larger than the
    layer's kernel, and the first takes what they leave of it: every branch trains from the first step, as it does from
    a fresh start. Batch norm starts as the identity of eval mode. It counts axis 1: inputs need a batch.

    Raises ``RuleError`` for a ``batch_norm`` that is neither True nor False.
    """

    if TYPE_CHECKING:

        @property
        def batch_norm(self) -> bool: ...

    dims: ClassVar[frozenset[int]] = frozenset({1, 2, 3})

    def __post_init__(self) -> None:
        check_flag(self, "batch_norm", self.batch_norm)

    @property
    def collapses(self) -> bool:
        return not self.batch_norm

    def reaches(self, site: Site) -> bool:
        return any(k > 1 for k in site.kernel_size)

    def layers(self, site: Site) -> Mapping[str, nn.Module] | Sum | Refusal:
        if self.batch_norm and not (site.has_bias or site.feeds_norm):
            return Refusal(
                "batch norm in the branches adds a bias, and there is no place for one: the layer has none, and no "
                "batch norm of its own behind it. Use batch_norm=False, or give the layer bias=True"
            )
        branches = self.branches(site)
        return branches if isinstance(branches, Refusal) else Sum(branches)

    @abstractmethod
    def branches(self, site: Site) -> Mapping[str, nn.Module] | Refusal:
        """The branches, by name; the first one has the kernel of the whole."""

    def branch(self, site: Site, kernel_size: int | tuple[int, ...]) -> nn.Module:
        """A convolution of this size in the middle of the site's, with batch norm where that is asked for."""
        conv = site.branch(kernel_size, bias=False if self.batch_norm else None)
        return self.in_turn(site, parts_of(conv, "conv")) if self.batch_norm else conv

    def in_turn(self, site: Site, parts: Mapping[str, nn.Module]) -> nn.Module:
        """``parts`` one after another, the last of which gives the site's channels, with batch norm at the end."""
        return Series({**parts, "norm": site.norm()}) if self.batch_norm else Series(parts)

    def pointwise(self, site: Site, channels: int) -> dict[str, nn.Module]:
        """What a branch begins with: a pointwise layer to ``channels`` that does the padding; with batch norm."""
        bias = False if self.batch_norm else None
        layer = site.layer(site.in_channels, channels, padding=site.padding, bias=bias)
        return {"expand": layer, "norm_0": site.norm(channels)} if self.batch_norm else {"expand": layer}

    def skip(self, site: Site) -> nn.Module | Refusal:
        """The branch that gives the signal as it is, or why there can be none."""
        if site.in_channels != site.out_channels:
            return Refusal(f"an identity beside it needs as many channels out as in, found {_channels(site)}")
        if any(s > 1 for s in site.stride):
            return Refusal(f"an identity beside it needs stride 1, found {'×'.join(map(str, site.stride))}")
        sides = site.beside(1)
        parts = {"pad": pad_module("zeros", sides)} if any(map(any, sides)) else {}
        if self.batch_norm:
            return Series({**parts, "norm": site.norm()})
        return parts["pad"] if parts else nn.Identity()


def _channels(site: Site) -> str:
    return f"{site.in_channels} -> {site.out_channels}"
