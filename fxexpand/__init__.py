"""Linear over-parameterisation of any PyTorch model, as torch.fx graph-rewriting passes."""

from fxexpand.errors import ContractionError, ExpansionError, FxExpandError, RuleError, VerificationError
from fxexpand.graph.trace import trace
from fxexpand.optim.effective_decay import effective_decay
from fxexpand.optim.parameter_groups import parameter_groups
from fxexpand.passes.collapse import collapse, uncollapse
from fxexpand.passes.contract import contract
from fxexpand.passes.expand import expand
from fxexpand.passes.explain import explain
from fxexpand.passes.fuse import fuse
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
    "effective_decay",
    "expand",
    "explain",
    "fuse",
    "layer",
    "parameter_groups",
    "summary",
    "trace",
    "uncollapse",
    "verify",
]
