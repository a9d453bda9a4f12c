"""manifest: what expand has made of a model, as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import nn

from fxexpand import strategies as library
from fxexpand.errors import ExpansionError, RuleError
from fxexpand.graph.expanded import Expanded, strays
from fxexpand.graph.trace import check_model
from fxexpand.manifests import FORMAT, Entry, facts_of, full_name, rules_of, strategy_of
from fxexpand.strategies import Strategy
from fxexpand.version import library_version


def manifest(model: nn.Module) -> dict[str, Any]:
    """The expansions in ``model``, collapsed or not, as a ``dict`` that ``json.dumps`` takes.

        checkpoint = {"manifest": manifest(big), "state_dict": big.state_dict()}
        big = expand(Net(), checkpoint["manifest"])          # in another process
        big.load_state_dict(checkpoint["state_dict"])

    ``"sites"`` has an entry for each expansion, an outer one before those inside it: the path, the class and the
    hyperparameters of the layer that was there, and the strategy, as rules print it. ``"rules"`` says the same in
    short, for ``parse_rules``: a text for each level of expansions inside others, to be given to ``expand`` one after
    another where no strategy makes several levels by itself. ``"fxexpand"`` is the version of the library,
    ``"format"`` that of this form. ``"classes"`` are the full names of strategies of yours; ``expand`` imports nothing,
    so the modules that define them must be imported. Weights, dtypes, devices and flags are not in it. A model sharded
    by ``fully_shard`` has the manifest that it had before.

    Raises ``ExpansionError`` when nothing in the model was expanded, or by a strategy that cannot be written as text.
    """
    check_model(model, "manifest", sharded=True)
    if stray := strays(model):
        raise ExpansionError(
            f"{stray[0]}: a layer of an expansion, found outside of one: another pass has kept only what its graph "
            "calls. Make the manifest before it."
        )
    expansions = [(path, module) for path, module in model.named_modules() if isinstance(module, Expanded)]
    if not expansions:
        raise ExpansionError(
            "manifest: expected a model that fxexpand.expand has made, found no expanded layer in it. Make it of "
            "the expanded model: before it is contracted, and not of its counterpart."
        )
    classes = _classes(expansions)
    entries = [_entry(path, expanded, classes) for path, expanded in expansions]
    return {
        "format": FORMAT,
        "fxexpand": library_version(),
        "rules": rules_of([(entry.path, str(entry.strategy)) for entry in entries]),
        "classes": {name: full_name(cls) for name, cls in classes.items()},
        "sites": [
            {"path": entry.path, "layer": entry.layer, **entry.facts, "strategy": str(entry.strategy)}
            for entry in entries
        ],
    }


def _entry(path: str, expanded: Expanded, classes: Mapping[str, type[Strategy]]) -> Entry:
    strategy = expanded.strategy
    assert isinstance(strategy, Strategy), "expand has made it"
    try:
        read = strategy_of(str(strategy), classes.values())
    except RuleError as error:
        raise ExpansionError(f"{path}: its strategy cannot be written as text. {_SIMPLE}\n{error}") from error
    if type(read) is not type(strategy) or read != strategy or _state(read) != _state(strategy):
        raise ExpansionError(f"{path}: its strategy is not the one that is read from its text, {strategy}. {_SIMPLE}")
    return Entry(path, expanded.origin.description, facts_of(expanded.origin.geometry), strategy)


def _state(strategy: Strategy) -> object:
    """What the strategy holds, fields or not."""
    return getattr(strategy, "__dict__", None)


_SIMPLE = "Make it a frozen dataclass with fields that are numbers, strings, True, False, None, tuples or strategies."


def _classes(expansions: list[tuple[str, Expanded]]) -> dict[str, type[Strategy]]:
    """name -> class of the strategies that are not the library's. Raises ``ExpansionError`` where two share a name."""
    found: dict[str, type[Strategy]] = {}
    for path, expanded in expansions:
        for cls in _classes_in(expanded.strategy):
            if found.setdefault(cls.__name__, cls) is not cls:
                both = f"{full_name(found[cls.__name__])} and {full_name(cls)}"
                raise ExpansionError(f"{path}: two strategies are called {cls.__name__}: {both}. Rename one.")
    return {name: cls for name, cls in found.items() if getattr(library, name, None) is not cls}


def _classes_in(value: object) -> Iterator[type[Strategy]]:
    """The class of a strategy, and those of the strategies that it holds."""
    if isinstance(value, Strategy):
        yield type(value)
    if isinstance(value, (tuple, list)):
        held = list(value)
    else:
        held = [getattr(value, f.name) for f in fields(value)] if is_dataclass(value) else []
    for inner in held:
        yield from _classes_in(inner)
