"""The whole demo, once, as a user runs it: another process, its output into a pipe."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from fxexpand import VerificationError
from fxexpand.demo.data import digits, split
from fxexpand.demo.demo import check_saved
from fxexpand.demo.experiment import Run, experiment
from fxexpand.demo.settings import Settings
from fxexpand.demo.smallnet import SmallNet
from fxexpand.demo.training import error_rate
from fxexpand.demo.variants import variants

SEEDS, EPOCHS, TRAIN_SIZE = 2, 2, 40
LABELS = ("compact", "CL(2)", "collapsed", "CK(2)")
FILES = {"compact.pt", "cl.pt", "ck.pt", "cl-collapsed.pt", "curves.png", "results.json"}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "made" / "by the demo"


@pytest.fixture(scope="module")
def run(out: Path) -> subprocess.CompletedProcess[str]:
    sizes = {"--seeds": SEEDS, "--epochs": EPOCHS, "--train-size": TRAIN_SIZE, "--rate": 2, "--threads": 1}
    options = [str(word) for pair in sizes.items() for word in pair]
    command = [sys.executable, "-m", "fxexpand.cli", "demo", "--out", str(out), *options]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300, check=False)


@pytest.fixture(scope="module")
def results(run: subprocess.CompletedProcess[str], out: Path) -> dict[str, Any]:
    assert run.returncode == 0, run.stderr
    loaded: dict[str, Any] = json.loads((out / "results.json").read_text(encoding="utf-8"))
    return loaded


def test_it_succeeds_and_ends_with_what_was_checked(run: subprocess.CompletedProcess[str]) -> None:
    assert (run.returncode, run.stderr) == (0, "")
    assert "All 4 contracted networks were saved, loaded strictly into a fresh SmallNet" in run.stdout
    assert "\x1b" not in run.stdout  # no colours and no moving bar in a pipe
    assert max(len(line) for line in run.stdout.splitlines() if not line.startswith("Saved")) <= 80


def test_the_printed_errors_are_the_saved_ones(run: subprocess.CompletedProcess[str], results: dict[str, Any]) -> None:
    lines = run.stdout.splitlines()
    assert [variant["label"] for variant in results["variants"]] == list(LABELS)
    for variant in results["variants"]:
        mean, deviation = variant["test_error"]["mean"], variant["test_error"]["deviation"]
        rows = [line for line in lines if line.strip().startswith(f"{variant['label']}  ")]
        assert len(rows) == 3
        assert f"{100 * mean:.1f} ± {100 * deviation:.1f} %" in rows[0]
    for seed in range(SEEDS):
        errors = (f"{v['label']} {100 * v['runs'][seed]['test_error']:.1f} %" for v in results["variants"])
        assert f"seed {seed + 1}, test error: {', '.join(errors)}" in lines


def test_the_results_are_complete(results: dict[str, Any]) -> None:
    assert results["settings"]["train_size"] == TRAIN_SIZE
    assert {"processor", "cores", "threads", "torch"} <= results["machine"].keys()
    assert results["machine"]["torch"] == torch.__version__
    assert results["machine"]["threads"] == 1
    for variant in results["variants"]:
        assert [each["seed"] for each in variant["runs"]] == list(range(SEEDS))
        for each in variant["runs"]:
            assert len(each["losses"]) == len(each["test_errors"]) == EPOCHS
            assert each["test_error"] == each["test_errors"][-1]
            assert each["step_seconds"] > 0
        assert variant["cost"]["deployed_parameters"] == 66_186
        assert variant["contraction_error"]["float32"] < 5e-7
    compact, *others = results["variants"]
    assert compact["difference"] is None
    assert compact["contraction_error"]["rounding"] == 0
    for other in others:
        assert other["difference"]["low"] <= other["difference"]["mean"] <= other["difference"]["high"]
        assert other["difference"]["mean"] == pytest.approx(other["test_error"]["mean"] - compact["test_error"]["mean"])
        assert 0 < other["contraction_error"]["rounding"] < 5e-7


def test_the_directory_holds_the_promised_files_and_no_other(results: dict[str, Any], out: Path) -> None:
    assert {path.name for path in out.iterdir()} == FILES


def test_the_weights_load_strictly_and_have_the_recorded_test_error(results: dict[str, Any], out: Path) -> None:
    part = split(*digits(), train_size=TRAIN_SIZE, seed=0)
    for variant in results["variants"]:
        network = SmallNet()
        network.load_state_dict(torch.load(out / f"{variant['name']}.pt", weights_only=True), strict=True)
        error = error_rate(network.eval(), part)
        # Another number of threads may round differently, and flip an image that was undecided.
        assert error == pytest.approx(variant["runs"][0]["test_error"], abs=2 / len(part.test_labels))


def test_the_figure_is_a_picture(results: dict[str, Any], out: Path) -> None:
    pixels = imread(out / "curves.png")
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 100


@pytest.fixture(scope="module")
def small() -> tuple[Settings, Run]:
    settings = Settings(seeds=1, epochs=1, train_size=20, kernel_size=3)
    return settings, next(experiment(settings, variants(4, 3), lambda variant, seed: None))


def test_saved_weights_that_predict_the_same_pass(small: tuple[Settings, Run], tmp_path: Path) -> None:
    settings, own = small
    torch.save(own.weights, tmp_path / "own.pt")
    check_saved(tmp_path / "own.pt", own, settings)


def test_saved_weights_that_predict_otherwise_are_an_error(small: tuple[Settings, Run], tmp_path: Path) -> None:
    settings, own = small
    bias = "classifier.output.bias"
    torch.save({**own.weights, bias: own.weights[bias] + 100 * torch.eye(10)[7]}, tmp_path / "other.pt")
    with pytest.raises(VerificationError, match=r"other\.pt: expected .* found \d+ of 1777 .* run the demo again"):
        check_saved(tmp_path / "other.pt", own, settings)


def test_saved_weights_with_a_missing_key_are_an_error(small: tuple[Settings, Run], tmp_path: Path) -> None:
    settings, own = small
    torch.save(dict(list(own.weights.items())[1:]), tmp_path / "less.pt")
    with pytest.raises(RuntimeError, match="Missing key"):
        check_saved(tmp_path / "less.pt", own, settings)
