"""fuse: every linear region becomes one layer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import overload

import torch
from torch import nn
from torch.export import ExportedProgram

from fxexpand.algebra.affine import Affine, Border
from fxexpand.errors import FxExpandError
from fxexpand.exported.closed import close_program
from fxexpand.exported.opened import Opened, open_program
from fxexpand.graph.expanded import Expanded
from fxexpand.graph.layers import has_hooks
from fxexpand.graph.lift import pad_module
from fxexpand.graph.structure import Series
from fxexpand.graph.trace import Limits, check_model, open_up
from fxexpand.graph.traced import TracedModule, copy_model, with_own_tensors
from fxexpand.graph.tree import replace_modules
from fxexpand.graph.uses import running
from fxexpand.passes.collapse import release_all
from fxexpand.regions.build import Flags, layer_of
from fxexpand.regions.functional import BY_BATCH
from fxexpand.regions.install import install, range_refusal
from fxexpand.regions.layers import TRAINING
from fxexpand.regions.parts import Unary
from fxexpand.regions.plan import Plan, Planner
from fxexpand.regions.reach import Reach
from fxexpand.regions.reading import Lifts, Reading, check_lifts
from fxexpand.regions.shapes import Shapes, shapes_of


@overload
def fuse(
    model: ExportedProgram, *example_inputs: object, when: str = "cheaper", lifts: Lifts | None = None
) -> ExportedProgram: ...


@overload
def fuse(model: nn.Module, *example_inputs: object, when: str = "cheaper", lifts: Lifts | None = None) -> nn.Module: ...


def fuse(
    model: nn.Module | ExportedProgram,
    *example_inputs: object,
    when: str = "cheaper",
    lifts: Lifts | None = None,
) -> nn.Module | ExportedProgram:
    """A copy of ``model`` in which every linear region that can be one layer, and no dearer, is one plain layer.

    Before:  y = bn(conv(x)) + bn_1(conv_1(x))
    After:   y = conv(x)

    Identity: W₂ * (W₁ * x) = (W₂ ∘ W₁) * x, and W₁ * x + W₂ * x = (W₁ + W₂) * x. Layers, batch norm in eval mode,
    average pools, scales, shifts, zero padding, sums, differences, residuals, concatenations and slices of channels
    take part. Composed in float64 and cast once. The new layer has the name of the layer, or of the whole container,
    that it replaces; what is no longer used goes. What is in eval mode stays in it: the result is for deployment.

    Exact when: see ``compose``, ``add`` and ``concatenate``. What would not be is left alone; ``explain`` says why.
    Beside a ``Conv1d``, which also takes a signal without batch, batch norm of one dimension, or as a function, is
    taken to see batches.

    ``when="cheaper"`` merges what then costs no more multiply-accumulates, and takes the cheapest plan; ``"always"``
    merges whatever is exact. Costs are those for ``example_inputs``, the arguments of ``model(...)``; without them, of
    signals of 64 samples an axis. The inputs also tell how many axes, channels and features values have, and that an
    input which is scaled first holds no integers; without them some merges are refused.

    Under autocast, a layer that stands for a sum gives the lower precision, also where one of its branches did not.

    ``lifts={SomeModule: module -> Kernel}`` says what a module of the user's does.

    Of an exported program, the result is an exported program: merged layers are ATen calls with parameters of the
    program, named after those of the layer that they replace, and parameters that nothing uses any more go. It knows
    its shapes and has no modules, so it takes neither example inputs nor ``lifts``.

    Warns once when batch norm in training mode is all that holds up a merge. Raises ``FxExpandError`` for what is no
    module, a ``when`` it does not know, or inputs that the model does not run on.
    """
    if isinstance(model, ExportedProgram):
        return _fuse_program(model, example_inputs, when, lifts)
    work, layers, made = _contracted(prepared(model, "fuse", when, lifts, runs=bool(example_inputs)))
    shapes = shapes_of(work, example_inputs, "fuse")
    new, held_up = _merge_all(work, shapes, when, lifts, made, TRAINING)
    if held_up:
        warnings.warn(
            "fuse: batch norm in training mode holds up merges; call model.eval() first", UserWarning, stacklevel=2
        )
    TracedModule.compile_all(work)
    return with_own_tensors(work, [*layers.values(), *new])


def _fuse_program(
    program: ExportedProgram, example_inputs: tuple[object, ...], when: str, lifts: Lifts | None
) -> ExportedProgram:
    opened = opened_program(program, "fuse", example_inputs, when, lifts)
    _, held_up = _merge_all(opened.work, opened.shapes, when, None, {}, BY_BATCH)
    if held_up:
        warnings.warn(
            "fuse: batch norm in training mode holds up merges; call model.eval() before torch.export.export",
            UserWarning,
            stacklevel=3,
        )
    return close_program(opened)


def opened_program(
    program: ExportedProgram, task: str, example_inputs: tuple[object, ...], when: str, lifts: Lifts | None
) -> Opened:
    """The graph that stands for ``program``, after checks of what was given besides."""
    check_when(when, task)
    if lifts:
        raise FxExpandError(
            f"{task}: an exported program has no modules that lifts could tell of; {task} before the export."
        )
    if example_inputs:
        raise FxExpandError(f"{task}: expected no example inputs with an exported program, which knows its shapes.")
    return open_program(program, task)


def _merge_all(
    work: nn.Module, shapes: Shapes, when: str, lifts: Lifts | None, made: dict[int, Affine], training: str
) -> tuple[list[nn.Module], bool]:
    """Merge in the graphs of ``work`` until nothing is left: the new layers, and whether training mode holds any up.

    ``made`` are the maps of the layers that were made before, by id. ``training`` is why batch norm is left alone that
    would be merged if the user had called ``eval()``.
    """
    new: list[nn.Module] = []
    held_up = False
    again = True
    while again:
        plans = plan_all(work, shapes, when, lifts, made)
        held_up = held_up or any(_held_up_by(training, reading, plan) for reading, plan in plans)
        found = install(work, [(reading, plan.merges) for reading, plan in plans])
        made |= {id(entry.layer): entry.exact for entry in found if entry.exact is not None}
        new += [entry.layer for entry in found]
        again = bool(found) and any(plan.again for _, plan in plans)
    return new, held_up


def _contracted(work: nn.Module) -> tuple[nn.Module, dict[int, nn.Module], dict[int, Affine]]:
    """``work`` with one layer for each expansion that code calls; these layers, and their maps, by id."""
    layers: dict[int, nn.Module] = {}
    maps: dict[int, Affine] = {}
    for module in running(work)[1].values():
        affine = module.as_affine(torch.float64) if isinstance(module, Expanded) and not has_hooks(module) else None
        if isinstance(affine, Affine) and affine.kernel.fits(next(module.parameters()).dtype):
            first = next(module.parameters())
            flags = Flags(first.dtype, torch.contiguous_format, first.requires_grad, module.training)
            padding, layer = layer_of(affine, flags, copy=True)
            if padding is None:
                layers[id(module)] = layer
                maps[id(layer)] = affine
            else:  # code calls one module; no layer pads so
                border = affine.border or Border("zeros", affine.kernel.padding)
                layers[id(module)] = Series({"pad": pad_module(border.mode, border.sides), "conv": layer})
    replace_modules(work, layers)
    return layers.get(id(work), work), layers, maps


def prepared(model: nn.Module, task: str, when: str, lifts: Lifts | None, *, runs: bool) -> nn.Module:
    """The graphs of ``model`` over its own tensors, once the arguments are checked; compiled where the model ``runs``.

    Otherwise a graph that is going to be rewritten is compiled once, when it has been.
    """
    check_model(model, task, FxExpandError)
    check_when(when, task)
    check_lifts(lifts, task)
    # What the user says of modules is code, that may run some of the model.
    limits = Limits(tuple(lifts or ()), evaluated=True, compiled=runs or bool(lifts))
    work = open_up(copy_model(model, share=True), limits)
    release_all(work)
    return work


def check_when(when: str, task: str) -> None:
    """Raise ``FxExpandError`` for what does not say when to merge."""
    if when not in ("cheaper", "always"):
        raise FxExpandError(f"{task}: expected when='cheaper' or 'always', found {when!r}.")


def plan_all(
    work: nn.Module,
    shapes: Shapes,
    when: str,
    lifts: Lifts | None,
    made: Mapping[int, Affine] | None = None,
) -> list[tuple[Reading, Plan]]:
    """A plan for each graph that runs when ``work`` does."""
    plans: list[tuple[Reading, Plan]] = []
    reach = Reach(work, tuple(lifts or ()))
    for gm in reach.graphs:
        reading = Reading(gm, shapes, lifts or {}, made, reach)
        plan = Planner(reading, always=when == "always").plan()
        _leave_out_of_range(reading, plan)
        plans.append((reading, plan))
    return plans


def _leave_out_of_range(reading: Reading, plan: Plan) -> None:
    for merge in list(plan.merges):
        refusal = range_refusal(reading, merge)
        if refusal is not None:
            plan.merges.remove(merge)
            plan.refused[merge.stretch.last] = refusal.reason


def _held_up_by(training: str, reading: Reading, plan: Plan) -> bool:
    """Whether batch norm that is left alone for the reason ``training`` follows a layer that it would merge with."""
    for node, reason in plan.refused.items():
        if reason == training:
            source = node.all_input_nodes[0]
            part = reading.part(source)
            if isinstance(part, Unary) and part.computes and len(source.users) == 1:
                return True
    return False
