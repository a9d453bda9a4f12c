"""What else a model does with the weight and bias of a layer."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from types import CodeType

from torch import fx, nn

from fxexpand.algebra.refusal import Refusal
from fxexpand.graph.layers import attributes_named, has_hooks, is_opaque
from fxexpand.graph.outside import hook_code
from fxexpand.graph.questions import code_of, question
from fxexpand.graph.site import Site
from fxexpand.graph.tree import modules_beside, parameter_owners, submodule

_SILENT = "it would compute something else with the layers of an expansion in its place"


@dataclass(frozen=True, eq=False)
class _Asker:
    """Code, or hooks, of ``module``; the ids of the modules inside it, and of those in its plain attributes."""

    module: nn.Module
    codes: Sequence[CodeType]
    kind: str
    inside: set[int]
    beside: set[int]

    @property
    def described(self) -> str:
        cls = type(self.module).__name__
        return f"the code of {cls}, which has no graph," if self.kind == "code" else f"a hook on {cls}"

    def name_of(self, name: str) -> str | None:
        """The name of a layer as the code knows it: a hook may have come by it in any way."""
        return name if self.kind == "code" else None


def _asker(module: nn.Module, codes: Sequence[CodeType], kind: str) -> _Asker:
    beside = {id(inner) for held in modules_beside(module) for inner in held.modules()}
    return _Asker(module, codes, kind, {id(inner) for inner in module.modules()} - {id(module)}, beside)


@dataclass(frozen=True)
class OtherUses:
    """Who holds, reads or may read the parameters of a model.

    ``owners``: id of a parameter -> the modules that hold it, with names. ``reads``: id of a parameter -> the nodes, of
    graphs that run, that read it as an attribute. ``running``: the modules whose own code runs, by id.
    ``askers``: code that may ask more of the layers that it comes by.
    """

    owners: dict[int, list[tuple[nn.Module, str]]]
    reads: dict[int, list[fx.Node]]
    running: dict[int, nn.Module]
    askers: list[_Asker]

    @staticmethod
    def of(model: nn.Module) -> OtherUses:
        graphs, code = running(model)
        askers = [_asker(module, code_of(module), "code") for module in code.values() if not is_opaque(module)]
        askers += [_asker(module, hook_code(module), "hook") for module in model.modules() if has_hooks(module)]
        askers = [asker for asker in askers if asker.inside or asker.beside]
        return OtherUses(parameter_owners(model), _reads(graphs), code, askers)

    def refusal(self, site: Site) -> Refusal | None:
        """Why the weight and bias of ``site`` are not its alone, or None where they are."""
        return self._tied(site) or self._read_by_graphs(site) or self._read_by_code(site) or self._asked_by_code(site)

    def _tied(self, site: Site) -> Refusal | None:
        for tensor in (site.weight, site.bias):
            held = self.owners.get(id(tensor), []) if tensor is not None else []
            others = [owner for owner in held if owner[0] is not site.module]
            if site.module is None and len(others) == 1 and id(others[0][0]) not in self.running:
                continue  # the module that a functional call takes its weight from, and whose own code does not run
            if others:
                names = ", ".join(sorted(f"{type(module).__name__}.{name}" for module, name in others))
                return Refusal(f"its weight or bias is tied to {names}, and would no longer be; untie it first")
        return None

    def _read_by_graphs(self, site: Site) -> Refusal | None:
        """Whether a graph reads the layer's weight or bias for anything but calling the layer."""
        own = {call.node for call in site.calls}
        for tensor in (site.weight, site.bias):
            nodes = self.reads.get(id(tensor), [])
            others = [user.name for node in nodes for user in node.users if user not in own]
            if others:
                return Refusal(f"its weight or bias is also read by {', '.join(others)}, which would lose it")
        return None

    def _read_by_code(self, site: Site) -> Refusal | None:
        """Whether code that has no graph speaks of an attribute with the name of a functional call's weight or bias.

        A layer that becomes an expansion still answers for its weight and bias; a parameter that is gone cannot.
        """
        if site.module is not None:
            return None
        names = {str(node.target).rpartition(".")[2] for call in site.calls for node in call.node.all_input_nodes[1:]}
        for module in self.running.values():
            if not is_opaque(module) and names & attributes_named(type(module)):
                reader = type(module).__name__
                return Refusal(f"its weight or bias may be read by the code of {reader}, which has no graph")
        return None

    def _asked_by_code(self, site: Site) -> Refusal | None:
        """Whether code that has no graph asks of the layer what an expansion would answer in another way."""
        layer = site.module
        if layer is None:
            return None
        name = site.path.rpartition(".")[2]
        for asker in self.askers:
            if id(layer) in asker.beside:
                found = question(asker.codes, layer, None)
            else:
                found = question(asker.codes, layer, asker.name_of(name)) if id(layer) in asker.inside else None
            if found is not None:
                return Refusal(f"{asker.described} {found}; {_SILENT}")
        return None


def parameter_read(gm: fx.GraphModule, node: object) -> nn.Parameter | None:
    """The parameter that ``node`` reads as an attribute of ``gm``; None for any other node or value."""
    if not (isinstance(node, fx.Node) and node.op == "get_attr"):
        return None
    value = operator.attrgetter(str(node.target))(gm)
    return value if isinstance(value, nn.Parameter) else None


def running(model: nn.Module) -> tuple[list[fx.GraphModule], dict[int, nn.Module]]:
    """The graph modules whose graphs run when ``model`` does, and by id the modules whose own code runs."""
    graphs: dict[int, fx.GraphModule] = {}
    running: dict[int, nn.Module] = {}
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if id(module) in graphs or id(module) in running:
            continue
        if isinstance(module, fx.GraphModule):
            graphs[id(module)] = module
            waiting += [submodule(module, str(n.target)) for n in module.graph.nodes if n.op == "call_module"]
        else:
            running[id(module)] = module
            waiting += module.children()
    return list(graphs.values()), running


def _reads(graphs: list[fx.GraphModule]) -> dict[int, list[fx.Node]]:
    """id of each parameter -> the nodes, of any graph that runs, that read it as an attribute."""
    reads: dict[int, list[fx.Node]] = {}
    for gm in graphs:
        for node in gm.graph.nodes:
            parameter = parameter_read(gm, node)
            if parameter is not None:
                reads.setdefault(id(parameter), []).append(node)
    return reads
