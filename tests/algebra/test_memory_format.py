"""The memory format of weights is the one that torch takes them to have: the output of a convolution tells it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fxexpand.algebra.memory_format import Laid, common_format, format_after, in_format, memory_format_of

LAST = torch.channels_last


@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (8, 4, 1, 1), (4, 1, 3, 3), (1, 4, 3, 3), (4, 1, 1, 1), (8, 4, 1, 3)])
@pytest.mark.parametrize("wanted", [torch.contiguous_format, LAST])
def test_what_a_convolution_takes_it_for(shape: tuple[int, ...], wanted: torch.memory_format) -> None:
    weight = torch.randn(shape).to(memory_format=wanted)
    groups = 4 if shape[:2] == (4, 1) else 1
    output = F.conv2d(torch.randn(2, 4, 9, 9), weight, groups=groups)
    last = output.is_contiguous(memory_format=LAST) and not output.is_contiguous()
    if shape[0] > 1:  # an output of one channel is contiguous in both
        assert (memory_format_of(weight) is LAST) == last
    assert (memory_format_of(weight) is LAST) == (wanted is LAST and weight.shape != (4, 1, 1, 1))


def test_other_ranks_and_layouts() -> None:
    assert memory_format_of(torch.randn(8, 4, 3, 3, 3).to(memory_format=torch.channels_last_3d)) is (
        torch.channels_last_3d
    )
    for weight in (torch.randn(8, 4), torch.randn(8, 4, 3), torch.randn(4, 8, 3, 3).transpose(0, 1)):
        assert memory_format_of(weight) is torch.contiguous_format
    assert memory_format_of(torch.randn(8, 9, 3, 3)[:, ::2]) is torch.contiguous_format
    assert memory_format_of(torch.randn(8, 0, 3, 3)) is torch.contiguous_format


def test_one_layer_in_channels_last_is_enough() -> None:
    plain, last = torch.randn(8, 4, 1, 1), torch.randn(8, 8, 3, 3).to(memory_format=LAST)
    assert common_format([plain, last, torch.randn(8)]) is LAST
    assert common_format([plain, plain]) is torch.contiguous_format
    for made in (torch.randn(8, 4, 3, 3), torch.randn(8, 4, 1, 1)):
        assert memory_format_of(in_format(made, LAST)) is LAST
        assert in_format(made, torch.contiguous_format) is made
        assert torch.equal(in_format(made, LAST), made)
    linear = torch.randn(8, 4)
    assert in_format(linear, LAST) is linear


def test_several_models_at_once() -> None:
    """A weight under vmap has an axis that it does not show."""
    made = torch.randn(3, 8, 8, 3, 3)
    assert torch.equal(torch.vmap(lambda weight: 2 * in_format(weight, LAST))(made), 2 * made)


def conv(shape: tuple[int, ...], *, last: bool) -> torch.Tensor:
    wanted = {4: LAST, 5: torch.channels_last_3d}[len(shape)]
    return torch.randn(shape).to(memory_format=wanted if last else torch.contiguous_format)


@pytest.mark.parametrize("second", [True, False])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("d", "size"), [(2, 1), (2, 3), (3, 3)])
def test_what_torch_gives_layer_by_layer(d: int, size: int, first: bool, second: bool) -> None:
    a, b = conv((6, 4, *(3,) * d), last=first), conv((6, 6, *(size,) * d), last=second)
    other = conv((6, 4, *(3,) * d), last=second)
    convolve = F.conv2d if d == 2 else F.conv3d
    x, wanted = torch.randn(2, 4, *(5,) * d), LAST if d == 2 else torch.channels_last_3d
    branches = [convolve(x, a), convolve(x, other)]
    for output, steps in (
        (convolve(convolve(x, a), b) if size == 1 else convolve(convolve(F.pad(x, (1,) * 2 * d), a), b), ((0,), (1,))),
        (branches[0] + branches[1], None),
        (torch.cat(branches, 1), None),
    ):
        laid = [Laid((0,), a), Laid((1,), b)]
        if steps is None:
            concatenated = output.shape[1] > 6
            laid = [Laid((0,), a), Laid((0,), other), Laid((1, 2), None, concatenated)]
        assert format_after(laid) is (wanted if output.is_contiguous(memory_format=wanted) else torch.contiguous_format)
