"""Which modules are layers, which run as one unit, and what makes a layer more than its weight and bias."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations

from behaviour import Two
from fxexpand.graph.layers import (
    dtype_refusal,
    has_hooks,
    hooks_of,
    is_expandable_class,
    is_layer,
    is_opaque,
    is_quantized,
    peculiarity,
)


class Renamed(nn.Conv2d):
    """Has attributes and methods of its own, but computes what torch's class does."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.note = "mine"

    def reset(self) -> None:
        self.reset_parameters()


class OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class OwnConvForward(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = super()._conv_forward(x, weight * 2, bias)
        return y


class OwnCall(nn.Linear):
    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = super().__call__(x)
        return y * 2


def given_a_forward() -> nn.Module:
    module = nn.Linear(2, 2)
    vars(module)["forward"] = types.MethodType(lambda self, x: x, module)
    return module


LAYERS: list[tuple[Callable[[], nn.Module], bool, bool]] = [  # module, is a layer, can be expanded
    (lambda: nn.Conv1d(2, 2, 3), True, True),
    (lambda: nn.Conv2d(2, 2, 3), True, True),
    (lambda: nn.Conv3d(2, 2, 3), True, True),
    (lambda: nn.Linear(2, 2), True, True),
    (lambda: Renamed(2, 2, 3), True, True),
    (lambda: nn.LazyConv2d(2, 3), True, True),
    (lambda: parametrizations.weight_norm(nn.Linear(2, 2)), True, True),
    (lambda: nn.ConvTranspose2d(2, 2, 3), True, False),
    (lambda: nn.BatchNorm2d(2), True, False),
    (lambda: nn.SyncBatchNorm(2), False, False),
    (lambda: nn.Bilinear(2, 2, 2), False, False),
    (lambda: nn.Embedding(2, 2), False, False),
    (lambda: OwnForward(2, 2), False, False),
    (lambda: OwnConvForward(2, 2, 3), False, False),
    (lambda: OwnCall(2, 2), False, False),
    (given_a_forward, False, False),
    (lambda: nn.Sequential(nn.Linear(2, 2)), False, False),
]


@pytest.mark.parametrize(("make", "layer", "expandable"), LAYERS)
def test_a_layer_computes_what_its_torch_class_computes(make: Any, layer: bool, expandable: bool) -> None:
    assert is_layer(make()) is layer
    assert is_expandable_class(make()) is expandable


@pytest.mark.parametrize(
    ("make", "opaque"),
    [
        (lambda: nn.MultiheadAttention(2, 1), True),
        (lambda: nn.LSTM(2, 2), True),
        (lambda: nn.TransformerEncoderLayer(2, 1, 2), True),
        (nn.ReLU, True),
        (lambda: torch.jit.script(nn.Sequential(nn.ReLU())), True),
        (lambda: torch.compile(nn.Sequential(nn.ReLU())), True),
        (nn.Sequential, False),
        (nn.ModuleList, False),
        (nn.ModuleDict, False),
        (Two, False),
        (lambda: fx.symbolic_trace(nn.Sequential(nn.ReLU())), False),
        (lambda: OwnForward(2, 2), False),
        (lambda: parametrizations.weight_norm(OwnForward(2, 2)), False),
        (lambda: parametrizations.weight_norm(nn.Bilinear(2, 2, 2)), True),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_modules_of_torch_run_as_one_unit_and_those_of_users_do_not(make: Any, opaque: bool) -> None:
    assert is_opaque(make()) is opaque


@pytest.mark.parametrize(
    "register",
    [
        lambda module: module.register_forward_hook(print),
        lambda module: module.register_forward_pre_hook(print),
        lambda module: module.register_full_backward_hook(print),
        lambda module: module.register_full_backward_pre_hook(print),
        lambda module: module.register_forward_hook(print, with_kwargs=True, always_call=True),
    ],
)
def test_every_kind_of_hook_is_one_and_a_removed_one_is_none(register: Callable[[nn.Module], Any]) -> None:
    module = nn.Linear(2, 2)
    assert not has_hooks(module)
    handle = register(module)
    assert has_hooks(module)
    assert hooks_of(module) == [print]
    handle.remove()
    assert not has_hooks(module)


def test_a_plain_layer_has_no_peculiarity() -> None:
    for make, _, expandable in LAYERS:
        module = make()
        if expandable and type(module) in {nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, Renamed}:
            assert peculiarity(module) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.register_forward_hook(print), "hooks"),
        (lambda m: m.register_load_state_dict_post_hook(lambda module, keys: None), "hooks"),
        (lambda m: m.weight.register_hook(print), "gradient hooks"),
        (lambda m: m.bias.register_post_accumulate_grad_hook(print), "gradient hooks"),
        (lambda m: m.add_module("adapter", nn.Linear(1, 1)), "holds modules of its own (adapter)"),
        (lambda m: parametrizations.weight_norm(m, "weight"), "its weight is parametrized"),
        (lambda m: m.to(torch.complex64), "complex"),
        (lambda m: m.to(torch.float8_e5m2), "float8_e5m2"),
    ],
)
def test_what_replacing_a_layer_would_lose_is_named(change: Callable[[Any], Any], reason: str) -> None:
    module = nn.Linear(2, 2)
    change(module)
    found = peculiarity(module)
    assert found is not None
    assert reason in found.reason


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floating_point_weights_are_welcome(dtype: torch.dtype) -> None:
    assert dtype_refusal(torch.ones(1, dtype=dtype)) is None


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int8, torch.bool, torch.float8_e4m3fn])
def test_any_other_dtype_is_refused_by_name(dtype: torch.dtype) -> None:
    refusal = dtype_refusal(torch.ones(1).to(dtype))
    assert refusal is not None
    assert ("complex" if dtype.is_complex else str(dtype).removeprefix("torch.")) in refusal.reason
    assert "expected a floating-point weight" in refusal.reason


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantized_layers_are_known_as_such() -> None:
    quantize: Any = torch.ao.quantization.quantize_dynamic
    model = quantize(nn.Sequential(nn.Linear(2, 2)), {nn.Linear})
    assert is_quantized(model[0])
    assert is_expandable_class(model[0])
    refusal = peculiarity(model[0])
    assert refusal is not None
    assert "quantize after contracting" in refusal.reason
    assert not is_quantized(nn.Linear(2, 2))
