"""effective_decay: weight decay on what expanded layers stand for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fxexpand.algebra.refusal import Refusal
from fxexpand.errors import ExpansionError
from fxexpand.graph.collapsed import Collapsed
from fxexpand.graph.expanded import Expanded
from fxexpand.graph.modes import exact_products
from fxexpand.graph.sharded import is_spread, sharded_part
from fxexpand.optim.expansions import expansions_of


def effective_decay(model: nn.Module) -> Tensor:
    """½ Σ ‖W‖² over the expansions of ``model``, W the weight of the one layer that each stands for; differentiable.

    Before:  loss = criterion(model(x), y), and an optimiser with weight decay λ on every factor of W = C·B·A
    After:   loss = criterion(model(x), y) + λ * effective_decay(model), and none on the factors (``parameter_groups``)

    Identity: ∂(λ · ½‖W‖²)/∂W = λ·W, which is what SGD's ``weight_decay=λ`` adds to the gradient of the compact layer's
    weight. Each factor gets its share by the chain rule: for W = B·A that is λ·Bᵀ·W for A, and λ·W·Aᵀ for B. Biases
    are left out. In the loss, it goes through an optimiser's moments: with AdamW, too, it is the L2 penalty of Adam.

    A collapsed expansion has composed W in the forward, and that is what is taken, with its graph: the penalty costs
    no second composition, from its second call for a model on. So call it after the forward, in the step whose loss
    it joins, and go backward once through their sum; separate ``backward`` calls need ``retain_graph=True``, as for
    all that shares a graph. W is composed anew for expansions that run layer by layer, before the first forward and
    after ``backward``, after a forward without gradients, in a model under ``torch.compile``, under ``torch.func``,
    on another thread, for whoever asks a second time, and when a parameter has changed since the forward as torch
    counts changes. A write that torch does not count (in place through ``.data``) between the forward and this call
    is not seen: the penalty is then that of the weights that the loss was computed with.

    An expansion in which no weight requires a gradient is left out, as optimisers leave it out. One that is called
    twice counts once, one inside another counts as part of it. Regions that nobody expanded, which ``collapse`` also
    runs as one layer, are no expansions: their layers are ordinary ones, and decay as such. Without expansions it is 0,
    so that the compact model trains with the same code. A scalar on the device of the first expansion, float32 or
    float64: the squares of half-precision weights are summed in float32.

    The custom L2 of RepVGG (Ding et al. 2021, ``get_custom_L2`` in their code) is this penalty for a 3×3 and a 1×1
    branch with batch norm, but for three things: it takes the 3×3 kernel K₃ as it is, and only the centre point as
    batch norm scales it, (t₃·K₃ + t₁·K₁)² / (t₃² + t₁²); it takes the scales t for constants; and it leaves the
    identity branch out. Here W is the whole kernel, as it will be deployed. Batch norm in branches scales them by its
    running statistics, as ``contract`` will, also while it trains; as there, no gradient goes through the statistics.

    In data-parallel training it is the same in each process, and so is its share of the averaged gradients. Under
    ``fully_shard`` the model has to be collapsed, and its parameters whole from the forward to the backward: those of
    the root are, an expansion that is sharded by itself needs ``reshard_after_forward=False``.

    Raises ``ExpansionError`` where an expansion is not one layer at the moment (hooks on its layers, other layers), or
    its layers stand outside of one, where its parameters are spread over several processes, and for what is no module.
    """
    if not isinstance(model, nn.Module):
        found = type(model).__name__
        raise ExpansionError(f"effective_decay: expected a torch.nn.Module, found {found}. Pass the model itself.")
    terms = [_half_squares(_weight(path, expanded, model)) for path, expanded in _trained(model)]
    if not terms:
        return _zero(model)
    total, *others = terms
    for term in others:
        total = total + term.to(total.device)
    return total


def _trained(model: nn.Module) -> list[tuple[str, Expanded]]:
    found: list[tuple[str, Expanded]] = []
    for path, expanded in expansions_of(model, "effective_decay"):
        parameters = dict(expanded.named_parameters())
        if not parameters or any(map(is_spread, parameters.values())):
            what = "sharded ones" if parameters else "none: another module has taken them"
            raise ExpansionError(f"{_place(path, expanded)}: expected whole parameters, found {what}. {_GATHERED}")
        if _has_a_trained_weight(parameters):
            found.append((path, expanded))
    return found


def _has_a_trained_weight(parameters: Mapping[str, Tensor]) -> bool:
    """Whether a weight is not frozen; what ``torch.func`` puts in a parameter's place is no parameter, and never is."""
    weights = [tensor for name, tensor in parameters.items() if not name.endswith("bias")]
    return any(tensor.requires_grad or not isinstance(tensor, nn.Parameter) for tensor in weights)


def _weight(path: str, expanded: Expanded, model: nn.Module) -> Tensor:
    """(n, m / groups, *k)."""
    if isinstance(expanded, Collapsed):
        found = expanded.weight_of_step()
    else:
        with exact_products(next(expanded.parameters()).device.type):
            whole = expanded.as_kernel(running=True)
        found = whole if isinstance(whole, Refusal) else whole.weight
    if isinstance(found, Refusal):
        remedy = _GATHERED if sharded_part(model) else f"Undo that, or {_FACTORS}"
        raise ExpansionError(
            f"{_place(path, expanded)}: expected layers that form one, whose weight decays, found: {found}. {remedy}"
        )
    return found


_FACTORS = "let the factors decay: parameter_groups(model, weight_decay, mode='factors')."
_GATHERED = (
    "Collapse the model before it is sharded, shard its expansions with reshard_after_forward=False, and call "
    f"effective_decay between the forward and the backward; or {_FACTORS}"
)


def _place(path: str, expanded: Expanded) -> str:
    return f"effective_decay: {path or 'the model'} ({expanded.origin.description})"


def _half_squares(weight: Tensor) -> Tensor:
    """½‖weight‖², the gradient of which is the weight itself, to the last bit."""
    wide = weight if weight.dtype == torch.float64 else weight.float()
    return wide.square().sum() / 2


def _zero(model: nn.Module) -> Tensor:
    beside = next(model.parameters(), None)
    return torch.zeros((), device=None if beside is None else beside.device)
