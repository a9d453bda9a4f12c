"""What users test their own architectures, strategies and rewrites with.

``assert_equivalent``, ``check_model`` and the matrix oracle need torch alone. The Hypothesis strategies ``layers()``,
``linear_chains()``, ``linear_graphs()`` and ``networks()``, and ``check_strategy``, need the extra
``fxexpand[testing]``. ``pytest_plugins = ["fxexpand.testing.devices"]`` in a ``conftest.py`` gives the fixture
``device``, which runs a test on every kind of device there is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fxexpand.testing.blocks import Branches, Functional, Outer, Picky, Residual, UserConv
from fxexpand.testing.case import Case, as_trained
from fxexpand.testing.check_model import check_model
from fxexpand.testing.code import code_of, graph
from fxexpand.testing.equivalent import Agreement, PropertyError, assert_equivalent
from fxexpand.testing.oracle import chain_matrix, conv_matrix, matrix
from fxexpand.testing.report import Outcome, Report
from fxexpand.testing.tolerance import Rounding, ToleranceError, gamma

if TYPE_CHECKING:
    from fxexpand.testing.draw.check import StrategyReport, check_strategy
    from fxexpand.testing.draw.graphs import linear_graphs
    from fxexpand.testing.draw.layers import expandable_layers, layers, linear_chains
    from fxexpand.testing.draw.networks import networks

# What needs Hypothesis, and so is imported when it is asked for.
_DRAWN = {
    "StrategyReport": "check",
    "check_strategy": "check",
    "expandable_layers": "layers",
    "layers": "layers",
    "linear_chains": "layers",
    "linear_graphs": "graphs",
    "networks": "networks",
}

__all__ = [
    "Agreement",
    "Branches",
    "Case",
    "Functional",
    "Outcome",
    "Outer",
    "Picky",
    "PropertyError",
    "Report",
    "Residual",
    "Rounding",
    "StrategyReport",
    "ToleranceError",
    "UserConv",
    "as_trained",
    "assert_equivalent",
    "chain_matrix",
    "check_model",
    "check_strategy",
    "code_of",
    "conv_matrix",
    "expandable_layers",
    "gamma",
    "graph",
    "layers",
    "linear_chains",
    "linear_graphs",
    "matrix",
    "networks",
]


def __getattr__(name: str) -> Any:
    """Raises ``ImportError``, saying how to install Hypothesis, where it is missing."""
    if name not in _DRAWN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"fxexpand.testing.draw.{_DRAWN[name]}"), name)
