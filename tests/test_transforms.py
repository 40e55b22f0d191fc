"""Image, boxes, masks and keypoints move together, through every policy."""

import numpy as np
import pytest
import torch

import transforms
from masks import CroppedMasks

COLOURS = torch.tensor([[250, 10, 10], [10, 250, 10], [10, 10, 250], [240, 240, 20]], dtype=torch.uint8)


def example(rng, height=60, width=90, num_objects=4):
    """A dark image with objects of one colour each, side by side; label n has COLOURS[n - 1].

    An object is a rectangle without its upper right quarter. Its box is its mask's rectangle; keypoints 1 and 2 (left
    and right eye) lie in the middle of its lower left and lower right quarter, the others are not labelled.
    """
    image = torch.full((3, height, width), 40, dtype=torch.uint8)
    dense = torch.zeros((num_objects, height, width), dtype=torch.uint8)
    keypoints = torch.zeros((num_objects, 17, 3))
    cell = width // num_objects
    for n in range(num_objects):
        w, h = 2 * int(rng.integers(4, cell // 2)), 2 * int(rng.integers(4, height // 2))
        x, y = n * cell + int(rng.integers(0, cell - w + 1)), int(rng.integers(0, height - h + 1))
        dense[n, y : y + h, x : x + w] = 1
        dense[n, y : y + h // 2, x + w // 2 : x + w] = 0
        keypoints[n, 1] = torch.tensor([x + w * 0.25, y + h * 0.75, 2])
        keypoints[n, 2] = torch.tensor([x + w * 0.75, y + h * 0.75, 1])
        image[:, dense[n] > 0] = COLOURS[n][:, None]
    masks = CroppedMasks.from_dense(dense)
    target = {
        "boxes": masks.rects.float(),
        "labels": torch.arange(1, num_objects + 1),
        "masks": masks,
        "keypoints": keypoints,
        "image_id": 7,
    }
    return image, target


def check_agreement(image, target, scale=1.0, colours=True, label_once=True, inside_from=1):
    """What must hold after any transform of an example. scale: how many pixels one of the example's may be now."""
    _, height, width = image.shape
    num_objects = len(target["boxes"])
    assert image.dtype == torch.uint8 and target["masks"].size == (height, width)
    assert len(target["labels"]) == len(target["masks"]) == len(target["keypoints"]) == num_objects
    assert target["labels"].dtype == torch.int64 and target["boxes"].dtype == torch.float32
    assert not label_once or len(set(target["labels"].tolist())) == num_objects
    boxes = target["boxes"]
    assert (boxes >= 0).all() and (boxes <= torch.tensor([width, height, width, height])).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    # The mask's own rectangle is the box, but for rounding to whole pixels of before and after.
    rects = target["masks"].rects
    if num_objects:
        assert (boxes - rects).abs().max() <= 1 + scale
    for n, mask in enumerate(target["masks"].dense()):
        if colours and mask.sum() >= 30:  # inside its mask an object has its own colour rather than another
            inside = image[:, mask > 0].float().median(dim=1).values
            assert (COLOURS.float() - inside).abs().sum(dim=1).argmin() == target["labels"][n] - 1
        for x, y, visible in target["keypoints"][n].tolist():
            if visible >= inside_from:
                x0, y0, x1, y1 = boxes[n].tolist()
                assert x0 - scale <= x <= x1 + scale and y0 - scale <= y <= y1 + scale
            elif visible == 0:
                assert x == y == 0
    assert target["image_id"] == 7


def apply_many(transform, trials=40, seed=0, **expectations):
    """Apply to examples; returns (image, target, image before, target before) of each."""
    rng = np.random.default_rng(seed)
    results = []
    for _ in range(trials):
        image, target = example(rng, int(rng.integers(40, 80)), int(rng.integers(60, 120)))
        before = {name: target[name].clone() for name in ("boxes", "keypoints")}
        new_image, new_target = transform(image, target, rng)
        for name, value in before.items():  # what was given stays as it was
            assert torch.equal(target[name], value)
        check_agreement(new_image, new_target, **expectations)
        results.append((new_image, new_target, image, target))
    return results


def test_the_example_agrees():
    check_agreement(*example(np.random.default_rng(0)))


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
    flip = transforms.RandomHorizontalFlip(1.0)
    for image, target, before, target_before in apply_many(flip):
        twice, result = flip(image, target, np.random.default_rng(0))
        assert torch.equal(twice, before) and not torch.equal(image, before)
        for name in ("boxes", "labels", "keypoints"):
            assert torch.equal(result[name], target_before[name])
        assert torch.equal(result["masks"].dense(), target_before["masks"].dense())


def test_flip_needs_the_sets_own_keypoints():
    image, target = example(np.random.default_rng(0))
    with pytest.raises(ValueError, match="objects have 17 keypoints, but keypoint_flip has 3"):
        transforms.RandomHorizontalFlip(1.0, [0, 2, 1])(image, target, np.random.default_rng(0))


def test_flip_with_probability():
    rng = np.random.default_rng(1)
    image, target = example(rng)
    flip = transforms.RandomHorizontalFlip(0.25)
    flipped = sum(not torch.equal(flip(image, target, rng)[0], image) for _ in range(400))
    assert 70 < flipped < 130  # 100 ± 3.5 standard deviations of 8.7


def test_resize_by_hand():
    # 2×2 -> 4×6: x times 3, y times 2.
    image = torch.zeros((3, 2, 2), dtype=torch.uint8)
    target = {
        "boxes": torch.tensor([[0.0, 1.0, 1.0, 2.0], [0.5, 0.0, 2.0, 1.5]]),
        "labels": torch.tensor([1, 2]),
        "masks": CroppedMasks.from_dense(
            torch.tensor([[[0, 0], [1, 0]], [[0, 1], [0, 0]]], dtype=torch.uint8)
        ),
        "keypoints": torch.tensor([[[1.0, 1.0, 2.0]], [[0.0, 0.0, 0.0]]]),
    }
    image, target = transforms.resize(image, target, 4, 6)
    assert image.shape == (3, 4, 6)
    assert target["boxes"].tolist() == [[0, 2, 3, 4], [1.5, 0, 6, 3]]
    assert target["masks"].rects.tolist() == [[0, 2, 3, 4], [3, 0, 6, 2]]
    assert target["keypoints"].tolist() == [[[3, 2, 2]], [[0, 0, 0]]]


def test_crop_by_hand():
    # Window x 2..6, y 0..4 of a frame of 4×8.
    dense = torch.zeros((4, 4, 8), dtype=torch.uint8)
    dense[0, 1:3, 3:5] = 1  # inside
    dense[1, 0:2, 0:4] = 1  # cut at the left
    dense[2, 2:4, 0:2] = 1  # outside
    dense[3, 3, 5:8] = 1  # cut at the right; its box is looser than its mask
    dense[3, 0, 7] = 1
    masks = CroppedMasks.from_dense(dense)
    boxes = masks.rects.float()
    assert boxes[3].tolist() == [5, 0, 8, 4]
    keypoints = torch.tensor([[[3.0, 1.5, 2.0]], [[1.0, 1.0, 2.0]], [[1.0, 3.0, 1.0]], [[0.0, 0.0, 0.0]]])
    target = {"boxes": boxes, "labels": torch.arange(4), "masks": masks, "keypoints": keypoints}
    image = torch.arange(8).expand(3, 4, 8).to(torch.uint8)
    image, result = transforms.crop(image, target, 2, 0, 6, 4)
    assert image[0, 0].tolist() == [2, 3, 4, 5]
    assert result["labels"].tolist() == [0, 1, 3]
    # The last object loses its pixel at the top, so its box follows what is left: x 5..6, y 3..4.
    assert result["boxes"].tolist() == [[1, 1, 3, 3], [0, 0, 2, 2], [3, 3, 4, 4]]
    assert torch.equal(result["masks"].rects.float(), result["boxes"])
    assert result["keypoints"].tolist() == [[[1, 1.5, 2]], [[0, 0, 0]], [[0, 0, 0]]]
    boxes_only = {"boxes": boxes, "labels": torch.arange(4)}
    assert transforms.crop(torch.zeros(3, 4, 8), boxes_only, 2, 0, 6, 4)[1]["boxes"].tolist() == [
        [1, 1, 3, 3],
        [0, 0, 2, 2],
        [3, 0, 4, 4],
    ]


def test_pad_by_hand():
    image, target = example(np.random.default_rng(0), 20, 48)
    padded, result = transforms.pad(image, target, 3, 2, 30, 60)
    assert torch.equal(padded[:, 2:22, 3:51], image)
    assert padded[:, 0, 0].tolist() == padded[:, 29, 59].tolist() == [123, 117, 104]
    assert torch.equal(result["boxes"], target["boxes"] + torch.tensor([3, 2, 3, 2]))
    assert torch.equal(result["keypoints"][:, 1, :2], target["keypoints"][:, 1, :2] + torch.tensor([3, 2]))
    check_agreement(padded, result)


def test_multiscale():
    rng = np.random.default_rng(3)
    transform = transforms.RandomShortestSize((30, 200), 250)
    sizes = set()
    for image, target, before, _ in apply_many(transform, scale=5):
        short, long = sorted(image.shape[1:])
        old_short, old_long = sorted(before.shape[1:])
        # Either the shorter side is as asked for, or the longer at its limit; the shape stays, but for rounding down.
        assert short in (29, 30, 199, 200) or long in (249, 250)
        assert abs(long / short - old_long / old_short) < 0.1
        sizes.add(short in (29, 30))
        assert len(target["boxes"]) == 4
    assert sizes == {True, False}
    image, target = transform(
        torch.zeros((3, 1, 2000), dtype=torch.uint8), example(rng)[1] | no_objects(1, 2000), rng
    )
    assert image.shape[1:] in [(1, 250), (1, 2000 // 8)]


def no_objects(height, width):
    return {
        "boxes": torch.zeros((0, 4)),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": CroppedMasks.from_dense(torch.zeros((0, height, width), dtype=torch.uint8)),
        "keypoints": torch.zeros((0, 17, 3)),
    }


def test_large_scale_jitter():
    counts, fills = [], []
    for image, target, *_ in apply_many(transforms.LargeScaleJitter(128, (0.1, 2.0)), trials=80, scale=4):
        assert image.shape == (3, 128, 128)
        counts.append(len(target["boxes"]))
        fills.append(image[:, -1, -1].tolist() == [123, 117, 104])
    assert 0 < sum(fills) < 80  # some are smaller than the square, some fill it
    assert min(counts) < 4 and max(counts) == 4  # some objects are cropped away


def test_large_scale_jitter_without_a_crop_is_a_resize():
    rng = np.random.default_rng(5)
    image, target = example(rng, 60, 90)
    jittered, result = transforms.LargeScaleJitter(180, (1.0, 1.0))(image, target, rng)
    resized, expected = transforms.resize(image, target, 120, 180)
    assert torch.equal(jittered[:, :120], resized)
    assert torch.equal(result["boxes"], expected["boxes"])


def test_large_scale_jitter_crops_before_it_resizes():
    """The same picture as resizing and then cropping, up to a shift of less than an old pixel."""
    image, target = example(np.random.default_rng(6), 64, 96)
    scale, size = 1.7, 96

    class Fixed:
        def uniform(self, low, high):
            return scale

        def random(self):
            return 0.5

    jittered, result = transforms.LargeScaleJitter(size)(image, target, Fixed())
    resized, expected = transforms.resize(image, target, int(64 * scale), int(96 * scale))
    x, y = (int(96 * scale) - size) // 2, (int(64 * scale) - size) // 2
    cropped, expected = transforms.crop(resized, expected, x, y, x + size, y + size)
    assert result["labels"].tolist() == expected["labels"].tolist()
    assert (result["boxes"] - expected["boxes"]).abs().max() <= 2 * scale
    assert (jittered.float() - cropped.float()).abs().mean() < 12


def test_photometric_distortion_changes_colours_alone():
    changed = 0
    for image, target, before, target_before in apply_many(
        transforms.RandomPhotometricDistort(), colours=False
    ):
        assert image.shape == before.shape
        changed += not torch.equal(image, before)
        for name in ("boxes", "labels", "keypoints"):
            assert torch.equal(target[name], target_before[name])
    assert 30 < changed <= 40  # 1 in 64 is left alone


def test_zoom_out():
    areas = []
    for image, target, before, _ in apply_many(transforms.RandomZoomOut()):
        areas.append(image[0].numel() / before[0].numel())
        assert len(target["boxes"]) == 4
    assert 10 < sum(area == 1 for area in areas) < 30 and min(areas) >= 1 and 8 < max(areas) <= 16


def test_iou_crop():
    smaller = fewer = 0
    for image, target, before, _ in apply_many(transforms.RandomIoUCrop(), trials=80):
        height, width = image.shape[1:]
        smaller += before.shape != image.shape
        fewer += len(target["boxes"]) < 4
        assert len(target["boxes"]) >= 1
        assert before.shape == image.shape or 0.5 <= width / height <= 2
    assert smaller > 40 and fewer > 10
    image = torch.zeros((3, 9, 9), dtype=torch.uint8)
    assert transforms.RandomIoUCrop()(image, no_objects(9, 9), np.random.default_rng(0))[0] is image


@pytest.mark.parametrize("policy", ["none", "hflip", "multiscale", "lsj", "ssd", "ssdlite"])
def test_policies_by_name(policy):
    image, target = example(np.random.default_rng(7))
    evaluation = transforms.build_transforms(policy, training=False)
    assert evaluation(image, target, np.random.default_rng(0)) == (image, target)
    training = transforms.build_transforms(policy, training=True)
    once = training(image, target, np.random.default_rng(8))
    again = training(image, target, np.random.default_rng(8))
    assert torch.equal(once[0], again[0]) and torch.equal(once[1]["boxes"], again[1]["boxes"])
    check_agreement(*once, scale=25, colours=policy != "ssd")
    differ = [training(image, target, np.random.default_rng(seed))[0] for seed in range(12)]
    assert policy == "none" or any(not torch.equal(other, differ[0]) for other in differ)


@pytest.mark.parametrize("policy", ["hflip", "multiscale", "lsj", "ssd", "ssdlite"])
def test_images_without_objects_pass_every_policy(policy):
    transform = transforms.build_transforms(policy, training=True)
    for seed in range(5):
        image = torch.zeros((3, 30, 40), dtype=torch.uint8)
        image, target = transform(image, no_objects(30, 40), np.random.default_rng(seed))
        assert target["boxes"].shape == (0, 4) and target["masks"].size == tuple(image.shape[1:])
        assert target["keypoints"].shape == (0, 17, 3)


def test_unknown_policy():
    with pytest.raises(ValueError, match="'flip' is unknown; choose one of none, hflip, multiscale"):
        transforms.build_transforms("flip", training=True)


def test_copy_paste_by_hand():
    # Two frames of 8×8: below, a square of label 1 at x 0..4 and one of label 2 at 6..8; above, one of label 3 at 2..8
    # of the upper four rows. It hides half of the first and the upper half of the second, wholly as high as it is.
    def sample(rects, labels, shade):
        dense = torch.zeros((len(rects), 8, 8), dtype=torch.uint8)
        for mask, (x0, y0, x1, y1) in zip(dense, rects, strict=True):
            mask[y0:y1, x0:x1] = 1
        keypoints = torch.tensor([[[x0, y0, 2.0], [x1 - 1, y1 - 1, 2.0]] for x0, y0, x1, y1 in rects])
        target = {
            "boxes": torch.tensor(rects, dtype=torch.float32),
            "labels": torch.tensor(labels),
            "masks": CroppedMasks.from_dense(dense),
            "keypoints": keypoints,
            "image_id": shade,
        }
        return torch.full((3, 8, 8), shade, dtype=torch.uint8), target

    below = sample([(0, 0, 4, 4), (6, 0, 8, 4), (0, 6, 2, 8)], [1, 2, 4], 50)
    above = sample([(2, 0, 8, 4)], [3], 200)
    pasted, _ = transforms.SimpleCopyPaste()([below, above], np.random.default_rng(0))
    image, target = pasted
    assert target["labels"].tolist() == [1, 4, 3] and target["image_id"] == 50
    assert target["boxes"].tolist() == [[0, 0, 2, 4], [0, 6, 2, 8], [2, 0, 8, 4]]
    assert torch.equal(target["masks"].rects.float(), target["boxes"])
    assert target["masks"].dense().sum(0).max() == 1
    # The first object's second keypoint, at (3, 3), is under the cover now; the third object's are not.
    assert target["keypoints"][..., 2].tolist() == [[2, 1], [2, 2], [2, 2]]
    assert image[0, 0, 6] == 200 and image[0, 7, 0] == 50
    assert 50 < image[0, 1, 2] < 200  # a softened edge
    assert torch.equal(below[0], torch.full((3, 8, 8), 50, dtype=torch.uint8))
    assert below[1]["boxes"].tolist() == [[0, 0, 4, 4], [6, 0, 8, 4], [0, 6, 2, 8]]


def test_copy_paste_keeps_fields_together():
    rng = np.random.default_rng(9)
    paste = transforms.SimpleCopyPaste()
    for _ in range(20):
        samples = [example(rng, int(rng.integers(40, 80)), int(rng.integers(60, 120))) for _ in range(3)]
        again = int(rng.integers(1000))
        results = paste(samples, np.random.default_rng(again))
        for (image, target), (before, _) in zip(results, samples, strict=True):
            assert image.shape == before.shape
            check_agreement(image, target, scale=3, label_once=False, inside_from=2)
            assert 1 <= len(target["boxes"]) <= 8
            assert target["masks"].dense().sum(0).max() == 1  # nothing lies under a pasted object
        assert all(
            torch.equal(a[0], b[0])
            for a, b in zip(results, paste(samples, np.random.default_rng(again)), strict=True)
        )


def test_copy_paste_without_objects():
    empty = (torch.zeros((3, 60, 90), dtype=torch.uint8), no_objects(60, 90) | {"image_id": 7})
    full = example(np.random.default_rng(10), 60, 90)
    (pasted, target), (same, kept) = transforms.SimpleCopyPaste()([empty, full], np.random.default_rng(0))
    assert len(target["boxes"]) >= 1 and torch.equal(same, full[0]) and kept is full[1]
    check_agreement(pasted, target)
    alone = transforms.SimpleCopyPaste()([empty], np.random.default_rng(0))
    assert torch.equal(alone[0][0], empty[0])
