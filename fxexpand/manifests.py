"""Reading what ``manifest(model)`` gives, and finding the layers of another model that it speaks of."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from fxexpand.errors import RuleError, did_you_mean
from fxexpand.filters import clause_of, layer
from fxexpand.graph.expanded import Expanded
from fxexpand.graph.find import find_sites
from fxexpand.graph.geometry import Geometry
from fxexpand.graph.site import Site
from fxexpand.notation import parse_rules
from fxexpand.strategies import Strategy
from fxexpand.version import library_version

FORMAT = 1

_KEYS = ("format", "fxexpand", "rules", "classes", "sites")
_TEXTS = ("path", "layer", "strategy")
_LINEAR = ("in_channels", "out_channels", "bias")
_CONVOLUTION = (*_LINEAR, "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")

# How many differences an error lists.
_MOST = 8


@dataclass(frozen=True)
class Entry:
    """One expansion: the path and the class of the layer, its hyperparameters as JSON has them, and the strategy."""

    path: str
    layer: str
    facts: dict[str, Any]
    strategy: Strategy


def facts_of(geometry: Geometry) -> dict[str, Any]:
    """The hyperparameters of a layer as JSON has them; those of a convolution only where it is one."""
    facts = {"bias" if name == "has_bias" else name: value for name, value in asdict(geometry).items()}
    shown = {name: value for name, value in facts.items() if geometry.dims or name in _LINEAR}
    found: dict[str, Any] = json.loads(json.dumps(shown))
    return found


def full_name(cls: type) -> str:
    """``package.module.Class``."""
    return f"{cls.__module__}.{cls.__qualname__}"


def rules_of(sites: Iterable[tuple[str, str]]) -> list[str]:
    """The rules that expand the layers of these paths by these strategies: one text for each level of expansions."""
    found: list[str] = []
    for level in _levels(dict(sites)):
        paths: dict[str, list[str]] = {}
        for path, strategy in level:
            paths.setdefault(strategy, []).append(path)
        found.append("; ".join(f"{strategy} on {_globs(these)}" for strategy, these in paths.items()))
    return found


def strategy_of(text: str, classes: Iterable[type[Strategy]] = ()) -> Strategy:
    """The strategy that ``text`` says. Raises ``RuleError``."""
    rules = parse_rules(text, classes=classes)
    if len(rules) != 1 or rules[0].where is not None:
        raise RuleError(f"expected one strategy, found {text!r}.")
    return rules[0].strategy


def read_manifest(given: Mapping[str, Any]) -> list[list[Entry]]:
    """The expansions that a manifest lists, one list for each level. Raises ``RuleError`` for what is no manifest."""
    try:
        plain = json.loads(json.dumps(dict(given), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise _malformed(f"expected values of JSON, found others ({error})") from error
    _check_format(plain)
    _check_keys("it", plain, _KEYS)
    sites, classes = plain["sites"], _loaded(plain["classes"])
    if not (isinstance(sites, list) and sites and all(isinstance(site, dict) for site in sites)):
        raise _malformed(f"expected a list of sites, found {sites!r:.60}")
    entries = [_entry(position, site, classes) for position, site in enumerate(sites)]
    by_path = {entry.path: entry for entry in entries}
    if len(by_path) < len(entries):
        raise _malformed("expected each path once, found one again")
    if plain["rules"] != rules_of([(site["path"], site["strategy"]) for site in sites]):
        raise _malformed("expected the rules that its sites make, found others: one of them was changed by hand")
    return [[by_path[path] for path, _ in level] for level in _levels({site["path"]: "" for site in sites})]


def check_plain(model: nn.Module) -> None:
    """Raise ``RuleError`` if something in the model is expanded already."""
    found = [path for path, module in model.named_modules() if isinstance(module, Expanded)]
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise RuleError(
            f"manifest: expected the model before it was expanded, found an expansion at {found[0]!r}{more}. "
            "Give the plain model; one that is expanded as the manifest says can load the state_dict itself."
        )


def fitting(model: nn.Module, entries: Sequence[Entry]) -> list[tuple[Site, Strategy]]:
    """The layers of ``model`` that the entries speak of, in their order, but for those that are as they say already.

    Raises ``RuleError``, which lists where the model differs.
    """
    sites = find_sites(model)
    known = {id(site.weight if site.module is None else site.module): site for site in sites}
    found: list[tuple[Site, Strategy]] = []
    differences: list[str] = []
    for entry in entries:
        held = _held(model, entry.path)
        if isinstance(held, Expanded) and _is_as(entry, held):
            continue  # a strategy that expands layers of its own has made it
        site = known.get(id(held))
        difference = _difference(entry, held, site, sites)
        if difference:
            differences.append(f"{entry.path or 'the model'}: {difference}")
        elif site is not None:
            found.append((site, entry.strategy))
    if differences:
        raise _unlike(differences, len(entries))
    return found


def check_rebuilt(model: nn.Module, levels: Iterable[Sequence[Entry]]) -> None:
    """Raise ``RuleError`` unless the expansions in ``model`` are those of the manifest."""
    expected = {entry.path: entry.strategy for level in levels for entry in level}
    found = {path: module.strategy for path, module in model.named_modules() if isinstance(module, Expanded)}
    differences = [
        f"{path}: expected {expected.get(path, 'no expansion')}, made {found.get(path, 'none')}"
        for path in {**expected, **found}
        if expected.get(path) != found.get(path)
    ]
    if differences:
        raise _unlike(differences, len(expected))


def _levels(sites: Mapping[str, str]) -> Iterator[list[tuple[str, str]]]:
    """(path, strategy) of the outermost expansions, then of those inside of one, and so on; each in their order."""
    levels: dict[int, list[tuple[str, str]]] = {}
    for path, strategy in sites.items():
        names = path.split(".") if path else []
        outer = [".".join(names[:i]) for i in range(len(names))]
        levels.setdefault(sum(prefix in sites for prefix in outer), []).append((path, strategy))
    for depth in sorted(levels):
        yield levels[depth]


def _globs(paths: Iterable[str]) -> str:
    first, *others = [layer(re.sub(r"([*?[])", r"[\1]", path)) for path in paths]
    for other in others:
        first |= other
    return clause_of(first)


def _malformed(what: str) -> RuleError:
    return RuleError(f"manifest: {what}. Give what manifest(model) gave, or rules.")


def _check_format(plain: dict[str, Any]) -> None:
    number, version = plain.get("format"), plain.get("fxexpand")
    if type(number) is not int or number < 1:
        raise _malformed(f"expected 'format', a number, found {number!r:.60}")
    if number > FORMAT:
        raise RuleError(
            f"manifest: expected format {FORMAT}, found {number}, written by fxexpand {version}; this is fxexpand "
            f"{library_version()}. Install that version."
        )


def _check_keys(what: str, found: dict[str, Any], expected: Iterable[str]) -> None:
    missing, unknown = [key for key in expected if key not in found], [key for key in found if key not in expected]
    if missing or unknown:
        kind, names = ("has no", missing) if missing else ("has an unknown", unknown)
        raise _malformed(f"{what} {kind} {', '.join(map(repr, names))}")


def _loaded(names: object) -> list[type[Strategy]]:
    """The classes of the user's that a manifest names, among those that are defined in this process."""
    if not (isinstance(names, dict) and all(isinstance(name, str) for name in names.values())):
        raise _malformed(f"expected the names of classes, found {names!r:.60}")
    defined = {full_name(cls): cls for cls in _subclasses(Strategy)}
    for name in names.values():
        if name not in defined:
            raise RuleError(f"manifest: the strategy {name} is not defined in this process. Import its module first.")
    return [defined[name] for name in names.values()]


def _subclasses(cls: type[Any]) -> list[type[Any]]:
    direct: list[type[Any]] = cls.__subclasses__()
    return [found for inner in direct for found in (inner, *_subclasses(inner))]


def _entry(position: int, site: dict[str, Any], classes: Sequence[type[Strategy]]) -> Entry:
    facts = _CONVOLUTION if "kernel_size" in site else _LINEAR
    _check_keys(f"site {position}", site, [*_TEXTS, *facts])
    for key in _TEXTS:
        if not isinstance(site[key], str):
            raise _malformed(f"site {position} has the {key} {site[key]!r:.60}, expected text")
    try:
        strategy = strategy_of(site["strategy"], classes)
    except RuleError as error:
        raise RuleError(f"manifest, site {position} ({site['path']}): {error}") from error
    return Entry(site["path"], site["layer"], {key: site[key] for key in facts}, strategy)


def _held(model: nn.Module, path: str) -> object:
    """The module or parameter at a path, or None."""
    found: object = model
    for name in path.split(".") if path else ():
        own = found if isinstance(found, nn.Module) else nn.Module()
        found = own._modules.get(name, own._parameters.get(name))
    return found


def _is_as(entry: Entry, held: Expanded) -> bool:
    return held.strategy == entry.strategy and facts_of(held.origin.geometry) == entry.facts


def _difference(entry: Entry, held: object, site: Site | None, sites: Sequence[Site]) -> str:
    """What is otherwise in the model; nothing where it fits."""
    if held is None:
        return f"expected {entry.layer}, found nothing there.{did_you_mean(entry.path, (s.path for s in sites))}"
    if site is None:
        kind = f"an expansion by {held.strategy}" if isinstance(held, Expanded) else type(held).__name__
        return f"expected {entry.layer}, found {kind}, which is no layer that the model uses"
    name = f"{site.function.__name__}()" if site.module is None else type(site.module).__name__
    if name != entry.layer:
        return f"expected {entry.layer}, found {name}"
    # As text, since True and 1.0 are 1 for Python.
    facts = facts_of(site.geometry)
    expected, found = ({key: json.dumps(value) for key, value in those.items()} for those in (entry.facts, facts))
    unlike = [key for key in _CONVOLUTION if expected.get(key) != found.get(key)]
    if unlike:
        one, other = (", ".join(f"{key}={those.get(key)}" for key in unlike) for those in (expected, found))
        return f"expected {one}, found {other}"
    if site.dims not in entry.strategy.dims:
        return f"expected a layer that {entry.strategy} takes, found {name}"
    return ""


def _unlike(differences: Sequence[str], total: int) -> RuleError:
    shown = "\n  ".join(differences[:_MOST])
    more = f"\n  and {len(differences) - _MOST} more" if len(differences) > _MOST else ""
    return RuleError(
        f"manifest: it does not fit the model, at {len(differences)} of {total} sites:\n  {shown}{more}\n"
        "Build the model as it was when the manifest was made, or expand by rules."
    )
