"""What a model costs: parameters and multiply-accumulates, per module and in total."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.flop_counter import FlopCounterMode

from fxexpand.errors import FxExpandError
from fxexpand.graph.sharded import check_whole
from fxexpand.report.run import check_module, copied, undisturbed

aten = torch.ops.aten


@dataclass(frozen=True)
class Row:
    """What one module costs by itself, its submodules not counted in."""

    kind: str  # the name of its class
    path: str  # dotted; empty for the model itself
    parameters: int  # elements of the parameters it owns and that no earlier row has counted
    macs: int | None  # over all its calls; None if the model was not run
    tied: tuple[str, ...] = ()  # "weight = encoder.weight": the parameters that an earlier row has counted


@dataclass(frozen=True)
class Summary:
    """What a model costs; `str()` is a table of it."""

    rows: tuple[Row, ...]  # in the order of `named_modules`
    parameters: int
    macs: int | None

    def __str__(self) -> str:
        counted = self.macs is not None
        lines = [("layer", "class", "parameters", "MACs" if counted else "", "")]
        for row in self.rows:
            note = f"tied: {', '.join(row.tied)}" if row.tied else ""
            lines.append((row.path or "(model)", row.kind, f"{row.parameters:,}", _number(row.macs), note))
        lines.append(("total", "", f"{self.parameters:,}", _number(self.macs), ""))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = [
            f"{path:<{widths[0]}}  {kind:<{widths[1]}}  {parameters:>{widths[2]}}  {macs:>{widths[3]}}  {note}".rstrip()
            for path, kind, parameters, macs, note in lines
        ]
        rule = "-" * max(map(len, table))
        return "\n".join([table[0], rule, *table[1:-1], rule, table[-1]])


def _number(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def summary(model: nn.Module, *example_inputs: object) -> Summary:
    """Parameters and multiply-accumulates (MACs) of `model`, per module and in total. The model is left as it was.

    A row for every module that owns parameters, or that does MACs which no submodule accounts for (a functional
    convolution, the products of an attention). A module or parameter under two names is counted once, under the first.
    MACs are those of one forward in eval mode, all calls of a module together: half of what torch's `FlopCounterMode`
    counts, which takes padding for work and knows matrix products, convolutions and attention, not elementwise
    arithmetic.

    Args:
        model: any module; also on the meta device.
        *example_inputs: what it is called with; they are copied. Without them MACs are None.

    Raises:
        FxExpandError: `model` is no module, has lazy parameters without a shape, or is to be run though it is sharded
            by `fully_shard`. What the model itself raises passes unchanged.
    """
    check_module(model, "summary", FxExpandError)
    if example_inputs:
        check_whole(model, "summary", FxExpandError, rewritten=False)
    macs = _macs(model, example_inputs) if example_inputs else None
    rows = tuple(_rows(model, macs))
    return Summary(rows, sum(row.parameters for row in rows), None if macs is None else sum(macs.values()))


def _rows(model: nn.Module, macs: dict[nn.Module, int] | None) -> Iterator[Row]:
    names: dict[int, str] = {}  # the first name of each parameter
    for path, module in model.named_modules():
        owned = dict(module.named_parameters(prefix=path, recurse=False, remove_duplicate=False))
        new = {name: tensor for name, tensor in owned.items() if names.setdefault(id(tensor), name) == name}
        tied = tuple(f"{name.rpartition('.')[2]} = {names[id(owned[name])]}" for name in owned if name not in new)
        own_macs = None if macs is None else macs.get(module, 0)
        if owned or own_macs:
            yield Row(type(module).__name__, path, sum(map(Tensor.numel, new.values())), own_macs, tied)


def _macs(model: nn.Module, inputs: tuple[object, ...]) -> dict[nn.Module, int]:
    """The MACs that each module does itself, in one forward.

    The counter's own attribution goes by class names and last paths, which two modules can share. So only its total is
    used: between two hooks only the innermost running module works, and what the total grew by is its own.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    members = set(model.modules())
    flops: dict[nn.Module, int] = defaultdict(int)
    running = [model]
    counted = 0

    def settle(module: nn.Module) -> bool:
        nonlocal counted
        total = counter.get_total_flops()
        flops[running[-1]] += total - counted
        counted = total
        return module in members

    def enter(module: nn.Module, args: object) -> None:
        if settle(module):
            running.append(module)

    def leave(module: nn.Module, args: object, output: object) -> None:
        if settle(module):
            running.pop()

    with undisturbed(model, inputs), _composite_attention(), ExitStack() as hooks:
        arguments = copied(inputs)
        hooks.callback(register_module_forward_pre_hook(enter).remove)
        hooks.callback(register_module_forward_hook(leave, always_call=True).remove)
        with counter:
            model(*arguments)
    settle(model)
    return {module: count // 2 for module, count in flops.items()}


@contextmanager
def _composite_attention() -> Iterator[None]:
    """The fused kernel of `nn.MultiheadAttention` is one operator that the counter cannot see into."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


# Shapes to FLOPs, for the products and recurrent kernels that torch's counter passes over.


def _mv(matrix: torch.Size, vector: torch.Size, **_: object) -> int:
    return 2 * prod(matrix)


def _addmv(summand: torch.Size, matrix: torch.Size, vector: torch.Size, **_: object) -> int:
    return 2 * prod(matrix)


def _addbmm(summand: torch.Size, left: torch.Size, right: torch.Size, **_: object) -> int:
    return 2 * prod(left) * right[-1]  # (b, n, m) @ (b, m, p)


def _bilinear(left: torch.Size, weight: torch.Size, right: torch.Size, *_: object, **__: object) -> int:
    return 2 * prod(left[:-1]) * prod(weight)  # (batch, i), (out, i, j), (batch, j)


def _onednn_rnn(x: torch.Size, w_input: torch.Size, w_hidden: torch.Size, *_: object, **__: object) -> int:
    return 2 * prod(x[:-1]) * (prod(w_input) + prod(w_hidden))  # (time, batch, features)


def _cudnn_rnn(x: torch.Size, weights: list[torch.Size], *_: object, **__: object) -> int:
    return 2 * prod(x[:-1]) * sum(prod(weight) for weight in weights if len(weight) == 2)


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object) -> int:
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])  # (batch, heads, positions, features)


_FORMULAS: dict[Any, Callable[..., int]] = {
    aten.mv: _mv,
    aten.addmv: _addmv,
    aten.dot: _mv,
    aten.vdot: _mv,
    aten.addbmm: _addbmm,
    aten._trilinear: _bilinear,
    aten.mkldnn_rnn_layer: _onednn_rnn,
    aten._cudnn_rnn: _cudnn_rnn,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,  # torch 2.11 passes over it
}
