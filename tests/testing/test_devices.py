"""The library on every device there is, in each precision that people use, each held to its own bound."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from torch import nn

import fxexpand
from fxexpand import CL, FC
from fxexpand.testing import (
    Case,
    Picky,
    as_trained,
    assert_equivalent,
    check_model,
    layers,
    linear_chains,
    linear_graphs,
    networks,
)
from fxexpand.testing.devices import pytest_report_header
from fxexpand.testing.tolerance import TF32, measured


@dataclass(frozen=True)
class Precision:
    """A dtype, whether CUDA may round operands of float32 products to TF32, and a memory format."""

    name: str
    dtype: torch.dtype
    tf32: bool = False
    memory_format: torch.memory_format = torch.contiguous_format


PRECISIONS = [
    Precision("float64", torch.float64),
    Precision("float32", torch.float32),
    Precision("float32-tf32", torch.float32, tf32=True),
    Precision("bfloat16", torch.bfloat16),
    Precision("float16", torch.float16),
    Precision("float32-channels_last", torch.float32, memory_format=torch.channels_last),
]


@contextmanager
def set_to(precision: Precision, device: torch.device) -> Iterator[None]:
    if precision.tf32 and device.type != "cuda":
        pytest.skip("TF32 is a format of CUDA's products")
    backends: Any = torch.backends
    places = (backends.cuda.matmul, backends.cudnn.conv)
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "tf32" if precision.tf32 else "ieee"
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value


@pytest.fixture(scope="module", params=PRECISIONS, ids=lambda precision: precision.name)
def precision(request: pytest.FixtureRequest, device: torch.device) -> Iterator[Precision]:
    with set_to(request.param, device):
        yield request.param


def moved(case: Case, precision: Precision, device: torch.device) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The model and its inputs on ``device``, in the precision; 4-D inputs and weights in its memory format."""
    model = case.module.to(device, precision.dtype)
    inputs = tuple(x.to(device, precision.dtype) for x in case.inputs)
    if precision.memory_format == torch.channels_last:
        for parameter in model.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.to(memory_format=torch.channels_last)
        inputs = tuple(x.to(memory_format=torch.channels_last) if x.dim() == 4 else x for x in inputs)
    return model, inputs


# Each property runs in every precision, on every device.
fewer = settings(max_examples=max(5, settings().max_examples // 3))


def assume_it_runs(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    """Leave out what torch itself has not written for the dtype."""
    try:
        with torch.no_grad():
            model(*(x.clone() for x in inputs))
    except (NotImplementedError, RuntimeError) as error:
        assume("not implemented" not in str(error))
        raise


def network() -> nn.Module:
    """A network without decisions that rounding could turn."""
    return as_trained(
        nn.Sequential(
            nn.Conv2d(3, 8, 5, padding=2),
            nn.BatchNorm2d(8),
            nn.SiLU(),
            nn.Conv2d(8, 8, 3, groups=2, stride=2, padding=1, padding_mode="reflect"),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(32, 5),
        )
    )


def test_the_battery(device: torch.device, precision: Precision) -> None:
    torch.manual_seed(0)
    model, image = network().to(device, precision.dtype), torch.randn(4, 3, 8, 8)
    inputs = image.to(device, precision.dtype)
    if precision.memory_format == torch.channels_last:
        model, inputs = model.to(memory_format=torch.channels_last), inputs.to(memory_format=torch.channels_last)
    report = check_model(model, inputs, backend="aot_eager")
    assert not report.skipped
    assert device.type in report.subject


@fewer
@given(case=linear_graphs())
def test_fusing_graphs(device: torch.device, precision: Precision, case: Case) -> None:
    model, inputs = moved(case, precision, device)
    assume_it_runs(model, inputs)
    assert_equivalent(model, fxexpand.fuse(model, *inputs), *inputs)


@fewer
@given(case=layers() | linear_chains())
def test_fusing_layers_and_chains(device: torch.device, precision: Precision, case: Case) -> None:
    model, inputs = moved(case, precision, device)
    assume_it_runs(model, inputs)
    assert_equivalent(model, fxexpand.fuse(model, when="always"), *inputs)


@fewer
@given(case=networks())
def test_expanding_collapsing_and_contracting_networks(device: torch.device, precision: Precision, case: Case) -> None:
    if any(isinstance(module, Picky) for module in case.module.modules()) and precision.dtype != torch.float64:
        return  # which way it goes may hang on rounding
    model, inputs = moved(case, precision, device)
    report = check_model(model, *inputs, rules=[CL(2), FC(2)], backend=None)
    assert "the model is untouched" in report.held
    assert {p.device.type for p in model.parameters()} == {device.type}


def test_memory_format_is_kept(device: torch.device) -> None:
    model = network().to(device).to(memory_format=torch.channels_last)
    for rewritten in (fxexpand.fuse(model.eval()), fxexpand.contract(fxexpand.expand(model, [CL(2)]))):
        weight = next(p for p in rewritten.parameters() if p.dim() == 4)
        assert weight.is_contiguous(memory_format=torch.channels_last)


def test_tf32_is_counted_where_it_rounds(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("TF32 is a format of CUDA's products")
    x, w = torch.randn(4, 30, device=device), torch.randn(30, 2, device=device)
    with set_to(Precision("", torch.float32, tf32=True), device):
        assert measured(lambda: x @ w)[1].gamma > 2 * TF32
    with set_to(Precision("", torch.float32), device):
        assert measured(lambda: x @ w)[1].gamma < 1e-5


# The plugin


def test_the_header_names_the_devices() -> None:
    header = pytest_report_header()
    assert header.startswith("devices: cpu")
    assert ("cuda (" in header) == torch.cuda.is_available()
    assert torch.cuda.is_available() or "finds no CUDA device" in header


def test_a_test_that_asks_runs_once_a_device_with_its_name_in_the_id(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("def test_it(device): assert device.type in ('cpu', 'cuda')\n")
    command = [sys.executable, "-m", "pytest", "-p", "fxexpand.testing.devices", "-v", "-p", "no:cacheprovider", "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "test_it.py::test_it[cpu] PASSED" in done.stdout
    assert ("test_it.py::test_it[cuda] PASSED" in done.stdout) == torch.cuda.is_available()
    assert "devices: cpu (" in done.stdout
