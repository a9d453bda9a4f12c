"""Two processes that talk over gloo, as data-parallel training has them."""

from __future__ import annotations

import multiprocessing
import runpy
import signal
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

WORLD = 2

# Seconds: a process that waits for one that is gone ends after the first, the pair after the second.
_TIMEOUT = 60
_DEADLINE = 120

# Loaded once, in the process that the others are forked from: importing torch takes longer than the tests. Not the
# library: that process has another path, on which there may be another one.
_PRELOADED = [
    *("torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp", "torch._dynamo"),
    *("networkx", "pytest"),
]


def run_pair(task: Callable[..., None], *given: Any, folder: Path, killed: int | None = None) -> None:
    """Call ``task(rank, *given)``, a function of some file, in two processes of one group.

    As launchers do, it ends both when one does not end well. Raises ``AssertionError``, with the traceback of an error,
    unless both end well or that of rank ``killed`` by SIGKILL, and for a pair that does not end. ``folder`` is for its
    own files.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    meeting = folder / f"meeting_{time.monotonic_ns()}"
    where = (task.__code__.co_filename, task.__name__)  # test modules cannot be imported by name
    started = [context.Process(target=_in_group, args=(where, rank, meeting, given)) for rank in range(WORLD)]
    for process in started:
        process.start()
    deadline = time.monotonic() + _DEADLINE
    try:
        while any(process.is_alive() for process in started):
            left = deadline - time.monotonic()
            assert left > 0, f"the pair that runs {task.__name__} has not ended after {_DEADLINE} s"
            wait([process.sentinel for process in started if process.is_alive()], left)
            if any(process.exitcode for process in started):
                break
        if killed is not None:
            started[killed].join(_TIMEOUT)  # the other one may have missed it before its end was reported
    finally:
        codes = [process.exitcode for process in started]
        for process in started:
            process.kill()
            process.join()
    errors = [path.read_text(encoding="utf-8") for path in sorted(folder.glob(f"{meeting.name}_*"))]
    if killed is None:
        assert codes == [0] * WORLD, "\n".join([f"exit codes {codes}", *errors])
    else:
        assert codes[killed] == -signal.SIGKILL, "\n".join([f"exit codes {codes}", *errors])


def _in_group(where: tuple[str, str], rank: int, meeting: Path, given: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=meeting.as_uri(),
            rank=rank,
            world_size=WORLD,
            timeout=timedelta(seconds=_TIMEOUT),
        )
        file, name = where
        runpy.run_path(file)[name](rank, *given)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        Path(f"{meeting}_{rank}").write_text(f"rank {rank}: {traceback.format_exc()}", encoding="utf-8")
        raise
