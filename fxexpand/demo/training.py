"""One training run, timed step by step."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxexpand.demo.data import Split
from fxexpand.demo.settings import Settings
from fxexpand.errors import FxExpandError

EVALUATION_BATCH = 128


class DivergedError(FxExpandError):
    """The training loss is no longer a finite number."""


@dataclass(frozen=True)
class Curves:
    """What was measured while training.

    `losses`: mean training loss of each epoch (cross-entropy, nats per image). `test_errors`: the share of test images
    that the deployed network gets wrong after each epoch, in [0, 1]. `step_seconds`: the median time of a training step
    (forward, backward and update) on a full batch.
    """

    losses: tuple[float, ...]
    test_errors: tuple[float, ...]
    step_seconds: float


def logits(model: nn.Module, images: Tensor) -> Tensor:
    """`model(images)` in batches and without gradients: (N, 3, 32, 32) -> (N, classes). The caller sets eval mode."""
    with torch.inference_mode():
        return torch.cat([model(batch) for batch in images.split(EVALUATION_BATCH)])


def train(
    model: nn.Module,
    split: Split,
    settings: Settings,
    seed: int,
    deployed: Callable[[nn.Module], nn.Module],
    on_step: Callable[[], None],
) -> Curves:
    """Train `model` in place with SGD; the order of the images depends on `seed` only.

    Test errors are those of `deployed(model)`: the contracted network computes the same function, at less cost than the
    expanded one. Calls `on_step` after each step. Raises `DivergedError` if the loss is infinite or NaN.
    """
    order = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.SGD(model.parameters(), lr=settings.learning_rate, momentum=settings.momentum)
    losses: list[float] = []
    test_errors: list[float] = []
    step_seconds: list[float] = []
    for epoch in range(settings.epochs):
        model.train()
        total = 0.0
        for batch in torch.randperm(len(split.train_labels), generator=order).split(settings.batch_size):
            loss, seconds = _step(model, optimiser, split.train_images[batch], split.train_labels[batch])
            total += loss * len(batch)
            if len(batch) == min(settings.batch_size, len(split.train_labels)):
                step_seconds.append(seconds)
            on_step()
        losses.append(total / len(split.train_labels))
        # A comparison with NaN is false, so this catches infinity and NaN alike.
        if not losses[-1] < float("inf"):
            raise DivergedError(
                f"training with seed {seed}, epoch {epoch + 1}: expected a finite loss, found {losses[-1]}. "
                "Use a smaller --rate."
            )
        test_errors.append(error_rate(deployed(model).eval(), split))
    return Curves(tuple(losses), tuple(test_errors), statistics.median(step_seconds))


def error_rate(model: nn.Module, split: Split) -> float:
    """The share of test images, in [0, 1], that `model` (in eval mode) gets wrong."""
    wrong = logits(model, split.test_images).argmax(1) != split.test_labels
    return int(wrong.sum()) / len(wrong)


def _step(model: nn.Module, optimiser: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """The batch's mean loss and the seconds that the step took."""
    start = time.perf_counter()
    optimiser.zero_grad()
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimiser.step()
    return loss.item(), time.perf_counter() - start
