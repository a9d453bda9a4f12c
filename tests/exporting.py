"""What tests of exported programs ask of every fused one: valid, the same function, its own tensors, true records."""

from __future__ import annotations

import copy
import io
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

import fxexpand
from behaviour import tensors_in

CONVOLUTIONS = {"conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d"}
NORMS = {"batch_norm", "_native_batch_norm_legit_no_training"}
PRODUCTS = {"linear", "addmm", "mm", "matmul"}


def export(model: nn.Module, *inputs: Any, core: bool = False, **options: Any) -> ExportedProgram:
    """The model as a program of the training IR, or of core ATen."""
    program = torch.export.export(model, inputs, **options)
    return program.run_decompositions() if core else program


def counts(program: ExportedProgram) -> dict[str, int]:
    """How many calls of each ATen operator are left, but for views of weights."""
    names = [
        str(node.target.__name__).partition(".")[0] if isinstance(node.target, torch._ops.OpOverload) else "getitem"
        for node in program.graph.nodes
        if node.op == "call_function"
    ]
    return dict(Counter(name for name in names if name not in ("permute", "getitem")))


def kinds(program: ExportedProgram) -> tuple[int, int, int]:
    """How many convolutions, batch norms and matrix products there are."""
    found = counts(program)
    convolutions, norms, products = (
        sum(found.get(name, 0) for name in kind) for kind in (CONVOLUTIONS, NORMS, PRODUCTS)
    )
    return convolutions, norms, products


def fused(
    program: ExportedProgram, *calls: tuple[Any, ...], when: str = "cheaper", rtol: float = 1e-10
) -> ExportedProgram:
    """The fused program, after what must hold of any; ``calls`` are inputs beside those of the export."""
    before = _picture(program)
    found = fxexpand.fuse(program, when=when)
    assert _picture(program) == before
    found.validate()
    loaded = reloaded(found)
    assert program.example_inputs is not None
    for inputs in (program.example_inputs[0], *calls):
        expected = _run(program, inputs)
        _same(_run(found, inputs), expected, rtol)
        _same(_run(loaded, inputs), expected, rtol)
    assert not _memory(found) & _memory(program)
    _records_are_true(found)
    again = fxexpand.fuse(found, when=when)
    assert counts(again) == counts(found)
    assert list(again.state_dict) == list(found.state_dict)
    return found


def reloaded(program: ExportedProgram) -> ExportedProgram:
    """The program, saved and loaded."""
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def _picture(program: ExportedProgram) -> Any:
    values = {**program.state_dict, **program.constants}
    tensors = {
        name: (id(value), value.flatten().tolist()) for name, value in values.items() if isinstance(value, Tensor)
    }
    nodes = [(node.format_node(), str(node.meta.get("val"))) for node in program.graph.nodes]
    return nodes, str(program.graph_signature), tensors, str(program.range_constraints), str(program.module_call_graph)


def _run(program: ExportedProgram, inputs: tuple[Any, ...]) -> list[Tensor]:
    """The outputs at two calls, and what they leave in the buffers: a program of its own, as calls change them."""
    module = copy.deepcopy(program).module()
    with torch.no_grad():
        outputs = [tensors_in(module(*copy.deepcopy(inputs))) for _ in range(2)]
    changed = [buffer for name, buffer in module.named_buffers() if name in ("count", "seen")]
    return [tensor for found in (*outputs, changed) for tensor in found]


def _same(found: list[Tensor], expected: list[Tensor], rtol: float) -> None:
    assert len(found) == len(expected)
    for x, y in zip(found, expected, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        error = float((x.double() - y.double()).norm() / y.double().norm().clamp(min=1e-300))
        assert error <= rtol, f"relative error {error:.1e}"


def _memory(program: ExportedProgram) -> set[int]:
    values = (*program.state_dict.values(), *program.constants.values())
    return {value.untyped_storage().data_ptr() for value in values if isinstance(value, Tensor)}


class _Checker(fx.Interpreter):
    """Compares each value with what the program records of it: sizes and strides at the example's lengths."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and isinstance(n.meta.get("val"), Tensor):
            record = n.meta["val"]
            assert value.dtype == record.dtype, n.name
            assert list(value.shape) == [_hint(length) for length in record.shape], n.name
            assert list(value.stride()) == [_hint(step) for step in record.stride()], n.name
        return value


def _hint(length: Any) -> int:
    node: Any = length.node if isinstance(length, torch.SymInt) else None
    return int(length if node is None else node.hint)


def _records_are_true(program: ExportedProgram) -> None:
    held = {**program.state_dict, **program.constants}
    assert program.example_inputs is not None
    given = iter(copy.deepcopy(pytree.tree_leaves(program.example_inputs)))
    inputs = [
        next(given) if spec.target is None else copy.deepcopy(held[spec.target])
        for spec in program.graph_signature.input_specs
    ]
    with torch.no_grad():
        _Checker(program.graph_module).run(*inputs)
