"""What the README shows, runs."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fxexpand
from fxexpand import RuleError, parse_rules
from fxexpand.strategies import Strategy
from fxexpand.testing import PropertyError

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
ALONE = [block for block in BLOCKS if "fully_shard(" not in block]  # tests/distributed runs that in two processes
SHOWN = re.findall(r"```text\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("block", ALONE, ids=lambda block: block.strip().splitlines()[0])
def test_its_code_runs(
    block: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(block, str(README), "exec"), names)
    printed = capsys.readouterr().out
    if "effective_decay(" in block:
        penalty, compact = map(float, printed.split())
        assert abs(penalty - compact) < 1e-5 * compact
    elif "torch.compile(big" in block:
        assert float(printed) < 1e-12
    elif any(call in block for call in ("collapse(", "counterpart(", "PassManager(")):
        assert float(printed) < 1e-5
    elif "contract(" in block:
        assert float(printed.split()[0]) < 1e-4
        assert "total" in printed
    elif "assert_equivalent" in block:
        _finds_what_it_says(names["test_merging_keeps_the_function"])
    elif "manifest(" in block:
        assert _equal(names["big"].state_dict(), names["again"].state_dict())
    elif "torch.export.save(" in block:
        assert printed == "['0.weight', '0.bias'] torch.Size([1, 8, 14, 14])\n"
    elif "fuse(" in block:
        assert "wide <- wide.0 + wide.1 + point.0 + point.1 + add + skip + add_1" in printed
    else:
        assert isinstance(names["rules"], list)


def test_the_table_of_strategies_is_what_they_say_of_themselves() -> None:
    classes = [cls for cls in vars(fxexpand.strategies).values() if inspect.isclass(cls) and issubclass(cls, Strategy)]
    rows = [_row(cls) for cls in classes if cls.__name__ not in ("Strategy", "Then")]
    shown = [
        line for line in README.read_text(encoding="utf-8").splitlines() if line.startswith("| `") and "al. 20" in line
    ]
    assert sorted(shown) == sorted(rows)


def _row(cls: type[Strategy]) -> str:
    given = inspect.signature(cls).parameters.values()
    options = ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default}" for p in given)
    reaches = re.search(r"Reaches: (.*?)\.\n", str(cls.__doc__), re.DOTALL)
    assert reaches is not None
    collapses = "yes" if cls.collapses is Strategy.collapses else "without batch norm"
    cells = [f"`{cls.__name__}({options})`", cls.source, cls.structure, cls.formula, " ".join(reaches[1].split())]
    return f"| {' | '.join(cells)} | {collapses} |"


def test_an_error_of_rules_is_the_one_that_it_shows() -> None:
    (shown,) = (text for text in SHOWN if text.startswith("rules"))
    with pytest.raises(RuleError) as caught:
        parse_rules(shown.splitlines()[1].strip())
    assert str(caught.value) == shown.rstrip()


def _equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in expected)


def _finds_what_it_says(test: Any) -> None:
    """The output that stands under the code is the output of the code, but for the digits of the bound."""
    (shown,) = (text for text in SHOWN if "PropertyError" in text)
    with pytest.raises(PropertyError) as failure:
        test()
    first, case = shown.splitlines()[0], shown.splitlines()[2].strip()
    before, after = first.removeprefix("fxexpand.testing.equivalent.PropertyError: ").split("2.0e-15")
    assert str(failure.value).startswith(before)
    assert after in str(failure.value)
    assert case in "\n".join(vars(failure.value)["__notes__"])
