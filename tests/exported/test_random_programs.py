"""fuse on exported programs of random networks."""

from __future__ import annotations

import copy
from typing import Any

import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree

import fxexpand
from exporting import export
from fxexpand.testing import Case, as_trained, linear_chains, linear_graphs

# Exporting takes longer than all that is tested here.
FEW = settings(max_examples=max(4, settings().max_examples // 4))


@FEW
@given(case=linear_graphs() | linear_chains(), core=st.booleans(), when=st.sampled_from(["cheaper", "always"]))
def test_a_fused_program_computes_what_it_did(case: Case, core: bool, when: str) -> None:
    model: Any = as_trained(case.module.double()).eval()
    inputs = tuple(value.double() for value in case.inputs)
    try:
        program = export(model, *inputs, core=core)
    except GuardOnDataDependentSymNode:  # a module whose control flow depends on data
        reject()
    fused = fxexpand.fuse(program, when=when)
    fused.validate()
    with torch.no_grad():
        expected, found = (pytree.tree_leaves(each.module()(*copy.deepcopy(inputs))) for each in (program, fused))
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10 * float(y.abs().max()))
