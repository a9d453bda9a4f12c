"""In which order to multiply a chain out: the result is the same, the cost is not."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TypeAlias

from fxexpand.algebra.compose import compose
from fxexpand.algebra.kernel import Kernel
from fxexpand.algebra.product import elements_turned
from fxexpand.algebra.refusal import Refusal

# A position in the chain, or two orders the results of which are composed.
Order: TypeAlias = "int | tuple[Order, Order]"

# What moving a weight's element costs beside a multiply-accumulate: a pointwise kernel before one with few taps takes
# the taps last. Measured on weights of 10⁴ to 10⁶ elements, forward and backward; the order it chooses was the faster
# one, or within a few percent of it.
_MOVED = 40


def cheapest_order(chain: Sequence[Kernel]) -> Order | Refusal:
    """The order of compositions that costs least, for kernels that may be on the device "meta".

    A matrix-chain product (Cormen et al., *Introduction to Algorithms*, §15.2), with the cost of composing two kernels
    in place of that of a matrix product. Refuses where no order gives one kernel.
    """
    best: dict[tuple[int, int], tuple[int, Order, Kernel]] = {(i, i + 1): (0, i, k) for i, k in enumerate(chain)}
    refusal = Refusal("a chain of no layers")
    for length in range(2, len(chain) + 1):
        for start in range(len(chain) - length + 1):
            for cut in range(start + 1, start + length):
                if (start, cut) not in best or (cut, start + length) not in best:
                    continue
                (a, first, left), (b, second, right) = best[start, cut], best[cut, start + length]
                whole = compose(left, right)
                if isinstance(whole, Refusal):
                    refusal = whole
                    continue
                cost = a + b + composition_cost(left, right)
                if (start, start + length) not in best or cost < best[start, start + length][0]:
                    best[start, start + length] = cost, (first, second), whole
    found = best.get((0, len(chain)))
    return refusal if found is None else found[1]


def composition_cost(first: Kernel, second: Kernel) -> int:
    """Multiply-accumulates of composing two kernels, and what moving elements costs beside them."""
    macs, moved = composition_work(first, second)
    return macs + _MOVED * moved


def composition_work(first: Kernel, second: Kernel) -> tuple[int, int]:
    """(multiply-accumulates, elements of a weight that are moved) of composing two kernels."""
    # (n, c/g₂, *k₂) with (c, m/g₁, *k₁): every pair of taps, of all channels that meet
    macs = second.weight.numel() * first.weight.shape[1] * prod(first.kernel_size)
    return macs, elements_turned(first, second)


def compose_in(order: Order, chain: Sequence[Kernel]) -> Kernel | Refusal:
    """The kernel of ``chain``, composed in ``order``."""
    if isinstance(order, int):
        return chain[order]
    first, second = compose_in(order[0], chain), compose_in(order[1], chain)
    if isinstance(first, Refusal) or isinstance(second, Refusal):
        return first if isinstance(first, Refusal) else second
    return compose(first, second)


def shifted(order: Order) -> Order:
    """The same order, one position later in the chain."""
    return order + 1 if isinstance(order, int) else (shifted(order[0]), shifted(order[1]))
