import pytest
import torch

from fxexpand.demo.smallnet import SmallNet


@pytest.mark.parametrize(("classes", "thousands"), [(10, 66.19), (100, 72.04)])
def test_the_parameters_are_those_of_the_paper(classes: int, thousands: float) -> None:
    parameters = sum(parameter.numel() for parameter in SmallNet(classes).parameters())
    assert round(parameters / 1000, 2) == thousands


@pytest.mark.parametrize(("kernel_size", "features"), [(7, 32 * 4 * 4), (3, 32 * 2 * 2)])
def test_both_kernel_sizes_take_32_by_32_images(kernel_size: int, features: int) -> None:
    network = SmallNet(classes=5, kernel_size=kernel_size)
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    assert network.get_parameter("classifier.hidden.weight").shape == (64, features)


def test_the_layers_are_those_of_the_paper() -> None:
    network = SmallNet()
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items() if name.endswith("weight")}
    assert shapes == {
        "features.conv1.weight": (8, 3, 7, 7),
        "features.bn1.weight": (8,),
        "features.conv2.weight": (16, 8, 7, 7),
        "features.bn2.weight": (16,),
        "features.conv3.weight": (32, 16, 7, 7),
        "features.bn3.weight": (32,),
        "classifier.hidden.weight": (64, 512),
        "classifier.output.weight": (10, 64),
    }
    blocks = [type(layer).__name__ for layer in network.features]
    assert blocks == ["Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d"] * 3


@pytest.mark.parametrize(("classes", "kernel_size", "found"), [(10, 5, "found 5"), (0, 7, "found 0")])
def test_other_sizes_are_refused(classes: int, kernel_size: int, found: str) -> None:
    with pytest.raises(ValueError, match=found):
        SmallNet(classes, kernel_size)
