"""The composition of a training step gives what composing kernel by kernel gives, derivatives included."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given
from torch import Tensor, fx
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from torch.overrides import TorchFunctionMode

import drawing
from fxexpand.algebra import Kernel
from fxexpand.algebra.order import Order, compose_in
from fxexpand.algebra.product import PointwiseFirst, PointwiseLast, Product, Scaled, Spread, product_of
from fxexpand.graph.composer import Composer

ORDERS: tuple[Order, ...] = (((0, 1), 2), (0, (1, 2)))
Tensors: TypeAlias = tuple[Tensor, ...]


@st.composite
def chains(draw: st.DrawFn) -> tuple[Kernel, ...]:
    """Three kernels without padding, one after another."""
    d = draw(drawing.dims())
    free = ((0, 0),) * d
    first = draw(drawing.kernels(d, padding=free))
    second = draw(drawing.kernels(d, m=first.out_channels, padding=free))
    return first, second, draw(drawing.kernels(d, m=second.out_channels, padding=free))


@st.composite
def compositions(draw: st.DrawFn) -> tuple[Composer, Order, tuple[Kernel, ...]]:
    order = draw(st.sampled_from(ORDERS))
    chain = draw(chains())
    found = Composer.of(order, [kernel.to(device="meta") for kernel in chain])
    assume(found is not None)
    assert found is not None
    return found, order, chain


def tensors(chain: tuple[Kernel, ...]) -> Tensors:
    """The weights, then the biases that there are."""
    return (*(k.weight for k in chain), *(k.bias for k in chain if k.bias is not None))


def numbers(how: Composer, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, Tensor | None]:
    found = how.numbers(weights, biases)
    assert found is not None
    return found


def composed(how: Composer, chain: tuple[Kernel, ...], given: Tensors) -> Tensors:
    rest = iter(given[3:])
    weight, bias = numbers(how, given[:3], [None if kernel.bias is None else next(rest) for kernel in chain])
    return (weight,) if bias is None else (weight, bias)


def pair_by_pair(order: Order, chain: tuple[Kernel, ...], given: Tensors) -> Tensors:
    rest = iter(given[3:])
    kernels = [
        Kernel(weight, None if k.bias is None else next(rest), k.stride, k.padding, k.dilation, k.groups)
        for weight, k in zip(given[:3], chain, strict=True)
    ]
    whole = compose_in(order, kernels)
    assert isinstance(whole, Kernel)
    return (whole.weight,) if whole.bias is None else (whole.weight, whole.bias)


def close(found: Tensors, expected: Tensors) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-10, atol=1e-10) for a, b in pairs)


@given(compositions())
def test_values_and_gradients(case: tuple[Composer, Order, tuple[Kernel, ...]]) -> None:
    how, order, chain = case
    leaves = tuple(t.requires_grad_() for t in tensors(chain))
    found, expected = composed(how, chain, leaves), pair_by_pair(order, chain, leaves)
    assert close(found, expected)
    assert found[0].is_contiguous()
    upstream = [drawing.random(*t.shape) for t in expected]
    ours = torch.autograd.grad(found, leaves, upstream, allow_unused=True, materialize_grads=True)
    theirs = torch.autograd.grad(expected, leaves, upstream, allow_unused=True, materialize_grads=True)
    assert close(ours, theirs)


@given(compositions())
def test_second_derivatives(case: tuple[Composer, Order, tuple[Kernel, ...]]) -> None:
    how, order, chain = case
    leaves = tuple(t.requires_grad_() for t in tensors(chain))
    directions = [drawing.random(*t.shape) for t in leaves]

    def second(outputs: Tensors) -> Tensors:
        loss = torch.stack([(t**3).sum() for t in outputs]).sum()
        first = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True, materialize_grads=True)
        slope = torch.stack([(a * b).sum() for a, b in zip(first, directions, strict=True)]).sum()
        return torch.autograd.grad(slope, leaves, allow_unused=True, materialize_grads=True)

    assert close(second(composed(how, chain, leaves)), second(pair_by_pair(order, chain, leaves)))


@given(compositions())
def test_forward_derivatives_of_gradients(case: tuple[Composer, Order, tuple[Kernel, ...]]) -> None:
    how, order, chain = case
    primals = tensors(chain)
    tangents = [drawing.random(*t.shape) for t in primals]

    def slopes(function: Callable[[Tensors], Tensors]) -> Tensors:
        with forward_ad.dual_level():
            duals = tuple(forward_ad.make_dual(p.requires_grad_(), t) for p, t in zip(primals, tangents, strict=True))
            loss = torch.stack([(t**3).sum() for t in function(duals)]).sum()
            found = torch.autograd.grad(loss, duals, allow_unused=True, materialize_grads=True)
            moved = [forward_ad.unpack_dual(gradient).tangent for gradient in found]
            return tuple(torch.zeros_like(p) if t is None else t for p, t in zip(primals, moved, strict=True))

    found = slopes(lambda given: composed(how, chain, given))
    assert close(found, slopes(lambda given: pair_by_pair(order, chain, given)))


@given(compositions())
def test_gradients_of_one_result(case: tuple[Composer, Order, tuple[Kernel, ...]]) -> None:
    how, order, chain = case
    leaves = tuple(t.requires_grad_() for t in tensors(chain))
    for ours, theirs in zip(composed(how, chain, leaves), pair_by_pair(order, chain, leaves), strict=True):
        upstream = drawing.random(*ours.shape)
        found, expected = (
            torch.autograd.grad(y, leaves, upstream, retain_graph=True, allow_unused=True, materialize_grads=True)
            for y in (ours, theirs)
        )
        assert close(found, expected)


@given(compositions(), st.data())
def test_forward_derivatives(case: tuple[Composer, Order, tuple[Kernel, ...]], data: st.DataObject) -> None:
    how, order, chain = case
    primals = tensors(chain)
    moving = data.draw(st.lists(st.booleans(), min_size=len(primals), max_size=len(primals)).filter(any))
    tangents = tuple(drawing.random(*t.shape) if moves else None for t, moves in zip(primals, moving, strict=True))
    points = tuple(p for p, t in zip(primals, tangents, strict=True) if t is not None)
    slopes = tuple(t for t in tangents if t is not None)

    def placed(given: Tensors) -> Tensors:
        rest = iter(given)
        return tuple(p if t is None else next(rest) for p, t in zip(primals, tangents, strict=True))

    ours = jvp(lambda *given: composed(how, chain, placed(given)), points, slopes)
    theirs = jvp(lambda *given: pair_by_pair(order, chain, placed(given)), points, slopes)
    assert close(ours[0], theirs[0])
    assert close(ours[1], theirs[1])


@given(compositions())
def test_many_at_once(case: tuple[Composer, Order, tuple[Kernel, ...]]) -> None:
    how, order, chain = case
    batch = tuple(torch.stack([t, 2 * t, drawing.random(*t.shape)]) for t in tensors(chain))

    def loss(given: Tensors) -> Tensor:
        return torch.stack([t.square().sum() for t in composed(how, chain, given)]).sum()

    def expected(given: Tensors) -> Tensor:
        return torch.stack([t.square().sum() for t in pair_by_pair(order, chain, given)]).sum()

    assert close(
        vmap(lambda *given: composed(how, chain, given))(*batch),
        tuple(
            map(
                torch.stack,
                zip(*(pair_by_pair(order, chain, tuple(t[i] for t in batch)) for i in range(3)), strict=True),
            )
        ),
    )
    ours = vmap(grad(loss))(batch)
    theirs = [grad(expected)(tuple(t[i] for t in batch)) for i in range(3)]
    assert close(ours, tuple(map(torch.stack, zip(*theirs, strict=True))))


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (Kernel(torch.ones(4, 2, 3, 3)), Kernel(torch.ones(5, 4, 1, 1)), PointwiseLast),
        (Kernel(torch.ones(4, 2, 1, 1)), Kernel(torch.ones(5, 4, 3, 3)), PointwiseFirst),
        (Kernel(torch.ones(4, 2, 1, 1)), Kernel(torch.ones(5, 4, 5, 5)), PointwiseFirst),
        (Kernel(torch.ones(4, 2, 3, 3)), Kernel(torch.ones(5, 4, 3, 3)), Spread),
        (Kernel(torch.ones(4, 1, 3, 3), groups=4), Kernel(torch.ones(5, 4, 1, 1)), Scaled),
        (Kernel(torch.ones(4, 2, 3, 3)), Kernel(torch.ones(4, 1, 1, 1), groups=4), Scaled),
        (Kernel(torch.ones(4, 2, 3, 3), groups=2), Kernel(torch.ones(6, 4, 1, 1)), type(None)),
    ],
)
def test_which_product(first: Kernel, second: Kernel, expected: type[Product]) -> None:
    assert type(product_of(first, second)) is expected


def test_kernels_of_different_groups_are_left_to_compose() -> None:
    chain = [Kernel(torch.ones(4, 2, 3, 3), groups=2), Kernel(torch.ones(6, 4, 1, 1))]
    assert Composer.of((0, 1), chain) is None


def chain_of_two(*, first: bool, second: bool) -> tuple[Kernel, Kernel]:
    a = Kernel(drawing.random(6, 3, 3, 3), drawing.random(6) if first else None)
    return a, Kernel(drawing.random(4, 6, 1, 1), drawing.random(4) if second else None)


@pytest.mark.parametrize(("first", "second"), [(False, False), (False, True), (True, True)])
def test_biases_that_come_or_go_later_do_not_fit(first: bool, second: bool) -> None:
    how = Composer.of((0, 1), chain_of_two(first=True, second=False))
    assert how is not None
    a, b = chain_of_two(first=first, second=second)
    assert how.numbers((a.weight, b.weight), (a.bias, b.bias)) is None


def test_copies() -> None:
    chain = chain_of_two(first=True, second=True)
    how = Composer.of((0, 1), chain)
    assert how is not None
    numbers(how, [k.weight for k in chain], [k.bias for k in chain])  # what it has traced by then goes with no copy
    assert copy.deepcopy(how) is how  # so that a copy of a model has nothing to trace
    for copied in (copy.copy(how), pickle.loads(pickle.dumps(how))):
        found = numbers(copied, [k.weight for k in chain], [k.bias for k in chain])
        expected = numbers(how, [k.weight for k in chain], [k.bias for k in chain])
        assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_weight_written_to_before_the_backward_pass_is_an_error() -> None:
    chain = chain_of_two(first=True, second=True)
    how = Composer.of((0, 1), chain)
    assert how is not None
    leaves = [k.weight.requires_grad_() for k in chain]
    whole, _ = numbers(how, leaves, [k.bias for k in chain])
    with torch.no_grad():
        leaves[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        whole.sum().backward()


def grouped_chain() -> tuple[Composer, list[Kernel], list[Tensor]]:
    """Two kernels with groups and biases, and their tensors as leaves."""
    chain = [
        Kernel(drawing.random(6, 2, 3, 3), drawing.random(6), groups=3),
        Kernel(drawing.random(9, 2, 3, 3), drawing.random(9), groups=3),
    ]
    how = Composer.of((0, 1), chain)
    assert how is not None
    return how, chain, [t.requires_grad_() for t in tensors(tuple(chain))]


@pytest.mark.parametrize("before", [False, True])
def test_several_gradients_at_once_of_one_forward_pass(before: bool) -> None:
    how, chain, leaves = grouped_chain()
    whole = numbers(how, [k.weight for k in chain], [k.bias for k in chain])
    assert whole[1] is not None
    outputs = whole[0], whole[1]
    upstream = [drawing.random(4, *y.shape) for y in outputs]
    if before:  # a plain step, after which all is traced
        torch.autograd.grad(outputs, leaves, [g[0] for g in upstream], retain_graph=True)

    def gradients(*g: Tensor) -> Tensors:
        return torch.autograd.grad(outputs, leaves, g, retain_graph=True)

    expected = tuple(map(torch.stack, zip(*(gradients(*(g[i] for g in upstream)) for i in range(4)), strict=True)))
    assert close(vmap(gradients)(*upstream), expected)
    one_bias = torch.autograd.grad(outputs, leaves, (upstream[0][0], upstream[1][0]), retain_graph=True)
    shared = vmap(gradients, in_dims=(None, 0))(upstream[0][0], upstream[1])
    assert close(tuple(g[0] for g in shared), one_bias)
    assert close(torch.autograd.grad(outputs, leaves, upstream, is_grads_batched=True), expected)


class Wrapped(Tensor):
    """A subclass that does nothing of its own."""


class Watching(TorchFunctionMode):
    """Whatever calls give."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[type] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        self.seen.add(type(found))
        return found


def test_subclasses_and_modes_of_torch_see_tensors_alone() -> None:
    how, chain, leaves = grouped_chain()
    weights = [k.weight.detach().as_subclass(Wrapped).requires_grad_() for k in chain]
    whole, _ = numbers(how, weights, [k.bias for k in chain])
    whole.square().sum().backward()
    assert all(weight.grad is not None for weight in weights)
    how, chain, leaves = grouped_chain()
    with Watching() as watching:
        whole, _ = numbers(how, [k.weight for k in chain], [k.bias for k in chain])
        whole.square().sum().backward()
    assert leaves[0].grad is not None
    assert fx.Proxy not in watching.seen


def test_gradients_are_exact_where_backward_runs_under_autocast() -> None:
    chain = [k.to(dtype=torch.float32) for k in chain_of_two(first=True, second=True)]
    how = Composer.of((0, 1), chain)
    assert how is not None
    weights = [k.weight.clone().requires_grad_() for k in chain]
    whole, _ = numbers(how, weights, [k.bias for k in chain])
    upstream = torch.randn_like(whole)
    expected = torch.autograd.grad(whole, weights, upstream, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(whole, weights, upstream)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
