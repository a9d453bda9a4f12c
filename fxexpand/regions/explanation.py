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
class Explanation:
    """What ``fuse`` merges in a model and what it leaves alone. ``str()`` is a table."""

    merged: tuple[Merged, ...]
    refused: tuple[Refused, ...]

    def __str__(self) -> str:
        lines = [f"{len(self.merged)} merged"]
        width = max((len(entry.path) for entry in self.merged), default=0)
        lines += [f"  {entry.path:<{width}} <- {' + '.join(entry.nodes)}{_saving(entry)}" for entry in self.merged]
        lines.append(f"{len(self.refused)} left alone")
        lines += [f"  {entry}" for entry in self.refused]
        return "\n".join(lines)


def _saving(entry: Merged) -> str:
    """How the cost changes, where it does."""
    if entry.macs is None or entry.macs[0] == entry.macs[1]:
        return ""
    before, after = entry.macs
    return f" ({after / before:.2f} × the MACs)" if before else f" ({after:,} MACs)"
