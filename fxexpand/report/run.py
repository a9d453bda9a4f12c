"""How this package runs a model without leaving a trace in it."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils import _pytree as pytree

from fxexpand.errors import FxExpandError


def check_module(model: object, where: str, error: type[FxExpandError]) -> None:
    """Raises `error`, its message opening with `where`, unless `model` is a module whose tensors all have a shape."""
    if not isinstance(model, nn.Module):
        found = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        wanted = "the model that was exported" if isinstance(model, ExportedProgram) else "an instance of the model"
        raise error(f"{where}: expected a torch.nn.Module, found {found}. Pass {wanted}.")
    for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(tensor, (UninitializedParameter, UninitializedBuffer)):
            raise error(
                f"{where}: {path} in {type(model).__name__}: expected a tensor with a shape, found a lazy one "
                "without. Run the model once on an example first."
            )


@dataclass(frozen=True)
class _Kept:
    """A parameter or buffer as it was: the tensor itself, its memory (``held``), and what that held (``value``)."""

    owner: nn.Module
    name: str
    tensor: Tensor
    version: int
    held: Tensor
    value: Tensor

    def restore(self) -> None:
        """Put back what has changed. Writing without need would invalidate graphs that have saved the tensor."""
        moved = self.tensor.data_ptr() != self.held.data_ptr() or self.tensor.shape != self.held.shape
        if moved or self.tensor._version != self.version or not _same(self.held, self.value):
            with torch.no_grad():
                self.held.copy_(self.value)
                if moved:
                    self.tensor.data = self.held
        if getattr(self.owner, self.name, None) is not self.tensor:
            setattr(self.owner, self.name, self.tensor)


def _kept(model: nn.Module) -> list[_Kept]:
    """The parameters and buffers of ``model``; an inference tensor has no version, and cannot be written either."""
    return [
        _Kept(module, name, tensor, tensor._version, tensor.data, tensor.detach().clone())
        for module in model.modules()
        for named in (module.named_parameters, module.named_buffers)
        for name, tensor in named(recurse=False, remove_duplicate=False)
        if not tensor.is_inference()
    ]


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether no element differs, as far as that can be asked: batch norm and ``.data`` write without a trace."""
    if a.is_meta or a.layout is not torch.strided or a.is_quantized:
        return True
    if torch.equal(a, b):
        return True
    return a.is_floating_point() and bool(((a == b) | (a.isnan() & b.isnan())).all())


@contextmanager
def undisturbed(model: nn.Module, inputs: tuple[object, ...]) -> Iterator[None]:
    """Within it `model` is in eval mode, without gradients. Leaving it, also by an exception, restores every module's
    own training flag, parameters and buffers, and the random number generators of the devices that model and inputs
    are on. For that it holds a copy of all parameters and buffers: code may change them in its forward.

    The flags are set directly: a model's own `eval()` may do more (merge adapters, say) than could be undone.
    """
    # A frozen TorchScript module has no flag.
    flags = [(module, module.training) for module in model.modules() if hasattr(module, "training")]
    kept = _kept(model)
    try:
        with torch.no_grad(), _forked_rng([*model.parameters(), *model.buffers(), *pytree.tree_leaves(inputs)]):
            for module, _ in flags:
                module.training = False
            yield
    finally:
        for module, flag in flags:
            module.training = flag
        for each in kept:
            each.restore()


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
