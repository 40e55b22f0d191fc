"""Batched box arithmetic of the RPN and the RoI heads: padding, IoU, matching, sampling, coding, suppression.

Boxes are xyxy in pixels of the resized image, float32. Ragged things (objects of an image, proposals) are
padded to one length and carry a mask `valid`, so that nothing here asks the device for a data-dependent size.

Letters: B images, G padded objects, A anchors (or proposals), P proposals, K candidates for
suppression, S runs of them.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import nms

# Values that `match` gives to a box without an object, as in torchvision's Matcher.
BACKGROUND = -1
BETWEEN_THRESHOLDS = -2

# Width and height deltas are clipped here before exp(), as in torchvision's BoxCoder.
MAX_LOG_SCALE = math.log(1000.0 / 16)


class Proposals(NamedTuple):
    """Proposals of a batch, padded to one length."""

    boxes: Tensor  # float32 [B, P, 4] xyxy in resized pixels; zero where not valid
    valid: Tensor  # bool [B, P]


class GroundTruth(NamedTuple):
    """Annotated objects of a batch, padded to G = max(1, most objects in an image)."""

    boxes: Tensor  # float32 [B, G, 4] xyxy in resized pixels; zero where not valid
    labels: Tensor  # int64 [B, G] in 1..K; zero where not valid
    valid: Tensor  # bool [B, G]


def to_device(values, device, dtype=None):
    """Copy a (nested) list of numbers to the device without waiting for it: tensor of the list's shape."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def pad_ground_truth(targets):
    """Stack the objects of all images.

    targets: one dict per image with boxes [N, 4] and labels [N]; N may be 0 and differ between images.
    Returns GroundTruth on the targets' device.
    """
    counts = [len(target["boxes"]) for target in targets]
    boxes = pad_sequence([target["boxes"].reshape(-1, 4).float() for target in targets], batch_first=True)
    labels = pad_sequence([target["labels"] for target in targets], batch_first=True)
    if max(counts) == 0:  # every image is background: one slot that is not valid keeps the shapes usable
        boxes, labels = boxes.new_zeros(len(targets), 1, 4), labels.new_zeros(len(targets), 1)
    slots = torch.arange(boxes.shape[1], device=boxes.device)
    return GroundTruth(boxes, labels, slots < to_device(counts, boxes.device)[:, None])


def area(boxes):
    """Area of boxes [..., 4] -> [...], in square pixels."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def pairwise_iou(a, b):
    """Intersection over union of every pair, the same numbers as torchvision.ops.box_iou.

    a: float32 [..., N, 4], b: float32 [..., M, 4], leading dimensions broadcast.
    Returns float32 [..., N, M] in 0..1 (NaN for a pair of empty boxes).
    One coordinate at a time: a [..., N, M, 2] tensor would double the memory and break the vector loops.
    """
    a_x0, a_y0, a_x1, a_y1 = (c.unsqueeze(-1) for c in a.unbind(-1))
    b_x0, b_y0, b_x1, b_y1 = (c.unsqueeze(-2) for c in b.unbind(-1))
    intersection = torch.minimum(a_x1, b_x1).sub_(torch.maximum(a_x0, b_x0)).clamp_(min=0)
    intersection *= torch.minimum(a_y1, b_y1).sub_(torch.maximum(a_y0, b_y0)).clamp_(min=0)
    union = (area(a).unsqueeze(-1) + area(b).unsqueeze(-2)).sub_(intersection)
    return intersection.div_(union)


def match(ground_truth, boxes, high, low, allow_low_quality=False):
    """Assign each box (anchor or proposal) to at most one object of its image.

    Arguments as `label_boxes`. Returns int64 [B, A]: index of the object, BACKGROUND or BETWEEN_THRESHOLDS.
    Source: torchvision.models.detection._utils.Matcher, whose numbers these are.
    """
    positive, negative = label_boxes(ground_truth, boxes, high, low, allow_low_quality)
    others = torch.where(negative, BACKGROUND, BETWEEN_THRESHOLDS)
    return torch.where(positive, closest_object(ground_truth, boxes), others)


def label_boxes(ground_truth, boxes, high, low, allow_low_quality=False):
    """Decide which boxes belong to an object and which to none.

    ground_truth: GroundTruth. boxes: float32 [A, 4] shared by all images, or [B, A, 4].
    high, low: a box is positive if its best IoU is at least `high`, negative if it is below `low`.
    allow_low_quality: every box that is the best of an object (ties included) is positive, too.
    Returns bool [B, A] positive and negative; what is neither has its best IoU between the thresholds. Padded
    objects count for nothing; in an image without objects every box is negative.

    Objects go through in chunks, so memory stays bounded for hundreds of objects: the whole IoU matrix of
    16 images, 300 objects and 268,569 anchors would take 5 GB. Running maxima instead of comparisons, because
    the processor's vector units do them five times faster.
    """
    num_images, num_objects = ground_truth.valid.shape
    shape = (num_images, boxes.shape[-2])
    boxes = boxes.mT.contiguous().mT  # each coordinate contiguous in memory: vector loads below
    best_iou = boxes.new_full(shape, -1.0)
    # How far a box is ahead of each object's best box, at most: 0 for the best box of any object.
    best_lead = boxes.new_full(shape, -1.0)
    chunk = _chunk_length(boxes.device, shape)
    for start in range(0, num_objects, chunk):
        iou = pairwise_iou(ground_truth.boxes[:, start : start + chunk], boxes)  # [B, chunk, A]
        _raise_to(best_iou, iou)
        if allow_low_quality:
            valid = ground_truth.valid[:, start : start + chunk, None]
            best = torch.where(valid, iou.amax(dim=2, keepdim=True), 2.0)  # nothing is ahead of 2
            _raise_to(best_lead, iou.sub_(best))
    has_objects = ground_truth.valid.any(dim=1, keepdim=True)
    positive = (best_iou >= high) | (best_lead == 0)
    negative = ((best_iou < low) | ~has_objects) & ~positive
    return positive, negative


def _raise_to(best, values):
    """best [B, A] = the larger of best and values [B, chunk, A], in place (fresh memory costs more than the work)."""
    # A reduction over one element would take as long as half of the IoU.
    torch.maximum(best, values.squeeze(1) if values.shape[1] == 1 else values.amax(dim=1), out=best)


def closest_object(ground_truth, boxes):
    """Index of the object that overlaps each box most: int64 [B, A], the first of equal ones.

    ground_truth: GroundTruth. boxes: float32 [A, 4] or [B, A, 4].
    """
    num_images, num_objects = ground_truth.valid.shape
    chunk = _chunk_length(boxes.device, (num_images, num_objects))
    parts = boxes.split(chunk, dim=-2)
    chunks = [pairwise_iou(ground_truth.boxes, part).argmax(dim=1) for part in parts]
    return torch.cat(chunks, dim=1)


def _chunk_length(device, shape):
    """How many slices of this shape to compute at once: cache-sized on the CPU, few launches elsewhere."""
    return max(1, (2**18 if device.type == "cpu" else 2**25) // math.prod(shape))


def sample_balanced(positive, negative, num_samples, positive_fraction, keys=None):
    """Draw at most num_samples boxes an image, at most positive_fraction of them positive, the rest negative.

    positive, negative: bool [B, A], disjoint. keys: float [B, A], uniform in [0, 1); drawn here when None.
    The largest keys win, which draws without replacement from each kind, uniformly, like torchvision's
    BalancedPositiveNegativeSampler, and needs neither a host synchronisation nor a loop over images.
    Returns indices int64 [B, num_samples], is_positive bool, valid bool (same shape): positives first, then
    negatives; slots that could not be filled are not valid and hold index 0.
    """
    num_boxes = positive.shape[1]
    if keys is None:
        keys = torch.rand(positive.shape, device=positive.device)
    max_positives = min(int(num_samples * positive_fraction), num_boxes)
    positive_keys, positive_indices = torch.where(positive, keys, -1.0).topk(max_positives, dim=1)
    negative_keys, negative_indices = torch.where(negative, keys, -1.0).topk(
        min(num_samples, num_boxes), dim=1
    )
    num_positives = (positive_keys >= 0).sum(dim=1, keepdim=True)
    num_negatives = (negative_keys >= 0).sum(dim=1, keepdim=True)
    slots = torch.arange(num_samples, device=positive.device).expand(len(positive), -1)
    is_positive = slots < num_positives
    valid = slots < num_positives + num_negatives
    # Slot n holds positive n while there are any, then negative n - num_positives.
    slots = torch.where(is_positive, slots, max_positives + slots - num_positives)
    candidates = torch.cat([positive_indices, negative_indices], dim=1)
    indices = candidates.gather(1, slots.clamp_(max=candidates.shape[1] - 1))
    return torch.where(valid, indices, 0), is_positive, valid


def encode(boxes, anchors, weights=(1.0, 1.0, 1.0, 1.0)):
    """Deltas that turn anchors into boxes: float32 [..., 4], dx, dy, log width, log height, each times its
    weight.

    boxes, anchors: [..., 4] xyxy in pixels, of positive width and height. Same numbers as torchvision's
    BoxCoder.
    """
    x, y, width, height = _center_size(boxes.float())
    anchor_x, anchor_y, anchor_width, anchor_height = _center_size(anchors.float())
    weight_x, weight_y, weight_width, weight_height = weights
    deltas = (
        weight_x * (x - anchor_x) / anchor_width,
        weight_y * (y - anchor_y) / anchor_height,
        weight_width * torch.log(width / anchor_width),
        weight_height * torch.log(height / anchor_height),
    )
    return torch.stack(deltas, dim=-1)


def decode(deltas, anchors, weights=(1.0, 1.0, 1.0, 1.0)):
    """Boxes that the deltas make of the anchors, the inverse of `encode`: float32 [..., 4] xyxy in pixels.

    deltas: [..., 4], anchors: [..., 4], leading dimensions broadcast ([R, K, 4] with [R, 1, 4] decodes every
    class). Growth is clipped to 1000 / 16. Computed in float32 whatever the inputs' dtype; the same numbers
    as torchvision's BoxCoder in float32.
    """
    anchor_x, anchor_y, anchor_width, anchor_height = _center_size(anchors.float())
    weight_x, weight_y, weight_width, weight_height = weights
    dx, dy, log_width, log_height = deltas.float().unbind(-1)
    x = dx / weight_x * anchor_width + anchor_x
    y = dy / weight_y * anchor_height + anchor_y
    half_width = 0.5 * ((log_width / weight_width).clamp(max=MAX_LOG_SCALE).exp() * anchor_width)
    half_height = 0.5 * ((log_height / weight_height).clamp(max=MAX_LOG_SCALE).exp() * anchor_height)
    return torch.stack((x - half_width, y - half_height, x + half_width, y + half_height), dim=-1)


def _center_size(boxes):
    """Centre and size of boxes [..., 4] xyxy: four tensors [...] (x, y, width, height)."""
    x0, y0, x1, y1 = boxes.unbind(-1)
    width, height = x1 - x0, y1 - y0
    return x0 + 0.5 * width, y0 + 0.5 * height, width, height


def clip(boxes, image_sizes):
    """Clip boxes [B, P, 4] xyxy to their images; image_sizes: list of B (height, width) in pixels."""
    limits = to_device([[[w, h, w, h]] for h, w in image_sizes], boxes.device, boxes.dtype)  # [B, 1, 4]
    return torch.minimum(boxes.clamp(min=0), limits)


def suppress(boxes, scores, valid, iou_threshold, lengths, num_keep):
    """Non-maximum suppression within runs of boxes: a box goes if an earlier, kept box of its run overlaps it.

    boxes: float32 [B, K, 4]; scores: float32 [B, K]; valid: bool [B, K]; lengths: the runs' lengths, summing to K
    (the RPN's levels), scores falling within each run. Boxes that are not valid neither stay nor suppress.
    num_keep: how many boxes of an image matter; survivors after the num_keep best of their image may be missing.
    Returns bool [B, K], the boxes that stay: those of the greedy algorithm on the boxes' own coordinates.
    (torchvision.ops.batched_nms shifts small batches by a multiple of the level, which rounds coordinates.)
    """
    if boxes.device.type == "cpu":
        return suppress_on_cpu(boxes, scores, valid, iou_threshold, lengths, num_keep)
    return suppress_batched(boxes, valid, iou_threshold, lengths)


def suppress_on_cpu(boxes, scores, valid, iou_threshold, lengths, num_keep):
    """`suppress` by torchvision's operator, run by run.

    Its time grows with the square of a run. Boxes below the num_keep best survivors cannot change these, so the
    better part of the candidates is tried first: a quarter of the time for 2,000 of 8,663 candidates of which
    most survive. Where too few do, the second try adds that much.
    """
    keep = torch.zeros_like(valid)
    for image in range(len(boxes)):
        scores_valid = torch.where(valid[image], scores[image], -1.0)
        for num_tried in (2 * num_keep, len(scores_valid)):
            lowest = scores_valid.topk(min(num_tried, len(scores_valid))).values[-1]
            tried = valid[image] & (scores_valid >= lowest)
            first = 0
            for length in lengths:
                run = tried[first : first + length].nonzero().squeeze(1) + first
                kept = nms(boxes[image, run], scores[image, run], iou_threshold)
                keep[image].index_fill_(0, run[kept], True)
                first += length
            if num_tried >= len(scores_valid) or keep[image].sum() >= num_keep:
                break
    return keep


def suppress_batched(boxes, valid, iou_threshold, lengths):
    """`suppress` of all images and runs at once, each run padded to the longest."""
    longest = max(lengths)
    runs = torch.stack([_pad_rows(run, longest) for run in boxes.split(lengths, dim=1)], dim=1)
    runs_valid = torch.stack([_pad_rows(run, longest) for run in valid.split(lengths, dim=1)], dim=1)
    keep = suppress_runs(runs.flatten(0, 1), runs_valid.flatten(0, 1), iou_threshold).view_as(runs_valid)
    return torch.cat([run[:, :n] for run, n in zip(keep.unbind(dim=1), lengths, strict=True)], dim=1)


def suppress_runs(boxes, valid, iou_threshold, block=256, num_sweeps=16):
    """`suppress` for runs of one length, without a data-dependent shape: boxes [S, N, 4], valid bool [S, N].

    Blocks of boxes are settled in turn. Within a block, "kept = valid and not overlapped by an earlier kept
    one" is repeated until nothing changes; each sweep settles at least one more box, so what no longer
    changes is the greedy answer. Few sweeps are needed. One look at the device, at the end, tells whether
    they were enough; `block` sweeps always are.
    """
    keep = valid.clone()
    settled = torch.ones((), dtype=torch.bool, device=boxes.device)
    for start in range(0, boxes.shape[1], block):
        overlaps = pairwise_iou(boxes[:, start : start + block], boxes[:, start:]) > iou_threshold
        within = overlaps[:, :, :block].triu(1)  # [S, block, block]: the earlier box overlaps the later
        candidates = keep[:, start : start + block].clone()
        kept = candidates
        for _ in range(num_sweeps):
            before, kept = kept, candidates & ~(within & kept[:, :, None]).any(dim=1)
        settled &= (before == kept).all()
        keep[:, start : start + block] = kept
        keep[:, start + block :] &= ~(overlaps[:, :, block:] & kept[:, :, None]).any(dim=1)
    if num_sweeps <= block and not settled:
        return suppress_runs(boxes, valid, iou_threshold, block, num_sweeps=block + 1)
    return keep


def _pad_rows(values, length):
    """values [B, N, ...] with zero rows appended: [B, length, ...]."""
    padded = values.new_zeros(len(values), length, *values.shape[2:])
    padded[:, : values.shape[1]] = values
    return padded
