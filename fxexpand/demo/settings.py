"""What a run of the demo is asked to do."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """The size of the experiment and the training schedule, equal for all variants.

    The optimiser is the paper's (SGD, learning rate 0.01, momentum 0.9, batches of 128). The defaults are small enough
    for three minutes on two cores: 300 training images, 20 epochs, 5 seeds.
    """

    seeds: int = 5
    epochs: int = 20
    train_size: int = 300
    rate: float = 4.0
    kernel_size: int = 7
    batch_size: int = 128
    learning_rate: float = 0.01
    momentum: float = 0.9

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps per epoch; the last batch may be smaller."""
        return -(-self.train_size // self.batch_size)
