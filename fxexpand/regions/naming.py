"""Where merged layers go in a model: under the names of what they stand for."""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter

from torch import fx, nn

from fxexpand.graph.tree import submodule
from fxexpand.regions.reach import Reach
from fxexpand.regions.region import Stretch


class Places:
    """Finds places for the layers that replace nodes, and clears away what they stand for.

    ``merged`` are all nodes that are replaced, and the constants that they are computed with.

    What code without a graph may come by stays where it is; see ``Reach``, which is worked out where it is not given.
    """

    def __init__(self, model: nn.Module, merged: set[fx.Node], reach: Reach | None = None) -> None:
        self.model = model
        self._merged = merged
        self._reach = reach or Reach(model)
        self._graphs = self._reach.graphs
        self._callers = self._calls()
        self._taken: set[tuple[int, str]] = set()
        self._gone: list[tuple[fx.GraphModule, str, nn.Module]] = []
        self._read: dict[tuple[int, str], fx.GraphModule] = {}

    def put(self, gm: fx.GraphModule, path: str, layer: nn.Module, nodes: Iterable[fx.Node]) -> None:
        """Put ``layer`` at ``path`` in ``gm``, for ``nodes``."""
        for node in nodes:
            if node.op == "call_module":
                self._gone.append((gm, str(node.target), submodule(gm, str(node.target))))
            elif node.op == "get_attr":
                self._read[id(gm), str(node.target)] = gm
        owner, _, name = path.rpartition(".")
        parent = submodule(gm, owner)
        parent._parameters.pop(name, None)
        parent._modules[name] = layer

    def clean_up(self) -> None:
        """Take out the modules and parameters that merged layers stand for, where nothing uses them any more."""
        callers = self._calls()
        gone = {
            id(module)
            for gm, path, module in self._gone
            if id(module) not in callers and id(module) not in self._reach.modules and not self._reach.names(gm, path)
        }
        for (_, target), gm in self._read.items():  # modules of which only tensors were read, in functional calls
            path = target.rpartition(".")[0]
            if path and _exists(gm, path) and not self._reach.names(gm, path):
                owner = submodule(gm, path)
                if not (owner._modules or id(owner) in callers or id(owner) in self._reach.modules):
                    gone.add(id(owner))
        self._drop_names(gone)
        emptied = self._drop_modules(gone, callers)
        while emptied:
            emptied = self._drop_modules(emptied, callers)
        self._drop_parameters()

    def path(self, gm: fx.GraphModule, stretches: list[Stretch], main: fx.Node) -> str:
        """Where the layer for ``stretches``, all of the same modules, goes; ``main`` gives the name."""
        found = self._path(gm, {node for stretch in stretches for node in stretch.nodes}, stretches[0].last, main)
        self._taken.add((id(gm), found))
        return found

    def _path(self, gm: fx.GraphModule, nodes: set[fx.Node], last: fx.Node, main: fx.Node) -> str:
        if main.op == "call_module":
            path = str(main.target)
            free = self._is_free(gm, path, nodes)
            while free and "." in path and self._is_free(gm, path.rpartition(".")[0], nodes):
                path = path.rpartition(".")[0]
        else:
            reads = [str(read.target) for read in main.all_input_nodes if read.op == "get_attr"]
            free = bool(reads) and self._is_free_parameter(gm, reads[0])
            path = reads[0] if free else main.name
            free = free or not (_exists(gm, path) or (id(gm), path) in self._taken)
        if free:
            return path
        path = f"{path}_{last.name}"
        while _exists(gm, path) or (id(gm), path) in self._taken:
            path += "_"
        return path

    def _is_free(self, gm: fx.GraphModule, path: str, nodes: set[fx.Node]) -> bool:
        """Whether a layer may stand at ``path``: only ``nodes`` call what is there."""
        if (id(gm), path) in self._taken or self._reach.names(gm, path):
            return False
        for inner in submodule(gm, path).modules():
            callers = self._callers.get(id(inner), set())
            stateful = bool(inner._parameters or inner._buffers)
            if not callers <= nodes or (stateful and not callers) or id(inner) in self._reach.modules:
                return False
        return True

    def _is_free_parameter(self, gm: fx.GraphModule, path: str) -> bool:
        reads = [n for n in gm.graph.nodes if n.op == "get_attr" and str(n.target) == path]
        alone = all(set(read.users) <= self._merged for read in reads)
        owner = submodule(gm, path.rpartition(".")[0])
        return (
            alone
            and not self._is_called(owner)
            and (id(gm), path) not in self._taken
            and not self._reach.names(gm, path)
        )

    def _calls(self) -> dict[int, set[fx.Node]]:
        """id of a module -> the nodes that call it, or read a tensor that it holds."""
        callers: dict[int, set[fx.Node]] = {}
        for gm in self._graphs:
            for node in gm.graph.nodes:
                if node.op in ("call_module", "get_attr"):
                    path = str(node.target) if node.op == "call_module" else str(node.target).rpartition(".")[0]
                    callers.setdefault(id(submodule(gm, path)), set()).add(node)
        return callers

    def _is_called(self, module: nn.Module) -> bool:
        return any(node.op == "call_module" for node in self._callers.get(id(module), ()))

    def _drop_names(self, gone: set[int]) -> None:
        """Take away the names under which nothing calls a module any more that is called under another."""
        called = {(id(gm), str(n.target)) for gm in self._graphs for n in gm.graph.nodes if n.op == "call_module"}
        for gm, path, module in self._gone:
            owner, _, name = path.rpartition(".")
            kept = id(module) in gone or id(module) in self._reach.modules or self._reach.names(gm, path)
            if not kept and (id(gm), path) not in called and _exists(gm, path) and submodule(gm, path) is module:
                names = [inner for inner, held in gm.named_modules(remove_duplicate=False) if held is module]
                if len(names) > 1:
                    del submodule(gm, owner)._modules[name]

    def _drop_modules(self, gone: set[int], callers: dict[int, set[fx.Node]]) -> set[int]:
        """Take out the modules ``gone``; the containers that are empty now."""
        emptied: set[int] = set()
        for module in list(self.model.modules()):
            for name, child in list(module._modules.items()):
                if id(child) in gone:
                    del module._modules[name]
                    state = module._modules or module._parameters or module._buffers
                    if not (
                        state or id(module) in callers or id(module) in self._reach.modules or module is self.model
                    ):
                        emptied.add(id(module))
        return {found for found in emptied if found not in {id(gm) for gm in self._graphs}}

    def _drop_parameters(self) -> None:
        read = {id(attrgetter(str(n.target))(gm)) for gm in self._graphs for n in gm.graph.nodes if n.op == "get_attr"}
        for (_, target), gm in self._read.items():
            path, _, name = target.rpartition(".")
            if not _exists(gm, path) or self._reach.names(gm, target):
                continue
            owner = submodule(gm, path)
            if not self._is_called(owner) and id(owner) not in self._reach.modules:
                for held in (owner._parameters, owner._buffers):
                    if name in held and id(held[name]) not in read:
                        del held[name]


def _exists(gm: fx.GraphModule, path: str) -> bool:
    try:
        attrgetter(path)(gm) if path else gm
    except AttributeError:
        return False
    return True
