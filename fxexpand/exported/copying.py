"""Copies of the tensors of a program."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def own_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of the tensors in ``values``, those that share memory sharing it again; all else as it is."""
    copies = _Copies()
    return {name: copies.of(value) if isinstance(value, Tensor) else value for name, value in values.items()}


class _Copies:
    def __init__(self) -> None:
        self._memo: dict[int, Any] = {}
        self._found: dict[int, Tensor] = {}

    def of(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._found:
            self._found[id(tensor)] = self._copied(tensor)
        return self._found[id(tensor)]

    def _copied(self, tensor: Tensor) -> Tensor:
        if type(tensor) not in (Tensor, nn.Parameter):
            copied: Tensor = copy.deepcopy(tensor, self._memo)
            return copied
        # As plain tensors: a copy of a parameter would share memory with no other.
        plain = copy.deepcopy(tensor.detach(), self._memo)
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(plain, requires_grad=tensor.requires_grad)
        return plain.requires_grad_(tensor.requires_grad)
