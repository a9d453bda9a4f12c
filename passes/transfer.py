"""transfer: what the nonlinear counterpart has learnt, back in the expanded model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fxexpand.errors import ExpansionError
from fxexpand.graph.counterpart import Counterpart, activations_of
from fxexpand.graph.expanded import Expanded
from fxexpand.graph.structure import leaves
from fxexpand.graph.trace import check_model
from fxexpand.graph.traced import copy_model

_REMEDY = "Pass the expanded model that the counterpart was made of, or one expanded by the same rules."


def transfer(counterpart: nn.Module, expanded: nn.Module, *, inplace: bool = False) -> nn.Module:
    """A copy of ``expanded`` with the weights and buffers of its nonlinear ``counterpart``.

    Before:  y = reduce(σ(kernel(σ(expand(x)))))        trained
    After:   y = reduce(kernel(expand(x)))              with these weights, to be trained on

    All that the ``state_dict`` has: the new layers, and the rest of the model, batch norm's statistics included. The
    activations stay behind, and what they have learnt (the slopes of ``nn.PReLU``) with them. ``expanded``, which may
    be collapsed, keeps its form, dtype, device and flags. With ``inplace=True`` it takes the weights itself.

    Raises ``ExpansionError``, and changes nothing, where the two do not belong together: other expansions, other layers
    in them, other parameters or shapes.
    """
    check_model(counterpart, "transfer")
    check_model(expanded, "transfer")
    _check_kinds(counterpart, expanded)
    _check_expansions(counterpart, expanded)
    state = _state_without_activations(counterpart)
    _check_state(state, expanded.state_dict())
    result = expanded if inplace else copy_model(expanded, share=False)
    result.load_state_dict(state)
    return result


def _check_kinds(counterpart: nn.Module, expanded: nn.Module) -> None:
    if not any(isinstance(module, Counterpart) for module in counterpart.modules()):
        raise ExpansionError(
            f"transfer: expected first a model that fxexpand.counterpart has made, found {_kind(counterpart)}. "
            "Use transfer(counterpart, expanded)."
        )
    if not any(isinstance(module, Expanded) for module in expanded.modules()):
        raise ExpansionError(
            f"transfer: expected second a model that fxexpand.expand has made, found {_kind(expanded)}. {_REMEDY}"
        )


def _kind(model: nn.Module) -> str:
    kinds = {Counterpart: "a counterpart", Expanded: "an expanded model"}
    held = (kind for cls, kind in kinds.items() if any(isinstance(module, cls) for module in model.modules()))
    return next(held, f"{type(model).__name__} without expansions")


def _check_expansions(counterpart: nn.Module, expanded: nn.Module) -> None:
    ours = {path: module for path, module in counterpart.named_modules() if isinstance(module, Counterpart)}
    theirs = {path: module for path, module in expanded.named_modules() if isinstance(module, Expanded)}
    for path in [*ours, *theirs]:
        where = path or "the model"
        if path not in ours or path not in theirs:
            which = "counterpart" if path in ours else "expanded model"
            raise ExpansionError(
                f"{where}: expected an expansion in both models, found one in the {which} only. {_REMEDY}"
            )
        mine, other = ours[path], theirs[path]
        for name, value in vars(mine.origin.geometry).items():
            wanted = vars(other.origin.geometry)[name]
            if value != wanted:
                raise ExpansionError(
                    f"{where}: expected the expansion of a layer with {name} {wanted}, as in the expanded model, found "
                    f"{value} in the counterpart. {_REMEDY}"
                )
        parts, expected = mine.parts(), [(inner, type(module).__name__) for inner, module in leaves(other)]
        for part in [*parts, *expected]:
            if part not in parts or part not in expected:
                which = "counterpart" if part in parts else "expanded model"
                raise ExpansionError(
                    f"{where}: expected the same layers in both models, found {part[0]} ({part[1]}) in the "
                    f"{which} only. {_REMEDY}"
                )


def _state_without_activations(counterpart: nn.Module) -> dict[str, Any]:
    between = tuple(f"{path}." for path in activations_of(counterpart))
    return {key: value for key, value in counterpart.state_dict().items() if not key.startswith(between)}


def _check_state(state: dict[str, Any], expected: dict[str, Any]) -> None:
    for key in [*state, *expected]:
        if key not in state or key not in expected:
            which = "counterpart" if key in state else "expanded model"
            raise ExpansionError(f"{key}: expected it in both models, found it in the {which} only. {_REMEDY}")
        ours, theirs = state[key], expected[key]
        if isinstance(ours, Tensor) and isinstance(theirs, Tensor) and ours.shape != theirs.shape:
            raise ExpansionError(
                f"{key}: expected shape {tuple(theirs.shape)}, as in the expanded model, found {tuple(ours.shape)} in "
                f"the counterpart. {_REMEDY}"
            )
