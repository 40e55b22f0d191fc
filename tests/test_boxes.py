"""Batched box arithmetic against hand-worked values and torchvision's per-image functions."""

import pytest
import torch
import torchvision
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder, Matcher

import boxes
from boxes import (
    BACKGROUND,
    BETWEEN_THRESHOLDS,
    GroundTruth,
    clip,
    closest_object,
    decode,
    encode,
    label_boxes,
    match,
    pad_ground_truth,
    pairwise_iou,
    sample_balanced,
    suppress,
    suppress_batched,
    suppress_runs,
)


class HostWaits(TorchDispatchMode):
    """Notes the operators whose result's shape or host value depends on data: on a GPU the host waits for each."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            waits = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        else:
            waits = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output} & set(func.tags)
        if waits or name == "nms":
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def test_host_waits_sees_what_waits():
    values = torch.arange(4.0)
    with HostWaits() as waits:
        values[values > 1]
        values.nonzero()
        values.sum().item()
        values.masked_select(values > 1)
        values.unique()
        torchvision.ops.nms(torch.tensor([[0.0, 0, 1, 1]]), torch.ones(1), 0.5)
        values[torch.tensor([1])] = 0  # this one does not
    assert len(waits.names) == 6


def random_boxes(*shape, frame=800, largest=200):
    corner = torch.rand(*shape, 2) * frame
    return torch.cat([corner, corner + torch.rand(*shape, 2) * largest + 1], dim=-1)


def make_targets(*counts):
    return [{"boxes": random_boxes(n), "labels": torch.randint(1, 91, (n,))} for n in counts]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(20)


def test_pad_ground_truth():
    targets = [
        {"boxes": torch.tensor([[0.0, 1, 2, 3], [4, 5, 6, 7]]), "labels": torch.tensor([5, 9])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
        {"boxes": torch.tensor([[8.0, 8, 9, 9]]), "labels": torch.tensor([2])},
    ]
    truth = pad_ground_truth(targets)
    assert truth.boxes.tolist() == [[[0, 1, 2, 3], [4, 5, 6, 7]], [[0] * 4] * 2, [[8, 8, 9, 9], [0] * 4]]
    assert truth.labels.tolist() == [[5, 9], [0, 0], [2, 0]]
    assert truth.valid.tolist() == [[True, True], [False, False], [True, False]]
    assert truth.boxes.dtype == torch.float32


def test_pad_ground_truth_without_objects_keeps_a_slot():
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    truth = pad_ground_truth([empty, empty])
    assert truth.boxes.shape == (2, 1, 4)
    assert truth.labels.shape == (2, 1)
    assert not truth.valid.any()


def test_iou_by_hand():
    """[0, 0, 4, 4] and [2, 2, 6, 6] share 2×2 of 16 + 16 - 4 = 28 square pixels; [2, 0, 4, 4] is half of the first."""
    a = torch.tensor([[0.0, 0, 4, 4]])
    b = torch.tensor([[2.0, 2, 6, 6], [2, 0, 4, 4], [4, 0, 8, 4]])
    torch.testing.assert_close(pairwise_iou(a, b), torch.tensor([[4 / 28, 0.5, 0.0]]))


def test_iou_is_torchvisions_to_the_bit():
    a, b = random_boxes(3, 17), random_boxes(3, 23)
    expected = torch.stack([torchvision.ops.box_iou(x, y) for x, y in zip(a, b, strict=True)])
    assert torch.equal(pairwise_iou(a, b), expected)
    assert torch.equal(pairwise_iou(a, b[0]), torch.stack([torchvision.ops.box_iou(x, b[0]) for x in a]))


def test_match_by_hand():
    """One object [0, 0, 10, 10] and one [20, 0, 30, 10]; boxes of the same height, so IoU is that of the widths.

    Widths [0, 8]: 8 / 10 = 0.8, matched. [0, 5]: 0.5, between. [0, 2]: 0.2, background. [20, 24]: 0.4 is between,
    but the best that the second object has: matched when low quality is allowed, as is its double.
    """
    truth = GroundTruth(
        torch.tensor([[[0.0, 0, 10, 10], [20, 0, 30, 10], [0, 0, 0, 0]]]),
        torch.tensor([[1, 1, 0]]),
        torch.tensor([[True, True, False]]),
    )
    spans = [(0, 8), (0, 5), (0, 2), (20, 24), (20, 24), (50, 60)]
    candidates = torch.tensor([[x0, 0.0, x1, 10] for x0, x1 in spans])
    plain = match(truth, candidates, high=0.7, low=0.3)
    assert plain.tolist() == [
        [0, BETWEEN_THRESHOLDS, BACKGROUND, BETWEEN_THRESHOLDS, BETWEEN_THRESHOLDS, BACKGROUND]
    ]
    generous = match(truth, candidates, high=0.7, low=0.3, allow_low_quality=True)
    assert generous.tolist() == [[0, BETWEEN_THRESHOLDS, BACKGROUND, 1, 1, BACKGROUND]]


@pytest.mark.parametrize("pairs_at_once", [1, 2**14, 2**25])
@pytest.mark.parametrize(
    ("high", "low", "allow_low_quality"), [(0.7, 0.3, True), (0.5, 0.5, False), (0.6, 0.0, True)]
)
def test_match_is_torchvisions(monkeypatch, high, low, allow_low_quality, pairs_at_once):
    """Images of 6, 0, 1 and 300 objects in one batch, in chunks of one, of some and of all."""
    monkeypatch.setattr(
        boxes, "_chunk_length", lambda device, shape: max(1, pairs_at_once // torch.Size(shape).numel())
    )
    targets = make_targets(6, 0, 1, 300)
    num_boxes = 40 if pairs_at_once == 1 else 3000
    candidates = random_boxes(4, num_boxes)
    candidates[:, :5] = candidates[:, 5:10]  # ties among the boxes
    targets[3]["boxes"][7] = targets[3]["boxes"][3]  # and among the objects
    matches = match(pad_ground_truth(targets), candidates, high, low, allow_low_quality)
    shared = match(pad_ground_truth(targets), candidates[0], high, low, allow_low_quality)
    matcher = Matcher(high, low, allow_low_quality)
    for image, target in enumerate(targets):
        if len(target["boxes"]) == 0:
            assert (matches[image] == BACKGROUND).all()
            continue
        for ours, theirs in ((matches[image], candidates[image]), (shared[image], candidates[0])):
            assert torch.equal(ours, matcher(torchvision.ops.box_iou(target["boxes"], theirs)))


def test_an_object_that_nothing_overlaps_matches_as_in_torchvision():
    """The best IoU of such an object is 0, and every box that has it counts as its best: torchvision's quirk."""
    target = {"boxes": torch.tensor([[0.0, 0, 4, 4], [90, 90, 99, 99]]), "labels": torch.tensor([1, 1])}
    candidates = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 2], [50, 50, 60, 60]])
    expected = Matcher(0.7, 0.3, True)(torchvision.ops.box_iou(target["boxes"], candidates))
    matches = match(pad_ground_truth([target]), candidates, 0.7, 0.3, True)
    assert torch.equal(matches[0], expected)
    assert matches.tolist() == [[0, 0, 0]]


def test_closest_object_takes_the_first_of_equals():
    target = {"boxes": torch.tensor([[0.0, 0, 4, 4]] * 3), "labels": torch.ones(3, dtype=torch.int64)}
    assert closest_object(pad_ground_truth([target]), torch.tensor([[0.0, 0, 4, 2]])).tolist() == [[0]]


def test_sample_by_hand():
    """Four slots, at most half positive; the largest keys win: positives 5 and 0, then negatives 1 and 3."""
    positive = torch.tensor([[True, False, True, False, False, True]])
    keys = torch.tensor([[0.7, 0.9, 0.1, 0.8, 0.2, 0.75]])
    indices, is_positive, valid = sample_balanced(positive, ~positive, 4, 0.5, keys)
    assert indices.tolist() == [[5, 0, 1, 3]]
    assert is_positive.tolist() == [[True, True, False, False]]
    assert valid.all()


def test_sample_fills_with_negatives_and_marks_what_is_missing():
    """One positive of two allowed leaves three slots to negatives; the second image has one of each and no more."""
    positive = torch.tensor([[True, False, False, False, False], [False, True, False, False, False]])
    negative = torch.tensor([[False, True, True, True, True], [False, False, True, False, False]])
    indices, is_positive, valid = sample_balanced(positive, negative, 4, 0.5)
    assert is_positive.tolist() == [[True, False, False, False]] * 2
    assert valid.tolist() == [[True] * 4, [True, True, False, False]]
    assert indices[0, 0] == 0
    assert set(indices[0, 1:].tolist()) < {1, 2, 3, 4}
    assert indices[1].tolist() == [1, 2, 0, 0]


def test_sample_of_fewer_boxes_than_slots():
    positive = torch.tensor([[True, True, True]])
    indices, is_positive, valid = sample_balanced(positive, ~positive, 8, 0.5)
    assert sorted(indices[0, :3].tolist()) == [0, 1, 2]
    assert is_positive.tolist() == valid.tolist() == [[True] * 3 + [False] * 5]


def test_sample_has_torchvisions_distribution():
    """40 positives and 60 negatives, 32 slots, a quarter positive: 8 of 40 and 24 of 60.

    Each positive is drawn with probability 0.2, each negative with 0.4; over 2,000 images the standard error of a
    frequency is at most sqrt(0.24 / 2000) = 0.011, so 0.05 is more than four of them.
    """
    positive = (torch.arange(100) < 40).expand(2000, -1)
    indices, is_positive, valid = sample_balanced(positive, ~positive, 32, 0.25)
    assert valid.all()
    assert (is_positive.sum(dim=1) == 8).all()
    assert torch.equal(positive.gather(1, indices), is_positive)
    drawn = torch.zeros(2000, 100).scatter_(1, indices, 1.0)
    assert (drawn.sum(dim=1) == 32).all()  # no index twice
    frequency = drawn.mean(dim=0)
    assert (frequency[:40] - 0.2).abs().max() < 0.05
    assert (frequency[40:] - 0.4).abs().max() < 0.05
    theirs = BalancedPositiveNegativeSampler(32, 0.25)([positive[0].long()])
    assert [int(part[0].sum()) for part in theirs] == [8, 24]


def test_encode_by_hand():
    """The anchor [0, 0, 10, 20] to [5, 0, 25, 20]: centre (5, 10) to (15, 10) is one width, width doubles."""
    deltas = encode(torch.tensor([5.0, 0, 25, 20]), torch.tensor([0.0, 0, 10, 20]), (10.0, 10.0, 5.0, 5.0))
    torch.testing.assert_close(deltas, torch.tensor([10.0, 0.0, 5 * 0.6931472, 0.0]))


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)])
def test_coding_is_torchvisions_to_the_bit(weights):
    coder = BoxCoder(weights)
    anchors, targets = random_boxes(500), random_boxes(500)
    assert torch.equal(encode(targets, anchors, weights), coder.encode_single(targets, anchors))
    deltas = torch.randn(500, 3, 4) * 5  # many beyond the clip of log(1000 / 16) = 4.1
    expected = coder.decode_single(deltas.flatten(1), anchors).view(500, 3, 4)
    assert torch.equal(decode(deltas, anchors[:, None], weights), expected)


def test_decode_inverts_encode_and_computes_in_float32():
    grow = torch.tensor([0.0, 0, 20, 20])  # no side is 62 times another: deltas stay below the clip
    anchors, targets = random_boxes(500) + grow, random_boxes(500) + grow
    torch.testing.assert_close(decode(encode(targets, anchors), anchors), targets, rtol=1e-5, atol=1e-3)
    deltas = torch.randn(500, 4).bfloat16()
    assert torch.equal(decode(deltas, anchors), decode(deltas.float(), anchors))


def test_clip():
    sizes = [(300, 500), (400, 200)]
    inputs = random_boxes(2, 50) - 100
    expected = [torchvision.ops.clip_boxes_to_image(b, size) for b, size in zip(inputs, sizes, strict=True)]
    assert torch.equal(clip(inputs, sizes), torch.stack(expected))


def make_runs(lengths, num_images=2, num_clusters=8):
    """Sorted candidates of some levels: boxes scattered around a few places, so that many overlap; 5% not valid."""
    centers = random_boxes(num_clusters)
    candidates = centers[torch.randint(num_clusters, (num_images, sum(lengths)))]
    candidates = candidates + torch.randn(num_images, sum(lengths), 4) * 4
    scores = [torch.rand(num_images, n).sort(dim=1, descending=True).values for n in lengths]
    return candidates, torch.cat(scores, dim=1), torch.rand(num_images, sum(lengths)) > 0.05


def greedy(candidates, scores, valid, iou_threshold, lengths):
    """Survivors by torchvision's operator, run by run."""
    keep = torch.zeros_like(valid)
    for image in range(len(candidates)):
        first = 0
        for n in lengths:
            run = torch.arange(first, first + n)[valid[image, first : first + n]]
            kept = torchvision.ops.nms(candidates[image, run], scores[image, run], iou_threshold)
            keep[image, run[kept]] = True
            first += n
    return keep


@pytest.mark.parametrize("iou_threshold", [0.5, 0.7])
def test_suppress_keeps_what_the_greedy_algorithm_keeps(iou_threshold):
    lengths = [700, 300, 5]
    candidates, scores, valid = make_runs(lengths)
    expected = greedy(candidates, scores, valid, iou_threshold, lengths)
    assert 0 < expected.sum() < valid.sum()
    keep = suppress(candidates, scores, valid, iou_threshold, lengths, num_keep=1005)
    assert torch.equal(keep, expected)


@pytest.mark.parametrize("num_keep", [1, 30, 150, 400])
def test_suppress_finds_the_best_survivors_whatever_it_leaves_out(num_keep):
    """210 and 219 of 1,005 survive. The best 300 hold 118 and 120 of them: too few for 150. 400 there are not."""
    lengths = [700, 300, 5]
    candidates, scores, valid = make_runs(lengths, num_clusters=40)
    keep = suppress(candidates, scores, valid, 0.6, lengths, num_keep)
    expected = greedy(candidates, scores, valid, 0.6, lengths)
    for image in range(2):
        best = [torch.where(k[image], scores[image], -1.0).sort(descending=True) for k in (keep, expected)]
        survivors = min(num_keep, int(expected[image].sum()))
        assert torch.equal(best[0].indices[:survivors], best[1].indices[:survivors])


@pytest.mark.parametrize("block", [64, 256, 1024])
def test_suppress_without_data_dependent_shapes(block):
    """What a GPU runs, against the same answer; the only wait is the look at the end."""
    candidates, scores, valid = make_runs([600], num_images=6)
    expected = greedy(candidates, scores, valid, 0.7, [600])
    with HostWaits() as waits:
        keep = suppress_runs(candidates, valid, 0.7, block=block)
    assert torch.equal(keep, expected)
    assert waits.names == ["_local_scalar_dense"]


def test_suppress_without_data_dependent_shapes_follows_long_chains():
    """Boxes of width 10 at steps of 2 overlap their neighbours by 8 / 12 = 0.67 and the next but one by 6 / 14.

    Every second box survives, and whether box n does hangs on n - 1 and so on to box 0: 300 sweeps' worth, far more
    than are tried at first.
    """
    x = torch.arange(300.0) * 2
    chain = torch.stack([x, torch.zeros(300), x + 10, torch.full((300,), 10.0)], dim=1)[None]
    keep = suppress_runs(chain, torch.ones(1, 300, dtype=torch.bool), 0.5)
    assert torch.equal(keep[0], torch.arange(300) % 2 == 0)


def test_suppress_batched_pads_and_unpads_its_runs():
    """The device's way of `suppress`, run here: levels of unlike lengths, padded, settled at once, taken apart."""
    lengths = [400, 90, 7]
    candidates, scores, valid = make_runs(lengths)
    expected = greedy(candidates, scores, valid, 0.7, lengths)
    keep = suppress_batched(candidates, valid, 0.7, lengths)
    assert torch.equal(keep, expected)


def test_nothing_else_waits_for_the_device():
    targets = make_targets(6, 0, 30)
    anchors, deltas = random_boxes(500), torch.randn(3, 64, 4)
    with HostWaits() as waits:
        truth = pad_ground_truth(targets)
        positive, negative = label_boxes(truth, anchors, 0.7, 0.3, True)
        indices, is_positive, _ = sample_balanced(positive, negative, 64, 0.5)
        closest = closest_object(truth, anchors[indices])
        matched = truth.boxes.gather(1, closest[..., None].expand(-1, -1, 4))
        encode(torch.where(is_positive[..., None], matched, anchors[indices]), anchors[indices])
        clip(decode(deltas, anchors[indices]), [(600, 800)] * 3)
        match(truth, anchors, 0.5, 0.5)
    assert waits.names == []
