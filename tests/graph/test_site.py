"""Sites say what a layer is and where it stands; what cannot be replaced is refused with its reason."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, prune

import fxexpand
from behaviour import DOUBLE
from fxexpand import CL, FC, ExpansionError, Rule, layer, trace
from fxexpand.graph.find import find_sites
from fxexpand.graph.site import Site


def sites(model: nn.Module) -> dict[str, Site]:
    return {site.path: site for site in find_sites(trace(model))}


def site_of(module: nn.Module) -> Site:
    (site,) = find_sites(trace(nn.Sequential(module)))
    return site


class Calls(nn.Module):
    """Functional layers, with everything given and with nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 2, 3, 5))
        self.shift = nn.Parameter(torch.randn(6))
        self.head = nn.ParameterDict({"weight": torch.randn(3, 6)})
        self.line = nn.Parameter(torch.randn(2, 2, 3))
        self.cube = nn.Parameter(torch.randn(1, 1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.kernel, self.shift, (1, 2), padding=(1, 0), dilation=2, groups=2)
        y = F.conv1d(y.flatten(2)[:, :2], weight=self.line, padding="same")
        z = F.conv3d(y[:, None, None], self.cube)
        return z + F.linear(input=x[..., 0, :6], weight=self.head["weight"]).sum()


# What a site says.


def test_a_convolution_says_all_that_it_is() -> None:
    module = nn.Conv2d(4, 6, (3, 5), (1, 2), (1, 0), (2, 1), groups=2, bias=False, padding_mode="reflect")
    site = site_of(module)
    assert (site.dims, site.in_channels, site.out_channels, site.groups) == (2, 4, 6, 2)
    assert (site.kernel_size, site.stride, site.dilation) == ((3, 5), (1, 2), (2, 1))
    assert site.padding == ((1, 1), (0, 0))
    assert site.padding_mode == "reflect"
    assert not site.has_bias
    assert not site.depthwise
    assert not site.expanded
    assert site.refusal is None
    assert site.function is None
    assert type(site.module) is nn.Conv2d
    assert site.weight is module.weight
    assert site.bias is None
    assert str(site) == "0 (Conv2d 3×5, 4 -> 6, groups=2)"


def test_a_linear_layer_has_features_for_channels_and_no_axes() -> None:
    module = nn.Linear(5, 3)
    site = site_of(module)
    assert (site.dims, site.in_channels, site.out_channels, site.groups) == (0, 5, 3, 1)
    assert site.kernel_size == site.stride == site.dilation == ()
    assert site.padding == ()
    assert site.has_bias
    assert site.bias is module.bias
    assert str(site) == "0 (Linear, 5 -> 3)"


@pytest.mark.parametrize(
    ("padding", "kernel_size", "sides"),
    [("same", 3, (1, 1)), ("same", 4, (1, 2)), ("valid", 3, (0, 0)), (2, 3, (2, 2))],
)
def test_padding_is_worked_out_for_each_side(padding: Any, kernel_size: int, sides: tuple[int, int]) -> None:
    assert site_of(nn.Conv1d(1, 1, kernel_size, padding=padding)).padding == (sides,)


@pytest.mark.parametrize(
    ("groups", "channels", "depthwise"), [(4, 4, True), (4, 8, True), (2, 4, False), (1, 1, False), (1, 4, False)]
)
def test_depthwise_is_a_group_for_each_of_several_channels(groups: int, channels: int, depthwise: bool) -> None:
    inputs = 4 if groups > 1 else channels
    assert site_of(nn.Conv2d(inputs, channels, 3, groups=groups)).depthwise is depthwise


def test_functional_calls_are_sites_under_the_path_of_their_weight() -> None:
    found = sites(Calls())
    assert list(found) == ["kernel", "line", "cube", "head.weight"]
    conv, line, cube, head = found.values()
    assert all(site.module is None and site.refusal is None for site in found.values())
    assert conv.function is F.conv2d
    assert (conv.in_channels, conv.out_channels, conv.groups, conv.kernel_size) == (4, 6, 2, (3, 5))
    assert (conv.stride, conv.padding, conv.dilation) == ((1, 2), ((1, 1), (0, 0)), (2, 2))
    assert conv.has_bias
    assert line.padding == ((1, 1),)
    assert not line.has_bias
    assert cube.dims == 3
    assert (head.dims, head.in_channels, head.out_channels) == (0, 6, 3)
    assert str(head) == "head.weight (linear(), 6 -> 3)"
    assert conv.reads_input
    assert not line.reads_input


def test_sites_come_in_the_order_of_use_and_unused_layers_are_none() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.unused, self.first = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.last(self.first(x))
            return y

    assert list(sites(Backwards())) == ["first", "last"]


def test_only_layers_that_read_an_input_of_the_network_say_so() -> None:
    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.by_name, self.cropped, self.later = (nn.Linear(2, 2) for _ in range(5))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            z: Tensor = self.later(self.one(x) + self.two(y) + self.by_name(input=x) + self.cropped(x[:1]))
            return z

    reading = {path for path, site in sites(Stem()).items() if site.reads_input}
    assert reading == {"one", "two", "by_name"}


def test_a_layer_used_twice_is_one_site_with_two_calls_and_all_its_users() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.alias = self.layer
            self.weight = nn.Parameter(torch.randn(2, 2))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x).relu() + self.alias(x).tanh()
            return F.linear(F.linear(y, self.weight), self.weight)

    module, call = sites(Twice()).values()
    assert (module.path, call.path) == ("layer", "weight")
    for site in (module, call):
        assert len(site.calls) == 2
        assert site.refusal is None
        assert site.node is site.calls[0].node
    assert [user.name for user in module.users] == ["relu", "tanh"]


def test_a_site_finds_the_modules_around_it() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3), nn.ReLU(), nn.BatchNorm2d(2))
    first, second = sites(model).values()
    assert first.node is not None
    assert isinstance(first.node, fx.Node)
    assert [type(first.module_of(user)) for user in first.users] == [nn.BatchNorm2d]
    assert [type(second.module_of(user)) for user in second.users] == [nn.ReLU]
    output = next(iter(second.calls[0].graph_module.graph.nodes))
    assert second.module_of(output) is None


def test_layers_in_a_parent_that_cannot_be_traced_are_sites_without_calls() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.body = nn.Sequential(nn.Linear(2, 2), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.body(self.layer(x)) if x.sum() > 0 else x
            return y

    found = sites(nn.Sequential(Gate(), nn.Linear(2, 2)))
    assert list(found) == ["0.layer", "0.body.0", "1"]
    assert found["0.layer"].calls == ()
    assert found["0.layer"].node is None
    assert found["0.layer"].users == ()
    assert found["0.body.0"].calls[0].prefix == "0.body"
    assert [user.op for user in found["0.body.0"].users] == ["call_module"]


def test_layers_inside_modules_of_torch_are_none() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8), nn.Linear(4, 4))
    assert list(sites(model)) == ["1"]


def test_layers_of_an_expansion_are_marked() -> None:
    big = fxexpand.expand(nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3)), Rule(CL(2), where=layer(name="0")))
    marked = {site.path: site.expanded for site in find_sites(big)}
    assert marked == {"0.expand": True, "0.kernel": True, "0.reduce": True, "1": False}


@pytest.mark.parametrize("padding", [0, 1, (2, 1)])
def test_a_new_layer_has_the_options_of_the_site(padding: Any) -> None:
    site = site_of(nn.Conv2d(4, 6, 3, groups=2, padding=1, padding_mode="circular", **DOUBLE))
    new: Any = site.layer(8, 4, (3, 1), stride=2, padding=padding, dilation=(2, 1))
    assert isinstance(new, nn.Conv2d)
    assert (new.in_channels, new.out_channels, new.kernel_size) == (8, 4, (3, 1))
    assert (new.stride, new.dilation, new.groups) == ((2, 2), (2, 1), 2)
    assert new.padding == ((padding,) * 2 if isinstance(padding, int) else padding)
    assert new.padding_mode == ("circular" if padding else "zeros")
    assert new.weight.dtype == torch.float64
    assert new.bias is not None
    flat: Any = site_of(nn.Linear(4, 6, bias=False)).layer(3, 2)
    assert isinstance(flat, nn.Linear)
    assert flat.weight.shape == (2, 3)
    assert flat.bias is None


# What is refused.


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


class ReadsWeight(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self[0]
        y: Tensor = layer(x) + layer.weight.norm()
        return y


class CallsForward(ReadsWeight):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self[0](x) + self[0].forward(x)
        return y


def with_gradient_hook(module: nn.Module) -> nn.Module:
    module.get_parameter("weight").register_hook(lambda grad: grad * 0)
    return module


def with_forward_hook(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda module, args, out: out * 2)
    return module


def with_backward_hook(module: nn.Module) -> nn.Module:
    module.register_full_backward_hook(lambda module, grad_in, grad_out: None)
    return module


def integers(module: nn.Module) -> nn.Module:
    module.requires_grad_(False)
    for parameter in module.parameters():
        parameter.data = parameter.data.round().to(torch.int8)
    return module


def quantized() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: nn.Module = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), {nn.Linear})
    return model


def old_style(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.Sequential(norm(nn.Linear(4, 4)))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "tied weights": (tied, "tied to Linear.weight"),
    "weight read elsewhere": (ReadsWeight, "also read by norm"),
    "called past its hooks": (CallsForward, "also read by linear"),
    "forward hook": (lambda: nn.Sequential(with_forward_hook(nn.Linear(4, 4))), "hooks"),
    "backward hook": (lambda: nn.Sequential(with_backward_hook(nn.Linear(4, 4))), "hooks"),
    "gradient hook": (lambda: nn.Sequential(with_gradient_hook(nn.Linear(4, 4))), "gradient hooks"),
    "weight norm": (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4))), "parametrized"),
    "spectral norm": (lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 4))), "parametrized"),
    "orthogonal": (lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4))), "parametrized"),
    "weight norm as a hook": (lambda: old_style(torch.nn.utils.weight_norm), "computed by a hook"),
    "spectral norm as a hook": (lambda: old_style(torch.nn.utils.spectral_norm), "computed by a hook"),
    "pruned": (lambda: nn.Sequential(prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5)), "computed by a hook"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(4)), "run the model once"),
    "complex": (lambda: nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64)), "complex"),
    "integer": (lambda: nn.Sequential(integers(nn.Linear(4, 4))), "int8"),
    "eight-bit float": (lambda: nn.Sequential(nn.Linear(4, 4).to(torch.float8_e4m3fn)), "float8"),
    "quantized": (quantized, "quantized"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_layer_that_is_more_than_its_weight_and_bias_is_refused(case: str) -> None:
    make, reason = REFUSED[case]
    model = make()
    refusals = [site.refusal for site in find_sites(trace(model)) if site.path == "0"]
    assert len(refusals) == 1
    assert refusals[0] is not None
    assert reason in refusals[0].reason


@pytest.mark.parametrize("case", sorted(REFUSED.keys() - {"gradient hook"}))  # which copies of a parameter do not have
def test_expanding_it_is_an_error_that_says_how_to_leave_it_out(case: str) -> None:
    make, reason = REFUSED[case]
    model = make()
    state = copy.deepcopy(list(model.state_dict()))
    with pytest.raises(ExpansionError, match=reason) as caught:
        fxexpand.expand(model, FC(2))
    assert str(caught.value).startswith("0 (")
    assert 'where=~layer(name="0")' in str(caught.value)
    assert list(model.state_dict()) == state


class TwoWays(nn.Module):
    """One weight, used by calls that differ."""

    def __init__(self, second: dict[str, Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 2, 3))
        self.bias = nn.Parameter(torch.randn(2))
        self.second = second

    def forward(self, x: Tensor) -> Tensor:
        options: dict[str, Any] = {name: self.bias if value == "bias" else value for name, value in self.second.items()}
        return F.conv1d(x, self.weight, padding=1) + F.conv1d(x, self.weight, **options)


@pytest.mark.parametrize("second", [{"padding": 2}, {"padding": 1, "bias": "bias"}, {"stride": 2}])
def test_a_weight_used_in_two_ways_is_refused(second: dict[str, Any]) -> None:
    site = sites(TwoWays(second))["weight"]
    assert site.refusal is not None
    assert "differ" in site.refusal.reason
    same = sites(TwoWays({"padding": (1,)}))["weight"]
    assert same.refusal is None
    assert len(same.calls) == 2


class Computed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))
        self.register_buffer("fixed", torch.randn(4, 4))
        self.fixed: Tensor

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(F.linear(x, self.weight * 2), self.fixed)
        return F.linear(y, self.weight.t(), self.bias)


class ByAVector(nn.Module):
    """``F.linear`` takes one, and gives no axis for it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def test_a_product_with_a_vector_is_no_site() -> None:
    assert sites(ByAVector()) == {}


def test_calls_whose_weight_is_no_parameter_are_no_sites() -> None:
    assert sites(Computed()) == {}


def test_a_call_with_a_computed_bias_is_refused() -> None:
    class Doubles(Computed):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight, self.bias * 2)

    refusal = sites(Doubles())["weight"].refusal
    assert refusal is not None
    assert "bias is computed" in refusal.reason


# Patterns of the graph around a layer.


def before_norm(site: Site) -> bool:
    return bool(site.users) and all(isinstance(site.module_of(user), nn.BatchNorm2d) for user in site.users)


def test_a_rule_can_match_a_pattern() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.normed, self.plain, self.both = (nn.Conv2d(2, 2, 3, padding=1, **DOUBLE) for _ in range(3))
            self.norms = nn.ModuleList([nn.BatchNorm2d(2, **DOUBLE) for _ in range(2)])

        def forward(self, x: Tensor) -> Tensor:
            y = self.both(x)
            z: Tensor = self.norms[0](self.normed(x)) + self.plain(x).relu() + self.norms[1](y) + y
            return z

    model = Branches()
    assert [path for path, site in sites(model).items() if before_norm(site)] == ["normed"]
    big = fxexpand.expand(model, Rule(CL(2), where=before_norm))
    assert {name.split(".")[0] for name in big.state_dict() if "kernel" in name} == {"normed"}
    x = torch.randn(2, 2, 5, 5, **DOUBLE)
    torch.testing.assert_close(big(x), model(x), rtol=1e-11, atol=1e-12)
