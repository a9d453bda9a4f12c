"""What code that has no graph may come by inside graph modules, and what may be written to: what has to stay."""

from __future__ import annotations

import dis
from collections.abc import Iterable, Iterator
from functools import cache
from types import CodeType, FunctionType
from typing import Any

from torch import Tensor, fx, nn

from fxexpand.graph.layers import hooks_of, is_opaque
from fxexpand.graph.outside import hook_code, uses_its_module
from fxexpand.graph.state import plain_attributes
from fxexpand.graph.tree import modules_beside, submodule
from fxexpand.graph.uses import running
from fxexpand.regions.constants import memory_of, memory_read
from fxexpand.regions.effects import Effects, is_foreign

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_HELD = {"weight", "bias", "running_mean", "running_var", "parameters", "named_parameters", "buffers", "named_buffers"}
_WALKS = {"children", "modules", "named_children", "named_modules", "_modules", "get_submodule", "getattr"}


class Reach:
    """What the parents of graph modules that cannot be traced themselves, and kept modules, may come by.

    Their code is read for the names of attributes: what is only called is a graph, whose inside nobody sees.
    ``modules`` are the modules, by id, that such code holds outside of graph modules. ``written`` is the memory that
    graphs, and modules, may write to when the model runs; of instances of ``known`` it is known that they do not.
    """

    def __init__(self, model: nn.Module, known: tuple[type[nn.Module], ...] = ()) -> None:
        self.graphs, code = running(model)
        self.written = _written(self.graphs, [module for module in code.values() if not isinstance(module, known)])
        self._code = [module for module in code.values() if module._modules and not is_opaque(module)]
        self.modules = {id(inner) for module in self._code for inner in _without_graphs(module)}
        self._hooked = {id(inner) for module in model.modules() if _looks_inside(module) for inner in module.modules()}
        self._own_names: dict[int, set[str]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            if isinstance(module, fx.GraphModule):
                self._own_names.setdefault(id(module), set()).add(path.rpartition(".")[2])
        names = {id(gm): self._names_for(gm) for gm in self.graphs}
        self._called = {key: called for key, (called, _) in names.items()}
        self._taken = {key: taken for key, (_, taken) in names.items()}

    def names(self, gm: fx.GraphModule, path: str) -> bool:
        """Whether such code speaks of the name of what stands at ``path`` in ``gm``: it has to stay as it is."""
        name = path.rpartition(".")[2]
        return id(gm) in self._hooked or name in self._called[id(gm)] or name in self._taken[id(gm)]

    def walks(self, gm: fx.GraphModule, path: str) -> bool:
        """Whether such code may run through the modules beside ``path`` in ``gm``, which have to stay as they are."""
        taken = self._taken[id(gm)]
        if id(gm) in self._hooked:
            return True
        if not taken:
            return False
        above = path.rpartition(".")[0]
        if not isinstance(submodule(gm, above), _CONTAINERS):
            return not taken.isdisjoint(_WALKS)
        own = {above.rpartition(".")[2]} if above else self._own_names[id(gm)]
        return not taken.isdisjoint(own | _WALKS)

    def _names_for(self, gm: fx.GraphModule) -> tuple[set[str], set[str]]:
        called, taken = set[str](), set[str]()
        for code in self._code:
            if any(module is gm for module in code.modules()):
                for function in _functions(code):
                    calls, takes = _attributes(function)
                    called |= calls
                    taken |= takes
        return called, taken


def _looks_inside(module: nn.Module) -> bool:
    """Whether a hook of ``module`` may come by the modules in it: by what it is given, or a variable of its own."""
    names = {name for code in hook_code(module) for name in code.co_names}
    return not names.isdisjoint(_WALKS | _HELD) or any(map(uses_its_module, hooks_of(module)))


def _written(graphs: list[fx.GraphModule], code: list[nn.Module]) -> frozenset[int]:
    found: set[int] = set()
    for gm in graphs if len(graphs) > 1 else ():  # of a single one, its own reading tells
        if any(node.op == "get_attr" for node in gm.graph.nodes):
            found |= memory_read(gm, Effects(gm).changed())
    for module in code:
        for tensor in _changed_by(module):
            found.update(memory_of(tensor))
    return frozenset(found)


def _changed_by(module: nn.Module) -> Iterable[Tensor | None]:
    """What calling ``module`` may change of what it holds: nobody has looked into foreign code."""
    if is_foreign(module):
        beside = [inner for held in modules_beside(module) for inner in (held, *_without_graphs(held))]
        return [
            tensor
            for inner in (module, *_without_graphs(module), *beside)
            if not isinstance(inner, fx.GraphModule)  # what its names are says whether code speaks of what is inside
            for table in (inner._parameters, inner._buffers, plain_attributes(inner))
            for value in table.values()
            for tensor in _tensors_in(value)
        ]
    if isinstance(module, nn.modules.batchnorm._NormBase):  # also normalises instances
        return module._buffers.values() if module.training else ()
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
        return (module.weight,)
    return ()


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif type(value) in (list, tuple, dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(item)


def _functions(module: nn.Module) -> Iterator[CodeType]:
    """The code of the methods of ``module``, but for ``__init__``, and of the functions that it holds."""
    for value in vars(module).values():
        if isinstance(value, FunctionType):
            yield value.__code__
    for base in type(module).__mro__:
        if not base.__module__.startswith("torch.") and base is not object:
            for name, value in vars(base).items():
                function = getattr(value, "__wrapped__", value)
                if isinstance(function, FunctionType) and name != "__init__":
                    yield function.__code__


@cache
def _attributes(code: CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """The names of attributes that ``code`` calls, and of those, and globals, that it takes for something else."""
    called, taken = set[str](), set[str]()
    for step in dis.get_instructions(code):
        if step.opname == "LOAD_METHOD" or (step.opname == "LOAD_ATTR" and _is_method_call(step)):
            (taken if step.argval in _WALKS else called).add(step.argval)
        elif step.opname in ("LOAD_ATTR", "LOAD_GLOBAL", "LOAD_NAME"):
            taken.add(step.argval)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            calls, takes = _attributes(constant)
            called |= calls
            taken |= takes
    return frozenset(called), frozenset(taken)


def _is_method_call(step: dis.Instruction) -> bool:
    """Whether LOAD_ATTR is about to call what it loads: since Python 3.12 the lowest bit says so."""
    return "LOAD_METHOD" not in dis.opmap and step.arg is not None and bool(step.arg & 1)


def _without_graphs(module: nn.Module) -> Iterable[nn.Module]:
    """The modules in ``module`` that are not inside a graph module."""
    waiting = list(module.children())
    while waiting:
        inner = waiting.pop()
        yield inner
        if not isinstance(inner, fx.GraphModule):
            waiting += inner.children()
