"""The backend of torch.compile: linear regions are composed in the graph, then another backend compiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fxexpand.errors import FxExpandError, did_you_mean
from fxexpand.pipeline.collapse_graph import collapse_graph

NAME = "fxexpand"


def backend(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """Compile the graph ``gm``, with its linear regions composed in it: ``torch.compile(model, backend="fxexpand")``.

    Before:  y = conv2d(conv2d(x, w₁), w₂)
    After:   w = w₂ ∘ w₁; y = conv2d(x, w), both compiled

    For inference and for training: weights are inputs of the graph, and none of their values are kept, so a weight
    that changes, or a second model of the same class, needs no new code. A region is composed where that makes a
    training step cheaper, by the model that ``collapse`` uses, for the shapes the graph was captured with.

    Inductor compiles the result, with ``mode`` and ``options`` as ``torch.compile`` takes them for it;
    ``options={"backend": ...}`` names another backend, or is one. Raises ``FxExpandError`` for what is no backend, and
    for a mode or an option that Inductor does not know.
    """
    rest = dict(options or {})
    inner = rest.pop("backend", "inductor")
    found = collapse_graph(gm)
    compile_rest = _inductor(mode, rest) if inner == "inductor" else _other(inner, mode, rest)
    compiled: Callable[..., Any] = compile_rest(gm if found is None else found, example_inputs)
    return compiled


def _inductor(mode: str | None, options: dict[str, Any]) -> Callable[..., Any]:
    known, modes = torch._inductor.list_options(), torch._inductor.list_mode_options()
    for name in options:
        if name.replace("-", "_") not in known:
            raise FxExpandError(
                f"torch.compile(backend={NAME!r}): expected options={{'backend': ...}} and options of Inductor, found "
                f"{name!r}.{did_you_mean(name, ('backend', *known))} torch._inductor.list_options() has them all."
            )
    if mode is not None and mode not in modes:
        raise FxExpandError(
            f"torch.compile(backend={NAME!r}): expected mode to be one of {', '.join(modes)}, found {mode!r}."
        )
    patches = {**modes[mode or "default"], **{name.replace("-", "_"): value for name, value in options.items()}}
    return lambda gm, inputs: torch._inductor.compile(gm, list(inputs), options=patches)


def _other(inner: Any, mode: str | None, options: dict[str, Any]) -> Callable[..., Any]:
    known = torch._dynamo.list_backends(exclude_tags=())
    if inner == NAME or not (callable(inner) or inner in known):
        raise FxExpandError(
            f"torch.compile(backend={NAME!r}): expected options={{'backend': ...}} to name another backend, or to be a "
            f"function (gm, inputs) -> callable, found {inner!r}. Known are: {', '.join(sorted(known))}."
        )
    compile_rest = torch._dynamo.lookup_backend(inner)
    given = {name: value for name, value in (("mode", mode), ("options", options)) if value}
    return lambda gm, inputs: compile_rest(gm, inputs, **given)
