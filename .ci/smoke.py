"""What a user of the plain wheel does first. Run as `python -I smoke.py` in an environment made for this alone."""

import importlib.util
import sys
from pathlib import Path

import torch
from torch import nn

import fxexpand
import fxexpand.passes
from fxexpand import CL
from fxexpand.testing import check_model


def check(holds: bool, what: str) -> None:
    """End the program with status 1 unless `holds`."""
    if not holds:
        sys.exit(f"the installed wheel: {what}")


for package in (fxexpand, fxexpand.passes):
    origin = Path(str(package.__file__)).resolve()
    check(Path(sys.prefix).resolve() in origin.parents, f"{package.__name__} comes from elsewhere, {origin}")
for extra in ("hypothesis", "matplotlib", "rich", "scipy", "sklearn", "torchvision", "typer"):
    check(importlib.util.find_spec(extra) is None, f"{extra} is installed, so this is no test of the bare library")

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2)).double().eval()
image = torch.randn(2, 3, 9, 9, dtype=torch.float64)

expanded = fxexpand.expand(model, CL(2))
contracted = fxexpand.contract(expanded)
parameters = [sum(p.numel() for p in m.parameters()) for m in (model, expanded, contracted)]
check(parameters[1] > parameters[0] == parameters[2], f"compact, expanded, contracted have {parameters} parameters")
errors = [fxexpand.verify(model, other, image, rtol=1e-10) for other in (expanded, contracted)]
report = check_model(model, image, rules=CL(2), backend=None)
check(len(report.held) == 6, f"check_model says {report}")
try:
    from fxexpand.testing import layers  # noqa: F401
except ImportError as error:
    check('pip install "fxexpand[testing]"' in str(error), f"without Hypothesis it says {error}")
else:
    check(False, "fxexpand.testing.layers does without Hypothesis")
model.load_state_dict(contracted.state_dict(), strict=True)
print(f"The wheel expands and contracts: parameters {parameters}, relative errors {errors}.")
