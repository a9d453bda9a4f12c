"""torch.compile(model, backend="fxexpand"): never a stale weight, no recompilation of its own, one layer a region."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import fresh_cache, run_and_get_code

from fxexpand import CL, FxExpandError, contract, expand

X = torch.linspace(-1, 1, 4 * 3 * 48 * 48, dtype=torch.float64).reshape(4, 3, 48, 48)
SCALE = 1.5


def network() -> nn.Module:
    """Two expanded layers, one with batch norm behind it."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
    return expand(layers.double(), CL(4), init="standard").eval()


def first(model: nn.Module) -> Any:
    return model.get_submodule("0.kernel")


def compiled(model: nn.Module, inner: Any = "eager", **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="fxexpand", fullgraph=True, options={"backend": inner, **options})


def in_place(model: nn.Module) -> None:
    with torch.no_grad():
        first(model).weight.mul_(SCALE)


def behind_autograd(model: nn.Module) -> None:
    first(model).weight.data.mul_(SCALE)


def other_data(model: nn.Module) -> None:
    first(model).weight.data = first(model).weight.data * SCALE


def loaded(model: nn.Module) -> None:
    model.load_state_dict({name: SCALE * tensor for name, tensor in model.state_dict().items()})


def other_parameter(model: nn.Module) -> None:
    first(model).weight = nn.Parameter(first(model).weight.detach() * SCALE)


def one_step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(X).square().mean().backward()
    optimizer.step()


def trained(model: nn.Module) -> None:
    model.train()
    model(X)
    model.eval()


@pytest.mark.parametrize(
    "change",
    [in_place, behind_autograd, other_data, loaded, other_parameter, one_step, trained],
    ids=lambda f: f.__name__,
)
def test_never_stale_and_no_recompilation_of_its_own(change: Callable[[nn.Module], None]) -> None:
    model, counts = network(), []
    for backend in ("plain", "fxexpand"):
        own, counter = copy.deepcopy(model), CompileCounterWithBackend("eager")
        torch._dynamo.reset()
        fast = torch.compile(own, backend=counter) if backend == "plain" else compiled(own, counter)
        before = fast(X)
        change(own)
        expected = own(X)
        assert not torch.allclose(before, expected, rtol=1e-3)
        assert torch.allclose(fast(X), expected, rtol=1e-10, atol=1e-10)
        counts.append(counter.frame_count)
    assert counts[1] == counts[0]


def test_a_second_instance_uses_the_code_of_the_first() -> None:
    counter = CompileCounterWithBackend("eager")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(3, 12, 1), nn.Conv2d(12, 4, 3))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layers(x)
            return y

    fast = torch.compile(lambda model, x: model(x), backend="fxexpand", options={"backend": counter})
    torch._dynamo.reset()
    for _ in range(3):
        model = Model().double()
        assert torch.allclose(fast(model, X), model(X), rtol=1e-10, atol=1e-10)
    assert counter.frame_count == 1


def test_train_eval_batch_and_autocast() -> None:
    model = network()
    fast = compiled(model)
    for mode, x in ((True, X), (False, X), (True, X[:2]), (False, X[:3])):
        model.train(mode)
        other = copy.deepcopy(model)
        assert torch.allclose(fast(x), other(x), rtol=1e-9, atol=1e-9)
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = fast(X.float()), contract(model)(X.float())
    assert ours.dtype == theirs.dtype == torch.bfloat16
    # Both are two layers in bfloat16, of the same weights but for rounding in float32.
    assert float((ours - theirs).detach().norm() / theirs.detach().norm()) < 2**-8


def test_gradients_of_all_factors_through_aot_autograd() -> None:
    model = network().train()
    expected = copy.deepcopy(model)
    compiled(model, "aot_eager")(X).square().mean().backward()
    expected(X).square().mean().backward()
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-9, atol=1e-10)


def test_inductor_makes_one_convolution_of_a_chain() -> None:
    """Plain Inductor leaves three; ours folds the composition away when it freezes."""
    model = nn.Sequential(nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 3), nn.Conv2d(12, 4, 1)).eval()
    x, counts = X.float(), {}
    with torch.no_grad(), fresh_cache():
        for name, backend, frozen in (
            ("plain", "inductor", False),
            ("ours", "fxexpand", False),
            ("frozen", "fxexpand", True),
        ):
            torch._dynamo.reset()
            with torch._inductor.config.patch(freezing=frozen):
                found, (code, *_) = run_and_get_code(torch.compile(model, backend=backend, fullgraph=True), x)
            assert torch.allclose(found, model(x), rtol=1e-5, atol=1e-5)
            counts[name] = _calls(code)
    assert counts == {"plain": (3, 0), "ours": (1, 2), "frozen": (1, 0)}


def _calls(code: str) -> tuple[int, int]:
    """The convolutions and the matrix products that generated code calls."""
    convolutions = re.findall(r"= (?:extern_kernels\.convolution|torch\.ops\.mkldnn\._convolution\w*\.default)\(", code)
    return len(convolutions), len(re.findall(r"extern_kernels\.(?:mm|addmm|bmm)\(", code))


def test_it_is_found_by_name() -> None:
    assert "fxexpand" in torch.compiler.list_backends()


@pytest.mark.parametrize("inner", ["fxexpand", "no such backend", 3])
def test_what_is_no_backend(inner: object) -> None:
    with pytest.raises(Exception, match="name another backend") as caught:
        compiled(network(), inner)(X)
    assert isinstance(caught.value.__cause__ or caught.value, FxExpandError) or "FxExpandError" in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"options": {"bakend": "eager"}}, "found 'bakend'. Did you mean 'backend'?"),
        ({"options": {"freezin": True}}, "found 'freezin'. Did you mean 'freezing'?"),
        ({"mode": "max-autotun"}, "expected mode to be one of default, .*, found 'max-autotun'"),
    ],
)
def test_what_inductor_does_not_know(given: dict[str, Any], message: str) -> None:
    torch._dynamo.reset()
    with pytest.raises(Exception, match=message) as caught:
        torch.compile(network(), backend="fxexpand", **given)(X)
    assert isinstance(caught.value.__cause__ or caught.value, FxExpandError) or "FxExpandError" in str(caught.value)


def test_second_derivatives_and_inference_mode() -> None:
    """With a backend that takes them; Inductor takes no second derivatives of anything."""
    model, results = network().train(), []
    for run in (model, compiled(model)):
        x = X.clone().requires_grad_()
        (first_order,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
        penalty = first_order.square().sum()
        results.append(torch.autograd.grad(penalty, list(model.parameters()), materialize_grads=True))
    theirs, ours = (torch.cat([gradient.flatten() for gradient in gradients]) for gradients in results)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-10
    with torch.inference_mode():
        assert torch.allclose(compiled(model.eval())(X), model(X), rtol=1e-10, atol=1e-10)
