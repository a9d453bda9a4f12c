"""Hooks that somebody puts on a model between two passes: they go on running, or a pass says what is in the way."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxexpand
from drawing import random
from fxexpand import CK, CL, FC, FxExpandError, Rule, layer
from fxexpand.regions.live_region import LiveRegion
from fxexpand.testing import as_trained

RULES = [CK(4), CL(2), FC(2)]


def network() -> nn.Module:
    """Expansions by every strategy, padding of a mode of its own, batch norm, and two layers in a row."""
    circular = nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2, padding_mode="circular")
    layers = [nn.Conv2d(4, 4, 5), nn.BatchNorm2d(4), nn.ReLU(), circular, nn.BatchNorm2d(4), nn.ReLU()]
    layers += [nn.Conv2d(4, 8, 1, bias=False), nn.Conv2d(8, 2, 1), nn.Flatten(), nn.Linear(18, 3)]
    return as_trained(nn.Sequential(*layers).double()).eval()


BUILDS: dict[str, Callable[[], nn.Module]] = {
    "expand": lambda: fxexpand.expand(network(), RULES),
    "expand, collapse": lambda: fxexpand.collapse(fxexpand.expand(network(), RULES)),
    "expand, collapse, with inputs": lambda: fxexpand.collapse(fxexpand.expand(network(), RULES), random(64, 4, 7, 7)),
    "collapse": lambda: fxexpand.collapse(network()),
}
HOOKS: dict[str, Callable[[nn.Module], object]] = {
    "forward": lambda module: module.register_forward_hook(lambda m, args, y: 2 * y),
    "before": lambda module: module.register_forward_pre_hook(
        lambda m, args, named: ((2 * args[0], *args[1:]), named), with_kwargs=True
    ),
}
LATER: dict[str, Callable[[nn.Module], nn.Module]] = {
    "contract": fxexpand.contract,
    "fuse": fxexpand.fuse,
    "fuse, always": lambda m: fxexpand.fuse(m, random(2, 4, 7, 7), when="always"),
    "collapse": fxexpand.collapse,
    "uncollapse": fxexpand.uncollapse,
    "expand": lambda m: fxexpand.expand(m, Rule(CL(2), where=layer(name="3.kernel") | layer(name="3"))),
    "copy": copy.deepcopy,
}


@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_a_hook_that_comes_between_two_passes_runs_or_is_refused(
    build: Callable[[], nn.Module], hook: Callable[[nn.Module], object]
) -> None:
    x, reference = random(2, 4, 7, 7), build()
    paths = [path for path, module in reference.named_modules() if path and next(module.parameters(), None) is not None]
    regions = [path for path, module in reference.named_modules() if isinstance(module, LiveRegion)]
    refused: set[str] = set()
    for path in paths + regions:
        model = copy.deepcopy(reference)
        hook(model.get_submodule(path))
        expected = model(x)
        for name, later in LATER.items():
            try:
                made = later(model).eval()
            except FxExpandError:
                refused.add(name)
                continue
            assert torch.allclose(made(x), expected, rtol=1e-9, atol=1e-9), f"{name} after a hook on {path}"
    assert refused <= {"contract", "collapse", "expand"}  # the others have nothing to refuse


def halves(module: Any, args: Any) -> None:
    with torch.no_grad():
        module[0].weight.clamp_(-0.05, 0.05)


class Halving:
    def __call__(self, module: Any, args: Any) -> None:
        halves(module, args)
        module[0].weight.mul_(0.5)


def times_a_weight(module: Any, args: Any, y: Any) -> Any:
    return y * module[0].weight.mean()


def times_a_statistic(module: Any, args: Any, y: Any) -> Any:
    return y * module[1].running_mean.mean()


def calls_a_part(module: Any, args: Any, y: Any) -> Any:
    return y + module[0](args[0])


LOOKING: dict[str, Callable[[nn.Module], object]] = {
    "writes to a weight": lambda module: module.register_forward_pre_hook(halves),
    "writes to a weight, as an object": lambda module: module.register_forward_pre_hook(Halving()),
    "reads a weight": lambda module: module.register_forward_hook(times_a_weight),
    "reads a statistic": lambda module: module.register_forward_hook(times_a_statistic),
    "calls a part": lambda module: module.register_forward_hook(calls_a_part),
}


@pytest.mark.parametrize("outer", [False, True], ids=["on the model", "on a part of it"])
@pytest.mark.parametrize("hook", LOOKING.values(), ids=LOOKING)
def test_a_hook_that_looks_inside_finds_what_was_there(hook: Callable[[nn.Module], object], outer: bool) -> None:
    inner = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
    hook(inner)
    model = as_trained((nn.Sequential(inner, nn.ReLU()) if outer else inner).double()).eval()
    x = random(2, 4, 6, 6)
    with torch.no_grad():
        expected = [copy.deepcopy(model)(x)]
        for change in (
            fxexpand.fuse,
            lambda m: fxexpand.fuse(m, x, when="always"),
            lambda m: fxexpand.expand(m, CL(2)),
        ):
            try:
                made = change(copy.deepcopy(model))
            except fxexpand.ExpansionError as error:
                found = str(error)
                continue
            assert torch.allclose(made(x), expected[0], rtol=1e-9, atol=1e-9)
            found = ""
    assert ("write to its weight" in found) == (hook in list(LOOKING.values())[:2])


def test_a_hook_that_does_not_look_inside_holds_nothing_up() -> None:
    model = as_trained(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).double()).eval()
    seen: list[Any] = []
    model.register_forward_hook(lambda module, args, y: seen.append(args[0].shape))
    fused = fxexpand.fuse(model)
    assert len(list(fused.children())) == 1
    fused(random(2, 4, 6, 6))
    assert seen == [torch.Size((2, 4, 6, 6))]


def test_a_hook_on_a_collapsed_expansion_stays_one_call() -> None:
    big = fxexpand.collapse(fxexpand.expand(network(), RULES))
    seen: list[Any] = []
    big.get_submodule("3").register_forward_hook(lambda m, args, y: seen.append(y.shape))
    for made in (fxexpand.uncollapse(big), fxexpand.fuse(big), fxexpand.collapse(big)):
        seen.clear()
        made(random(2, 4, 7, 7))
        assert seen == [torch.Size((2, 4, 3, 3))]
