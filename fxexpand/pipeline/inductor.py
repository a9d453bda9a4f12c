"""A pass in the hook of Inductor that sees the graph before autograd.

Not imported with the library: ``torch._inductor`` takes as long to import as the rest of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from fxexpand.errors import FxExpandError
from fxexpand.pipeline.keys import key_of
from fxexpand.pipeline.pass_managers import CollapsePass, LibraryPass

# What is to stand in the place of a graph module, over the same parameters; None where it is to stay.
Rewrite: TypeAlias = "Callable[[fx.GraphModule], fx.GraphModule | None]"


class InductorPass(CustomGraphPass):
    """``rewrite`` for ``torch._inductor.config.pre_grad_custom_pass``, whose graph autograd has not seen yet.

        torch.compile(model, options={"pre_grad_custom_pass": InductorPass(rewrite)})

    In the graphs of ``torch.compile`` parameters are inputs, and no guard watches their values: a rewrite may compute
    with them in the graph, and must never take a value from one. ``rewrite`` is therefore a ``CollapsePass``, or a
    function that gives a graph module with the same inputs, parameters and buffers, or None for no change.

    A ``CollapsePass`` composes what are modules and attributes of the graph module, as in ``compile_fx(graph_module,
    inputs)``. Layers of which ``torch.compile`` has made functions of its inputs it leaves as they are.

    ``uuid()`` is that of the pass; a function of the library has one, too. None, for any other function, makes Inductor
    (2.15) run the rewrite before it looks into its caches, which then hold the graph that was made.

    Raises ``FxExpandError`` for a pass that would freeze or replace parameters: use these on the model, before
    ``torch.compile``; and when it runs, for a rewrite that changes inputs, parameters or buffers.
    """

    def __init__(self, rewrite: CollapsePass | Rewrite) -> None:
        if isinstance(rewrite, LibraryPass) and not isinstance(rewrite, CollapsePass):
            raise FxExpandError(
                "InductorPass: expected a CollapsePass, or a function of a graph module, found "
                f"{type(rewrite).__name__}, which replaces parameters: inside a compiled graph these are inputs, whose "
                "values may change. Run it on the model, and compile the result."
            )
        if not callable(rewrite):
            raise FxExpandError(f"InductorPass: expected a CollapsePass, or a function, found {rewrite!r:.60}.")
        if isinstance(rewrite, CollapsePass) and rewrite.example_inputs:
            raise FxExpandError(
                "InductorPass: expected a CollapsePass without example inputs, found some: those of a compiled graph "
                "are others than the model's. Use CollapsePass()."
            )
        self.rewrite = rewrite

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite ``graph``, and the graph module that owns it, in place."""
        gm = graph.owning_module
        if gm is None:
            raise FxExpandError("InductorPass: expected the graph of one graph module, found one that none owns.")
        found = self._rewritten(gm)
        if found is not None and found is not gm:
            _check_is_over_the_same(gm, found)
            _become(graph, gm, found)

    def uuid(self) -> str | None:
        """What Inductor's caches know the pass by, the same in every process; None where there is no such key."""
        if isinstance(self.rewrite, CollapsePass):
            inner = self.rewrite.uuid()
            return inner and key_of(type(self), inner)
        return key_of(type(self), self.rewrite)

    def _rewritten(self, gm: fx.GraphModule) -> fx.GraphModule | None:
        found: object
        if isinstance(self.rewrite, CollapsePass):
            result = self.rewrite(gm)
            found = result.graph_module if result is not None and result.modified else None
        else:
            found = self.rewrite(gm)
        if not (found is None or isinstance(found, fx.GraphModule)):
            raise FxExpandError(
                f"InductorPass: expected of {self.rewrite!r} a torch.fx.GraphModule or None, found {found!r:.60}."
            )
        return found


def _check_is_over_the_same(gm: fx.GraphModule, found: fx.GraphModule) -> None:
    """Raise ``FxExpandError`` if ``found`` has other inputs, parameters or buffers: torch has listed these already."""
    for what, before, after in (
        ("inputs", [str(node.target) for node in _inputs(gm.graph)], [str(n.target) for n in _inputs(found.graph)]),
        ("parameters", [*dict(gm.named_parameters())], [*dict(found.named_parameters())]),
        ("buffers", [*dict(gm.named_buffers())], [*dict(found.named_buffers())]),
    ):
        if sorted(before) != sorted(after):
            differences = ", ".join(sorted(set(before) ^ set(after)))
            raise FxExpandError(
                f"InductorPass: expected a graph module with the same {what}, found others: {differences}. Compute "
                "with what the graph has, or rewrite the model before torch.compile."
            )


def _become(graph: fx.Graph, gm: fx.GraphModule, found: fx.GraphModule) -> None:
    """Make ``graph``, which is that of ``gm``, compute what ``found`` does. Its inputs stay the nodes that they are."""
    for node in reversed(list(graph.nodes)):
        if node.op != "placeholder":
            graph.erase_node(node)
    by_target = {node.target: node for node in _inputs(graph)}
    known = {node: by_target[node.target] for node in _inputs(found.graph)}
    held = vars(found)
    read = [str(node.target) for node in found.graph.nodes if node.op in ("call_module", "get_attr")]
    # Also plain attributes: a region of a container is no child of it.
    names = {"_parameters", "_buffers", "_modules", *(target.partition(".")[0] for target in read)} & held.keys()
    vars(gm).update({name: held[name] for name in names})
    (old,) = (node for node in found.graph.nodes if node.op == "output")
    new = graph.output(graph.graph_copy(found.graph, known))
    new.meta = dict(old.meta)
    graph.lint()
    gm.recompile()


def _inputs(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]
