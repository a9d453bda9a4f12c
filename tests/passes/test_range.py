"""Weights that are products may not fit the dtype of their factors: float16 ends at 65504, and is coarse below 6e-5."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxexpand
from fxexpand import FC, ContractionError


def filled(model: nn.Module, weight: float) -> nn.Module:
    for name, parameter in model.named_parameters():
        nn.init.constant_(parameter, weight if "weight" in name else 0.0)
    return model.half().eval()


def agree(a: nn.Module, b: nn.Module, x: Tensor) -> bool:
    found, expected = b(x).double(), a(x).double()
    assert expected.isfinite().all()
    return bool(((found - expected).norm() <= 1e-2 * expected.norm()).all())


def scaled() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    model = filled(nn.Sequential(nn.Conv2d(4, 4, 1), norm), 3e3)
    nn.init.constant_(norm.weight, 50.0)
    assert norm.running_var is not None
    norm.running_var.fill_(1e-3)
    return model


@pytest.mark.parametrize(
    ("model", "x", "layers"),
    [
        (filled(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), 300.0), torch.full((2, 4), 1e-3), 2),
        (filled(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), 2e-4), torch.full((2, 4), 6e4), 2),
        (scaled(), torch.full((1, 4, 1, 1), 1e-4), 2),
        (filled(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), 3.0), torch.full((2, 4), 1e-3), 1),
    ],
    ids=["too large", "too small", "scaled by batch norm", "fits"],
)
def test_fuse_leaves_alone_what_float16_does_not_hold(model: nn.Module, x: Tensor, layers: int) -> None:
    for inputs in ((), (x.half(),)):
        fused = fxexpand.fuse(model, *inputs)
        assert len(list(fused.children())) == layers
        assert agree(model, fused, x.half())
        refused = [entry for entry in fxexpand.explain(model, *inputs).refused if "float16" in entry.reason]
        assert len(refused) == layers - 1


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x if x.sum() > 1e4 else self.fc(x)
        return y


def test_an_expansion_that_code_calls_stays_layers_in_turn() -> None:
    big, x = filled(fxexpand.expand(Untraceable(), FC(2)), 300.0), torch.full((2, 4), 1e-3).half()
    assert agree(big, fxexpand.fuse(big), x)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 300.0), (torch.bfloat16, 1e30), (torch.float32, 1e30)])
def test_contracting_what_does_not_fit_is_refused(dtype: torch.dtype, size: float) -> None:
    big = fxexpand.expand(nn.Sequential(nn.Linear(4, 4)).to(dtype), FC(2))
    for name, parameter in big.named_parameters():
        nn.init.constant_(parameter, size if "weight" in name else 0.0)
    with pytest.raises(ContractionError, match=r"^0: .*beyond the range of torch"):
        fxexpand.contract(big)
    wide = fxexpand.contract(big.double())
    assert wide.get_parameter("0.weight").detach().isfinite().all()
