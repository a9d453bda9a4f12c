"""What the README shows of data-parallel training, runs in two processes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from two_processes import run_pair

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")

README = Path(__file__).parent.parent.parent / "README.md"


def test_its_code_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (shown,) = (block for block in blocks if "fully_shard(" in block)
    run_pair(run, shown, folder=tmp_path)


def run(rank: int, code: str) -> None:
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(compile(code, str(README), "exec"), names)
    model, fast, images = names["model"], names["fast"], names["images"]
    trained = fast(images)
    if rank == 0:
        torch.testing.assert_close(model(images), trained, rtol=1e-4, atol=1e-5)
