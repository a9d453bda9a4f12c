"""parameter_groups: which parameters an optimiser decays."""

from __future__ import annotations

from collections.abc import Iterator
from numbers import Real
from typing import Any

from torch import nn

from fxexpand.errors import FxExpandError
from fxexpand.graph.expanded import Expanded
from fxexpand.graph.sharded import is_flattened
from fxexpand.optim.expansions import expansions_of
from fxexpand.report.run import check_module

MODES = ("factors", "effective", "none")

_NORMS: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase,  # batch norm, also synchronised and lazy, and instance norm
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)
_PARAMETRIZED = "parametrizations"  # where torch keeps the parameters that a parametrized tensor is computed of


def parameter_groups(model: nn.Module, weight_decay: float, mode: str = "factors") -> list[dict[str, Any]]:
    """The trainable parameters of ``model`` for any optimiser of torch, by what ``weight_decay`` means for them.

    Before:  SGD(big.parameters(), lr, weight_decay=1e-4)
    After:   SGD(parameter_groups(big, 1e-4, "effective"), lr), and 1e-4 * effective_decay(big) in the loss

    | ``"name"`` | parameters                                 | decay in mode factors, effective, none       |
    |------------|--------------------------------------------|----------------------------------------------|
    | weights    | those of layers that are not expanded      | ``weight_decay`` in all three                |
    | factors    | weights of the layers of expansions        | ``weight_decay``, 0, 0                       |
    | exempt     | biases, norms, other vectors               | 0 in all three                               |

    ``mode`` is about the expanded layers only:

    - ``"factors"``: each factor decays as any weight does, which is what the paper does (Guo et al. 2020). It is
      another penalty than the compact layer's: for W = B·A the least ½(‖A‖² + ‖B‖²) is the nuclear norm of W (Srebro,
      Rennie and Jaakkola 2004).
    - ``"effective"``: the product decays, as the compact layer would: add ``weight_decay * effective_decay(model)`` to
      the loss. That term does it; these groups only keep the factors out of the ordinary decay.
    - ``"none"``: what was expanded does not decay at all. The groups are those of "effective", without that term.

    Exempt are the parameters of norm layers (batch, instance, layer, group, RMS), biases (known by "bias" as a word of
    their name: ``in_proj_bias``, ``bias_hh_l0``, ``relative_position_bias_table``), all others with fewer than two
    axes, which scale channels (gains, slopes of PReLU), and embeddings with sparse gradients, which no optimiser of
    torch can decay. Other embeddings decay: practice differs, and to the layers after it an embedding is a weight. A
    parameter with several names is exempt if one of them says so, and a factor if one of them is in an expansion.

    Every trainable parameter is in exactly one group, in the order of ``named_parameters``, frozen ones are in none. A
    group that would be empty is left out. Wrappers (``torch.compile``, distributed training) are looked through, and
    what ``fully_shard`` has sharded is grouped as what it is a part of.

    Raises ``FxExpandError`` for a decay that is no finite number of at least 0, another mode, what is no module, a lazy
    model that has not run, parameters that ``FullyShardedDataParallel`` has flattened, and a model without trainable
    parameters; ``ExpansionError`` as ``effective_decay`` does, for layers of an expansion that stand outside of one,
    unless mode is "factors".
    """
    check_module(model, "parameter_groups", FxExpandError)
    _check_arguments(weight_decay, mode)
    held = _in_expansions(model, mode)
    kinds: dict[str, str] = {}  # by the first name of each parameter
    first: dict[int, str] = {}
    trainable = dict(_trainable(model))
    for name, parameter in trainable.items():
        if is_flattened(parameter):
            raise FxExpandError(
                f"parameter_groups: {name}: expected a parameter with the axes of its layer, found one that "
                "FullyShardedDataParallel has flattened. Make the groups before the model is wrapped, with "
                "use_orig_params=True, or shard it by fully_shard."
            )
        kind = _kind(model, name, parameter, held)
        known = first.setdefault(id(parameter), name)
        kinds[known] = min(kind, kinds.get(known, kind), key=_STRONGEST.index)
    if not kinds:
        raise FxExpandError(
            f"parameter_groups: expected a model with trainable parameters, found none among the "
            f"{len(list(model.parameters()))} of this {type(model).__name__}. Unfreeze some with requires_grad_()."
        )
    decays = {"weights": weight_decay, "factors": weight_decay if mode == "factors" else 0.0, "exempt": 0.0}
    groups: list[dict[str, Any]] = [
        {
            "name": kind,
            "params": [trainable[name] for name, found in kinds.items() if found == kind],
            "weight_decay": float(decay),
        }
        for kind, decay in decays.items()
    ]
    return [group for group in groups if group["params"]]


# Of a parameter with several names: the first of these that one of them calls for.
_STRONGEST = ("exempt", "factors", "weights")


def _trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """All names of all parameters that require a gradient."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            yield name, parameter


def _in_expansions(model: nn.Module, mode: str) -> set[int]:
    """The ids of the parameters of expansions."""
    if mode == "factors":
        return {id(p) for module in model.modules() if isinstance(module, Expanded) for p in module.parameters()}
    return {id(p) for _, expanded in expansions_of(model, "parameter_groups") for p in expanded.parameters()}


def _kind(model: nn.Module, path: str, parameter: nn.Parameter, held: set[int]) -> str:
    owner, name = _owner_and_name(model, path)
    sparse = isinstance(owner, (nn.Embedding, nn.EmbeddingBag)) and owner.sparse
    if isinstance(owner, _NORMS) or "bias" in name.split("_") or parameter.dim() < 2 or sparse:
        return "exempt"
    return "factors" if id(parameter) in held else "weights"


def _owner_and_name(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that ``path`` is a parameter of, and its name there; of what it parametrizes, if it does."""
    parts = path.split(".")
    if _PARAMETRIZED in parts:
        owner = parts.index(_PARAMETRIZED)
        parts = [*parts[:owner], parts[owner + 1]]
    return model.get_submodule(".".join(parts[:-1])), parts[-1]


def _check_arguments(weight_decay: object, mode: object) -> None:
    number = isinstance(weight_decay, Real) and not isinstance(weight_decay, bool)
    if not (number and 0 <= float(weight_decay) < float("inf")):  # type: ignore[arg-type]  # so false for NaN
        raise FxExpandError(
            f"parameter_groups: weight_decay: expected a finite number of at least 0, found {weight_decay!r}. "
            "Pass what SGD's weight_decay would be for the compact network, 1e-4 for one."
        )
    if mode not in MODES:
        expected = ", ".join(map(repr, MODES))
        raise FxExpandError(f"parameter_groups: mode: expected one of {expected}, found {mode!r}. Use one of those.")
