"""Rules as text: ``CK(4)+FC(2) on classifier.*; CL(4) on features.*``."""

from fxexpand.notation.parse import parse_rules

__all__ = ["parse_rules"]
