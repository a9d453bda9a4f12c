import pytest
import torch

import fxexpand.demo.experiment
from fxexpand import VerificationError
from fxexpand.demo.data import digits
from fxexpand.demo.experiment import Run, contraction_error, cost, experiment
from fxexpand.demo.settings import Settings
from fxexpand.demo.smallnet import SmallNet
from fxexpand.demo.variants import variants

SETTINGS = Settings(seeds=2, epochs=1, train_size=20, rate=2, kernel_size=3)


@pytest.fixture
def _few_test_images(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = digits()
    monkeypatch.setattr(fxexpand.demo.experiment, "digits", lambda: (images[:120], labels[:120]))


def runs() -> list[Run]:
    return list(experiment(SETTINGS, variants(SETTINGS.rate, SETTINGS.kernel_size), lambda variant, seed: None))


@pytest.mark.usefixtures("_few_test_images")
def test_variants_take_turns_within_a_seed_and_results_repeat() -> None:
    state = torch.get_rng_state()
    first, again = runs(), runs()
    names = ("compact", "cl", "cl-collapsed")
    assert [(run.variant.name, run.seed) for run in first] == [(name, seed) for seed in (0, 1) for name in names]
    for run, other in zip(first, again, strict=True):
        assert run.curves.losses == other.curves.losses
        assert run.test_error == run.curves.test_errors[-1] == other.test_error
        assert torch.equal(run.predictions, other.predictions)
        assert all(torch.equal(run.weights[name], other.weights[name]) for name in other.weights)
    assert torch.equal(torch.get_rng_state(), state)


def test_layers_that_are_not_expanded_start_equal_in_every_variant() -> None:
    networks = []
    for variant in variants(rate=4, kernel_size=7):
        torch.manual_seed(1)
        networks.append(variant.build(SmallNet()))
    for name in ("classifier.hidden.weight", "classifier.output.bias", "features.bn2.weight"):
        weights = [network.get_parameter(name) for network in networks]
        assert all(torch.equal(weight, weights[0]) for weight in weights)


def test_costs_are_those_of_the_formulas() -> None:
    compact, cl, fast, ck = (cost(variant, kernel_size=7) for variant in variants(rate=4, kernel_size=7))
    linear = 512 * 64 + 64 * 10
    # Output positions × taps × channels in × channels out, of the three convolutions: 32², 16² and 8² positions.
    convolutions = 49 * (32**2 * 3 * 8 + 16**2 * 8 * 16 + 8**2 * 16 * 32)
    assert compact.training_macs == compact.deployed_macs == linear + convolutions
    assert compact.training_parameters == compact.deployed_parameters
    assert round(ck.training_parameters / 1e3, 1) == 187.0  # the paper's table, rate 4
    assert fast.training_parameters == cl.training_parameters
    assert compact.training_macs < fast.training_macs < cl.training_macs  # of one image, composing included
    for expanded in (cl, ck):
        assert expanded.training_macs > 4 * compact.training_macs
        assert expanded.deployed_parameters == compact.deployed_parameters
        assert expanded.deployed_macs == compact.deployed_macs


def test_ck_is_left_out_where_kernels_are_3_by_3() -> None:
    assert [variant.name for variant in variants(rate=4, kernel_size=3)] == ["compact", "cl", "cl-collapsed"]


def test_contracting_costs_less_than_float32_rounding() -> None:
    images = torch.randn(8, 3, 32, 32)
    for variant in variants(rate=4, kernel_size=7):
        trained = variant.build(SmallNet()).eval()
        error = contraction_error(trained, variant.deployed(trained, kernel_size=7), images)
        assert error.rounding < 5e-7
        assert 0 < error.float32 < 5e-7
        assert (error.rounding == 0) == (variant.name == "compact")


def test_a_wrong_contraction_is_an_error() -> None:
    _, cl, *_ = variants(rate=4, kernel_size=7)
    trained = cl.build(SmallNet()).eval()
    deployed = cl.deployed(trained, kernel_size=7)
    with torch.no_grad():
        deployed.get_parameter("features.conv2.weight").mul_(1.01)
    with pytest.raises(VerificationError):
        contraction_error(trained, deployed, torch.randn(8, 3, 32, 32))
