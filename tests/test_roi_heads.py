"""roi_heads.py against torchvision's RoIHeads for the same weights, proposals and sampled indices."""

import copy
import math
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.detection import roi_heads as reference
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

import roi_heads
from boxes import Proposals, sample_balanced
from masks import CroppedMasks
from roi_heads import Bitmaps, RoIHeads, Samples, keypoint_loss

CHANNELS = 8
NUM_CLASSES = 4  # with background
NUM_KEYPOINTS = 3
ORIGINAL_SIZES = [(96, 128), (90, 70)]  # height, width
IMAGE_SIZES = [(120, 160), (154, 120)]  # what min_size 120 makes of them: 96 -> 120, 70 -> 120
LEVELS = {"0": 4, "1": 8, "2": 16, "3": 32}


class KeyedSampler:
    """torchvision's sampler with its randomness given: of each kind the boxes of the largest keys.

    keys: float [B, P + G] as for the padded tensors; image i has num_objects[i] objects behind its proposals.
    """

    def __init__(self, sampler, keys, num_objects):
        self.batch_size_per_image, self.positive_fraction = (
            sampler.batch_size_per_image,
            sampler.positive_fraction,
        )
        self.keys, self.num_objects = keys, num_objects

    def __call__(self, labels_of_images):
        first_object = self.keys.shape[1] - max(1, *self.num_objects, 0)
        positives, negatives = [], []
        for labels, keys, n in zip(labels_of_images, self.keys, self.num_objects, strict=True):
            own_keys = torch.cat([keys[: len(labels) - n], keys[first_object : first_object + n]])
            wanted = int(self.batch_size_per_image * self.positive_fraction)
            chosen = []
            for kind in (labels >= 1, labels == 0):
                order = torch.where(kind, own_keys, -1.0).argsort(descending=True)
                order = order[: min(wanted, int(kind.sum()))]
                chosen.append(torch.zeros_like(labels, dtype=torch.uint8).index_fill_(0, order, 1))
                wanted = self.batch_size_per_image - len(order)
            positives.append(chosen[0])
            negatives.append(chosen[1])
        return positives, negatives


def make_heads(masks=True, keypoints=False, live_norm=False, num_samples=64, seed=0):
    torch.manual_seed(seed)
    norm = torch.nn.BatchNorm2d if live_norm else None
    if live_norm:
        box_head = FastRCNNConvFCHead((CHANNELS, 7, 7), [CHANNELS, CHANNELS], [32], norm_layer=norm)
    else:
        box_head = TwoMLPHead(CHANNELS * 49, 32)
    heads = reference.RoIHeads(
        MultiScaleRoIAlign(list(LEVELS), 7, 2),
        box_head,
        FastRCNNPredictor(32, NUM_CLASSES),
        *(0.5, 0.5, num_samples, 0.25, None, 0.05, 0.5, 20),
    )
    if masks:
        heads.mask_roi_pool = MultiScaleRoIAlign(list(LEVELS), 14, 2)
        heads.mask_head = MaskRCNNHeads(CHANNELS, [CHANNELS, CHANNELS], 1, norm_layer=norm)
        heads.mask_predictor = MaskRCNNPredictor(CHANNELS, 12, NUM_CLASSES)
    if keypoints:
        heads.keypoint_roi_pool = MultiScaleRoIAlign(list(LEVELS), 14, 2)
        heads.keypoint_head = KeypointRCNNHeads(CHANNELS, [CHANNELS])
        heads.keypoint_predictor = KeypointRCNNPredictor(CHANNELS, NUM_KEYPOINTS)
    for name, parameter in heads.named_parameters():  # zero biases would hide a misplaced one
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return heads


def make_features(dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: (2, CHANNELS, 160 // stride, 160 // stride) for name, stride in LEVELS.items()}
    return OrderedDict(
        (name, torch.randn(shape, generator=generator).to(dtype).requires_grad_())
        for name, shape in shapes.items()
    )


def random_boxes(number, size, generator):
    """Boxes of 6 to 60% of the image's side, inside it: float32 [N, 4]."""
    height, width = size
    side = (torch.rand(number, 2, generator=generator) * 0.54 + 0.06) * torch.tensor([width, height])
    corner = torch.rand(number, 2, generator=generator) * (torch.tensor([width, height]) - side)
    return torch.cat([corner, corner + side], dim=1)


def make_targets(counts, seed=2):
    """Targets in resized pixels, and torchvision's with the masks resized as its transform does."""
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = [], []
    for count, original, size in zip(counts, ORIGINAL_SIZES, IMAGE_SIZES, strict=True):
        boxes = random_boxes(count, size, generator)
        labels = torch.randint(1, NUM_CLASSES, (count,), generator=generator)
        dense = random_masks(boxes, original, size, generator)
        places = torch.rand(count, NUM_KEYPOINTS, 2, generator=generator) * 1.2 - 0.1
        places = boxes[:, None, :2] + places * (boxes[:, None, 2:] - boxes[:, None, :2])
        seen = torch.randint(0, 3, (count, NUM_KEYPOINTS, 1), generator=generator)
        common = {"boxes": boxes, "labels": labels, "keypoints": torch.cat([places, seen], dim=2)}
        ours.append({**common, "masks": CroppedMasks.from_dense(dense), "image_id": 7})
        theirs.append({**common, "masks": resize_as_torchvision(dense, original, size)})
    return ours, theirs


def random_masks(boxes, original, size, generator):
    """Two blobs an object, one of them anywhere: masks have parts and reach beyond their boxes."""
    dense = torch.zeros(len(boxes), *original, dtype=torch.uint8)
    scale = original[0] / size[0]
    for mask, box in zip(dense, boxes * scale, strict=True):
        x0, y0, x1, y1 = box.int().tolist()
        mask[y0 : y1 + 2, x0 : x1 + 1] = (
            torch.rand(mask[y0 : y1 + 2, x0 : x1 + 1].shape, generator=generator) < 0.7
        )
        y, x = (int(torch.randint(0, side - 9, (), generator=generator)) for side in original)
        mask[y : y + 9, x : x + 5] = 1
    return dense


def resize_as_torchvision(dense, original, size):
    factor = min(size) / min(original)
    return F.interpolate(dense[:, None].float(), scale_factor=factor, recompute_scale_factor=True)[
        :, 0
    ].byte()


def make_proposals(targets, number=80, seed=3):
    """Half random, half objects shaken by up to a fifth of their side; lists for torchvision, padded for us."""
    generator = torch.Generator().manual_seed(seed)
    lists = []
    for i, (target, size) in enumerate(zip(targets, IMAGE_SIZES, strict=True)):
        boxes = random_boxes(number - 9 * i, size, generator)  # of unequal number
        if len(target["boxes"]):
            near = target["boxes"][torch.arange(len(boxes) // 2) % len(target["boxes"])]
            side = (near[:, 2:] - near[:, :2]).repeat(1, 2)
            boxes[: len(near)] = near + side * (torch.rand(near.shape, generator=generator) - 0.5) * 0.4
        lists.append(boxes)
    padded = torch.nn.utils.rnn.pad_sequence(lists, batch_first=True)
    valid = torch.arange(padded.shape[1]) < torch.tensor([len(b) for b in lists])[:, None]
    return lists, Proposals(padded, valid)


def inject_sampling(monkeypatch, heads, proposals, counts, seed=4):
    """The same random keys for torchvision's heads and ours."""
    shape = (len(counts), proposals.valid.shape[1] + max(1, *counts))
    keys = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    heads.fg_bg_sampler = KeyedSampler(heads.fg_bg_sampler, keys, counts)
    monkeypatch.setattr(roi_heads, "sample_balanced", lambda *args: sample_balanced(*args, keys=keys))


def gradients(losses, module, features):
    inputs = [*module.parameters(), *features.values()]
    found = torch.autograd.grad(sum(losses.values()), inputs, allow_unused=True)
    names = [*(name for name, _ in module.named_parameters()), *features]
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, inputs, found, strict=True)}


def assert_same_step(monkeypatch, heads, counts):
    """Losses within 1e-5 and gradients within 1e-4 of torchvision's, relative to the largest entry."""
    targets, their_targets = make_targets(counts)
    lists, proposals = make_proposals(targets)
    ours = RoIHeads.from_torchvision(copy.deepcopy(heads))
    inject_sampling(monkeypatch, heads, proposals, counts)
    features = make_features()
    _, expected = heads(features, lists, IMAGE_SIZES, their_targets)
    _, losses = ours(features, proposals, IMAGE_SIZES, targets)
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(
            loss, expected[name], rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )
    expected_gradients = gradients(expected, heads, features)
    for name, gradient in gradients(losses, ours, features).items():
        their = expected_gradients[name]
        torch.testing.assert_close(
            gradient,
            their,
            rtol=0,
            atol=1e-4 * float(their.abs().max()) + 1e-7,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("counts", [(5, 3), (1, 0), (0, 0), (300, 2)], ids=str)
def test_losses_and_gradients_equal_torchvisions(monkeypatch, counts):
    assert_same_step(monkeypatch, make_heads(), counts)


@pytest.mark.parametrize(
    "parts", [{"masks": False}, {"masks": False, "keypoints": True}, {"keypoints": True}], ids=str
)
def test_every_combination_of_heads(monkeypatch, parts):
    assert_same_step(monkeypatch, make_heads(**parts), (4, 2))


def test_live_batch_norms_see_drawn_rois_only(monkeypatch):
    # 512 slots an image cannot be filled from 80 proposals: padding would move the batch's statistics.
    assert_same_step(monkeypatch, make_heads(live_norm=True, num_samples=512), (4, 0))


def test_invisible_keypoints_give_no_loss():
    heads = RoIHeads.from_torchvision(make_heads(masks=False, keypoints=True))
    targets, _ = make_targets((3, 1))
    for target in targets:
        target["keypoints"][..., 2] = 0
    _, losses = heads(make_features(), make_proposals(targets)[1], IMAGE_SIZES, targets)
    assert losses["loss_keypoint"] == 0


def test_bfloat16_autocast(monkeypatch):
    """Losses within 2% of float32's: sums of products rounded to 8 bits, averaged over many RoIs."""
    heads = make_heads()
    targets, _ = make_targets((5, 3))
    _, proposals = make_proposals(targets)
    ours = RoIHeads.from_torchvision(heads)
    inject_sampling(monkeypatch, heads, proposals, (5, 3))
    _, expected = ours(make_features(), proposals, IMAGE_SIZES, targets)
    features = make_features(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        _, losses = ours(features, proposals, IMAGE_SIZES, targets)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected[name], rtol=0.02, atol=0.002)
    assert all(g.isfinite().all() for g in gradients(losses, ours, features).values())


def test_targets_are_not_changed():
    targets, _ = make_targets((3, 2))
    before = copy.deepcopy([{k: v for k, v in t.items() if k != "masks"} for t in targets])
    RoIHeads.from_torchvision(make_heads())(make_features(), make_proposals(targets)[1], IMAGE_SIZES, targets)
    for target, kept in zip(targets, before, strict=True):
        assert target.keys() - {"masks"} == kept.keys()
        assert all(torch.equal(torch.as_tensor(target[k]), torch.as_tensor(kept[k])) for k in kept)


def test_a_box_without_width_is_named():
    targets, _ = make_targets((2, 2))
    targets[1]["boxes"][1] = torch.tensor([5.0, 6.0, 5.0, 9.0])
    heads = RoIHeads.from_torchvision(make_heads())
    with pytest.raises(
        ValueError, match=r"image 7: object 1 has box \[5\.0, 6\.0, 5\.0, 9\.0\].*without width"
    ):
        heads(make_features(), make_proposals(targets)[1], IMAGE_SIZES, targets)


def test_keypoint_loss_by_hand():
    """An RoI from 0 to 8 pixels and a heatmap of 2×2: (1, 5) is cell 2; (8, 0), on the far edge, the last column's, 1.

    (8.1, 0) is outside and (1, 1) invisible. Logits are 0 but for a 1 in cell 2: log(3 + e) - 1 for the first
    keypoint, log(3 + e) for the second.
    """
    keypoints = torch.tensor([[[1.0, 5.0, 1.0], [8.0, 0.0, 2.0], [8.1, 0.0, 2.0], [1.0, 1.0, 0.0]]])
    logits = torch.zeros(1, 4, 2, 2)
    logits[:, :, 1, 0] = 1
    loss = keypoint_loss(logits, keypoints, torch.tensor([[0.0, 0.0, 8.0, 8.0]]))
    assert loss.item() == pytest.approx(math.log(3 + math.e) - 0.5)


# --- evaluation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("keypoints", [False, True])
def test_detections_equal_torchvisions(keypoints):
    heads = make_heads(masks=not keypoints, keypoints=keypoints).eval()
    torch.nn.init.normal_(heads.box_predictor.cls_score.weight, std=0.3)  # confident enough to detect
    torch.nn.init.normal_(heads.box_predictor.bbox_pred.weight, std=0.3)
    targets, _ = make_targets((4, 3))
    lists, proposals = make_proposals(targets)
    ours = RoIHeads.from_torchvision(heads)
    with torch.no_grad():
        expected, _ = heads(make_features(), lists, IMAGE_SIZES)
        found, losses = ours(make_features(), proposals, IMAGE_SIZES)
    assert losses == {}
    for detections, theirs in zip(found, expected, strict=True):
        assert len(theirs["boxes"]) > 5
        assert detections["labels"].tolist() == theirs["labels"].tolist()
        torch.testing.assert_close(detections["boxes"], theirs["boxes"], rtol=0, atol=1e-3)
        torch.testing.assert_close(detections["scores"], theirs["scores"], rtol=0, atol=1e-5)
        if keypoints:
            torch.testing.assert_close(detections["keypoints"], theirs["keypoints"], rtol=0, atol=1e-3)
            torch.testing.assert_close(
                detections["keypoints_scores"], theirs["keypoints_scores"], rtol=0, atol=1e-4
            )
        else:
            torch.testing.assert_close(detections["mask_probs"], theirs["masks"][:, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("nothing", ["above the threshold", "proposed"])
def test_no_detections(nothing):
    heads = RoIHeads.from_torchvision(make_heads(keypoints=True).eval())
    _, proposals = make_proposals(make_targets((1, 1))[0])
    if nothing == "proposed":
        proposals = Proposals(torch.zeros(2, 5, 4), torch.zeros(2, 5, dtype=torch.bool))
    else:
        heads.score_thresh = 1.0
    with torch.no_grad():
        found, _ = heads(make_features(), proposals, IMAGE_SIZES)
    for detections in found:
        assert detections["boxes"].shape == (0, 4)
        assert detections["mask_probs"].shape == (0, 28, 28)
        assert detections["keypoints"].shape == (0, NUM_KEYPOINTS, 3)


# --- mask targets --------------------------------------------------------------------------------------


def torchvision_targets(dense, original, size, boxes, objects, side):
    masks = resize_as_torchvision(dense, original, size)
    return reference.project_masks_on_boxes(masks, boxes, objects, side)


@pytest.fixture(params=["by object", "by chunk"])
def way(request, monkeypatch):
    """Both ways of reading targets; chunks so small that several are needed."""
    if request.param == "by chunk":
        monkeypatch.setattr(Bitmaps, "_by_object", Bitmaps._by_chunk)
        monkeypatch.setattr(roi_heads, "CHUNK_PIXELS", 2**14)


def read_targets(masks, sizes, boxes, image_index, object_index, side=28):
    """Bitmaps.targets behind a few negatives' worth of drawn samples that it must not mind."""
    labels = torch.ones(len(boxes), dtype=torch.int64)
    positives = Samples(boxes, image_index, object_index, labels)
    negative = Samples(torch.tensor([[0.0, 0.0, 9000.0, 9000.0]]), *torch.zeros(3, 1, dtype=torch.int64))
    samples = Samples(*(torch.cat(pair) for pair in zip(positives, negative, strict=True)))
    bitmaps = Bitmaps(masks, sizes)
    return bitmaps.targets(positives, side, bitmaps.layout(samples).tolist())


@pytest.mark.parametrize(
    ("original", "size"),
    [((96, 128), (120, 160)), ((107, 160), (200, 299)), ((120, 90), (66, 50)), ((64, 64), (64, 64))],
    ids=str,
)
def test_mask_targets_equal_torchvisions(way, original, size):
    generator = torch.Generator().manual_seed(5)
    boxes = random_boxes(12, size, generator)
    dense = random_masks(boxes, original, size, generator)
    dense[3] = 0  # an object without a pixel
    dense[4] = 1  # one that fills the frame
    objects = torch.randint(0, 12, (60,), generator=generator)
    side = (boxes[objects, 2:] - boxes[objects, :2]).repeat(1, 2)
    rois = boxes[objects] + side * (torch.rand(60, 4, generator=generator) - 0.5)
    rois[:5] = torch.tensor([[-30.0, -20.0, 40.0, 30.0]])  # over the corner
    rois[5:9, 2:] = torch.tensor([size[1] + 25.0, size[0] + 9.0])  # over the far corner
    rois[9] = torch.tensor([10.3, 10.7, 10.4, 10.8])  # narrower than a pixel
    rois[10] = torch.tensor([0.0, 0.0, size[1], size[0]])
    expected = torchvision_targets(dense, original, size, rois, objects, 28)
    index = torch.zeros(60, dtype=torch.int64)
    targets = read_targets([CroppedMasks.from_dense(dense)], [size], rois, index, objects)
    assert 0.05 < expected.mean() < 0.95
    torch.testing.assert_close(targets, expected, rtol=0, atol=1e-5)


def test_mask_targets_of_images_of_unequal_size(way):
    generator = torch.Generator().manual_seed(6)
    boxes = [random_boxes(4, size, generator) for size in IMAGE_SIZES]
    dense = [
        random_masks(b, o, s, generator) for b, o, s in zip(boxes, ORIGINAL_SIZES, IMAGE_SIZES, strict=True)
    ]
    objects = torch.arange(4)
    expected = [
        torchvision_targets(d, o, s, b, objects, 28)
        for d, o, s, b in zip(dense, ORIGINAL_SIZES, IMAGE_SIZES, boxes, strict=True)
    ]
    masks = [CroppedMasks.from_dense(d) for d in dense]
    index = torch.arange(2).repeat_interleave(4)
    targets = read_targets(masks, IMAGE_SIZES, torch.cat(boxes), index, objects.repeat(2))
    torch.testing.assert_close(targets, torch.cat(expected), rtol=0, atol=1e-5)


def test_mask_target_by_hand(way):
    """A box of 8×8 pixels and targets of 4×4: each cell averages one sample at its centre, the corner of 4 pixels.

    Cells are 2 pixels wide, ceil(8 / 4) = 2 samples an axis at 0.5 and 1.5 from the cell's left edge, each halfway
    between two pixels. Along x the mask covers pixels 0, 1 and 2: cell 0 reads 0|1 and 1|2: 1; cell 1 (pixels
    2|3, 3|4): (1/2 + 0) / 2 = 1/4. Along y it covers everything.
    """
    dense = torch.zeros(1, 8, 8, dtype=torch.uint8)
    dense[0, :, :3] = 1
    box = torch.tensor([[0.0, 0.0, 8.0, 8.0]])
    zero = torch.zeros(1, dtype=torch.int64)
    targets = read_targets([CroppedMasks.from_dense(dense)], [(8, 8)], box, zero, zero, side=4)
    assert targets.tolist() == [[[1.0, 0.25, 0.0, 0.0]] * 4]


def test_chunks_by_hand(monkeypatch):
    # Largest first: 6×5, then 2×9 would pad both to 6×9 = 54 pixels each; 1×1 fits beside 2×9 in 2 * 18.
    monkeypatch.setattr(roi_heads, "CHUNK_PIXELS", 40)
    sizes = [(1, 1), (0, 0), (6, 5), (2, 9)]
    assert list(roi_heads._chunks(sizes)) == [([2], 6, 5), ([3, 0], 2, 9)]


class Watch(TorchDispatchMode):
    """Notes operators whose result's shape depends on data (a GPU would make the host wait), and the largest tensor."""

    WAITING = ("nonzero", "masked_select", "_local_scalar_dense", "unique", "bincount", "item")

    def __init__(self):
        super().__init__()
        self.waits, self.largest = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if by_mask or any(word in name for word in self.WAITING):
            self.waits.append(str(func))
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def test_the_host_reads_the_device_once_a_step(monkeypatch):
    monkeypatch.setattr(Bitmaps, "_by_object", Bitmaps._by_chunk)
    heads = RoIHeads.from_torchvision(make_heads(keypoints=True))
    targets, _ = make_targets((5, 3))
    proposals = make_proposals(targets)[1]
    reads = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: reads.append(t.shape) or tolist(t))
    features = make_features()
    with Watch() as watch:
        _, losses = heads(features, proposals, IMAGE_SIZES, targets)
        sum(losses.values()).backward()
    assert watch.waits == []
    assert len(reads) == 1


def test_300_masks_take_no_frames(way):
    """300 objects of 500×600 resized to 1000×1200 are 360 million pixels; nothing near that is allocated."""
    generator = torch.Generator().manual_seed(7)
    rects = random_boxes(300, (500, 600), generator).int().long()
    sizes = (rects[:, 2] - rects[:, 0]) * (rects[:, 3] - rects[:, 1])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    masks = CroppedMasks(rects, offsets, torch.ones(int(offsets[-1]), dtype=torch.uint8), (500, 600))
    boxes = rects[:, :].float() * 2
    with Watch() as watch:
        targets = read_targets(
            [masks], [(1000, 1200)], boxes, torch.zeros(300, dtype=torch.int64), torch.arange(300)
        )
    assert watch.largest <= len(masks.pixels)
    # Every mask fills its box, so every target is 1; the last samples lean on a pixel outside, but half at most.
    assert targets.min() > 0.5
    assert targets[:, 1:-1, 1:-1].min() > 0.99
