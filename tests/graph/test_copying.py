"""Our copy of a module is the one that copy.deepcopy makes."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from fxexpand.graph.copying import deep_copy
from traceable import Everything


class Peculiar(nn.Module):
    """Holds what copies can get wrong: values held twice, cycles, modules outside ``_modules``, hooks, empty things."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.again = self.layer
        self.listed = [nn.ReLU(), self.layer]
        self.settings = {"a": (1, "b"), "tensor": self.layer.weight, ("k", 1): [1.5]}
        self.same = self.settings
        self.pair = ([1], [2])
        self.seen: set[int] = set()
        self.state = nn.ReLU().state_dict()  # empty, with an attribute of its own
        vars(self)["myself"] = self
        self.layer.register_forward_hook(self.note)

    def note(self, *_: object) -> None:
        self.seen.add(1)


class Counted(nn.Module):
    """Says itself how it is copied."""

    def __init__(self) -> None:
        super().__init__()
        self.copies = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Counted:
        twin = Counted()
        twin.copies = self.copies + 1
        return twin


class Cut(nn.Module):
    """Leaves something behind when it is pickled or copied."""

    def __init__(self) -> None:
        super().__init__()
        self.kept, self.cache = nn.Linear(1, 1), [1, 2, 3]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "cache": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.restored = True


class Slotted(nn.Module):
    __slots__ = ("extra",)

    def __init__(self) -> None:
        super().__init__()
        self.extra = [1]


def outline(value: object, seen: dict[int, int]) -> object:
    """What a value is made of, with a number for each object met: equal for equal values with equal sharing."""
    if isinstance(value, (bool, int, float, str, bytes, type(None))):
        return value
    if id(value) in seen:
        return seen[id(value)]
    seen[id(value)] = len(seen)
    if isinstance(value, torch.Tensor):
        return ("tensor", value.tolist(), value.requires_grad)
    if isinstance(value, dict):
        return (type(value), [(outline(k, seen), outline(v, seen)) for k, v in value.items()], own(value, seen))
    if isinstance(value, (list, tuple)):
        return (type(value), [outline(v, seen) for v in value])
    if isinstance(value, set):
        return (type(value), sorted(map(repr, value)))
    if callable(getattr(value, "__func__", None)):  # a bound method
        return ("method", value.__func__, outline(value.__self__, seen))  # type: ignore[attr-defined]
    return (type(value), own(value, seen))


def own(value: object, seen: dict[int, int]) -> object:
    return outline(getattr(value, "__dict__", None), seen)


def tied() -> nn.Module:
    inner = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1))
    return nn.Sequential(OrderedDict(a=inner, b=nn.Sequential(inner, Counted())))


@pytest.mark.parametrize("make", [Peculiar, tied, Counted, Cut, Slotted, Everything, lambda: nn.LSTM(2, 2)])
def test_it_is_what_deepcopy_gives(make: Any) -> None:
    model = make().double()
    assert outline(deep_copy(model, {}), {}) == outline(copy.deepcopy(model), {})


def test_nothing_of_the_copy_is_in_the_model() -> None:
    model = Peculiar()
    twin: Any = deep_copy(model, {})
    assert twin.myself is twin
    assert twin.again is twin.layer
    assert twin.same is twin.settings
    assert twin.settings is not model.settings
    assert twin.seen is not model.seen
    twin.layer(torch.zeros(1, 2))
    assert twin.seen == {1}
    assert model.seen == set()
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}


def test_what_the_memo_holds_is_shared() -> None:
    model: Any = nn.Sequential(OrderedDict(layer=nn.Linear(2, 2)))
    weight = model.layer.weight
    twin: Any = deep_copy(model, {id(weight): weight})
    assert twin.layer.weight is weight
    assert twin.layer.bias is not model.layer.bias


def test_modules_may_nest_deeper_than_python_recurses() -> None:
    model: nn.Module = nn.ReLU()
    for _ in range(2000):
        model = nn.Sequential(model)
    twin = deep_copy(model, {})
    depth = 0
    while isinstance(twin, nn.Sequential):
        twin, depth = twin[0], depth + 1
    assert depth == 2000
