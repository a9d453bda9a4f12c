"""Training in several processes, and the same training in one."""

from __future__ import annotations

import os
import shutil
import signal
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fxexpand
from fxexpand.strategies import Orepa

RULES = fxexpand.parse_rules("CL(2) on first; Orepa(4) on second; FC(2) on third")
FORMS: dict[str, Callable[[nn.Module], nn.Module]] = {"expanded": lambda big: big, "collapsed": fxexpand.collapse}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
}
STEPS = 4


def net() -> nn.Module:
    """In float64. Its head is a region that ``collapse`` runs as one layer though nobody has expanded it."""
    torch.manual_seed(0)
    layers = OrderedDict[str, nn.Module](
        first=nn.Conv2d(1, 4, 5, padding=2), norm=nn.GroupNorm(2, 4), relu=nn.ReLU(),
        second=nn.Conv2d(4, 6, 3, padding=1), pool=nn.MaxPool2d(2), flat=nn.Flatten(),
        third=nn.Linear(96, 12), tanh=nn.Tanh(), head=nn.Sequential(nn.Linear(12, 24), nn.Linear(24, 10)),
    )  # fmt: skip
    return nn.Sequential(layers).double()


def built(form: str) -> nn.Module:
    """The network, expanded; the same at each call, in each process."""
    assert any(isinstance(rule.strategy, Orepa) for rule in RULES), "one with parameters that no optimiser trains"
    return FORMS[form](fxexpand.expand(net(), RULES))


def batch(step: int, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """The images and labels of a step: those of one process, or of all."""
    random = torch.Generator().manual_seed(step)
    images = torch.randn(8, 1, 8, 8, dtype=torch.float64, generator=random)
    labels = torch.randint(10, (8,), generator=random)
    part = slice(None) if rank is None else slice(rank, None, dist.get_world_size())
    return images[part], labels[part]


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range = range(STEPS),
    *,
    rank: int | None = None,
    decay: float = 0,
) -> nn.Module:
    """``model``, trained: with the part of each batch that is that of ``rank``, or with all of it."""
    for step in steps:
        images, labels = batch(step, rank)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        if decay:
            loss = loss + decay * fxexpand.effective_decay(model)
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad), "an unused parameter"
        optimizer.step()
    return model


@cache
def in_one_process(name: str, decay: float = 0) -> nn.Module:
    """What one process trains, layer by layer."""
    model = built("expanded")
    return train(model, OPTIMIZERS[name](model.parameters()), decay=decay)


def whole(model: nn.Module) -> dict[str, Tensor]:
    """The ``state_dict`` with all of each parameter, in every process; without the names that DDP puts before."""
    state: dict[str, Any] = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return state


def distance(model: nn.Module, other: nn.Module) -> float:
    """The largest difference between the parameters of two models, which must have the same names."""
    found, expected = whole(model), other.state_dict()
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


def expansions(model: nn.Module) -> list[nn.Module]:
    return [model.get_submodule(site["path"]) for site in fxexpand.manifest(model)["sites"]]


def sharded(model: nn.Module, by: str) -> nn.Module:
    """``model``, sharded as a whole, or its expansions or the layers of each expansion apart."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for expanded in expansions(model) if by != "root" else ():
        if by == "layers":
            fully_shard([m for m in expanded.modules() if not list(m.children())], mesh=mesh)
        else:
            fully_shard(expanded, mesh=mesh, reshard_after_forward=by == "expansions")
    fully_shard(model, mesh=mesh)
    return model


# --- checkpoints ---


def write(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, step: int, **how: Any) -> None:
    """Write a checkpoint to a new folder, and give it its name when all processes have written."""
    if dist.get_rank() == 0:
        shutil.rmtree(folder / "unfinished", ignore_errors=True)
    dist.barrier()
    model_state, optimizer_state = get_state_dict(model, optimizer)
    save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder / "unfinished", **how)
    if dist.get_rank() == 0:
        (folder / "unfinished").rename(folder / f"step_{step}")
    dist.barrier()


def read(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Load the newest whole checkpoint."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
    load(state, checkpoint_id=folder / f"step_{newest(folder)}")
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def newest(folder: Path) -> int:
    """The step after which the newest whole checkpoint was written; 0 without any."""
    return max((int(path.name.removeprefix("step_")) for path in folder.glob("step_*")), default=0)


class DyingWriter(FileSystemWriter):
    """Writes its part of a checkpoint; then its process is killed."""

    def write_data(self, *given: Any) -> Any:
        super().write_data(*given).wait()
        return kill_this_process()


def kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
