"""Is an exported program the same function when it is fused, saved, loaded, and packaged?

Exports models of torchvision in eval mode, with random weights and batch norm as training might have left it, at
224 × 224 with a batch of any size, as a program of the training IR and of core ATen. Each is fused, saved to a file and
loaded again; with ``--package``, AOTInductor makes a package of the fused program (of the training IR), which needs a
C++ compiler and minutes. Errors are relative, ‖found − expected‖ / ‖expected‖, against the program as it was exported,
in float32, on batches of 2 (that of the export) and 3. Exits with 1 if any is above 1e-5.

Run as ``python -m benchmarks.exported [--models NAME ...] [--package]``.
Expected: no batch norm is left; convolutions and products are as many as before, or fewer; errors are below 1e-5.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.export import ExportedProgram

import fxexpand
from fxexpand.testing import as_trained

MODELS = ("mobilenet_v2", "resnet18", "shufflenet_v2_x0_5", "vit_b_16")
BOUND = 1e-5
_KINDS = {
    "convolutions": ("conv2d", "convolution"),
    "batch norms": ("batch_norm", "_native_batch_norm_legit_no_training"),
    "products": ("linear", "addmm", "mm", "matmul"),
}


def export(name: str) -> ExportedProgram:
    """The program of a model of torchvision, for batches of any size."""
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.get_model(name, weights=None).eval()
    as_trained(model)
    batch = {0: torch.export.Dim("batch", min=1, max=1024)}
    return torch.export.export(model, (torch.randn(2, 3, 224, 224),), dynamic_shapes=(batch,))


def counts(program: ExportedProgram) -> list[int]:
    """How many convolutions, batch norms and products the graph has."""
    found = Counter(str(node.target).split(".")[1] for node in program.graph.nodes if "aten." in str(node.target))
    return [sum(found[name] for name in names) for names in _KINDS.values()]


def error(found: Callable[[Tensor], Any], expected: Callable[[Tensor], Any]) -> float:
    """The largest relative error on two batches."""
    errors = []
    with torch.no_grad():
        for size in (2, 3):
            torch.manual_seed(size)
            images = torch.randn(size, 3, 224, 224)
            ours, theirs = found(images).double(), expected(images).double()
            errors.append(float((ours - theirs).norm() / theirs.norm()))
    return max(errors)


def row(name: str, dialect: str, program: ExportedProgram, folder: Path, *, package: bool) -> tuple[list[str], bool]:
    """The cells for one program, and whether all errors are within the bound."""
    start = time.perf_counter()
    fused = fxexpand.fuse(program)
    took = time.perf_counter() - start
    path = folder / f"{name}-{dialect}.pt2"
    torch.export.save(fused, path)
    expected = program.module()
    errors = [error(fused.module(), expected), error(torch.export.load(path).module(), expected)]
    if package:
        made = torch._inductor.aoti_compile_and_package(fused, package_path=str(folder / f"{name}-package.pt2"))
        errors.append(error(torch._inductor.aoti_load_package(made), expected))
    changes = [f"{before} -> {after}" for before, after in zip(counts(program), counts(fused), strict=True)]
    shown = [f"{value:.1e}" for value in errors]
    cells = [name, dialect, *changes, f"{took:.2f} s", *shown, *[""] * (3 - len(shown))]
    return cells, all(value <= BOUND for value in errors)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a row for each program as soon as it is known; 1 if any differs from the one that was exported."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME")
    parser.add_argument("--package", action="store_true", help="make a package of each fused program, and run it")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    header = ["model", "dialect", *_KINDS, "fuse took", "fused", "loaded", "packaged"]
    print("| " + " | ".join(header) + " |", "|" + "---|" * len(header), sep="\n", flush=True)
    good = True
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models:
            program = export(name)
            for dialect, each in (("training", program), ("core", program.run_decompositions())):
                wanted = options.package and dialect == "training"
                cells, within = row(name, dialect, each, Path(folder), package=wanted)
                print("| " + " | ".join(cells) + " |", flush=True)
                good = good and within
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
