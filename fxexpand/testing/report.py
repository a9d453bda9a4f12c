"""What a battery of properties has found."""

from __future__ import annotations

from dataclasses import dataclass

from fxexpand.testing.equivalent import Agreement


@dataclass(frozen=True)
class Outcome:
    """One property: ``agreement`` where it was measured, ``skipped`` why it could not be asked, else empty."""

    name: str
    detail: str = ""
    skipped: str = ""
    agreement: Agreement | None = None

    def __str__(self) -> str:
        if self.skipped:
            return f"{self.name:<22} skipped  {self.skipped}"
        measured = f"{self.agreement.error:>8.1e} {self.agreement.bound:>8.1e}" if self.agreement else " " * 17
        return f"{self.name:<22} holds    {measured}  {self.detail}".rstrip()


@dataclass(frozen=True)
class Report:
    """The outcomes of all properties of ``subject``, none of which has failed: that would have raised."""

    subject: str
    outcomes: tuple[Outcome, ...]

    @property
    def held(self) -> tuple[str, ...]:
        """The names of the properties that hold."""
        return tuple(outcome.name for outcome in self.outcomes if not outcome.skipped)

    @property
    def skipped(self) -> dict[str, str]:
        """The properties that could not be asked, with the reason."""
        return {outcome.name: outcome.skipped for outcome in self.outcomes if outcome.skipped}

    def __getitem__(self, name: str) -> Outcome:
        return next(outcome for outcome in self.outcomes if outcome.name == name)

    def __str__(self) -> str:
        return "\n".join([self.subject, f"{'property':<31} {'error':>8} {'bound':>8}", *map(str, self.outcomes)])
