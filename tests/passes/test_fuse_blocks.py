"""Blocks that are one affine map become one layer: each written here as its paper defines it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxexpand
from drawing import CONVOLUTIONS
from fusing import CHANNELS, NORMS, becomes, calls, fused, images, randomised
from fxexpand.algebra import Kernel


def conv_bn(m: int, n: int, k: int | tuple[int, ...], d: int = 2, **options: Any) -> nn.Sequential:
    convolution: Callable[..., nn.Module] = CONVOLUTIONS[d - 1]
    return nn.Sequential(convolution(m, n, k, bias=False, **options), NORMS[d - 1](n))


class RepVGG(nn.Module):
    """Ding et al. 2021, figure 4: k×k, 1×1 and identity, each with batch norm."""

    def __init__(
        self, n: int = CHANNELS, k: int = 3, stride: int = 1, dilation: int = 1, groups: int = 1, d: int = 2
    ) -> None:
        super().__init__()
        padding = dilation * (k // 2)
        self.dense = conv_bn(CHANNELS, n, k, d, stride=stride, padding=padding, dilation=dilation, groups=groups)
        self.point = conv_bn(CHANNELS, n, 1, d, stride=stride, groups=groups)
        self.identity = NORMS[d - 1](n) if n == CHANNELS and stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        skip = 0 if self.identity is None else self.identity(x)
        y: Tensor = self.dense(x) + self.point(x) + skip
        return y


class MobileOne(nn.Module):
    """Vasu et al. 2023, figure 3: several k×k branches, a 1×1 scale branch and batch norm alone."""

    def __init__(self, branches: int, k: int = 3, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        options = {"stride": stride, "groups": groups}
        self.branches = nn.ModuleList(
            conv_bn(CHANNELS, CHANNELS, k, padding=k // 2, **options) for _ in range(branches)
        )
        self.scale = conv_bn(CHANNELS, CHANNELS, 1, **options)
        self.skip = nn.BatchNorm2d(CHANNELS) if stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.scale(x)
        if self.skip is not None:
            y = y + self.skip(x)
        for branch in self.branches:
            y += branch(x)
        return y


class ACNet(nn.Module):
    """Ding et al. 2019, figure 2: k×k, 1×k and k×1, each with batch norm."""

    def __init__(self, k: int = 3, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        p, options = k // 2, {"stride": stride, "groups": groups}
        self.square = conv_bn(CHANNELS, 12, k, padding=p, **options)
        self.horizontal = conv_bn(CHANNELS, 12, (1, k), padding=(0, p), **options)
        self.vertical = conv_bn(CHANNELS, 12, (k, 1), padding=(p, 0), **options)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.square(x) + self.horizontal(x) + self.vertical(x)
        return y


class BNAndPad(nn.Module):
    """Batch norm, then a border of the value that batch norm gives zero, assigned into slices."""

    def __init__(self, n: int, p: int) -> None:
        super().__init__()
        self.bn, self.p = nn.BatchNorm2d(n), p

    def forward(self, x: Tensor) -> Tensor:
        y = F.pad(self.bn(x), [self.p] * 4)
        border = self.shift().view(1, -1, 1, 1)
        y[:, :, : self.p, :] = border
        y[:, :, -self.p :, :] = border
        y[:, :, :, : self.p] = border
        y[:, :, :, -self.p :] = border
        return y

    def scale(self) -> Tensor:
        assert self.bn.running_var is not None
        return self.bn.weight / torch.sqrt(self.bn.running_var + self.bn.eps)

    def shift(self) -> Tensor:
        assert self.bn.running_mean is not None
        return self.bn.bias - self.bn.running_mean * self.scale()

    def kernel(self) -> Kernel:
        scale = self.scale().reshape(-1, 1, 1, 1)
        return Kernel(scale, self.shift(), padding=((self.p, self.p),) * 2, groups=len(scale))


class DiverseBranch(nn.Module):
    """Ding et al. 2021, figure 2: k×k, 1×1, 1×1 → k×k and 1×1 → average pool, batch norm after each layer.

    ``own_border`` pads after the first batch norm of a branch as the authors' code does, not in the 1×1.
    """

    def __init__(self, k: int = 3, stride: int = 1, groups: int = 1, own_border: bool = False) -> None:
        super().__init__()
        n, p, grouped = 12, k // 2, {"groups": groups}

        def point(m: int) -> nn.Sequential:
            if own_border:
                return nn.Sequential(nn.Conv2d(CHANNELS, m, 1, bias=False, groups=groups), BNAndPad(m, p))
            return conv_bn(CHANNELS, m, 1, padding=p, **grouped)

        self.origin = conv_bn(CHANNELS, n, k, stride=stride, padding=p, **grouped)
        self.point = conv_bn(CHANNELS, n, 1, stride=stride, **grouped)
        self.series = nn.Sequential(point(CHANNELS), conv_bn(CHANNELS, n, k, stride=stride, **grouped))
        self.average = nn.Sequential(point(n), nn.AvgPool2d(k, stride), nn.BatchNorm2d(n))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.origin(x)
        y += self.point(x)
        y += self.average(x)
        y += self.series(x)
        return y


class LargeKernel(nn.Module):
    """Ding et al. 2022 and 2024: a large depthwise kernel beside a small and a dilated one, each with batch norm."""

    def __init__(self, k: int = 13, small: int = 5, dilation: int = 3, stride: int = 1) -> None:
        super().__init__()
        options = {"groups": CHANNELS, "stride": stride}
        self.large = conv_bn(CHANNELS, CHANNELS, k, padding=k // 2, **options)
        self.small = conv_bn(CHANNELS, CHANNELS, small, padding=small // 2, **options)
        self.dilated = conv_bn(CHANNELS, CHANNELS, 3, padding=dilation, dilation=dilation, **options)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.large(x) + self.small(x) + self.dilated(x)
        return y


class ScaledBranches(nn.Module):
    """After Hu et al. 2022 (OREPA), figure 3: every branch with a scale a channel in place of batch norm."""

    def __init__(self, k: int = 3, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        n = 12
        self.k, self.stride, self.groups = k, stride, groups
        options: dict[str, Any] = {"groups": groups, "bias": False}
        self.conv = nn.Conv2d(CHANNELS, n, k, stride=stride, padding=k // 2, **options)
        self.point = nn.Conv2d(CHANNELS, n, 1, **options)
        self.weight = nn.Parameter(torch.randn(n, CHANNELS // groups, k, k))
        self.scale_weight = nn.Parameter(torch.randn(n, 1, 1, 1))
        self.scale_conv = nn.Parameter(torch.randn(n, 1, 1))
        self.scale_average = nn.Parameter(torch.randn(n))
        self.norm = nn.BatchNorm2d(n)

    def forward(self, x: Tensor) -> Tensor:
        p = self.k // 2
        weight = self.weight * self.scale_weight
        y = self.scale_conv * self.conv(x) + F.conv2d(x, weight, None, self.stride, p, groups=self.groups)
        average = F.avg_pool2d(self.point(x), self.k, self.stride, p)
        y = y + average * self.scale_average.view(1, -1, 1, 1)
        normalised: Tensor = self.norm(y)
        return normalised


class Inverted(nn.Module):
    """After Bhardwaj et al. 2022: a linear inverted residual, 1×1 → BN → depthwise → 1×1 → BN, padded in the 1×1."""

    def __init__(self, k: int = 3, stride: int = 1, expansion: int = 6, residual: bool = True) -> None:
        super().__init__()
        wide = expansion * CHANNELS
        self.residual = residual and stride == 1
        self.f = nn.Sequential(
            conv_bn(CHANNELS, wide, 1, padding=k // 2),
            nn.Conv2d(wide, wide, k, stride, groups=wide),
            conv_bn(wide, CHANNELS, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.f(x)
        return x + y if self.residual else y


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "RepVGG": RepVGG,
    "RepVGG without identity": lambda: RepVGG(n=12),
    "RepVGG, stride": lambda: RepVGG(stride=2),
    "RepVGG, groups": lambda: RepVGG(groups=4),
    "RepVGG, depthwise": lambda: RepVGG(groups=CHANNELS),
    "RepVGG, groups, stride": lambda: RepVGG(n=12, groups=2, stride=3),
    "RepVGG, 5×5, dilation": lambda: RepVGG(k=5, dilation=2),
    "MobileOne": lambda: MobileOne(branches=1),
    "MobileOne, branches": lambda: MobileOne(branches=4),
    "MobileOne, depthwise": lambda: MobileOne(branches=4, groups=CHANNELS),
    "MobileOne, 1×1": lambda: MobileOne(branches=2, k=1),
    "MobileOne, stride": lambda: MobileOne(branches=3, k=5, stride=2),
    "ACNet": ACNet,
    "ACNet, 5×5, groups": lambda: ACNet(k=5, groups=2),
    "ACNet, 7×7, stride": lambda: ACNet(k=7, stride=2),
    "DiverseBranch": DiverseBranch,
    "DiverseBranch, stride": lambda: DiverseBranch(stride=2),
    "DiverseBranch, 5×5": lambda: DiverseBranch(k=5),
    "DiverseBranch, groups": lambda: DiverseBranch(groups=4),
    "large kernel": LargeKernel,
    "large kernel, 17×17": lambda: LargeKernel(k=17, small=3, dilation=5),
    "large kernel, stride": lambda: LargeKernel(stride=2),
    "scaled branches": ScaledBranches,
    "scaled branches, 5×5, stride": lambda: ScaledBranches(k=5, stride=2),
    "scaled branches, groups": lambda: ScaledBranches(groups=4),
    "inverted residual": Inverted,
    "inverted without residual": lambda: Inverted(residual=False),
    "inverted, 5×5": lambda: Inverted(k=5, expansion=12),
    "inverted, stride": lambda: Inverted(stride=2),
}


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_becomes_one_convolution(block: str) -> None:
    becomes("Conv2d", randomised(BLOCKS[block]()), *images())


@pytest.mark.parametrize("block", ["RepVGG", "MobileOne, branches", "DiverseBranch", "scaled branches, groups"])
def test_it_knows_which_layers_it_merged(block: str) -> None:
    model = randomised(BLOCKS[block]())
    (merged,) = fxexpand.explain(model).merged
    layers = {path for path, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.BatchNorm2d))}
    assert layers <= set(merged.nodes)
    assert fxexpand.explain(model).refused == ()


@pytest.mark.parametrize("d", [1, 3])
@pytest.mark.parametrize("options", [{}, {"n": 12}, {"stride": 2}, {"groups": 4}, {"dilation": 2}], ids=str)
def test_signals_of_any_axes(d: int, options: dict[str, int]) -> None:
    becomes(f"Conv{d}d", randomised(RepVGG(d=d, **options)), *images(d))


def test_blocks_in_a_network_each_become_one_convolution() -> None:
    blocks = [RepVGG(), MobileOne(3), DiverseBranch()]
    names = ["first", "second", "third"]
    model = nn.Sequential()
    for name, block in zip(names, blocks, strict=True):
        model.add_module(name, block)
        model.add_module(f"{name}_relu", nn.ReLU())
    found = fused(randomised(model), *images())
    assert calls(found) == ["Conv2d", "ReLU"] * 3
    assert [key.split(".")[0] for key in found.state_dict()] == [name for name in names for _ in ("weight", "bias")]


class TestOwnBorder:
    """The border layer of the authors' DiverseBranchBlock assigns into slices, which no tracer follows."""

    @pytest.mark.parametrize("k", [3, 5])
    @pytest.mark.parametrize("options", [{}, {"stride": 2}, {"groups": 2}], ids=str)
    def test_it_fuses_once_its_kernel_is_known(self, k: int, options: dict[str, int]) -> None:
        model = randomised(DiverseBranch(k, own_border=True, **options))
        becomes("Conv2d", model, *images(), lifts={BNAndPad: lambda module: module.kernel()})

    def test_it_is_left_alone_otherwise(self) -> None:
        model = randomised(DiverseBranch(own_border=True))
        found = fused(model, *images())
        assert sum(isinstance(module, BNAndPad) for module in found.modules()) == 2
        assert calls(found).count("Conv2d") <= 5

    def test_what_is_no_kernel_is_refused(self) -> None:
        model = randomised(DiverseBranch(own_border=True))
        lifts: Any = {BNAndPad: lambda _: None}
        reasons = [entry.reason for entry in fxexpand.explain(model, lifts=lifts).refused]
        assert any("BNAndPad" in reason and "Kernel" in reason for reason in reasons)


def test_the_new_layer_has_the_shape_that_the_block_implies() -> None:
    found = fxexpand.fuse(randomised(RepVGG(n=12, k=5, stride=2, dilation=2, groups=2)))
    (conv,) = (module for module in found.modules() if isinstance(module, nn.Conv2d))
    assert (conv.kernel_size, conv.stride, conv.dilation, conv.groups) == ((5, 5), (2, 2), (2, 2), 2)
    assert conv.padding == (4, 4)
    assert conv.bias is not None
