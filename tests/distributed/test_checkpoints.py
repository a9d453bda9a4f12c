"""What was sharded is resumed from its checkpoints, also after a process was killed, and contracts when gathered."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fxexpand
from data_parallel import (
    OPTIMIZERS,
    STEPS,
    DyingWriter,
    batch,
    built,
    distance,
    in_one_process,
    kill_this_process,
    net,
    newest,
    read,
    sharded,
    train,
    whole,
    write,
)
from two_processes import run_pair

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")

HALF = STEPS // 2


def test_a_killed_process_leaves_a_checkpoint_that_resumes(tmp_path: Path) -> None:
    run_pair(never_stop, tmp_path, folder=tmp_path)
    run_pair(die_between_forward_and_backward, tmp_path, folder=tmp_path, killed=1)
    assert newest(tmp_path) == HALF
    run_pair(die_while_writing, tmp_path, folder=tmp_path, killed=1)
    assert newest(tmp_path) == HALF
    assert (tmp_path / "unfinished").exists()
    run_pair(finish, tmp_path, folder=tmp_path)
    assert newest(tmp_path) == STEPS
    assert not (tmp_path / "unfinished").exists()
    expected, found = (torch.load(tmp_path / name) for name in ("never_stopped.pt", "resumed.pt"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def prepared() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = sharded(built("collapsed"), "expansions")
    return model, OPTIMIZERS["AdamW"](model.parameters())


def never_stop(rank: int, folder: Path) -> None:
    """All of the training; what it gives contracts, once it is gathered, as what one process trains."""
    model, optimizer = prepared()
    train(model, optimizer, rank=rank)
    gathered = whole(model)
    again = fxexpand.expand(net(), fxexpand.manifest(model), init="standard")
    again.load_state_dict(gathered)
    small, alone = fxexpand.contract(again), fxexpand.contract(in_one_process("AdamW"))
    assert distance(small, alone) < 1e-11
    net().load_state_dict(small.state_dict(), strict=True)
    if rank == 0:
        torch.save(gathered, folder / "never_stopped.pt")


def die_between_forward_and_backward(rank: int, folder: Path) -> None:
    model, optimizer = prepared()
    train(model, optimizer, range(HALF), rank=rank)
    write(model, optimizer, folder, HALF)
    train(model, optimizer, range(HALF, HALF + 1), rank=rank)
    loss = model(batch(HALF + 1, rank)[0]).sum()
    if rank == 1:
        kill_this_process()
    loss.backward()


def die_while_writing(rank: int, folder: Path) -> None:
    model, optimizer = prepared()
    read(model, optimizer, folder)
    train(model, optimizer, range(HALF, STEPS), rank=rank)
    writer = {"storage_writer": DyingWriter(folder / "unfinished")} if rank == 1 else {}
    write(model, optimizer, folder, STEPS, **writer)


def finish(rank: int, folder: Path) -> None:
    model, optimizer = prepared()
    read(model, optimizer, folder)
    train(model, optimizer, range(HALF, STEPS), rank=rank)
    write(model, optimizer, folder, STEPS)
    gathered = whole(model)
    if rank == 0:
        torch.save(gathered, folder / "resumed.pt")
