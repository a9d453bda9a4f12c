"""The key of a pass: the same in every process, another one for each difference, none where nobody can tell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import nn

import fxexpand
from fxexpand import CL, CollapsePass, ExpandPass, FusePass, Rule, layer, parse_rules
from fxexpand.pipeline import keys

X = torch.arange(12.0).reshape(1, 3, 4)

# Each does something else than the others.
PASSES = """[
    ExpandPass(CL(2)), ExpandPass(CL(3)), ExpandPass(CL(2, keep_input=True)), ExpandPass(FC(2)),
    ExpandPass([CL(2), FC(2)]), ExpandPass([FC(2), CL(2)]), ExpandPass(CL(2).then(ACNet())),
    ExpandPass(CL(2), init="standard"), ExpandPass(Rule(CL(2), where=layer())), ExpandPass(Rule(CL(2), where=~layer())),
    ExpandPass(Rule(CL(2), where=layer(kind=nn.Conv2d))), ExpandPass(Rule(CL(2), where=layer(kind=nn.Conv1d))),
    ExpandPass(Rule(CL(2), where=layer("a") | layer("b"))), ExpandPass(Rule(CL(2), where=layer("a") & layer("b"))),
    ExpandPass(Rule(CL(2), where=layer(groups=1))), ExpandPass(Rule(CL(2), where=layer(depthwise=True))),
    ContractPass(), CollapsePass(), CollapsePass(X), CollapsePass(X + 1), CollapsePass(X.double()),
    CollapsePass(X.reshape(3, 1, 4)), CollapsePass(X, X), CollapsePass([X]), CollapsePass({"x": X}),
    CollapsePass(X, 1), CollapsePass(X, True), CollapsePass(X, 1.0), CollapsePass(lifts={}),
    FusePass(), FusePass(when="always"), FusePass(X),
]"""
PROGRAM = f"""
import json
import torch
from torch import nn
from fxexpand import *
X = torch.arange(12.0).reshape(1, 3, 4)
print(json.dumps([made.uuid() for made in {PASSES}]))
"""


def test_keys_are_those_of_another_process() -> None:
    found = [made.uuid() for made in eval(PASSES, {**vars(fxexpand), "nn": nn, "X": X})]
    assert None not in found
    assert len(set(found)) == len(found)
    given = {**os.environ, "PYTHONHASHSEED": "7"}
    printed = subprocess.run([sys.executable, "-c", PROGRAM], env=given, capture_output=True, text=True, check=True)
    assert json.loads(printed.stdout) == found


def test_what_is_written_differently_but_says_the_same_has_one_key() -> None:
    text = "CL(2) on a.*, b & layer(groups=1); FC(2, depth=3)"
    rules = parse_rules(text)
    assert ExpandPass(parse_rules("; ".join(map(str, rules)))).uuid() == ExpandPass(rules).uuid()
    assert ExpandPass(CL(2)).uuid() == ExpandPass([Rule(CL(2))]).uuid()


def test_a_manifest_has_a_key() -> None:
    given = fxexpand.manifest(fxexpand.expand(nn.Sequential(nn.Conv2d(2, 2, 3)), CL(2)))
    other = fxexpand.manifest(fxexpand.expand(nn.Sequential(nn.Conv2d(2, 2, 3)), CL(3)))
    assert ExpandPass(given).uuid() == ExpandPass(json.loads(json.dumps(given))).uuid() != ExpandPass(other).uuid()


@pytest.mark.parametrize("name", ["library_version", "_code_of_the_library"])
def test_another_version_is_another_key(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    before = FusePass().uuid()
    monkeypatch.setattr(keys, name, lambda: "another")
    assert before != FusePass().uuid()


def test_another_torch_is_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = FusePass().uuid()
    monkeypatch.setattr(torch, "__version__", "2.11.0")
    assert before != FusePass().uuid()


class Mine(FusePass):
    """A pass of the user's."""


@dataclass(frozen=True)
class Half(CL):
    """A strategy of the user's."""


def local() -> type[nn.Module]:
    """A class of layers that no import finds."""

    class Local(nn.Conv2d): ...

    return Local


def wide(site: Any) -> bool:
    return bool(site.in_channels > 3)


@pytest.mark.parametrize(
    "made",
    [
        ExpandPass(Rule(CL(2), where=lambda site: site.groups == 1)),
        ExpandPass(Rule(CL(2), where=wide)),
        ExpandPass(Rule(CL(2), where=layer() & wide)),
        ExpandPass(Rule(CL(2), where=layer(kind=local()))),
        ExpandPass(Half(2)),
        ExpandPass(CL(2).then(Half(2))),
        ExpandPass(CL(2), init=lambda site, layers: None),
        FusePass(lifts={nn.Softplus: lambda module: None}),  # type: ignore[dict-item,return-value]
        CollapsePass(lifts={nn.Softplus: lambda module: None}),  # type: ignore[dict-item,return-value]
        FusePass(object()),
        FusePass(X.to_sparse()),
        FusePass(X.to("meta")),
        ExpandPass(CL(Fraction(1, 3))),  # type: ignore[arg-type]  # no float is that
        Mine(),
    ],
)
def test_what_depends_on_code_of_the_user_has_no_key(made: Any) -> None:
    assert made.uuid() is None


def test_a_class_of_the_program_itself_has_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """In another program the same name may be that of another class."""
    kind = local()
    kind.__module__, kind.__qualname__ = "__main__", "Local"
    monkeypatch.setattr(sys.modules["__main__"], "Local", kind, raising=False)
    assert ExpandPass(Rule(CL(2), where=layer(kind=kind))).uuid() is None
