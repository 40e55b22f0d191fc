"""A mask head's output pasted into its boxes, and encoded as COCO's RLE without ever filling a frame.

The numbers are torchvision's paste_masks_in_image cut at 0.5 and pycocotools' encode, to the last pixel.
Letters: D masks of an image, M side of a mask (28), H and W the frame's height and width, h and w a pasted mask's.
"""

from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as mask_api

MASK_THRESHOLD = 0.5
# OpenCV's resize is 5 to 10 times faster than torch's, but rounds its weights differently: by at most 1.4e-7 for each
# pixel of the mask's side, measured for sizes up to 4,000. Pixels nearer than this to the threshold are computed again,
# and a mask with one that is nearer than torch's own rounding is resized again by torch, so that no pixel differs.
RESIZE_TOLERANCE = 4e-7  # for each pixel of the mask's side
VALUE_TOLERANCE = 3e-7  # of torch's weighted sums: five roundings by at most 2**-24
PIXELS_AT_ONCE = 1 << 18  # resized before they are encoded: 1 MiB of float32 stays in the cache


class _Columns(NamedTuple):
    """Some masks' visible parts, column by column, as COCO's RLE counts runs down the columns.

    Column c of mask d is bits[starts[d] + c * strides[d]:], h pixels long. A False stands after each column
    (stride h + 1), except in a mask as high as its frame, where a run goes on in the next column (stride h).
    bits[0] and the element after each mask are False.
    """

    bits: np.ndarray  # bool
    rects: np.ndarray  # int64 [D, 4] x0, y0, x1, y1 in the frame, x1 and y1 exclusive
    starts: np.ndarray  # int64 [D]
    strides: np.ndarray  # int64 [D]


def paste_masks(mask_probs, boxes, height, width):
    """Resize each mask to its box and threshold it there; no frame is filled.

    mask_probs: float [D, M, M] in [0, 1]. boxes: float [D, 4] xyxy in pixels of the frame (height, width).
    Returns D tuples (x0, y0, bitmap): setting frame[y0:y0+h, x0:x0+w] to bitmap, bool [h, w], gives exactly
    torchvision's paste_masks_in_image cut at 0.5. A box outside the frame gives an empty bitmap.
    """
    pasted = []
    for bits, rects, starts, strides in _paste_columns(mask_probs, boxes, height, width):
        for (x0, y0, x1, y1), start, stride in zip(rects.tolist(), starts, strides, strict=True):
            columns = bits[start : start + (x1 - x0) * stride].reshape(x1 - x0, stride)
            pasted.append((x0, y0, columns[:, : y1 - y0].T))
    return pasted


def encode_masks(mask_probs, boxes, height, width):
    """Paste masks in their boxes and encode them from there: the cost follows the boxes, not the frame.

    Arguments as for paste_masks. Returns the counts of D compressed RLEs, bytes, equal to pycocotools' encode of
    torchvision's pasted frames.
    """
    counts = []
    for columns in _paste_columns(mask_probs, boxes, height, width):
        counts += _encode_columns(columns, height, width)
    return counts


def encode_frames(masks):
    """Encode full-frame masks.

    masks: float [D, 1, H, W], torchvision's pasted probabilities, cut at 0.5.
    Returns the counts of D compressed RLEs, bytes, equal to pycocotools' encode.
    """
    height, width = masks.shape[-2:]
    rect, start, stride = np.array([[0, 0, width, height]]), np.array([1]), np.array([height])
    counts = []
    for mask in masks[:, 0]:  # one at a time: a second layout of all 100 frames would be another 100 MB
        bits = np.zeros(height * width + 2, bool)
        bits[1:-1] = (mask > MASK_THRESHOLD).cpu().numpy().T.reshape(-1)
        counts += _encode_columns(_Columns(bits, rect, start, stride), height, width)
    return counts


def _paste_columns(mask_probs, boxes, height, width):
    """Yield the masks of paste_masks as _Columns, about PIXELS_AT_ONCE at a time."""
    num_masks, side = mask_probs.shape[0], mask_probs.shape[-1]
    # Zeros around each mask, as in torchvision; transposed to [D, x, y], so that OpenCV's rows are columns.
    probs = np.zeros((num_masks, side + 2, side + 2), np.float32)
    probs[:, 1:-1, 1:-1] = mask_probs.detach().float().cpu().numpy().transpose(0, 2, 1)

    boxes = _whole_pixel_boxes(boxes, (side + 2) / side)
    rects = np.concatenate([np.maximum(boxes[:, :2], 0), np.minimum(boxes[:, 2:], [width, height])], axis=1)
    rects[(rects[:, 2:] <= rects[:, :2]).any(axis=1)] = 0  # nothing visible
    widths, heights = rects[:, 2] - rects[:, 0], rects[:, 3] - rects[:, 1]
    strides = np.where(heights == height, height, heights + 1)
    lengths = widths * strides + 1

    tolerance = RESIZE_TOLERANCE * (side + 2)
    chunk_of_mask = np.cumsum(lengths) // PIXELS_AT_ONCE
    for chunk in np.unique(chunk_of_mask):
        members = np.flatnonzero(chunk_of_mask == chunk)
        starts = 1 + np.cumsum(lengths[members]) - lengths[members]
        values = np.zeros(1 + lengths[members].sum(), np.float32)
        parts = [values[s : s + n] for s, n in zip(starts.tolist(), lengths[members].tolist(), strict=True)]
        for d, part in zip(members.tolist(), parts, strict=True):
            _resize_mask(_resize_fast, probs[d], boxes[d], rects[d], part)
        bits = values > MASK_THRESHOLD - tolerance
        near = np.flatnonzero(bits != (values > MASK_THRESHOLD + tolerance))
        owners = np.searchsorted(starts, near, side="right") - 1
        d = members[owners]
        column, row = np.divmod(near - starts[owners], strides[d])
        places = np.stack([column, row], axis=1) + rects[d, :2] - boxes[d, :2]
        exact, tolerances = _resized_pixels(probs, d, places, boxes[d, 2:] - boxes[d, :2])
        bits[near] = exact > MASK_THRESHOLD
        undecided = owners[np.abs(exact - MASK_THRESHOLD) <= tolerances]
        for m in np.unique(undecided).tolist():
            d = members[m]
            _resize_mask(_resize_exactly, probs[d], boxes[d], rects[d], parts[m])
            bits[starts[m] : starts[m] + lengths[d]] = parts[m] > MASK_THRESHOLD
        yield _Columns(bits, rects[members], starts, strides[members])


def _whole_pixel_boxes(boxes, scale):
    """int64 [D, 4] x0, y0, x1, y1 (exclusive): the pixels that torchvision gives a mask and its border of zeros.

    Grown about the centre by `scale`, cut to integers toward zero, the last pixel included; float32 throughout, as the
    last bit decides which pixel a border falls in.
    """
    boxes = boxes.detach().float().cpu()
    half = (boxes[:, 2:] - boxes[:, :2]) * 0.5 * scale
    centre = (boxes[:, 2:] + boxes[:, :2]) * 0.5
    corners = torch.cat([centre - half, centre + half], dim=1).to(torch.int64).numpy()
    corners[:, 2:] += 1
    return corners


def _resize_mask(resize, probs, box, rect, target):
    """Write the visible part of a resized mask into `target`, laid out as in _Columns.

    probs: [x, y]. box: of the whole mask. rect: of the part that its frame shows.
    """
    (x0, y0, x1, y1), (left, top, right, bottom) = box.tolist(), rect.tolist()
    if right == left:
        return
    columns = target[:-1].reshape(right - left, -1)[:, : bottom - top]
    if (x0, y0, x1, y1) == (left, top, right, bottom):
        resize(probs, x1 - x0, y1 - y0, columns)
    else:
        whole = np.empty((x1 - x0, y1 - y0), np.float32)
        resize(probs, x1 - x0, y1 - y0, whole)
        columns[:] = whole[left - x0 : right - x0, top - y0 : bottom - y0]


def _resize_fast(probs, width, height, target):
    cv2.resize(probs, (height, width), dst=target, interpolation=cv2.INTER_LINEAR)


def _resize_exactly(probs, width, height, target):
    image = torch.from_numpy(probs).T[None, None].contiguous()
    resized = F.interpolate(image, size=(height, width), mode="bilinear", align_corners=False)
    target[:] = resized[0, 0].numpy().T


def _resized_pixels(probs, members, places, sizes):
    """Single pixels of resized masks, much nearer to torch's than OpenCV's are.

    probs: [D, x, y]. For each of N pixels: members int64 [N], its mask; places int64 [N, 2], x, y in the resized mask;
    sizes int64 [N, 2], that mask's width and height. Returns (values float64 [N], by how much torch's may differ [N]).
    """
    side = probs.shape[1]
    scale = np.float32(side) / sizes.astype(np.float32)  # torch's, rounded as there
    source = np.maximum(scale.astype(np.float64) * (places + 0.5) - 0.5, 0)
    low = np.minimum(source.astype(np.int64), side - 1)
    high = np.minimum(low + 1, side - 1)
    (x0, y0), (x1, y1), (right, down) = low.T, high.T, (source - low).T
    a, b, c, d = (probs[members, x, y].astype(np.float64) for x in (x0, x1) for y in (y0, y1))
    near, far = a + down * (b - a), c + down * (d - c)
    # torch's source coordinate is a product below `side`, rounded by at most 2**-24 of it. Where that may carry it into
    # the next cell, that cell can be as steep as a mask can be.
    steepness = np.maximum(abs(b - a), abs(d - c)) + np.maximum(abs(c - a), abs(d - b))
    rounded = side * 2.0**-24
    steepness[np.abs(source - np.round(source)).min(axis=1, initial=1) <= rounded] = 2
    return near + right * (far - near), rounded * steepness + VALUE_TOLERANCE


def _encode_columns(columns, height, width):
    """The counts of COCO's compressed RLE of each mask in its frame, bytes."""
    bits, rects, starts, strides = columns
    flips = np.flatnonzero(bits[1:] != bits[:-1]) + 1
    firsts = np.searchsorted(flips, starts)  # of each mask's flips
    owners = np.repeat(np.arange(len(starts)), np.diff(firsts, append=len(flips)))
    column, row = np.divmod(flips - starts[owners], strides[owners])

    # each mask's flips as pixel numbers of its frame, between 0 and the frame's end: the runs are the differences
    ends = np.full(len(flips) + 2 * len(starts), height * width)
    first_end = firsts + 2 * np.arange(len(starts))
    ends[first_end] = 0
    ends[np.arange(len(flips)) + 2 * owners + 1] = (
        (rects[owners, 0] + column) * height + rects[owners, 1] + row
    )
    runs = np.diff(ends)
    last_end = np.append(first_end[1:], len(ends)) - 1
    last_end -= (runs[last_end - 1] == 0) & (last_end - first_end > 1)  # the frame's last pixel is inside

    uncompressed = [
        {"size": [height, width], "counts": runs[a:b]} for a, b in zip(first_end, last_end, strict=True)
    ]
    rles = mask_api.frPyObjects(uncompressed, height, width) if uncompressed else []
    return [rle["counts"] for rle in rles]
