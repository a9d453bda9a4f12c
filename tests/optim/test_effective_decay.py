"""effective_decay: the weight decay of the compact network, once per step and never of weights that are gone."""

from __future__ import annotations

import copy
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
import torch.autograd.forward_ad as fwad
from hypothesis import given
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from drawing import random
from expansions import Expansion, expansions
from fxexpand import (
    CK,
    CL,
    FC,
    DiverseBranch,
    ExpansionError,
    RepVGG,
    collapse,
    contract,
    effective_decay,
    expand,
    parameter_groups,
    uncollapse,
)
from fxexpand.demo.smallnet import SmallNet
from fxexpand.graph.expanded import Expanded
from fxexpand.strategies import Strategy
from fxexpand.testing import as_trained

DECAY = 0.3  # as large as the loss, so that an error in it shows


def compact() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)).double()


def collapsed() -> nn.Module:
    """Collapsed expansions that the penalty was asked of before: from then on each forward keeps its kernel for it."""
    model = collapse(expand(compact(), [CL(2), FC(2, depth=3)]))
    effective_decay(model)
    return model


def test_nothing_is_kept_before_someone_has_asked() -> None:
    model = collapse(expand(compact(), [CL(2), FC(2, depth=3)]))
    model(images())
    with Products() as first:
        effective_decay(model)
    model(images())
    with Products() as second:
        effective_decay(model)
    assert first.count > 0
    assert second.count == 0


def images() -> Tensor:
    return random(3, 3, 4, 4)


def loss(model: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = model(x)
    return out.square().mean()


def gradients(model: nn.Module, step: Callable[[], object]) -> list[Tensor]:
    """Those of the parameters after ``step``."""
    model.zero_grad()
    step()
    return [cast(Tensor, parameter.grad).clone() for parameter in learnt(model)]


def learnt(model: nn.Module) -> list[nn.Parameter]:
    """The parameters but for those that a strategy fixes."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def expected(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The gradients of loss and penalty, each composition made anew, layer by layer."""
    explicit = uncollapse(copy.deepcopy(model))
    return gradients(explicit, (loss(explicit, x) + DECAY * effective_decay(explicit)).backward)


def assert_close(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """To 1e-10 of the norm."""
    assert len(found) == len(wanted) > 0
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).norm() <= 1e-10 * b.norm()


class Products(TorchDispatchMode):
    """Counts the products of matrices and the convolutions that run, forward and backward."""

    NAMES = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward", "mv", "dot")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in self.NAMES
        return func(*args, **(kwargs or {}))


# What it is.


@pytest.mark.parametrize("form", [lambda m: m, collapse])
@given(expansion=expansions())
def test_one_step_of_sgd_moves_the_kernel_as_weight_decay_moves_the_compact_one(
    form: Callable[[nn.Module], nn.Module], expansion: Expansion
) -> None:
    """The step −(∇L + λW) of the compact layer, pulled back through the composition, is the factors' gradient."""
    layer, x = nn.Sequential(expansion.layer), expansion.signal()
    model = form(expand(layer, expansion.strategy))
    found = gradients(model, (loss(model, x) + DECAY * effective_decay(model)).backward)

    expanded: Any = next(module for module in model.modules() if isinstance(module, Expanded))
    effective = [tensor for tensor in (expanded.weight, expanded.bias) if tensor is not None]
    own = list(layer.parameters())  # weight and bias
    before = [parameter.detach().clone() for parameter in own]
    optimizer = torch.optim.SGD(parameter_groups(layer, DECAY), lr=1.0)
    loss(layer, x).backward()
    optimizer.step()
    step = [old - new.detach() for old, new in zip(before, own, strict=True)]
    pulled = torch.autograd.grad(effective, learnt(model), step)
    scale = max(float(gradient.norm()) for gradient in pulled)
    for a, b in zip(found, pulled, strict=True):
        assert (a - b).norm() <= 1e-10 * scale


@given(expansion=expansions())
def test_its_gradient_is_the_compact_weight(expansion: Expansion) -> None:
    layer = cast(Any, expansion.layer)
    model: Any = expand(nn.Sequential(layer), expansion.strategy)
    penalty = effective_decay(model)
    assert abs(penalty - layer.weight.square().sum() / 2) <= 1e-10 * abs(penalty)
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    weights = [parameter for name, parameter in named if name.endswith("weight")]
    found = torch.autograd.grad(penalty, weights)
    pulled = torch.autograd.grad(model[0].weight, weights, layer.weight.detach())
    scale = max(float(gradient.norm()) for gradient in pulled)
    for a, b in zip(found, pulled, strict=True):
        assert (a - b).norm() <= 1e-10 * scale


@pytest.mark.parametrize("form", [lambda m: m, collapse])
def test_of_two_linear_layers_it_is_what_the_formula_says(form: Callable[[nn.Module], nn.Module]) -> None:
    model: Any = form(expand(nn.Sequential(nn.Linear(4, 6)).double(), FC(2)))
    effective_decay(model).backward()
    A, B = (layer.weight for layer in model[0].children())
    assert_close([A.grad, B.grad], [B.T @ B @ A, B @ A @ A.T])
    assert all(layer.bias.grad is None for layer in model[0].children())


def test_it_sums_over_expansions_and_leaves_other_layers_out() -> None:
    model = compact()
    one, both = (effective_decay(expand(model, rules)) for rules in (CL(2), [CL(2), FC(2)]))
    conv, linear = (model.get_parameter(f"{name}.weight").square().sum() / 2 for name in "03")
    assert torch.allclose(one, conv, rtol=1e-12)
    assert torch.allclose(both, conv + linear, rtol=1e-12)


def test_without_expansions_it_is_zero() -> None:
    region = collapse(nn.Sequential(nn.Linear(4, 40), nn.Linear(40, 3)))
    region(torch.randn(2, 4))
    assert effective_decay(region) == effective_decay(compact()) == effective_decay(nn.ReLU()) == 0


def test_frozen_expansions_are_left_out() -> None:
    model = collapsed()
    conv = model.get_parameter("0.expand.weight")
    whole = effective_decay(model)
    model.get_submodule("3").requires_grad_(False)
    model.get_parameter("3.linear_0.bias").requires_grad_(True)
    part = effective_decay(model)
    assert 0 < part < whole
    part.backward()
    assert conv.grad is not None
    assert model.get_parameter("3.linear_0.weight").grad is None


def test_an_expansion_under_two_names_counts_once() -> None:
    layer = nn.Linear(4, 4).double()
    model = collapse(expand(nn.Sequential(layer, nn.ReLU(), layer), FC(2)))
    model(random(2, 4))
    assert torch.allclose(effective_decay(model), layer.weight.square().sum() / 2, rtol=1e-12)


def test_half_precision_is_summed_in_single() -> None:
    big = expand(nn.Sequential(nn.Linear(300, 300)), FC(1))
    with torch.no_grad():
        for parameter in big.parameters():
            parameter.mul_(10)
    exact = effective_decay(big)
    assert exact > 65504  # more than float16 holds
    found = effective_decay(collapse(big.to(torch.float16)))
    assert found.dtype == torch.float32
    assert abs(found - exact) < 1e-2 * exact


def test_autocast_does_not_change_it() -> None:
    model = collapsed().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(images().float())
        found = [effective_decay(model), effective_decay(model), effective_decay(uncollapse(model))]
    for penalty in found:  # taken, composed anew, layer by layer
        assert penalty.dtype == torch.float32
        assert torch.allclose(penalty, effective_decay(uncollapse(model)), rtol=1e-5)


# What it costs.


def test_a_training_step_with_it_has_no_product_more() -> None:
    model, x = collapsed(), images()
    with Products() as without:
        loss(model, x).backward()
    with Products() as beside:
        (loss(model, x) + DECAY * effective_decay(model)).backward()
    with Products() as alone:
        effective_decay(model)
    assert beside.count == without.count > 0
    assert alone.count > 0, "the counter sees a composition"


def test_the_kernel_taken_gives_the_gradients_of_one_composed_anew() -> None:
    model, x = collapsed(), images()
    assert_close(gradients(model, (loss(model, x) + DECAY * effective_decay(model)).backward), expected(model, x))


def test_accumulated_steps() -> None:
    model, x = collapsed(), images()

    def together() -> None:
        (sum(loss(model, part) for part in x.split(1)) / 3 + DECAY * effective_decay(model)).backward()

    def one_by_one() -> None:
        for part in x.split(1):
            ((loss(model, part) + DECAY * effective_decay(model)) / 3).backward()

    for step in (together, one_by_one):
        assert_close(gradients(model, step), expected(model, x))


def test_a_backward_of_an_earlier_forward_leaves_the_last_kernel() -> None:
    model, x = collapsed(), images()
    earlier = loss(model, x)
    model(x)
    earlier.backward()
    with Products() as taken:
        effective_decay(model)
    assert taken.count == 0


# Never stale.


def test_backward_by_parts() -> None:
    model, x = collapsed(), images()

    def after() -> None:
        loss(model, x).backward()
        (DECAY * effective_decay(model)).backward()

    def retained() -> None:
        value, penalty = loss(model, x), effective_decay(model)
        value.backward(retain_graph=True)
        (DECAY * penalty).backward()

    def twice() -> None:
        value, half, other = loss(model, x), effective_decay(model) / 2, effective_decay(model) / 2
        (value + DECAY * half).backward()
        (DECAY * other).backward()

    for step in (after, retained, twice):
        assert_close(gradients(model, step), expected(model, x))


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("name", ["0.reduce.bias", "0.expand.bias", "0.expand.weight"])
def test_after_a_backward_to_one_parameter(name: str, groups: int) -> None:
    """With groups the composition is several functions, which free their graphs one by one."""
    model = collapse(expand(nn.Sequential(nn.Conv2d(3, 6, 3, groups=groups)).double(), CL(2)))
    x = images()
    torch.autograd.grad(loss(model, x), model.get_parameter(name))
    effective_decay(model).backward()
    torch.autograd.grad(loss(model, x), model.get_parameter(name), create_graph=True)
    effective_decay(model).backward()


def in_place(model: nn.Module) -> None:
    with torch.no_grad():
        model.get_parameter("0.kernel.weight").mul_(2)


def other_memory(model: nn.Module) -> None:
    weight = model.get_parameter("0.kernel.weight")
    weight.data = weight.data * 2


def other_parameter(model: nn.Module) -> None:
    kernel: Any = model.get_submodule("0.kernel")
    kernel.weight = nn.Parameter(2 * kernel.weight.detach())


def loaded(model: nn.Module) -> None:
    model.load_state_dict({name: 2 * tensor for name, tensor in model.state_dict().items()})


def stepped(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(model.parameters(), lr=0.1).step()


def other_parameter_in_its_memory(model: nn.Module) -> None:
    other_parameter(model)
    kernel: Any = model.get_submodule("0.kernel")
    model(images())
    kernel.weight = nn.Parameter(kernel.weight.detach())


def without_bias(model: nn.Module) -> None:
    model.get_submodule("0.reduce").register_parameter("bias", None)


def other_layer(model: nn.Module) -> None:
    old: Any = model.get_submodule("0.reduce")
    model.get_submodule("0").register_module("reduce", nn.Conv2d(old.in_channels, old.out_channels, 1).double())


CHANGES = (
    *(in_place, other_memory, other_parameter, other_parameter_in_its_memory, without_bias, other_layer, loaded),
    *(stepped, nn.Module.float),
)


@pytest.mark.parametrize("change", CHANGES)
def test_a_weight_that_changed_is_composed_anew(change: Callable[[nn.Module], object]) -> None:
    model = collapsed()
    before = effective_decay(model)
    model(images())
    change(model)
    found = effective_decay(model)
    assert torch.allclose(found, effective_decay(uncollapse(model)), rtol=1e-5 if change is nn.Module.float else 1e-12)
    assert change in (nn.Module.float, without_bias) or abs(found - before) > 1e-3
    model.zero_grad()
    found.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name.endswith("weight"))


def test_a_forward_without_gradients_leaves_nothing_behind() -> None:
    model, x = collapsed(), images()
    for mode in (torch.no_grad, torch.inference_mode):
        model(x)
        with mode():
            model(x)
        effective_decay(model).backward()
        with mode():
            assert not effective_decay(model).requires_grad


def test_a_layer_that_runs_in_turn() -> None:
    model, x = collapsed(), images()
    model(x)
    model.get_submodule("0.kernel").register_forward_hook(lambda module, args, output: 2 * output)
    model(x)
    with pytest.raises(ExpansionError, match=r"effective_decay: 0 \(Conv2d\).*hooks.*Undo that, or"):
        effective_decay(model)


def test_another_thread_gets_a_graph_of_its_own() -> None:
    model, x = collapsed(), images()
    value = loss(model, x)
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(effective_decay(model)))
    thread.start()
    thread.join()
    value.backward()
    found[0].backward()


def test_copies_and_pickles_after_a_forward() -> None:
    model, x = collapsed(), images()
    model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), collapse(model), uncollapse(model)):
        penalty = effective_decay(twin)
        assert torch.allclose(penalty, effective_decay(uncollapse(model)), rtol=1e-12)
        penalty.backward()
        (loss(twin, x) + effective_decay(twin)).backward()


# Never longer than needed.


@contextmanager
def watched(model: nn.Module) -> Iterator[Callable[[], bool]]:
    """Whether a graph of the forward inside still lives: it holds what autograd saves, and that is all."""
    saved: list[weakref.ref[Any]] = []

    class Held:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    def pack(tensor: Tensor) -> Held:
        held = Held(tensor.detach())  # a result that held its own graph would be a cycle
        saved.append(weakref.ref(held))
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        model(images())
    assert saved
    yield lambda: any(held() is not None for held in saved)


def test_a_graph_lives_until_the_next_forward_at_most() -> None:
    model = collapsed()
    with watched(model) as lives:
        assert lives(), "it is kept for the penalty"
        model(images())
        assert not lives()
    with watched(model) as lives:
        with torch.no_grad():
            model(images())
        assert not lives()
    with watched(model) as lives:
        effective_decay(model)
        assert not lives()
    with watched(model) as lives:
        effective_decay(model).backward()
        assert not lives()


# With what else works on graphs.


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    model, x = collapsed(), images().requires_grad_()

    def step() -> None:
        out = checkpoint(model, x, use_reentrant=reentrant)
        (out.square().mean() + DECAY * effective_decay(model)).backward()

    assert_close(gradients(model, step), expected(model, x.detach()))
    for parameter in model.parameters():
        parameter.data.mul_(2)  # what autograd does not count; the backward has let go of everything
    assert torch.allclose(effective_decay(model), effective_decay(uncollapse(model)), rtol=1e-12)


class WithPenalty(nn.Module):
    """Loss and penalty in one module."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return loss(self.model, x) + DECAY * effective_decay(self.model)


def test_torch_func() -> None:
    model, x = collapsed(), images()
    whole, wanted = WithPenalty(model), expected(model, x)
    parameters = {name: parameter.detach() for name, parameter in whole.named_parameters()}

    def value(given: dict[str, Tensor]) -> Tensor:
        out: Tensor = torch.func.functional_call(whole, given, (x,))
        return out

    assert_close(list(torch.func.grad(value)(parameters).values()), wanted)
    along = sum((g * p).sum() for g, p in zip(wanted, parameters.values(), strict=True))
    assert torch.allclose(torch.func.jvp(value, (parameters,), (parameters,))[1], cast(Tensor, along), rtol=1e-10)
    stacked = {name: torch.stack([tensor, 2 * tensor]) for name, tensor in parameters.items()}
    both = torch.func.vmap(value)(stacked)
    assert torch.allclose(both[0], value(parameters), rtol=1e-10)
    effective_decay(model).backward()  # nothing of all that is left


def test_forward_mode() -> None:
    model, x = collapsed(), images()
    whole, wanted = WithPenalty(model), expected(model, x)
    with fwad.dual_level():
        duals = {name: fwad.make_dual(p.detach(), p.detach()) for name, p in whole.named_parameters()}
        found = fwad.unpack_dual(torch.func.functional_call(whole, duals, (x,))).tangent
    along = sum((g * p).sum() for g, p in zip(wanted, model.parameters(), strict=True))
    assert found is not None
    assert torch.allclose(found, cast(Tensor, along), rtol=1e-10)


def test_fake_tensors() -> None:
    model = collapsed()
    with FakeTensorMode() as mode:
        named = WithPenalty(model).named_parameters()
        fake: dict[str, Tensor] = {name: mode.from_tensor(parameter) for name, parameter in named}
        out = torch.func.functional_call(WithPenalty(model), fake, (mode.from_tensor(images()),))
    assert out.shape == ()


def test_replicas_leave_the_model_alone() -> None:
    model, x = collapsed(), images()
    expansion: Any = model.get_submodule("0")
    model(x)
    replica = expansion._replicate_for_data_parallel()
    for name, child in expansion._modules.items():
        twin = child._replicate_for_data_parallel()
        for key, parameter in child._parameters.items():
            setattr(twin, key, 2 * parameter)
        setattr(replica, name, twin)
    replica(x)
    assert torch.allclose(effective_decay(model), effective_decay(uncollapse(model)), rtol=1e-12)


def test_compiled_together_with_the_loss_it_is_one_graph() -> None:
    model, x = collapsed(), images()
    whole: Any = torch.compile(WithPenalty(model), fullgraph=True, backend="aot_eager")
    model(x)  # what this leaves behind is no part of the graph
    assert_close(gradients(model, lambda: whole(x).backward()), expected(model, x))
    half: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(gradients(model, (loss(half, x) + DECAY * effective_decay(half)).backward), expected(model, x))


def test_small_network_trains_with_it() -> None:
    """Some steps with momentum: the penalty, and it alone, takes the kernels down."""
    norms = []
    for decay in (0.0, 1.0):
        torch.manual_seed(0)
        model = collapse(expand(SmallNet(kernel_size=7), [CK(4), FC(2)]))
        optimizer = torch.optim.SGD(parameter_groups(model, decay, "effective"), lr=0.01, momentum=0.9)
        x, labels = torch.randn(16, 3, 32, 32), torch.randint(10, (16,))
        for _ in range(8):
            optimizer.zero_grad()
            (nn.functional.cross_entropy(model(x), labels) + decay * effective_decay(model)).backward()
            optimizer.step()
        norms.append(effective_decay(model).item())
    assert norms[1] < 0.9 * norms[0]


# Errors.


@pytest.mark.parametrize("model", [3, None, nn.Linear, [nn.Linear(2, 2)]])
def test_what_is_no_module(model: Any) -> None:
    with pytest.raises(ExpansionError, match=r"effective_decay: expected a torch.nn.Module, found \w+. Pass the model"):
        effective_decay(model)


def test_an_activation_among_the_layers() -> None:
    model = expand(compact(), CL(2))
    model.get_submodule("0").register_module("kernel", nn.ReLU())
    with pytest.raises(ExpansionError, match=r"effective_decay: 0 \(Conv2d\): expected layers that form one.*ReLU"):
        effective_decay(model)


def test_layers_that_stand_outside() -> None:
    model: Any = fx.Transformer(fx.symbolic_trace(expand(compact(), CL(2)))).transform()
    with pytest.raises(ExpansionError, match=r"effective_decay: 0.expand: expected the layers of an expansion"):
        effective_decay(model)


# Batch norm in branches.


@pytest.mark.parametrize("form", [lambda m: m, lambda m: collapse(m.eval()).train()])
@pytest.mark.parametrize("strategy", [RepVGG(True), DiverseBranch(True)], ids=str)
def test_batch_norm_that_trains_scales_the_branches_as_contracting_will(strategy: Strategy, form: Any) -> None:
    model = form(as_trained(expand(compact(), strategy)).train())
    x = images()
    (loss(model, x) + DECAY * effective_decay(model)).backward()  # the forward moves the running statistics
    found = effective_decay(model)
    small = contract(copy.deepcopy(model).eval())
    assert float(found) == pytest.approx(float(small.get_parameter("0.weight").square().sum()) / 2, rel=1e-12)
    learned = [name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())]
    assert {name.rpartition(".")[2] for name in learned} == {"weight", "bias"}
    scales = [p for name, p in model.named_parameters() if "norm" in name and name.endswith("weight")]
    assert all(bool(g.any()) for g in torch.autograd.grad(found, scales))
