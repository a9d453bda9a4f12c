"""Linear over-parameterisation of any PyTorch model, as torch.fx graph-rewriting passes."""

from fxexpand.errors import ContractionError, ExpansionError, FxExpandError, RuleError, VerificationError
from fxexpand.filters import layer
from fxexpand.graph.trace import trace
from fxexpand.notation import parse_rules
from fxexpand.optim.effective_decay import effective_decay
from fxexpand.optim.parameter_groups import parameter_groups
from fxexpand.passes.collapse import collapse, uncollapse
from fxexpand.passes.contract import contract
from fxexpand.passes.counterpart import counterpart
from fxexpand.passes.expand import expand
from fxexpand.passes.explain import explain
from fxexpand.passes.fuse import fuse
from fxexpand.passes.manifest import manifest
from fxexpand.passes.transfer import transfer
from fxexpand.pipeline.pass_managers import CollapsePass, ContractPass, ExpandPass, FusePass
from fxexpand.report.summary import summary
from fxexpand.report.verify import verify
from fxexpand.rules import Rule
from fxexpand.strategies import CK, CL, FC, ACNet, DiverseBranch, LowRank, MobileOne, Orepa, Overparam, RepVGG

__all__ = [
    "CK",
    "CL",
    "FC",
    "ACNet",
    "CollapsePass",
    "ContractPass",
    "ContractionError",
    "DiverseBranch",
    "ExpandPass",
    "ExpansionError",
    "FusePass",
    "FxExpandError",
    "LowRank",
    "MobileOne",
    "Orepa",
    "Overparam",
    "RepVGG",
    "Rule",
    "RuleError",
    "VerificationError",
    "collapse",
    "contract",
    "counterpart",
    "effective_decay",
    "expand",
    "explain",
    "fuse",
    "layer",
    "manifest",
    "parameter_groups",
    "parse_rules",
    "summary",
    "trace",
    "transfer",
    "uncollapse",
    "verify",
]
