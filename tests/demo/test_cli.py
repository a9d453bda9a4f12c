import io
import os
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import fxexpand.demo.demo
from fxexpand import VerificationError
from fxexpand.cli import main
from fxexpand.demo.command import app

# Blocks imports the way a missing package does, then runs the command line.
WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
sys.argv = ["fxexpand", "demo"]
from fxexpand.cli import main
main()
"""
# A test runner started in the background may hand down "ignore" for SIGINT.
INTERRUPTIBLE = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from fxexpand.cli import main
main()
"""


def invoke(*arguments: str) -> tuple[int, str]:
    """Exit status and all output of the command line, in this process, as words with single spaces between."""
    found = CliRunner(env={"TERM": "dumb"}).invoke(app, arguments)
    return found.exit_code, " ".join(found.output.replace("│", " ").split())


def test_version() -> None:
    assert invoke("--version") == (0, f"fxexpand {version('fxexpand')}")


def test_help_names_every_option() -> None:
    status, text = invoke("demo", "--help")
    assert status == 0
    for option in ("--out", "--seeds", "--epochs", "--train-size", "--rate", "--kernel-size", "--threads"):
        assert option in text


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--seeds", "0"),
        ("--seeds", "two"),
        ("--epochs", "-1"),
        ("--train-size", "9"),
        ("--train-size", "1788"),
        ("--threads", "0"),
        ("--threads", "1000000"),
    ],
)
def test_a_number_out_of_range_ends_with_status_2_and_the_option(option: str, value: str) -> None:
    status, text = invoke("demo", option, value)
    assert status == 2
    assert f"Invalid value for '{option}'" in text


@pytest.mark.parametrize(
    ("option", "value", "found"),
    [
        ("--rate", "0", "0.0"),
        ("--rate", "nan", "nan"),
        ("--rate", "inf", "inf"),
        ("--rate", "-2", "-2.0"),
        ("--rate", "33", "33.0"),
        ("--kernel-size", "5", "5"),
    ],
)
def test_a_value_without_meaning_ends_with_status_2_and_what_was_found(option: str, value: str, found: str) -> None:
    status, text = invoke("demo", option, value)
    assert status == 2
    assert f"Invalid value for '{option}'" in text
    assert f"found {found}." in text


def test_a_directory_that_cannot_be_made_is_found_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    status, text = invoke("demo", "--out", str(tmp_path / "file" / "below"))
    assert status == 2
    assert "expected a directory that can be made" in text


def test_a_directory_without_permission_is_found_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)  # permissions do not bind root
    status, text = invoke("demo", "--out", str(tmp_path))
    assert status == 2
    assert "no permission" in text


@pytest.mark.parametrize("failure", [VerificationError("features.conv1: wrong"), OSError(28, "No space left")])
def test_failures_end_with_status_1_and_their_message(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(fxexpand.demo.demo, "run_demo", fail)
    status, text = invoke("demo")
    assert status == 1
    assert text == f"fxexpand demo: {failure}"


def test_threads_are_set_for_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    seen: list[int] = []
    monkeypatch.setattr(fxexpand.demo.demo, "run_demo", lambda *_: seen.append(torch.get_num_threads()))
    try:
        assert invoke("demo", "--threads", "1") == (0, "")
    finally:
        torch.set_num_threads(before)
    assert seen == [1]


@pytest.mark.parametrize("names", [("typer", "rich", "sklearn", "scipy", "matplotlib"), ("sklearn",), ("matplotlib",)])
def test_without_the_extra_one_message_says_what_to_install(names: tuple[str, ...]) -> None:
    command = [sys.executable, "-c", WITHOUT.format(names=names)]
    found = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, check=False)
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr.count("\n") == 1
    assert names[0] in found.stderr
    assert 'pip install "fxexpand[demo]"' in found.stderr


def test_another_missing_module_is_not_blamed_on_the_extra() -> None:
    command = [sys.executable, "-c", WITHOUT.format(names=("joblib",))]
    found = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, check=False)
    assert found.returncode == 1
    assert "ModuleNotFoundError: No module named 'joblib'" in found.stderr
    assert "fxexpand[demo]" not in found.stderr


@pytest.mark.skipif(os.name == "nt", reason="SIGINT cannot be sent to one process")
def test_ctrl_c_leaves_the_directory_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("of an earlier run")
    options = ["--out", str(tmp_path), "--threads", "1"]
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTIBLE, "demo", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    assert process.stdout is not None
    for line in process.stdout:
        if ", torch " in line:  # the last line before the training
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert errors == "fxexpand demo: interrupted; no half-written file is left.\n"
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert (tmp_path / "results.json").read_text() == "of an earlier run"


def test_an_output_without_unicode_gets_question_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(sys, "argv", ["fxexpand", "demo"])
    monkeypatch.setattr(fxexpand.demo.demo, "run_demo", lambda settings, out, console: console.print("7×7 ± 1"))
    with pytest.raises(SystemExit) as end:
        main()
    sys.stdout.flush()
    assert end.value.code in (0, None)
    assert written.getvalue() == b"7?7 ? 1\n"
