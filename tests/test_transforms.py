"""Boxes, masks and keypoints move together."""

import numpy as np
import pytest
import torch

import transforms
from masks import CroppedMasks


def example(rng, height=40, width=60, num_objects=4):
    """An image with objects whose boxes are their masks' own rectangles and whose keypoints lie inside."""
    image = torch.from_numpy(rng.integers(0, 256, (3, height, width), np.uint8))
    dense = torch.zeros((num_objects, height, width), dtype=torch.uint8)
    for mask in dense:
        x, y = int(rng.integers(0, width - 12)), int(rng.integers(0, height - 12))
        mask[y : y + int(rng.integers(6, 12)), x : x + int(rng.integers(6, 12))] = 1
    masks = CroppedMasks.from_dense(dense)
    boxes = masks.rects.float()
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    keypoints = torch.ones((num_objects, 17, 3))
    keypoints[..., :2] = middle[:, None] + torch.arange(17)[None, :, None] / 10
    keypoints[:, 3] = 0
    target = {
        "boxes": boxes,
        "labels": torch.arange(1, num_objects + 1),
        "masks": masks,
        "keypoints": keypoints,
        "image_id": 7,
    }
    return image, target


def test_flip_by_hand():
    # A frame of 1×4; a box over the first pixel goes to the last; keypoint 1 (left eye) becomes keypoint 2.
    image = torch.tensor([[[1, 2, 3, 4]]] * 3, dtype=torch.uint8)
    keypoints = torch.zeros((1, 17, 3))
    keypoints[0, 1] = torch.tensor([0.5, 0.25, 2])
    target = {
        "boxes": torch.tensor([[0.0, 0.0, 1.0, 1.0]]),
        "labels": torch.tensor([3]),
        "masks": CroppedMasks.from_dense(torch.tensor([[[1, 0, 0, 0]]], dtype=torch.uint8)),
        "keypoints": keypoints,
    }
    flipped, result = transforms.RandomHorizontalFlip(1.0)(image, target, np.random.default_rng(0))
    assert flipped[0].tolist() == [[4, 3, 2, 1]]
    assert result["boxes"].tolist() == [[3, 0, 4, 1]]
    assert result["masks"].dense().tolist() == [[[0, 0, 0, 1]]]
    assert result["keypoints"][0, 2].tolist() == [3.5, 0.25, 2]
    assert result["keypoints"].count_nonzero() == 3
    assert target["keypoints"][0, 1].tolist() == [0.5, 0.25, 2]  # what was given stays as it was


def test_flipping_twice_changes_nothing():
    rng = np.random.default_rng(1)
    image, target = example(rng)
    flip = transforms.RandomHorizontalFlip(1.0)
    twice, result = flip(*flip(image, target, rng), rng)
    assert torch.equal(twice, image)
    for name in ("boxes", "labels", "keypoints"):
        torch.testing.assert_close(result[name], target[name])
    assert torch.equal(result["masks"].dense(), target["masks"].dense())


def test_policies_by_name():
    rng = np.random.default_rng(2)
    image, target = example(rng)
    evaluation = transforms.build_transforms("hflip", training=False)
    assert evaluation(image, target, rng) == (image, target)
    dense = transforms.build_transforms("hflip", training=False, reference_ops=True)(image, target, rng)[1][
        "masks"
    ]
    assert dense.dtype == torch.uint8 and dense.shape == (4, 40, 60)
    with pytest.raises(ValueError, match="'flip' is unknown; choose one of none, hflip"):
        transforms.build_transforms("flip", training=True)
