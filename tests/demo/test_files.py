import os
import signal
import threading
from pathlib import Path

import pytest

from fxexpand.demo.files import interrupts_deferred, write_files

OLD = {"a": b"old a", "b": b"old b"}
NEW = {"a": b"new a", "b": b"new b"}


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(autouse=True)
def _python_handles_interrupts() -> object:
    # A test runner started in the background may have inherited "ignore".
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def test_files_are_written_and_replaced(tmp_path: Path) -> None:
    write_files(tmp_path, OLD)
    write_files(tmp_path, {**NEW, "c": b""})
    assert contents(tmp_path) == {**NEW, "c": b""}


def test_files_can_be_read_by_whom_the_umask_allows(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_files(tmp_path, NEW)
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_failure_leaves_the_old_files_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path, OLD)
    calls: list[int] = []

    def disk_full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space left"):
        write_files(tmp_path, NEW)
    assert len(calls) == 2
    assert contents(tmp_path) == OLD


def test_a_failure_to_take_the_name_leaves_no_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()  # a file cannot replace a directory
    with pytest.raises(OSError, match="b"):
        write_files(tmp_path, NEW)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_ctrl_c_while_writing_waits_until_every_file_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path, OLD)
    monkeypatch.setattr(os, "fsync", lambda descriptor: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        write_files(tmp_path, NEW)
    assert contents(tmp_path) == NEW
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_ignored_ctrl_c_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interrupts_deferred():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_files_are_written_from_any_thread(tmp_path: Path) -> None:
    thread = threading.Thread(target=write_files, args=(tmp_path, NEW))
    thread.start()
    thread.join()
    assert contents(tmp_path) == NEW
