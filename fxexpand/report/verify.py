"""Do two models compute the same function? And if not, which layer is the first to differ?"""

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from reprlib import repr as short_repr

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxexpand.errors import VerificationError
from fxexpand.graph.sharded import check_whole
from fxexpand.report.run import check_module, copied, undisturbed

# What rounding alone may do to a network of a hundred layers: thousands of units in the last place (2.2e-16, 1.2e-7),
# fewer where the unit itself is coarse (9.8e-4, 7.8e-3). A wrong rewrite is seldom off by less than 1e-1.
DEFAULT_RTOL = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

Leaves = list[tuple[str, object]]  # what a model returned, each part with its path: "output['boxes'][0]"


def verify(before: nn.Module, after: nn.Module, *example_inputs: object, rtol: float | None = None) -> float:
    """The largest relative error ‖after − before‖₂ / ‖before‖₂ over the tensors that the two models return.

    Both run in eval mode, without gradients, on copies of `example_inputs` and from the same state of the random number
    generators. Afterwards training flags, buffers and generators are as they were, also upon an exception. Where the
    models differ in device or floating dtype, each gets the inputs in its own.

    Errors are computed in float64 (complex128): 0/0 counts as 0, x/0 as ∞; NaN and ±∞ are equal where both models have
    the same, and otherwise an error of ∞. Integers, booleans and what is no tensor must be equal. Mappings are compared
    key by key, whatever their classes and order.

    Args:
        before: the model to compare with.
        after: the model that should compute the same.
        *example_inputs: what both are called with: tensors, or lists, tuples and dicts of them.
        rtol: the error that is still accepted. The default goes by the coarsest floating dtype returned: 1e-10 for
            float64, 1e-4 for float32, 1e-2 for float16, 5e-2 for bfloat16.

    Returns:
        The error, at most `rtol`; 0.0 if no floating tensor is returned.

    Raises:
        VerificationError: the error is above `rtol`, or shape, kind of dtype or structure differ. The message names the
            first layer, in the order in which `before` runs them, that differs where both models have one of that path.
            Also for arguments that cannot be compared, and for models sharded by `fully_shard`, of which running one
            changes the state. What a model itself raises passes unchanged.
    """
    _check(before, "verify: before", example_inputs)
    _check(after, "verify: after", example_inputs)
    if rtol is not None and not rtol >= 0:
        raise VerificationError(f"verify: expected rtol >= 0, found {rtol!r}. Leave it out for a default by dtype.")
    old_inputs = inputs_for(before, after, example_inputs)
    new_inputs = inputs_for(after, before, example_inputs)
    old, new = _outputs(before, old_inputs), _outputs(after, new_inputs)
    limit = _default_rtol(old + new) if rtol is None else rtol
    difference = _compare(old, new)
    if difference.within(limit):
        return difference.error
    layer = first_layer(before, after, old_inputs, new_inputs, limit)
    expected = difference.expected or f"a relative error of at most rtol={limit:g}"
    remedy = "If rounding alone explains it, compare in float64 or pass a larger rtol."
    if difference.expected:
        remedy = "No tolerance covers this: make both models return the same structure of tensors."
    raise VerificationError(f"{difference.where}: expected {expected}, found {difference.found}. {layer} {remedy}")


def _check(model: object, where: str, inputs: tuple[object, ...]) -> None:
    check_module(model, where, VerificationError)
    if isinstance(model, nn.Module):
        check_whole(model, where, VerificationError, rewritten=False)
    if inputs or not isinstance(model, nn.Module):
        return
    try:
        inspect.signature(model.forward).bind()
    except ValueError:  # TorchScript has no signature to look at
        return
    except TypeError as missing:
        raise VerificationError(
            f"{where}: expected example inputs for {type(model).__name__}.forward, found none ({missing}). "
            "Pass them after the two models."
        ) from None


def inputs_for(model: nn.Module, other: nn.Module, inputs: tuple[object, ...]) -> tuple[object, ...]:
    """`inputs` on the device and in the floating dtype of `model`, if `other` has another."""
    device, dtype = home_of(model)
    if (device, dtype) == home_of(other):
        return inputs

    def move(leaf: Tensor) -> Tensor:
        moved = leaf.detach().to(device=device, dtype=dtype if leaf.is_floating_point() else None)
        return moved.requires_grad_(leaf.requires_grad)

    moved: tuple[object, ...] = pytree.tree_map_only(Tensor, move, inputs)
    return moved


def home_of(model: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
    """The device and the floating dtype of the parameters (without any, buffers); None unless there is exactly one."""
    tensors: list[Tensor] = [*model.parameters()] or [*model.buffers()]
    devices = {tensor.device for tensor in tensors}
    dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    return devices.pop() if len(devices) == 1 else None, dtypes.pop() if len(dtypes) == 1 else None


# --- what a model returns, as a flat list ---


@dataclass(frozen=True)
class _Container:
    """Stands for the list, tuple or mapping around the leaves that follow."""

    description: str


def _outputs(model: nn.Module, inputs: tuple[object, ...]) -> Leaves:
    with undisturbed(model, inputs):
        return list(leaves_of(model(*copied(inputs)), "output"))


def leaves_of(value: object, path: str) -> Iterator[tuple[str, object]]:
    """Every container and leaf in `value` with its path; tensors as copies on the CPU, mappings sorted by key."""
    if isinstance(value, Tensor):
        yield path, _on_cpu(value, path)
        return
    if isinstance(value, Mapping):
        keys = sorted(value, key=lambda key: (type(key).__name__, repr(key)))
        description = f"a mapping with keys {keys}"
        children = [(f"[{key!r}]", value[key]) for key in keys]
    elif is_dataclass(value) and not isinstance(value, type):
        description = type(value).__name__
        children = [(f".{field.name}", getattr(value, field.name)) for field in fields(value)]
    else:
        keyed, spec = pytree.tree_flatten_with_path(value, is_leaf=lambda node: node is not value)
        if spec.is_leaf():
            yield path, value
            return
        # torch.fx has a list class of its own
        description = f"{'list' if isinstance(value, list) else type(value).__name__} of {len(keyed)}"
        children = [(pytree.keystr(key), child) for key, child in keyed]
    yield path, _Container(description)
    for key, child in children:
        yield from leaves_of(child, path + key)


def _on_cpu(tensor: Tensor, path: str) -> Tensor:
    if tensor.is_meta:
        raise VerificationError(
            f"{path}: expected a tensor with values, found one on the meta device. Move the models to a real device."
        )
    tensor = tensor.dequantize() if tensor.is_quantized else tensor
    tensor = tensor.to_dense() if tensor.layout != torch.strided else tensor
    return tensor.detach().to("cpu", copy=True)  # a copy: what runs next may write to the same memory


def _default_rtol(leaves: Leaves) -> float:
    limit = DEFAULT_RTOL[torch.float64]
    for path, leaf in leaves:
        if isinstance(leaf, Tensor) and _kind(leaf) in ("floating", "complex"):
            if leaf.dtype.to_real() not in DEFAULT_RTOL:
                raise VerificationError(
                    f"{path}: expected a dtype with a default tolerance ({', '.join(map(str, DEFAULT_RTOL))}), found "
                    f"{leaf.dtype}. Pass rtol."
                )
            limit = max(limit, DEFAULT_RTOL[leaf.dtype.to_real()])
    return limit


# --- comparing two such lists ---


@dataclass(frozen=True)
class Difference:
    """How two leaves differ, and where."""

    where: str
    error: float
    found: str
    expected: str = ""  # given if it is a mismatch, which no tolerance covers

    def within(self, rtol: float) -> bool:
        return not self.expected and self.error <= rtol


_SAME = Difference("output", 0.0, "0")


def _compare(before: Leaves, after: Leaves) -> Difference:
    """The first mismatch, or else the largest error."""
    worst = _SAME
    for (path, expected), (found_path, found) in zip(before, after, strict=False):  # a container has its length
        here = difference_of(path, expected, found) if path == found_path else _mismatch(path, path, found_path)
        if here.expected:
            return here
        worst = max(worst, here, key=lambda each: each.error)
    return worst


def difference_of(path: str, before: object, after: object) -> Difference:
    """How the leaf ``after`` differs from ``before``: a mismatch, or a relative error."""
    if not (isinstance(before, Tensor) and isinstance(after, Tensor)):
        return _SAME if _equal(before, after) else _mismatch(path, _name(before), _name(after))
    if _kind(before) != _kind(after) or before.shape != after.shape:
        return _mismatch(path, _name(before), _name(after))
    if _kind(before) in ("floating", "complex"):
        error = relative_error(before, after)
        return Difference(path, error, f"{error:.2e}")
    differing = int((before.to(torch.int64) != after.to(torch.int64)).sum())
    found = f"{differing} of {before.numel()} elements different"
    return _mismatch(path, f"equal {_kind(before)} tensors", found) if differing else _SAME


def _mismatch(path: str, expected: str, found: str) -> Difference:
    return Difference(path, math.inf, found, expected)


def relative_error(before: Tensor, after: Tensor) -> float:
    """‖after − before‖₂ / ‖before‖₂ of two tensors of one shape, in float64; see `verify` for zeros, NaN and ∞."""
    x, y = as_float64(before), as_float64(after)
    finite = x.isfinite() & y.isfinite()
    if not (finite | (x == y) | (x.isnan() & y.isnan())).all():
        return math.inf
    x, y = x[finite], y[finite]
    largest = max(float(x.abs().max()), float(y.abs().max())) if x.numel() else 0.0
    if not largest:
        return 0.0
    scale = 2.0 ** (math.frexp(largest)[1] - 1)  # no square overflows, nor do all vanish; a power of 2 rounds nothing
    x, y = x / scale, y / scale
    norm, distance = float(torch.linalg.vector_norm(x)), float(torch.linalg.vector_norm(y - x))
    return distance / norm if norm else math.inf


def as_float64(tensor: Tensor) -> Tensor:
    """A real tensor in float64; of a complex one, real and imaginary parts."""
    if tensor.is_complex():
        return torch.view_as_real(tensor.to(torch.complex128).resolve_conj())
    return tensor.to(torch.float64)


def _equal(before: object, after: object) -> bool:
    try:
        return before is after or bool(before == after) or str(before) == str(after) == "nan"
    except (TypeError, ValueError, RuntimeError):  # arrays and the like, which have no single truth value
        return False


def _kind(tensor: Tensor) -> str:
    if tensor.dtype == torch.bool:
        return "boolean"
    if tensor.is_complex():
        return "complex"
    return "floating" if tensor.is_floating_point() else "integer"


def _name(leaf: object) -> str:
    if isinstance(leaf, Tensor):
        return f"a {leaf.dtype} tensor of shape {tuple(leaf.shape)}"
    return leaf.description if isinstance(leaf, _Container) else short_repr(leaf)


# --- the layer to look at ---


def first_layer(
    before: nn.Module, after: nn.Module, old_inputs: tuple[object, ...], new_inputs: tuple[object, ...], rtol: float
) -> str:
    """A sentence that names the first module to differ, found by running both models again."""
    others = dict(after.named_modules(remove_duplicate=False))
    modules = {path: module for path, module in before.named_modules() if path and path in others}
    remaining: dict[str, list[Leaves]] = {path: [] for path in modules}
    for path, leaves in recorded(after, {path: others[path] for path in modules}, new_inputs):
        remaining[path].append(leaves)
    for path, leaves in recorded(before, modules, old_inputs):
        if not remaining[path]:
            continue
        difference = _compare(leaves, remaining[path].pop(0))
        if not difference.within(rtol):
            kind = type(modules[path]).__name__
            what = difference.expected and f"expected {difference.expected}, found "
            return f"The first layer that differs is {path} ({kind}): {what or 'relative error '}{difference.found}."
    return "No layer that both models have differs: look at what runs after the last one or between them."


def recorded(model: nn.Module, modules: dict[str, nn.Module], inputs: tuple[object, ...]) -> list[tuple[str, Leaves]]:
    """What these modules of `model` return, call by call, in the order in which the calls end; only its tensors."""
    calls: list[tuple[str, Leaves]] = []

    def record(path: str, module: nn.Module, args: object, output: object) -> None:
        found = leaves_of(output, "output")
        calls.append((path, [(where, leaf) for where, leaf in found if isinstance(leaf, Tensor | _Container)]))

    with ExitStack() as hooks:
        for path, module in modules.items():
            if not isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
                hooks.callback(module.register_forward_hook(partial(record, path)).remove)
        with undisturbed(model, inputs):
            model(*copied(inputs))
    return calls
