"""Cropped masks equal full-frame ones, bit by bit, and refuse what would crash native code."""

import pickle

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

import masks as masks_module
from masks import CroppedMasks

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def decode_full_frame(segmentation, height, width):
    """uint8 [H, W] by pycocotools alone."""
    if isinstance(segmentation, list):
        rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        rle = coco_mask.frPyObjects(segmentation, height, width)
    else:
        rle = segmentation
    return coco_mask.decode(rle)


def random_polygon(rng, height, width):
    """Points in and around the frame, at two decimals or at tenths (where rounding has its ties)."""
    points = rng.integers(3, 12)
    centre = rng.uniform(-0.2, 1.2, 2) * (width, height)
    spread = rng.uniform(1, 0.7 * max(height, width))
    return (
        np.round(centre + rng.uniform(-spread, spread, (points, 2)), rng.integers(1, 3)).reshape(-1).tolist()
    )


def random_masks(rng, num_objects=6, height=23, width=31):
    """Dense uint8 [N, H, W]: blobs, the last one empty."""
    dense = np.zeros((num_objects, height, width), np.uint8)
    for mask in dense[:-1]:
        x, y = rng.integers(0, width - 4), rng.integers(0, height - 4)
        blob = mask[y : y + rng.integers(2, 15), x : x + rng.integers(2, 15)]
        blob[:] = rng.integers(0, 2, blob.shape)
    return torch.from_numpy(dense)


def assert_tight(masks):
    for n in range(len(masks)):
        bitmap = masks.bitmap(n)
        if bitmap.numel():
            assert bitmap[0].any() and bitmap[-1].any() and bitmap[:, 0].any() and bitmap[:, -1].any()
        else:
            x0, y0, x1, y1 = masks.rects[n].tolist()
            assert x0 == x1 and y0 == y1


def test_polygons_equal_the_full_frame_decode():
    rng = np.random.default_rng(1)
    for _ in range(150):
        height, width = rng.integers(1, 90, 2).tolist()
        segmentations = [
            [random_polygon(rng, height, width) for _ in range(rng.integers(1, 4))]
            for _ in range(rng.integers(1, 5))
        ]
        masks = CroppedMasks.from_segmentations(segmentations, height, width)
        expected = np.stack([decode_full_frame(s, height, width) for s in segmentations])
        assert np.array_equal(masks.dense().numpy(), expected)
        assert_tight(masks)


def test_rles_equal_the_full_frame_decode():
    rng = np.random.default_rng(2)
    for _ in range(60):
        height, width = rng.integers(1, 60, 2).tolist()
        frame = np.asfortranarray(rng.random((height, width)) < rng.choice([0.0, 0.02, 0.5, 1.0]), np.uint8)
        compressed = coco_mask.encode(frame)
        uncompressed = {
            "size": [height, width],
            "counts": masks_module.decode_counts([compressed["counts"]])[0].tolist(),
        }
        as_text = {"size": [height, width], "counts": compressed["counts"].decode()}
        masks = CroppedMasks.from_segmentations([compressed, uncompressed, as_text], height, width)
        assert np.array_equal(masks.dense().numpy(), np.stack([frame] * 3))
        assert np.array_equal(decode_full_frame(uncompressed, height, width), frame)
        assert_tight(masks)


def test_runs_of_zero_length_and_full_columns():
    # 3 rows, 4 columns. Runs 0 background, 2 ink, 0, 4 ink: pixels 0..5, that is the first two columns.
    rle = {"size": [3, 4], "counts": [0, 2, 0, 4, 6]}
    masks = CroppedMasks.from_segmentations([rle], 3, 4)
    assert masks.rects.tolist() == [[0, 0, 2, 3]]
    assert masks.dense()[0].tolist() == [[1, 1, 0, 0]] * 3


def test_a_square_by_hand():
    # A square from (2, 1) to (5, 3): pixels x 2..4, y 1..2, rectangle 2, 1, 5, 3.
    masks = CroppedMasks.from_segmentations([[[2, 1, 5, 1, 5, 3, 2, 3]]], 6, 8)
    assert masks.rects.tolist() == [[2, 1, 5, 3]]
    assert masks.pixels.tolist() == [1] * 6
    assert masks.offsets.tolist() == [0, 6]
    assert masks.size == (6, 8)
    assert masks.areas().tolist() == [6]


def test_short_polygons_are_left_out_and_odd_numbers_ignored():
    square = [2, 1, 5, 1, 5, 3, 2, 3]
    masks = CroppedMasks.from_segmentations([[square, [0, 0, 5, 5]], [[1, 1]], [[*square, 7]], []], 6, 8)
    assert masks.areas().tolist() == [6, 0, 6, 0]
    assert masks.rects[1].tolist() == [0, 0, 0, 0]


def test_no_objects():
    masks = CroppedMasks.from_segmentations([], 6, 8)
    assert len(masks) == 0 and masks.dense().shape == (0, 6, 8) and masks.offsets.tolist() == [0]
    for same in (
        masks.hflip(),
        masks[:0],
        masks[torch.zeros(0, dtype=torch.bool)],
        CroppedMasks.from_dense(masks.dense()),
    ):
        assert len(same) == 0 and same.rects.shape == (0, 4) and same.rects.dtype == torch.int64
    assert masks.resize(3, 4).size == (3, 4)
    assert masks.union().sum() == 0


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[float("nan"), 1, 2, 3, 4, 5]], "NaN"),
        ([[float("inf"), 1, 2, 3, 4, 5]], "infinity"),
        ([[1e9, 1, 2, 3, 4, 5]], "1e\\+09"),
        ([[10**400, 1, 2, 3, 4, 5]], "beyond the range"),
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], "list of polygons"),
        ([["1", 2, 3, 4, 5, 6]], "holds a str"),
        ([[None, 2, 3, 4, 5, 6]], "holds a NoneType"),
        ([[-99999, 0, 99999, 0] * 30], "outline"),
        ({"size": [6, 8], "counts": [10, 5]}, "cover 15 pixels"),
        ({"size": [6, 8], "counts": [40, 9]}, "cover 49 pixels"),
        ({"size": [6, 8], "counts": [-1, 49]}, "runs from -1 to 49"),
        ({"size": [6, 8], "counts": [1.5, 46.5]}, "hold a float"),
        ({"size": [6, 8], "counts": [10**30, 48]}, "to 1000000"),
        ({"size": [8, 6], "counts": [48]}, r"\[8, 6\]"),
        ({"size": [10**6, 10**6], "counts": [10**12]}, "1000000"),
        ({"counts": [48]}, "size None"),
        ({"size": [6, 8]}, "neither text nor a list"),
        ({"size": [6, 8], "counts": b"\xff\x00"}, "alphabet"),
        ({"size": [6, 8], "counts": "é"}, "alphabet"),
        ({"size": [6, 8], "counts": "ooooooooo0"}, "35 bits"),
        ({"size": [6, 8], "counts": "o"}, "middle of a number"),
        ({"size": [6, 8], "counts": "O"}, "negative"),  # 31 with the sign bit: -1
        ({"size": [6, 8], "counts": ""}, "middle of a number"),
    ],
)
def test_what_native_code_must_not_see(segmentation, message):
    with pytest.raises(ValueError, match=message):
        CroppedMasks.from_segmentations([segmentation], 6, 8)


def test_frames_are_capped_before_anything_is_allocated():
    with pytest.raises(ValueError, match="at most 89,478,485"):
        CroppedMasks.from_segmentations([[[0, 0, 1, 0, 1, 1]]], 10**6, 10**6)


def test_dense_round_trip_and_selection():
    dense = random_masks(np.random.default_rng(3))
    masks = CroppedMasks.from_dense(dense)
    assert torch.equal(masks.dense(), dense)
    assert torch.equal(CroppedMasks.from_dense(dense.bool()).dense(), dense)
    assert_tight(masks)
    assert torch.equal(masks.areas(), dense.flatten(1).sum(1))
    assert torch.equal(masks.union(), dense.amax(0))
    for index in (2, -1, slice(1, 4), torch.tensor([5, 0, 0]), torch.tensor([True, False] * 3), slice(0, 0)):
        assert torch.equal(masks[index].dense(), dense[index].reshape(-1, *dense.shape[1:]))
    assert torch.equal(CroppedMasks.cat([masks, masks[1:3]]).dense(), torch.cat([dense, dense[1:3]]))
    with pytest.raises(ValueError, match="cannot be joined"):
        CroppedMasks.cat([masks, masks.pad(1, 0, 0, 0)])


def test_geometry_equals_the_dense_one():
    rng = np.random.default_rng(4)
    for _ in range(20):
        dense = random_masks(rng)
        masks = CroppedMasks.from_dense(dense)
        flipped = masks.hflip()
        assert torch.equal(flipped.dense(), dense.flip(-1))
        height, width = rng.integers(1, 70, 2).tolist()
        resized = masks.resize(height, width)
        expected = torch.nn.functional.interpolate(dense[None], size=(height, width), mode="nearest")[0]
        assert torch.equal(resized.dense(), expected)
        x0, x1 = sorted(rng.integers(0, 32, 2).tolist())
        y0, y1 = sorted(rng.integers(0, 24, 2).tolist())
        cropped = masks.crop(x0, y0, x1, y1)
        assert torch.equal(cropped.dense(), dense[:, y0:y1, x0:x1])
        padded = masks.pad(1, 2, 3, 4)
        assert torch.equal(padded.dense(), torch.nn.functional.pad(dense, (1, 3, 2, 4)))
        cover = torch.from_numpy(rng.integers(0, 2, (23, 31)).astype(np.uint8))
        left_over = masks.without(cover)
        assert torch.equal(left_over.dense(), dense * (1 - cover))
        for changed in (flipped, resized, cropped, padded, left_over):
            assert_tight(changed)
            assert int(changed.offsets[-1]) == changed.pixels.numel()


@pytest.mark.parametrize(
    ("source", "target"), [(480, 800), (427, 1066), (640, 1333), (375, 333), (101, 7), (1, 9)]
)
def test_resize_follows_torch_at_real_sizes(source, target):
    columns = torch.arange(source) % 251
    line = columns.to(torch.uint8).view(1, 1, 1, source)
    expected = torch.nn.functional.interpolate(line, size=(1, target), mode="nearest").view(-1)
    assert torch.equal(columns[masks_module._nearest_source(source, target)].to(torch.uint8), expected)
    as_float = torch.nn.functional.interpolate(line.float(), size=(1, target), mode="nearest").view(-1)
    assert torch.equal(as_float.to(torch.uint8), expected)


def test_crop_outside_the_frame_is_refused():
    with pytest.raises(ValueError, match="outside the frame of 23×31"):
        CroppedMasks.from_dense(random_masks(np.random.default_rng(5))).crop(0, 0, 32, 4)


def test_pickle_and_device():
    masks = CroppedMasks.from_dense(random_masks(np.random.default_rng(6)))
    again = pickle.loads(pickle.dumps(masks)).to("cpu", non_blocking=True)
    assert torch.equal(again.dense(), masks.dense()) and again.size == masks.size
    loader = torch.utils.data.DataLoader([masks], batch_size=None, num_workers=1)
    assert torch.equal(next(iter(loader)).dense(), masks.dense())
