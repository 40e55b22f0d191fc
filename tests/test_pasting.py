"""pasting against torchvision's pasted frames, pycocotools' encoding of them, and a mask worked out by hand."""

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_api
from torchvision.models.detection.roi_heads import paste_masks_in_image

import pasting


def torchvision_frames(probs, boxes, height, width):
    """bool [D, H, W]: the reference."""
    return (paste_masks_in_image(probs[:, None], boxes, (height, width)) > 0.5)[:, 0].numpy()


def pycocotools_rles(frames):
    rles = mask_api.encode(np.asfortranarray(frames.transpose(1, 2, 0).astype(np.uint8)))
    return [rle["counts"] for rle in rles]


def random_boxes(rng, num, height, width, kind):
    """xyxy float32 [num, 4] inside the frame, reaching outside of it, tiny, on whole pixels, or as high as it."""
    centre = rng.random((num, 2)) * [width, height]
    half = rng.random((num, 2)) ** 2 * [width, height] * (2.0 if kind == "outside" else 0.5)
    if kind == "tiny":
        half = rng.random((num, 2)) * 1.5
    boxes = np.concatenate([centre - half, centre + half], axis=1)
    if kind != "outside":
        boxes = np.clip(boxes, 0, [width, height, width, height])
    if kind == "whole":
        boxes = np.round(boxes)
    if kind == "high":
        boxes[:, 1], boxes[:, 3] = 0, height
    return torch.from_numpy(boxes.astype(np.float32))


def random_probs(rng, num, kind):
    """float32 [num, 28, 28]: noise, a few levels with many ties at the threshold, or smooth blobs like a model's."""
    if kind == "noise":
        return torch.from_numpy(rng.random((num, 28, 28), dtype=np.float32))
    if kind == "levels":
        return torch.from_numpy(rng.integers(0, 5, (num, 28, 28)).astype(np.float32) / 4)
    coarse = torch.from_numpy(rng.normal(0, 8, (num, 1, 5, 5)).astype(np.float32))
    return torch.nn.functional.interpolate(coarse, size=(28, 28), mode="bicubic")[:, 0].sigmoid()


@pytest.mark.parametrize("box_kind", ["inside", "outside", "tiny", "whole", "high"])
@pytest.mark.parametrize("mask_kind", ["noise", "levels", "blobs"])
def test_masks_are_pasted_and_encoded_as_by_torchvision_and_pycocotools(box_kind, mask_kind):
    rng = np.random.default_rng([ord(box_kind[0]), ord(mask_kind[0])])
    for _ in range(8):
        height, width = (int(n) for n in rng.integers(1, 120, 2))
        probs, boxes = random_probs(rng, 12, mask_kind), random_boxes(rng, 12, height, width, box_kind)
        frames = torchvision_frames(probs, boxes, height, width)
        expected = pycocotools_rles(frames)
        assert pasting.encode_masks(probs, boxes, height, width) == expected
        assert pasting.encode_frames(torch.from_numpy(frames)[:, None].float()) == expected
        for frame, (x0, y0, bitmap) in zip(
            frames, pasting.paste_masks(probs, boxes, height, width), strict=True
        ):
            pasted = np.zeros((height, width), bool)
            pasted[y0 : y0 + bitmap.shape[0], x0 : x0 + bitmap.shape[1]] = bitmap
            np.testing.assert_array_equal(pasted, frame)


def test_a_full_mask_covers_its_box():
    # Box 10..38 × 20..48, grown by 30/28 about (24, 34): 9..39 × 19..49, 31 pixels for 28 cells and a border of zeros.
    # Pixel i samples cell (i + 0.5) · 30/31 − 0.5: −0.02 → cell 0, a zero; 0.95 → 0.95 of cell 1; ... 28.05 → 0.95 of
    # cell 28; 29.02 → cell 29, a zero. So pixels 1 to 29 of 31 are inside: x 10..38, y 20..48, ends included.
    probs, boxes = torch.ones(1, 28, 28), torch.tensor([[10.0, 20.0, 38.0, 48.0]])
    [(x0, y0, bitmap)] = pasting.paste_masks(probs, boxes, height=60, width=50)
    ys, xs = np.nonzero(bitmap)
    assert (x0 + xs.min(), x0 + xs.max(), y0 + ys.min(), y0 + ys.max()) == (10, 38, 20, 48)
    assert bitmap.sum() == 29 * 29
    [rle] = pasting.encode_masks(probs, boxes, height=60, width=50)
    # 10 empty columns of 60 and 20 pixels; 29 columns of 29 with 31 between; from the last to the end of the frame
    runs = [10 * 60 + 20] + [29, 31] * 28 + [29, 50 * 60 - 620 - 28 * 60 - 29]
    [expected] = mask_api.frPyObjects([{"size": [60, 50], "counts": runs}], 60, 50)
    assert rle == expected["counts"]


def test_masks_are_the_same_in_any_number_of_chunks(monkeypatch):
    rng = np.random.default_rng(1)
    probs, boxes = random_probs(rng, 40, "noise"), random_boxes(rng, 40, 90, 70, "inside")
    at_once = pasting.encode_masks(probs, boxes, 90, 70)
    monkeypatch.setattr(pasting, "PIXELS_AT_ONCE", 500)
    assert pasting.encode_masks(probs, boxes, 90, 70) == at_once
    frames = torchvision_frames(probs, boxes, 90, 70)
    areas = [bitmap.sum() for _, _, bitmap in pasting.paste_masks(probs, boxes, 90, 70)]
    assert areas == frames.sum(axis=(1, 2)).tolist()


def test_no_masks():
    assert pasting.encode_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), 10, 10) == []
    assert pasting.paste_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), 10, 10) == []
    assert pasting.encode_frames(torch.zeros(0, 1, 10, 10)) == []


@pytest.mark.parametrize("side", [14, 28, 56])
def test_the_fast_resize_is_much_nearer_to_torch_than_its_tolerance(side):
    rng = np.random.default_rng(side)
    largest = 0.0
    for size in [1, 2, 3, 29, 30, 31, 100, 333, 640, 1333]:
        probs = rng.integers(0, 2, (side + 2, side + 2)).astype(
            np.float32
        )  # steps of 1: where weights matter most
        fast, exact = np.empty((97, size), np.float32), np.empty((97, size), np.float32)
        pasting._resize_fast(probs, 97, size, fast)
        pasting._resize_exactly(probs, 97, size, exact)
        largest = max(largest, np.abs(fast - exact).max())
    assert largest < pasting.RESIZE_TOLERANCE * (side + 2) / 2


@pytest.mark.parametrize("side", [14, 28, 56])
@pytest.mark.parametrize("kind", ["steps", "smooth"])
def test_single_pixels_are_as_near_to_torchs_as_they_say(side, kind):
    rng = np.random.default_rng([side, len(kind)])
    share = 0.0
    for width, height in [(1, 1), (2, 3), (29, 30), (31, 100), (60, 58), (333, 97), (640, 71), (1333, 50)]:
        probs = rng.random((2, side + 2, side + 2), dtype=np.float32)
        if kind == "steps":
            probs = probs.round()
        exact = np.empty((width, height), np.float32)
        pasting._resize_exactly(probs[1], width, height, exact)
        places = np.stack(np.meshgrid(np.arange(width), np.arange(height), indexing="ij"), axis=2).reshape(
            -1, 2
        )
        ones = np.ones(len(places), np.int64)
        values, tolerances = pasting._resized_pixels(probs, ones, places, ones[:, None] * [width, height])
        share = max(share, (np.abs(values - exact.reshape(-1)) / tolerances).max())
    assert share < 1


def test_few_masks_are_resized_twice(monkeypatch):
    """What is near the threshold is decided pixel by pixel, or every sixth mask would be resized by torch as well."""
    resize, again = pasting._resize_exactly, []
    monkeypatch.setattr(pasting, "_resize_exactly", lambda *args: again.append(1) or resize(*args))
    rng = np.random.default_rng(2)
    probs, boxes = random_probs(rng, 300, "blobs"), random_boxes(rng, 300, 480, 640, "inside")
    pasting.encode_masks(probs, boxes, 480, 640)
    assert len(again) < 15
