"""A GraphModule that keeps everything of the model it stands for."""

from __future__ import annotations

import copy
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.graph_module import reduce_graph_module

from fxexpand.errors import ExpansionError
from fxexpand.graph.copying import ATOMS, deep_copy
from fxexpand.graph.plain import surely_has_code
from fxexpand.graph.sharded import never_gathered
from fxexpand.graph.tracer import ReplayTracer


class TracedModule(fx.GraphModule):
    """A ``GraphModule`` that keeps the whole of its model, not only what its graph refers to.

    All ``state_dict`` keys (unused layers, buffers that are not persistent, layers under two names), plain attributes,
    hooks, containers and methods stay; also through ``copy.deepcopy`` and ``pickle``. It is an instance of the model's
    class too, so that a parent which cannot be traced may call its other methods.

    ``traced_leaves`` are the classes that were to stay one node each, ``traced_class`` is the model's own class.
    """

    if TYPE_CHECKING:  # TorchScript reads the annotations of classes, and knows no such types
        traced_leaves: tuple[type[nn.Module], ...]
        traced_class: type[nn.Module]

    @staticmethod
    def adopt(
        model: nn.Module, graph: fx.Graph, leaves: tuple[type[nn.Module], ...] = (), *, compiled: bool = True
    ) -> None:
        """Make ``graph`` the forward of ``model``, which stays the same object: hooks and others may refer to it.

        Without ``compiled``, a graph that can surely be written as code is not written yet: until ``recompile``, or
        ``compile_all`` at the latest, calls run the forward that ``model`` had.

        Raises what FX raises where a graph cannot be written as code; then ``model`` is as it was.
        """
        plain = vars(fx.GraphModule(nn.Module(), fx.Graph()))
        ours = {name: value for name, value in plain.items() if name not in vars(nn.Module())}
        state = {**_state(model), **ours, "traced_leaves": leaves, "_tracer_cls": ReplayTracer, "_graph": graph}
        traced = _blank(type(model))
        if compiled or not surely_has_code(graph):
            traced._fill(state)
        else:
            vars(traced).update(state)
        model.__class__ = type(traced)
        vars(model).clear()
        vars(model).update(vars(traced))
        graph.owning_module = cast(TracedModule, model)

    @staticmethod
    def compile_all(model: nn.Module) -> None:
        """Compile the graphs in ``model`` that never were since they were adopted."""
        for module in model.modules():
            if isinstance(module, TracedModule) and "forward" not in vars(type(module)):
                module.recompile()

    @staticmethod
    def can_be(model: nn.Module) -> bool:
        """Whether ``model`` has no attribute of a name that graph modules need, and no way of its own to be copied."""
        copied = all(getattr(type(model), name, None) is getattr(nn.Module, name, None) for name in _COPYING)
        return copied and _names_of_graph_modules().isdisjoint(dir(model))

    def __init_subclass__(cls) -> None:
        """Not the model's ``__init_subclass__``: what is made here is none of its author's classes."""

    def __new__(cls, *arguments: Any, **named: Any) -> Any:
        """A module of the model's own class: ``Sequential`` makes its slices by calling its class."""
        return cls.traced_class(*arguments, **named)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Raises ``ExpansionError`` for parameters sharded by a module that the graph does not call."""
        try:
            return super().__call__(*arguments, **named)
        except RuntimeError as error:
            if "DTensor" in str(error) and (paths := never_gathered(self)):
                raise ExpansionError(_NEVER_GATHERED.format(path=paths[0], model=self.traced_class.__name__)) from error
            raise

    def __deepcopy__(self, memo: dict[int, Any]) -> TracedModule:
        twin = _blank(self.traced_class)
        memo[id(self)] = twin
        twin._fill(copy.deepcopy(_state(self), memo))
        return twin

    def __copy__(self) -> TracedModule:
        twin = _blank(self.traced_class)
        own = {name: copy.copy(vars(self)[name]) for name in ("_modules", "_parameters", "_buffers")}
        twin._fill({**_state(self), **own, "_graph": copy.deepcopy(self.graph)})
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        _, (body, import_block) = super().__reduce__()
        body.pop(_COMPILED, None)
        return _blank, (self.traced_class,), (body, import_block)

    def __setstate__(self, state: tuple[dict[str, Any], str]) -> None:
        body, import_block = state
        # FX writes the code of a graph and traces it again; everything else is in the body.
        self._fill({**body, "_graph": reduce_graph_module(dict(body), import_block).graph})

    def _fill(self, state: dict[str, Any]) -> None:
        graph = state.pop("_graph")
        vars(self).update(state)
        self.graph = graph  # compiles


_NEVER_GATHERED = (
    "{path}: sharded by itself, but the graph of this {model} calls the layers in it one by one, so that no call "
    "gathers its parameters. Shard these layers as one group, fully_shard([layer, ...]), the expansions of a collapsed "
    "model, or a module around them that is called."
)

# What module.compile() leaves behind: a call that is bound to the very module, and to none of its copies.
_COMPILED = "_compiled_call_impl"

_TABLES = (dict, OrderedDict)

# What decides how an object is copied and pickled.
_COPYING = ("__copy__", "__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__")


def _state(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name != _COMPILED}


def _own_class(model_class: type[nn.Module]) -> type[TracedModule]:
    """A class for one instance: FX puts the compiled forward of a graph on the class."""
    return type(model_class.__name__, (TracedModule, model_class), {"traced_class": model_class})


def _blank(model_class: type[nn.Module]) -> TracedModule:
    return object.__new__(_own_class(model_class))


@cache
def _names_of_graph_modules() -> frozenset[str]:
    empty = fx.GraphModule(nn.Module(), fx.Graph())
    ours = {*dir(TracedModule), *vars(empty)} - {*dir(nn.Module())}
    return frozenset(name for name in ours if not name.startswith("__"))


def copy_model(model: nn.Module, *, share: bool) -> nn.Module:
    """A copy of ``model``; with ``share``, over the same parameters, buffers and other tensors.

    Tensors that autograd computed (the weight that an old-style weight norm leaves behind) are detached.
    Raises what ``copy.deepcopy`` raises for an attribute that cannot be copied.
    """
    memo: dict[int, Any] = {}
    for value in _shareable(model):
        if share:
            memo[id(value)] = value
        elif isinstance(value, Tensor) and not value.is_leaf:
            memo[id(value)] = value.detach().clone()
    twin = deep_copy(model, memo)
    _restore_second_names(model, memo)
    return twin


def _restore_second_names(model: nn.Module, memo: Mapping[int, Any]) -> None:
    """Give copies of FX's own graph modules the names that FX drops: all but the first of a module with several."""
    for module in model.modules():
        copied = memo.get(id(module))
        if isinstance(module, fx.GraphModule) and isinstance(copied, fx.GraphModule):
            for name, child in module._modules.items():
                if id(child) in memo:
                    copied._modules[name] = memo[id(child)]


def _beside_tables(modules: list[nn.Module]) -> Iterator[Tensor | nn.Module]:
    """What ``_shareable`` finds in plain attributes of ``modules``, not in one of them: perhaps tensors of theirs."""
    tables = ("_parameters", "_buffers", "_modules")
    plain = [value for module in modules for name, value in vars(module).items() if name not in tables]
    yield from _reached([value for value in plain if type(value) not in ATOMS], modules)


def _shareable(model: nn.Module) -> Iterator[Tensor | nn.Module]:
    """The tensors of ``model``, and its scripted modules, the parameters of which cannot be shared otherwise.

    Also those in lists and dictionaries: a model may hide a teacher from ``parameters()`` in a list.
    """
    yield from _reached([model])


def _reached(waiting: list[Any], but: Iterable[object] = ()) -> Iterator[Tensor | nn.Module]:
    seen: dict[int, object] = {id(value): value for value in but}
    while waiting:
        value = waiting.pop()
        if type(value) in ATOMS or id(value) in seen:
            continue
        seen[id(value)] = value
        if type(value) in _TABLES:
            waiting += value.values()
        elif isinstance(value, (Tensor, torch.jit.ScriptModule)):
            yield value
        elif isinstance(value, nn.Module):
            # Most of what a module holds are settings, and empty tables of hooks.
            held = [attribute for attribute in vars(value).values() if type(attribute) not in ATOMS]
            waiting += [attribute for attribute in held if type(attribute) not in _TABLES or attribute]
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, (list, tuple, set, frozenset, deque)):
            waiting += value


def with_own_tensors(model: nn.Module, own: Iterable[nn.Module]) -> nn.Module:
    """``model``, its tensors replaced by copies, but for the parameters of the modules ``own``.

    Works on ``model`` itself, unless there are tensors in plain attributes, for which all of it is copied.
    """
    memo: dict[int, Any] = {id(p): p for module in own for p in module.parameters()}
    modules = list(model.modules())
    if any(isinstance(value, Tensor) for value in _beside_tables(modules)):
        return copy_model(model, share=False)
    for module in modules:
        tables: list[dict[str, Any]] = [module._parameters, module._buffers]
        for table in tables:
            table.update({name: _copied(tensor, memo) for name, tensor in table.items() if tensor is not None})
    return model


def _copied(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    if id(tensor) not in memo and not tensor.is_leaf:
        memo[id(tensor)] = tensor.detach().clone()
    copied: Tensor = copy.deepcopy(tensor, memo)
    return copied
