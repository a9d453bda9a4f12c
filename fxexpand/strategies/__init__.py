"""How one layer becomes several: one frozen class a file."""

from fxexpand.strategies.ck import CK
from fxexpand.strategies.cl import CL
from fxexpand.strategies.fc import FC
from fxexpand.strategies.strategy import Strategy

__all__ = ["CK", "CL", "FC", "Strategy"]
