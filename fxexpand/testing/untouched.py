"""Is a model what it was?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fxexpand.graph.layers import hooks_of
from fxexpand.testing.equivalent import PropertyError


@dataclass(frozen=True, eq=False)
class Untouched:
    """What a model consists of, by identity, with the values of its tensors."""

    parts: dict[str, tuple[object, ...]]
    values: dict[str, Tensor]

    @staticmethod
    def of(model: nn.Module) -> Untouched:
        return Untouched(_parts(model), {name: tensor.detach().clone() for name, tensor in _tensors(model).items()})

    def check(self, model: nn.Module, where: str) -> str:
        """Raise ``PropertyError`` for the first part of ``model`` that is not as it was."""
        after, tensors = _parts(model), _tensors(model)
        for name in {**self.parts, **after}:
            if self.parts.get(name) != after.get(name):
                raise PropertyError(f"{where}: {name}: expected {self.parts.get(name)}, found {after.get(name)}.")
        for name, value in self.values.items():
            if not torch.equal(value, tensors[name].detach()) and not value.isnan().any():
                raise PropertyError(f"{where}: {name}: expected the values it had, found others.")
        return f"{len(after)} modules and tensors"


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return dict(named)


def _parts(model: nn.Module) -> dict[str, tuple[object, ...]]:
    """Modules and tensors by their paths: identity, class, flags, and what hangs on them."""
    parts: dict[str, tuple[object, ...]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        parts[f"module {path or '(root)'}"] = (
            *(id(module), type(module).__name__, module.training, len(vars(module)), len(hooks_of(module))),
            str(getattr(module, "code", "")),  # of a GraphModule
        )
    for name, tensor in _tensors(model).items():
        parts[f"tensor {name}"] = (id(tensor), tensor.dtype, tensor.requires_grad, id(tensor.grad))
    return parts
