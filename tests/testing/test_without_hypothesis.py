"""Without Hypothesis, what draws nothing works, and the rest says how to install it."""

from __future__ import annotations

import subprocess
import sys

import pytest

BLOCKED = "import sys; sys.modules['hypothesis'] = None; "


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", BLOCKED + code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "name",
    ["layers", "linear_chains", "linear_graphs", "networks", "expandable_layers", "check_strategy", "StrategyReport"],
)
def test_drawing_says_what_is_missing(name: str) -> None:
    done = run(f"from fxexpand.testing import {name}")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: fxexpand.testing: drawing random models needs Hypothesis")
    assert 'pip install "fxexpand[testing]"' in last


def test_the_rest_works() -> None:
    code = (
        "import torch; from torch import nn; from fxexpand.testing import assert_equivalent, check_model, matrix;"
        "model = nn.Sequential(nn.Linear(3, 2)); x = torch.randn(4, 3);"
        "assert_equivalent(model, model, x); print(check_model(model, x, backend=None)); matrix(model[0], ())"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert "contract restores" in done.stdout


def test_a_name_that_is_not_there() -> None:
    done = run("import fxexpand.testing; fxexpand.testing.nonsense")
    assert done.stderr.strip().splitlines()[-1].startswith("AttributeError: module 'fxexpand.testing' has no attribute")
