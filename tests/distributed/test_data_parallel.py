"""Training in two processes gives the weights that training in one gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

import fxexpand
from data_parallel import OPTIMIZERS, batch, built, distance, in_one_process, net, sharded, train
from fxexpand import CL, ExpansionError, FxExpandError, VerificationError
from fxexpand.errors import ContractionError
from fxexpand.regions.live_region import LiveRegion
from two_processes import run_pair

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")

# In float64, where another order of summation is all that differs.
LIMIT = 1e-11


@contextmanager
def calls(of: type[nn.Module] = nn.Module) -> Iterator[list[nn.Module]]:
    """The modules that are called meanwhile."""
    found: list[nn.Module] = []
    handle = register_module_forward_pre_hook(
        lambda module, _: found.append(module) if isinstance(module, of) else None
    )
    try:
        yield found
    finally:
        handle.remove()


def test_wrapped(tmp_path: Path) -> None:
    run_pair(check_wrapped, folder=tmp_path)


def check_wrapped(rank: int) -> None:
    cases: list[tuple[str, str, float, dict[str, Any]]] = [
        ("expanded", "SGD", 0, {}),
        ("expanded", "AdamW", 0.1, {"static_graph": True}),
        ("collapsed", "SGD", 0, {"static_graph": True}),
        ("collapsed", "AdamW", 0, {}),
        ("collapsed", "SGD", 0.1, {}),
    ]
    for form, optimizer, decay, options in cases:
        model = DistributedDataParallel(built(form), find_unused_parameters=False, **options)
        train(model, OPTIMIZERS[optimizer](model.parameters()), rank=rank, decay=decay)
        assert distance(model, in_one_process(optimizer, decay)) < LIMIT


def test_sharded(tmp_path: Path) -> None:
    run_pair(check_sharded, folder=tmp_path)


def check_sharded(rank: int) -> None:
    cases = [
        ("expanded", "root", "SGD", 0),
        ("expanded", "layers", "AdamW", 0),
        ("collapsed", "root", "AdamW", 0),
        ("collapsed", "root", "SGD", 0.1),
        ("collapsed", "expansions", "SGD", 0),
        ("collapsed", "expansions", "AdamW", 0),
        ("collapsed", "expansions that stay whole", "SGD", 0.1),
        ("collapsed", "layers", "SGD", 0),
    ]
    for form, by, optimizer, decay in cases:
        model = sharded(built(form), by)
        with calls() as called:
            train(model, OPTIMIZERS[optimizer](model.parameters()), rank=rank, decay=decay)
        assert distance(model, in_one_process(optimizer, decay)) < LIMIT
        # Layers that are sharded apart are gathered when they are called: then the expansion runs in turn.
        layer = model.get_submodule("first.kernel")
        assert (layer in called) == (form == "expanded" or by == "layers")
        assert any(isinstance(module, LiveRegion) for module in called) == (form == "collapsed")


def test_other_orders(tmp_path: Path) -> None:
    run_pair(check_other_orders, folder=tmp_path)


def check_other_orders(rank: int) -> None:
    images, _ = batch(0, rank)
    for form in ("expanded", "collapsed"):
        model = sharded(built(form), "root")
        refuse_sharded(model)
        model(images)  # the root stays gathered until the backward
        refuse_sharded(model)
        model(images).sum().backward()
        assert fxexpand.manifest(model) == fxexpand.manifest(built(form))
        assert fxexpand.summary(model).parameters == fxexpand.summary(built(form)).parameters
        assert grouped(model) == grouped(built(form))
    holder = nn.Sequential(sharded(built("expanded"), "root"))
    with pytest.raises(ExpansionError, match=r"collapse: .*whole in each process, found 0 sharded over several"):
        fxexpand.collapse(holder)
    part = sharded(built("expanded"), "root")
    part(images)
    with pytest.raises(ContractionError, match=r"contract: .*found the model sharded over several"):
        fxexpand.contract(part.get_submodule("first"))  # its parameters are whole at the moment
    refuse_wrapped()
    refuse_flattened(images)
    refuse_what_is_never_gathered(images)
    refuse_decay_of_parts(images)


def grouped(model: nn.Module) -> dict[str, list[str]]:
    """The names of the parameters by group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = fxexpand.parameter_groups(model, 0.1, "effective")
    return {group["name"]: [names[id(parameter)] for parameter in group["params"]] for group in groups}


def refuse_sharded(model: nn.Module) -> None:
    """Each pass says what comes first."""
    state = {name: id(parameter) for name, parameter in model.named_parameters()}
    order = r"found the model sharded over several\. Expand first, then collapse, then shard"
    passes: list[Any] = [
        fxexpand.trace,
        lambda m: fxexpand.expand(m, CL(2)),
        fxexpand.collapse,
        fxexpand.uncollapse,
        fxexpand.counterpart,
    ]
    for run in passes:
        with pytest.raises(ExpansionError, match=order):
            run(model)
    big, gather = built("expanded"), r"found the model sharded over several\. Gather it first: .*get_model_state_dict"
    gathering: list[tuple[Any, type[FxExpandError]]] = [
        (fxexpand.contract, ContractionError),
        (fxexpand.fuse, FxExpandError),
        (fxexpand.explain, FxExpandError),
        (lambda m: fxexpand.transfer(fxexpand.counterpart(big), m), ExpansionError),
        (lambda m: fxexpand.verify(big, m, batch(0)[0]), VerificationError),
        (lambda m: fxexpand.summary(m, batch(0)[0]), FxExpandError),
    ]
    for run, error in gathering:
        with pytest.raises(error, match=gather):
            run(model)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == state


def refuse_wrapped() -> None:
    wrapped = DistributedDataParallel(built("expanded"))
    for run, error in ((fxexpand.collapse, ExpansionError), (fxexpand.contract, ContractionError)):
        with pytest.raises(error, match=r"wrapped for distributed training\. Pass model\.module, and wrap afterwards"):
            run(wrapped)
        with pytest.raises(error, match=r"0: .* one wrapped for distributed training\. Put its \.module there"):
            run(nn.Sequential(wrapped))


def refuse_flattened(images: torch.Tensor) -> None:
    """The older way to shard trains right, but its parameters have lost their shapes."""
    cpu = torch.device("cpu")
    for form in ("expanded", "collapsed"):
        model: Any = FullyShardedDataParallel(built(form), device_id=cpu, use_orig_params=True)
        torch.testing.assert_close(model(images), built(form)(images), rtol=0, atol=1e-13)
        with pytest.raises(ExpansionError, match=r"first \(Conv2d\): expected whole parameters, found sharded ones"):
            fxexpand.effective_decay(model)
        with pytest.raises(FxExpandError, match=r"expand\.weight: .* flattened\. Make the groups before"):
            fxexpand.parameter_groups(model, 0.1)
        for held in (model, model.module, nn.Sequential(model)):
            with pytest.raises(ContractionError, match=r"sharded over several\. Gather it first"):
                fxexpand.contract(held)
    plain = fxexpand.collapse(fxexpand.expand(net(), CL(2)))
    with pytest.raises(ExpansionError, match=r"first \(Conv2d\): expected whole parameters, found none"):
        fxexpand.effective_decay(FullyShardedDataParallel(plain, device_id=cpu))


def refuse_what_is_never_gathered(images: torch.Tensor) -> None:
    """A graph calls the layers of an expansion, or of a block: not what was sharded."""
    for form, path in (("expanded", "first"), ("collapsed", "head")):
        model = built(form)
        sharded(model.get_submodule(path), "root") if path == "head" else sharded(model, "expansions")
        with pytest.raises(ExpansionError, match=rf"{path}: sharded by itself.*fully_shard\(\[layer, \.\.\.\]\)"):
            model(images)


def refuse_decay_of_parts(images: torch.Tensor) -> None:
    cases = [("expanded", "root", "hooks"), ("collapsed", "expansions", "sharded ones")]
    for form, by, found in cases:
        model = sharded(built(form), by)
        model(images)
        with pytest.raises(
            ExpansionError, match=rf"first \(Conv2d\).*{found}.*Collapse the model before it is sharded"
        ):
            fxexpand.effective_decay(model)
