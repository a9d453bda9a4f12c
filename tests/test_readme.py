"""What the README shows, runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fxexpand.testing import PropertyError

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.strip().splitlines()[0])
def test_its_code_runs(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    exec(compile(block, str(README), "exec"), names)
    printed = capsys.readouterr().out
    if "collapse(" in block or "counterpart(" in block:
        assert float(printed) < 1e-5
    elif "contract(" in block:
        assert float(printed.split()[0]) < 1e-4
        assert "total" in printed
    elif "assert_equivalent" in block:
        _finds_what_it_says(names["test_merging_keeps_the_function"])
    elif "fuse(" in block:
        assert "wide <- wide.0 + wide.1 + point.0 + point.1 + add + skip + add_1" in printed
    else:
        assert isinstance(names["rules"], list)


def _finds_what_it_says(test: Any) -> None:
    """The output that stands under the code is the output of the code, but for the digits of the bound."""
    (shown,) = re.findall(r"```text\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    with pytest.raises(PropertyError) as failure:
        test()
    first, case = shown.splitlines()[0], shown.splitlines()[2].strip()
    before, after = first.removeprefix("fxexpand.testing.equivalent.PropertyError: ").split("2.0e-15")
    assert str(failure.value).startswith(before)
    assert after in str(failure.value)
    assert case in "\n".join(vars(failure.value)["__notes__"])
