"""What the paper counts, through expand and summary."""

from __future__ import annotations

import pytest
import torch

import fxexpand
from fxexpand import CK, CL, FC, Rule, layer
from fxexpand.demo.smallnet import SmallNet

# Guo, Alvarez and Salzmann 2020, SmallNet 7×7 with CK on the convolutions, thousands of parameters: 10 classes, 100.
COUNTS = {
    0.25: ("37.91", "43.76"),
    0.50: ("42.81", "48.66"),
    0.75: ("48.43", "54.28"),
    1.0: ("54.77", "60.62"),
    None: ("66.19", "72.04"),
    2.0: ("87.32", "93.17"),
    4.0: ("187.0", "192.8"),
}


def thousands(count: int, like: str) -> str:
    """``count`` as the paper prints it: in thousands, with as many decimals as ``like``."""
    return f"{count / 1000:.{len(like.partition('.')[2])}f}"


@pytest.mark.parametrize("rate", COUNTS, ids=lambda rate: f"rate={rate}")
@pytest.mark.parametrize("column", [0, 1], ids=["10 classes", "100 classes"])
def test_smallnet_with_ck_has_the_paper_s_parameters(rate: float | None, column: int) -> None:
    model = SmallNet(classes=(10, 100)[column])
    net = model if rate is None else fxexpand.expand(model, CK(rate, keep_input=True), init="standard")
    expected = COUNTS[rate][column]
    assert thousands(fxexpand.summary(net).parameters, expected) == expected


def test_cl_adds_the_parameters_that_the_paper_s_formula_says() -> None:
    m, n, k, r = 5, 7, 3, 4
    before = torch.nn.Conv2d(m, n, k, bias=False)
    added = fxexpand.summary(fxexpand.expand(before, CL(r))).parameters - fxexpand.summary(before).parameters
    assert added == r * m**2 + k**2 * r**2 * m * n + r * n**2 - k**2 * m * n


def test_the_paper_s_fc_expansion_of_smallnet_in_three_layers() -> None:
    rule = Rule(FC(4, depth=3), where=layer(name="classifier.hidden"))
    big = fxexpand.expand(SmallNet(), rule)
    shapes = [tuple(p.shape) for name, p in big.named_parameters() if "linear_" in name and name.endswith("weight")]
    assert shapes == [(2048, 512), (256, 2048), (64, 256)]
