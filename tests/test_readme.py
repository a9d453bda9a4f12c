"""What the README shows, runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.strip().splitlines()[0])
def test_its_code_runs(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    exec(compile(block, str(README), "exec"), names)
    printed = capsys.readouterr().out
    if "collapse(" in block:
        assert float(printed) < 1e-5
    elif "contract(" in block:
        assert float(printed.split()[0]) < 1e-4
        assert "total" in printed
    elif "fuse(" in block:
        assert "wide <- wide.0 + wide.1 + point.0 + point.1 + add + skip + add_1" in printed
    else:
        assert isinstance(names["rules"], list)
