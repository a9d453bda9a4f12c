"""Whether modules are still what a pass has seen in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_INTERNAL = frozenset(vars(nn.Module()))
_SIMPLE = (bool, int, float, str, tuple, type(None))


@dataclass(frozen=True)
class Fingerprint:
    """The class, settings, shapes and modes of a module, and of those inside it.

    ``settings`` are its plain attributes. ``parameters`` and ``buffers`` are the shapes of its tensors, None where
    there is none. ``switched`` says whether it is in a mode in which its class computes something else.
    """

    cls: type[nn.Module]
    settings: dict[str, Any]
    parameters: tuple[tuple[str, tuple[int, ...] | None], ...]
    buffers: tuple[tuple[str, tuple[int, ...] | None], ...]
    switched: bool | None
    inner: tuple[tuple[str, Fingerprint], ...]

    @staticmethod
    def of(module: nn.Module) -> Fingerprint:
        """That of ``module`` as it is now."""
        plain = {name: value for name, value in vars(module).items() if name not in _INTERNAL}
        return Fingerprint(
            type(module),
            {name: value for name, value in plain.items() if isinstance(value, _SIMPLE)},
            _shapes(module._parameters),
            _shapes(module._buffers),
            _switched(module),
            tuple((name, Fingerprint.of(child)) for name, child in module._modules.items() if child is not None),
        )

    def matches(self, module: nn.Module) -> bool:
        """Whether ``module`` has it, and calling ``module`` runs no hook of its own and no other ``forward``."""
        if type(module) is not self.cls or module._forward_hooks or module._forward_pre_hooks:
            return False
        if module._backward_hooks or module._backward_pre_hooks or not self._has_settings(module):
            return False
        if self.switched is not None and _switched(module) != self.switched:
            return False
        for held, shapes in ((module._parameters, self.parameters), (module._buffers, self.buffers)):
            for name, shape in shapes:
                tensor: Tensor | None = held.get(name)
                if (tensor is None) is not (shape is None) or (tensor is not None and tensor.shape != shape):
                    return False
        for name, of in self.inner:
            child = module._modules.get(name)
            if child is None or not of.matches(child):
                return False
        return True

    def _has_settings(self, module: nn.Module) -> bool:
        if torch.compiler.is_compiling():
            return all(getattr(module, name, None) == value for name, value in self.settings.items())
        held = vars(module)
        return "forward" not in held and held.items() >= self.settings.items()


def _shapes(tensors: dict[str, Any]) -> tuple[tuple[str, tuple[int, ...] | None], ...]:
    return tuple((name, None if tensor is None else tuple(tensor.shape)) for name, tensor in tensors.items())


def _switched(module: nn.Module) -> bool | None:
    """Whether ``module`` is in a mode in which its class computes something else; None for classes without one."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.training and module.p > 0
    return module.training if isinstance(module, nn.modules.batchnorm._NormBase) else None
