"""How far rounding can move what a model returns: a bound from its operations, its dtypes, and what they amplify.

A product that accumulates k terms computes what the exact one computes of data that is off by at most

    γ_k = k·u / (1 − k·u),    u the unit roundoff

relative to each number (Higham, *Accuracy and Stability of Numerical Algorithms*, 2nd ed., §3.1, (3.4) and (3.5)).
So the error of a model is, to first order, at most Σ_l γ_l·κ_l, summed over its operations l, where κ_l is how far the
result moves, relative to ε, when the data of operation l moves by a relative ε; and by Cauchy and Schwarz

    ‖ŷ − y‖₂ ≤ Σ_l γ_l·κ_l ≤ γ·κ,    γ = (Σ_l γ_l²)^½,    κ = (Σ_l κ_l²)^½

The k_l are counted while the model runs. κ is measured: the model runs again with the operands of every product, and
the result of every other operation, off by ε in random directions, which moves the result by ε·κ in the root mean
square (a condition estimate in the manner of Monte Carlo arithmetic: Parker, Pierce and Eggert, *Computing in Science
& Engineering* 2(4), 2000). ε = √u, where truncation and rounding of such a quotient balance. So the bound is rigorous
in γ, and an estimate in κ: directions that are worse than random ones are what the worst case in γ leaves room for.

Products of half-precision numbers are accumulated in float32, so there are two units: γ_k(2⁻²⁴) for the sum, and
γ_2(u) for rounding to the dtype before and after (Blanchard, Higham, Lopez, Mary and Pranesh, *SIAM J. Sci. Comput.*
42(3), 2020, §3). TF32 rounds the operands of a product to 11 bits, u = 2⁻¹¹, and no more; on CUDA torch allows it in
cuDNN's convolutions unless told otherwise, and in matrix products when told so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from math import inf, isfinite, prod, sqrt
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fxexpand.errors import FxExpandError
from fxexpand.report.run import copied, undisturbed
from fxexpand.report.verify import Leaves, as_float64, leaves_of

UNIT_ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
TF32 = 2.0**-11

# How often κ is sampled. A direction in which an output hardly moves is drawn once in a while, hardly four times.
_SAMPLES = 4

# How many random signs there are before they repeat: a prime, so that no axis of a tensor sees the same ones.
_SIGNS = 131_071

_CONVOLUTIONS = {"convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution", "convolution_overrideable"}
_PRODUCTS = {"mm", "bmm", "mv", "dot", "addmm", "baddbmm", "addmv", "_addmm_activation"}
_ATTENTION = "_scaled_dot_product"


class ToleranceError(FxExpandError):
    """No bound on rounding can be given for what was run."""


def gamma(k: int, u: float) -> float:
    """γ_k = k·u / (1 − k·u) (Higham, §3.1). Raises ``ToleranceError`` unless k·u < 1."""
    if k * u >= 1:
        raise ToleranceError(
            f"expected k·u < 1, found a sum of {k} terms with a unit roundoff of {u:.1e}: rounding alone may leave "
            "nothing of it. Compare in a dtype of more digits."
        )
    return k * u / (1 - k * u)


@dataclass(frozen=True)
class Rounding:
    """What rounding may do to one run of a model.

    ``gamma`` is γ over its ``operations``; ``amplification`` is κ of each thing that it returns, in the 2-norm, and 0.0
    for what is no floating tensor.
    """

    operations: int
    gamma: float
    amplification: tuple[float, ...]

    def bound(self, index: int) -> float:
        """The largest error, in the 2-norm, that rounding explains in what is returned at ``index``."""
        return self.gamma * self.amplification[index]

    def __str__(self) -> str:
        return f"γ = {self.gamma:.1e} over {self.operations} operations"


def measured(
    call: Callable[..., object], inputs: tuple[object, ...] = (), model: nn.Module | None = None
) -> tuple[Leaves, Rounding]:
    """What ``call(*inputs)`` returns, leaf by leaf, and what rounding may do to it.

    Calls it several times, with copies of ``inputs``; ``model`` is left as it was, and in eval mode while it runs.
    Raises ``ToleranceError`` where small changes make it return something of another structure every time.
    """

    def leaves_under(mode: TorchDispatchMode) -> Leaves:
        with undisturbed(model, inputs) if model is not None else nullcontext():
            own = copied(inputs)
            with mode:
                out = call(*own)
            return list(leaves_of(out, "output"))

    counting = _Counting()
    leaves = leaves_under(counting)
    # Where decisions fall otherwise for changes as large as the coarsest dtype asks for, the finest one's may do.
    for size in map(sqrt, sorted({counting.coarsest, counting.finest}, reverse=True)):
        worst = [-inf] * len(leaves)
        for seed in range(_SAMPLES):
            for i, moved in enumerate(_distances(leaves, leaves_under(_Perturbed(size, seed)))):
                worst[i] = max(worst[i], moved / size)
        if all(map(isfinite, worst)):
            return leaves, Rounding(counting.operations, sqrt(counting.squares), tuple(worst))
    path = leaves[worst.index(-inf)][0]
    raise ToleranceError(
        f"{path}: expected a result whose shape holds when data changes by {size:.1e}, found another each time. "
        "Compare inputs for which its decisions are not so close."
    )


def distance(x: Tensor, y: Tensor) -> float:
    """‖y − x‖₂ in float64; ∞ where one is NaN or infinite and the other is not the same."""
    x, y = as_float64(x), as_float64(y)
    same = (x == y) | (x.isnan() & y.isnan())
    found = float(torch.linalg.vector_norm(torch.where(same, 0.0, y - x)))
    return found if isfinite(found) else inf


def _distances(leaves: Leaves, perturbed: Leaves) -> list[float]:
    """How far each leaf has moved; −∞ where there is none of its kind any more."""
    found = [-inf] * len(leaves)
    others = dict(perturbed)
    for i, (path, leaf) in enumerate(leaves):
        if not (isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())):
            found[i] = 0.0
            continue
        other = others.get(path)
        if isinstance(other, Tensor) and other.shape == leaf.shape:
            moved = distance(leaf, other)
            found[i] = moved if isfinite(moved) else -inf
    return found


class _Counting(TorchDispatchMode):
    """Adds up γ² of the operations, and finds the coarsest and the finest unit of their results."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = 0
        self.squares = 0.0
        self.coarsest = self.finest = UNIT_ROUNDOFF[torch.float64]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        results = _fresh(func, args, out)
        if results:
            roundings = _roundings(func, args, results)
            self.operations += 1
            self.squares += sum(gamma(k, u) for u, k in roundings.items()) ** 2
            self.coarsest = max(self.coarsest, *roundings)
            self.finest = min(self.finest, *roundings) if self.operations > 1 else min(roundings)
        return out


class _Perturbed(TorchDispatchMode):
    """Moves the operands of products, and the results of everything else, by a relative ``size`` either way."""

    def __init__(self, size: float, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.random = Random(seed)
        signs = torch.randint(0, 2, (_SIGNS,), generator=torch.Generator().manual_seed(seed)) * 2 - 1
        self.factors = 1 + size * signs.double()
        self.held: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _is_product(func):
            return func(*(self._moved(arg) if _floating(arg) else arg for arg in args), **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        if not _fresh(func, args, out):
            return out
        if isinstance(out, (tuple, list)):
            return type(out)(self._moved(part) if _floating(part) else part for part in out)
        return self._moved(out)

    def _moved(self, x: Tensor) -> Tensor:
        key = (x.device, x.dtype.to_real())
        if key not in self.held:
            self.held[key] = self.factors.to(*key)
        factors = self.held[key].roll(self.random.randrange(_SIGNS))
        flat = x.reshape(-1)
        moved = torch.empty_like(flat)
        whole = len(flat) // _SIGNS * _SIGNS
        torch.mul(flat[:whole].view(-1, _SIGNS), factors, out=moved[:whole].view(-1, _SIGNS))
        torch.mul(flat[whole:], factors[: len(flat) - whole], out=moved[whole:])
        return moved.view(x.shape)


def _fresh(func: Any, args: Any, out: Any) -> list[Tensor]:
    """The floating tensors that an operation has computed: none for views, changes in place, and what reads nothing."""
    schema = func._schema
    if schema.is_mutable or any(result.alias_info is not None for result in schema.returns):
        return []
    if not any(map(_floating, _flat(args))):
        return []
    return [part for part in _flat(out) if _floating(part) and part.numel()]


def _roundings(func: Any, args: Any, results: list[Tensor]) -> Counter[float]:
    """How many roundings lie between the operands and the results, by unit roundoff."""
    dtype = results[0].dtype.to_real()
    unit = UNIT_ROUNDOFF.get(dtype, 2.0**-53)
    accumulator = min(unit, UNIT_ROUNDOFF[torch.float32])
    if not _is_product(func):
        terms = _reduced(func, args, results)
        return Counter({unit: 1}) + Counter({accumulator: terms - 1})
    # The sum and its bias; the operands, which may have been rounded when they were made; and the result.
    found = Counter({accumulator: _accumulated(func, args) + 1}) + Counter({unit: 2})
    if _takes_tf32(func, results[0]):
        found += Counter({TF32: 2})
    return found


def _is_product(func: Any) -> bool:
    name = func._schema.name.partition("::")[2]
    known = name in _CONVOLUTIONS or name in _PRODUCTS or name == "convolution_backward"
    return known or name.startswith((_ATTENTION, "_native_multi_head", "_transformer_encoder"))


def _accumulated(func: Any, args: Any) -> int:
    """The terms of each sum that a product computes."""
    name = func._schema.name.partition("::")[2]
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    if name in _CONVOLUTIONS:
        weight = tensors[1]
        return int(max(weight.numel() // weight.shape[0], weight.numel() // weight.shape[1]))  # also transposed
    if name == "convolution_backward":  # of the input: the weights of a channel; of the weight: the places of a channel
        gradient, _, weight = tensors[:3]
        return int(max(gradient.numel() // gradient.shape[1], weight.numel() // weight.shape[1]))
    if name.startswith(_ATTENTION):  # scores, then their means: features, then places
        return int(tensors[0].shape[-1] + 2 * tensors[1].shape[-2])
    if name in _PRODUCTS:
        return int(tensors[-1].shape[-2 if tensors[-1].dim() > 1 else -1])
    return sum(int(tensor.shape[-1]) for tensor in tensors if tensor.dim() > 1)  # several products in one


def _reduced(func: Any, args: Any, results: list[Tensor]) -> int:
    """The terms that an operation other than a product adds up for each of its results: 1 for elementwise ones."""
    read = max((arg.numel() for arg in _flat(args) if _floating(arg)), default=1)
    name = func._schema.name.partition("::")[2]
    if name.startswith("avg_pool"):
        return int(prod(args[2 if name.endswith("_backward") else 1]))
    if name.startswith("_adaptive_avg_pool"):
        return int(prod(args[0].shape[2:]))
    if name in {"_softmax", "_log_softmax"}:
        return int(args[0].shape[args[1]])
    return int(max(read // result.numel() for result in results)) or 1


def _takes_tf32(func: Any, result: Tensor) -> bool:
    """Whether a product of float32 numbers rounds its operands to TF32, as torch is set now."""
    if result.device.type != "cuda" or result.dtype != torch.float32:
        return False
    backends: Any = torch.backends
    convolves = "convolution" in func._schema.name
    place = backends.cudnn.conv if convolves else backends.cuda.matmul
    return str(place.fp32_precision) == "tf32"


def _flat(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [part for item in value for part in _flat(item)]
    return [value]


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
