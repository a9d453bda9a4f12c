import pytest
import torch

from fxexpand.demo.data import CLASSES, IMAGES, digits, split


def test_digits_are_32_by_32_with_three_equal_channels() -> None:
    images, labels = digits()
    assert images.shape == (IMAGES, 3, 32, 32)
    assert images.dtype == torch.float32
    assert (images.min().item(), images.max().item()) == (0.0, 1.0)
    assert torch.equal(images[:, 0], images[:, 2])
    assert labels.shape == (IMAGES,)
    assert labels.unique().tolist() == list(range(CLASSES))


def test_a_split_shares_no_image_and_loses_none() -> None:
    # Each image is its own number, so that the parts can be told apart exactly after standardising.
    labels = digits()[1]
    numbers = torch.arange(IMAGES, dtype=torch.float32).reshape(-1, 1, 1, 1)
    part = split(numbers, labels, train_size=300, seed=3)
    ranks = torch.cat([part.train_images, part.test_images]).flatten().argsort().argsort()
    assert len(part.train_labels) == 300
    assert sorted(ranks.tolist()) == list(range(IMAGES))
    assert torch.equal(torch.cat([part.train_labels, part.test_labels]), labels[ranks])


def test_a_split_is_stratified() -> None:
    images, labels = digits()
    part = split(images, labels, train_size=300, seed=0)
    shares = part.train_labels.bincount() / 300
    assert (shares - labels.bincount() / IMAGES).abs().max() < 1 / 300


def test_equal_seeds_give_equal_splits_and_others_do_not() -> None:
    images, labels = digits()
    first, again, other = (split(images, labels, train_size=50, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.train_images, again.train_images)
    assert torch.equal(first.test_labels, again.test_labels)
    assert not torch.equal(first.train_images, other.train_images)


def test_images_are_standardised_with_the_training_images_alone() -> None:
    images, labels = digits()
    part = split(images, labels, train_size=100, seed=0)
    assert part.train_images.mean().item() == pytest.approx(0, abs=1e-5)
    assert part.train_images.std().item() == pytest.approx(1, abs=1e-5)
    assert abs(part.test_images.mean().item()) > 1e-4


@pytest.mark.parametrize("train_size", [CLASSES - 1, IMAGES - CLASSES + 1])
def test_a_part_without_an_image_of_each_class_is_refused(train_size: int) -> None:
    with pytest.raises(ValueError, match="classes"):
        split(*digits(), train_size=train_size, seed=0)
