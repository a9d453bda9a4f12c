"""What the layers of an expansion stand in: one after another, or side by side."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping

from torch import Tensor, nn


class Series(nn.Sequential):
    """Parts that are applied one after another, under their names: layers, or parts made of layers."""

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__(OrderedDict(parts))


class Sum(nn.ModuleDict):
    """Branches that read the same signal, and the outputs of which are added."""

    def __init__(self, branches: Mapping[str, nn.Module]) -> None:
        super().__init__(OrderedDict(branches))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 -- the name that layers of torch have
        """Σ branch(x), of the branches' common shape."""
        first, *others = self.values()
        total: Tensor = first(input)
        for branch in others:
            total = total + branch(input)
        return total


def leaves(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of what a structure calls, in the order in which it does."""
    if not isinstance(module, (Series, Sum)):
        yield path, module
        return
    for name, part in module._modules.items():
        if part is not None:
            yield from leaves(part, f"{path}.{name}" if path else name)


def entrances(module: nn.Module) -> Iterator[nn.Module]:
    """What a structure calls on the very signal that it is given: the first of a chain, and of each branch."""
    if not isinstance(module, (Series, Sum)):
        yield module
        return
    parts = list(module.children())
    for part in parts if isinstance(module, Sum) else parts[:1]:
        yield from entrances(part)


def parts_of(module: nn.Module, name: str) -> dict[str, nn.Module]:
    """The parts of a ``Series``, to go on from; any other module is one part, under ``name``."""
    return dict(module._modules) if isinstance(module, Series) else {name: module}
