"""The second stage of the R-CNN family, batched over images: samples, losses and detections.

Takes the place of torchvision's RoIHeads with the same submodules, state_dict keys and numbers. What differs:
- training never loops over images. The samples of all images lie in one list, positives first, so the mask and
  keypoint heads take the front of it. The host waits for the device once, to learn how many there are;
- the RoIs of all heads are pooled in one product (roi_align.py);
- mask targets are read from bitmaps cropped to their objects, which never become full frames;
- of the mask logits only those of each RoI's own label are computed;
- losses, box coding and NMS are float32 under autocast too.

Letters: B images, G padded objects of an image, A proposals and objects of an image together, S samples of an
image, R RoIs (of all images), P positives among them, N objects of all images, K classes (labels 1..K, 0
background), M cells along a mask target's side, J keypoints, D detections.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.roi_heads import keypointrcnn_inference

from boxes import (
    BACKGROUND,
    GroundTruth,
    Proposals,
    decode,
    encode,
    match,
    pad_ground_truth,
    sample_balanced,
    to_device,
)
from masks import CroppedMasks
from roi_align import FeaturePyramid, Request, bilinear_taps

MIN_DETECTION_SIDE = 1e-2  # pixels; torchvision drops smaller detections
CHUNK_PIXELS = 2**23  # of bitmaps padded to one size and multiplied at once: 32 MiB in float32


class Samples(NamedTuple):
    """RoIs that a training step looks at, all positives before all negatives."""

    boxes: Tensor  # float32 [R, 4] xyxy in resized pixels
    image_index: Tensor  # int64 [R]
    object_index: Tensor  # int64 [R] in 0..G-1, the matched object of the image; 0 for negatives
    labels: Tensor  # int64 [R] in 0..K, 0 for negatives

    def first(self, number: int) -> "Samples":
        return Samples(*(tensor[:number] for tensor in self))


class RoIHeads(torchvision.models.detection.roi_heads.RoIHeads):
    """torchvision's RoIHeads, batched. Detections carry "mask_probs" [D, M, M] where it gives "masks"."""

    @classmethod
    def from_torchvision(cls, heads: torchvision.models.detection.roi_heads.RoIHeads) -> "RoIHeads":
        """The same submodules and settings behind this class."""
        return cls(
            heads.box_roi_pool,
            heads.box_head,
            heads.box_predictor,
            heads.proposal_matcher.high_threshold,
            heads.proposal_matcher.low_threshold,
            heads.fg_bg_sampler.batch_size_per_image,
            heads.fg_bg_sampler.positive_fraction,
            heads.box_coder.weights,
            heads.score_thresh,
            heads.nms_thresh,
            heads.detections_per_img,
            heads.mask_roi_pool,
            heads.mask_head,
            heads.mask_predictor,
            heads.keypoint_roi_pool,
            heads.keypoint_head,
            heads.keypoint_predictor,
        ).train(heads.training)

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: Proposals,
        image_sizes: Sequence[tuple[int, int]],
        targets: Sequence[dict[str, Any]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections (none in training) and losses (none in evaluation).

        features: level name -> [B, C, H_l, W_l]. image_sizes: B (height, width) of the resized images, unpadded.
        targets, in training, one dict per image: boxes float32 [N, 4] xyxy and keypoints float32 [N, J, 3] in
        resized pixels, labels int64 [N] in 1..K, masks CroppedMasks in original pixels; N may be 0.
        Raises ValueError if a target lacks a key, or one of its boxes has no width or height.
        """
        pyramid = FeaturePyramid(features, image_sizes)
        if self.training:
            self.check_targets(targets)
            return [], self._losses(pyramid, proposals, image_sizes, targets)
        return self._detections(pyramid, proposals, image_sizes), {}

    # ------------------------------------------------------------------ training

    def _losses(self, pyramid, proposals, image_sizes, targets):
        truth = pad_ground_truth(targets)
        samples, num_samples, num_positives = self._draw(proposals, truth)
        questions = [num_samples, num_positives, _degenerate(truth).any()]
        questions = [torch.stack([question.to(torch.int64) for question in questions])]
        if self.has_mask():
            bitmaps = Bitmaps([target["masks"] for target in targets], image_sizes)
            questions.append(bitmaps.layout(samples))
        # The only place where the host waits for the device.
        num_samples, num_positives, any_degenerate, *layout = torch.cat(questions).tolist()
        if any_degenerate:
            raise ValueError(_describe_degenerate(truth, targets))
        samples = samples.first(num_samples)
        positives = samples.first(num_positives)

        requests = [Request(self.box_roi_pool, samples.boxes, samples.image_index)]
        if self.has_mask():
            requests.append(Request(self.mask_roi_pool, positives.boxes, positives.image_index))
        if self.has_keypoint():
            requests.append(Request(self.keypoint_roi_pool, positives.boxes, positives.image_index))
        pooled = iter(pyramid.roi_align(requests))

        class_logits, deltas = self.box_predictor(box_head(self.box_head, next(pooled)))
        object_boxes = truth.boxes[positives.image_index, positives.object_index]
        target_deltas = encode(object_boxes, positives.boxes, self.box_coder.weights)
        losses = box_losses(class_logits, deltas, samples.labels, target_deltas)
        if self.has_mask():
            logits = label_mask_logits(self.mask_predictor, self.mask_head(next(pooled)), positives.labels)
            mask_targets = bitmaps.targets(positives, logits.shape[-1], layout)
            losses["loss_mask"] = mask_loss(logits, mask_targets)
        if self.has_keypoint():
            logits = self.keypoint_predictor(self.keypoint_head(next(pooled)))
            keypoints = torch.cat([target["keypoints"] for target in targets])
            first_object = _first_objects([len(target["keypoints"]) for target in targets], keypoints.device)
            object_number = first_object[positives.image_index] + positives.object_index
            losses["loss_keypoint"] = keypoint_loss(logits, keypoints[object_number], positives.boxes)
        return losses

    def _draw(self, proposals: Proposals, truth: GroundTruth) -> tuple[Samples, Tensor, Tensor]:
        """Match proposals and the objects themselves, draw S an image, and line them up: positives, negatives,
        then empty slots. Returns B * S Samples, and how many are drawn and how many positive, int64 [].
        """
        boxes = torch.cat([proposals.boxes, truth.boxes], dim=1)  # [B, A, 4]
        valid = torch.cat([proposals.valid, truth.valid], dim=1)
        matcher, sampler = self.proposal_matcher, self.fg_bg_sampler
        matches = match(truth, boxes, matcher.high_threshold, matcher.low_threshold)  # [B, A]
        indices, is_positive, is_drawn = sample_balanced(
            valid & (matches >= 0),
            valid & (matches == BACKGROUND),
            sampler.batch_size_per_image,
            sampler.positive_fraction,
        )  # [B, S]
        object_index = matches.gather(1, indices).clamp_(min=0)
        labels = torch.where(is_positive, truth.labels.gather(1, object_index), 0)
        image_index = torch.arange(len(boxes), device=boxes.device)[:, None].expand_as(indices)
        drawn = boxes.gather(1, indices[..., None].expand(-1, -1, 4))
        rank = torch.where(is_positive, 0, torch.where(is_drawn, 1, 2)).flatten()
        order = rank.argsort(stable=True)
        slots = (tensor.flatten(0, 1)[order] for tensor in (drawn, image_index, object_index, labels))
        return Samples(*slots), is_drawn.sum(), is_positive.sum()

    # ------------------------------------------------------------------ evaluation

    def _detections(self, pyramid, proposals, image_sizes):
        image_index, slot = proposals.valid.nonzero(as_tuple=True)
        rois = proposals.boxes[image_index, slot]
        (pooled,) = pyramid.roi_align([Request(self.box_roi_pool, rois, image_index)])
        class_logits, deltas = self.box_predictor(box_head(self.box_head, pooled))
        results = self._select(class_logits, deltas, rois, image_index, image_sizes)

        boxes = [result["boxes"] for result in results]
        counts = [len(b) for b in boxes]
        image_index = torch.arange(len(boxes), device=rois.device)
        image_index = image_index.repeat_interleave(to_device(counts, rois.device), output_size=sum(counts))
        if self.has_mask():
            (pooled,) = pyramid.roi_align([Request(self.mask_roi_pool, torch.cat(boxes), image_index)])
            labels = torch.cat([result["labels"] for result in results])
            logits = label_mask_logits(self.mask_predictor, self.mask_head(pooled), labels)
            for result, probs in zip(results, logits.float().sigmoid().split(counts), strict=True):
                result["mask_probs"] = probs
        if self.has_keypoint():
            (pooled,) = pyramid.roi_align([Request(self.keypoint_roi_pool, torch.cat(boxes), image_index)])
            heatmaps = self.keypoint_predictor(self.keypoint_head(pooled)).float()
            for result, points, scores in zip(results, *keypointrcnn_inference(heatmaps, boxes), strict=True):
                result["keypoints"], result["keypoints_scores"] = points, scores
        return results

    def _select(self, class_logits, deltas, rois, image_index, image_sizes):
        """Score threshold, NMS within each class, the best detections of each image.

        Only candidates above the threshold are decoded, a few of the R * K. Order and ties as in torchvision's
        postprocess_detections.
        """
        scores = class_logits.float().softmax(-1)[:, 1:]
        candidate, column = (scores > self.score_thresh).nonzero(as_tuple=True)
        labels = column + 1
        scores = scores[candidate, column]
        deltas = deltas.unflatten(1, (-1, 4))[candidate, labels]
        boxes = decode(deltas, rois[candidate], self.box_coder.weights)
        image_index = image_index[candidate]
        limits = to_device([(w, h, w, h) for h, w in image_sizes], boxes.device, boxes.dtype)
        boxes = torch.minimum(boxes.clamp(min=0), limits[image_index])
        large = ((boxes[:, 2:] - boxes[:, :2]) >= MIN_DETECTION_SIDE).all(dim=1)
        boxes, labels, scores, image_index = (t[large] for t in (boxes, labels, scores, image_index))
        counts = (image_index == torch.arange(len(image_sizes), device=boxes.device)[:, None]).sum(1).tolist()
        results = []
        # Image by image, because batched_nms shifts each class's boxes apart by the largest coordinate it sees:
        # what else is in the batch would move the rounding, and with it, rarely, a decision.
        for b, s, l in zip(boxes.split(counts), scores.split(counts), labels.split(counts), strict=True):
            keep = torchvision.ops.batched_nms(b, s, l, self.nms_thresh)[: self.detections_per_img]
            results.append({"boxes": b[keep], "labels": l[keep], "scores": s[keep]})
        return results


# ---------------------------------------------------------------------- heads


def box_head(head, pooled):
    """The box head on pooled features [R, C, h, w]: [R, representation].

    torchvision's two-layer head flattens channels first. Its first layer is instead read with permuted weights,
    or as a convolution over the whole RoI: either spares a transposition of the activations. On the CPU in
    float32 both layers are convolutions, because oneDNN's are twice as fast as the BLAS behind `linear` on an
    AMD processor (measured, forward and backward: 281 ms against 454, and 57 against 113, at 1,024 RoIs).
    """
    if type(head) is not TwoMLPHead:
        return head(pooled)
    num_bins = pooled.shape[2] * pooled.shape[3]
    first, second = head.fc6, head.fc7
    weight = first.weight.view(first.out_features, -1, *pooled.shape[2:])
    as_convolutions = (
        pooled.device.type == "cpu" and pooled.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    )
    if as_convolutions:
        hidden = F.relu(F.conv2d(pooled, weight, first.bias))
        return F.relu(F.conv2d(hidden, second.weight[:, :, None, None], second.bias)).flatten(1)
    weight = first.weight.to(pooled.dtype).unflatten(1, (-1, num_bins)).transpose(1, 2).flatten(1)
    hidden = F.relu(F.linear(pooled.permute(0, 2, 3, 1).flatten(1), weight, first.bias))
    return F.relu(second(hidden))


def label_mask_logits(predictor, features, labels):
    """Mask logits of each RoI's own label: [R, M, M].

    features: [R, C, M / 2, M / 2]. labels: int64 [R] in 1..K.
    torchvision computes all K + 1 channels. Its 2×2 transposed convolution of stride 2 does not overlap, so it is
    a 1×1 convolution to four times the channels (measured on two cores, 128 RoIs, forward and backward: 53 ms
    against 153 in bfloat16, 111 against 240 in float32), and what follows needs no pixel shuffle but of the
    finished logits.
    """
    if type(predictor) is not MaskRCNNPredictor:
        return predictor(features)[torch.arange(len(labels), device=labels.device), labels]
    up, classify = predictor.conv5_mask, predictor.mask_fcn_logits
    num_rois, _, height, width = features.shape
    weight = up.weight.permute(2, 3, 1, 0).flatten(0, 2)[:, :, None, None]  # [2 * 2 * C', C, 1, 1]
    hidden = F.relu(F.conv2d(features, weight, up.bias.repeat(4)))
    hidden = hidden.permute(0, 2, 3, 1).reshape(num_rois, height * width * 4, up.out_channels)
    logits = torch.bmm(hidden, classify.weight.flatten(1)[labels][:, :, None].to(hidden.dtype))
    logits = logits.view(num_rois, height, width, 2, 2).transpose(2, 3).flatten(3).flatten(1, 2)
    return logits + classify.bias[labels][:, None, None]


# ---------------------------------------------------------------------- losses


def box_losses(class_logits, deltas, labels, target_deltas):
    """torchvision's fastrcnn_loss: cross entropy, and smooth L1 of the positives over all sampled RoIs.

    class_logits: [R, K + 1]. deltas: [R, (K + 1) * 4]. labels: int64 [R], the P positives first.
    target_deltas: float32 [P, 4]. Returns loss_classifier and loss_box_reg, float32 []; 0 without any RoI.
    """
    num_rois, num_positives = max(1, len(labels)), len(target_deltas)
    loss_classifier = F.cross_entropy(class_logits.float(), labels, reduction="sum") / num_rois
    own_class = labels[:num_positives, None, None].expand(-1, 1, 4)
    own_deltas = deltas[:num_positives].unflatten(1, (-1, 4)).gather(1, own_class)[:, 0]
    loss_box = F.smooth_l1_loss(own_deltas.float(), target_deltas, beta=1 / 9, reduction="sum") / num_rois
    return {"loss_classifier": loss_classifier, "loss_box_reg": loss_box}


def mask_loss(logits, targets):
    """Mean binary cross entropy. logits: [P, M, M], targets: float32 [P, M, M] in 0..1; 0 without positives."""
    loss = F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="sum")
    return loss / max(1, targets.numel())


def keypoint_loss(logits, keypoints, boxes):
    """Cross entropy over each heatmap's cells, the mean over visible keypoints inside their RoI.

    logits: [P, J, m, m]. keypoints: float32 [P, J, 3] x, y, visibility, and boxes: float32 [P, 4] xyxy, both in
    resized pixels. Source: torchvision's keypointrcnn_loss, except that the mean weighs instead of selecting,
    which would make the host wait.
    """
    side = logits.shape[-1]
    low, high = boxes[:, None, :2], boxes[:, None, 2:]
    points = keypoints[..., :2]
    cell = ((points - low) * (side / (high - low))).floor().long()  # [P, J, 2] x, y
    cell = torch.where(points == high, side - 1, cell)
    visible = ((cell >= 0) & (cell < side)).all(dim=-1) & (keypoints[..., 2] > 0)
    target = torch.where(visible, cell[..., 1] * side + cell[..., 0], 0)
    loss = F.cross_entropy(logits.float().flatten(0, 1).flatten(1), target.flatten(), reduction="none")
    return (loss * visible.flatten()).sum() / visible.sum().clamp(min=1)


# ---------------------------------------------------------------------- mask targets


class Bitmaps:
    """The cropped masks of a batch, on the device, from which mask targets are read.

    torchvision resizes the full masks to the resized image (nearest) and pools each with RoIAlign (adaptive
    sampling, aligned=False). Both act on rows and columns apart, so a target is rows @ bitmap @ columns^T, where
    `rows` [M, h] holds RoIAlign's bilinear weights, gathered by the resize onto the rows of the cropped bitmap.
    """

    def __init__(self, masks: Sequence[CroppedMasks], image_sizes: Sequence[tuple[int, int]]):
        device = masks[0].rects.device
        self.pixels = torch.cat([m.pixels for m in masks])
        self.rects = torch.cat([m.rects for m in masks])  # [N, 4]
        num_pixels = to_device([0] + [len(m.pixels) for m in masks], device).cumsum(0)
        self.offsets = torch.cat([m.offsets[:-1] + num_pixels[i] for i, m in enumerate(masks)])  # [N]
        self.first_object = _first_objects([len(m) for m in masks], device)  # [B]
        self.frame_sizes = to_device([m.size for m in masks], device, torch.int32)  # [B, 2] height, width
        self.image_sizes = to_device(image_sizes, device, torch.int32)

    def object_numbers(self, samples: Samples) -> Tensor:
        """Position of each sample's object among those of all images: int64 [R]."""
        return self.first_object[samples.image_index] + samples.object_index

    def layout(self, samples: Samples) -> Tensor:
        """What the host has to know before it can read targets: int64, flat, to be read in one go."""
        sides = (samples.boxes[:, 2:] - samples.boxes[:, :2]) * (samples.labels > 0)[:, None]
        longest_side = sides.max().ceil().long()
        return torch.cat([longest_side[None], self.rects.flatten(), self.object_numbers(samples)])

    def targets(self, positives: Samples, side: int, layout: list[int]) -> Tensor:
        """float32 [P, M, M] in 0..1 with M = side; `layout` is `self.layout`'s answer."""
        if len(positives.labels) == 0:
            return positives.boxes.new_zeros(0, side, side)
        longest_side, rects, numbers = layout[0], layout[1 : 1 + self.rects.numel()], layout[1:]
        numbers = numbers[self.rects.numel() :][: len(positives.labels)]
        sizes = [(rects[4 * n + 3] - rects[4 * n + 1], rects[4 * n + 2] - rects[4 * n]) for n in numbers]
        max_samples = max(1, -(-longest_side // side))
        rows, columns = (self._axis(positives, axis, side, max_samples) for axis in (0, 1))
        read = self._by_object if self.pixels.device.type == "cpu" else self._by_chunk
        with torch.autocast(self.pixels.device.type, enabled=False):
            return read(positives, rows, columns, numbers, sizes)

    def _axis(self, positives: Samples, axis: int, side: int, max_samples: int) -> tuple[Tensor, Tensor]:
        """Which rows (axis 0) or columns (1) of its bitmap each target cell averages: indices int64 [P, M, Q] and
        weights float32 [P, M, Q], zero for what lies outside the bitmap.
        """
        start, stop = positives.boxes[:, 1 - axis], positives.boxes[:, 3 - axis]
        image_size = self.image_sizes[positives.image_index, axis]  # [P]
        frame_size = self.frame_sizes[positives.image_index, axis]
        samples = ((stop - start).clamp(min=1.0) / side).ceil()
        taps, weights = bilinear_taps(start, stop, image_size, side, samples, max_samples)
        # The nearest resize takes pixel floor(i * frame / image), in float32.
        source = (taps * (frame_size.float() / image_size)[:, None, None]).int()
        rect = self.rects[self.object_numbers(positives)]
        first, end = rect[:, 1 - axis, None, None], rect[:, 3 - axis, None, None]
        inside = (source >= first) & (source < end)
        return torch.where(inside, source - first, 0), weights * inside

    def _by_object(self, positives, rows, columns, numbers, sizes):
        """Object by object, all its RoIs at once: each bitmap is converted once, nothing is padded. For the CPU."""
        offsets = self.offsets.tolist()
        side = rows[0].shape[1]
        targets = rows[1].new_zeros(len(numbers), side, side)
        for number, group in groupby(
            sorted(range(len(numbers)), key=numbers.__getitem__), numbers.__getitem__
        ):
            group = list(group)
            height, width = sizes[group[0]]
            if height * width == 0:
                continue
            bitmap = self.pixels[offsets[number] : offsets[number] + height * width].view(height, width)
            matrix = _dense(rows, group, height).flatten(0, 1) @ bitmap.float()  # [p * M, w]
            matrix = matrix.view(len(group), side, width)
            targets[group] = matrix @ _dense(columns, group, width).transpose(1, 2)
        return targets

    def _by_chunk(self, positives, rows, columns, numbers, sizes):
        """Many RoIs at once, their bitmaps padded to the chunk's largest: few launches. For a GPU."""
        device, side = self.pixels.device, rows[0].shape[1]
        targets = rows[1].new_zeros(len(numbers), side, side)
        rects, offsets = (
            t[self.object_numbers(positives)] for t in (self.rects, self.offsets)
        )  # [P, 4], [P]
        for chunk, height, width in _chunks(sizes):
            chunk = to_device(chunk, device)
            x0, y0, x1, y1 = rects[chunk, :, None, None].unbind(1)
            y, x = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
            inside = (y < y1 - y0) & (x < x1 - x0)  # [p, h, w]
            pixel = torch.where(inside, offsets[chunk, None, None] + y * (x1 - x0) + x, 0)
            bitmap = (self.pixels[pixel] * inside).float()
            matrix = _dense(rows, chunk, height) @ bitmap
            targets[chunk] = matrix @ _dense(columns, chunk, width).transpose(1, 2)
        return targets


def _dense(axis, chosen, length):
    """Weights of the chosen RoIs along one axis, at the pixels that they belong to: [p, M, length]."""
    indices, weights = (tensor[chosen] for tensor in axis)
    return weights.new_zeros(*weights.shape[:2], length).scatter_add_(2, indices, weights)


def _chunks(sizes):
    """RoIs of similar bitmaps, largest first, so that CHUNK_PIXELS are not passed: (positions, height, width).

    sizes: (height, width) of each RoI's bitmap; empty ones are left out.
    """
    order = sorted((n for n, (h, w) in enumerate(sizes) if h * w), key=lambda n: -sizes[n][0] * sizes[n][1])
    chunk, height, width = [], 0, 0
    for n in order:
        grown = max(height, sizes[n][0]), max(width, sizes[n][1])
        if chunk and (len(chunk) + 1) * grown[0] * grown[1] > CHUNK_PIXELS:
            yield chunk, height, width
            chunk, grown = [], sizes[n]
        chunk.append(n)
        height, width = grown
    if chunk:
        yield chunk, height, width


def _first_objects(counts, device):
    """Position of each image's first object among those of all images: int64 [B]."""
    return to_device([0, *counts[:-1]], device).cumsum(0)


# ---------------------------------------------------------------------- errors


def _degenerate(truth: GroundTruth) -> Tensor:
    """bool [B, G]: objects whose box has no width or no height."""
    return truth.valid & (truth.boxes[..., 2:] <= truth.boxes[..., :2]).any(dim=-1)


def _describe_degenerate(truth, targets):
    image, position = _degenerate(truth).nonzero()[0].tolist()
    box = [round(side, 3) for side in truth.boxes[image, position].tolist()]
    image_id = targets[image].get("image_id", f"number {image} of the batch")
    return (
        f"image {image_id}: object {position} has box {box} (x0, y0, x1, y1 in pixels, resized) without width or "
        "height; remove it, or let `coco_utils.py check` list every such box"
    )
