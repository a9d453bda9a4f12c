"""New layers are what their constructors make, and share nothing with one another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxexpand


class _Two(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module, norms: tuple[nn.Module, nn.Module]) -> None:
        super().__init__()
        self.first, self.second = nn.Sequential(first, norms[0]), nn.Sequential(second, norms[1])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.relu(self.first(x)))
        return y


_LAYERS: list[tuple[Any, Any, tuple[int, ...], dict[str, Any]]] = [
    (nn.Conv1d, nn.BatchNorm1d, (4, 4, 3), {"padding": 1, "groups": 2}),
    (nn.Conv2d, nn.BatchNorm2d, (4, 4, 3), {"padding": (1, 2), "dilation": 2, "bias": False}),
    (nn.Conv2d, nn.BatchNorm2d, (4, 4, 3), {"padding": 1, "padding_mode": "reflect"}),
    (nn.ConvTranspose2d, nn.BatchNorm2d, (4, 4, 3), {"stride": 2, "output_padding": 1}),
]


@pytest.mark.parametrize(("cls", "norm", "arguments", "settings"), _LAYERS)
def test_layers_with_the_same_settings_share_no_state(
    cls: Any, norm: Any, arguments: tuple[int, ...], settings: dict[str, Any]
) -> None:
    model = _Two(cls(*arguments, **settings), cls(*arguments, **settings), (norm(4), norm(4))).eval()
    layers: list[Any] = [fxexpand.fuse(model).get_submodule(path) for path in ("first", "second")]
    expected = vars(cls(*arguments, **{**settings, "bias": True}).eval())
    for layer in layers:
        assert type(layer) is cls
        assert list(vars(layer)) == list(expected)
        assert {name: value for name, value in vars(layer).items() if name != "_parameters"} == {
            name: value for name, value in expected.items() if name != "_parameters"
        }
        assert list(layer._parameters) == list(expected["_parameters"])
        assert all(isinstance(p, nn.Parameter) and not p.is_meta for p in layer._parameters.values())
    first, second = map(vars, layers)
    containers = [name for name, value in first.items() if isinstance(value, (dict, set, list))]
    assert containers
    assert all(first[name] is not second[name] for name in containers)
    layers[0].register_forward_hook(lambda *_: None)
    assert not layers[1]._forward_hooks
