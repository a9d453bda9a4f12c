"""Any model -> GraphModules, as large as they can be."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from fxexpand.errors import ExpansionError
from fxexpand.graph.expanded import Expanded
from fxexpand.graph.layers import has_hooks, is_layer, is_opaque
from fxexpand.graph.traced import TracedModule, copy_model
from fxexpand.graph.tree import replace_modules

# Attributes of every module that say nothing about the state it keeps for itself.
_MODULE_STATE = frozenset(vars(nn.Module()))

# What FX calls the tensors that it finds in the code; it hangs them on the root.
_CONSTANT = "_tensor_constant"

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
    control flow depends on data, that read ``self.training``, that keep state of their own, or that have hooks. They
    are traced for themselves; where that is impossible, their largest traceable submodules are. So a model whose root
    cannot be traced comes back as a copy of itself that holds GraphModules.

    Raises ``ExpansionError`` for what is no module, or is compiled, scripted or wrapped for data-parallel training.
    """
    check_model(model, "trace")
    return open_up(copy_model(model, share=True), tuple(leaves))


def check_model(model: object, task: str) -> None:
    """Raise ``ExpansionError`` unless ``model`` is a module that graph passes can work on."""
    if not isinstance(model, nn.Module):
        found = type(model).__name__
        raise ExpansionError(f"{task}: expected a torch.nn.Module, found {found}. Pass the model itself.")
    for base in type(model).__mro__:
        if base.__name__ in _WRAPPERS and base.__module__.startswith("torch."):
            raise ExpansionError(f"{task}: expected a plain torch.nn.Module, found {_WRAPPERS[base.__name__]}.")


def open_up(
    model: nn.Module, leaves: tuple[type[nn.Module], ...], opened: dict[int, nn.Module] | None = None
) -> nn.Module:
    """``model`` with everything traced that can be; works on ``model`` itself. ``opened`` keeps shared ones shared."""
    opened = {} if opened is None else opened
    if id(model) not in opened:
        opened[id(model)] = model  # a module that holds itself ends here
        opened[id(model)] = _open(model, leaves, opened)
    return opened[id(model)]


def _open(model: nn.Module, leaves: tuple[type[nn.Module], ...], opened: dict[int, nn.Module]) -> nn.Module:
    if isinstance(model, (fx.GraphModule, Expanded, *leaves)) or is_layer(model) or is_opaque(model):
        return model
    graph = _graph_of(model, leaves)
    if graph is None:
        for name, child in list(model._modules.items()):
            if child is not None:
                model._modules[name] = open_up(child, leaves, opened)
        return model
    traced = TracedModule.adopt(model, graph, leaves)
    for target in {str(node.target): None for node in graph.nodes if node.op == "call_module"}:
        kept = traced.get_submodule(target)
        replace_modules(traced, {id(kept): open_up(kept, leaves, opened)})
    return traced


def _graph_of(model: nn.Module, leaves: tuple[type[nn.Module], ...]) -> fx.Graph | None:
    """The graph of ``model``, or None where no graph can stand for it.

    Each attempt runs on a scratch copy, because a failed one can leave proxies in the attributes of modules. What a
    graph cannot stand for stays a node, one more at each attempt.
    """
    if "forward" in vars(model):
        return None
    kept = {path for path, module in model.named_modules() if path and (has_hooks(module) or "forward" in vars(module))}
    while True:
        scratch = copy_model(model, share=True)
        tracer = LayerTracer(leaves, kept)
        try:
            graph = tracer.trace(scratch)
        except Exception:  # noqa: BLE001 -- any code of the user's can run here, and raise anything
            culprits = {tracer.innermost}
        else:
            culprits = set(_stateful(model, scratch))
        if "" in culprits:
            return None
        if culprits:
            kept |= culprits
            continue
        if not _same_without_optional_arguments(model, graph, leaves, kept):
            return None
        for name, value in vars(scratch).items():
            if name.startswith(_CONSTANT):
                setattr(model, name, value)
        return graph


class LayerTracer(fx.Tracer):
    """Traces down to layers, and remembers where it was when it failed.

    Fails where FX would quietly take a value of the moment for a constant: ``self.training``, a random draw, a buffer.
    """

    proxy_buffer_attributes = True

    def __init__(
        self, leaves: tuple[type[nn.Module], ...] = (), kept: Iterable[str] = (), omitted: Iterable[str] = ()
    ) -> None:
        super().__init__()
        self.leaves = leaves
        self.kept = frozenset(kept)
        self.omitted = frozenset(omitted)
        self.innermost = ""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        named = module_qualified_name in self.kept or isinstance(m, self.leaves)
        return named or is_layer(m) or is_opaque(m) or super().is_leaf_module(m, module_qualified_name)

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        with _watching_training(), _no_random_draws():
            return super().trace(root, concrete_args)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: dict[str, Any] | tuple[Any, ...] | None = None
    ) -> tuple[Any, list[Any]]:
        fn, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        return fn, [None if isinstance(a, fx.Proxy) and a.node.target in self.omitted else a for a in args]

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        path = self.path_of_module(m)
        try:
            with _no_random_draws():
                return super().call_module(m, forward, args, kwargs)
        except Exception:
            # The first handler that an exception passes belongs to the innermost module.
            self.innermost = self.innermost or path
            raise

    def create_arg(self, a: Any) -> Any:
        if type(a) is OrderedDict:  # FX would make a plain dict of it
            items = [(key, super(LayerTracer, self).create_arg(value)) for key, value in a.items()]
            return self.create_node("call_function", OrderedDict, (items,), {})
        return super().create_arg(a)


class _UntraceableError(Exception):
    """A module does something whose outcome a graph would freeze."""


@contextmanager
def _watching_training() -> Iterator[None]:
    """Make every read of ``module.training`` raise, as FX itself replaces ``Module.__call__`` while it traces."""

    def read(module: nn.Module) -> bool:
        raise _UntraceableError(f"{type(module).__name__} reads self.training")

    def write(module: nn.Module, value: bool) -> None:
        vars(module)["training"] = value

    watched: Any = nn.Module
    watched.training = property(read, write)
    try:
        yield
    finally:
        del watched.training


@contextmanager
def _no_random_draws() -> Iterator[None]:
    """Raise when the code inside has drawn random numbers: they would be the same at every call of the graph."""
    before = torch.get_rng_state()
    yield
    if not torch.equal(before, torch.get_rng_state()):
        raise _UntraceableError("it draws random numbers")


def _stateful(model: nn.Module, scratch: nn.Module) -> Iterator[str]:
    """The paths of modules that running ``scratch`` left in another state than ``model``: a graph would not do that."""
    for (path, before), after in zip(model.named_modules(), scratch.modules(), strict=True):
        ours = {k: v for k, v in vars(before).items() if k not in _MODULE_STATE}
        theirs = {k: v for k, v in vars(after).items() if k not in _MODULE_STATE and not k.startswith(_CONSTANT)}
        if ours.keys() != theirs.keys() or any(_changed(ours[k], theirs[k]) for k in ours):
            yield path


def _changed(before: object, after: object) -> bool:
    if isinstance(after, (list, tuple)):
        if not isinstance(before, (list, tuple)) or len(before) != len(after):
            return True
        return any(map(_changed, before, after))
    if isinstance(after, dict):
        if not isinstance(before, dict) or before.keys() != after.keys():
            return True
        return any(_changed(before[k], after[k]) for k in after)
    if isinstance(after, (bool, int, float, str, type(None))):
        return repr(before) != repr(after)  # so that NaN is unchanged, and True is not 1
    return isinstance(after, fx.Proxy)


def _same_without_optional_arguments(
    model: nn.Module, graph: fx.Graph, leaves: tuple[type[nn.Module], ...], kept: Iterable[str]
) -> bool:
    """Whether ``graph`` holds for calls that leave out the arguments whose default is None.

    Code cannot be seen asking whether a proxy ``is None``; so the graph with None in their place must be the same.
    """
    parameters = inspect.signature(type(model).forward).parameters
    optional = [name for name, parameter in parameters.items() if parameter.default is None]
    if not optional:
        return True
    try:
        without = LayerTracer(leaves, kept, optional).trace(copy_model(model, share=True))
    except Exception:  # noqa: BLE001 -- as above
        return False
    return _steps(graph) == _steps(without)


def _steps(graph: fx.Graph) -> list[str]:
    return [f"{node.name} {node.op} {node.target} {node.args} {node.kwargs}" for node in graph.nodes]
