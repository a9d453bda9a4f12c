"""The nonlinear counterpart of an expansion: its layers, with an activation between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from fxexpand.graph.expanded import MARK, Expanded, ExpandedSum, StandIn
from fxexpand.graph.geometry import DIMS
from fxexpand.graph.layers import BATCH_NORMS
from fxexpand.graph.structure import Series, Sum, leaves


@dataclass(frozen=True, eq=False)
class Place:
    """Where an activation goes: at ``path`` in an expansion, as ``name`` in ``owner``, behind its part ``after``.

    ``channels`` is what the layer before it gives.
    """

    path: str
    owner: Series
    name: str
    after: str
    channels: int


class Counterpart(StandIn):
    """The layers of an expansion with activations between them: it is no one layer, and has no weight of its own.

    The layers stay under their names, so that ``state_dict`` keys are those of the expansion. ``activations`` are the
    paths in it of what stands between them; an expansion inside is a counterpart with its own.
    """

    if TYPE_CHECKING:  # TorchScript reads the annotations of classes, and knows no such types
        activations: tuple[str, ...]

    @staticmethod
    def adopt(expanded: Expanded, activations: Sequence[tuple[Place, nn.Module]]) -> None:
        """Make ``expanded``, which is not collapsed, one with these activations; it stays the same object."""
        for _, layer in leaves(expanded):
            vars(layer).pop(MARK, None)  # what is made of it contains no expansion
        for place, activation in activations:
            _insert(place, activation)
        adopted: StandIn = expanded
        adopted.__class__ = CounterpartSum if isinstance(expanded, ExpandedSum) else CounterpartChain
        vars(adopted)["activations"] = tuple(place.path for place, _ in activations)

    def parts(self) -> list[tuple[str, str]]:
        """(path, name of the class) of what it calls, but for the activations: as in the expansion."""
        between = activations_of(self)
        return [(path, type(module).__name__) for path, module in leaves(self) if path not in between]

    def __getattr__(self, name: str) -> Any:
        if name in ("weight", "bias"):
            what = vars(self)["origin"].description if "origin" in vars(self) else "a layer"
            raise AttributeError(
                f"the nonlinear counterpart of {what} has no {name}: its layers are not one. Call it, or read the "
                f"{name} of one of its layers"
            )
        return super().__getattr__(name)


class CounterpartChain(Counterpart, Series):
    """Layers one after another: y = reduce(σ(kernel(σ(expand(x)))))."""


class CounterpartSum(Counterpart, Sum):
    """Branches side by side, with activations inside those that are chains."""


def places(structure: Series | Sum, path: str = "") -> Iterator[Place]:
    """Where activations go in an expansion, outside of the expansions that it holds: between each pair of layers.

    A layer is a convolution, a linear layer, or a part that holds one. Batch norm behind it belongs to it; a pad or a
    pool before the next one comes after the activation.
    """
    parts: dict[str, nn.Module] = dict(structure._modules)
    if isinstance(structure, Series):
        names = list(parts)
        layers = [name for name in names if _channels(parts[name])]
        for layer in layers[:-1]:
            at = names.index(layer)
            while isinstance(parts[names[at + 1]], BATCH_NORMS):
                at += 1
            name = f"{layer}_activation"
            while name in parts or hasattr(structure, name):
                name += "_"
            yield Place(_join(path, name), structure, name, names[at], _channels(parts[layer]))
    for name, part in parts.items():
        if isinstance(part, (Series, Sum)) and not isinstance(part, Expanded):
            yield from places(part, _join(path, name))


def activations_of(model: nn.Module) -> set[str]:
    """The paths of the activations that ``counterpart`` has put into ``model``."""
    modules = model.named_modules(remove_duplicate=False)  # state_dict has the keys of all names
    held = [(path, module) for path, module in modules if isinstance(module, Counterpart)]
    return {_join(path, inner) for path, module in held for inner in module.activations}


def _channels(part: nn.Module) -> int:
    """How many channels the last layer in ``part`` gives; 0 where there is none."""
    found = [layer for _, layer in leaves(part) if isinstance(layer, tuple(DIMS))]
    if not found:
        return 0
    last: Any = found[-1]
    return int(last.out_features if isinstance(last, nn.Linear) else last.out_channels)


def _insert(place: Place, activation: nn.Module) -> None:
    parts = dict(place.owner._modules)
    place.owner._modules.clear()
    for name, part in parts.items():
        place.owner._modules[name] = part
        if name == place.after:
            place.owner._modules[place.name] = activation


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
