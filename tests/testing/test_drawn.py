"""Random models print as the code that makes them again, shrink to little, and cover what they say."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import fxexpand.testing
from fxexpand.testing import Case, code_of, expandable_layers, graph, layers, linear_chains, linear_graphs, networks
from fxexpand.testing.case import with_values

NAMES = {"torch": torch, "nn": nn, **{name: getattr(fxexpand.testing, name) for name in fxexpand.testing.__all__}}
DRAWN: dict[str, Callable[[], st.SearchStrategy[Case]]] = {
    "expandable_layers": expandable_layers,
    "layers": layers,
    "linear_chains": linear_chains,
    "linear_graphs": linear_graphs,
    "networks": networks,
}
SEARCHING = settings(max_examples=3000, database=None, phases=[Phase.generate])
SHRINKING = settings(max_examples=300, database=None, derandomize=True, phases=[Phase.generate, Phase.shrink])


def rebuilt(code: str) -> Case:
    case = eval(code, dict(NAMES))
    assert isinstance(case, Case)
    return case


@pytest.mark.parametrize("draw", DRAWN.values(), ids=DRAWN)
@given(data=st.data())
def test_what_is_printed_makes_the_same_model_weights_and_inputs(draw: Any, data: st.DataObject) -> None:
    case = data.draw(draw())
    again = rebuilt(repr(case))
    states = [list(each.module.state_dict().items()) for each in (case, again)]
    assert [name for name, _ in states[0]] == [name for name, _ in states[1]]
    assert all(torch.equal(x, y) for (_, x), (_, y) in zip(*states, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(case.inputs, again.inputs, strict=True))
    with torch.no_grad():
        found, expected = again.module(*again.inputs), case.module(*case.inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert {x.dtype for _, x in states[0] if x.is_floating_point()} <= {torch.float64}
    assert not case.module.training


@pytest.mark.parametrize("draw", DRAWN.values(), ids=DRAWN)
def test_hypothesis_prints_that_code_for_a_failing_example(draw: Any) -> None:
    @settings(max_examples=5, database=None, derandomize=True, phases=[Phase.generate])  # shrinking has its own test
    @given(case=draw())
    def fails(case: Case) -> None:
        raise AssertionError("always")

    with pytest.raises(AssertionError, match="always") as failure:
        fails()
    notes = "\n".join(vars(failure.value)["__notes__"])
    found = re.search(r"case=(Case\(.*\)),(  #[^\n]*)?\n *\)", notes, re.DOTALL)
    assert found is not None, notes
    assert rebuilt(found[1]).inputs


def test_examples_shrink_to_a_few_lines() -> None:
    def concatenates(case: Case) -> bool:
        return "torch.cat" in getattr(case.module, "code", "")

    def has_two_convolutions(case: Case) -> bool:
        return sum(isinstance(module, nn.Conv2d) for module in case.module.modules()) == 2

    assert len(repr(find(linear_graphs(), concatenates, settings=SHRINKING)).splitlines()) <= 8
    assert len(repr(find(linear_chains(), has_two_convolutions, settings=SHRINKING)).splitlines()) <= 5
    layer = find(layers(), lambda case: isinstance(case.module, nn.Conv2d), settings=SHRINKING)
    assert "\n" not in repr(layer)


KINDS = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.Identity, fxexpand.testing.UserConv),
)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_layers_are_of_every_kind(kind: type[nn.Module]) -> None:
    find(layers(), lambda case: type(case.module) is kind, settings=SEARCHING)


@pytest.mark.parametrize(
    "what",
    [
        lambda m: m.groups > 1 and m.groups == m.in_channels,
        lambda m: m.groups > 1 and m.groups < m.in_channels,
        lambda m: m.padding == "same" and m.kernel_size[0] % 2 == 0,
        lambda m: max(m.dilation) > 1 and max(m.stride) > 1,
        lambda m: len(set(m.kernel_size)) > 1 and m.bias is None,
        lambda m: m.padding_mode == "circular" and m.padding not in ("valid", "same"),
    ],
)
def test_convolutions_have_every_option(what: Callable[[Any], bool]) -> None:
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

    def wanted(case: Case) -> bool:
        return isinstance(case.module, convolutions) and what(case.module)

    find(expandable_layers(), wanted, settings=SEARCHING)


@pytest.mark.parametrize("kind", ["Residual", "Functional", "Picky", "Branches", "BatchNorm2d", "MaxPool2d", "times=2"])
def test_networks_have_every_block(kind: str) -> None:
    find(networks(), lambda case: kind in repr(case), settings=SEARCHING)


def test_a_graph_is_its_code_step_by_step() -> None:
    gm = graph(
        """
        def forward(self, x):
            y = self.conv(x)
            y += x
            z = self.again(torch.relu(y))
            return z * self.scale
        """,
        conv=nn.Conv1d(2, 2, 1),
        again="conv",
        scale=torch.ones(2, 1),
    )
    steps = [(node.op, getattr(node.target, "__name__", node.target)) for node in gm.graph.nodes]
    assert steps[1:-1] == [
        *(("call_module", "conv"), ("call_function", "iadd"), ("call_function", "relu")),
        *(("call_module", "again"), ("get_attr", "scale"), ("call_function", "mul")),
    ]
    assert gm.get_submodule("again") is gm.get_submodule("conv")
    assert "scale" in dict(gm.named_buffers())
    again = eval(code_of(gm), dict(NAMES))
    assert again.code == gm.code
    assert isinstance(again, fx.GraphModule)


def test_code_leaves_defaults_out_and_names_the_rest() -> None:
    assert code_of(nn.Conv2d(2, 4, 3)) == "nn.Conv2d(2, 4, (3, 3))"
    strided = nn.Conv2d(2, 4, (3, 1), stride=(1, 2), groups=2, bias=False)
    assert code_of(strided) == "nn.Conv2d(2, 4, (3, 1), stride=(1, 2), groups=2, bias=False)"
    assert code_of(nn.BatchNorm1d(3, eps=0.1, affine=False)) == "nn.BatchNorm1d(3, eps=0.1, affine=False)"
    assert code_of(nn.Sequential(nn.ReLU(inplace=True))) == "nn.Sequential(nn.ReLU(inplace=True))"


def test_values_are_generic() -> None:
    model = with_values(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double())
    values: Tensor = torch.cat([x.detach().flatten() for x in model.state_dict().values() if x.is_floating_point()])
    assert bool(values.all())
    assert len(values.unique()) == len(values)
    assert float(model.get_buffer("1.running_var").min()) >= 0.5
