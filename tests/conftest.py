"""Settings of the whole test suite: the Hypothesis profiles, and random numbers that every run draws alike."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, register_random, settings


class _TorchRandom:
    """torch's global generator, so that Hypothesis seeds it before each example and a failing example fails again."""

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def getstate(self) -> torch.Tensor:
        return torch.get_rng_state()

    def setstate(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)


pytest_plugins = ["fxexpand.testing.devices"]

# The networks of most tests are so small that threads wait for each other longer than they work, above all on a machine
# with other work to do. Tests of large networks ask for the `all_cores` fixture.
CORES = torch.get_num_threads()
torch.set_num_threads(1)

# Programs that tests start import the library that is installed, as the tests do, not the folder they start in.
os.environ["PYTHONSAFEPATH"] = "1"

_TORCH_RANDOM = _TorchRandom()  # Hypothesis keeps a weak reference only
register_random(_TORCH_RANDOM)

# No verdict depends on the clock: a loaded machine is slow, not wrong.
_UNTIMED: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("dev", max_examples=15, **_UNTIMED)
settings.register_profile("ci", max_examples=50, derandomize=True, print_blob=True, **_UNTIMED)
settings.register_profile("thorough", max_examples=1000, print_blob=True, **_UNTIMED)
settings.load_profile(os.environ.get("FXEXPAND_PROFILE") or ("ci" if os.environ.get("CI") == "true" else "dev"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Each test starts from the same random state, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def all_cores() -> Iterator[None]:
    """As many threads as torch takes by itself, for the test that asks."""
    torch.set_num_threads(CORES)
    yield
    torch.set_num_threads(1)
