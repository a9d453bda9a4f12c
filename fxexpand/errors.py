"""The errors of the library. Every message says where, what was expected, what was found and what to do."""


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
