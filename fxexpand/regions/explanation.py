"""What was, or would be, merged in a model, and why the rest is left alone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Merged:
    """One layer in place of several nodes.

    ``path`` is where the layer stands. ``nodes`` are what it stands for: paths of modules, names of calls. ``macs`` are
    multiply-accumulates for one sample, before and after; None where it has been done already.
    """

    path: str
    nodes: tuple[str, ...]
    macs: tuple[int, int] | None = None

    @property
    def done(self) -> bool:
        return self.macs is None


@dataclass(frozen=True)
class Refused:
    """Nodes that are linear, or nearly so, and are left alone: ``reason`` says why, and what to do about it."""

    nodes: tuple[str, ...]
    reason: str
    kind: str = ""

    def __str__(self) -> str:
        """``branch.bn (BatchNorm2d): training mode; call model.eval() first``."""
        kind = f" ({self.kind})" if self.kind else ""
        return f"{', '.join(self.nodes)}{kind}: {self.reason}"


@dataclass(frozen=True)
class Trained:
    """A region that can run as one layer while it is trained: an expansion, or ``nodes`` that were written by hand.

    ``costs`` are those of a training step, layer by layer and as one layer, in multiply-accumulates that take as long;
    None without example inputs. ``reason`` says why it stays as it is; without one, ``collapse`` collapses it.
    """

    path: str
    nodes: tuple[str, ...] = ()
    costs: tuple[int, int] | None = None
    reason: str = ""

    def __str__(self) -> str:
        """``conv1: collapsed (one layer costs 0.12 times as much: 3,100,000 instead of 26,000,000)``."""
        of = f" <- {' + '.join(self.nodes)}" if self.nodes else ""
        if self.costs is None:
            return f"{self.path}{of}: {self.reason or 'collapsed'}"
        explicit, one = self.costs
        costs = f"one layer costs {one / explicit:.2f} times as much: {one:,} instead of {explicit:,}"
        return f"{self.path}{of}: {self.reason or 'collapsed'} ({costs})"


@dataclass(frozen=True)
class Explanation:
    """What ``fuse`` merges in a model and what it leaves alone, and what ``collapse`` does. ``str()`` is a table."""

    merged: tuple[Merged, ...]
    refused: tuple[Refused, ...]
    trained: tuple[Trained, ...] = ()

    def __str__(self) -> str:
        lines = [f"{len(self.merged)} merged"]
        width = max((len(entry.path) for entry in self.merged), default=0)
        lines += [f"  {entry.path:<{width}} <- {' + '.join(entry.nodes)}{_saving(entry)}" for entry in self.merged]
        lines.append(f"{len(self.refused)} left alone")
        lines += [f"  {entry}" for entry in self.refused]
        if self.trained:
            lines.append(
                f"{sum(not entry.reason for entry in self.trained)} of {len(self.trained)} collapse in training"
            )
            lines += [f"  {entry}" for entry in self.trained]
        return "\n".join(lines)


def _saving(entry: Merged) -> str:
    """How the cost changes, where it does."""
    if entry.macs is None or entry.macs[0] == entry.macs[1]:
        return ""
    before, after = entry.macs
    return f" ({after / before:.2f} × the MACs)" if before else f" ({after:,} MACs)"
