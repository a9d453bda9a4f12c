"""Every order of composing a chain gives the same kernel, and the cheapest one is found."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import drawing
from fxexpand.algebra import Kernel, Refusal
from fxexpand.algebra.order import Order, cheapest_order, compose_in, composition_cost


def orders(start: int, end: int) -> list[Order]:
    """All ways to put brackets around the positions from ``start`` to ``end``."""
    if end == start + 1:
        return [start]
    return [(a, b) for cut in range(start + 1, end) for a in orders(start, cut) for b in orders(cut, end)]


def cost(order: Order, chain: list[Kernel]) -> tuple[int, Kernel]:
    if isinstance(order, int):
        return 0, chain[order]
    (a, first), (b, second) = cost(order[0], chain), cost(order[1], chain)
    whole = compose_in((0, 1), [first, second])
    assert isinstance(whole, Kernel)
    return a + b + composition_cost(first, second), whole


CHAINS: dict[str, list[tuple[tuple[int, int], tuple[int, ...]]]] = {
    "CL": [((12, 3), ()), ((32, 12), (7, 7)), ((8, 32), ())],
    "CL, grouped": [((12, 2), ()), ((12, 6), (3, 3)), ((4, 6), ())],
    "CK": [((8, 2), (3, 3)), ((16, 8), (3, 3)), ((4, 16), (3, 3))],
    "FC": [((40, 10), ()), ((5, 40), ()), ((6, 5), ()), ((3, 6), ())],
    "deep": [((4, 4), (1,)), ((4, 4), (5,)), ((9, 4), (1,)), ((2, 9), (3,)), ((8, 2), (1,))],
}


def kernels(name: str) -> list[Kernel]:
    groups = 2 if "grouped" in name else 1
    d = max(len(taps) for _, taps in CHAINS[name])
    return [
        Kernel(drawing.random(*shape, *(taps or (1,) * d)), drawing.random(shape[0]), groups=groups)
        for shape, taps in CHAINS[name]
    ]


@pytest.mark.parametrize("name", CHAINS)
def test_every_order_gives_the_same_kernel_and_none_is_cheaper(name: str) -> None:
    chain = kernels(name)
    best = cheapest_order([kernel.to(device="meta") for kernel in chain])
    assert not isinstance(best, Refusal)
    expected = compose_in(best, chain)
    assert isinstance(expected, Kernel)
    costs = []
    for order in orders(0, len(chain)):
        spent, whole = cost(order, chain)
        costs.append(spent)
        assert torch.allclose(whole.weight, expected.weight, rtol=1e-11, atol=1e-11)
        assert whole.bias is not None
        assert expected.bias is not None
        assert torch.allclose(whole.bias, expected.bias, rtol=1e-11, atol=1e-11)
    assert cost(best, chain)[0] == min(costs)


def test_of_linear_layers_it_is_the_order_of_the_matrix_chain() -> None:
    widths = (10, 40, 5, 6, 3)
    chain = [Kernel(drawing.random(n, m)) for m, n in pairwise(widths)]
    # 3·6·5 and 3·5·40 and 3·40·10 from the last, 2,010 in all; ((1∘0), …) costs 5·40·10 + 3·6·5 + 3·5·10 = 2,240.
    assert cheapest_order(chain) == (0, (1, (2, 3)))


def test_what_cannot_be_composed_is_refused() -> None:
    bias, padded = (
        Kernel(drawing.random(2, 2, 3), drawing.random(2)),
        Kernel(drawing.random(2, 2, 3), None, (), ((1, 1),)),
    )
    assert isinstance(cheapest_order([bias, padded]), Refusal)
    assert isinstance(compose_in((0, 1), [bias, padded]), Refusal)
    assert isinstance(cheapest_order([]), Refusal)
    assert cheapest_order([bias]) == 0
