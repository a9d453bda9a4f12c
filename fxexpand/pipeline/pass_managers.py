"""The passes as ``torch.fx.passes.infra`` has them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from fxexpand.errors import ExpansionError, FxExpandError, RuleError
from fxexpand.graph.counterpart import Counterpart
from fxexpand.graph.expanded import Expanded, strays
from fxexpand.graph.find import find_sites
from fxexpand.graph.layers import is_layer
from fxexpand.graph.site import Site
from fxexpand.graph.trace import check_model
from fxexpand.manifests import check_rebuilt, read_manifest
from fxexpand.passes.collapse import collapse
from fxexpand.passes.contract import contract
from fxexpand.passes.expand import Init, check_init, expand, expand_sites, opened_copy
from fxexpand.passes.fuse import check_when, fuse
from fxexpand.pipeline.keys import key_of
from fxexpand.pipeline.same import same
from fxexpand.regions.reading import Lifts, check_lifts
from fxexpand.rules import Rule, as_rules, match
from fxexpand.strategies.strategy import Strategy

# The functions that graphs of ATen operators call on sizes, and on tuples of values.
_OF_NUMBERS = ("_operator", "math")


class LibraryPass(PassBase):
    """A pass of this library for a ``torch.fx.passes.infra.pass_manager.PassManager``.

    It takes a ``GraphModule`` and leaves it as it is. ``PassResult.graph_module`` is a new one where ``modified`` is
    true, and otherwise the very one that came in. ``modified`` is true exactly when graphs or modules differ, so that
    a manager with ``steps`` ends once nothing is left to do.

    A manager wraps what a pass raises: the error of this library is the ``__cause__``, and Python shows it first.
    """

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Raise ``FxExpandError`` for what is no ``GraphModule``, or has a graph of ATen operators only."""
        name = type(self).__name__
        check_model(graph_module, name, FxExpandError)
        given: nn.Module = graph_module
        if not isinstance(given, fx.GraphModule):
            raise FxExpandError(
                f"{name}: expected a torch.fx.GraphModule, found {type(given).__name__}. Give fxexpand.trace(model); "
                "if that is none either, because the root cannot be traced, use the function of the library instead "
                "of the pass: it takes any model."
            )
        operator = _only_aten(graph_module)
        if operator:
            raise FxExpandError(
                f"{name}: expected a graph of layers and torch functions, found one of ATen operators ({operator}), as "
                "torch.export and Inductor make. Run the pass before them."
            )

    @abstractmethod
    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """The result of the pass. Raises what the function of the library raises."""

    def uuid(self) -> str | None:
        """A key of what the pass does, the same in every process; None where there is none, see ``key_of``."""
        return key_of(type(self), vars(self))

    def __repr__(self) -> str:
        shown = [f"{name}={value!r}" for name, value in vars(self).items() if isinstance(value, str)]
        return f"{type(self).__name__}({', '.join(shown)})"


class ExpandPass(LibraryPass):
    """``expand(graph_module, rules, init=init)``, which leaves expansions and the layers inside them alone.

    So a second run expands nothing again, also by rules the ``where`` of which holds inside expansions: strategies that
    are to follow one another are ``CL(4).then(ACNet())``. A rule by whose strategy something is expanded already is not
    in vain. With a ``manifest``, a model that is expanded as it says is left alone. (A manager with ``steps`` that also
    contracts undoes and does the same each time: contract in another one.)

    Raises ``RuleError`` for malformed rules, and otherwise, when it runs, what ``expand`` raises; also
    ``ExpansionError`` where another pass has taken an expansion apart.
    """

    def __init__(
        self, rules: Rule | Strategy | Sequence[Rule | Strategy] | Mapping[str, Any], *, init: Init = "preserve"
    ) -> None:
        if isinstance(rules, Mapping):
            read_manifest(rules)
        check_init(init)
        self.rules = dict(rules) if isinstance(rules, Mapping) else tuple(as_rules(rules))
        self.init = init

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        if isinstance(self.rules, Mapping):
            if _is_rebuilt(graph_module, self.rules):
                return PassResult(graph_module, modified=False)
            return PassResult(expand(graph_module, self.rules, init=self.init), modified=True)
        if stray := strays(graph_module):
            raise ExpansionError(
                f"{stray[0]}: a layer of an expansion, found outside of one: another pass has kept only what its graph "
                "calls (torch.fx.symbolic_trace and Transformer do). Expand after it."
            )
        work = opened_copy(graph_module, share=False)
        chosen = self._chosen(work, self.rules)
        if not chosen:
            return PassResult(graph_module, modified=False)
        return PassResult(expand_sites(work, chosen, self.init), modified=True)

    def __repr__(self) -> str:
        rules = "; ".join(map(str, self.rules)) if isinstance(self.rules, tuple) else "manifest"
        return f"{type(self).__name__}({rules})"

    @staticmethod
    def _chosen(work: nn.Module, rules: Sequence[Rule]) -> list[tuple[Site, Strategy]]:
        sites = [site for site in find_sites(work) if not site.expanded]
        done = [module.strategy for module in work.modules() if isinstance(module, Expanded)]
        return [(site, rule.strategy) for site, rule in match(sites, rules, done)]


class CollapsePass(LibraryPass):
    """``collapse(graph_module, *example_inputs, lifts=lifts)``; nothing to collapse is no error.

    An expansion that cannot be collapsed is one, where nothing else can, as it is for ``collapse``.
    """

    def __init__(self, *example_inputs: object, lifts: Lifts | None = None) -> None:
        check_lifts(lifts, "collapse")
        self.example_inputs = example_inputs
        self.lifts = lifts

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        try:
            found = collapse(graph_module, *self.example_inputs, lifts=self.lifts)
        except ExpansionError:
            if self.example_inputs or _holds(graph_module, Expanded):
                raise
            return PassResult(graph_module, modified=False)
        return _result(graph_module, found)


class ContractPass(LibraryPass):
    """``contract(graph_module)``; nothing expanded is no error.

    What was expanded and cannot be contracted any more is one, also the nonlinear counterpart of an expanded model.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        if not (_holds(graph_module, Expanded, Counterpart) or strays(graph_module)):
            return PassResult(graph_module, modified=False)
        return PassResult(contract(graph_module), modified=True)


class FusePass(LibraryPass):
    """``fuse(graph_module, *example_inputs, when=when, lifts=lifts)``."""

    def __init__(self, *example_inputs: object, when: str = "cheaper", lifts: Lifts | None = None) -> None:
        check_when(when, "fuse")
        check_lifts(lifts, "fuse")
        self.example_inputs = example_inputs
        self.when = when
        self.lifts = lifts

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        return _result(graph_module, fuse(graph_module, *self.example_inputs, when=self.when, lifts=self.lifts))


def _result(before: fx.GraphModule, after: nn.Module) -> PassResult:
    return PassResult(before, modified=False) if same(before, after) else PassResult(after, modified=True)


def _holds(model: nn.Module, *classes: type[nn.Module]) -> bool:
    return any(isinstance(module, classes) for module in model.modules())


def _is_rebuilt(model: nn.Module, manifest: Mapping[str, Any]) -> bool:
    """Whether the expansions in ``model`` are those of the manifest."""
    try:
        check_rebuilt(model, read_manifest(manifest))
    except RuleError:
        return False
    return True


def _only_aten(gm: fx.GraphModule) -> str:
    """An operator of the graph of ``gm``, if all that it computes with are ATen operators."""
    functions = [node.target for node in gm.graph.nodes if node.op == "call_function"]
    operators = [target for target in functions if isinstance(target, torch._ops.OpOverload)]
    aten = [str(target) for target in operators if target.namespace == "aten"]
    others = [
        target
        for target in functions
        if target not in operators and getattr(target, "__module__", None) not in _OF_NUMBERS
    ]
    called = [gm.get_submodule(str(node.target)) for node in gm.graph.nodes if node.op == "call_module"]
    return "" if not aten or others or any(map(is_layer, called)) else aten[0]
