"""fuse on exported programs: what it merges, in both dialects."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from exporting import counts, export, fused, kinds
from fusing import randomised

DIALECTS = pytest.mark.parametrize("core", [False, True], ids=["training", "core"])


class Block(nn.Module):
    """A small network: layers of 4 channels, and a forward that uses some of them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)


class RepVGG(Block):
    def __init__(self) -> None:
        super().__init__()
        self.point, self.norm, self.skip = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)) + self.norm(self.point(x)) + self.skip(x))


class ACNet(Block):
    def __init__(self) -> None:
        super().__init__()
        self.tall, self.wide = nn.Conv2d(4, 4, (3, 1), padding=(1, 0)), nn.Conv2d(4, 4, (1, 3), padding=(0, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        y += self.tall(x)
        return torch.relu_(y + self.wide(x))


class Joined(Block):
    """Branches that are concatenated, and a part of them."""

    def __init__(self) -> None:
        super().__init__()
        self.point = nn.Conv2d(4, 6, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.cat([self.bn(self.conv(x)), self.point(x)], dim=1)
        return torch.relu(y), torch.relu(self.conv(x)[:, 1:3])


class Residual(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        y = torch.relu_(y)
        return torch.relu_(x - 2 * self.conv(x)) + y


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 4, bias=False)
        self.norm, self.matrix = nn.BatchNorm1d(4), nn.Parameter(torch.randn(4, 3))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.drop(self.norm(self.second(self.first(x)))) @ self.matrix
        return y


def chain(*layers: nn.Module) -> nn.Module:
    return randomised(nn.Sequential(*layers))


@DIALECTS
def test_batch_norm_goes_into_the_convolution_before_it_under_the_names_of_that(core: bool) -> None:
    model = chain(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))
    found = fused(export(model, torch.randn(2, 3, 7, 8).double(), core=core), (torch.randn(2, 3, 7, 8).double(),))
    assert kinds(found) == (2, 0, 0)
    assert list(found.state_dict) == ["0.weight", "0.bias", "3.weight", "3.bias"]
    assert [spec.target for spec in found.graph_signature.input_specs] == [*found.state_dict, None]
    assert all(isinstance(parameter, nn.Parameter) for parameter in found.state_dict.values())


@DIALECTS
@pytest.mark.parametrize(
    ("model", "left"),
    [(RepVGG(), 1), (ACNet(), 1), (Joined(), 2), (Residual(), 2)],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_branches_become_one_convolution(core: bool, model: nn.Module, left: int) -> None:
    found = fused(export(randomised(model), torch.randn(2, 4, 6, 5).double(), core=core))
    assert kinds(found) == (left, 0, 0)
    assert sum(counts(found).values()) <= left + 3


@DIALECTS
def test_linear_layers_norms_and_matrices_become_one_product(core: bool) -> None:
    found = fused(export(randomised(Dense()), torch.randn(7, 6).double(), core=core))
    assert counts(found) == {"addmm" if core else "linear": 1}
    assert list(found.state_dict) == ["first.weight", "first.bias"]


@DIALECTS
def test_a_depthwise_layer_before_a_pointwise_one_stays_where_one_would_be_dearer(core: bool) -> None:
    model = chain(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8))
    program = export(model, torch.randn(1, 4, 6, 6).double(), core=core)
    assert kinds(fused(program)) == (2, 0, 0)
    assert kinds(fused(program, when="always")) == (1, 0, 0)


@DIALECTS
def test_other_dimensions_pads_pools_and_transposed_convolutions(core: bool) -> None:
    signal = chain(nn.ConstantPad1d((2, 1), 0.0), nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.AvgPool1d(2))
    found = fused(export(signal, torch.randn(2, 2, 9).double(), core=core))
    assert kinds(found) == (1, 0, 0)
    volume = chain(nn.Conv3d(2, 3, 3, padding="same"), nn.BatchNorm3d(3))
    assert kinds(fused(export(volume, torch.randn(1, 2, 4, 5, 6).double(), core=core))) == (1, 0, 0)
    transposed = chain(nn.ConvTranspose2d(2, 4, 3, stride=2, output_padding=1, groups=2), nn.BatchNorm2d(4))
    assert kinds(fused(export(transposed, torch.randn(1, 2, 4, 5).double(), core=core))) == (1, 0, 0)


@DIALECTS
def test_sizes_that_differ_from_call_to_call_stay_free(core: bool) -> None:
    sizes = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height", min=9, max=64)}
    options = {"dynamic_shapes": (sizes,)}
    model = chain(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.AvgPool2d(2))
    program = export(model, torch.randn(2, 3, 12, 8).double(), core=core, **options)
    found = fused(program, (torch.randn(5, 3, 33, 8).double(),), (torch.randn(1, 3, 9, 8).double(),), when="always")
    assert kinds(found) == (1, 0, 0)
    assert found.range_constraints == program.range_constraints
    with pytest.raises(Exception, match="64"):
        found.module()(torch.randn(1, 3, 80, 8).double())
