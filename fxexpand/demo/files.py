"""Files that are either written whole or not at all."""

import os
import secrets
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


def write_files(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write `files`, name to content, into `directory`, replacing files of those names.

    All contents go to temporary files in the same directory first, and only then take their names: when anything fails
    before, every old file is as it was. Temporary files are removed on every failure, and Ctrl-C waits until the end,
    so it finds all the files or none. Raises `OSError` when the directory cannot be written.
    """
    suffix = f".{os.getpid()}-{secrets.token_hex(4)}.tmp"
    temporary = {directory / f".{name}{suffix}": directory / name for name in files}
    with interrupts_deferred():
        try:
            for path, content in zip(temporary, files.values(), strict=True):
                _write(path, content)
            for path, final in temporary.items():
                path.replace(final)
        finally:
            for path in temporary:
                path.unlink(missing_ok=True)


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Hold back Ctrl-C (SIGINT) during the block and deliver it at the end.

    Python delivers signals to the main thread alone, so elsewhere there is nothing to hold back.
    """
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or previous is None:
        yield
        return
    received: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(number)

    signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if received:
            signal.raise_signal(signal.SIGINT)


def _write(path: Path, content: bytes) -> None:
    """Write a new file and wait until it is on the disk, so that taking its name cannot expose an empty file."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
