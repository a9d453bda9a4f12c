"""fuse on exported programs: parameters, buffers and constants that are changed, shared, tied, returned or unused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram

import fxexpand
from exporting import counts, export, fused, kinds, reloaded
from fusing import randomised

DIALECTS = pytest.mark.parametrize("core", [False, True], ids=["training", "core"])
BATCH = ({0: torch.export.Dim("batch")},)


class Net(nn.Module):
    """Layers of 4 channels, and the forward that a test gives."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run = run
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.scale = nn.Parameter(torch.rand(4, 1, 1, 1))
        self.register_buffer("count", torch.ones(4, 1, 1))
        self.register_buffer("gain", torch.rand(4, 1, 1), persistent=False)
        for name in {*self._modules, *self._parameters, *self._buffers} - {*run.__code__.co_names}:
            delattr(self, name)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def image(batch: int = 2) -> Tensor:
    return torch.randn(batch, 4, 6, 5, dtype=torch.float64)


def program(run: Callable[..., Any], core: bool) -> ExportedProgram:
    return export(randomised(Net(run)), image(), core=core)


def targets(found: ExportedProgram) -> list[str]:
    return [spec.target for spec in found.graph_signature.input_specs if spec.target is not None]


def count_before(m: Any, x: Tensor) -> Tensor:
    m.count.add_(1.0)
    y: Tensor = m.bn(m.conv(x)) * m.count
    return y


def count_after(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.bn(m.conv(x)) * m.count
    m.count.mul_(2.0)
    return y


@DIALECTS
@pytest.mark.parametrize("run", [count_before, count_after])
def test_a_buffer_that_the_program_changes_is_never_a_constant(run: Any, core: bool) -> None:
    found = fused(program(run, core))
    assert counts(found)["mul"] >= 1
    assert kinds(found) == (1, 0, 0)
    assert list(found.state_dict) == ["conv.weight", "conv.bias", "count"]


def test_nor_is_one_that_shares_memory_with_it() -> None:
    model = randomised(Net(count_before))
    model.register_buffer("view", model.get_buffer("count").view(4, 1, 1))
    model.run = lambda m, x: count_before(m, x) + m.conv(x) * m.view
    found = fused(export(model, image()))
    assert counts(found)["mul"] == 2


@DIALECTS
def test_statistics_that_training_mode_changes_stay_and_the_user_is_told(core: bool) -> None:
    model = randomised(Net(lambda m, x: m.bn(m.conv(x)))).train()
    with pytest.warns(UserWarning, match=r"call model.eval\(\) before torch.export.export"):
        found = fused(export(model, image(), core=core))
    assert "bn.running_mean" in found.state_dict
    assert sum(count for name, count in counts(found).items() if "batch_norm" in name) == 1


@DIALECTS
def test_a_weight_that_something_else_reads_stays_beside_the_new_one(core: bool) -> None:
    found = fused(program(lambda m, x: torch.relu(m.bn(m.conv(x))) + F.conv2d(x, m.conv.weight, padding=1), core))
    label = "convolution" if core else "conv2d"
    assert targets(found) == [f"conv_{label}.weight", f"conv_{label}.bias", "conv.weight"]
    returned = fused(program(lambda m, x: (m.bn(m.conv(x)), m.conv.weight, m.bn.running_mean), core))
    assert targets(returned)[2:] == ["conv.weight", "bn.running_mean"]


@DIALECTS
def test_tied_weights_each_stand_for_themselves(core: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[1].weight = model[3].weight = model[0].weight
    exported = export(randomised(model), torch.randn(3, 4).double(), core=core)
    assert sum(fused(each).state_dict["3.weight"].numel() for each in (exported, reloaded(exported))) == 32
    assert kinds(fused(exported)) == (0, 0, 2)


@DIALECTS
def test_what_is_computed_of_constants_alone_is_a_constant(core: bool) -> None:
    found = fused(program(lambda m, x: m.bn(F.conv2d(x, m.conv.weight * m.scale)) * m.gain, core))
    assert len(counts(found)) == 1
    assert targets(found) == ["conv.weight", "conv.bias"]
    assert not found.constants


def test_values_and_inputs_that_are_changed_in_place_keep_their_order() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        x.add_(1)
        z: Tensor = m.bn(m.conv(x)).relu_()
        z += 1
        z += m.gain * y
        return z

    found = fused(program(run, core=False))
    assert counts(found)["add_"] == 3
    assert kinds(found) == (2, 0, 0)


@DIALECTS
def test_control_flow_and_modes_are_left_alone(core: bool) -> None:
    def branches(m: Any, x: Tensor) -> Tensor:
        y = m.bn(m.conv(x))
        chosen: Tensor = torch.cond(y.sum() > 0, m.conv, lambda t: t * 2, (y,))
        return chosen

    def without_gradient(m: Any, x: Tensor) -> Tensor:
        y = m.bn(m.conv(x))
        with torch.no_grad():
            z: Tensor = m.conv(y) * 2
        return z

    assert kinds(fused(program(branches, core)))[1] == 0
    assert kinds(fused(program(without_gradient, core)))[1] == 0


@DIALECTS
def test_channels_of_which_the_number_is_free_are_not_counted_on(core: bool) -> None:
    model = randomised(Net(lambda m, x: m.conv(x[:, :4])))
    exported = export(
        model, torch.randn(2, 7, 3, 3).double(), core=core, dynamic_shapes=({1: torch.export.Dim("c", min=5)},)
    )
    found = fused(exported, (torch.randn(2, 9, 3, 3).double(),), when="always")
    assert counts(found)["slice"] == 1


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, input: Tensor, *, factor: float = 1.0) -> dict[str, Tensor]:  # noqa: A002 -- as users call it
        return {"out": self.bn(self.conv(input)) * factor, "in": input}


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = Inner(), Inner(), nn.Conv2d(4, 2, 1)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        y: Tensor = self.head(self.two(self.one(input)["out"].relu(), factor=2.0)["out"])
        return y


@pytest.mark.parametrize("strict", [False, True])
def test_calls_of_modules_keep_their_signatures_and_programs_unflatten(strict: bool) -> None:
    model = randomised(Outer())
    plain = fused(export(model, image(), strict=strict))
    assert kinds(plain) == (2, 0, 0)
    assert list(plain.state_dict) == ["one.conv.weight", "one.conv.bias", "two.conv.weight", "two.conv.bias"]
    kept = fused(export(model, image(), strict=strict, preserve_module_call_signature=("two",)))
    assert kinds(kept) == (3, 0, 0)
    names = {node.name for node in kept.graph.nodes}
    (entry,) = (entry for entry in kept.module_call_graph if entry.fqn == "two")
    assert entry.signature is not None
    assert [value.name in names for value in (*entry.signature.inputs, *entry.signature.outputs) if value.name] == [
        True
    ] * 3
    x = image()
    for found in (plain, kept):
        torch.testing.assert_close(torch.export.unflatten(found)(x), model(x), rtol=1e-12, atol=1e-12)


def test_a_program_that_was_loaded_is_fused_too_and_its_batch_stays_free() -> None:
    loaded = reloaded(export(randomised(Outer()), image(), dynamic_shapes=BATCH))
    found = fused(loaded, (image(5),), (image(1),))
    assert kinds(found) == (2, 0, 0)
    assert str(found.range_constraints) == str(loaded.range_constraints)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_memory_format_and_gradients_carry_over(dtype: torch.dtype) -> None:
    model = randomised(Outer()).to(dtype).to(memory_format=torch.channels_last).requires_grad_(False)
    x = image().to(dtype, memory_format=torch.channels_last)
    found = fused(export(model, x), rtol=4 * torch.finfo(dtype).eps)
    weight = found.state_dict["one.conv.weight"]
    assert (weight.dtype, weight.requires_grad) == (dtype, False)
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_what_does_not_fit_a_program_is_said() -> None:
    exported: Any = export(nn.Linear(2, 2).eval(), torch.randn(1, 2))
    for call, message in (
        (lambda: fxexpand.fuse(exported, torch.randn(1, 2)), "expected no example inputs"),
        (lambda: fxexpand.fuse(exported, lifts={nn.Linear: lambda m: m}), "fuse before the export"),
        (lambda: fxexpand.fuse(exported, when="never"), "expected when='cheaper' or 'always'"),
        (lambda: fxexpand.expand(exported, fxexpand.FC(2)), "fuse and explain alone take exported programs"),
        (lambda: fxexpand.explain(exported, torch.randn(1, 2)), "explain: expected no example inputs"),
        (lambda: fxexpand.verify(exported, exported, torch.randn(1, 2)), "Pass the model that was exported"),
    ):
        with pytest.raises(fxexpand.FxExpandError, match=message):
            call()
    with torch._subclasses.FakeTensorMode():
        fake = torch.export.export(nn.Linear(2, 2), (torch.randn(1, 2),))
    with pytest.raises(fxexpand.FxExpandError, match="Export a model that has them"):
        fxexpand.fuse(fake)


@pytest.mark.parametrize("strict", [False, True])
def test_second_names_of_what_goes_go_too(strict: bool) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.alias = nn.Sequential(self.conv, self.norm)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.norm(self.conv(x))
            return y

    found = fused(export(Twice().eval(), torch.randn(1, 3, 4, 4), strict=strict), rtol=1e-5)
    assert len(found.state_dict) == 2
    assert sorted(found.graph_signature.parameters) == sorted(found.state_dict)


def test_constants_of_integers_that_a_dtype_makes_floating() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.numbers = nn.Buffer(torch.ones(4, 3, dtype=torch.long))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(x) * self.numbers.mean(1, dtype=torch.float32).view(4, 1, 1)
            return y

    for core in (False, True):
        fused(export(Mean().eval(), torch.randn(2, 3, 8, 8), core=core), rtol=1e-5)
