"""Any model -> GraphModules, as large as they can be."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from types import FunctionType
from typing import Any

from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from fxexpand.errors import ExpansionError, FxExpandError
from fxexpand.graph.expanded import Expanded
from fxexpand.graph.layers import has_hooks, is_layer, is_opaque
from fxexpand.graph.outside import reaches_outside
from fxexpand.graph.sharded import check_whole
from fxexpand.graph.state import changed_modules, hide, volatile_attributes
from fxexpand.graph.traced import TracedModule, copy_model
from fxexpand.graph.tracer import LayerTracer
from fxexpand.graph.tree import submodule

_WRAPPERS = {
    "OptimizedModule": "a compiled model. Pass the one that was compiled (model._orig_mod), and compile afterwards",
    "ScriptModule": "a scripted model, which has no Python code to trace. Pass the model that was scripted",
    "DistributedDataParallel": "a model wrapped for distributed training. Pass model.module, and wrap afterwards",
    "DataParallel": "a model wrapped for data-parallel training. Pass model.module, and wrap afterwards",
}


def trace(model: nn.Module, *, leaves: Iterable[type[nn.Module]] = ()) -> nn.Module:
    """A ``GraphModule`` over the same parameters; ``model`` stays as it is.

    Before:  y = model(x)
    After:   y = trace(model)(x), with every step of the computation a node

    Layers (``ConvNd``, ``Linear``, ``BatchNormNd`` and their subclasses that keep ``forward``), modules of torch itself
    and instances of ``leaves`` stay ``call_module`` nodes. So do modules that a graph cannot stand for: those whose
    control flow depends on data, that read ``self.training``, that keep state of their own, in them or outside of them,
    or that have hooks. They are traced for themselves; where that is impossible, their largest traceable submodules
    are. So a model whose root cannot be traced comes back as a copy of itself that holds GraphModules. Annotate
    functions of ``fx.wrap`` with ``-> Tensor``: what calls them might otherwise ask whether they returned None, and is
    kept.

    While it traces, FX and this function replace methods of ``nn.Module`` for all threads: run no model in another one.

    Raises ``ExpansionError`` for what is no module, or is compiled, scripted, or wrapped or sharded for data-parallel
    training.
    """
    check_model(model, "trace")
    return open_up(copy_model(model, share=True), Limits(tuple(leaves)))


def check_model(
    model: object, task: str, error: type[FxExpandError] = ExpansionError, *, sharded: bool = False
) -> None:
    """Raise ``error`` unless ``model`` is a module that graph passes can work on.

    ``sharded``: its parameters may be spread over several processes, for those that only look at modules.
    """
    if isinstance(model, ExportedProgram):
        raise error(
            f"{task}: expected a torch.nn.Module, found an exported program, which has no modules. "
            f"Call {task} before torch.export.export; fuse and explain alone take exported programs."
        )
    if not isinstance(model, nn.Module):
        found = type(model).__name__
        raise error(f"{task}: expected a torch.nn.Module, found {found}. Pass the model itself.")
    for base in type(model).__mro__:
        if base.__name__ in _WRAPPERS and base.__module__.startswith("torch."):
            raise error(f"{task}: expected a plain torch.nn.Module, found {_WRAPPERS[base.__name__]}.")
    if not sharded:
        check_whole(model, task, error)


@dataclass(frozen=True)
class Limits:
    """What graphs are not to go into: instances of ``leaves``; and whether modules in eval mode are to stay in it.

    ``compiled`` says whether graphs are to run as they are; without it, see ``TracedModule.adopt``.
    """

    leaves: tuple[type[nn.Module], ...] = ()
    evaluated: bool = False
    compiled: bool = True


def open_up(model: nn.Module, limits: Limits, opened: dict[int, nn.Module] | None = None) -> nn.Module:
    """``model`` with everything traced that can be; works on ``model`` itself. ``opened`` keeps shared ones shared."""
    opened = {} if opened is None else opened
    if id(model) not in opened:
        opened[id(model)] = model  # a module that holds itself ends here
        opened[id(model)] = _open(model, limits, opened)
    return opened[id(model)]


def _open(model: nn.Module, limits: Limits, opened: dict[int, nn.Module]) -> nn.Module:
    if isinstance(model, (fx.GraphModule, Expanded, *limits.leaves)) or is_layer(model) or is_opaque(model):
        return model
    graph = _graph_of(model, limits)
    if graph is None or not _adopted(model, graph, limits):
        inner: list[nn.Module | None] = list(model._modules.values())
    else:
        targets = {str(node.target): None for node in graph.nodes if node.op == "call_module"}
        inner = [submodule(model, target) for target in targets]
    for module in inner:
        if module is not None:
            open_up(module, limits, opened)
    return model


def _adopted(model: nn.Module, graph: fx.Graph, limits: Limits) -> bool:
    """Whether ``graph`` is the forward of ``model`` now: not every graph can be written as code."""
    try:
        TracedModule.adopt(model, graph, limits.leaves, compiled=limits.compiled)
    except Exception:  # noqa: BLE001 -- FX raises what comes up where it writes, and Python where it reads that
        return False
    return True


def _graph_of(model: nn.Module, limits: Limits) -> fx.Graph | None:
    """The graph of ``model``, or None where no graph can stand for it.

    Each attempt runs on a scratch copy, because a failed one can leave proxies in the attributes of modules. What a
    graph cannot stand for stays a node at the next attempt.
    """
    if not _can_be_called_as_a_graph(model):
        return None
    kept = {path for path, module in model.named_modules() if path and (has_hooks(module) or "forward" in vars(module))}
    while True:
        graph, culprits = _attempt(model, limits, kept)
        if graph is not None and not culprits:
            culprits = _other_at_a_second_call(model, graph, limits, kept)
        if graph is not None and not culprits:
            return graph if _holds_for_other_values(model, graph, limits, kept) else None
        if "" in culprits or culprits <= kept:  # who changes a module that is only called? Its parents do
            return None
        kept |= culprits


def _other_at_a_second_call(model: nn.Module, graph: fx.Graph, limits: Limits, kept: set[str]) -> set[str]:
    """The paths of modules that may have frozen something outside of the model: a counter, or the time."""
    called = ((path, module) for path, module in model.named_modules() if path not in kept)
    suspects = {path for path, module in called if reaches_outside(module)}
    if not suspects:
        return set()
    again, culprits = _attempt(model, limits, kept)
    if again is not None and not culprits and _steps(again, {}) == _steps(graph, {}):
        return set()
    return culprits or suspects


def _attempt(
    model: nn.Module,
    limits: Limits,
    kept: Iterable[str],
    given: Mapping[str, object] | None = None,
    *,
    blames: bool = False,
) -> tuple[fx.Graph | None, set[str]]:
    """The graph of ``model``, if there is one, and the paths of modules that it does not stand for."""
    scratch = copy_model(model, share=True)
    tracer = LayerTracer(limits.leaves, kept, given, evaluated=limits.evaluated, blames=blames)
    for path, names in volatile_attributes(model, kept).items():
        hide(scratch.get_submodule(path), names, tracer.refuse)
    try:
        graph = tracer.trace(scratch)
        if given is not None:
            fx.GraphModule(scratch, graph)  # a call that cannot be written as code; without values, adopt sees to it
    except Exception:  # noqa: BLE001 -- any code of the user's can run here, and raise anything
        if tracer.drew and not blames:
            return _attempt(model, limits, kept, given, blames=True)
        return None, tracer.failed or {""}
    return graph, changed_modules(model, scratch)


def _can_be_called_as_a_graph(model: nn.Module) -> bool:
    """Whether a graph module can take the arguments that ``model`` takes, and have the attributes that it has."""
    forward = inspect.getattr_static(type(model), "forward")
    if not isinstance(forward, FunctionType) or "forward" in vars(model) or not TracedModule.can_be(model):
        return False
    kinds = {parameter.kind for parameter in inspect.signature(forward).parameters.values()}
    # In code of FX every argument is positional.
    return not {inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_POSITIONAL} <= kinds


def _holds_for_other_values(model: nn.Module, graph: fx.Graph, limits: Limits, kept: Iterable[str]) -> bool:
    """Whether ``graph`` also holds for calls in which arguments, or what nodes return, are None, True or False.

    Code cannot be seen asking whether a proxy ``is None``. So the graphs with these values in place of the nodes
    must be the graph with the nodes.
    """
    wrapped = [node.target for node in graph.nodes if "is_wrapped" in node.meta]
    if not all(_returns_a_tensor(function) for function in wrapped if isinstance(function, FunctionType)):
        return False  # it belongs to the caller, who may get None; its call cannot be replaced by a value
    parameters = list(inspect.signature(type(model).forward).parameters.values())[1:]
    possible = ((dict[str, object]({node.name: None}), False) for node in graph.nodes if _may_be_none(model, node))
    for given, certain in chain(_other_arguments(parameters), possible):
        other, culprits = _attempt(model, limits, kept, given)
        if other is None and not certain:
            continue  # the model itself does not take these values
        if other is None or culprits or _steps(graph, given) != _steps(other, given):
            return False
    return True


def _may_be_none(model: nn.Module, node: fx.Node) -> bool:
    """Whether what ``node`` stands for comes from a module that is not torch's, or is a part of such or an argument."""
    if node.op == "call_module":
        module = submodule(model, str(node.target))
        return not is_layer(module) and not is_opaque(module) and not _returns_a_tensor(module.forward)
    if node.op == "call_function" and node.target in (operator.getitem, getattr):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        indexed = node.target is getattr or isinstance(node.args[1], (int, str))
        return indexed and (source.op == "placeholder" or _may_be_none(model, source))
    return node.op == "call_method" and node.target in ("get", "pop")


def _returns_a_tensor(function: Callable[..., object]) -> bool:
    """Whether the annotation of ``function`` says so."""
    return inspect.signature(function).return_annotation in (Tensor, "Tensor", "torch.Tensor")


def _other_arguments(parameters: list[inspect.Parameter]) -> Iterator[tuple[dict[str, object], bool]]:
    """Arguments to try, and whether the model surely takes them."""
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    for p in named:
        if isinstance(p.default, bool):
            yield {p.name: True}, True
            yield {p.name: False}, True
    optional = [p.name for p in named if p.default is None]
    all_but_one = ([other for other in optional if other != name] for name in optional)
    for omitted in dict.fromkeys(map(tuple, [optional, *([name] for name in optional), *all_but_one])):
        if omitted:
            yield dict.fromkeys(omitted), True
    for i, p in enumerate(named):
        if p.default is p.empty and (i > 0 or _is_optional(p)):
            yield {p.name: None}, False


def _is_optional(parameter: inspect.Parameter) -> bool:
    return any(word in str(parameter.annotation) for word in ("None", "Optional"))


def _steps(graph: fx.Graph, given: Mapping[str, object]) -> list[str]:
    """The steps of ``graph`` with values in place of the nodes that are ``given``."""

    def value(node: fx.Node) -> Any:
        return given.get(node.name, node)

    steps = []
    for node in graph.nodes:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
        steps.append(f"{node.name} {node.op} {node.target} {args} {kwargs}")
    return steps
