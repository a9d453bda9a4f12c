"""Linear over-parameterisation of any PyTorch model, as torch.fx graph-rewriting passes."""

from fxexpand.errors import ContractionError, ExpansionError, FxExpandError, RuleError, VerificationError
from fxexpand.graph.trace import trace
from fxexpand.passes.collapse import collapse, uncollapse
from fxexpand.passes.contract import contract
from fxexpand.passes.counterpart import counterpart
from fxexpand.passes.expand import expand
from fxexpand.passes.explain import explain
from fxexpand.passes.fuse import fuse
from fxexpand.passes.transfer import transfer
from fxexpand.report.summary import summary
from fxexpand.report.verify import verify
from fxexpand.rules import Rule, layer
from fxexpand.strategies import CK, CL, FC

__all__ = [
    "CK",
    "CL",
    "FC",
    "ContractionError",
    "ExpansionError",
    "FxExpandError",
    "Rule",
    "RuleError",
    "VerificationError",
    "collapse",
    "contract",
    "counterpart",
    "expand",
    "explain",
    "fuse",
    "layer",
    "summary",
    "trace",
    "transfer",
    "uncollapse",
    "verify",
]
