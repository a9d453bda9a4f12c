"""Weights that are computed in the same memory, one after another."""

from __future__ import annotations

import pytest
import torch

from fxexpand.algebra.compose import Blocks, compose_rounded
from fxexpand.algebra.kernel import Kernel

_SHAPES = [(6, 3, 3, 3), (4, 2, 1), (8, 16), (5, 2, 3, 3, 3), (2, 700, 17, 17)]


def _scale(weight: torch.Tensor) -> Kernel:
    n = len(weight)
    factors = torch.rand(n, 1, *(1,) * (weight.dim() - 2), dtype=torch.float64)
    return Kernel(factors, torch.rand(n, dtype=torch.float64), groups=n)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_shared_blocks_give_what_blocks_of_their_own_give(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    blocks = Blocks()
    weights = [torch.randn(shape) for shape in _SHAPES]
    firsts = [Kernel(w.contiguous(memory_format=layout) if w.dim() == 4 else w) for w in weights]
    scales = [_scale(weight) for weight in weights]
    shared = [compose_rounded(first, scale, torch.float32, blocks) for first, scale in zip(firsts, scales, strict=True)]
    for first, scale, found in zip(firsts, scales, shared, strict=True):
        alone = compose_rounded(first, scale, torch.float32)
        assert torch.equal(found.weight, (first.weight.double() * scale.weight).float())
        assert torch.equal(found.weight, alone.weight)
        assert found.weight.stride() == alone.weight.stride() == first.weight.stride()


def test_blocks_are_laid_out_as_they_are_asked_for() -> None:
    blocks = Blocks()
    for shape in _SHAPES:
        block = torch.empty(shape)
        found = blocks.like(block)
        assert (found.shape, found.dtype, found.stride()) == (block.shape, torch.float64, block.stride())
    first, second = blocks.like(torch.empty(2, 3)), blocks.like(torch.empty(3))
    assert first.data_ptr() == second.data_ptr()
