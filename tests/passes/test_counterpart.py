"""The nonlinear counterpart computes what a network written by hand does, and gives its weights back exactly."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxexpand
from fxexpand import CK, CL, FC, ContractionError, ExpansionError, Rule, layer
from fxexpand.graph.collapsed import Collapsed
from fxexpand.graph.expanded import Expanded
from fxexpand.strategies import ACNet, DiverseBranch, MobileOne, Orepa, Overparam, RepVGG, Strategy

Activation = Callable[[], nn.Module]


class Added(nn.ModuleDict):
    """The sum of what its modules make of one signal."""

    def forward(self, x: Tensor) -> Any:
        return sum(module(x) for module in self.values())


class Swish(nn.Module):
    """An activation of a user's own."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


def turn(**parts: nn.Module) -> nn.Module:
    return nn.Sequential(OrderedDict(parts))


def conv(m: int, n: int, k: int = 1, **options: Any) -> nn.Module:
    return nn.Conv2d(m, n, k, **options)


def cl(sigma: Activation) -> nn.Module:
    return turn(expand=conv(3, 6, padding=1), a=sigma(), kernel=conv(6, 8, 3, stride=2), b=sigma(), reduce=conv(8, 4))


def ck(sigma: Activation) -> nn.Module:
    first = conv(3, 12, 3, padding=3)
    return turn(kernel_0=first, a=sigma(), kernel_1=conv(12, 16, 3), b=sigma(), kernel_2=conv(16, 4, 3))


def fc(sigma: Activation) -> nn.Module:
    return turn(linear_0=nn.Linear(5, 10), a=sigma(), linear_1=nn.Linear(10, 6), b=sigma(), linear_2=nn.Linear(6, 3))


def overparam(sigma: Activation) -> nn.Module:
    square = Added({"layer": conv(8, 8), "identity": nn.Identity()})
    return turn(layer_0=conv(3, 8, 3, padding=1), a=sigma(), layer_1=square, b=sigma(), layer_2=conv(8, 4))


def then_branches(sigma: Activation) -> nn.Module:
    branches = Added({"kernel": conv(6, 8, 3), "point": turn(pad=nn.ZeroPad2d(-1), conv=conv(6, 8))})
    return turn(expand=conv(3, 6, padding=1), a=sigma(), kernel=branches, b=sigma(), reduce=conv(8, 4))


def then_chain(sigma: Activation) -> nn.Module:
    inner = turn(expand=conv(6, 12), a=sigma(), kernel=conv(12, 16, 3), b=sigma(), reduce=conv(16, 8))
    return turn(expand=conv(3, 6, padding=1), c=sigma(), kernel=inner, d=sigma(), reduce=conv(8, 4))


def diverse_branch(sigma: Activation) -> nn.Module:
    plain = partial(conv, bias=False)
    return Added({
        "kernel": turn(conv=plain(3, 4, 3, padding=1), norm=nn.BatchNorm2d(4)),
        "point": turn(conv=plain(3, 4), norm=nn.BatchNorm2d(4)),
        "pooled": turn(
            expand=plain(3, 4, padding=1), norm_0=nn.BatchNorm2d(4), pool=nn.AvgPool2d(3, 1), norm=nn.BatchNorm2d(4)
        ),
        "deep": turn(
            expand=plain(3, 3, padding=1), norm_0=nn.BatchNorm2d(3), a=sigma(), kernel=plain(3, 4, 3),
            norm=nn.BatchNorm2d(4),
        ),
    })  # fmt: skip


def orepa(sigma: Activation) -> nn.Module:
    plain = partial(conv, bias=False)

    def scaled(**parts: nn.Module) -> nn.Module:
        return turn(**parts, scale=plain(4, 4, groups=4))

    return Added(
        {
            "kernel": scaled(conv=conv(3, 4, 3, padding=1), a=sigma()),
            "point": scaled(conv=plain(3, 4), a=sigma()),
            "pooled": scaled(expand=plain(3, 4, padding=1), a=sigma(), pool=nn.AvgPool2d(3, 1)),
            "prior": scaled(expand=plain(3, 4, padding=1), a=sigma(), cosines=plain(4, 4, 3, groups=4), b=sigma()),
            "deep": scaled(expand=plain(3, 3, padding=1), a=sigma(), kernel=plain(3, 4, 3), b=sigma()),
            "separable": scaled(depthwise=plain(3, 6, 3, groups=3, padding=1), a=sigma(), point=plain(6, 4), b=sigma()),
        }
    )


CASES: list[tuple[Strategy, nn.Module, Callable[[Activation], nn.Module]]] = [
    (CL(2), conv(3, 4, 3, stride=2, padding=1), cl),
    (CK(4), conv(3, 4, 7, padding=3), ck),
    (FC(2, depth=3), nn.Linear(5, 3), fc),
    (Overparam(2, depth=3, residual=True), conv(3, 4, 3, padding=1), overparam),
    (CL(2).then(RepVGG()), conv(3, 4, 3, padding=1), then_branches),
    (CL(2).then(CL(2)), conv(3, 4, 3, padding=1), then_chain),
    (DiverseBranch(batch_norm=True), conv(3, 4, 3, padding=1), diverse_branch),
    (Orepa(width=2), conv(3, 4, 3, padding=1), orepa),
]
by_strategy = pytest.mark.parametrize(("strategy", "compact", "hand"), CASES, ids=[str(case[0]) for case in CASES])


def signal(compact: nn.Module) -> Tensor:
    shape = (4, 5) if isinstance(compact, nn.Linear) else (4, 3, 9, 9)
    return torch.randn(shape, dtype=torch.float64)


def train(model: nn.Module, x: Tensor, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


@by_strategy
@pytest.mark.parametrize("sigma", [nn.ReLU, nn.Tanh])
def test_it_computes_what_the_network_written_by_hand_does(
    strategy: Strategy, compact: nn.Module, hand: Callable[[Activation], nn.Module], sigma: Activation
) -> None:
    expanded = fxexpand.expand(copy.deepcopy(compact).double(), strategy, init="standard")
    found = fxexpand.counterpart(expanded, sigma)
    written = hand(sigma).double()
    written.load_state_dict(found.state_dict(), strict=True)
    for name, parameter in found.named_parameters():
        written.get_parameter(name).requires_grad_(parameter.requires_grad)  # the cosines are not learnt
    x = signal(compact)
    ours, theirs = found(x), written(x)
    assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    assert equal(found.state_dict(), written.state_dict())  # batch norm's statistics too
    for output in (ours, theirs):
        output.square().mean().backward()
    gradients = [[p.grad for p in model.parameters() if p.requires_grad] for model in (found, written)]
    for mine, other in zip(*gradients, strict=True):
        assert torch.allclose(mine, other, rtol=1e-10, atol=1e-12)
        assert sigma is nn.ReLU or bool(mine.any())
    difference = found.eval()(x) - expanded.eval()(x)
    assert float(difference.detach().norm()) > 1e-3 * float(expanded(x).detach().norm())


@by_strategy
def test_its_weights_come_back_into_the_linear_chain(
    strategy: Strategy, compact: nn.Module, hand: Callable[[Activation], nn.Module]
) -> None:
    expanded = fxexpand.expand(copy.deepcopy(compact).double(), strategy, init="standard")
    before = copy.deepcopy(expanded.state_dict())
    nonlinear = fxexpand.counterpart(expanded)
    x = signal(compact)
    train(nonlinear, x)
    learnt = copy.deepcopy(nonlinear.state_dict())
    linear = fxexpand.transfer(nonlinear, expanded)
    assert equal(linear.state_dict(), learnt)
    assert not equal(before, learnt)
    assert equal(expanded.state_dict(), before)
    assert equal(nonlinear.state_dict(), learnt)
    chain = hand(nn.Identity).double().eval()
    chain.load_state_dict(linear.state_dict(), strict=True)
    assert torch.allclose(linear.eval()(x), chain(x), rtol=1e-12, atol=1e-12)
    small = fxexpand.contract(linear)
    assert type(small) is type(compact)
    assert fxexpand.verify(linear, small, x) < 1e-12
    train(linear, x)  # and goes on, with none of it shared
    assert equal(nonlinear.state_dict(), learnt)


class Net(nn.Module):
    """Layers called as modules, as a function, twice, and under a second name."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 7, padding=3), nn.BatchNorm2d(4), nn.ReLU())
        self.again = nn.Conv2d(4, 4, 3, padding=1)
        self.alias = self.again
        self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))
        self.classifier = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.alias(self.again(self.features(x)).relu())
        y: Tensor = self.classifier(F.conv2d(x, self.weight, padding=1).mean((2, 3)))
        return y


class Branching(Net):
    """The same, in code that no graph can stand for."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.again(self.features(x))
        y = y if y.sum() > 0 else -y
        z: Tensor = self.classifier(self.alias(y).mean((2, 3)))
        return z


RULES = [CK(4), CL(2), FC(2)]
X = torch.linspace(-1, 2, 2 * 3 * 8 * 8, dtype=torch.float64).reshape(2, 3, 8, 8).sin()


def built(cls: type[nn.Module] = Net, init: str = "standard") -> nn.Module:
    return fxexpand.expand(cls().double(), RULES, init=init)


def test_functional_calls_second_names_and_second_calls() -> None:
    expanded: Any = built()
    before = copy.deepcopy(expanded.state_dict()), expanded.code
    found: Any = fxexpand.counterpart(expanded)

    def relus(structure: Any, x: Tensor) -> Tensor:
        first, *others = [part for part in structure.children() if not isinstance(part, nn.ReLU)]
        x = first(x)
        for part in others:
            x = part(x.relu())
        return x

    kernel, bn = found.features.get_submodule("0"), found.features.get_submodule("1")
    y = relus(found.again, bn(relus(kernel, X)).relu()).relu()
    y = relus(found.weight, relus(found.again, y)).mean((2, 3))
    assert torch.allclose(found(X), relus(found.classifier, y), rtol=1e-12, atol=1e-12)
    assert list(found.state_dict()) == list(expanded.state_dict())
    assert equal(expanded.state_dict(), before[0])
    assert expanded.code == before[1]
    train(found, X)
    small = fxexpand.contract(fxexpand.transfer(found, expanded))
    assert fxexpand.verify(fxexpand.transfer(found, expanded), small, X) < 1e-12
    Net().double().load_state_dict(small.state_dict(), strict=True)


def test_parts_called_by_code() -> None:
    expanded: Any = built(Branching)
    assert not isinstance(expanded, fx.GraphModule)
    found: Any = fxexpand.counterpart(expanded)
    chain = found.again
    x = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    assert torch.equal(found.alias(x), chain.reduce(chain.kernel(chain.expand(x).relu()).relu()))
    assert (found.again.in_channels, found.again.padding) == (4, (1, 1))  # hyperparameters are the layer's
    with pytest.raises(AttributeError, match="counterpart of Conv2d has no weight: its layers are not one"):
        found.again.weight  # noqa: B018
    train(found.double(), X)
    assert equal(fxexpand.transfer(found, expanded).state_dict(), found.state_dict())


@pytest.mark.parametrize("cls", [Net, Branching])
def test_a_collapsed_model_is_taken_layer_by_layer(cls: type[nn.Module]) -> None:
    expanded = built(cls)
    fast = fxexpand.collapse(expanded)
    found = fxexpand.counterpart(fast)
    assert torch.equal(found(X), fxexpand.counterpart(expanded)(X))
    assert any(isinstance(module, Collapsed) for module in fast.modules())
    train(found, X)
    back = fxexpand.transfer(found, fast)
    assert [isinstance(m, Collapsed) for m in back.modules()] == [isinstance(m, Collapsed) for m in fast.modules()]
    assert fxexpand.verify(fxexpand.transfer(found, expanded), back, X) < 1e-12


def test_its_graph_calls_the_activations() -> None:
    found: Any = fxexpand.counterpart(built())
    called = [str(node.target) for node in found.graph.nodes if node.op == "call_module"]
    assert called[:6] == [
        "features.0.kernel_0", "features.0.kernel_0_activation", "features.0.kernel_1",
        "features.0.kernel_1_activation", "features.0.kernel_2", "features.1",
    ]  # fmt: skip
    assert sum(isinstance(module, nn.ReLU) for module in found.modules()) == 2 + 1 + 2 + 2 + 1
    assert found.training
    found.graph.lint()


class Shallow(fx.Tracer):
    """Traces no module but the root."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def test_a_call_of_the_expansion_as_a_whole_stays_with_its_hooks() -> None:
    expanded = fxexpand.expand(nn.Conv2d(3, 4, 3).double(), CL(2))
    model: Any = nn.Sequential(expanded, nn.Tanh())
    model = fx.GraphModule(model, Shallow().trace(model))
    model.get_submodule("0").register_forward_hook(lambda module, args, output: 2 * output)
    found: Any = fxexpand.counterpart(model)
    assert found.code == model.code
    chain = found.get_submodule("0")
    y = chain.reduce(chain.kernel(chain.expand(X).relu()).relu())
    assert torch.equal(found(X), (2 * y).tanh())


def by_file(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)  # type: ignore[no-any-return]


def by_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))  # type: ignore[no-any-return]


@pytest.mark.parametrize("journey", [copy.deepcopy, by_pickle, by_file, fxexpand.trace])
@pytest.mark.parametrize("sigma", [nn.ReLU, nn.PReLU, Swish])
@pytest.mark.parametrize("cls", [Net, Branching])
def test_it_survives_a_journey(journey: Any, sigma: Any, cls: type[nn.Module]) -> None:
    expanded = built(cls).eval()
    found = fxexpand.counterpart(expanded, sigma)
    moved = journey(found)
    assert torch.equal(moved(X), found(X))
    assert equal(moved.state_dict(), found.state_dict())
    assert equal(fxexpand.transfer(moved, expanded).state_dict(), expanded.state_dict())


def test_it_is_one_graph_for_torch_compile() -> None:
    found = fxexpand.counterpart(built()).eval()
    compiled = torch.compile(found, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(X), found(X), rtol=1e-10, atol=1e-12)


def test_checkpoints_of_either_fit_the_other() -> None:
    expanded = built(init="preserve")
    found = fxexpand.counterpart(expanded)
    assert equal(found.state_dict(), expanded.state_dict())  # it starts where the model stands
    train(found, X)
    expanded.load_state_dict(found.state_dict(), strict=True)
    found.load_state_dict(built().state_dict(), strict=True)


def test_activations_with_parameters_stay_behind() -> None:
    expanded = built().to(torch.float32)
    found = fxexpand.counterpart(expanded, nn.PReLU)
    extra = [key for key in found.state_dict() if key not in expanded.state_dict()]
    assert extra[:2] == ["features.0.kernel_0_activation.weight", "features.0.kernel_1_activation.weight"]
    assert len(extra) == 2 + 2 * 2 + 2 + 1  # the layer with two names has two keys for each of its own
    train(found, X.float())
    assert list(fxexpand.transfer(found, expanded).state_dict()) == list(expanded.state_dict())


def test_a_module_is_copied_for_each_place_in_the_dtype_of_the_layers() -> None:
    sigma = nn.PReLU(init=0.1).eval()
    found: Any = fxexpand.counterpart(built().to(torch.bfloat16), sigma)
    copies = [module for module in found.modules() if isinstance(module, nn.PReLU)]
    assert len(copies) == 7
    assert sigma not in copies
    assert {(copied.weight.dtype, copied.training) for copied in copies} == {(torch.bfloat16, True)}
    assert sigma.weight.dtype == torch.float32


def test_an_activation_in_place() -> None:
    expanded = built()
    found = fxexpand.counterpart(expanded, nn.ReLU(inplace=True))
    assert torch.equal(found(X), fxexpand.counterpart(expanded)(X))
    train(found, X)


def test_a_model_without_values() -> None:
    expanded = fxexpand.expand(nn.Sequential(nn.Conv2d(3, 4, 3, device="meta")), CL(2), init="standard")
    found = fxexpand.counterpart(expanded, nn.PReLU)
    assert {parameter.device.type for parameter in found.parameters()} == {"meta"}


@pytest.mark.parametrize("strategy", [ACNet(), RepVGG(), RepVGG(batch_norm=True), MobileOne()], ids=str)
def test_branches_of_one_layer_each_have_no_place_for_an_activation(strategy: Strategy) -> None:
    expanded = fxexpand.expand(nn.Conv2d(3, 3, 3, padding=1).double(), strategy).eval()
    with pytest.warns(UserWarning, match="no expansion has two layers in a row"):
        found = fxexpand.counterpart(expanded)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    assert torch.equal(found(x), expanded(x))
    assert equal(fxexpand.transfer(found, expanded).state_dict(), expanded.state_dict())


def test_beside_an_expansion_with_a_place_they_are_as_they_were() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Flatten(), nn.Linear(48, 2)).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = fxexpand.counterpart(fxexpand.expand(model, [RepVGG(), FC(2)]))
    assert [type(m) for m in found.modules() if isinstance(m, nn.ReLU)] == [nn.ReLU]


@pytest.mark.parametrize(
    ("activation", "says"),
    [
        ("relu", "found 'relu'"),
        (None, "found None"),
        (torch.relu, r"relu\(\) raised TypeError"),
        (nn.Conv2d, r"Conv2d\(\) raised TypeError"),
        (lambda: 3, r"to give a module, found 3"),
        (lambda: nn.Conv2d(6, 6, 1), "found a layer, Conv2d"),
        (nn.Sequential(nn.Tanh(), nn.Linear(4, 4)), "found a layer, Linear"),
        (nn.BatchNorm2d(6), "found a layer, BatchNorm2d"),
        (nn.Identity, r"found Identity\(\), which is linear"),
        (nn.Dropout(0.1), r"found Dropout\(p=0.1.*\), which is linear"),
        (nn.Flatten, r"found shape \(2, 54\)"),
        (nn.GLU(1), r"to give a signal of the shape \(2, 6, 3, 3\) that it takes.*found shape \(2, 3, 3, 3\)"),
        (lambda: nn.PReLU(5), r"signals of shape \(2, 6, 3, 3\); PReLU\(num_parameters=5\) raised RuntimeError"),
        (nn.Bilinear(2, 2, 2), "raised TypeError"),
    ],
)
def test_what_is_no_activation(activation: Any, says: str) -> None:
    expanded: Any = fxexpand.expand(nn.Sequential(nn.Conv2d(3, 4, 3)), CL(2))
    before, code = copy.deepcopy(expanded.state_dict()), expanded.code
    with pytest.raises(ExpansionError, match=f"expected .*{says}.* Use nn.ReLU, or a function") as caught:
        fxexpand.counterpart(expanded, activation)
    where = "counterpart" if activation in ("relu", None) else "0.expand_activation"
    assert str(caught.value).startswith(f"{where}: expected ")
    assert equal(expanded.state_dict(), before)
    assert expanded.code == code


def test_models_that_have_no_counterpart() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3))
    expanded = fxexpand.expand(plain, CL(2))
    with pytest.raises(ExpansionError, match=r"expected a torch\.nn\.Module, found int"):
        fxexpand.counterpart(3)  # type: ignore[arg-type]
    with pytest.raises(ExpansionError, match=r"found no expanded layer in it\. Expand it first"):
        fxexpand.counterpart(plain)
    with pytest.raises(ExpansionError, match="0: it is a nonlinear counterpart already"):
        fxexpand.counterpart(fxexpand.counterpart(expanded))
    with pytest.raises(ExpansionError, match=r"0\.expand: a layer of an expansion, found outside of one"):
        fxexpand.counterpart(fx.symbolic_trace(expanded))


def test_a_graph_with_something_between_the_layers_already() -> None:
    expanded: Any = fxexpand.expand(nn.Sequential(nn.Conv2d(3, 4, 3)), CL(2))
    node = next(node for node in expanded.graph.nodes if node.target == "0.expand")
    with expanded.graph.inserting_after(node):
        relu = expanded.graph.call_function(torch.relu, (node,))
    node.replace_all_uses_with(relu, delete_user_cb=lambda user: user is not relu)
    expanded.recompile()
    with pytest.raises(ExpansionError, match=r"^0: .*it stands between layers.* Undo the change"):
        fxexpand.counterpart(expanded)


def test_contracting_it_is_refused_and_its_layers_expand_again() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).double()
    found = fxexpand.counterpart(fxexpand.expand(model, CL(2).then(RepVGG())))
    with pytest.raises(ContractionError, match=r"^0: expected an expansion, found the nonlinear counterpart of one"):
        fxexpand.contract(found)
    again = fxexpand.expand(found, Rule(CL(2), where=layer(name="0.reduce") | layer(name="0.kernel.kernel")))
    back = fxexpand.contract(again)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    assert fxexpand.verify(found, back, x) < 1e-12
    assert list(back.state_dict()) == list(found.state_dict())


def test_transfer_in_place_and_into_another_dtype() -> None:
    expanded = built().to(torch.float32)
    expanded.requires_grad_(False)
    found = fxexpand.counterpart(built())
    assert fxexpand.transfer(found, expanded, inplace=True) is expanded
    assert {parameter.dtype for parameter in expanded.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in expanded.parameters())
    wide = {key: value.float() if value.is_floating_point() else value for key, value in found.state_dict().items()}
    assert equal(expanded.state_dict(), wide)


def stack(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*(layers or (nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 4, 3))))


@pytest.mark.parametrize(
    ("model", "rules", "says"),
    [
        (
            stack(),
            Rule(CL(2), layer(name="0")),
            "2: expected an expansion in both models, found one in the counterpart",
        ),
        (stack(), CL(3), r"0.expand.weight: expected shape \(9, 3, 1, 1\), .* found \(6, 3, 1, 1\) in the counterpart"),
        (
            stack(),
            Overparam(2),
            r"0: expected the same layers in both models, found expand \(Conv2d\) in the counterpart only",
        ),
        (
            stack(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)),
            CL(2),
            r"0: expected the expansion of a layer with stride \(1, 1\), .*, found \(2, 2\) in the counterpart",
        ),
        (
            stack(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)),
            CL(2),
            "1.weight: expected it in both models, found it in the expanded model only",
        ),
        (
            stack(nn.Conv2d(3, 4, 3, stride=2), nn.PReLU(), nn.Conv2d(4, 4, 3)),
            CL(2),
            "1.weight: expected it in both models, found it in the expanded model only",
        ),
    ],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_models_that_do_not_belong_together(model: nn.Module, rules: Any, says: str, inplace: bool) -> None:
    found = fxexpand.counterpart(fxexpand.expand(stack(), CL(2)))
    other = fxexpand.expand(model, rules)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ExpansionError, match=f"^{says}.* Pass the expanded model that the counterpart was made of"):
        fxexpand.transfer(found, other, inplace=inplace)
    assert equal(other.state_dict(), before)


def test_an_identity_more_is_another_expansion_though_it_has_no_weights() -> None:
    compact = nn.Conv2d(4, 4, 3, padding=1)
    with_it, without = (fxexpand.expand(compact, CL(1).then(RepVGG(identity=flag))) for flag in (True, False))
    assert list(with_it.state_dict()) == list(without.state_dict())
    said = r"^the model: .* in both models, found kernel\.identity \(ZeroPad2d\) in the counterpart only"
    with pytest.raises(ExpansionError, match=said):
        fxexpand.transfer(fxexpand.counterpart(with_it), without)


def test_what_transfer_is_given_by_mistake() -> None:
    expanded = fxexpand.expand(stack(), CL(2))
    found = fxexpand.counterpart(expanded)
    with pytest.raises(
        ExpansionError, match=r"expected first .* found an expanded model\. Use transfer\(counterpart, "
    ):
        fxexpand.transfer(expanded, found)
    with pytest.raises(ExpansionError, match=r"expected first .* found Sequential without expansions"):
        fxexpand.transfer(stack(), expanded)
    with pytest.raises(ExpansionError, match=r"expected second .* found a counterpart"):
        fxexpand.transfer(found, found)
    with pytest.raises(ExpansionError, match=r"transfer: expected a torch\.nn\.Module, found OrderedDict"):
        fxexpand.transfer(found, expanded.state_dict())  # type: ignore[arg-type]


def test_contracting_an_untrained_expanded_model_is_a_way_to_start_the_compact_one() -> None:
    """The reverse experiment: the start of a compact network is the product of fresh factors."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 8 * 8, 2)).double()
    expanded: Any = fxexpand.expand(model, [CL(2), FC(2, depth=3)], init="standard")
    start: Any = fxexpand.contract(expanded)
    a, b, c = (part.weight.squeeze() for part in expanded.get_submodule("0").children())
    product = torch.einsum("nq,qpij,pm->nmij", c, b, a)
    assert torch.allclose(start.get_submodule("0").weight, product, rtol=1e-12, atol=1e-15)
    first, second, third = (part.weight for part in expanded.get_submodule("2").children())
    assert torch.allclose(start.get_submodule("2").weight, third @ second @ first, rtol=1e-12, atol=1e-15)
    assert fxexpand.verify(expanded, start, X) < 1e-12
    assert not any(isinstance(module, Expanded) for module in start.modules())
    difference = start.get_submodule("0").weight - model.get_submodule("0").weight
    assert float(difference.detach().norm()) > 0.1  # no trace of the model's own start
    model.load_state_dict(start.state_dict(), strict=True)
    train(model, X)
