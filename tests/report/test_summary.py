import copy
import math
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxexpand.errors import FxExpandError
from fxexpand.report.summary import Row, Summary, summary

torchvision = pytest.importorskip("torchvision")


def rows(found: Summary) -> dict[str, Row]:
    return {row.path: row for row in found.rows}


class Functional(nn.Module):
    """A convolution and a product of the root's own, around a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 2, 3, 3))
        self.layer = nn.Conv2d(6, 4, 1, bias=False)

    def forward(self, x: Tensor) -> Any:
        y = F.conv2d(x, self.weight, stride=2, groups=2)
        return self.layer(y).flatten(2) @ torch.ones(9, 5)


class Attention(nn.Module):
    """Owns no parameter, but multiplies."""

    def forward(self, x: Tensor) -> Any:
        return (x @ x.transpose(1, 2)).softmax(-1) @ x


class Noisy(nn.Module):
    """Everything that one forward can leave behind in a model."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.layer = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Any:
        x += 1
        self.calls += 1
        return self.layer(self.norm(x)) + torch.randn(4)


# --- MACs, against figures worked out by hand ---


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        (nn.Conv2d(4, 6, 3), (2, 4, 8, 8), 2 * 6 * 6 * 6 * 4 * 9),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (1, 4, 8, 8), 4 * 4 * 6 * 2 * 9),
        (nn.Conv2d(4, 4, (3, 1), groups=4, dilation=2), (1, 4, 8, 8), 4 * 8 * 4 * 3),
        (nn.Conv1d(3, 5, 4), (2, 3, 9), 2 * 6 * 5 * 3 * 4),
        (nn.Conv3d(1, 2, 3), (1, 1, 4, 4, 4), 2 * 2 * 2 * 2 * 27),
        (nn.ConvTranspose2d(3, 4, 3), (1, 3, 8, 8), 8 * 8 * 3 * 4 * 9),
        (nn.Linear(8, 3), (2, 5, 8), 2 * 5 * 8 * 3),
        (nn.Linear(8, 3, bias=False), (8,), 8 * 3),
        (nn.LSTM(8, 3, num_layers=2, bidirectional=True), (5, 2, 8), 5 * 2 * 2 * 4 * 3 * ((8 + 3) + (6 + 3))),
        (nn.GRU(8, 3), (5, 2, 8), 5 * 2 * 3 * 3 * (8 + 3)),
        (nn.BatchNorm2d(3), (2, 3, 4, 4), 0),
        (nn.ReLU(), (2, 3), 0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_macs_of_a_layer(layer: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    found = summary(layer, torch.randn(shape))
    assert found.macs == macs
    assert found.parameters == sum(parameter.numel() for parameter in layer.parameters())


def test_macs_of_products_with_a_vector() -> None:
    class Products(nn.Module):
        def forward(self, matrix: Tensor, vector: Tensor, batch: Tensor) -> tuple[Tensor, ...]:
            return (
                matrix @ vector,  # 3·5
                torch.addmv(matrix[:, 0], matrix, vector),  # 3·5
                vector.dot(vector),  # 5
                torch.addbmm(matrix[:, :2], batch, batch.transpose(1, 2)[..., :2]),  # 7·3·4·2
            )

    assert summary(Products(), torch.randn(3, 5), torch.randn(5), torch.randn(7, 3, 4)).macs == 15 + 15 + 5 + 168


def test_macs_of_a_bilinear_layer() -> None:
    assert summary(nn.Bilinear(3, 4, 5), torch.randn(2, 6, 3), torch.randn(2, 6, 4)).macs == 12 * 3 * 4 * 5


def test_work_that_no_submodule_accounts_for_has_a_row() -> None:
    found = summary(Functional(), torch.randn(1, 4, 8, 8))
    own = 3 * 3 * 6 * 2 * 9 + 4 * 9 * 5
    assert [(row.path, row.kind, row.parameters, row.macs) for row in found.rows] == [
        ("", "Functional", 6 * 2 * 9, own),
        ("layer", "Conv2d", 24, 3 * 3 * 4 * 6),
    ]
    assert (found.parameters, found.macs) == (132, own + 216)


def test_a_module_without_parameters_that_multiplies_has_a_row_when_run() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Attention(), nn.ReLU())
    assert [row.path for row in summary(model).rows] == ["0"]
    found = summary(model, torch.randn(2, 3, 4))
    assert [(row.path, row.macs) for row in found.rows] == [("0", 2 * 3 * 4 * 4), ("1", 2 * 2 * 3 * 3 * 4)]


@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_is_counted_through_its_fast_path(need_weights: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Any:
            return self.attention(x, x, x, need_weights=need_weights)[0]

    found = summary(Model().eval(), torch.randn(3, 5, 8))
    assert found.macs == 3 * (4 * 5 * 8 * 8 + 2 * 5 * 5 * 8)  # q, k, v and the output; scores and values
    assert rows(found)["attention"].macs == found.macs  # out_proj lends its weight and is not called
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_transformer_layer_counts_every_linear() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    found = rows(summary(layer.eval(), torch.randn(3, 5, 8)))
    assert (found["linear1"].macs, found["linear2"].macs) == (3 * 5 * 8 * 16, 3 * 5 * 16 * 8)


def test_both_calls_of_a_module_count() -> None:
    layer = nn.Linear(4, 4)
    found = summary(nn.Sequential(layer, nn.ReLU(), layer), torch.randn(3, 4))
    assert [(row.path, row.parameters, row.macs) for row in found.rows] == [("0", 20, 2 * 3 * 16)]
    assert (found.parameters, found.macs) == (20, 96)


def test_modules_of_one_class_outside_each_other_are_told_apart() -> None:
    """The counter's own names go by class: here the root, a layer that is hidden from it, and a child collide."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.Linear = nn.Linear(4, 3)
            self.hidden = [nn.Linear(3, 2)]

        def forward(self, x: Tensor) -> Any:
            return self.hidden[0](self.Linear(x))

    found = summary(Linear(), torch.randn(5, 4))
    assert found.rows == (Row("Linear", "", 0, 5 * 6), Row("Linear", "Linear", 15, 5 * 12))


def test_a_module_that_fails_inside_a_forward_does_not_shift_the_count() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Any:
            raise ZeroDivisionError

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Fails(), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Any:
            try:
                return self.first(x)
            except ZeroDivisionError:
                return self.second(x) @ torch.ones(3, 2)

    found = rows(summary(Model(), torch.randn(5, 4)))
    assert {path: row.macs for path, row in found.items()} == {"": 30, "second": 60}


def test_the_work_of_a_forward_hook_counts() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    model.register_forward_hook(lambda module, args, output: output @ torch.ones(3, 2))
    assert [(row.path, row.macs) for row in summary(model, torch.randn(5, 4)).rows] == [("", 30), ("0", 60)]


def test_a_traced_model_counts_like_its_original() -> None:
    model, x = Functional(), torch.randn(1, 4, 8, 8)
    assert summary(fx.symbolic_trace(model), x).rows == summary(model, x).rows


# --- whole networks ---


def layer_macs(model: nn.Module, x: Tensor) -> int:
    """The oracle: outputs × weights per output, over every convolution and linear layer that runs."""
    total = 0

    def count(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        nonlocal total
        assert isinstance(module.weight, Tensor)
        total += output.numel() * math.prod(module.weight.shape[1:])

    handles = [
        module.register_forward_hook(count) for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return total


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "shufflenet_v2_x0_5"])
def test_a_network_counts_what_its_layers_do(name: str) -> None:
    model, x = torchvision.models.get_model(name).eval(), torch.randn(2, 3, 64, 64)
    found = summary(model, x)
    assert found.macs == layer_macs(model, x)
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.macs == sum(row.macs or 0 for row in found.rows)
    assert found.parameters == sum(row.parameters for row in found.rows)
    order = [path for path, _ in model.named_modules()]
    assert [order.index(row.path) for row in found.rows] == sorted(order.index(row.path) for row in found.rows)


def test_resnet18_on_the_meta_device_at_the_published_size() -> None:
    with torch.device("meta"):
        model, x = torchvision.models.resnet18(), torch.empty(1, 3, 224, 224)
    found = summary(model, x)
    # 1.814 GMACs and 11,689,512 parameters: torchvision's documentation of the weights
    assert (found.macs, found.parameters) == (1_814_073_344, 11_689_512)


def test_the_dtype_changes_nothing() -> None:
    model, x = torchvision.models.resnet18().eval(), torch.randn(1, 3, 64, 64)
    single = summary(model, x)
    assert summary(model.double(), x.double()) == single


# --- parameters ---


def test_without_inputs_only_parameters_are_counted() -> None:
    found = summary(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Linear(4, 5)))
    assert [(row.path, row.kind, row.parameters, row.macs) for row in found.rows] == [
        ("0", "Conv2d", 2 * 3 * 9 + 3, None),
        ("1", "BatchNorm2d", 6, None),
        ("3", "Linear", 25, None),
    ]
    assert (found.parameters, found.macs) == (57 + 6 + 25, None)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Embedding(7, 3)
        self.decoder = nn.Linear(3, 7)
        self.decoder.weight = self.encoder.weight

    def forward(self, ids: Tensor) -> Any:
        return self.decoder(self.encoder(ids))


def test_a_tied_weight_counts_once_and_is_noted() -> None:
    found = summary(Tied(), torch.tensor([1, 2]))
    assert found.rows == (
        Row("Embedding", "encoder", 21, 0),
        Row("Linear", "decoder", 7, 2 * 21, ("weight = encoder.weight",)),
    )
    assert (found.parameters, found.macs) == (28, 42)


def test_a_weight_under_two_names_in_one_module_counts_once() -> None:
    model = nn.Linear(3, 3, bias=False)
    model.alias = model.weight
    assert summary(model).rows == (Row("Linear", "", 9, None, ("alias = weight",)),)


def test_a_module_under_two_names_is_shown_once() -> None:
    layer = nn.Linear(3, 3)
    model = nn.ModuleDict(OrderedDict(a=layer, b=nn.Sequential(layer)))
    assert [(row.path, row.parameters) for row in summary(model).rows] == [("a", 12)]


def test_a_frozen_parameter_counts_and_a_buffer_does_not() -> None:
    model = nn.BatchNorm1d(5)
    model.requires_grad_(False)
    assert summary(model).parameters == 10


def test_a_model_without_anything() -> None:
    assert summary(nn.ReLU()) == Summary((), 0, None)
    assert summary(nn.ReLU(), torch.ones(1)) == Summary((), 0, 0)


# --- the table ---


def test_the_table() -> None:
    model = nn.Sequential(OrderedDict(first=nn.Linear(1000, 64), second=nn.Linear(64, 10)))
    text = str(summary(model, torch.randn(100, 1000)))
    assert text.splitlines() == [
        "layer   class   parameters       MACs",
        "-------------------------------------",
        "first   Linear      64,064  6,400,000",
        "second  Linear         650     64,000",
        "-------------------------------------",
        "total               64,714  6,464,000",
    ]


def test_the_table_without_macs_has_no_such_column() -> None:
    assert str(summary(nn.Linear(40, 50))).splitlines() == [
        "layer    class   parameters",
        "---------------------------",
        "(model)  Linear       2,050",
        "---------------------------",
        "total                 2,050",
    ]


def test_the_table_notes_tied_weights() -> None:
    lines = str(summary(Tied(), torch.tensor([1]))).splitlines()
    assert lines[3].endswith("  tied: weight = encoder.weight")
    assert len({len(line) for line in (lines[0], lines[2], lines[5])}) == 1  # the columns stay aligned


# --- the model is left as it was ---


def test_summary_leaves_no_trace() -> None:
    model, x = Noisy().train(), torch.zeros(3, 4)
    model.layer.eval()
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    summary(model, x)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(x, torch.zeros(3, 4))
    assert (model.training, model.norm.training, model.layer.training) == (True, True, False)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert summary(model, x) == summary(model, x)


def test_a_model_made_in_inference_mode() -> None:
    """Its tensors have no version to tell whether they were written to, and cannot be written to."""
    with torch.inference_mode():
        model = nn.BatchNorm1d(4)
    assert summary(model, torch.randn(2, 4)) == Summary((Row("BatchNorm1d", "", 8, 0),), 8, 0)


@pytest.fixture
def _global_hooks() -> Iterator[None]:
    hooks = torch.nn.modules.module
    before = [dict(table) for table in (hooks._global_forward_hooks, hooks._global_forward_pre_hooks)]
    yield
    assert before == [dict(table) for table in (hooks._global_forward_hooks, hooks._global_forward_pre_hooks)]


@pytest.mark.usefixtures("_global_hooks")
@pytest.mark.parametrize("fast", [True, False])
def test_an_exception_of_the_model_passes_unchanged_and_all_is_restored(fast: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Conv2d(1, 1, 3)).train()
    model[1].eval()
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        with pytest.raises(RuntimeError, match="Expected 3D"):
            summary(model, torch.randn(2, 4))
        assert torch.backends.mha.get_fastpath_enabled() is fast
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert torch.is_grad_enabled()
    assert model[0](torch.randn(2, 4)).requires_grad


# --- arguments ---


@pytest.mark.parametrize(("bad", "found"), [(None, "NoneType"), (nn.Linear, "the class Linear")])
def test_what_is_no_module_is_refused(bad: Any, found: str) -> None:
    with pytest.raises(FxExpandError, match=rf"summary: expected a torch\.nn\.Module, found {found}\. Pass"):
        summary(bad)


@pytest.mark.parametrize("inputs", [(), (torch.ones(2, 3),)])
@pytest.mark.parametrize(
    ("lazy", "path"), [(nn.LazyLinear(3), r"1\.weight"), (nn.LazyBatchNorm1d(affine=False), r"1\.running_mean")]
)
def test_a_lazy_model_is_refused_and_stays_lazy(lazy: Any, path: str, inputs: tuple[Tensor, ...]) -> None:
    model = nn.Sequential(nn.ReLU(), lazy)
    with pytest.raises(FxExpandError, match=rf"summary: {path} in Sequential: expected .* Run the model once"):
        summary(model, *inputs)
    assert lazy.has_uninitialized_params()
