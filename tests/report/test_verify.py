import copy
import math
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from fxexpand.errors import FxExpandError, VerificationError
from fxexpand.report.verify import DEFAULT_RTOL, relative_error, verify

X = torch.linspace(-1, 2, 12, dtype=torch.float64).reshape(3, 4)
Pair = namedtuple("Pair", ["left", "right"])


class Fn(nn.Module):
    """A module that does what a function says, to one example input."""

    def __init__(self, function: Callable[[Any], object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: object) -> object:
        return self.function(x)


class Returns(nn.Module):
    """A module without inputs that returns one value."""

    def __init__(self, value: object) -> None:
        super().__init__()
        self.value = value

    def forward(self) -> object:
        return self.value


def of(value: object, other: object, rtol: float | None = None) -> float:
    return verify(Returns(value), Returns(other), rtol=rtol)


def net(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    layers = OrderedDict(
        conv=nn.Conv2d(2, 3, 3),
        norm=nn.BatchNorm2d(3),
        act=nn.ReLU(inplace=True),
        drop=nn.Dropout(0.5),
        flat=nn.Flatten(),
        head=nn.Linear(3 * 16, 5),
    )
    return nn.Sequential(layers).double()


def images() -> Tensor:
    return torch.randn(2, 2, 6, 6, dtype=torch.float64)


# --- the number ---


def test_equal_models_have_error_zero() -> None:
    model = net()
    assert verify(model, copy.deepcopy(model), images()) == 0.0


def test_the_error_is_that_of_the_formula() -> None:
    expected = math.sqrt(4 + 9) / math.sqrt(16 + 9)  # ‖(2, 3)‖ / ‖(4, 3)‖
    assert of(torch.tensor([4.0, 3.0]), torch.tensor([6.0, 0.0]), rtol=1.0) == pytest.approx(expected, rel=1e-15)
    assert of(torch.tensor([4.0 + 3.0j]), torch.tensor([6.0 + 0.0j]), rtol=1.0) == pytest.approx(expected, rel=1e-15)


def test_a_lazily_conjugated_tensor_is_compared_by_value() -> None:
    z = torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex128)
    assert relative_error(z.conj(), z.conj().resolve_conj()) == 0.0
    assert of(z.conj(), z, rtol=2.0) > 0.1


def test_the_largest_error_over_the_outputs_counts() -> None:
    one = torch.ones(2, dtype=torch.float64)
    for order in ([1.0, 1.25, 1.125], [1.25, 1.0, 1.125], [1.125, 1.0, 1.25]):
        assert of([one, one, one], [one * factor for factor in order], rtol=0.5) == 0.25


def test_the_error_is_taken_in_float64() -> None:
    before = torch.ones(2, dtype=torch.float32)
    after = before.double() * (1 + 1e-10)  # rounds to 1 in float32
    assert of(before, after) == pytest.approx(1e-10, rel=1e-5)


@given(st.integers(-300, 300), st.lists(st.floats(-1, 1).filter(lambda v: abs(v) > 1e-3), min_size=1, max_size=5))
def test_the_error_does_not_depend_on_the_scale(exponent: int, values: list[float]) -> None:
    before = torch.tensor(values, dtype=torch.float64) * 10.0**exponent
    assert relative_error(before, before * 1.5) == pytest.approx(0.5, rel=1e-12)


def test_the_error_at_the_ends_of_the_range() -> None:
    largest = torch.tensor([1.7e308, -1.7e308] * 50, dtype=torch.float64)
    assert relative_error(largest, -largest) == 2.0
    smallest = torch.tensor([5e-324], dtype=torch.float64)
    assert relative_error(smallest, 3 * smallest) == 2.0


def test_zeros() -> None:
    zero, tiny = torch.zeros(3), torch.full((3,), 1e-30)
    assert of(zero, zero.clone()) == 0.0
    assert of(torch.zeros(0), torch.zeros(0)) == 0.0
    assert of(tiny, zero, rtol=1.0) == pytest.approx(1.0)
    with pytest.raises(VerificationError, match=r"output: expected a relative error .* found inf"):
        of(zero, tiny, rtol=1e300)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_equal_at_the_same_places_only(bad: float) -> None:
    before = torch.tensor([1.0, bad, 2.0])
    assert of(before, before.clone()) == 0.0
    assert of(before, torch.tensor([1.5, bad, 2.0]), rtol=1.0) == pytest.approx(0.5 / math.sqrt(5))
    for after in (
        [bad, 1.0, 2.0],
        [1.0, 1.0, 2.0],
        [1.0, bad, bad],
        [1.0, math.inf if bad != math.inf else math.nan, 2.0],
    ):
        with pytest.raises(VerificationError, match="found inf"):
            of(before, torch.tensor(after), rtol=1e300)


def test_a_complex_nan_is_not_a_complex_infinity() -> None:
    assert of(torch.tensor([complex(math.nan, 1), 2j]), torch.tensor([complex(math.nan, 1), 2j])) == 0.0
    with pytest.raises(VerificationError, match="found inf"):
        of(torch.tensor([complex(math.nan, 1)]), torch.tensor([complex(math.inf, 1)]))


# --- the tolerance ---


@pytest.mark.parametrize("dtype", [*DEFAULT_RTOL, torch.complex64, torch.complex128])
def test_the_default_tolerance_goes_by_dtype(dtype: torch.dtype) -> None:
    limit = DEFAULT_RTOL[dtype.to_real()]
    before = torch.ones(4, dtype=dtype)
    assert 0 < of(before, before * (1 + limit / 1.5)) <= limit
    with pytest.raises(VerificationError, match=f"rtol={limit:g}, found"):
        of(before, before * (1 + limit * 1.5))


def test_the_coarsest_dtype_of_either_model_sets_the_tolerance() -> None:
    fine, coarse = torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.float16)
    off = fine * 1.005
    assert of([fine, fine], [off, coarse]) == pytest.approx(0.005)
    assert of([coarse, fine], [fine, off]) == pytest.approx(0.005)
    with pytest.raises(VerificationError, match="rtol=1e-10"):
        of([fine, fine], [off, fine])


def test_rtol_overrides_the_default() -> None:
    one = torch.ones(2, dtype=torch.float64)
    assert of(one, one * 1.25, rtol=0.25) == 0.25
    with pytest.raises(VerificationError, match=r"rtol=0\.2, found 2\.50e-01"):
        of(one, one * 1.25, rtol=0.2)
    with pytest.raises(VerificationError, match="compare in float64 or pass a larger rtol"):
        of(one, one * 1.25, rtol=0.2)
    with pytest.raises(VerificationError, match="rtol=0, found"):
        of(one, one * (1 + 1e-15), rtol=0)


@pytest.mark.parametrize("rtol", [-1e-9, math.nan])
def test_a_tolerance_must_not_be_negative(rtol: float) -> None:
    with pytest.raises(VerificationError, match="expected rtol >= 0, found"):
        of(torch.ones(1), torch.ones(1), rtol=rtol)


def test_a_dtype_without_a_default_needs_rtol() -> None:
    value = torch.ones(2).to(torch.float8_e4m3fn)
    with pytest.raises(VerificationError, match=r"found torch\.float8_e4m3fn\. Pass rtol"):
        of(value, value)
    assert of(value, value, rtol=0.1) == 0.0


# --- what else is returned ---


def test_a_mapping_is_its_keys_whatever_class_and_order() -> None:
    one, two = torch.ones(1), torch.full((1,), 2.0)
    assert of(OrderedDict(a=one, b=two), {"b": two, "a": one}) == 0.0
    with pytest.raises(VerificationError, match=r"output\['b'\]: expected a relative error"):
        of(OrderedDict(a=one, b=two), {"b": one, "a": one})
    with pytest.raises(VerificationError, match=r"expected a mapping with keys \['a', 'b'\], found .* keys \['a'\]"):
        of({"a": one, "b": two}, {"a": one})


def test_a_mapping_that_pytree_does_not_know() -> None:
    class ModelOutput(OrderedDict[str, Tensor]):
        pass

    assert of(ModelOutput(logits=torch.ones(1)), {"logits": torch.ones(1)}) == 0.0
    with pytest.raises(VerificationError, match=r"output\['logits'\]"):
        of(ModelOutput(logits=torch.ones(1)), {"logits": torch.zeros(1)})


def test_dataclasses_are_compared_by_their_fields() -> None:
    @dataclass
    class Out:
        logits: Tensor
        extra: int = 1

    assert of(Out(torch.ones(2)), Out(torch.ones(2))) == 0.0
    with pytest.raises(VerificationError, match=r"output\.logits: expected a relative error"):
        of(Out(torch.ones(2)), Out(torch.zeros(2)))
    with pytest.raises(VerificationError, match=r"output\.extra: expected 1, found 2"):
        of(Out(torch.ones(2)), Out(torch.ones(2), 2))


def test_a_traced_list_equals_a_list() -> None:
    one = torch.ones(1)
    assert of([one, one], fx.immutable_collections.immutable_list([one, one])) == 0.0


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ([X, X], (X, X), "expected list of 2, found tuple of 2"),
        ([X, X], [X], "expected list of 2, found list of 1"),
        ([X], [X, X], "expected list of 1, found list of 2"),
        (Pair(X, X), (X, X), "expected Pair of 2, found tuple of 2"),
        ({"a": []}, {"a": ()}, r"output\['a'\]: expected list of 0, found tuple of 0"),
        ([X, [X]], [X, X], r"output\[1\]: expected list of 1, found a torch.float64 tensor"),
        (X, X[:2], r"expected a torch.float64 tensor of shape \(3, 4\), found .* shape \(2, 4\)"),
        (X, X[None], r"shape \(3, 4\), found .* shape \(1, 3, 4\)"),
        (X, X.to(torch.complex128), "float64 tensor .* found a torch.complex128"),
        (X.long(), X.long().double(), "int64 tensor .* found a torch.float64"),
        (X > 0, (X > 0).long(), "bool tensor .* found a torch.int64"),
        (X.long(), X.long() + (X > 1), r"expected equal integer tensors, found 4 of 12 elements different"),
        (X > 0, X > 1, r"expected equal boolean tensors, found 4 of 12 elements different"),
        ([X, 3], [X, 4], r"output\[1\]: expected 3, found 4"),
        ("cat", "dog", "expected 'cat', found 'dog'"),
        (None, X, "expected None, found a torch.float64"),
        (0.5, 0.5 + 1e-9, "expected 0.5, found 0.500000001"),
    ],
)
def test_a_mismatch_is_an_error_whatever_the_tolerance(before: object, after: object, message: str) -> None:
    with pytest.raises(VerificationError, match=f"{message}.*No tolerance covers this"):
        of(before, after, rtol=math.inf)


@pytest.mark.parametrize(
    "value", [X.long(), X > 0, 3, "cat", None, math.nan, (), {}, [X, (1, {"a": None})], Pair(X, 2), torch.Size([1, 2])]
)
def test_what_is_the_same_is_equal(value: object) -> None:
    assert of(value, copy.deepcopy(value)) == 0.0


def test_one_nan_that_is_no_tensor_equals_another() -> None:
    assert of(float("nan"), float("nan")) == 0.0
    with pytest.raises(VerificationError, match=r"expected nan, found 0\.0"):
        of(float("nan"), 0.0)


def test_integer_tensors_of_different_width_are_equal() -> None:
    assert of(torch.arange(5), torch.arange(5, dtype=torch.int32)) == 0.0
    wide, narrow = torch.tensor([1, 2, 2**32]), torch.tensor([1, 2, 0], dtype=torch.int32)  # equal in 32 bits
    for before, after in ((wide, narrow), (narrow, wide)):
        with pytest.raises(VerificationError, match="1 of 3 elements"):
            of(before, after)


def test_an_object_without_a_truth_value_is_a_mismatch_not_a_crash() -> None:
    class Array:
        def __eq__(self, other: object) -> bool:
            raise ValueError("the truth value is ambiguous")

        __hash__ = None  # type: ignore[assignment]

        def __repr__(self) -> str:
            return "Array"

    with pytest.raises(VerificationError, match="expected Array, found Array"):
        of(Array(), Array())


@pytest.mark.filterwarnings("ignore:.*are deprecated")
def test_sparse_and_quantized_tensors_are_compared_by_value() -> None:
    assert of(X.to_sparse(), X) == 0.0
    with pytest.raises(VerificationError, match="relative error"):
        of(X.to_sparse(), X * 2)
    quantized = torch.quantize_per_tensor(torch.ones(3), 0.5, 0, torch.quint8)
    assert of(quantized, torch.ones(3)) == 0.0


def test_outputs_that_share_memory_are_compared_as_they_were_returned() -> None:
    shared = torch.zeros(2)

    def write(value: float) -> Callable[[Tensor], object]:
        return lambda x: shared.fill_(value)

    with pytest.raises(VerificationError, match="relative error"):
        verify(Fn(write(1.0)), Fn(write(2.0)), X)


# --- how the models are run ---


def test_it_runs_in_eval_mode_without_gradients_and_restores_each_flag() -> None:
    model = net().train()
    model.norm.eval()
    other = copy.deepcopy(model).train()
    flags = [module.training for module in model.modules()]
    seen: list[tuple[bool, bool]] = []
    model.register_forward_hook(
        lambda *_: seen.append((any(m.training for m in model.modules()), torch.is_grad_enabled()))
    )
    state = copy.deepcopy(model.state_dict())
    assert verify(model, other, images()) == 0.0  # in train mode dropout alone would make them differ
    assert seen == [(False, False)]
    assert [module.training for module in model.modules()] == flags
    assert all(module.training for module in other.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_model_with_an_eval_of_its_own_is_not_told() -> None:
    class Merging(nn.Linear):
        def train(self, mode: bool = True) -> "Merging":  # as adapters do: they merge on the way to eval
            if not mode:
                raise AssertionError("eval() was called")
            return self

    model = Merging(4, 2).double()
    assert verify(model, copy.deepcopy(model), X) == 0.0
    assert model.training


class Boom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4).double()
        self.error = ZeroDivisionError("mine")

    def forward(self, x: Tensor) -> Any:
        self.inner(x)
        raise self.error


@pytest.mark.parametrize("first", [True, False])
def test_an_exception_of_a_model_passes_unchanged_and_flags_come_back(first: bool) -> None:
    boom, fine = Boom().train(), nn.Linear(4, 4).double().train()
    boom.inner.eval()
    with pytest.raises(ZeroDivisionError) as caught:
        verify(*((boom, fine) if first else (fine, boom)), X)
    assert caught.value is boom.error
    assert boom.training
    assert not boom.inner.training
    assert fine.training
    assert torch.is_grad_enabled()


def test_a_model_may_write_to_its_inputs() -> None:
    def consume(batch: list[dict[str, Tensor]]) -> list[Tensor]:
        return [image["x"].mul_(2).add_(1) for image in batch]

    batch = [{"x": X.clone()}, {"x": X.clone() + 1}]
    assert verify(Fn(consume), Fn(lambda batch: [2 * image["x"] + 1 for image in batch]), batch) == 0.0
    assert verify(Fn(lambda batch: [2 * image["x"] + 1 for image in batch]), Fn(consume), batch) == 0.0
    assert torch.equal(batch[0]["x"], X)

    def pop(batch: list[dict[str, Tensor]]) -> Tensor:
        return batch.pop()["x"]

    assert verify(Fn(pop), Fn(pop), batch) == 0.0
    assert len(batch) == 2


def test_inputs_that_are_no_containers_are_copied_too() -> None:
    class Box:
        def __init__(self, x: Tensor) -> None:
            self.x = x

    box = Box(X.clone())
    assert verify(Fn(lambda box: box.x.add_(1)), Fn(lambda box: box.x + 1), box) == 0.0
    assert torch.equal(box.x, X)


def test_an_input_that_cannot_be_copied_is_named() -> None:
    def stream() -> Iterator[int]:
        yield 1

    with pytest.raises(FxExpandError, match=r"example inputs: expected tensors.*found generator"):
        verify(Fn(lambda x: X), Fn(lambda x: X), stream())


def test_inputs_keep_requires_grad() -> None:
    def gradient(x: Tensor) -> Tensor:
        with torch.enable_grad():
            return torch.autograd.grad((x**3).sum(), x)[0]

    x = X.clone().requires_grad_()
    assert verify(Fn(gradient), Fn(lambda x: 3 * x**2), x) < 1e-15
    assert x.grad is None

    class Weighted(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return gradient(x) * self.weight

    model = Weighted(4, 1).double()
    assert verify(model, copy.deepcopy(model).float(), x) < 1e-6  # the inputs are cast as well


def test_both_draw_the_same_random_numbers_and_the_caller_notices_nothing() -> None:
    state = torch.get_rng_state()
    assert verify(Fn(lambda x: x + torch.randn(4)), Fn(lambda x: x + torch.randn(4)), X) == 0.0
    assert torch.equal(torch.get_rng_state(), state)


def test_buffers_come_back() -> None:
    class Counting(nn.Module):
        count: Tensor
        last: Tensor
        fixed: Tensor

        def __init__(self, step: int) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))
            self.register_buffer("last", torch.zeros(3, 4))
            self.register_buffer("fixed", torch.ones(()))
            self.step = step

        def forward(self, x: Tensor) -> Any:
            self.count += self.step
            self.last = x
            return x

    before, after = Counting(1), Counting(2)
    held, version = before.last, before.fixed._version
    assert verify(before, after, X) == 0.0
    assert before.count == after.count == 0
    assert before.last is held
    assert before.fixed._version == version  # a graph that saved it may still run backward


def test_models_without_inputs() -> None:
    assert of(X, X.clone()) == 0.0


def test_each_model_gets_the_inputs_in_its_own_dtype() -> None:
    model = net()
    single = copy.deepcopy(model).float()
    for inputs in (images(), images().float()):
        for before, after in ((model, single), (single, model)):
            assert 0 < verify(before, after, inputs) < 1e-6


def test_the_dtype_of_a_model_without_parameters_is_that_of_its_buffers() -> None:
    class Constant(nn.Module):
        weight: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.randn(4, 4, dtype=torch.float64))

        def forward(self, x: Tensor) -> Any:
            return x @ self.weight

    model = Constant()
    assert 0 < verify(model, copy.deepcopy(model).float(), X) < 1e-6


def test_token_ids_stay_integers() -> None:
    model = nn.Embedding(7, 3).double()
    assert verify(model, copy.deepcopy(model).float(), torch.arange(7)) < 1e-7


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_models_on_different_devices() -> None:
    model = net()
    there = copy.deepcopy(model).to("cuda")
    cpu, cuda = torch.get_rng_state(), torch.cuda.get_rng_state()
    assert verify(model, there, images()) < 1e-12
    noisy = nn.Sequential(there, Fn(lambda x: x + torch.randn_like(x)))
    assert verify(noisy, copy.deepcopy(noisy), images().cuda()) == 0.0
    assert torch.equal(torch.cuda.get_rng_state(), cuda)
    assert not torch.equal(torch.get_rng_state(), cpu)  # images() drew


@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_torchscript() -> None:
    model = net().eval()
    traced = torch.jit.trace(model, images())
    assert verify(model, traced, images()) < 1e-12
    assert verify(torch.jit.freeze(traced), model, images()) < 1e-12
    for other in (torch.jit.trace(net(1).eval(), images()), torch.jit.script(net(1))):
        with pytest.raises(VerificationError, match="No layer that both models have differs"):  # they take no hooks
            verify(other, model, images())
    with pytest.raises(
        RuntimeError, match="missing value for argument"
    ):  # as the model says it, for want of a signature
        verify(traced, traced)


# --- the layer it names ---


def changed(model: nn.Module, path: str) -> Any:
    """A copy of `model` with every parameter below `path` moved."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.get_submodule(path).parameters():
            parameter.add_(0.5)
    return other


@pytest.mark.parametrize(("path", "kind"), [("conv", "Conv2d"), ("norm", "BatchNorm2d"), ("head", "Linear")])
def test_the_first_layer_that_differs_is_named_with_its_error(path: str, kind: str) -> None:
    model, x = net().eval(), images()
    other = changed(model, path)
    index = list(dict(model.named_children())).index(path) + 1
    expected, found = model[:index](x), other[:index](x)
    error = relative_error(expected.detach(), found.detach())
    overall = relative_error(model(x).detach(), other(x).detach())
    with pytest.raises(VerificationError) as caught:
        verify(model, other, x)
    message = str(caught.value)
    assert f"output: expected a relative error of at most rtol=1e-10, found {overall:.2e}." in message
    assert f"The first layer that differs is {path} ({kind}): relative error {error:.2e}." in message


def test_an_expanded_layer_is_seen_at_the_next_one_that_both_have() -> None:
    model = net().eval()
    other: Any = copy.deepcopy(model)
    other.conv = nn.Sequential(OrderedDict(expand=nn.Conv2d(2, 3, 3), reduce=nn.Conv2d(3, 3, 1))).double()

    with pytest.raises(VerificationError, match=r"differs is norm \(BatchNorm2d\)"):
        verify(model, fx.symbolic_trace(other), images())  # in which `conv` only holds what is called


def test_a_writing_activation_does_not_hide_the_layer_before_it() -> None:
    """The first layers differ only where ReLU, which overwrites what they returned, makes 0 of both."""
    before: Any = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(inplace=True), nn.Linear(4, 1)).double()
    after = copy.deepcopy(before)
    with torch.no_grad():
        before[0].weight.copy_(-torch.eye(4))
        after[0].weight.copy_(-2 * torch.eye(4))
        after[2].bias += 1
    with pytest.raises(VerificationError, match=r"differs is 0 \(Linear\)"):
        verify(before, after, X.abs())


def test_the_order_is_that_of_execution() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.second = nn.Linear(4, 4)
            self.first = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Any:
            return self.second(self.first(x))

    model = Backwards().double()
    with pytest.raises(VerificationError, match=r"differs is first \(Linear\)"):
        verify(model, changed(changed(model, "second"), "first"), X)


def test_the_innermost_module_is_named_with_its_whole_path() -> None:
    model = nn.Sequential(OrderedDict(body=nn.Sequential(net()[:4], net()[4:]))).double()
    with pytest.raises(VerificationError, match=r"differs is body\.1\.head \(Linear\)"):
        verify(model, changed(model, "body.1.head"), images())


def test_a_layer_called_twice_is_compared_call_by_call() -> None:
    class Twice(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor
            self.layer = nn.Linear(4, 4, bias=False).double()
            nn.init.eye_(self.layer.weight)

        def forward(self, x: Tensor) -> Any:
            return self.layer(x) + self.layer(self.factor * x)  # the first calls agree, the second ones do not

    with pytest.raises(VerificationError, match=r"differs is layer \(Linear\): relative error 5\.00e-01"):
        verify(Twice(2.0), Twice(3.0), X)


def test_a_layer_that_one_model_calls_more_often_is_no_crash() -> None:
    class Times(nn.Module):
        def __init__(self, times: int) -> None:
            super().__init__()
            self.times = times
            self.layer = nn.Identity()

        def forward(self, x: Tensor) -> Any:
            return sum((self.layer(x) for _ in range(self.times)), torch.zeros(()))

    for times in ((1, 2), (2, 1), (0, 1), (1, 0)):
        with pytest.raises(VerificationError, match="No layer that both models have differs"):
            verify(*map(Times, times), X)


def test_a_layer_with_another_shape_is_named() -> None:
    before = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
    after = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2)).double()
    with pytest.raises(
        VerificationError, match=r"differs is 0 \(Linear\): expected a .*\(3, 3\), found a .*\(3, 5\)\."
    ):
        verify(before, after, X)


def test_no_common_layer_is_said() -> None:
    with pytest.raises(VerificationError, match="No layer that both models have differs"):
        verify(nn.Linear(4, 4).double(), nn.Linear(4, 4).double(), X)
    layer = nn.Linear(4, 4).double()
    with pytest.raises(VerificationError, match="No layer that both models have differs"):
        verify(nn.Sequential(layer), nn.Sequential(layer, nn.Tanh()), X)


def test_a_hook_that_one_model_lost_is_blamed_on_its_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double()
    other = copy.deepcopy(model)
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(VerificationError, match=r"differs is 0 \(Linear\)"):
        verify(model, other, X)


def test_an_opaque_object_between_layers_is_not_blamed() -> None:
    """A detection model's transform returns an object that is equal to no other."""

    class Wrap(nn.Module):
        def forward(self, x: Tensor) -> tuple[object, Tensor]:
            return object(), x

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transform = Wrap()
            self.layer = nn.Linear(4, 4).double()

        def forward(self, x: Tensor) -> Any:
            return self.layer(self.transform(x)[1])

    model = Model()
    with pytest.raises(VerificationError, match=r"differs is layer \(Linear\)"):
        verify(model, changed(model, "layer"), X)


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_hooks_are_removed_and_flags_restored_after_the_second_run() -> None:
    model = net().train()
    other = changed(model, "head")
    with pytest.raises(VerificationError):
        verify(model, other, images())
    assert hooks(model) == hooks(other) == 0
    assert all(module.training for module in [*model.modules(), *other.modules()])


def test_hooks_are_removed_when_the_second_run_fails() -> None:
    class Once(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4).double()
            self.calls = 0

        def forward(self, x: Tensor) -> Any:
            self.calls += 1
            if self.calls > 1:
                raise ZeroDivisionError
            return self.layer(x)

    model, other = Once(), Once()
    with pytest.raises(ZeroDivisionError):
        verify(model, other, X)
    assert hooks(model) == hooks(other) == 0
    assert model.layer.training
    assert other.layer.training


# --- a traced model, end to end ---


def test_a_traced_model_against_its_original() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net()

        def forward(self, x: Tensor) -> dict[str, object]:
            y = self.body(x)
            return OrderedDict(out=y, aux=[y + 1, y.argmax(1)])

    model = Model()
    traced = fx.symbolic_trace(model)
    assert verify(model, traced, images()) == 0.0
    with pytest.raises(VerificationError, match=r"differs is body\.norm \(BatchNorm2d\)"):
        verify(model, changed(traced, "body.norm"), images())


# --- arguments ---


@pytest.mark.parametrize(("bad", "found"), [(None, "NoneType"), (nn.Linear, "the class Linear"), ("x", "str")])
def test_what_is_no_module_is_refused(bad: Any, found: str) -> None:
    good = nn.Linear(4, 4).double()
    with pytest.raises(VerificationError, match=rf"verify: before: expected a torch\.nn\.Module, found {found}"):
        verify(bad, good, X)
    with pytest.raises(VerificationError, match=rf"verify: after: expected a torch\.nn\.Module, found {found}"):
        verify(good, bad, X)


def test_missing_inputs_are_asked_for() -> None:
    with pytest.raises(
        VerificationError, match=r"verify: before: expected example inputs for Linear\.forward, found none"
    ):
        verify(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(VerificationError, match=r"verify: after: expected example inputs for Linear\.forward"):
        verify(Returns(X), nn.Linear(4, 4))


def test_a_lazy_model_is_refused_and_stays_lazy() -> None:
    lazy = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(VerificationError, match=r"verify: after: 0\.weight .* Run the model once"):
        verify(nn.Linear(4, 3), lazy, X)
    assert isinstance(lazy[0], nn.LazyLinear)


def test_a_model_on_the_meta_device_is_refused() -> None:
    model = nn.Linear(4, 4, device="meta")
    with pytest.raises(VerificationError, match="output: expected a tensor with values, found one on the meta device"):
        verify(model, model, torch.empty(2, 4, device="meta"))
