"""The images that ``benchmarks.train`` learns from: digits, CIFAR in torchvision's format, a folder of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset
from torchvision.transforms import v2

from fxexpand.demo.data import CLASSES, digits, split

DIGITS_FOR_TRAINING = 1400
CIFAR: dict[str, Any] = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}
_CIFAR_SIZE = 32
# Mean and deviation of ImageNet's training images, an RGB channel each, in [0, 1]: what torchvision's models expect.
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Data:
    """Images (3, H, W) float32 with their labels, for training and for testing, and the number of classes."""

    train: Dataset[tuple[Tensor, Any]]
    test: Dataset[tuple[Tensor, Any]]
    classes: int

    @staticmethod
    def load(name: str, root: Path, size: int) -> Data:
        """That called ``name``: "digits", "cifar10" or "cifar100" (their files unpacked in ``root``, as torchvision
        has them), else a folder with ``train/CLASS/*.png`` and ``test/`` or ``val/`` alike.

        Photographs are cropped at random and flipped for training. ``size`` is the side of images of a folder, in
        pixels. Raises ``ValueError`` for what is none of these.
        """
        if name == "digits":
            found = split(*digits(), DIGITS_FOR_TRAINING, seed=0)
            return Data(
                TensorDataset(found.train_images, found.train_labels),  # type: ignore[arg-type]
                TensorDataset(found.test_images, found.test_labels),  # type: ignore[arg-type]
                CLASSES,
            )
        if name in CIFAR:
            crop = v2.RandomCrop(_CIFAR_SIZE, padding=4)
            parts = [CIFAR[name](root, train=train, transform=_pixels(crop, train)) for train in (True, False)]
            return Data(parts[0], parts[1], len(parts[0].classes))
        return _folder(Path(name), size)


def _folder(path: Path, size: int) -> Data:
    tests = [path / part for part in ("test", "val") if (path / part).is_dir()]
    if not ((path / "train").is_dir() and tests):
        raise ValueError(
            f"--data {path}: expected digits, cifar10, cifar100, or a folder that holds train/ and test/ or val/, each "
            "with a folder of images a class; found none of these."
        )
    crop, middle = v2.RandomResizedCrop(size), v2.Compose([v2.Resize(size * 8 // 7), v2.CenterCrop(size)])
    train = torchvision.datasets.ImageFolder(path / "train", _pixels(crop, train=True))
    test = torchvision.datasets.ImageFolder(tests[0], _pixels(middle, train=False, resize=True))
    if train.classes != test.classes:
        raise ValueError(
            f"--data {path}: expected the same classes in both parts, found {train.classes}, {test.classes}."
        )
    return Data(train, test, len(train.classes))


def _pixels(crop: Callable[[Any], Any], train: bool, resize: bool = False) -> Any:
    """An image -> (3, H, W) float32, standardised; cropped and flipped at random for training."""
    changed = [crop, v2.RandomHorizontalFlip()] if train else [crop] if resize else []
    return v2.Compose(
        [v2.ToImage(), *changed, v2.RGB(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(_MEAN, _DEVIATION)]
    )


class EpochSampler(Sampler[tuple[int, int]]):
    """(seed, index) of ``size`` images in an order that the seed and the epoch tell: those of one of ``world`` devices.

    The seed is that of the random changes of this image in this epoch, whichever process loads it.
    """

    def __init__(self, size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self.size, self.seed, self.rank, self.world = size, seed, rank, world
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Begin ``epoch``."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size // self.world

    def __iter__(self) -> Iterator[tuple[int, int]]:
        start = epoch_seed(self.seed, self.epoch)
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(start)).tolist()
        for index in order[self.rank : len(self) * self.world : self.world]:
            yield start * self.size + index, index


class Seeded(Dataset[Any]):
    """``data``, of which image (seed, index) is changed by the random numbers that the seed gives."""

    def __init__(self, data: Dataset[Any]) -> None:
        self.data = data

    def __getitem__(self, at: tuple[int, int]) -> Any:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(at[0])
            return self.data[at[1]]


def epoch_seed(seed: int, epoch: int) -> int:
    """What the random numbers of an epoch start from."""
    return seed * 1_000_003 + epoch


def in_order(data: Dataset[Any], batch: int, workers: int) -> DataLoader[Any]:
    """Batches of all images."""
    return DataLoader(data, batch, num_workers=workers)


def shuffled(data: Dataset[Any], batch: int, workers: int, sampler: EpochSampler) -> DataLoader[Any]:
    """Whole batches of the images that ``sampler`` names; all of them in one, where they are fewer."""
    order: Any = sampler
    return DataLoader(Seeded(data), batch, sampler=order, num_workers=workers, drop_last=len(sampler) >= batch)
