"""The expansions of a model, as those who train it see them."""

from __future__ import annotations

from torch import nn

from fxexpand.errors import ExpansionError
from fxexpand.graph.expanded import Expanded, outermost, strays


def expansions_of(model: nn.Module, task: str) -> list[tuple[str, Expanded]]:
    """(path, expansion) of those that are in no other one, each once, in the order of ``named_modules``.

    Raises ``ExpansionError`` for layers of an expansion that stand in none: nobody can say what they make up.
    """
    if stray := strays(model):
        raise ExpansionError(
            f"{task}: {stray[0]}: expected the layers of an expansion to stand in it, found one outside: another pass "
            "has kept only what its graph calls (torch.fx.symbolic_trace and Transformer do). Use the model that "
            "fxexpand.expand or collapse gave, or mode='factors'."
        )
    return outermost(model)
