"""A pytest plugin: tests that ask for ``device`` run on every kind of device there is.

With ``pytest_plugins = ["fxexpand.testing.devices"]`` in the ``conftest.py`` at the root of the tests, or
``pytest -p fxexpand.testing.devices``:

    def test_it(device: torch.device) -> None: ...          # test_it[cpu], and test_it[cuda] where there is one

The header of the report names the devices, and says so where there is only the CPU.
"""

from __future__ import annotations

import platform

import pytest
import torch


def devices() -> list[torch.device]:
    """The CPU, and CUDA (the current device of it) where torch finds one."""
    return [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]


@pytest.fixture(scope="session", params=devices(), ids=str)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each kind of device there is, in turn; its name is in the id of the test."""
    found: torch.device = request.param
    return found


def pytest_report_header() -> str:
    """Which devices tests of the ``device`` fixture run on."""
    cpu = f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"
    if not torch.cuda.is_available():
        return f"devices: {cpu} alone: torch {torch.__version__} finds no CUDA device"
    cudnn = torch.backends.cudnn.version()
    return f"devices: {cpu}, cuda ({torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, cuDNN {cudnn})"
