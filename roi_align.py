"""RoIAlign over all FPN levels at once, as one product of a sparse matrix with a table of features.

A bin of RoIAlign is a weighted sum of feature vectors: at torchvision's sampling ratio of 2, 4 samples of 4
corners each. Stack the pixels of every level, channels last, into one table, and the bins of all RoIs of all
levels are one `embedding_bag`; the gradient is the transposed product, a second `embedding_bag` over the same
entries sorted by table row. (On CUDA roi_align_triton.py sums the bags.) torchvision's op goes level by level in
float32 and channels first, and adds its gradient corner by corner.

Letters: B images, C channels, L levels, T table rows, R RoIs, P bins along an axis, Q taps of a bin along an
axis (two corners of each sample), N bags (R * P * P over all requests), E entries of a bag (Q * Q).
"""

import importlib.util
import math
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops import roi_align as one_level_roi_align


class Request(NamedTuple):
    """RoIs that a head wants pooled."""

    pool: MultiScaleRoIAlign  # levels, output size, sampling ratio, canonical scale and level
    boxes: Tensor  # float32 [R, 4] xyxy in pixels of the resized images
    image_index: Tensor  # int64 [R] in 0..B-1


class FeaturePyramid:
    """The feature maps of one batch, ready for RoIAlign; the table is built once for all calls.

    features: level name -> [B, C, H_l, W_l], finest first. image_sizes: B (height, width) in pixels before
    padding, from which torchvision infers each level's scale.
    """

    def __init__(self, features: dict[str, Tensor], image_sizes: Sequence[tuple[int, int]]):
        self.features = features
        self.image_height = max(height for height, _ in image_sizes)
        self._tables: dict[tuple[str, ...], _Table] = {}

    def roi_align(self, requests: Sequence[Request]) -> list[Tensor]:
        """Pool every request: one [R, C, P, P] each, of the features' dtype, channels-last in memory.

        Requests on the same levels share one product, so that the features' gradient is written once.
        Boxes are not differentiated. Same numbers as torchvision.ops.MultiScaleRoIAlign.
        """
        pooled: list[Tensor | None] = [None] * len(requests)
        shared: dict[tuple[str, ...], list[int]] = {}
        for position, request in enumerate(requests):
            names = tuple(name for name in self.features if name in request.pool.featmap_names)
            if request.pool.sampling_ratio > 0:
                shared.setdefault(names, []).append(position)
            else:
                pooled[position] = level_by_level(self._levels(names), self._scales(names), request)
        for names, positions in shared.items():
            table = self._table(names)
            bags = [table.bags(requests[position]) for position in positions]
            products = _SparseProducts.apply(table.rows, *(tensor for bag in bags for tensor in bag))
            for position, product in zip(positions, products, strict=True):
                height, width = requests[position].pool.output_size
                grid = product.view(-1, height, width, product.shape[1])
                pooled[position] = grid.permute(0, 3, 1, 2)
        return pooled

    def _levels(self, names: tuple[str, ...]) -> list[Tensor]:
        return [self.features[name] for name in names]

    def _scales(self, names: tuple[str, ...]) -> tuple[float, ...]:
        """Feature pixels per image pixel of each level, rounded to a power of two as in torchvision."""
        return tuple(
            2.0 ** round(math.log2(level.shape[2] / self.image_height)) for level in self._levels(names)
        )

    def _table(self, names: tuple[str, ...]) -> "_Table":
        if names not in self._tables:
            self._tables[names] = _Table(self._levels(names), self._scales(names))
        return self._tables[names]


class _Table:
    """The pixels of some levels as rows [T, C], and where each level lies among them."""

    def __init__(self, levels: Sequence[Tensor], scales: tuple[float, ...]):
        self.scales = scales
        self.rows = torch.cat([level.permute(0, 2, 3, 1).flatten(0, 2) for level in levels])
        sizes = tuple(tuple(level.shape[2:]) for level in levels)
        self.level_scale, self.level_layout = _level_constants(
            sizes, scales, len(levels[0]), self.rows.device
        )

    def bags(self, request: Request) -> tuple[Tensor, Tensor]:
        """Table rows int32 [N, E] and their weights float32 [N, E] for every bin, RoI by RoI, row by row."""
        pool = request.pool
        level = roi_levels(request.boxes, self.scales, pool.canonical_scale, pool.canonical_level)
        known = level < len(self.scales)  # torchvision leaves RoIs of levels that it was not given at zero
        level = level.clamp(max=len(self.scales) - 1)
        boxes = request.boxes * self.level_scale[level][:, None]
        height, width, first_row = self.level_layout[:, level]
        bins_y, bins_x = pool.output_size
        y, y_weights = bilinear_taps(boxes[:, 1], boxes[:, 3], height, bins_y, pool.sampling_ratio)
        x, x_weights = bilinear_taps(boxes[:, 0], boxes[:, 2], width, bins_x, pool.sampling_ratio)
        y_weights = y_weights * known[:, None, None]
        image_row = request.image_index.int() * height
        y = (y + image_row[:, None, None]) * width[:, None, None] + first_row[:, None, None]
        rows = y[:, :, None, :, None] + x[:, None, :, None, :]  # [R, P, P, Q, Q]
        weights = y_weights[:, :, None, :, None] * x_weights[:, None, :, None, :]
        return rows.flatten(3).flatten(0, 2), weights.flatten(3).flatten(0, 2)


@lru_cache(maxsize=64)
def _level_constants(sizes, scales, num_images, device):
    """Each level's scale, float32 [L], and its height, width and first table row, int32 [3, L].

    Cached, because a copy from the host's memory would make every step wait for the device.
    """
    layout, first_row = [], 0
    for height, width in sizes:
        layout.append((height, width, first_row))
        first_row += num_images * height * width
    layout = torch.tensor(layout, dtype=torch.int32).t().contiguous()
    return torch.tensor(scales).to(device), layout.to(device)


def roi_levels(boxes, scales, canonical_scale, canonical_level):
    """Which level each box is pooled from: int64 [R], 0 the finest; may exceed the last where scales leave gaps.

    boxes: float32 [R, 4] xyxy in pixels. scales: powers of two, one per level, finest first.
    Source: equation 1 of the FPN paper, with the rounding of torchvision's LevelMapper.
    """
    if len(scales) == 1:
        return torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
    finest, coarsest = (int(-math.log2(scale)) for scale in (scales[0], scales[-1]))
    side = torch.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
    level = torch.floor(canonical_level + torch.log2(side / canonical_scale) + 1e-6)
    # A NaN box becomes some integer: clamp again, so that it reads the finest level, not foreign memory.
    return (level.clamp(finest, coarsest).long() - finest).clamp_(0, coarsest - finest)


def bilinear_taps(start, stop, size, num_bins, samples, max_samples=None):
    """Where RoIAlign reads along one axis, and how much each reading weighs in its bin's mean.

    start, stop: float32 [R] in feature pixels (an RoI narrower than 1 is widened to 1). size: int32 [R], pixels
    of the axis. samples: per bin, one number for all RoIs, or float32 [R] whole numbers of at most max_samples.
    Returns indices int32 [R, num_bins, Q] in 0..size-1 and weights float32, Q = 2 * samples (2 * max_samples,
    the surplus with weight zero). A sample more than one pixel outside weighs nothing; one less far outside
    reads the edge. A NaN box reads pixel 0 with weight NaN.
    Source: torchvision's roi_align with aligned=False, in its order of rounding.
    """
    device = start.device
    start, size = start[:, None, None], size[:, None, None]
    bin_size = (stop[:, None, None] - start).clamp(min=1.0) / num_bins
    bins = torch.arange(num_bins, device=device)[:, None]
    centres = torch.arange(max_samples or samples, device=device) + 0.5
    if max_samples is not None:
        samples = samples[:, None, None]
    position = start + bins * bin_size + centres * bin_size / samples  # [R, num_bins, samples]
    read = (position >= -1.0) & (position <= size) & (centres < samples)
    position = position.clamp(min=0.0)
    low = torch.minimum(position.int(), size - 1).clamp_(min=0)
    high = torch.minimum(low + 1, size - 1)
    fraction = torch.where(high > low, position - low, 0.0)  # the last pixel has no neighbour to lean to
    share = read / samples
    indices = torch.stack([low, high], dim=-1)
    weights = torch.stack([(1.0 - fraction) * share, fraction * share], dim=-1)
    return indices.flatten(2), weights.flatten(2)


class _SparseProducts(torch.autograd.Function):
    """Weighted sums of table rows: apply(table [T, C], rows_1 [N_1, E_1], weights_1, rows_2, ...) -> [N_i, C] each.

    Differentiable in the table.
    """

    @staticmethod
    def forward(ctx, table, *bags):
        ctx.save_for_backward(*bags)
        ctx.num_rows = len(table)
        sums = []
        for rows, weights in zip(bags[::2], bags[1::2], strict=True):
            entries = rows.shape[1]
            bounds = torch.arange(0, rows.numel() + 1, entries, dtype=torch.int32, device=rows.device)
            sums.append(bag_sums(table, rows.view(-1), bounds, weights.view(-1)))
        return tuple(sums)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        bags = ctx.saved_tensors
        # Entry k of the transposed matrix: table row, bag and weight; sorted, each table row becomes a bag.
        row, order = torch.sort(torch.cat([rows.view(-1) for rows in bags[::2]]))
        bag, first_bag = [], 0
        for rows in bags[::2]:
            num_bags, entries = rows.shape
            numbers = torch.arange(first_bag, first_bag + num_bags, dtype=torch.int32, device=rows.device)
            bag.append(numbers.repeat_interleave(entries))
            first_bag += num_bags
        bag = torch.cat(bag)[order]
        weight = torch.cat([weights.view(-1) for weights in bags[1::2]])[order]
        bounds = torch.arange(ctx.num_rows + 1, dtype=torch.int32, device=row.device)
        bounds = torch.searchsorted(row, bounds, out_int32=True)
        return bag_sums(torch.cat(gradients), bag, bounds, weight), *[None] * len(bags)


def bag_sums(table, rows, bounds, weights):
    """sum of weights[k] * table[rows[k]] over bounds[n] <= k < bounds[n + 1], for each of N bags: [N, C].

    table: [T, C]. rows: int32 [K] in 0..T-1, bounds: int32 [N + 1], weights: float32 [K]. No gradient.
    Sums are formed in float32 and rounded once, to the table's dtype. embedding_bag wants the weights in that
    dtype too: in bfloat16 they are off by up to 2^-9, like the sums.
    """
    table = table.detach()  # an input that wants a gradient would make embedding_bag keep state for one
    triton_bag_sums = _triton_bag_sums() if table.is_cuda else None
    if triton_bag_sums is not None:
        return triton_bag_sums(table, rows, bounds, weights)
    weights = weights.to(table.dtype)
    return F.embedding_bag(
        rows, table, bounds, per_sample_weights=weights, mode="sum", include_last_offset=True
    )


@cache
def _triton_bag_sums():
    """The kernel for CUDA, or None without Triton, which comes with torch's CUDA builds for Linux."""
    if importlib.util.find_spec("triton") is None:
        return None
    import roi_align_triton

    return roi_align_triton.bag_sums


def level_by_level(levels, scales, request):
    """torchvision's own op on every level, each RoI taken from its own: [R, C, P, P].

    For adaptive sampling, where bags would differ in length from RoI to RoI. Computed in float32.
    """
    pool = request.pool
    level = roi_levels(request.boxes, scales, pool.canonical_scale, pool.canonical_level)
    rois = torch.cat([request.image_index[:, None].to(request.boxes), request.boxes], dim=1)
    pooled = 0.0
    for number, (features, scale) in enumerate(zip(levels, scales, strict=True)):
        here = one_level_roi_align(features.float(), rois, pool.output_size, scale, pool.sampling_ratio)
        pooled = pooled + here * (level == number)[:, None, None, None]
    return pooled.to(levels[0].dtype)
