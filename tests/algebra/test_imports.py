"""The algebra is plain tensor maths: it imports torch, never torch.fx, and nothing of the library but itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import fxexpand.algebra

FILES = sorted(Path(fxexpand.algebra.__path__[0]).glob("*.py"))


def imported(source: str) -> Iterator[str]:
    """The dotted names of all that ``source`` imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{name.name}" for name in node.names)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_no_graph_and_no_pass(file: Path) -> None:
    names = list(imported(file.read_text(encoding="utf-8")))
    assert not [name for name in names if name.startswith("torch.fx")]
    assert not [name for name in names if name.startswith("fxexpand") and not name.startswith("fxexpand.algebra.")]
