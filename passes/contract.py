"""contract: the inverse of expand."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, fx, nn

from fxexpand.algebra.kernel import Kernel
from fxexpand.algebra.memory_format import common_format
from fxexpand.algebra.refusal import Refusal
from fxexpand.errors import ContractionError
from fxexpand.graph.assembly import TRAINING
from fxexpand.graph.counterpart import Counterpart
from fxexpand.graph.expanded import CallOrigin, Expanded, LayerOrigin, strays
from fxexpand.graph.layers import has_hooks
from fxexpand.graph.norms import NormUses
from fxexpand.graph.occurrences import edits_of
from fxexpand.graph.rewrite import Edit, FunctionStep, ModuleStep, rewrite
from fxexpand.graph.trace import check_model
from fxexpand.graph.traced import copy_model
from fxexpand.graph.tree import replace_modules
from fxexpand.passes.collapse import release_all


def contract(model: nn.Module) -> nn.Module:
    """A copy of an expanded model in which every expanded layer is again the plain layer it was.

    Before:  y = features_0.reduce(features_0.kernel(features_0.expand(x)))
    After:   y = features_0(x)

    Identity: W₃ * (W₂ * (W₁ * x)) = (W₃ ∘ W₂ ∘ W₁) * x. The class, name, hyperparameters and flags are the old ones, so
    the ``state_dict`` loads strictly into the original architecture. A bias that batch norm in branches has added to a
    layer without one is taken off the running mean of the batch norm behind it: (y + b) − μ = y − (μ − b). Composed in
    float64 and cast once to the dtype that the new layers have now. Everything else stays.

    Raises ``ContractionError`` when nothing in the model was expanded, or when the layers of an expansion no longer
    make up one layer: an activation between them, a value read or returned from between them, changed hyperparameters.
    Also for a model that is sharded over several processes: gather it first.
    """
    check_model(model, "contract", ContractionError)
    if stray := strays(model):
        raise ContractionError(
            f"{stray[0]}: a layer of an expansion, found outside of one: another pass has kept only what its graph "
            "calls (torch.fx.symbolic_trace and Transformer do). Contract before it, or load the state_dict into "
            "expand(model, the same rules) and contract that."
        )
    if not any(isinstance(module, Expanded) for module in model.modules()):
        _check_is_no_counterpart(model)
        raise ContractionError(
            "contract: expected a model that fxexpand.expand has made, found no expanded layer in it. "
            "Pass the expanded model itself; fusing layers that were never expanded is another pass."
        )
    work = copy_model(model, share=False)
    release_all(work)
    while expansions := _innermost(work):
        plans = [_plan(work, path, expanded) for path, expanded in expansions.items()]
        work = _install(work, plans)
    return work


def _check_is_no_counterpart(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, Counterpart):
            raise ContractionError(
                f"{path or 'the model'}: expected an expansion, found the nonlinear counterpart of one: its layers are "
                "not one layer. Contract transfer(counterpart, expanded)."
            )


@dataclass(frozen=True)
class _Plan:
    expanded: Expanded
    kernel: Kernel
    edits: tuple[Edit, ...]
    norms: tuple[nn.modules.batchnorm._BatchNorm, ...] = ()  # those that take the bias, where the layer had none


def _innermost(model: nn.Module) -> dict[str, Expanded]:
    """path -> expansion, of those that hold no other."""
    found = {path: module for path, module in model.named_modules() if isinstance(module, Expanded)}
    return {
        path: module
        for path, module in found.items()
        if not any(isinstance(m, Expanded) for m in module.modules() if m is not module)
    }


def _plan(work: nn.Module, path: str, expanded: Expanded) -> _Plan:
    if has_hooks(expanded):
        raise ContractionError(f"{path}: it has forward or backward hooks, which would be lost. Remove them first.")
    kernel = expanded.as_kernel(torch.float64)
    if isinstance(kernel, Refusal):
        if kernel.reason == TRAINING:
            raise ContractionError(f"{path}.{kernel}.")
        raise ContractionError(f"{path}: its layers are no longer one layer: {kernel}. Undo the change, or keep them.")
    dtype = next(expanded.parameters()).dtype
    if not kernel.fits(dtype):
        raise ContractionError(
            f"{path}: its layers make up a weight or bias beyond the range of {dtype}. Contract model.float(), and "
            "cast what fits."
        )
    edits: list[Edit] = []
    for gm in work.modules():
        if isinstance(gm, fx.GraphModule):
            for found in edits_of(gm, expanded, partial(_step, expanded=expanded)):
                if isinstance(found, Refusal):
                    raise ContractionError(f"{path}: {found}. Undo the change, or contract before it.")
                edits.append(found)
    sheds = kernel.bias is not None and not expanded.origin.geometry.has_bias
    norms = NormUses.of(work).behind([(edit.graph_module, edit.nodes[-1]) for edit in edits]) if sheds else []
    if norms is None:
        raise ContractionError(
            f"{path}: its branches add a bias, which the layer had not, and the batch norm that was to take it does "
            "not follow any more, or is not its alone. Undo the change, or contract before it."
        )
    return _Plan(expanded, kernel.detach(), tuple(edits), tuple(norms))


def _step(path: str, expanded: Expanded) -> ModuleStep | FunctionStep:
    """What stands for the expansion at ``path`` once it is a layer again."""
    origin = expanded.origin
    if isinstance(origin, LayerOrigin):
        return ModuleStep(path)
    owner = path.rpartition(".")[0]
    bias = None if origin.bias is None else f"{owner}.{origin.bias}".lstrip(".")
    return FunctionStep(origin.function, (path, bias), origin.settings)


def _install(work: nn.Module, plans: list[_Plan]) -> nn.Module:
    layers: dict[int, nn.Module] = {}
    for plan in plans:
        for norm in plan.norms:
            cast(Tensor, norm.running_mean).sub_(cast(Tensor, plan.kernel.bias))
        origin = plan.expanded.origin
        if isinstance(origin, LayerOrigin):
            layers[id(plan.expanded)] = _restored(plan.expanded, plan.kernel, origin)
        else:
            _restore_parameters(work, plan, origin)
    replace_modules(work, layers)
    rewrite(edit for plan in plans for edit in plan.edits)
    return layers.get(id(work), work)


def _restored(expanded: Expanded, kernel: Kernel, origin: LayerOrigin) -> nn.Module:
    """The layer as it was: its own class and attributes, with the composed weight and bias."""
    layer = copy.deepcopy(origin.template)
    layer.training = expanded.training
    weight, bias = _parameters(expanded, kernel)
    bias = bias if origin.geometry.has_bias else None
    layer._parameters.update({**expanded._parameters, "weight": weight, "bias": bias})
    layer._buffers.update(expanded._buffers)
    return layer


def _restore_parameters(work: nn.Module, plan: _Plan, origin: CallOrigin) -> None:
    """Give the owner of a functional call's weight its parameters back, in their old order."""
    weight, bias = _parameters(plan.expanded, plan.kernel)
    for owner in list(work.modules()):
        for name in [name for name, child in owner._modules.items() if child is plan.expanded]:
            del owner._modules[name]
            held = {**owner._parameters, name: weight}
            if origin.bias is not None:
                held[origin.bias] = bias
            ordered = {key: held[key] for key in origin.parameters if key in held} | held
            owner._parameters.clear()
            owner._parameters.update(ordered)


def _parameters(expanded: Expanded, kernel: Kernel) -> tuple[nn.Parameter, nn.Parameter | None]:
    """The composed weight and bias with the dtype, memory format and flags that the layers have now."""
    weights = [p for name, p in expanded.named_parameters() if name.endswith(".weight") and p.dim() > 1]
    biases = [p for name, p in expanded.named_parameters() if name.endswith(".bias")]
    weight = kernel.weight.to(weights[0].dtype, memory_format=common_format(weights))
    bias = None if kernel.bias is None else _parameter(kernel.bias.to(weights[0].dtype), biases)
    return _parameter(weight, weights), bias


def _parameter(value: Tensor, factors: list[nn.Parameter]) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=any(factor.requires_grad for factor in factors))
