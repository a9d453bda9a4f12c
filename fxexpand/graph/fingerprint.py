"""Whether a module is still what a pass has seen in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

from fxexpand.graph.layers import has_hooks

_INTERNAL = frozenset(vars(nn.Module()))
_SIMPLE = (bool, int, float, str, tuple, type(None))
_DROPOUTS = (nn.modules.dropout._DropoutNd,)


@dataclass(frozen=True)
class Fingerprint:
    """The class, settings, shapes and modes of a module, and of those inside it.

    ``settings`` are its plain attributes, ``tensors`` the shapes of parameters and buffers, None where there is none.
    """

    cls: type[nn.Module]
    settings: tuple[tuple[str, Any], ...]
    tensors: tuple[tuple[str, tuple[int, ...] | None], ...]
    switched: bool
    inner: tuple[tuple[str, Fingerprint], ...]

    @staticmethod
    def of(module: nn.Module) -> Fingerprint:
        """That of ``module`` as it is now."""
        plain = {name: value for name, value in vars(module).items() if name not in _INTERNAL}
        tensors: dict[str, Tensor | None] = {**module._parameters, **module._buffers}
        return Fingerprint(
            type(module),
            tuple((name, value) for name, value in plain.items() if isinstance(value, _SIMPLE)),
            tuple((name, None if t is None else tuple(t.shape)) for name, t in tensors.items()),
            _switched(module),
            tuple((name, Fingerprint.of(child)) for name, child in module._modules.items() if child is not None),
        )

    def matches(self, module: nn.Module) -> bool:
        """Whether ``module`` has it, and calling ``module`` runs nobody's hook and no ``forward`` of its own."""
        if type(module) is not self.cls or _calls_more(module) or _switched(module) != self.switched:
            return False
        if any(getattr(module, name, None) != value for name, value in self.settings):
            return False
        for name, shape in self.tensors:
            tensor = getattr(module, name, None)
            if shape is None or tensor is None:
                if shape is not None or tensor is not None:
                    return False
            elif tensor.shape != shape:
                return False
        children = module._modules
        return all((child := children.get(name)) is not None and fp.matches(child) for name, fp in self.inner)


def _switched(module: nn.Module) -> bool:
    """Whether ``module`` is in a mode that its class computes something else in."""
    if isinstance(module, _DROPOUTS):
        return module.training and module.p > 0
    return module.training and isinstance(module, nn.modules.batchnorm._NormBase)


def _calls_more(module: nn.Module) -> bool:
    if has_hooks(module) or "forward" in module.__dict__:
        return True
    return not torch.compiler.is_compiling() and bool(_module._has_any_global_hook())
