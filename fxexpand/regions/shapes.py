"""The shapes of the values of graphs, for one set of example inputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor, fx, nn

from fxexpand.errors import FxExpandError
from fxexpand.report.run import copied, undisturbed

# The shape of each node of a graph module, by its id; of nodes with one shape at every call.
Shapes: TypeAlias = "dict[fx.Node, tuple[int, ...]]"


def shapes_of(model: nn.Module, inputs: tuple[object, ...], task: str) -> Shapes:
    """The shapes of all values of all graphs in ``model`` when it runs on ``inputs``, in eval mode.

    Empty without inputs. Raises ``FxExpandError`` when the model does not run on them.
    """
    shapes: Shapes = {}
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
    return {node: shape for node, shape in shapes.items() if node not in ambiguous}


class _Recorder(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, shapes: Shapes, ambiguous: set[fx.Node]) -> None:
        super().__init__(gm)
        self.shapes, self.ambiguous = shapes, ambiguous

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            shape = tuple(value.shape)
            if self.shapes.setdefault(n, shape) != shape:
                self.ambiguous.add(n)
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
