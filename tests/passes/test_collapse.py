"""collapse computes what the explicit layers compute, gradients included, and never from a stale kernel."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor, fx, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import fxexpand
from drawing import random
from expansions import Expansion, expansions
from fxexpand import (
    CK,
    CL,
    FC,
    ACNet,
    ExpansionError,
    RepVGG,
    Rule,
    collapse,
    contract,
    expand,
    layer,
    uncollapse,
)
from fxexpand.demo.smallnet import SmallNet
from fxexpand.graph.collapsed import Collapsed
from fxexpand.graph.expanded import Expanded
from fxexpand.strategies import Strategy
from fxexpand.testing import Case, Functional, Picky, Residual, networks

IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32, dtype=torch.float64).reshape(2, 3, 32, 32)


def small(strategy: Any = None) -> nn.Module:
    """An expanded SmallNet in float64, with weights of generic size."""
    torch.manual_seed(1)
    return expand(SmallNet(kernel_size=7).double(), [strategy or CL(2), FC(2)], init="standard")


def gradients(model: Any, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def relative(found: list[Tensor], expected: list[Tensor]) -> float:
    """‖found − expected‖ / ‖expected‖ over all tensors: a bias before batch norm has a gradient of rounding alone."""
    assert len(found) == len(expected)
    difference = torch.stack([(x - y).norm() for x, y in zip(found, expected, strict=True)]).norm()
    return float(difference / torch.stack([y.norm() for y in expected]).norm())


# The same function and gradients


@given(expansions())
def test_any_layer_with_any_strategy(case: Expansion) -> None:
    big = expand(nn.Sequential(case.layer), case.strategy, init="standard")
    fast, x = collapse(big), case.signal()
    assert sum(isinstance(module, Collapsed) for module in fast.modules()) == 1
    assert torch.allclose(fast(x), big(x), rtol=1e-12, atol=1e-12)
    assert relative(gradients(fast, x), gradients(big, x)) <= 1e-10


@given(networks(size=13))
def test_random_networks(case: Case) -> None:
    big = expand(case.module, [CL(2), FC(2)], init="standard").train()
    fast, (x,) = collapse(big), case.inputs
    assert list(fast.state_dict()) == list(big.state_dict())
    with torch.random.fork_rng():
        assert relative([fast(x)], [big(x)]) <= 1e-12
    assert relative(gradients(fast, x), gradients(copy.deepcopy(big), x)) <= 1e-10


@pytest.mark.parametrize("strategy", [CL(2), CK(4)])
@pytest.mark.parametrize("optimizer", [lambda p: torch.optim.SGD(p, 0.01, momentum=0.9), torch.optim.AdamW])
def test_twenty_steps_of_training_stay_together(
    strategy: Any, optimizer: Callable[[Any], torch.optim.Optimizer]
) -> None:
    explicit = small(strategy)
    fast = collapse(copy.deepcopy(explicit))
    steps = [optimizer(model.parameters()) for model in (explicit, fast)]
    for step in range(20):
        x, labels = random(8, 3, 32, 32), torch.arange(8) % 10
        for model, optimize in zip((explicit, fast), steps, strict=True):
            optimize.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            optimize.step()
        assert relative(list(fast.parameters()), list(explicit.parameters())) <= 1e-8, step


def test_one_node_for_each_expansion_under_its_path() -> None:
    big = small()
    fast = collapse(big)
    assert isinstance(fast, fx.GraphModule)
    called = [str(node.target) for node in fast.graph.nodes if node.op == "call_module"]
    assert "features.conv1" in called
    assert not [target for target in called if target.endswith(("expand", "kernel", "reduce"))]
    assert fast.get_submodule("features.conv1.expand") is not None


def test_parameters_are_shared_and_the_model_stays() -> None:
    big = small()
    nodes = [node.name for node in big.graph.nodes]  # type: ignore[union-attr]
    fast = collapse(big)
    assert [id(p) for p in fast.parameters()] == [id(p) for p in big.parameters()]
    assert [node.name for node in big.graph.nodes] == nodes  # type: ignore[union-attr]
    assert not any(isinstance(module, Collapsed) for module in big.modules())


# Back, and on


@pytest.mark.parametrize("strategy", [CL(2), CK(4)])
def test_contracting_gives_the_same_weights(strategy: Any) -> None:
    big = small(strategy)
    ours, theirs = contract(collapse(big)).state_dict(), contract(big).state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    SmallNet(kernel_size=7).double().load_state_dict(ours, strict=True)


@pytest.mark.parametrize("make", [small, lambda: expand(Functional(4, bias=True, stride=2).double(), CL(2))])
def test_uncollapse_gives_the_explicit_layers_back(make: Callable[[], nn.Module]) -> None:
    big = make()
    back = uncollapse(collapse(big))
    assert [(n.op, n.target) for n in back.graph.nodes] == [(n.op, n.target) for n in big.graph.nodes]  # type: ignore[union-attr]
    assert any(isinstance(module, Expanded) for module in back.modules())
    x = IMAGES if make is small else random(2, 4, 9, 9)
    assert torch.equal(back.eval()(x), big.eval()(x))


def test_a_functional_layer_contracts_and_expands_from_its_collapsed_form() -> None:
    model = Functional(4, bias=True, stride=2).double()
    fast = collapse(expand(model, CL(2)))
    small_again = contract(fast)
    model.load_state_dict(small_again.state_dict(), strict=True)
    x = random(2, 4, 9, 9)
    assert torch.allclose(small_again(x), fast(x), rtol=1e-12, atol=1e-12)
    bigger = expand(fast, Rule(CL(1), where=layer(name="*kernel")))
    assert torch.allclose(bigger(x), fast(x), rtol=1e-10, atol=1e-10)
    assert torch.allclose(collapse(bigger)(x), fast(x), rtol=1e-10, atol=1e-10)


def test_fusing_takes_batch_norm_in() -> None:
    big = small().eval()
    fused = fxexpand.fuse(collapse(big))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert [type(module) for module in fused.modules()].count(nn.Conv2d) == 3
    assert relative([fused(IMAGES)], [big(IMAGES)]) <= 1e-12
    assert fxexpand.explain(collapse(big)) == fxexpand.explain(big)


def test_saving_loading_into_the_explicit_model_and_going_on() -> None:
    def train(model: nn.Module, steps: range) -> None:
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        for step in steps:
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=generator)
            F.cross_entropy(model(x), torch.arange(4)).backward()
            optimizer.step()

    straight, first = small(), small()
    train(straight, range(6))
    fast = collapse(first)
    train(fast, range(3))
    resumed = small()
    resumed.load_state_dict(fast.state_dict(), strict=True)
    train(resumed, range(3, 6))
    assert relative(list(resumed.parameters()), list(straight.parameters())) <= 1e-10


# No stale kernel


def changed_in_place(model: Any) -> None:
    with torch.no_grad():
        model.features.conv2.kernel.weight.mul_(2)


def data_changed(model: Any) -> None:
    model.features.conv2.kernel.weight.data.mul_(2)


def data_assigned(model: Any) -> None:
    model.features.conv2.kernel.weight.data = model.features.conv2.kernel.weight.data * 2


def loaded(model: Any) -> None:
    model.load_state_dict({key: 1.5 * value for key, value in model.state_dict().items()})


def replaced(model: Any) -> None:
    old = model.features.conv2.kernel.weight
    model.features.conv2.kernel.weight = nn.Parameter(2 * old.detach())


def stepped(model: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, foreach=True)
    gradients(model, IMAGES)
    optimizer.step()


def stepped_fused(model: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, fused=True)
    gradients(model, IMAGES)
    optimizer.step()


@pytest.mark.parametrize(
    "change", [changed_in_place, data_changed, data_assigned, loaded, replaced, stepped, stepped_fused]
)
@pytest.mark.parametrize("mode", [True, False])
def test_every_change_of_a_weight_is_seen_at_the_next_call(change: Callable[[Any], None], mode: bool) -> None:
    fast = collapse(small()).train(mode)
    with torch.no_grad():
        before = fast(IMAGES)
    change(fast)
    fast.eval()
    with torch.no_grad():
        after = fast(IMAGES)
        assert relative([after], [uncollapse(fast)(IMAGES)]) <= 1e-12
    assert relative([after], [before]) > 1e-3


# At home in torch


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(copied: Callable[[nn.Module], nn.Module]) -> None:
    fast = collapse(small()).eval()
    twin = copied(fast)
    data_changed(fast)
    assert torch.equal(twin(IMAGES), collapse(small()).eval()(IMAGES))


def test_an_average_of_models() -> None:
    fast = collapse(small())
    average = AveragedModel(fast)
    average.update_parameters(fast)
    assert torch.equal(average.eval()(IMAGES), fast.eval()(IMAGES))


def test_one_graph_for_compile() -> None:
    fast = collapse(small()).eval()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    assert relative([compiled(IMAGES)], [fast(IMAGES)]) <= 1e-12
    assert relative(gradients(compiled, IMAGES), gradients(fast, IMAGES)) <= 1e-10


def test_gradients_of_many_samples_at_once() -> None:
    fast = collapse(small()).eval()
    parameters = {name: p.detach() for name, p in fast.named_parameters()}
    buffers = dict(fast.named_buffers())

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(fast, (values, buffers), (x[None],))
        return out.square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, IMAGES)
    for i, x in enumerate(IMAGES):
        expected = gradients(fast, x[None])
        assert relative([gradient[i] for gradient in found.values()], expected) <= 1e-10


def test_checkpointing_recomputes_the_kernel() -> None:
    fast = collapse(small()).eval()
    expected = gradients(fast, IMAGES)
    fast.zero_grad()
    checkpoint(fast, IMAGES.requires_grad_(), use_reentrant=False).square().sum().backward()
    IMAGES.requires_grad_(False)
    assert relative([p.grad for p in fast.parameters() if p.grad is not None], expected) <= 1e-12


def test_it_composes_in_the_dtype_of_the_parameters_under_autocast() -> None:
    big = small().float().eval()
    fast = collapse(big)
    conv: Any = fast.get_submodule("features.conv2")
    seen: list[torch.dtype] = []
    original = conv._composed

    def spy(device: str) -> Any:
        kernel = original(device)
        seen.append(kernel.weight.dtype)
        return kernel

    conv._composed = spy
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = conv(torch.randn(1, 8, 16, 16))
    assert seen == [torch.float32]
    assert out.dtype == torch.bfloat16


def test_half_precision_with_a_gradient_scaler() -> None:
    layers = (nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(288, 10))
    start = expand(nn.Sequential(*layers), [CL(2), FC(2)], init="standard")
    images, labels = torch.randn(16, 3, 8, 8), torch.arange(16) % 10

    def moved(model: nn.Module, *, half: bool) -> list[Tensor]:
        """By how much three steps move the parameters."""
        before = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=half)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16, enabled=half):
                loss = F.cross_entropy(model(images), labels)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == (256.0 if half else 1.0)  # no step was skipped
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        return [p.detach() - q for p, q in zip(model.parameters(), before, strict=True)]

    exact, explicit = moved(copy.deepcopy(start), half=False), moved(copy.deepcopy(start), half=True)
    found = relative(moved(collapse(copy.deepcopy(start)), half=True), exact)
    assert found <= 1.5 * relative(explicit, exact)
    assert found <= 0.01


def test_memory_format() -> None:
    conv = nn.Conv2d(4, 8, 3, padding=1)
    fast = collapse(expand(nn.Sequential(conv), CL(2)))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 4, 6, 6).to(memory_format=memory_format)
        assert fast(x).is_contiguous(memory_format=memory_format)
        assert torch.allclose(fast(x), conv(x), atol=1e-5)


@pytest.mark.parametrize("strategy", [CL(2), ACNet(), RepVGG()], ids=repr)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_layers_in_channels_last_give_an_output_in_it(strategy: Strategy, groups: int) -> None:
    """As the compact layer does, whatever the input: else a network would leave the format at its first layer."""
    conv = nn.Conv2d(4, 8, 3, padding=1, groups=groups).to(memory_format=torch.channels_last)
    slow = expand(nn.Sequential(conv), strategy)
    x, fast = torch.randn(2, 4, 6, 6), collapse(slow)
    assert fast(x).stride() == conv(x).stride() == slow(x).stride()
    assert torch.allclose(fast(x), conv(x), atol=1e-5)
    assert contract(slow)(x).stride() == conv(x).stride()


# What is left, and errors


def test_an_expansion_that_code_without_a_graph_calls() -> None:
    big = expand(Picky(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")).double(), CL(2))
    fast = collapse(big)
    x = random(2, 4, 6, 6)
    assert isinstance(fast.get_submodule("inner"), Collapsed)
    assert torch.allclose(fast(x), big(x), rtol=1e-12, atol=1e-12)
    assert torch.allclose(contract(fast)(x), big(x), rtol=1e-12, atol=1e-12)


def test_a_layer_called_twice_is_collapsed_at_both_places() -> None:
    big = expand(Residual(nn.Conv2d(4, 4, 3, padding=1), times=2).double(), CL(2))
    fast = collapse(big)
    called = [node.target for node in fast.graph.nodes if node.op == "call_module"]  # type: ignore[union-attr]
    assert len(called) == 2
    x = random(2, 4, 6, 6)
    assert torch.allclose(fast(x), big(x), rtol=1e-12, atol=1e-12)


def test_an_expansion_with_something_between_its_layers_stays() -> None:
    big: Any = expand(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), CL(2))
    first = next(node for node in big.graph.nodes if node.target == "0.expand")
    with big.graph.inserting_after(first):
        relu = big.graph.call_function(torch.relu, (first,))
    first.replace_all_uses_with(relu, delete_user_cb=lambda user: user is not relu)
    big.recompile()
    fast = collapse(big)
    called = [str(node.target) for node in fast.graph.nodes if node.op == "call_module"]  # type: ignore[union-attr]
    assert called == ["0.expand", "0.kernel", "0.reduce", "1", "2"]
    x = torch.randn(1, 4, 9, 9)
    assert torch.allclose(fast(x), big(x), atol=1e-6)


def test_hooks_on_a_layer_of_an_expansion_keep_it() -> None:
    big = expand(nn.Sequential(nn.Conv2d(4, 4, 3)), CL(2))
    big.get_submodule("0.kernel").register_forward_hook(lambda module, args, out: out * 2)
    with pytest.raises(ExpansionError, match="0: kernel: it has hooks"):
        collapse(big)


@pytest.mark.parametrize("model", [nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Linear(2, 2)])
def test_what_was_never_expanded(model: nn.Module) -> None:
    with pytest.raises(ExpansionError, match="found no expanded layer"):
        collapse(model)
    assert type(uncollapse(model)) is type(model)


@pytest.mark.parametrize("task", [collapse, uncollapse])
def test_no_module(task: Any) -> None:
    with pytest.raises(ExpansionError, match=r"expected a torch\.nn\.Module"):
        task("model")


# The cheaper form


def collapsed_paths(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, Collapsed)]


def test_each_expansion_takes_the_cheaper_form_for_the_example() -> None:
    """Composing 512 channels costs the same for one small image as for many large ones; convolving does not."""
    model = nn.Sequential(nn.Conv2d(8, 16, 7, padding=3), nn.ReLU(), nn.Conv2d(16, 512, 1), nn.Conv2d(512, 512, 3))
    big = expand(model, Rule(CL(2), where=~layer(kernel_size=1)), init="standard")
    assert collapsed_paths(collapse(big)) == ["0", "3"]
    assert collapsed_paths(collapse(big, torch.randn(32, 8, 4, 4))) == ["0"]
    assert collapsed_paths(collapse(big, torch.randn(16, 8, 32, 32))) == ["0", "3"]
    assert collapsed_paths(collapse(big, torch.randn(1, 8, 4, 4))) == []


def test_expansions_side_by_side_are_judged_by_their_own_inputs() -> None:
    big = expand(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2048), nn.Linear(2048, 2048)), FC(2), init="standard")
    assert collapsed_paths(collapse(big, torch.randn(4096, 64))) == ["0", "1", "2"]
    assert collapsed_paths(collapse(big, torch.randn(1024, 64))) == ["0", "1"]
    assert collapsed_paths(collapse(big, torch.randn(1, 64))) == []


def test_example_inputs_that_do_not_fit() -> None:
    with pytest.raises(fxexpand.FxExpandError, match="expected example inputs that the model runs on"):
        collapse(small(), torch.randn(1, 4, 8, 8))
