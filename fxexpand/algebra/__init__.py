"""Affine maps as plain tensor maths. Imports torch; never torch.fx, never a pass."""

from fxexpand.algebra.combine import add, concatenate, scaled
from fxexpand.algebra.compose import compose, compose_all
from fxexpand.algebra.kernel import Kernel
from fxexpand.algebra.refusal import Refusal

__all__ = ["Kernel", "Refusal", "add", "compose", "compose_all", "concatenate", "scaled"]
