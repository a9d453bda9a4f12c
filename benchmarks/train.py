"""Train a network with its layers expanded, and ship it compact.

Any classification model of torchvision, or a class of yours by its import path; rules in the paper's notation; digits,
CIFAR, or a folder of images. Lightning runs the training: mixed precision, several devices and nodes, progress,
checkpoints, a log. At the end: the contracted weights, the fused network as ONNX, and a table.

A run that was interrupted goes on with its last whole epoch when it is started again with the same arguments, and ends
with the same table. The order of the images, and random changes of them, depend on the seed and the epoch alone.

    python -m benchmarks.train --data digits --rules "CK(4)" --epochs 10
    python -m benchmarks.train --data ~/photos --model resnet18 --rules "CL(2) on layer*" --precision bf16-mixed
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import io
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.nn.functional as F
import torchvision
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn

import fxexpand
from benchmarks.datasets import Data, EpochSampler, epoch_seed, in_order, shuffled
from fxexpand import collapse, contract, effective_decay, expand, fuse, parameter_groups, parse_rules, verify
from fxexpand.demo.files import write_files

LAST = "last.ckpt"
# What may differ between a run and its continuation.
_FREE = ("out", "workers", "devices", "nodes", "accelerator", "log", "precision", "compile")


class Learner(lightning.LightningModule):
    """``model`` with cross-entropy and SGD; ``decay`` says what weight decay means for expanded layers."""

    def __init__(self, model: nn.Module, given: argparse.Namespace, steps: int) -> None:
        super().__init__()
        self.model, self.given, self.steps = model, given, steps

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        loss = F.cross_entropy(self.model(batch[0]), batch[1])
        self.log("loss", loss, prog_bar=True, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(batch[1]))
        if self.given.decay == "effective":
            loss = loss + self.given.weight_decay * effective_decay(self.model)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        wrong = (self.model(batch[0]).argmax(1) != batch[1]).float().mean()
        self.log("test_error", wrong, prog_bar=True, sync_dist=True, batch_size=len(batch[1]))

    def on_train_epoch_start(self) -> None:
        torch.manual_seed(epoch_seed(self.given.seed, self.current_epoch))  # dropout

    def configure_optimizers(self) -> Any:
        groups = parameter_groups(self.model, self.given.weight_decay, self.given.decay)
        optimizer = torch.optim.SGD(groups, lr=self.given.rate, momentum=self.given.momentum)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(self.steps, 1))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["arguments"] = settings_of(self.given)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        found, expected = checkpoint["arguments"], settings_of(self.given)
        for name in expected:
            if found.get(name) != expected[name]:
                raise SystemExit(
                    f"{self.given.out / LAST}: expected a run with --{name.replace('_', '-')} {expected[name]}, found "
                    f"one with {found.get(name)}. Give the same arguments, or another --out."
                )


class Images(lightning.LightningDataModule):
    """The batches of each epoch, of one device."""

    def __init__(self, data: Data, given: argparse.Namespace) -> None:
        super().__init__()
        self.data, self.given = data, given

    def train_dataloader(self) -> Any:
        assert self.trainer is not None, "Lightning asks for it"
        size, rank, world = len(self.data.train), self.trainer.global_rank, self.trainer.world_size  # type: ignore[arg-type]
        sampler = EpochSampler(size, self.given.seed, rank, world)
        return shuffled(self.data.train, self.given.batch, self.given.workers, sampler)

    def val_dataloader(self) -> Any:
        return in_order(self.data.test, self.given.batch, self.given.workers)


def settings_of(given: argparse.Namespace) -> dict[str, Any]:
    """The arguments that a continued run must share with its beginning."""
    kept = {name: value for name, value in vars(given).items() if name not in _FREE}
    return {name: str(value) if isinstance(value, Path) else value for name, value in kept.items()}  # plain to load


def build(given: argparse.Namespace, classes: int) -> nn.Module:
    """The compact network: a model of torchvision by its name, or a class by ``package.module:Class``."""
    options = {"weights": None} if ":" not in given.model else {}
    if ":" in given.model:
        home, _, name = given.model.partition(":")
        try:
            make: Callable[..., Any] = getattr(importlib.import_module(home), name)
        except (ImportError, AttributeError) as error:
            raise SystemExit(f"--model {given.model}: expected package.module:Class, found: {error}.") from error
    elif given.model in torchvision.models.list_models(module=torchvision.models):
        make = torchvision.models.get_model_builder(given.model)
    else:
        raise SystemExit(
            f"--model {given.model}: torchvision has no such model. For one of yours: package.module:Class."
        )
    known = inspect.signature(make).parameters
    count = next((name for name in ("num_classes", "classes") if name in known or "kwargs" in known), None)
    model = make(**options, **({} if count is None else {count: classes}), **json.loads(given.model_options))
    if not isinstance(model, nn.Module):
        raise SystemExit(f"--model {given.model}: expected it to make a torch.nn.Module, found {type(model).__name__}.")
    return model


def prepared(compact: nn.Module, given: argparse.Namespace) -> nn.Module:
    """What is trained: ``compact`` with its layers expanded, each as one layer where that is asked for."""
    if not given.rules:
        return compact
    big = expand(compact, parse_rules(given.rules), init=given.init)
    return big if given.explicit else collapse(big)


def train(given: argparse.Namespace) -> dict[str, Any]:
    """Train, or go on training; write the weights, and give the figures of the table."""
    lightning.seed_everything(given.seed, workers=True, verbose=False)
    data = Data.load(given.data, given.root, given.size)
    compact = build(given, data.classes)
    model = prepared(compact, given)
    sampler = EpochSampler(len(data.train), given.seed, world=given.devices * given.nodes)  # type: ignore[arg-type]
    learner = Learner(model, given, given.epochs * len(shuffled(data.train, given.batch, 0, sampler)))
    if given.compile:
        model.compile(backend=given.compile)
    trainer = _trainer(given)
    last = given.out / LAST
    trainer.fit(learner, Images(data, given), ckpt_path=last if last.exists() else None)
    found = trainer.callback_metrics
    small = contract(model) if given.rules else model
    figures = {
        "model": given.model,
        "rules": given.rules or "none",
        "epochs": given.epochs,
        "training loss": float(found["loss"]),
        "test error": float(found["test_error"]),
        "trained parameters": sum(p.numel() for p in model.parameters()),
        "deployed parameters": sum(p.numel() for p in small.parameters()),
    }
    if trainer.is_global_zero:
        image = torch.stack([data.test[0][0], data.test[1][0]])
        figures["error of contracting"] = verify(model, small, image) if given.rules else 0.0
        write_files(given.out, _files(small.eval(), image, figures))
    return figures


def _trainer(given: argparse.Namespace) -> lightning.Trainer:
    given.out.mkdir(parents=True, exist_ok=True)
    log: Any = TensorBoardLogger if given.log == "tensorboard" else CSVLogger
    # After each whole epoch; a file takes its name only when it is complete.
    checkpoints = ModelCheckpoint(given.out, filename="last", save_top_k=1, enable_version_counter=False)
    return lightning.Trainer(
        accelerator=given.accelerator,
        devices=given.devices,
        num_nodes=given.nodes,
        precision=given.precision,
        max_epochs=given.epochs,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=log(given.out, name="log"),  # a continued run begins a log of its own
        callbacks=[checkpoints, TQDMProgressBar(leave=False)],
        enable_model_summary=False,
    )


def _files(small: nn.Module, image: Tensor, figures: dict[str, Any]) -> dict[str, bytes]:
    """The contracted weights, the fused network, and the table."""
    weights = io.BytesIO()
    torch.save(small.state_dict(), weights)
    batch = torch.export.Dim("batch", min=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        program: Any = torch.onnx.export(
            fuse(small), (image,), dynamo=True, verbose=False, dynamic_shapes=({0: batch},)
        )
    return {
        "contracted.pt": weights.getvalue(),
        "fused.onnx": program.model_proto.SerializeToString(),
        "table.json": json.dumps(figures, indent=1).encode(),
    }


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The settings."""
    parser = argparse.ArgumentParser(
        description="Train a network with its layers expanded, and ship it compact.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", default="digits", help="digits, cifar10, cifar100, or a folder with train/ and test/")
    add("--root", type=Path, default=Path("data"), help="where the files of CIFAR are")
    add("--size", type=int, default=224, help="side of the images of a folder, in pixels")
    add("--model", default="fxexpand.demo.smallnet:SmallNet", help="of torchvision, or package.module:Class")
    add("--model-options", default="{}", help="JSON: keyword arguments of the model")
    add("--rules", default="", help='what is expanded: "CK(4)", "CL(2) on layer*"; nothing without it')
    add("--init", default="preserve", choices=["preserve", "standard"], help="how the new layers start")
    add("--explicit", action="store_true", help="run the layers one by one, not collapsed")
    add("--epochs", type=int, default=10)
    add("--batch", type=int, default=64, help="images a step, of each device")
    add("--rate", type=float, default=0.05, help="learning rate, which falls to 0 as a cosine")
    add("--momentum", type=float, default=0.9)
    add("--weight-decay", type=float, default=0.0)
    add("--decay", default="factors", choices=["factors", "effective", "none"], help="what decays of expanded layers")
    add("--seed", type=int, default=0)
    add("--precision", default="32-true", help="of Lightning: 32-true, bf16-mixed, 16-mixed, ...")
    add("--compile", help="backend of torch.compile: inductor, fxexpand, ...")
    add("--accelerator", default="auto")
    add("--devices", type=int, default=1)
    add("--nodes", type=int, default=1)
    add("--workers", type=int, default=0, help="processes that load images")
    add("--log", default="csv", choices=["csv", "tensorboard"])
    add("--out", type=Path, default=Path("build/train"), help="checkpoints, log and results; an old run there goes on")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and print the table."""
    given = parsed(arguments)
    try:
        figures = train(given)
    except (ValueError, fxexpand.FxExpandError) as error:
        raise SystemExit(str(error)) from error
    for name, value in figures.items():
        print(f"{name:<22} {value:.4g}" if isinstance(value, float) else f"{name:<22} {value}")
    print(f"contracted.pt, fused.onnx and table.json are in {given.out}")


if __name__ == "__main__":
    main()
