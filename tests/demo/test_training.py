import dataclasses

import pytest
import torch
from torch import nn

from fxexpand.demo.data import Split, digits, split
from fxexpand.demo.settings import Settings
from fxexpand.demo.smallnet import SmallNet
from fxexpand.demo.training import Curves, DivergedError, error_rate, train

SETTINGS = Settings(epochs=2, train_size=40, batch_size=16, kernel_size=3)


@pytest.fixture(scope="module")
def part() -> Split:
    return split(*digits(), SETTINGS.train_size, seed=0)


def run(part: Split, settings: Settings, seed: int = 0) -> tuple[Curves, int]:
    """The curves of training a fresh network, and how many steps were announced."""
    steps: list[None] = []
    torch.manual_seed(0)
    model = SmallNet(kernel_size=3)
    curves = train(model, part, settings, seed, lambda network: network, lambda: steps.append(None))
    return curves, len(steps)


def test_curves_have_an_entry_per_epoch_and_every_step_is_announced(part: Split) -> None:
    curves, steps = run(part, SETTINGS)
    assert len(curves.losses) == len(curves.test_errors) == SETTINGS.epochs
    assert steps == SETTINGS.epochs * SETTINGS.steps_per_epoch == 6
    assert curves.step_seconds > 0


def test_training_lowers_the_loss_and_then_the_test_error(part: Split) -> None:
    curves, _ = run(part, dataclasses.replace(SETTINGS, epochs=12))
    assert curves.losses[-1] < 0.5 * curves.losses[0]
    assert curves.test_errors[-1] < 0.5


def test_the_seed_alone_decides_the_order_of_the_images(part: Split) -> None:
    curves, again, other = (run(part, SETTINGS, seed)[0] for seed in (5, 5, 6))
    assert curves.losses == again.losses
    assert curves.test_errors == again.test_errors
    assert curves.losses != other.losses


def test_the_test_error_is_that_of_the_deployed_network(part: Split) -> None:
    class Always(nn.Module):
        """Answers 7, whatever it sees."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return nn.functional.one_hot(torch.full((len(images),), 7), 10)

    settings = dataclasses.replace(SETTINGS, epochs=1)
    curves = train(SmallNet(kernel_size=3), part, settings, 0, lambda network: Always(), lambda: None)
    sevens = int((part.test_labels == 7).sum())
    assert curves.test_errors == ((len(part.test_labels) - sevens) / len(part.test_labels),)
    assert error_rate(Always(), part) == curves.test_errors[0]


def test_a_diverging_run_ends_with_what_to_do(part: Split) -> None:
    with pytest.raises(DivergedError, match=r"seed 0, epoch \d.*Use a smaller --rate"):
        run(part, dataclasses.replace(SETTINGS, learning_rate=1e30, epochs=4))
