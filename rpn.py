"""Region proposal network: torchvision's parameters and numbers, computed for the whole batch at once.

What differs from torchvision.models.detection.rpn is the way there:
- Anchors are kept per shape, in float32, one set for all images of the batch.
- Proposals: top-k per level first, then only those anchors are decoded; what torchvision drops by boolean
  indexing is masked, so every shape is known in advance.
- Losses: matching, sampling and encoding are batched. At most 256 anchors an image carry a gradient, so the
  dense head runs without grad and is evaluated once more, with grad, at the sampled places only ("sparse
  backward"). That is exact: the gradient of every other place is zero, which a dense backward multiplies and
  adds in vain.

Letters: B images, L levels, A anchors, K candidates before and P proposals after suppression, S samples,
C channels; depth is the number of 3x3 convolutions in the head.
"""

from collections import OrderedDict
from typing import NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RPNHead

from boxes import (
    Proposals,
    clip,
    closest_object,
    decode,
    encode,
    label_boxes,
    pad_ground_truth,
    sample_balanced,
    suppress,
    to_device,
)

# Anchors of this many shapes are kept (4 MB each at 800x1344); the oldest goes first.
MAX_CACHED_SHAPES = 32


class AnchorGrid(NamedTuple):
    """Anchors of one padded image shape, in the order level, row, column, anchor of the place."""

    anchors: Tensor  # float32 [A, 4] xyxy in pixels
    levels: Tensor  # int64 [L, 3]: first anchor, height and width of each level


class RegionProposalNetwork(torchvision.models.detection.rpn.RegionProposalNetwork):
    """torchvision's RPN, with its constructor and state_dict; `forward` returns Proposals instead of a list.

    sparse_backward: evaluate the loss at the sampled anchors only. On wherever the head is torchvision's own
    (any number of 3x3 convolutions, then the two 1x1); another head takes the dense way, with the same
    numbers.
    """

    def __init__(self, anchor_generator, head, *args, **kwargs):
        super().__init__(anchor_generator, head, *args, **kwargs)
        self.sparse_backward = is_plain_head(head)
        self._grids = OrderedDict()  # (feature shapes, image shape, device) -> AnchorGrid

    @classmethod
    def from_torchvision(cls, rpn):
        """The same network around the same submodules and parameters (shared, not copied)."""
        matcher, sampler = rpn.proposal_matcher, rpn.fg_bg_sampler
        new = cls(
            rpn.anchor_generator,
            rpn.head,
            matcher.high_threshold,
            matcher.low_threshold,
            sampler.batch_size_per_image,
            sampler.positive_fraction,
            rpn._pre_nms_top_n,
            rpn._post_nms_top_n,
            rpn.nms_thresh,
            rpn.score_thresh,
        )
        return new.train(rpn.training)

    def forward(self, images, features, targets=None, keys=None):
        """Propose boxes and, in training, compute the two losses.

        images: ImageList (padded tensors [B, 3, H, W], image_sizes of the unpadded images in pixels).
        features: dict of level -> [B, C, h, w], any float dtype, fastest in channels_last.
        targets: in training, one dict an image with boxes [N, 4] xyxy in resized pixels and labels [N].
        keys: float [B, A], the sampler's random keys; drawn on the device when None.
        Returns Proposals (P = post_nms_top_n) and {"loss_objectness", "loss_rpn_box_reg"}, float32 scalars,
        or {}. Raises ValueError in training without targets.

        Equal scores: torchvision leaves their order to the sorting kernel; here the lower level, then the
        earlier candidate of `topk`, comes first. Under autocast torchvision rounds anchors, decoded boxes and
        scores to the autocast dtype, which makes many scores equal; here all of that is float32.
        """
        if self.training and targets is None:
            raise ValueError("the RPN needs targets in training mode; pass them or call eval() first")
        features = list(features.values())
        grid = self.anchor_grid(images, features)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.training and not self.sparse_backward):
            logits, deltas = self.head(features)
        with torch.no_grad():
            proposals = self.propose(logits, deltas, grid.anchors, images.image_sizes)
        if not self.training:
            return proposals, {}

        indices, is_positive, valid, matched_boxes = self.sample_anchors(grid.anchors, targets, keys)
        if self.sparse_backward:
            logits, deltas = sparse_head(self.head, features, indices, grid.levels)
        else:
            logits = (
                torch.cat([places_last(level, 1) for level in logits], dim=1).squeeze(2).gather(1, indices)
            )
            deltas = torch.cat([places_last(level, 4) for level in deltas], dim=1)
            deltas = deltas.gather(1, indices[..., None].expand(-1, -1, 4))
        anchors = grid.anchors[indices]  # [B, S, 4]
        # Where nothing matched, the anchor stands for its object: zero deltas, not the logarithm of zero.
        matched_boxes = torch.where(is_positive[..., None], matched_boxes, anchors)
        return proposals, self.losses(logits, deltas, encode(matched_boxes, anchors), is_positive, valid)

    def anchor_grid(self, images, features):
        """Anchors for these feature shapes and this padded image shape: AnchorGrid, kept per device.

        The anchor generator makes them, so a level's stride is image size // grid size (61 for 800 // 13).
        """
        shapes = tuple(tuple(feature.shape[-2:]) for feature in features)
        device = images.tensors.device
        key = (shapes, tuple(images.tensors.shape[-2:]), device)
        if key not in self._grids:
            # The generator reads shape, dtype and device of the features only; float32 keeps anchors exact.
            stand_ins = [torch.empty((), device=device).expand(1, 1, *shape) for shape in shapes]
            one_image = ImageList(images.tensors[:1], images.image_sizes[:1])
            anchors = self.anchor_generator(one_image, stand_ins)[0]
            levels, first = [], 0
            for (height, width), count in zip(
                shapes, self.anchor_generator.num_anchors_per_location(), strict=True
            ):
                levels.append((first, height, width))
                first += height * width * count
            self._grids[key] = AnchorGrid(anchors, to_device(levels, device))
            if len(self._grids) > MAX_CACHED_SHAPES:
                self._grids.popitem(last=False)
        return self._grids[key]

    def propose(self, logits, deltas, anchors, image_sizes):
        """The best boxes of each image after suppression within each level.

        logits: per level [B, anchors of a place, h, w]; deltas: per level [B, 4 * anchors of a place, h, w].
        anchors: float32 [A, 4]; image_sizes: B of (height, width). Returns Proposals, best first.
        """
        logits = [places_last(level, 1).squeeze(2).float() for level in logits]
        deltas = [places_last(level, 4) for level in deltas]
        top_logits, top_deltas, top_anchors = [], [], []
        anchors = anchors.split([level.shape[1] for level in logits])
        for level_logits, level_deltas, level_anchors in zip(logits, deltas, anchors, strict=True):
            best, chosen = level_logits.topk(min(self.pre_nms_top_n(), level_logits.shape[1]), dim=1)
            top_logits.append(best)
            top_deltas.append(level_deltas.gather(1, chosen[..., None].expand(-1, -1, 4)))
            top_anchors.append(level_anchors[chosen])
        boxes = decode(torch.cat(top_deltas, dim=1), torch.cat(top_anchors, dim=1))
        boxes = clip(boxes, image_sizes)  # [B, K, 4]
        scores = torch.cat(top_logits, dim=1).sigmoid()  # [B, K], descending within a level

        width, height = (boxes[..., 2:] - boxes[..., :2]).unbind(-1)
        valid = (width >= self.min_size) & (height >= self.min_size) & (scores >= self.score_thresh)
        lengths = [level.shape[1] for level in top_logits]
        num_proposals = self.post_nms_top_n()
        valid = suppress(boxes, scores, valid, self.nms_thresh, lengths, num_proposals)

        scores, order = torch.where(valid, scores, -1.0).sort(dim=1, descending=True, stable=True)
        order, valid = order[:, :num_proposals], scores[:, :num_proposals] >= 0
        boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4)).masked_fill(~valid[..., None], 0)
        missing = num_proposals - order.shape[1]  # small images have fewer candidates
        return Proposals(F.pad(boxes, (0, 0, 0, missing)), F.pad(valid, (0, missing)))

    @torch.no_grad()
    def sample_anchors(self, anchors, targets, keys=None):
        """Match all anchors and draw the ones that the loss sees.

        anchors: float32 [A, 4]. Returns indices int64 [B, S] into the anchors, is_positive bool, valid bool
        (same shape) and the matched objects' boxes float32 [B, S, 4] (arbitrary where not positive).
        """
        matcher, sampler = self.proposal_matcher, self.fg_bg_sampler
        ground_truth = pad_ground_truth(targets)
        positive, negative = label_boxes(
            ground_truth,
            anchors,
            matcher.high_threshold,
            matcher.low_threshold,
            matcher.allow_low_quality_matches,
        )
        indices, is_positive, valid = sample_balanced(
            positive, negative, sampler.batch_size_per_image, sampler.positive_fraction, keys
        )
        objects = closest_object(ground_truth, anchors[indices])
        matched_boxes = ground_truth.boxes.gather(1, objects[..., None].expand(-1, -1, 4))
        return indices, is_positive, valid, matched_boxes

    def losses(self, logits, deltas, target_deltas, is_positive, valid):
        """torchvision's two losses: both divide by the number of samples, boxes of positives alone count.

        logits [B, S], deltas and target_deltas [B, S, 4], is_positive and valid bool [B, S]. Computed in
        float32.
        """
        num_samples = valid.sum().clamp(min=1)
        objectness = F.binary_cross_entropy_with_logits(
            logits.float(), is_positive.float(), weight=valid.float(), reduction="sum"
        )
        box = F.smooth_l1_loss(deltas.float(), target_deltas, beta=1 / 9, reduction="none")
        box = torch.where(is_positive[..., None], box, 0).sum()
        return {"loss_objectness": objectness / num_samples, "loss_rpn_box_reg": box / num_samples}


def places_last(level, size):
    """A head's output [B, anchors of a place * size, h, w] as [B, h * w * anchors of a place, size].

    A view where the head ran in channels_last.
    """
    return level.permute(0, 2, 3, 1).reshape(len(level), -1, size)


def is_plain_head(head):
    """Is this torchvision's RPN head: 3x3 convolutions of stride 1 with ReLU, then two 1x1?"""
    return type(head) is RPNHead and all(
        len(block) == 2
        and isinstance(block[0], nn.Conv2d)
        and (block[0].kernel_size, block[0].stride, block[0].padding) == ((3, 3), (1, 1), (1, 1))
        and (block[0].dilation, block[0].groups) == ((1, 1), 1)
        and isinstance(block[1], nn.ReLU)
        for block in head.conv
    )


def sparse_head(head, features, indices, levels):
    """The RPN head at some anchors only, differentiable in its parameters and the features.

    head: one that `is_plain_head`. features: per level [B, C, h, w]. indices: int64 [B, S] into the anchors.
    levels: int64 [L, 3], first anchor, height and width of each level.
    Returns logits [B, S] and deltas [B, S, 4], equal to the dense head's at those anchors.

    A convolution's window is nine places; the windows of all convolutions together name 9 ** depth rows of
    the features' channels-last tables for each sample. Those are gathered, each convolution becomes a matrix
    product, and the gather's transpose adds the gradients back. Works in the autocast dtype, as the dense
    head does.
    """
    num_images, num_samples = indices.shape
    num_anchors = head.cls_logits.out_channels
    level = (indices[..., None] >= levels[1:, 0]).sum(dim=2)  # [B, S]
    first, height, width = levels[level].unsqueeze(2).unbind(dim=3)  # [B, S, 1]
    place, anchor = (indices[..., None] - first) // num_anchors, (indices[..., None] - first) % num_anchors
    y, x = place // width, place % width
    step = torch.arange(-1, 2, device=indices.device)
    insides = []
    for _ in head.conv:  # from the last output back to the features: [B, S, 1] -> [B, S, 9 ** depth]
        insides.append((y >= 0) & (y < height) & (x >= 0) & (x < width))
        y = (y[..., None, None] + step[:, None]).expand(-1, -1, -1, 3, 3).flatten(2)
        x = (x[..., None, None] + step).expand(-1, -1, -1, 3, 3).flatten(2)
    image = torch.arange(num_images, device=indices.device)[:, None, None]
    # Rows of all levels' tables, one table after another; a level's table holds its images one after another.
    rows = first // num_anchors * num_images + (image * height + y) * width + x
    num_rows = sum(feature.shape[0] * feature.shape[2] * feature.shape[3] for feature in features)
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    rows = torch.where(inside, rows, num_rows).flatten()  # the row past the end stands for the zero padding
    tables = [feature.permute(0, 2, 3, 1).reshape(-1, feature.shape[1]) for feature in features]

    hidden = GatherRows.apply(rows, *tables)  # [B * S * 9 ** depth, C]
    for block, inside in zip(head.conv, reversed(insides), strict=True):
        conv = block[0]
        weight = conv.weight.permute(0, 2, 3, 1).flatten(1)  # [C, 9 * C]
        hidden = F.linear(hidden.view(-1, weight.shape[1]), weight, conv.bias).relu()
        # The next convolution sees zeros outside the map, not this one's answer there.
        hidden = torch.where(inside.view(-1, 1), hidden, 0)
    anchor = anchor.view(-1, 1)  # [B * S, 1]
    logits = F.linear(hidden, head.cls_logits.weight.flatten(1), head.cls_logits.bias).gather(1, anchor)
    deltas = F.linear(hidden, head.bbox_pred.weight.flatten(1), head.bbox_pred.bias).view(-1, num_anchors, 4)
    deltas = deltas.gather(1, anchor[..., None].expand(-1, -1, 4))
    return logits.view(num_images, num_samples), deltas.view(num_images, num_samples, 4)


class GatherRows(torch.autograd.Function):
    """Rows of several tables [N, C] as if they stood one after another: [M, C]; the row past the last is zero.

    The tables are never joined (that would copy all features); their gradients are, so that one index_add does.
    """

    @staticmethod
    def forward(ctx, rows, *tables):
        """rows: int64 [M] in 0..sum of N, tables: L of [N, C] of one dtype."""
        ctx.save_for_backward(rows)
        ctx.lengths = [len(table) for table in tables]
        gathered = tables[0].new_zeros(len(rows), tables[0].shape[1])
        first = 0
        for table in tables:
            local = rows - first
            here = (local >= 0) & (local < len(table))
            local = local.clamp_(0, len(table) - 1)
            gathered = torch.where(here[:, None], table.index_select(0, local), gathered)
            first += len(table)
        return gathered

    @staticmethod
    def backward(ctx, grad):
        (rows,) = ctx.saved_tensors
        grads = grad.new_zeros(sum(ctx.lengths) + 1, grad.shape[1]).index_add_(0, rows, grad)
        return None, *grads[:-1].split(ctx.lengths)
