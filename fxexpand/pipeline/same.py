"""Whether a pass has changed anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxexpand.graph.traced import TracedModule

# What modules have besides their settings; of the code of graphs, names of nodes are a part.
_INTERNAL = frozenset(vars(fx.GraphModule(nn.Module(), fx.Graph())))
_SIMPLE = (bool, int, float, str, tuple, type(None))
_NUMBERS = (bool, int, float, str, type(None))


def same(before: nn.Module, after: nn.Module) -> bool:
    """Whether both models have the same graphs, and modules of the same classes, settings and tensors in them.

    Tensors are the same that have the same values and flags, NaN included; which object holds them does not matter, but
    what one of the models holds at several places the other has to hold there, too. Names of nodes do not matter.
    """
    pairs: list[tuple[nn.Module | Tensor, nn.Module | Tensor]] = [(before, after)]
    seen: dict[int, int] = {}
    while pairs:
        one, other = pairs.pop()
        if id(one) in seen:
            if seen[id(one)] != id(other):
                return False
        elif isinstance(one, nn.Module) and isinstance(other, nn.Module):
            if not _is_like(one, other):
                return False
            pairs += zip(_inner(one), _inner(other), strict=True)
        elif not (isinstance(one, Tensor) and isinstance(other, Tensor) and _is_equal(one, other)):
            return False
        seen[id(one)] = id(other)
    return len(set(seen.values())) == len(seen)


def _is_like(one: nn.Module, other: nn.Module) -> bool:
    """Whether the modules are alike, but for what they hold."""
    if _class_of(one) is not _class_of(other) or one.training != other.training:
        return False
    if _names(one) != _names(other) or _settings(one) != _settings(other):
        return False
    return not isinstance(one, fx.GraphModule) or _steps(one) == _steps(other)


def _class_of(module: nn.Module) -> type:
    """The class of ``module``; graph modules have one each, made from that which counts."""
    if isinstance(module, TracedModule):
        return module.traced_class
    return type(module).__mro__[1] if isinstance(module, fx.GraphModule) else type(module)


def _names(module: nn.Module) -> list[list[tuple[str, bool]]]:
    """The names of all that ``module`` holds, and whether there is something under them."""
    tables: tuple[Mapping[str, Any], ...] = (module._modules, module._parameters, module._buffers, _plain(module))
    return [[(name, value is not None) for name, value in table.items()] for table in tables]


def _plain(module: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in vars(module).items() if isinstance(value, Tensor)}


def _settings(module: nn.Module) -> dict[str, str]:
    """Plain attributes, as text: NaN is NaN, and 1 is neither True nor 1.0."""
    plain = {name: value for name, value in vars(module).items() if name not in _INTERNAL}
    return {name: repr(value) for name, value in plain.items() if isinstance(value, _SIMPLE) and _is_plain(value)}


def _is_plain(value: object) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, tuple) else isinstance(value, _NUMBERS)


@dataclass(frozen=True)
class _Step:
    """The value of the node at a position."""

    position: int


def _steps(module: nn.Module) -> list[tuple[str, Any, str]]:
    """The nodes of the graph of ``module``: what each does, and with what."""
    assert isinstance(module, fx.GraphModule)
    positions: dict[fx.Node, Any] = {node: _Step(position) for position, node in enumerate(module.graph.nodes)}
    steps: list[tuple[str, Any, str]] = []
    for node in module.graph.nodes:
        arguments = fx.node.map_arg((node.args, node.kwargs), positions.__getitem__)
        steps.append((node.op, node.target, repr(arguments)))
    return steps


def _inner(module: nn.Module) -> list[nn.Module | Tensor]:
    """What ``module`` holds, and the modules that its graph calls: a region of a container is no child of it."""
    tables: tuple[Mapping[str, Any], ...] = (module._modules, module._parameters, module._buffers, _plain(module))
    inner = [value for table in tables for value in table.values() if value is not None]
    if isinstance(module, fx.GraphModule):
        called = [str(node.target) for node in module.graph.nodes if node.op == "call_module"]
        inner += [module.get_submodule(target) for target in called]
    return inner


def _is_equal(one: Tensor, other: Tensor) -> bool:
    """Whether the tensors have the same values and flags."""
    if one is other:
        return True
    if type(one) is not type(other) or torch.nn.parameter.is_lazy(one):
        return type(one) is type(other)
    facts = [(t.shape, t.dtype, t.device, t.layout, t.requires_grad) for t in (one, other)]
    if facts[0] != facts[1] or one.is_meta or torch.equal(one, other):
        return facts[0] == facts[1]
    return bool(torch.isclose(one, other, rtol=0, atol=0, equal_nan=True).all())
