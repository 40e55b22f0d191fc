"""Predictions -> COCO results -> COCO's metrics -> a table; as a command, it scores a results file.

Letters: D detections of an image, M side of a mask head's output (28), J keypoints, T IoU thresholds (10),
R recall thresholds (101), K categories, A area ranges, L limits on an image's detections.
"""

import argparse
import contextlib
import io
import itertools
import json
import numbers
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import cv2
import hotcoco
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from masks import check_frame, check_polygon, rle_counts
from utils import UserError, write_json

MASK_THRESHOLD = 0.5
# OpenCV's resize is 5 to 10 times faster than torch's, but rounds its weights differently: by at most 1.4e-7 for each
# pixel of the mask's side, measured for sizes up to 4,000. A mask with a pixel nearer than this to the threshold is
# resized again by torch, so that no pixel comes out differently.
RESIZE_TOLERANCE = 4e-7  # for each pixel of the mask's side
PIXELS_AT_ONCE = 1 << 20  # resized before they are encoded: 4 MiB of float32 stay in the cache

RESULT_FIELDS = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}  # by iou type
TITLES = {"bbox": "box", "segm": "mask", "keypoints": "keypoints"}

# How far annotators stray on each of COCO's 17 keypoints, from pycocotools' Params. For other keypoints nobody has
# measured it: they take the mean.
COCO_SIGMAS = np.array([26, 25, 25, 35, 35, 79, 79, 72, 72, 62, 62, 107, 107, 87, 87, 89, 89]) / 1000


# --- masks -------------------------------------------------------------------------------------------


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

    Arguments as for paste_masks. Returns D dicts {"size": [height, width], "counts": str}, equal to pycocotools'
    encode of torchvision's pasted frames.
    """
    rles = []
    for columns in _paste_columns(mask_probs, boxes, height, width):
        rles += _encode_columns(columns, height, width)
    return rles


def encode_frames(masks):
    """Encode full-frame masks.

    masks: float [D, 1, H, W], torchvision's pasted probabilities, cut at 0.5.
    Returns D dicts {"size": [H, W], "counts": str}, equal to pycocotools' encode.
    """
    height, width = masks.shape[-2:]
    rect, start, stride = np.array([[0, 0, width, height]]), np.array([1]), np.array([height])
    rles = []
    for mask in masks[:, 0]:  # one at a time: a second layout of all 100 frames would be another 100 MB
        bits = np.zeros(height * width + 2, bool)
        bits[1:-1] = (mask > MASK_THRESHOLD).cpu().numpy().T.reshape(-1)
        rles += _encode_columns(_Columns(bits, rect, start, stride), height, width)
    return rles


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
        undecided = np.flatnonzero(bits != (values > MASK_THRESHOLD + tolerance))
        for m in np.unique(np.searchsorted(starts, undecided, side="right") - 1).tolist():
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


def _encode_columns(columns, height, width):
    """COCO's compressed RLE of each mask in its frame. Returns dicts {"size": [height, width], "counts": str}."""
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

    size = [height, width]  # one object for all
    uncompressed = [{"size": size, "counts": runs[a:b]} for a, b in zip(first_end, last_end, strict=True)]
    rles = mask_api.frPyObjects(uncompressed, height, width) if uncompressed else []
    return [{"size": size, "counts": rle["counts"].decode("ascii")} for rle in rles]


# --- predictions to results ----------------------------------------------------------------------------


def predictions_to_results(outputs, image_ids, image_sizes, category_ids):
    """Turn some images' predictions into COCO results, detections in the model's order.

    outputs: per image a dict of boxes float [D, 4] xyxy in pixels, labels int64 [D] in 1..K, scores float [D], for
        masks either mask_probs float [D, M, M] or masks float [D, 1, H, W], and keypoints float [D, J, 3].
    image_ids: the json's ids. image_sizes: (height, width) each. category_ids: category_ids[label - 1] is the json's.
    Returns dicts {"image_id", "category_id", "bbox" xywh, "score"} and, where predicted, "segmentation" (compressed
    RLE) and "keypoints" (x, y, v of each, one after another): what json.dump takes.
    Keeps and changes nothing, so that threads can run it beside the next forward.
    Raises ValueError for a box or score that is not finite, or a label without a category.
    """
    results = []
    for output, image_id, (height, width) in zip(outputs, image_ids, image_sizes, strict=True):
        boxes = output["boxes"].detach().float().cpu()
        scores = output["scores"].detach().float().cpu()
        labels = output["labels"].tolist()
        if not (torch.isfinite(boxes).all() and torch.isfinite(scores).all()):
            raise ValueError(
                f"image {image_id}: a predicted box or score is not finite; the model has diverged"
            )
        if labels and not 1 <= min(labels) <= max(labels) <= len(category_ids):
            raise ValueError(
                f"image {image_id}: predicted labels {min(labels)}..{max(labels)}, but the annotation file has "
                f"{len(category_ids)} categories; evaluate with the classes that the model was trained on"
            )
        fields = {
            "category_id": [category_ids[label - 1] for label in labels],
            "bbox": torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).tolist(),
            "score": scores.tolist(),
        }
        if "mask_probs" in output:
            fields["segmentation"] = encode_masks(output["mask_probs"], boxes, height, width)
        elif "masks" in output:
            fields["segmentation"] = encode_frames(output["masks"])
        if "keypoints" in output:
            fields["keypoints"] = output["keypoints"].detach().float().flatten(1).tolist()
        for detection in zip(*fields.values(), strict=True):
            results.append({"image_id": image_id, **dict(zip(fields, detection, strict=True))})
    return results


def gather_results(results, image_ids, group=None):
    """Bring every rank's results to rank 0, in the order of the data set: the same list for any number of ranks.

    results: this rank's, JSON-able, of whole images that no other rank has. image_ids: of the whole data set, in its
    order. group: one that carries CPU tensors (gloo); default: the default group, or no gathering where there is none.
    Returns the list on rank 0, None on the others. What travels is JSON in byte tensors of the exact size.
    Raises ValueError on rank 0 for results of an image that two ranks had, or that the data set lacks.
    """
    shards = [results]
    if dist.is_available() and dist.is_initialized():
        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        payload = torch.frombuffer(bytearray(json.dumps(results), "ascii"), dtype=torch.uint8)
        sizes = torch.zeros(world_size, dtype=torch.int64)
        sizes[rank] = len(payload)
        dist.all_reduce(sizes, group=group)
        if rank != 0:
            dist.send(payload, group=group, group_dst=0)
            return None
        for source in range(1, world_size):
            data = torch.empty(int(sizes[source]), dtype=torch.uint8)
            dist.recv(data, group=group, group_src=source)
            shards.append(json.loads(data.numpy().tobytes()))

    position = {image_id: index for index, image_id in enumerate(image_ids)}
    rank_of_image = {}
    for rank, shard in enumerate(shards):
        for image_id in {result["image_id"] for result in shard}:
            if image_id not in position:
                raise ValueError(f"rank {rank} has results of image {image_id}, which is not in the data set")
            if image_id in rank_of_image:
                raise ValueError(
                    f"image {image_id} was evaluated by rank {rank_of_image[image_id]} and by rank {rank}; "
                    "give each image to one rank, without padding the shards"
                )
            rank_of_image[image_id] = rank
    # A stable sort: detections of an image keep the model's order, which decides between equal scores.
    return sorted(itertools.chain(*shards), key=lambda result: position[result["image_id"]])


# --- the ground truth and a results file -----------------------------------------------------------------


def read_ground_truth(path):
    """Read an annotation file for scoring.

    Returns {"images", "categories", "annotations"}. Each annotation has id, image_id, category_id, iscrowd (0 where
    missing), area (where missing the mask's, or else the box's) and, where the file has them, bbox, segmentation
    (polygons of less than three points left out), keypoints and num_keypoints.
    Raises UserError for a file that cannot be scored. Warns of annotations that are left out.
    """
    dataset = _read_json(path)
    if not isinstance(dataset, dict) or any(
        not isinstance(dataset.get(key), list) for key in ("images", "annotations", "categories")
    ):
        raise UserError(
            f"{path}: is no COCO annotation file; it needs the lists images, annotations and categories"
        )
    images = _by_id(path, "image", dataset["images"])
    categories = _by_id(path, "category", dataset["categories"])
    _by_id(path, "annotation", dataset["annotations"])
    annotations, orphans, flat = [], [], []
    for annotation in dataset["annotations"]:
        where = f"{path}: annotation {annotation['id']} (image {annotation.get('image_id')!r})"
        if annotation.get("category_id") not in categories:
            raise UserError(
                f"{where} has category {annotation.get('category_id')!r}, which the file does not list; "
                "add the category, or remove the annotation"
            )
        if annotation.get("image_id") not in images:
            orphans.append(annotation["id"])
            continue
        keys = ("id", "image_id", "category_id", "area", "bbox", "segmentation", "keypoints", "num_keypoints")
        clean = {key: annotation[key] for key in keys if key in annotation}
        clean["iscrowd"] = annotation.get("iscrowd", 0)
        image = images[annotation["image_id"]]
        try:
            if "bbox" in clean:
                _check_box(clean["bbox"])
                if min(clean["bbox"][2:]) <= 0:
                    flat.append(annotation["id"])
                    continue
            if "segmentation" in clean:
                clean["segmentation"] = _check_segmentation(clean["segmentation"], image)
            if "keypoints" in clean:
                clean["num_keypoints"] = _count_keypoints(clean)
            clean.setdefault("area", _area(clean, image))
        except ValueError as error:
            raise UserError(f"{where}: {error}; `coco_utils.py check` lists every such annotation") from error
        annotations.append(clean)
    _warn(path, orphans, "annotation", "of images that the file does not list", "left out")
    _warn(path, flat, "annotation", "with a box of no width or height", "left out")
    return {
        "images": list(images.values()),
        "categories": list(categories.values()),
        "annotations": annotations,
    }


def read_results(path):
    """Read a COCO results file: the list of its dicts, in the file's order.

    Raises UserError if it is not a list of results, or if an RLE does not fill its own size (native code would read
    past its buffers).
    """
    results = _read_json(path)
    if not isinstance(results, list) or not all(isinstance(result, dict) for result in results):
        raise UserError(f"{path}: is no COCO results file; it must hold a list of results")
    for number, result in enumerate(results):
        where = f"{path}: result {number} (image {result.get('image_id')!r})"
        for key in ("image_id", "category_id", "score"):
            if key not in result:
                raise UserError(f"{where} has no {key}; every result needs image_id, category_id and score")
        if "segmentation" in result:
            rle = result["segmentation"]
            try:
                if not isinstance(rle, dict) or not isinstance(rle.get("counts"), str):
                    raise ValueError("segmentation is no compressed RLE; polygons must be encoded first")
                height, width = rle["size"]
                check_frame(height, width)
                rle_counts(rle, height, width)
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(f"{where}: {error}") from error
    return results


def _read_json(path):
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; check the path") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not valid JSON ({error}); is the file cut off?") from error


def _by_id(path, kind, records):
    """Records by their id. Raises UserError for an id that is no integer or occurs twice."""
    by_id = {}
    for record in records:
        identity = record.get("id") if isinstance(record, dict) else None
        if not isinstance(identity, int) or isinstance(identity, bool):
            raise UserError(f"{path}: {kind} id {identity!r} is no integer; give every {kind} an integer id")
        if identity in by_id:
            raise UserError(f"{path}: two of the {kind} records have id {identity}; ids must differ")
        by_id[identity] = record
    return by_id


def _check_box(box):
    """Raises ValueError unless box is four finite numbers."""
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(v, numbers.Real) for v in box):
        raise ValueError(f"bbox {box!r:.60} is not four numbers x, y, width, height")
    if not np.isfinite(box).all() or max(map(abs, box)) > 1e8:
        raise ValueError(f"bbox {box} has a number that is not finite or beyond 1e8")


def _check_segmentation(segmentation, image):
    """What native code takes of a segmentation: its polygons of three points and more, or its RLE."""
    height, width = image.get("height"), image.get("width")
    if not isinstance(height, int) or not isinstance(width, int):
        raise ValueError(f"image {image['id']} has no integer height and width, which masks need")
    check_frame(height, width)
    if isinstance(segmentation, dict):
        rle_counts(segmentation, height, width)
        return segmentation
    if not isinstance(segmentation, list):
        raise ValueError(f"segmentation {segmentation!r:.40} is neither polygons nor an RLE")
    polygons = [check_polygon(polygon) for polygon in segmentation]
    return [polygon.tolist() for polygon in polygons if polygon is not None]


def _count_keypoints(annotation):
    keypoints = annotation["keypoints"]
    if not isinstance(keypoints, list) or len(keypoints) % 3 or not all(np.isfinite(keypoints)):
        raise ValueError("keypoints are not x, y, visibility of each, all finite")
    return annotation.get("num_keypoints", sum(v > 0 for v in keypoints[2::3]))


def _area(annotation, image):
    if annotation.get("segmentation"):
        return float(mask_api.area(_to_rle(annotation["segmentation"], image)))
    if "bbox" in annotation:
        return float(annotation["bbox"][2] * annotation["bbox"][3])
    raise ValueError("it has neither a bbox nor a segmentation")


def _to_rle(segmentation, image):
    """A checked segmentation as one compressed RLE."""
    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], (str, bytes)):
        return segmentation
    rles = mask_api.frPyObjects(segmentation, image["height"], image["width"])
    return mask_api.merge(rles) if isinstance(segmentation, list) else rles


def _warn(path, ids, kind, what, consequence):
    """One warning for all the ids of a kind, with the first few."""
    if ids:
        examples = ", ".join(map(str, ids[:5])) + (", …" if len(ids) > 5 else "")
        warnings.warn(f"{path}: {len(ids)} {kind}s {what} ({examples}): {consequence}", stacklevel=3)


# --- scoring -----------------------------------------------------------------------------------------------


def score_results(
    annotation_file,
    results,
    iou_types,
    evaluator="hotcoco",
    image_ids=None,
    max_detections=100,
    keypoint_sigmas=None,
):
    """COCO's metrics of results against an annotation file, in full precision.

    annotation_file: its path, or what read_ground_truth made of it.
    results: COCO results; of equal scores in an image the earlier is matched first.
    iou_types: of "bbox", "segm", "keypoints".
    evaluator: "hotcoco" or "pycocotools"; their numbers are equal to the last bit.
    image_ids: score these images only (default: all of the file).
    max_detections: of a class in an image. COCO's is 100; metrics of others compare with nobody's, and show it by a name
        like AR300 in place of AR100.
    keypoint_sigmas: {category_id: [J floats]}; default COCO's for 17 keypoints, else the mean of COCO's.

    Returns (metrics, per_class); -1 where there is nothing to find.
        metrics: {"bbox": {"AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"},
            "segm": the same, "keypoints": {"AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl"}}
        per_class: {"bbox": {class name: AP}, ...}
    Masks and keypoints are scored by their own area even if the result carries a bbox, where pycocotools' loadRes
    would take the box's. The arguments are left as they are.
    Raises ValueError for results of unknown images or without the field to score, and for numbers that are not
    finite. Warns of results of unknown categories, and leaves them out.
    Source: pycocotools/cocoeval.py.
    """
    if evaluator not in EVALUATORS:
        raise ValueError(f"evaluator {evaluator!r}: must be one of {', '.join(EVALUATORS)}")
    if isinstance(annotation_file, dict):
        dataset, name = annotation_file, "the annotations"
    else:
        dataset, name = read_ground_truth(annotation_file), annotation_file
    images = {image["id"]: image for image in dataset["images"]}
    wanted = images.keys() if image_ids is None else set(image_ids)
    if not wanted <= images.keys():
        raise ValueError(f"image {min(wanted - images.keys())} is to be scored, but is not in {name}")
    _check_results(results, iou_types, images, {category["id"] for category in dataset["categories"]}, name)

    metrics, per_class = {}, {}
    for iou_type in iou_types:
        limits = [20] if iou_type == "keypoints" else [1, 10, max_detections]
        class_names, precisions, recalls = [], [], []
        for truth, sigmas in _truths(dataset, wanted, iou_type, keypoint_sigmas, name):
            ids = {category["id"] for category in truth["categories"]}
            fields = ("image_id", "category_id", "score", RESULT_FIELDS[iou_type])  # no bbox beside a mask
            detections = [
                {field: result[field] for field in fields}
                for result in results
                if result["image_id"] in wanted and result["category_id"] in ids
            ]
            precision, recall = EVALUATORS[evaluator](truth, detections, iou_type, limits, sigmas)
            class_names += [category["name"] for category in truth["categories"]]
            precisions.append(precision)
            recalls.append(recall)
        precision, recall = np.concatenate(precisions, axis=2), np.concatenate(recalls, axis=1)
        metrics[iou_type] = _summarise(precision, recall, iou_type, limits)
        per_class[iou_type] = {
            class_name: _mean(precision[:, :, k, 0, -1]) for k, class_name in enumerate(class_names)
        }
    return metrics, per_class


def _check_results(results, iou_types, images, category_ids, name):
    """Raises ValueError for what would give a wrong number or crash native code; warns of unknown categories.

    images: the annotation file's, by id. category_ids: the file's. name: of the file, for the messages.
    """
    unknown = sorted({str(result["image_id"]) for result in results if result["image_id"] not in images})
    if unknown:
        raise ValueError(
            f"results of {len(unknown)} images that are not in {name} (ids {', '.join(unknown[:5])}); "
            "score them against the annotations of the images that were predicted"
        )
    unknown = [result["category_id"] for result in results if result["category_id"] not in category_ids]
    if unknown:
        examples = ", ".join(sorted({str(category) for category in unknown})[:5])
        warnings.warn(
            f"{len(unknown)} results of categories that are not in {name} (ids {examples}): left out",
            stacklevel=3,
        )
    _check_finite(results, "score", ())
    for iou_type in iou_types:
        if iou_type not in RESULT_FIELDS:
            raise ValueError(f"iou type {iou_type!r}: must be one of {', '.join(RESULT_FIELDS)}")
        field = RESULT_FIELDS[iou_type]
        for number, result in enumerate(results):
            if field not in result:
                raise ValueError(f"result {number} (image {result['image_id']}) has no {field} to score")
    if "bbox" in iou_types:
        _check_finite(results, "bbox", (4,))
    if "segm" in iou_types:
        for number, result in enumerate(results):
            image, size = images[result["image_id"]], result["segmentation"]["size"]
            if list(size) != [image.get("height"), image.get("width")]:
                raise ValueError(
                    f"result {number} (image {image['id']}) has a mask of size {size}, but {name} says "
                    f"{[image.get('height'), image.get('width')]} (height, width)"
                )
    if "keypoints" in iou_types:
        by_length = {}
        for result in results:
            by_length.setdefault(len(result["keypoints"]), []).append(result)
        for length, some in by_length.items():
            _check_finite(some, "keypoints", (length,))


def _check_finite(results, field, shape):
    """Raises ValueError unless results[i][field] are finite numbers of this shape."""
    try:
        values = np.array([result[field] for result in results], np.float64)
    except (TypeError, ValueError):
        values = None
    if values is None or values.shape[1:] != shape:
        raise ValueError(
            f"a result has a {field} that is not {'one number' if not shape else f'{shape[0]} numbers'}"
        )
    bad = np.flatnonzero(~np.isfinite(values.reshape(len(results), -1)).all(axis=1))
    if len(bad):
        result = results[bad[0]]
        raise ValueError(
            f"{len(bad)} results have a {field} that is not finite, the first of image {result['image_id']}: "
            f"{result[field]}; such a detection cannot be ranked or matched"
        )


def _truths(dataset, image_ids, iou_type, keypoint_sigmas, name):
    """Yield what an evaluator scores at once: (ground truth, sigmas).

    One for boxes and for masks (sigmas None); for keypoints one for each set of sigmas, as an evaluator takes one.
    Categories are sorted by id. Annotations are copies, numbered from 1: COCO's matching takes id 0 for "unmatched".
    """
    categories = sorted(dataset["categories"], key=lambda category: category["id"])
    images = [image for image in dataset["images"] if image["id"] in image_ids]
    annotations = [annotation for annotation in dataset["annotations"] if annotation["image_id"] in image_ids]

    def truth_of(categories, annotations, fields):
        fields = ("image_id", "category_id", "iscrowd", "area", *fields)
        fresh = [
            {"id": n, **{field: a[field] for field in fields}} for n, a in enumerate(annotations, start=1)
        ]
        return {"images": images, "categories": categories, "annotations": fresh}

    if iou_type != "keypoints":
        field = RESULT_FIELDS[iou_type]
        lacking = [annotation["id"] for annotation in annotations if not annotation.get(field)]
        _warn(name, lacking, "annotation", f"without {field}", f"left out of the {TITLES[iou_type]} metrics")
        yield truth_of(categories, [a for a in annotations if a.get(field)], (field,)), None
        return

    num_keypoints = {category["id"]: len(category.get("keypoints", ())) for category in categories}
    for annotation in annotations:
        if annotation.get("keypoints"):
            num_keypoints[annotation["category_id"]] = len(annotation["keypoints"]) // 3
    sigmas_of = {}
    for category_id, count in num_keypoints.items():
        default = COCO_SIGMAS if count == len(COCO_SIGMAS) else np.full(count, COCO_SIGMAS.mean())
        sigmas_of[category_id] = tuple((keypoint_sigmas or {}).get(category_id, default))
    if not any(num_keypoints.values()):
        raise ValueError(f"{name} has no keypoints to score against; leave keypoints out of the iou types")
    for sigmas in sorted(set(sigmas_of.values()) - {()}):
        members = [category for category in categories if sigmas_of[category["id"]] == sigmas]
        none_visible = {"keypoints": [0] * 3 * len(sigmas), "num_keypoints": 0}
        own = [{**none_visible, **a} for a in annotations if sigmas_of[a["category_id"]] == sigmas]
        yield truth_of(members, own, ("bbox", "keypoints", "num_keypoints")), np.array(sigmas)


def _evaluate_with_hotcoco(truth, detections, iou_type, limits, sigmas):
    """Returns (precision [T, R, K, A, L], recall [T, K, A, L]) float64, -1 where there is nothing to find."""
    coco = hotcoco.COCO(truth)
    evaluation = hotcoco.COCOeval(coco, coco.load_res(detections), iou_type)
    evaluation.params.max_dets = limits
    if sigmas is not None:
        evaluation.params.kpt_oks_sigmas = sigmas.tolist()
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation.eval["precision"], evaluation.eval["recall"]


def _evaluate_with_pycocotools(truth, detections, iou_type, limits, sigmas):
    """As _evaluate_with_hotcoco. Not beside other threads: stdout is redirected to catch what the library prints."""
    for number, detection in enumerate(detections, start=1):
        if iou_type == "bbox":
            area = detection["bbox"][2] * detection["bbox"][3]
        elif iou_type == "segm":
            area = mask_api.area(detection["segmentation"])
        else:
            xs, ys = detection["keypoints"][0::3], detection["keypoints"][1::3]
            area = (max(xs) - min(xs)) * (max(ys) - min(ys))
        detection.update(id=number, area=area, iscrowd=0)
    with contextlib.redirect_stdout(io.StringIO()):
        coco_truth, coco_detections = COCO(), COCO()
        coco_truth.dataset = truth
        coco_truth.createIndex()
        coco_detections.dataset = {**truth, "annotations": detections}
        coco_detections.createIndex()
        evaluation = COCOeval(coco_truth, coco_detections, iou_type)
        evaluation.params.maxDets = limits
        if sigmas is not None:
            evaluation.params.kpt_oks_sigmas = sigmas
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"], evaluation.eval["recall"]


EVALUATORS = {"hotcoco": _evaluate_with_hotcoco, "pycocotools": _evaluate_with_pycocotools}


def _summarise(precision, recall, iou_type, limits):
    """COCO's 12 numbers of boxes and masks, or 10 of keypoints, by name.

    The areas are all, small, medium and large; for keypoints all, medium and large.
    """
    at_50, at_75 = 0, 5  # of the IoU thresholds 0.50, 0.55, ... 0.95
    sizes = "ml" if iou_type == "keypoints" else "sml"
    values = {
        "AP": precision[..., 0, -1],
        "AP50": precision[at_50, ..., 0, -1],
        "AP75": precision[at_75, ..., 0, -1],
    }
    values |= {f"AP{size}": precision[..., a, -1] for a, size in enumerate(sizes, start=1)}
    if iou_type == "keypoints":
        values |= {
            "AR": recall[..., 0, -1],
            "AR50": recall[at_50, ..., 0, -1],
            "AR75": recall[at_75, ..., 0, -1],
        }
    else:
        values |= {f"AR{limit}": recall[..., 0, i] for i, limit in enumerate(limits)}
    values |= {f"AR{size}": recall[..., a, -1] for a, size in enumerate(sizes, start=1)}
    return {name: _mean(value) for name, value in values.items()}


def _mean(values):
    present = values[values > -1]
    return float(present.mean()) if present.size else -1.0


# --- tables ------------------------------------------------------------------------------------------------


def format_table(metrics):
    """score_results' metrics as text: a row for each number, boxes and masks side by side, keypoints below."""
    blocks = []
    for iou_types in (("bbox", "segm"), ("keypoints",)):
        iou_types = [iou_type for iou_type in iou_types if iou_type in metrics]
        if not iou_types:
            continue
        names = list(metrics[iou_types[0]])
        limits = [name[2:] for name in names if name.startswith("AR") and name[2:] in ("1", "10")]
        most = "20" if "keypoints" in iou_types else names[8][2:]
        rows = [["", "IoU", "area", "detections", *(TITLES[iou_type] for iou_type in iou_types)]]
        for name in names:
            suffix = name[2:]
            iou = {"50": "0.50", "75": "0.75"}.get(suffix, "0.50:0.95")
            area = {"s": "small", "m": "medium", "l": "large"}.get(suffix, "all")
            limit = suffix if suffix in limits else most
            rows.append([name, iou, area, limit, *(_format_number(metrics[t][name]) for t in iou_types)])
        blocks.append(_align(rows, left=3))
    return "\n\n".join(blocks)


def format_per_class(per_class):
    """score_results' AP of each class as text, a row for each, in the order of the category ids."""
    names = list(dict.fromkeys(name for classes in per_class.values() for name in classes))
    rows = [["class", *(f"{TITLES[iou_type]} AP" for iou_type in per_class)]]
    for name in names:
        rows.append([name, *(_format_number(classes.get(name, -1.0)) for classes in per_class.values())])
    return _align(rows, left=1)


def _format_number(value):
    return "n/a" if value == -1 else f"{value:.3f}"


def _align(rows, left):
    """Join rows of cells into lines, the first `left` columns flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


# --- the command ---------------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Score a COCO results file against its annotation file.")
    parser.add_argument("ground_truth", metavar="GT.json", help="annotation file")
    parser.add_argument(
        "results", metavar="RESULTS.json", help="results: a list of detections, best order kept"
    )
    parser.add_argument(
        "--iou-type",
        nargs="+",
        choices=list(RESULT_FIELDS),
        dest="iou_types",
        help="what to score (default: all that the results carry)",
    )
    parser.add_argument(
        "--evaluator",
        choices=list(EVALUATORS),
        default="hotcoco",
        help="equal numbers (default: %(default)s)",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write the metrics there in full precision; - is stdout"
    )
    parser.add_argument("--per-class", action="store_true", help="the AP of each class as well")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    results = read_results(args.results)
    carried = [iou_type for iou_type, field in RESULT_FIELDS.items() if results and field in results[0]]
    iou_types = args.iou_types or carried or ["bbox"]
    metrics, per_class = score_results(args.ground_truth, results, iou_types, evaluator=args.evaluator)
    report = {**metrics, "per_class": per_class} if args.per_class else metrics
    if args.json == "-":
        print(json.dumps(report, indent=2))
        return
    print(format_table(metrics))
    if args.per_class:
        print("\n" + format_per_class(per_class))
    if args.json:
        write_json(args.json, report)


if __name__ == "__main__":
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
