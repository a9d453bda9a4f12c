"""Calls of functions and methods that apply an affine map, and the map."""

from __future__ import annotations

from typing import Any

from torch import fx

from fxexpand.algebra.refusal import Refusal
from fxexpand.regions import arithmetic, functional
from fxexpand.regions.arguments import METHODS, Arguments, Rule
from fxexpand.regions.constants import Constants
from fxexpand.regions.effects import Effects, writes
from fxexpand.regions.parts import Join, Lifted, Unary

_RULES: dict[Any, Rule] = {**functional.RULES, **arithmetic.RULES}


class Calls:
    """Lifts the ``call_function`` and ``call_method`` nodes of one graph."""

    def __init__(self, constants: Constants, effects: Effects) -> None:
        self.effects = effects
        self._arguments = Arguments(constants)

    def lift(self, node: fx.Node) -> Lifted:
        """What ``node`` does: None where that is not affine in one of its inputs."""
        target = METHODS.get(str(node.target)) if node.op == "call_method" else node.target
        rule = _RULES.get(target)
        if rule is None or "out" in node.kwargs:
            return None
        lifted = rule(self._arguments, node, target)
        if isinstance(lifted, (Unary, Join)) and writes(node) and not self.effects.owns(node.all_input_nodes[0]):
            return Refusal("it changes a value in place that something else sees too")
        return lifted
