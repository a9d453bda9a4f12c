"""The answer of a question that has no exact answer: why not."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Refusal:
    """Why something cannot be done exactly.

    ``reason`` is a phrase that a user can act on; ``where`` names the layer or node, where one is known.
    """

    reason: str
    where: str = ""

    def at(self, where: str) -> Refusal:
        """The same refusal, with the place it speaks of; a place it already names is kept."""
        return self if self.where else Refusal(self.reason, where)

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}" if self.where else self.reason
