"""The training recipe: data in each format, and a run that was killed ends as one that was not."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

ROOT = Path(__file__).parents[1]
ARGUMENTS = (
    "--model",
    "fxexpand.demo.smallnet:SmallNet",
    "--rules",
    "CL(2)",
    "--epochs",
    "4",
    "--batch",
    "4",
    "--size",
    "32",
)


@pytest.fixture(autouse=True)
def _from_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """``benchmarks`` is no part of the library."""
    monkeypatch.syspath_prepend(str(ROOT))


def photographs(path: Path) -> Path:
    for part, count in (("train", 12), ("test", 4)):
        for label in ("dark", "light"):
            folder = path / part / label
            folder.mkdir(parents=True)
            for number in range(count):
                noise = np.random.default_rng(number).integers(128, size=(40, 36, 3), dtype=np.uint8)
                Image.fromarray(noise + np.uint8(120 if label == "light" else 0)).save(folder / f"{number}.png")
    return path


def test_a_folder_of_images(tmp_path: Path) -> None:
    from benchmarks.datasets import Data, EpochSampler, shuffled

    data = Data.load(str(photographs(tmp_path)), tmp_path, 32)
    assert data.classes == 2
    sampler = EpochSampler(24, seed=3)
    epochs = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        epochs.append(torch.cat([images.flatten(1) for images, _ in shuffled(data.train, 8, 0, sampler)]))
    assert epochs[0].shape == (24, 3 * 32 * 32)
    assert torch.equal(epochs[0], epochs[2])
    assert not torch.equal(epochs[0], epochs[1])
    shares = [EpochSampler(25, 3, rank, 2) for rank in (0, 1)]
    seen = [index for share in shares for _, index in share]
    assert len(seen) == len(set(seen)) == 24


def test_cifar_in_the_format_of_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.datasets import Data

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for name in names:
        pixels = np.random.default_rng(0).integers(256, size=(4, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [0, 1, 2, 3]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}))
    # Of these files only the sums differ.
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    data = Data.load("cifar10", tmp_path, 32)
    image, label = data.test[3]
    assert (data.classes, label, tuple(image.shape), image.dtype) == (10, 3, (3, 32, 32), torch.float32)
    assert len(data.train) == 20  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "nowhere"), "expected digits, cifar10, cifar100, or a folder"),
        (("--model", "resnet1000"), "torchvision has no such model"),
        (("--model", "nowhere:Net"), "expected package.module:Class"),
        (("--rules", "CK(2)"), "rate=4 is enough"),
    ],
)
def test_what_cannot_be_trained(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    from benchmarks.train import main

    with pytest.raises(SystemExit, match=message):
        main([*arguments, "--out", str(tmp_path)])


@pytest.mark.skipif(os.environ.get("FXEXPAND_PROFILE") != "thorough", reason="trains in four processes: half a minute")
def test_a_killed_run_ends_as_one_that_was_not(tmp_path: Path) -> None:
    data = photographs(tmp_path / "data")
    _finished(tmp_path, data, "whole")
    run = _start(tmp_path, data, "killed")
    metrics = tmp_path / "killed" / "log" / "version_0" / "metrics.csv"
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / "last.ckpt").exists() or not metrics.exists():
        assert run.poll() is None, "it was to be killed while it trained"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    _finished(tmp_path, data, "killed")
    tables = [json.loads((tmp_path / name / "table.json").read_text()) for name in ("whole", "killed")]
    assert tables[0] == tables[1]
    weights = [torch.load(tmp_path / name / "contracted.pt") for name in ("whole", "killed")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def _start(folder: Path, data: Path, name: str) -> subprocess.Popen[bytes]:
    code = (
        "import runpy, sys; sys.path.append(sys.argv.pop(1)); runpy.run_module('benchmarks.train', run_name='__main__')"
    )
    command: list[Any] = [sys.executable, "-c", code, ROOT, "--data", data, "--out", folder / name, *ARGUMENTS]
    return subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL, cwd=folder)


def _finished(folder: Path, data: Path, name: str) -> None:
    assert _start(folder, data, name).wait(timeout=240) == 0
