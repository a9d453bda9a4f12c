"""explain: what fuse merges, why it leaves the rest alone, and what collapse does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import fx, nn
from torch.export import ExportedProgram

from fxexpand.algebra.refusal import Refusal
from fxexpand.exported.merged import call_of, layer_of_calls
from fxexpand.exported.opened import Opened
from fxexpand.graph.expanded import Expanded
from fxexpand.graph.layers import is_layer
from fxexpand.graph.uses import running
from fxexpand.passes.collapse import opened, plan_training
from fxexpand.passes.fuse import opened_program, plan_all, prepared
from fxexpand.regions.explanation import Explanation, Merged, Refused, Trained
from fxexpand.regions.install import MERGED, label, paths_of
from fxexpand.regions.plan import Plan
from fxexpand.regions.reading import Lifts, Reading
from fxexpand.regions.shapes import shapes_of
from fxexpand.regions.training import LivePlan, StepCosts


def explain(
    model: nn.Module | ExportedProgram,
    *example_inputs: object,
    when: str = "cheaper",
    lifts: Lifts | None = None,
) -> Explanation:
    """What ``fuse`` with the same arguments merges in ``model``, and has merged already, and what ``collapse`` does.

    ``.merged`` has an entry for each new layer, ``.refused`` one for each linear node that is left alone, with the
    reason. ``.trained`` has an entry for each expansion, and in training mode for each region written by hand, that
    ``collapse`` with the same inputs can run as one layer: both costs, where inputs are given. ``str()`` is a table.

    Of an exported program, nodes are the names of its calls, and a new layer has the path of the one with the largest
    weight; no program is trained.

    Raises ``FxExpandError`` as ``fuse`` does.
    """
    if isinstance(model, ExportedProgram):
        return _explain_program(opened_program(model, "explain", example_inputs, when, lifts), when)
    work = prepared(model, "explain", when, lifts, runs=bool(example_inputs))
    prefixes = {id(module): path for path, module in work.named_modules()}
    merged: list[Merged] = []
    refused: list[Refused] = []
    plans = plan_all(work, shapes_of(work, example_inputs, "explain"), when, lifts)
    paths = paths_of(work, [(reading, plan.merges) for reading, plan in plans])
    for reading, plan in plans:
        prefix = prefixes[id(reading.gm)]
        merged += _merged(reading, plan, prefix, paths)
        refused += _refused(reading, plan, prefix)
    return Explanation(tuple(merged), (*refused, *_without_graph(work)), tuple(_trained(model, example_inputs, lifts)))


def _explain_program(opened: Opened, when: str) -> Explanation:
    merged: list[Merged] = []
    refused: list[Refused] = []
    for reading, plan in plan_all(opened.work, opened.shapes, when, None):
        for merge in sorted(plan.merges, key=lambda merge: reading.effects.order[merge.stretch.last]):
            path, calls = layer_of_calls(opened, merge.stretch.nodes)
            merged.append(Merged(path, calls, (merge.before.macs, merge.cost.macs)))
        left = sorted(plan.refused, key=reading.effects.order.__getitem__)
        refused += [Refused((call_of(opened, node).name,), plan.refused[node]) for node in left]
    return Explanation(tuple(merged), tuple(refused))


def _trained(model: nn.Module, example_inputs: tuple[object, ...], lifts: Lifts | None) -> Iterator[Trained]:
    """What ``collapse`` does; for a model in eval mode without expansions that is nobody's question."""
    if not model.training and not any(isinstance(module, Expanded) for module in model.modules()):
        return
    work = opened(model, lifts)
    expansions, regions = plan_training(work, shapes_of(work, example_inputs, "explain"), lifts)
    for entry in expansions:
        reason = str(entry.plan) if isinstance(entry.plan, Refusal) else ""
        yield Trained(entry.path, (), _totals(entry.costs), reason)
    prefixes = {id(module): path for path, module in work.named_modules()}
    for region in regions if model.training else ():
        prefix = prefixes[id(region.gm)]
        names = tuple(_join(prefix, label(node)) for node in region.nodes)
        if isinstance(region, LivePlan):
            yield Trained(names[-1], names, _totals(region.costs), str(region.refusal or ""))
        else:
            yield Trained(names[-1], names, None, region.reason.reason)


def _totals(costs: StepCosts | None) -> tuple[int, int] | None:
    return None if costs is None else (costs.explicit.total, costs.collapsed.total)


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
