"""How this package runs a model without leaving a trace in it."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils import _pytree as pytree

from fxexpand.errors import FxExpandError


def check_module(model: object, where: str, error: type[FxExpandError]) -> None:
    """Raises `error`, its message opening with `where`, unless `model` is a module whose tensors all have a shape."""
    if not isinstance(model, nn.Module):
        found = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise error(f"{where}: expected a torch.nn.Module, found {found}. Pass an instance of the model.")
    for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(tensor, (UninitializedParameter, UninitializedBuffer)):
            raise error(
                f"{where}: {path} in {type(model).__name__}: expected a tensor with a shape, found a lazy one "
                "without. Run the model once on an example first."
            )


@contextmanager
def undisturbed(model: nn.Module, inputs: tuple[object, ...]) -> Iterator[None]:
    """Within it `model` is in eval mode, without gradients. Leaving it, also by an exception, restores every module's
    own training flag, the buffers, and the random number generators of the devices that model and inputs are on.

    The flags are set directly: a model's own `eval()` may do more (merge adapters, say) than could be undone.
    """
    # A frozen TorchScript module has no flag; an inference tensor has no version, and cannot be written either.
    flags = [(module, module.training) for module in model.modules() if hasattr(module, "training")]
    buffers = [
        (module, name, buffer, buffer._version, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
        if not buffer.is_inference()
    ]
    try:
        with torch.no_grad(), _forked_rng([*model.parameters(), *model.buffers(), *pytree.tree_leaves(inputs)]):
            for module, _ in flags:
                module.training = False
            yield
    finally:
        for module, flag in flags:
            module.training = flag
        for module, name, buffer, version, value in buffers:
            if buffer._version != version:  # writing without need would invalidate graphs that have saved the buffer
                with torch.no_grad():
                    buffer.copy_(value)
            if getattr(module, name, None) is not buffer:
                setattr(module, name, buffer)


@contextmanager
def _forked_rng(values: list[object]) -> Iterator[None]:
    accelerator = torch.accelerator.current_accelerator()
    kind = accelerator.type if accelerator else "cuda"
    devices = {value.device for value in values if isinstance(value, Tensor) and value.device.type == kind}
    with torch.random.fork_rng(devices=sorted(devices, key=str), device_type=kind):
        yield


def copied(inputs: tuple[object, ...]) -> tuple[object, ...]:
    """`inputs` with every tensor cloned and all else copied deeply: a model may write to what it is given."""

    def fresh(leaf: object) -> object:
        if isinstance(leaf, Tensor):
            return leaf.detach().clone().requires_grad_(leaf.requires_grad)
        try:
            return copy.deepcopy(leaf)
        except Exception as error:
            raise FxExpandError(
                "example inputs: expected tensors, or lists, tuples and dicts of what can be copied, found "
                f"{type(leaf).__name__}, for which copying raised {error!r}. Pass the tensors themselves."
            ) from error

    copies: tuple[object, ...] = pytree.tree_map(fresh, inputs)
    return copies
