"""roi_align.py against torchvision's MultiScaleRoIAlign and against bins worked out by hand."""

import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torchvision.ops import MultiScaleRoIAlign

from roi_align import FeaturePyramid, Request, bilinear_taps, roi_levels

IMAGE_SIZES = [(160, 200), (128, 224)]
NAMES = ["0", "1", "2", "3"]


def make_features(channels=8, dtype=torch.float32, strides=(4, 8, 16, 32), names=NAMES, seed=0):
    """Random maps of two images padded to 160×224."""
    generator = torch.Generator().manual_seed(seed)
    return OrderedDict(
        (name, torch.randn(2, channels, 160 // s, 224 // s, generator=generator).to(dtype).requires_grad_())
        for name, s in zip(names, strides, strict=True)
    )


def make_boxes(per_image, seed=1):
    """Boxes of 1 to 300 pixels a side around the frame, so that many reach over an edge or lie outside."""
    generator = torch.Generator().manual_seed(seed)
    boxes = []
    for number in per_image:
        centre = torch.rand(number, 2, generator=generator) * torch.tensor([260.0, 200.0]) - 20
        side = torch.exp(torch.rand(number, 2, generator=generator) * 5.7)
        boxes.append(torch.cat([centre - side / 2, centre + side / 2], dim=1))
    return boxes


def request(pool, boxes):
    index = torch.cat([torch.full((len(b),), i, device=b.device) for i, b in enumerate(boxes)])
    return Request(pool, torch.cat(boxes), index)


def gradients(features, outputs, seed=2):
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
    return torch.autograd.grad(outputs, list(features.values()), cotangents, allow_unused=True)


def assert_equal_to_torchvision(features, pools, boxes, atol=1e-5):
    ours = FeaturePyramid(features, IMAGE_SIZES).roi_align(
        [request(p, b) for p, b in zip(pools, boxes, strict=True)]
    )
    theirs = [p(features, b, IMAGE_SIZES) for p, b in zip(pools, boxes, strict=True)]
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=0, atol=atol)
    for our, their in zip(gradients(features, ours), gradients(features, theirs), strict=True):
        torch.testing.assert_close(our, their, rtol=1e-5, atol=atol)


@pytest.mark.parametrize(("output_size", "sampling_ratio"), [(7, 2), (14, 2), ((3, 5), 1), (7, 3)])
def test_equal_to_torchvision(output_size, sampling_ratio):
    pool = MultiScaleRoIAlign(NAMES, output_size, sampling_ratio)
    assert_equal_to_torchvision(make_features(), [pool], [make_boxes([60, 40])])


def test_box_and_mask_requests_share_one_product():
    pools = [MultiScaleRoIAlign(NAMES, 7, 2), MultiScaleRoIAlign(NAMES, 14, 2)]
    assert_equal_to_torchvision(make_features(), pools, [make_boxes([50, 30]), make_boxes([0, 9], seed=5)])


def test_levels_and_canonical_scale_are_the_pools_own():
    pools = [
        MultiScaleRoIAlign(NAMES, 7, 2, canonical_scale=64, canonical_level=3),
        MultiScaleRoIAlign(["1", "2"], 7, 2),
        MultiScaleRoIAlign(["2"], 7, 2),
    ]
    boxes = [make_boxes([30, 30], seed=seed) for seed in range(3)]
    assert_equal_to_torchvision(make_features(), pools, boxes)


def test_levels_of_equal_stride_read_the_first_only():
    # MobileNetV3-FPN: both maps have stride 32, so torchvision's mapper knows one level.
    features = make_features(strides=(32, 32), names=["0", "1"])
    pool = MultiScaleRoIAlign(NAMES, 7, 2)
    boxes = make_boxes([20, 20])
    (ours,) = FeaturePyramid(features, IMAGE_SIZES).roi_align([request(pool, boxes)])
    torch.testing.assert_close(ours, pool(features, boxes, IMAGE_SIZES), rtol=0, atol=1e-5)
    assert gradients(features, [ours])[1].count_nonzero() == 0


def test_a_gap_between_levels_leaves_zeros_as_in_torchvision():
    # Strides 4 and 32 make torchvision map boxes to levels 0..3 while only 0 and 1 exist.
    features = make_features(strides=(4, 32), names=["0", "1"])
    pool = MultiScaleRoIAlign(["0", "1"], 7, 2, canonical_scale=32)
    assert_equal_to_torchvision(features, [pool], [make_boxes([40, 40])])


def test_adaptive_sampling():
    assert_equal_to_torchvision(make_features(), [MultiScaleRoIAlign(NAMES, 7, -1)], [make_boxes([9, 9])])


def test_no_rois():
    features = make_features()
    pool = MultiScaleRoIAlign(NAMES, 7, 2)
    (pooled,) = FeaturePyramid(features, IMAGE_SIZES).roi_align([request(pool, make_boxes([0, 0]))])
    assert pooled.shape == (0, 8, 7, 7)
    assert all(gradient.count_nonzero() == 0 for gradient in gradients(features, [pooled]))


def test_zero_boxes_of_padding_are_finite():
    pool = MultiScaleRoIAlign(NAMES, 7, 2)
    assert_equal_to_torchvision(make_features(), [pool], [[torch.zeros(3, 4), torch.zeros(2, 4)]])


def test_not_a_number_box_gives_not_a_number_instead_of_reading_foreign_memory():
    boxes = [torch.full((1, 4), float("nan")), torch.tensor([[0.0, 0.0, 32.0, 32.0]])]
    features = make_features()
    pool = MultiScaleRoIAlign(NAMES, 7, 2)
    (pooled,) = FeaturePyramid(features, IMAGE_SIZES).roi_align([request(pool, boxes)])
    assert pooled[0].isnan().all()
    assert pooled[1].isfinite().all()


def test_bfloat16_stays_within_its_rounding():
    """bfloat16 keeps 8 bits: weights and results are off by 2^-9 each, of values up to about 4."""
    features = make_features(dtype=torch.bfloat16)
    exact = OrderedDict((k, v.detach().float().requires_grad_()) for k, v in features.items())
    pool = MultiScaleRoIAlign(NAMES, 7, 2)
    boxes = make_boxes([60, 40])
    (ours,) = FeaturePyramid(features, IMAGE_SIZES).roi_align([request(pool, boxes)])
    theirs = pool(exact, boxes, IMAGE_SIZES)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), theirs, rtol=0, atol=0.02)
    assert (ours.float() - theirs).abs().mean() < 0.001
    for our, their in zip(gradients(features, [ours]), gradients(exact, [theirs]), strict=True):
        torch.testing.assert_close(our.float(), their, rtol=0.02, atol=0.03)


def test_channels_last_in_and_out():
    features = OrderedDict(
        (k, v.detach().contiguous(memory_format=torch.channels_last)) for k, v in make_features().items()
    )
    (pooled,) = FeaturePyramid(features, IMAGE_SIZES).roi_align(
        [request(MultiScaleRoIAlign(NAMES, 7, 2), make_boxes([3, 3]))]
    )
    assert pooled.is_contiguous(memory_format=torch.channels_last)


def test_levels_by_hand():
    # side / 224 = 1/2, 1, 2, 0 -> level 4 - 1, 4, 4 + 1, clamped to 2; minus the finest level, 2.
    # The third has side 223.9999: log2 is -6e-7, which the 1e-6 lifts to level 4.
    sides = torch.tensor([112.0, 224.0, 223.9999, 448.0, 0.0])
    boxes = torch.stack([torch.zeros(5), torch.zeros(5), sides, sides], dim=1)
    assert roi_levels(boxes, (0.25, 0.125, 0.0625, 0.03125), 224, 4).tolist() == [1, 2, 2, 3, 0]
    not_a_number = torch.full((1, 4), float("nan"))
    assert roi_levels(not_a_number, (0.25, 0.125, 0.0625, 0.03125), 224, 4).item() in range(4)


def test_taps_by_hand():
    """One bin from 1.0 to 3.0 with two samples, at 1.5 and 2.5: rows 1, 2, 2, 3, a quarter each.

    The same bin at the end of an axis of 2 pixels: 1.5 reads the last pixel alone; 2.5 lies outside.
    """
    start, stop = torch.tensor([1.0, 1.0]), torch.tensor([3.0, 3.0])
    indices, weights = bilinear_taps(start, stop, torch.tensor([9, 2], dtype=torch.int32), 1, 2)
    assert indices.tolist() == [[[1, 2, 2, 3]], [[1, 1, 1, 1]]]
    assert weights.tolist() == [[[0.25, 0.25, 0.25, 0.25]], [[0.5, 0.0, 0.0, 0.0]]]


# --- the CUDA kernel -----------------------------------------------------------------------------------

INTERPRETED = """
import torch
from roi_align_triton import bag_sums

generator = torch.Generator().manual_seed(0)
rows = torch.randint(0, 50, (60,), dtype=torch.int32, generator=generator)
weights = torch.randn(60, generator=generator)
bounds = torch.tensor([0, 3, 3, 40, 41, 60], dtype=torch.int32)  # lengths 3, none, 37 (three rounds), 1, 19
for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2**-7)):  # the interpreter cuts bits off
    for num_channels in (8, 5, 300):  # 300 need two programs
        table = torch.randn(50, num_channels, generator=generator).to(dtype)
        sums = bag_sums(table, rows, bounds, weights)
        pairs = zip(bounds.tolist(), bounds.tolist()[1:])
        expected = [(weights[a:b, None].double() * table[rows[a:b]].double()).sum(0) for a, b in pairs]
        assert sums.dtype == dtype
        torch.testing.assert_close(sums.double(), torch.stack(expected), rtol=tolerance, atol=1e-5)
assert bag_sums(table, rows[:0], bounds[:1], weights[:0]).shape == (0, 300)
"""


def test_triton_kernel_in_the_interpreter():
    pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds for Linux")
    root = Path(__file__).parents[1]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    run = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    if "only 0-dimensional arrays can be converted to Python scalars" in run.stderr:
        pytest.skip("Triton's interpreter is older than numpy 2.4 and cannot read a loop's bounds")
    assert run.returncode == 0, run.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_equal_to_torchvision_on_cuda():
    features = OrderedDict((k, v.detach().cuda().requires_grad_()) for k, v in make_features().items())
    pools = [MultiScaleRoIAlign(NAMES, 7, 2), MultiScaleRoIAlign(NAMES, 14, 2)]
    boxes = [[b.cuda() for b in make_boxes([50, 30])], [b.cuda() for b in make_boxes([0, 9], seed=5)]]
    assert_equal_to_torchvision(features, pools, boxes, atol=1e-4)
