"""A module with inputs that fit it, which prints as the code that makes it again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod, sqrt
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fxexpand.testing.code import code_of

M = TypeVar("M", bound=nn.Module)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True, eq=False, repr=False)
class Case:
    """``module``, in float64 and eval mode, and the ``shapes`` of the inputs that it takes.

    Values come from ``seed`` alone: what is printed is an expression that makes the same module, the same weights and
    the same inputs again, given ``import torch``, ``from torch import nn`` and ``from fxexpand.testing import *``.
    """

    module: nn.Module
    shapes: Sequence[tuple[int, ...]]
    seed: int = 0

    def __post_init__(self) -> None:
        with_values(self.module.double().eval(), self.seed)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The inputs: new tensors each time, of the same values."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        return tuple(torch.randn(shape, dtype=torch.float64, generator=generator) for shape in self.shapes)

    def __repr__(self) -> str:
        seed = f", seed={self.seed}" if self.seed else ""
        return f"Case({code_of(self.module)}, {list(self.shapes)}{seed})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Hypothesis would print the fields of a dataclass one by one."""
        lines = repr(self).split("\n")
        for i, line in enumerate(lines):
            if i:
                printer.break_()
            printer.text(line)


def with_values(model: M, seed: int = 0) -> M:
    """``model`` with generic values: none is zero, none like another, and outputs are about as large as inputs.

    Parameters are ± 0.5 to 1.5, over the root of the fan-in; floating buffers, some of which are variances, 0.5 to 2.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            size = torch.rand(parameter.shape, dtype=torch.float64, generator=generator) + 0.5
            sign = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
            parameter.copy_(size * sign / sqrt(prod(parameter.shape[1:])))
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.copy_(torch.rand(buffer.shape, dtype=torch.float64, generator=generator) * 1.5 + 0.5)
    return model


def as_trained(model: M) -> M:
    """``model``, its own weights kept, with batch norm as training might have left it; what is all zero is drawn.

    A new batch norm changes next to nothing, and a weight of zeros hides what comes before it: neither tells a right
    rewrite from a wrong one.
    """
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _NORMS):
                if module.running_mean is not None and module.running_var is not None:
                    module.running_mean.normal_(std=0.2)
                    module.running_var.uniform_(0.5, 2)
                if module.weight is not None:
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_(std=0.2)
            elif isinstance(module, nn.Linear) and not module.weight.any():
                module.weight.normal_(std=0.02)
    return model
