"""Which modules are layers, and what about a layer makes it more than its weight and bias."""

from __future__ import annotations

from types import CodeType, FunctionType

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from fxexpand.algebra.refusal import Refusal
from fxexpand.graph.geometry import CONVOLUTIONS, DIMS

_TRANSPOSED: tuple[type[nn.Module], ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Batch norm in all its classes, of which the synchronised one is no layer by itself: it talks to other processes.
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_LAYERS = frozenset((*CONVOLUTIONS, *_TRANSPOSED, nn.Linear, *BATCH_NORMS[:3]))
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def is_layer(module: nn.Module) -> bool:
    """Whether ``module`` is a convolution, linear or batch-norm layer that computes what its torch class computes.

    A subclass that keeps ``forward`` is one; a subclass, or an object, that has a ``forward`` of its own is not.
    """
    cls = type(module)
    if cls in _LAYERS:
        return "forward" not in vars(module)
    return any(_computes_as(module, base) for base in cls.__mro__ if base in _LAYERS)


def is_expandable_class(module: nn.Module) -> bool:
    """Whether ``module`` is one of the layers that strategies are about, or such a layer in quantized form."""
    return is_quantized(module) or any(isinstance(module, base) and _computes_as(module, base) for base in DIMS)


def is_opaque(module: nn.Module) -> bool:
    """Whether ``module`` belongs to torch itself and runs as one unit (attention, recurrent layers, scripts, ...).

    Such a module may read its layers' weights in fused kernels, without calling them.
    """
    cls = type(module)
    if cls.__module__ == parametrize.__name__ and parametrize.is_parametrized(module):
        cls = cls.__mro__[1]  # a class that torch has made of the module's own
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict, fx.GraphModule)
    return cls.__module__.startswith("torch.") and not isinstance(module, containers)


def hooks_of(module: nn.Module) -> list[object]:
    """The hooks that calling ``module`` runs, forward and backward."""
    return [hook for name in _HOOKS for hook in (getattr(module, name, None) or {}).values()]


def has_hooks(module: nn.Module) -> bool:
    """Whether calling ``module`` runs somebody's hook."""
    return any(getattr(module, name, None) for name in _HOOKS)


def is_quantized(module: nn.Module) -> bool:
    """Whether ``module`` is a quantized ``Linear`` or ``ConvNd``."""
    cls = type(module)
    return cls.__module__.startswith("torch.ao.nn.") and cls.__name__ in {base.__name__ for base in DIMS}


def peculiarity(layer: nn.Module) -> Refusal | None:
    """What makes ``layer`` more than a weight and a bias, so that replacing it would lose something; or None."""
    if is_quantized(layer):
        return Refusal("its weight is quantized; expand the floating-point model, and quantize after contracting")
    if parametrize.is_parametrized(layer):
        names = ", ".join(sorted(layer.parametrizations))  # type: ignore[arg-type]
        return Refusal(
            f"its {names} is parametrized (weight norm, spectral norm, ...); "
            "call torch.nn.utils.parametrize.remove_parametrizations first"
        )
    weight = layer._parameters.get("weight")
    if weight is not None and torch.nn.parameter.is_lazy(weight):
        return Refusal("its shape is not known yet; run the model once on a batch first")
    if weight is None:
        return Refusal("its weight is computed by a hook (weight norm, pruning, ...); make it permanent first")
    if has_hooks(layer) or any(getattr(layer, name, None) for name in _STATE_HOOKS):
        return Refusal("it has hooks (forward, backward or state_dict), which would be lost; remove them first")
    held = [p for p in layer._parameters.values() if p is not None]
    if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in held):
        return Refusal("its weight or bias has gradient hooks, which would be lost; remove them first")
    for name in ("weight", "bias"):
        if getattr(layer, name, None) is not layer._parameters.get(name):
            return Refusal(f"its {name} is no parameter, but a buffer or what its class computes; make it one first")
    if layer._modules:
        return Refusal(f"it holds modules of its own ({', '.join(layer._modules)})")
    return dtype_refusal(weight)


def dtype_refusal(weight: Tensor) -> Refusal | None:
    """Why a weight of this kind cannot be factorised, or None."""
    if weight.dtype in _FLOATS:
        return None
    kind = "complex" if weight.is_complex() else str(weight.dtype).removeprefix("torch.")
    return Refusal(f"its weight is {kind}; expected a floating-point weight (float16, bfloat16, float32 or float64)")


def _computes_as(module: nn.Module, base: type[nn.Module]) -> bool:
    cls, names = type(module), ("forward", "_conv_forward", "_call_impl", "__call__")
    kept = cls is base or all(getattr(cls, name, None) is getattr(base, name, None) for name in names)
    return kept and "forward" not in vars(module)


def attributes_named(cls: type) -> set[str]:
    """Every name that the code of a class, torch's own base classes aside, uses for an attribute or a global."""
    own = [base for base in cls.__mro__ if not base.__module__.startswith("torch.") and base is not object]
    waiting = [f.__code__ for base in own for f in vars(base).values() if isinstance(f, FunctionType)]
    names: set[str] = set()
    while waiting:
        code = waiting.pop()
        names.update(code.co_names)
        waiting += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return names
