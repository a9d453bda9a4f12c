"""explain: what fuse merges, and why it leaves the rest alone."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx, nn

from fxexpand.graph.layers import is_layer
from fxexpand.graph.uses import running
from fxexpand.passes.fuse import plan_all, prepared
from fxexpand.regions.explanation import Explanation, Merged, Refused
from fxexpand.regions.install import MERGED, label, paths_of
from fxexpand.regions.plan import Plan
from fxexpand.regions.reading import Lifts, Reading
from fxexpand.regions.shapes import shapes_of


def explain(
    model: nn.Module, *example_inputs: object, when: str = "cheaper", lifts: Lifts | None = None
) -> Explanation:
    """What ``fuse`` with the same arguments merges in ``model``, and what it has merged already; the model stays.

    ``.merged`` has an entry for each new layer, ``.refused`` one for each linear node that is left alone, with the
    reason. ``str()`` is a table.

    Raises ``FxExpandError`` as ``fuse`` does.
    """
    work = prepared(model, "explain", when, lifts)
    prefixes = {id(module): path for path, module in work.named_modules()}
    merged: list[Merged] = []
    refused: list[Refused] = []
    plans = plan_all(work, shapes_of(work, example_inputs, "explain"), when, lifts)
    paths = paths_of(work, [(reading, plan.merges) for reading, plan in plans])
    for reading, plan in plans:
        prefix = prefixes[id(reading.gm)]
        merged += _merged(reading, plan, prefix, paths)
        refused += _refused(reading, plan, prefix)
    return Explanation(tuple(merged), (*refused, *_without_graph(work)))


def _without_graph(work: nn.Module) -> list[Refused]:
    """The layers that code which has no graph calls."""
    graphs, code = running(work)
    called = {id(gm.get_submodule(str(n.target))) for gm in graphs for n in gm.graph.nodes if n.op == "call_module"}
    found: list[Refused] = []
    for path, module in work.named_modules():
        if id(module) in code and id(module) not in called and is_layer(module):
            parent = type(work.get_submodule(path.rpartition(".")[0])).__name__
            reason = (
                f"no graph can stand for the code of {parent} that calls it: control flow that depends on data, "
                "self.training read in training mode, state, hooks, or code of torch itself"
            )
            found.append(Refused((path,), reason, type(module).__name__))
    return found


def _merged(reading: Reading, plan: Plan, prefix: str, paths: Mapping[fx.Node, str]) -> list[Merged]:
    found: dict[fx.Node, Merged] = {}
    for node in reading.gm.graph.nodes:
        if MERGED in node.meta:
            names = tuple(_join(prefix, name) for name in node.meta[MERGED])
            found[node] = Merged(_join(prefix, label(node)), names)
    for merge in plan.merges:
        names = tuple(_join(prefix, label(node)) for node in merge.stretch.nodes)
        path = _join(prefix, paths[merge.stretch.last])
        found[merge.stretch.last] = Merged(path, names, (merge.before.macs, merge.cost.macs))
    return [found[node] for node in reading.gm.graph.nodes if node in found]


def _refused(reading: Reading, plan: Plan, prefix: str) -> list[Refused]:
    return [
        Refused((_join(prefix, label(node)),), plan.refused[node], _kind(reading.gm, node))
        for node in reading.gm.graph.nodes
        if node in plan.refused and MERGED not in node.meta
    ]


def _kind(gm: fx.GraphModule, node: fx.Node) -> str:
    return type(gm.get_submodule(str(node.target))).__name__ if node.op == "call_module" else ""


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
