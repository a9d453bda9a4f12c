"""The whole comparison: every variant trained from every seed, contracted and measured."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from fxexpand import summary, verify
from fxexpand.demo.data import CLASSES, Split, digits, split
from fxexpand.demo.settings import Settings
from fxexpand.demo.smallnet import CHANNELS, IMAGE_SIZE, SmallNet
from fxexpand.demo.training import Curves, logits, train
from fxexpand.demo.variants import Variant

# Float32 rounding stays several hundred times below this; a wrong contraction does not.
WORST_CONTRACTION_ERROR = 1e-4
IMAGES_TO_VERIFY = 64


@dataclass(frozen=True)
class Cost:
    """Parameters, and multiply-accumulates of one image's forward pass, while training and as deployed."""

    training_parameters: int
    deployed_parameters: int
    training_macs: int
    deployed_macs: int


@dataclass(frozen=True)
class ContractionError:
    """How far the deployed SmallNet is from the network that was trained: ‖deployed − trained‖ / ‖trained‖ of logits.

    `rounding`: both evaluated in float64, so what remains is that the contracted weights are stored in float32.
    `float32`: the deployed network evaluated in float32, as it will run, against the trained one in float64. For a
    network that was never expanded the first is 0 and the second is the noise of float32 arithmetic itself.
    """

    rounding: float
    float32: float


@dataclass(frozen=True)
class Run:
    """One variant trained from one seed. `test_error` is in [0, 1], `predictions` (N,) are of the test images."""

    variant: Variant
    seed: int
    curves: Curves
    test_error: float
    contraction: ContractionError
    weights: dict[str, Tensor]
    predictions: Tensor


def experiment(
    settings: Settings, variants: Sequence[Variant], on_step: Callable[[Variant, int], None]
) -> Iterator[Run]:
    """Yield every run. Variants take turns within a seed, so that a slow minute of the machine meets all of them.

    Calls `on_step` with the variant and the seed after each training step. Equal settings give equal results, apart
    from the times, and the caller's random state is left alone. Raises `VerificationError` if a contracted network
    differs from the one that was trained.
    """
    images, labels = digits()
    for seed in range(settings.seeds):
        part = split(images, labels, settings.train_size, seed)
        for variant in variants:
            with torch.random.fork_rng(devices=[]):
                # Every variant starts from the same compact network: the layers that are not expanded start equal.
                torch.manual_seed(seed)
                run = _run(variant, part, settings, seed, partial(on_step, variant, seed))
            yield run


def cost(variant: Variant, kernel_size: int) -> Cost:
    """What `variant` costs in training and deployed, counted on networks built for the purpose."""
    image = torch.zeros(1, CHANNELS[0], IMAGE_SIZE, IMAGE_SIZE)
    training = variant.build(SmallNet(CLASSES, kernel_size))
    before = summary(training, image)
    after = summary(variant.deployed(training, kernel_size), image)
    # MACs are None only where no input was given to count them on.
    return Cost(before.parameters, after.parameters, cast("int", before.macs), cast("int", after.macs))


def _run(variant: Variant, part: Split, settings: Settings, seed: int, on_step: Callable[[], None]) -> Run:
    model = variant.build(SmallNet(CLASSES, settings.kernel_size))
    curves = train(model, part, settings, seed, lambda m: variant.deployed(m, settings.kernel_size), on_step)
    deployed = variant.deployed(model, settings.kernel_size)
    return Run(
        variant=variant,
        seed=seed,
        curves=curves,
        test_error=curves.test_errors[-1],
        contraction=contraction_error(model, deployed, part.test_images[:IMAGES_TO_VERIFY]),
        weights=deployed.state_dict(),
        predictions=logits(deployed, part.test_images).argmax(1),
    )


def contraction_error(trained: nn.Module, deployed: nn.Module, images: Tensor) -> ContractionError:
    """Compare `deployed` with `trained`; raises `VerificationError` above 1e-4 relative."""
    exact = _In(torch.float64, trained)
    errors = [
        verify(exact, _In(dtype, deployed), images.double(), rtol=WORST_CONTRACTION_ERROR)
        for dtype in (torch.float64, torch.float32)
    ]
    return ContractionError(*errors)


class _In(nn.Module):
    """A copy of `model` that computes in `dtype`, whatever the dtype of its input, and answers in float64."""

    def __init__(self, dtype: torch.dtype, model: nn.Module) -> None:
        super().__init__()
        self.dtype = dtype
        self.model = copy.deepcopy(model).to(dtype)

    def forward(self, images: Tensor) -> Tensor:
        answer: Tensor = self.model(images.to(self.dtype))
        return answer.double()
