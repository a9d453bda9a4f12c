"""Training that can stop after any epoch. As a program, it resumes each checkpoint among its arguments."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fxexpand
from fxexpand import CL, FC, Rule, layer
from fxexpand.testing import Functional

EPOCHS = 3
FORMS: dict[str, Callable[[nn.Module], nn.Module]] = {"expanded": lambda big: big, "collapsed": fxexpand.collapse}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=1e-4),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, amsgrad=True),
}


def net() -> nn.Module:
    """For handwritten digits of 8×8; its dropout draws random numbers."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 5, padding=2), nn.BatchNorm2d(4), nn.ReLU(),
        Functional(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.2), nn.Linear(64, 10),
    )  # fmt: skip


def expanded() -> nn.Module:
    """The network, expanded, and its k×k layer expanded once more."""
    big = fxexpand.expand(net(), [CL(2, keep_input=True), FC(1, depth=3)])
    return fxexpand.expand(big, Rule(CL(1), where=layer("0.kernel")))


def start(form: str, optimizer: str, epochs: int, checkpoint: Path) -> dict[str, Tensor]:
    """Train for the first epochs, and write a checkpoint."""
    torch.manual_seed(1)
    big = expanded()
    model = FORMS[form](big)
    training = OPTIMIZERS[optimizer](model.parameters())
    train(model, training, range(epochs))
    text = json.dumps(fxexpand.manifest(model))
    states = {"model": model.state_dict(), "optimizer": training.state_dict(), "random": torch.get_rng_state()}
    torch.save({"form": form, "name": optimizer, "epochs": epochs, "manifest": text, **states}, checkpoint)
    return model.state_dict()


def resume(checkpoint: Path) -> None:
    """Train for the epochs that are left, and write the weights over the checkpoint."""
    saved = torch.load(checkpoint, weights_only=True)
    big = fxexpand.expand(net(), json.loads(saved["manifest"]), init="standard")
    model = FORMS[saved["form"]](big)
    training = OPTIMIZERS[saved["name"]](model.parameters())
    model.load_state_dict(saved["model"], strict=True)
    training.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["random"])
    train(model, training, range(saved["epochs"], EPOCHS))
    torch.save(model.state_dict(), checkpoint)


def train(model: nn.Module, training: torch.optim.Optimizer, epochs: range) -> None:
    pixels, labels = load_digits(return_X_y=True)
    images = torch.as_tensor(pixels[:192], dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    targets = torch.as_tensor(labels[:192])
    model.train()
    for epoch in epochs:
        for batch in torch.randperm(192, generator=torch.Generator().manual_seed(epoch)).split(32):
            training.zero_grad()
            F.cross_entropy(model(images[batch]), targets[batch]).backward()
            training.step()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        resume(Path(name))
