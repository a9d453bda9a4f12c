"""A graph, read: what each of its nodes does, as far as that is linear, and what is known of its values."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import fx, nn

from fxexpand.algebra.affine import Affine
from fxexpand.algebra.kernel import Ints, Kernel
from fxexpand.algebra.refusal import Refusal
from fxexpand.errors import FxExpandError
from fxexpand.regions.calls import Calls
from fxexpand.regions.constants import Constants
from fxexpand.regions.dtypes import Known, dtypes_of
from fxexpand.regions.effects import Effects
from fxexpand.regions.layers import lift_as, lift_module
from fxexpand.regions.parts import Join, Lifted, Signal, Unary, same_channels
from fxexpand.regions.reach import Reach
from fxexpand.regions.shapes import Shapes

# What the user says that modules do.
Lifts: TypeAlias = "Mapping[type[nn.Module], Callable[[Any], Kernel]]"


def check_lifts(lifts: Lifts | None, task: str) -> None:
    """Raise ``FxExpandError`` for anything but a mapping of classes of modules to functions."""
    expected = f"{task}: expected lifts={{SomeModule: module -> Kernel}}, found"
    if not isinstance(lifts or {}, Mapping):
        raise FxExpandError(f"{expected} {lifts!r}.")
    entries: Iterable[tuple[Any, Any]] = (lifts or {}).items()
    for cls, lift in entries:
        if not (inspect.isclass(cls) and issubclass(cls, nn.Module) and callable(lift)):
            raise FxExpandError(f"{expected} {cls!r}: {lift!r}. Give the class of the module, and a function.")


# The extent of an axis where no example says it: costs are compared, and differ by the strides alone.
NOMINAL = 64

_UNKNOWN = Signal()

# Modules the output of which has the axes of their input.
_SAME_AXES = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid),
    *(nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Dropout, nn.LayerNorm, nn.GroupNorm),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
)
_SAME_AXES_CALLS = {"relu", "relu_", "relu6", "gelu", "silu", "hardswish", "sigmoid", "tanh", "leaky_relu", "elu"}


class Reading:
    """What is known of the graph of ``gm`` before anything is changed.

    ``parts`` has an entry for each node that is linear, or would be but for a reason. ``exact`` are the maps of layers
    of which more is known than their weights say, by the id of the layer. ``reach`` is what other code comes by.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        shapes: Shapes,
        lifts: Lifts,
        exact: Mapping[int, Affine] | None = None,
        reach: Reach | None = None,
    ) -> None:
        self.gm = gm
        self.reach = reach
        self.shapes = shapes
        self._lifts = lifts
        self._exact = exact or {}
        self.effects = Effects(gm)
        self.constants = Constants(gm, self.effects.changed(), frozenset() if reach is None else reach.written)
        self._calls = Calls(self.constants, self.effects)
        self.parts: dict[fx.Node, Unary | Join | Refusal] = {}
        for node in gm.graph.nodes:
            lifted = self._lift(node)
            if lifted is not None:
                self.parts[node] = lifted
        self.signals = _signals(self)
        self._maps: dict[fx.Node, Affine | Refusal | None] = {}
        self._sketches: dict[fx.Node, Affine | Refusal | None] = {}
        self._sizes: dict[fx.Node, Ints] = {}

    @cached_property
    def dtypes(self) -> dict[fx.Node, Known]:
        """Those of all values, as far as they are known; few graphs have a node for which they matter."""
        return dtypes_of(self)

    def part(self, node: fx.Node) -> Unary | Join | None:
        """What ``node`` does, if it is linear."""
        found = self.parts.get(node)
        return None if isinstance(found, Refusal) else found

    def is_layer(self, node: fx.Node) -> bool:
        """Whether ``node`` multiplies and accumulates, as convolutions and linear layers do."""
        part = self.part(node)
        return isinstance(part, Unary) and part.computes

    def signal(self, node: fx.Node) -> Signal:
        return self.signals.get(node, Signal())

    def map_of(self, node: fx.Node) -> Affine | Refusal | None:
        """The map that a unary node applies: None where it leaves its input as it is."""
        if node not in self._maps:
            part = self.parts[node]
            assert isinstance(part, Unary)
            self._maps[node] = part.make(self.signal(part.source))
        return self._maps[node]

    def sketch_of(self, node: fx.Node) -> Affine | Refusal | None:
        """The map that a unary node applies, without its numbers."""
        if node not in self._sketches:
            found = self.map_of(node)
            self._sketches[node] = found.to(dtype=torch.float64, device="meta") if isinstance(found, Affine) else found
        return self._sketches[node]

    def size(self, node: fx.Node, dims: int) -> Ints:
        """The size of the value of ``node`` on its last ``dims`` axes, or one that stands for it."""
        if node in self.shapes:
            shape = self.shapes[node]
            return shape[len(shape) - dims :] if len(shape) >= dims else (NOMINAL,) * dims
        if node not in self._sizes:
            waiting = [node]
            while waiting:  # a long chain of layers is no depth for recursion
                source = self._size_source(waiting[-1])
                if source is None or source in self._sizes:
                    current = waiting.pop()
                    self._sizes[current] = self._size(current, source)
                else:
                    waiting.append(source)
        found = self._sizes[node]
        return found if len(found) == dims else (NOMINAL,) * dims

    def _size_source(self, node: fx.Node) -> fx.Node | None:
        part = self.part(node)
        return None if part is None or node in self.shapes else part.sources[0]

    def _size(self, node: fx.Node, source: fx.Node | None) -> Ints:
        dims = max(self.signal(node).dims or 0, 0)
        if node in self.shapes:
            return self.size(node, dims)
        part = self.part(node)
        if source is None or not isinstance(part, Unary):
            return (NOMINAL,) * dims if source is None else self.size(source, dims)
        found = self.sketch_of(node)
        if isinstance(found, Affine):
            return found.output_size(self.size(source, found.dims))
        return self.size(source, dims)

    def lift_of(self, module: nn.Module) -> Callable[[Any], Kernel] | None:
        """What the user says that ``module`` does, if anything."""
        return next((lift for cls, lift in self._lifts.items() if isinstance(module, cls)), None)

    def _lift(self, node: fx.Node) -> Lifted:
        if node in self.constants:
            return None
        if node.op in ("call_function", "call_method"):
            return self._calls.lift(node)
        if node.op != "call_module":
            return None
        module = self.effects.modules[node]
        source = node.args[0] if node.args else node.kwargs.get("input")
        if len(node.args) + len(node.kwargs) != 1 or not isinstance(source, fx.Node) or source in self.constants:
            return None
        if self.reach is not None and self.reach.walks(self.gm, str(node.target)):
            return Refusal("code that has no graph may run through the modules beside it, and would find others")
        changes = self.constants.changes_any_of(module)
        lift = self.lift_of(module)
        if lift is not None and not changes:
            return lift_as(module, _lifted_by_user(lift, module, str(node.target)), source)
        lifted = lift_module(module, source)
        if changes and (lift is not None or isinstance(lifted, (Unary, Join))):
            return Refusal("something changes its weight or statistics in place when the model runs")
        exact = self._exact.get(id(module))
        return replace(lifted, make=lambda _: exact) if exact is not None and isinstance(lifted, Unary) else lifted


def _lifted_by_user(lift: Callable[[Any], Any], module: nn.Module, path: str) -> object:
    try:
        with torch.no_grad():
            return lift(module)
    except Exception as error:
        raise FxExpandError(
            f"{path} ({type(module).__name__}): expected its entry in lifts to give a Kernel, "
            f"but it raised {type(error).__name__}: {error}. Mend the function."
        ) from error


def _signals(reading: Reading) -> dict[fx.Node, Signal]:
    """What the nodes tell of the values around them, passed on until nothing is new."""
    found: dict[fx.Node, Signal] = {}
    nodes = list(reading.gm.graph.nodes)
    waiting = dict.fromkeys(reversed(nodes))  # an ordered set: the first node is the last

    def note(node: fx.Node, signal: Signal) -> None:
        known = found.get(node, _UNKNOWN)
        together = _with_shape(known.known_with(signal), reading.shapes.get(node, ()))
        if together is not known and together != known:
            found[node] = together
            waiting.update(dict.fromkeys((node, *node.users)))

    for node in nodes:
        if node in reading.shapes:
            note(node, Signal(rank=len(reading.shapes[node])))
        part = reading.part(node)
        if isinstance(part, Unary):
            note(part.source, part.reads)
            note(node, part.gives)
        elif _flattens(reading, node):
            note(node, Signal(rank=2))
    while waiting:
        node, _ = waiting.popitem()
        _pass_on(reading, node, lambda value: found.get(value, _UNKNOWN).agreed(), note)
    return found


def _with_shape(signal: Signal, shape: tuple[int, ...]) -> Signal:
    """``signal`` with the channels that ``shape`` has on their axis."""
    if signal.channels is not None or signal.dims is None or not 0 <= signal.dims < len(shape):
        return signal
    return signal.of_channels(shape[-1 - signal.dims])


def _pass_on(
    reading: Reading, node: fx.Node, at: Callable[[fx.Node], Signal], note: Callable[[fx.Node, Signal], None]
) -> None:
    """Tell the values before and after ``node`` what is known ``at`` each other."""
    part = reading.part(node)
    if isinstance(part, Unary):
        before = at(part.source)
        after = None if before.channels is None or part.gives.channels else part.channels(before.channels)
        note(node, before.of_channels(after))
        here = at(node)
        if part.broadcasts:
            note(part.source, Signal(here.dims))
        else:
            note(part.source, here if part.channels is same_channels else here.of_channels(None))
    elif isinstance(part, Join):
        summed = part.factors is not None
        total = None if summed else _total([at(source).channels for source in part.sources])
        for source in part.sources:
            note(node, at(source) if summed else at(source).of_channels(total))
        here = at(node) if summed else at(node).of_channels(None)
        for source in part.sources:
            note(source, here)
    elif _keeps_axes(reading, node):
        source = node.all_input_nodes[0]
        note(source, Signal(rank=at(node).rank))
        note(node, Signal(rank=at(source).rank))


def _total(counts: list[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _keeps_axes(reading: Reading, node: fx.Node) -> bool:
    if len(node.all_input_nodes) != 1:
        return False
    if node.op == "call_module":
        return type(reading.effects.modules[node]) in _SAME_AXES
    return getattr(node.target, "__name__", node.target) in _SAME_AXES_CALLS


def _flattens(reading: Reading, node: fx.Node) -> bool:
    """Whether the value of ``node`` has two axes: everything but the batch is flattened."""
    if node.op == "call_module":
        module = reading.effects.modules[node]
        return type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1)
    if node.target in (torch.flatten, "flatten"):
        given = dict(zip(("input", "start_dim", "end_dim"), node.args, strict=False)) | dict(node.kwargs)
        return (given.get("start_dim", 0), given.get("end_dim", -1)) == (1, -1)
    return node.op == "call_function" and node.target is torch.mm
