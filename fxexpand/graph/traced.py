"""A GraphModule that keeps everything of the model it stands for."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph_module import reduce_graph_module


class TracedModule(fx.GraphModule):
    """A ``GraphModule`` that keeps the whole of its model, not only what its graph refers to.

    All ``state_dict`` keys (unused layers, buffers that are not persistent, layers under two names), plain attributes,
    hooks, containers and methods stay; also through ``copy.deepcopy`` and ``pickle``. It is an instance of the model's
    class too, so that a parent which cannot be traced may call its other methods.

    ``leaves`` are the classes that were to stay one node each.
    """

    leaves: tuple[type[nn.Module], ...]
    model_class: type[nn.Module]

    @staticmethod
    def adopt(model: nn.Module, graph: fx.Graph, leaves: tuple[type[nn.Module], ...] = ()) -> TracedModule:
        """Make ``graph`` the forward of ``model``: the result takes over its modules, parameters and attributes."""
        plain = vars(fx.GraphModule(model, graph))
        ours = {name: value for name, value in plain.items() if name not in vars(nn.Module())}
        return _assemble(type(model), {**vars(model), **ours, "leaves": leaves}, graph)

    def __deepcopy__(self, memo: dict[int, Any]) -> TracedModule:
        twin = _blank(self.model_class)
        memo[id(self)] = twin
        return _fill(twin, copy.deepcopy(vars(self), memo))

    def __reduce__(self) -> tuple[Any, ...]:
        _, (body, import_block) = super().__reduce__()
        return _unpickle, (self.model_class, body, import_block)


def _blank(model_class: type[nn.Module]) -> TracedModule:
    """An empty instance of a class of its own: FX puts the compiled forward of a graph on the class."""
    try:
        own = type(model_class.__name__, (TracedModule, model_class), {"model_class": model_class})
    except TypeError:  # a model whose class cannot be combined (a metaclass, or another layout)
        own = type(model_class.__name__, (TracedModule,), {"model_class": model_class})
    return object.__new__(own)


def _fill(blank: TracedModule, state: dict[str, Any]) -> TracedModule:
    graph = state.pop("_graph")
    vars(blank).update(state)
    blank.graph = graph  # compiles
    return blank


def _assemble(model_class: type[nn.Module], state: dict[str, Any], graph: fx.Graph) -> TracedModule:
    return _fill(_blank(model_class), {**state, "_graph": graph})


def _unpickle(model_class: type[nn.Module], body: dict[str, Any], import_block: str) -> TracedModule:
    # FX writes the code of a graph and traces it again; everything else is in the body.
    graph = reduce_graph_module(dict(body), import_block).graph
    return _assemble(model_class, body, graph)  # type: ignore[arg-type]


def copy_model(model: nn.Module, *, share: bool) -> nn.Module:
    """A copy of ``model``; with ``share``, over the same parameters, buffers and other tensors.

    Tensors that autograd computed (the weight that an old-style weight norm leaves behind) are detached.
    Raises what ``copy.deepcopy`` raises for an attribute that cannot be copied.
    """
    memo: dict[int, Any] = {}
    for tensor in _tensors(model):
        if share:
            memo[id(tensor)] = tensor
        elif not tensor.is_leaf:
            memo[id(tensor)] = tensor.detach().clone()
    return copy.deepcopy(model, memo)


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    tensors: list[torch.Tensor] = []
    for module in model.modules():
        attributes = (*vars(module).values(), *module._parameters.values(), *module._buffers.values())
        tensors += [value for value in attributes if isinstance(value, torch.Tensor)]
    return tensors
