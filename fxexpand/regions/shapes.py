"""The shapes and dtypes of the values of graphs, for one set of example inputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxexpand.errors import FxExpandError
from fxexpand.report.run import copied, undisturbed


class Shapes(dict[fx.Node, tuple[int, ...]]):
    """The shape of each node that gives a tensor, if it is the same at every call; ``dtypes`` has its dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: dict[fx.Node, torch.dtype] = {}

    def note(self, node: fx.Node, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Say what ``node`` gives."""
        self[node], self.dtypes[node] = shape, dtype


def shapes_of(model: nn.Module, inputs: tuple[object, ...], task: str) -> Shapes:
    """The shapes and dtypes of all values of all graphs in ``model`` when it runs on ``inputs``, in eval mode.

    Empty without inputs. Raises ``FxExpandError`` when the model does not run on them.
    """
    shapes = Shapes()
    if not inputs:
        return shapes
    graphs = [module for module in model.modules() if isinstance(module, fx.GraphModule)]
    ambiguous: set[fx.Node] = set()
    try:
        for gm in graphs:
            vars(gm)["forward"] = _recording(gm, shapes, ambiguous)
        with undisturbed(model, inputs):
            model(*copied(inputs))
    except Exception as error:
        raise FxExpandError(
            f"{task}: expected example inputs that the model runs on, found {type(error).__name__}: {error}. "
            "Pass the arguments of model(...), one after another."
        ) from error
    finally:
        for gm in graphs:
            vars(gm).pop("forward", None)
    for node in ambiguous:
        del shapes[node], shapes.dtypes[node]
    return shapes


class _Recorder(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, shapes: Shapes, ambiguous: set[fx.Node]) -> None:
        super().__init__(gm)
        self.shapes, self.ambiguous = shapes, ambiguous

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            shape = tuple(value.shape)
            if n in self.shapes and (self.shapes[n], self.shapes.dtypes[n]) != (shape, value.dtype):
                self.ambiguous.add(n)
            self.shapes.note(n, shape, value.dtype)
        return value


def _recording(gm: fx.GraphModule, shapes: Shapes, ambiguous: set[fx.Node]) -> Callable[..., Any]:
    signature = inspect.signature(type(gm).forward)
    names = [str(node.target) for node in gm.graph.nodes if node.op == "placeholder"]

    def forward(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(gm, *args, **kwargs)
        bound.apply_defaults()
        given: list[Any] = []
        for name in names:
            value = bound.arguments[name.lstrip("*")]
            given += list(value) if name.startswith("*") and not name.startswith("**") else [value]
        return _Recorder(gm, shapes, ambiguous).run(*given)

    return forward
