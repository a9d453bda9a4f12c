"""A symbolic tracer that fails where a graph would not do what the code does."""

from __future__ import annotations

import dis
import operator
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from functools import cache
from types import CodeType, FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute

from fxexpand.graph.layers import is_layer, is_opaque
from fxexpand.graph.watch import WatchedCalls, no_random_draws, watched_modes

_IN_PLACE = {
    getattr(operator, name)
    for name in ("iadd", "iand", "ifloordiv", "imatmul", "imod", "imul", "ior", "ipow", "isub", "itruediv", "ixor")
}

# The containers that stay what they are as arguments of nodes, beside named tuples.
_KEPT_CONTAINERS = (dict, OrderedDict, list, tuple, torch.Size)

_is_grad_enabled = torch.is_grad_enabled  # before watching makes it raise

# What Python would ask of a value, and a proxy would answer for itself or not at all.
_ASKED = {
    "hash": "looks a value up in a set or dictionary",
    "len": "asks for the length of a value",
    "index": "takes a value for an integer",
    "int": "converts a value to an integer",
    "float": "converts a value to a number",
    "setitem": "assigns to a part of a value",
    "delitem": "deletes a part of a value",
}

# Whose questions about the type of a value are harmless: FX, and what assigns attributes of modules.
_HARMLESS = ("torch/fx/", "torch/nn/parameter.py", "torch/nn/modules/module.py")


class UntraceableError(Exception):
    """Code does something that a graph would not do again, or would freeze as it is now."""


class ReplayTracer(fx.Tracer):
    """Traces code that FX has written, so that the graph is the one it was written from."""

    proxy_buffer_attributes = True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Value(node, self)

    def path_of_module(self, mod: nn.Module) -> str:
        """Also of a module that the root holds as a plain attribute, as a container does that must not get a child."""
        held = [name for name, value in vars(self.root).items() if value is mod]
        return held[0] if held else super().path_of_module(mod)

    def create_arg(self, a: Any) -> Any:
        if type(a) is Value:  # most arguments are, of which FX asks a good many questions first
            return a.node
        if type(a) is OrderedDict:  # FX would make a plain dict of it
            items = [(key, super(ReplayTracer, self).create_arg(value)) for key, value in a.items()]
            return self.create_node("call_function", OrderedDict, (items,), {})
        return super().create_arg(a)

    def refuse(self, reason: str) -> NoReturn:
        raise UntraceableError(reason)


class LayerTracer(ReplayTracer):
    """Traces down to layers, and finds out which modules cannot be traced.

    ``leaves`` are classes, ``kept`` the paths of modules that stay one node each. ``given`` are values that nodes have,
    by their names, instead of a proxy. With ``evaluated``, modules in eval mode are taken to stay in it. Fails where FX
    would quietly take for a constant what is another value at another call: ``self.training``, a random draw, a tensor
    made on the spot, a mode of torch, the type of an input.

    ``failed`` are the paths of the innermost modules that did, but for the root. Tracing goes on after them, as if they
    had been kept, to find them all; then it fails. Whether a module draws random numbers is expensive to see: only with
    ``blames`` is it seen of each; without it, ``drew`` says that one of them did.
    """

    def __init__(
        self,
        leaves: tuple[type[nn.Module], ...] = (),
        kept: Iterable[str] = (),
        given: Mapping[str, object] | None = None,
        *,
        evaluated: bool = False,
        blames: bool = True,
    ) -> None:
        super().__init__()
        self.evaluated = evaluated
        self.blames = blames
        self.drew = False
        self.leaves = leaves
        self.kept = frozenset(kept)
        self.given = given or {}
        self.failed: set[str] = set()
        self.refusal: str | None = None
        self.overwritten: set[fx.Node] = set()

    def refuse(self, reason: str) -> NoReturn:
        """Fail, for good: code that catches every exception does not make it undone."""
        self.refusal = reason
        raise UntraceableError(reason)

    def refuse_draw(self, reason: str) -> NoReturn:
        self.drew = True
        self.refuse(reason)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        named = module_qualified_name in self.kept or isinstance(m, self.leaves)
        return named or is_layer(m) or is_opaque(m) or super().is_leaf_module(m, module_qualified_name)

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        r, modes = self.refuse, watched_modes(self.refuse, evaluated=self.evaluated)
        with torch.enable_grad(), modes, WatchedCalls(r), no_random_draws(self.refuse_draw):
            graph = super().trace(root, concrete_args)
            self._check()
            if self.failed:
                raise UntraceableError(f"modules that cannot be traced: {', '.join(sorted(self.failed))}")
        for node in graph.nodes:
            if isinstance(node.type, str):  # an annotation that was postponed: FX cannot write all of them as code
                node.type = None
        return graph

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: dict[str, Any] | tuple[Any, ...] | None = None
    ) -> tuple[Any, list[Any]]:
        fn, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        return fn, [self.given.get(a.node.name, a) if type(a) is Value else a for a in args]

    def proxy(self, node: fx.Node) -> Any:
        value = super().proxy(node)
        return value if node.op == "placeholder" else self.given.get(node.name, value)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def watched(*args: Any, **kwargs: Any) -> Any:
            try:
                with no_random_draws(self.refuse) if self.blames else nullcontext():
                    result = forward(*args, **kwargs)
                self._check()
            except Exception:  # noqa: BLE001 -- any code of the user's runs here; the handler is the innermost module's
                self.refusal = None
                self.failed.add(self.path_of_module(m))
                return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)
            return result

        called: Any = super().call_module(m, watched, args, kwargs)
        if type(m) is nn.MultiheadAttention and kwargs.get("need_weights") is False:
            return called[0], None  # what it returns then: a proxy would be taken for weights
        return called

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any, **options: Any) -> fx.Node:
        if not _is_grad_enabled():
            self.refuse("it computes without gradients")  # no_grad, inference_mode or an autograd.Function
        node = super().create_node(kind, target, args, kwargs, *more, **options)
        if self.overwritten.intersection(node.all_input_nodes):
            self.refuse("it uses a value again that x += y has replaced")
        if target in _IN_PLACE and kind == "call_function":
            self.overwritten.add(args[0])
        return node

    def create_arg(self, a: Any) -> Any:
        if type(a) is not Value and not isinstance(a, fx.Proxy):
            if isinstance(a, Tensor) and not self._is_attribute(a):
                self.refuse("it uses a tensor that is no attribute of a module")
            named = isinstance(a, tuple) and hasattr(a, "_fields")
            if isinstance(a, (dict, list, tuple)) and not named and type(a) not in _KEPT_CONTAINERS:
                self.refuse(f"it passes on a {type(a).__name__}, of which FX would make another type")
        return super().create_arg(a)

    def to_bool(self, obj: fx.Proxy) -> bool:
        self.refuse("its control flow depends on data")

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        self.refuse("it iterates over data")

    def _check(self) -> None:
        """Fail where something was refused, and the code has caught the exception."""
        if self.refusal is not None:
            raise UntraceableError(self.refusal)

    def _is_attribute(self, tensor: Tensor) -> bool:
        known = (*self.root.parameters(), *self.root.buffers(), *self.tensor_attrs)
        return any(tensor is other for other in known)


class Value(fx.Proxy):
    """A proxy that does not answer questions about the value it stands for, and knows ``x += y`` from ``x + y``."""

    tracer: ReplayTracer

    @property  # type: ignore[misc]  # nobody sets it
    def __class__(self) -> Any:
        frame = sys._getframe(1)
        if not _harmless(frame):
            self.tracer.refuse(f"{frame.f_code.co_name} asks for the type of a value")
        return type(self)

    def __getattr__(self, k: str) -> Attribute:
        frame = sys._getframe(1)
        if "CALL" in _opname(frame.f_code, frame.f_lasti) and not _harmless(frame):
            self.tracer.refuse(f"{frame.f_code.co_name} asks whether a value has the attribute {k}")
        return _ValueAttribute(self, k)

    def __setattr__(self, name: str, value: object) -> None:
        if name not in {"node", "tracer", "root", "attr", "_node"}:
            self.tracer.refuse(f"it sets the attribute {name} of a value")
        super().__setattr__(name, value)


class _ValueAttribute(Value, Attribute):
    """An attribute of a value, or the method that it is about to call."""


def _harmless(frame: FrameType) -> bool:
    return _is_harmless_file(frame.f_code.co_filename)


@cache
def _is_harmless_file(name: str) -> bool:
    return any(part in name.replace("\\", "/") for part in _HARMLESS)


def _opname(code: CodeType, offset: int) -> str:
    return dis.opname[code.co_code[offset]]


def _in_place(function: Callable[..., Any]) -> Callable[[Value, object], fx.Proxy]:
    def method(self: Value, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


def _refused(what: str) -> Callable[..., NoReturn]:
    def method(self: Value, *_: object) -> NoReturn:
        self.tracer.refuse(f"it {what}")

    return method


for _function in _IN_PLACE:
    setattr(Value, f"__{_function.__name__}__", _in_place(_function))
for _name, _what in _ASKED.items():
    setattr(Value, f"__{_name}__", _refused(_what))
