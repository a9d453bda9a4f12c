"""The errors of the library. Every message says where, what was expected, what was found and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FxExpandError(Exception):
    """The base of every error that fxexpand raises on purpose."""


class RuleError(FxExpandError):
    """Rules that are malformed, or that match no layer of the model."""


class ExpansionError(FxExpandError):
    """A layer that a rule matches, or a model, cannot be expanded as asked."""


class ContractionError(FxExpandError):
    """A model was never expanded, or its expanded layers no longer form one plain layer."""


class VerificationError(FxExpandError):
    """Two models that should compute the same function do not."""


def did_you_mean(name: str, known: Iterable[str], likeness: float = 0.6) -> str:
    """`` Did you mean 'CL'?``, where one of the known names is like it in letters of any case."""
    folded = {key.casefold(): key for key in known}
    close = difflib.get_close_matches(name.casefold(), folded, 1, likeness)
    return f" Did you mean {folded[close[0]]!r}?" if close else ""
