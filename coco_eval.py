"""COCO results -> COCO's metrics -> a table; as a command, it scores a results file.

Letters: J keypoints, T IoU thresholds (10), R recall thresholds (101), I images and A annotations of the ground truth,
K categories, S area ranges, L limits on the detections of a class in an image.
"""

import argparse
import contextlib
import io
import itertools
import json
import math
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import hotcoco
import numpy as np
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from coco_index import CocoIndex
from coco_results import RESULT_FIELDS, ImageResults, group_records, read_results
from coco_utils import load_index
from utils import UserError, write_json

LARGEST = 1e12  # of a score or coordinate; the evaluators' arithmetic is safe with it
TITLES = {"bbox": "box", "segm": "mask", "keypoints": "keypoints"}
# Images that are matched at once. More would hold more Python objects; fewer would leave cores idle.
IMAGES_AT_ONCE = 250

# How far annotators stray on each of COCO's 17 keypoints, from pycocotools' Params. For other keypoints nobody has
# measured it: they take the mean.
COCO_SIGMAS = [x / 1000 for x in (26, 25, 25, 35, 35, 79, 79, 72, 72, 62, 62, 107, 107, 87, 87, 89, 89)]


# --- the ground truth -----------------------------------------------------------------------------


@dataclass
class GroundTruth:
    """What scoring needs of an annotation file, as columns. Annotations are in the order of the index."""

    index: CocoIndex
    names: list[str]  # [K], those that two categories share told apart by their ids
    has_keypoints: np.ndarray  # bool [K]
    sigmas: dict[int, list[float]]  # [J] by category id, where the file has them
    boxes: np.ndarray  # float64 [A, 4], x, y, width, height as in the file, not clipped
    areas: np.ndarray  # float64 [A]
    keypoints: np.ndarray  # float64 [A, 3J]
    num_keypoints: np.ndarray  # int64 [A]

    def annotations(self, place, iou_type, labels):
        """The annotations of one image as an evaluator takes them, but for their ids.

        place: of the image in the index. labels: of the categories that count.
        """
        index, records = self.index, []
        found = slice(index.first[place], index.first[place + 1])
        columns = (index.labels[found], index.crowd[found], self.areas[found], self.boxes[found])
        rows = zip(*(column.tolist() for column in columns), strict=True)
        for n, (label, crowd, area, box) in enumerate(rows, start=found.start):
            if label not in labels:
                continue
            record = {"category_id": label, "iscrowd": int(crowd), "area": area}
            if iou_type == "segm":
                record["segmentation"] = _usable(index.segmentations[n])
                if not record["segmentation"]:
                    continue
            else:
                record["bbox"] = box
            if iou_type == "keypoints":
                record["keypoints"] = self.keypoints[n].tolist()
                record["num_keypoints"] = int(self.num_keypoints[n])
            records.append(record)
        return records


def read_ground_truth(source):
    """Read an annotation file for scoring.

    source: its path, or the index of it where there is one already.
    An annotation without area gets the mask's, or else the box's. A category's `sigmas`, one number a keypoint, are
    beyond COCO's fields: they say how far annotators stray.
    Raises UserError for a file that cannot be used. Warns of annotations that are left out.
    """
    index = (
        source if isinstance(source, CocoIndex) else load_index(source)
    )  # refuses what native code must not see
    # Masks and other fields are dropped as they are parsed: they are most of a file.
    content = json.loads(Path(index.path).read_bytes(), object_hook=_scoring_fields)
    place = {annotation_id: n for n, annotation_id in enumerate(index.annotation_ids.tolist())}
    count, num_keypoints = len(place), len(index.keypoint_names)
    boxes, areas = np.zeros((count, 4)), np.full(count, np.nan)
    keypoints, visible = np.zeros((count, 3 * num_keypoints)), np.zeros(count, np.int64)
    for annotation in content["annotations"]:
        n = place.get(annotation["id"])
        if n is None:  # left out
            continue
        boxes[n] = annotation["bbox"]
        areas[n] = annotation.get("area", np.nan)
        if num_keypoints and annotation.get("keypoints"):
            keypoints[n] = annotation["keypoints"]
            given = annotation.get("num_keypoints")
            visible[n] = (
                np.clip(given, 0, num_keypoints) if isinstance(given, int) else (keypoints[n, 2::3] > 0).sum()
            )
    categories = sorted(content["categories"], key=lambda category: category["id"])
    truth = GroundTruth(
        index,
        _class_names(categories),
        np.array([bool(category.get("keypoints")) for category in categories]),
        {c["id"]: _sigmas(c, index.path) for c in categories if c.get("keypoints") and "sigmas" in c},
        boxes,
        areas,
        keypoints,
        visible,
    )
    image_of = np.repeat(np.arange(len(index.image_ids)), np.diff(index.first))
    for n in np.flatnonzero(np.isnan(areas)).tolist():
        areas[n] = _area(_usable(index.segmentations[n]), boxes[n], *index.sizes[image_of[n]].tolist())
    return truth


_SCORING_FIELDS = {"id", "name", "bbox", "area", "keypoints", "num_keypoints", "sigmas"}


def _scoring_fields(record):
    if "annotations" in record:
        return record
    return {field: value for field, value in record.items() if field in _SCORING_FIELDS}


def _sigmas(category, path):
    """Raises UserError unless they are one positive number a keypoint."""
    sigmas, count = category["sigmas"], len(category["keypoints"])
    if (
        not isinstance(sigmas, list)
        or len(sigmas) != count
        or not all(type(sigma) in (int, float) and 0 < sigma < LARGEST for sigma in sigmas)
    ):
        raise UserError(
            f"{path}: category {category['id']} has sigmas {sigmas!r:.60}; they must be {count} positive numbers, one "
            "a keypoint"
        )
    return sigmas


def _usable(segmentation):
    """A segmentation without what is no polygon: fewer than three points; an odd number at the end is ignored."""
    if isinstance(segmentation, dict):
        return segmentation
    return [polygon[: len(polygon) // 2 * 2] for polygon in segmentation if len(polygon) >= 6]


def _class_names(categories):
    """A name for each category; those that share one are told apart by their id."""
    names = [category["name"] for category in categories]
    return [
        name if names.count(name) == 1 else f"{name} ({category['id']})"
        for category, name in zip(categories, names, strict=True)
    ]


def _area(rle, box, height, width):
    """Pixels of a mask; without one, of its box x, y, width, height."""
    if not rle:
        return float(box[2] * box[3])
    if isinstance(rle, list):
        rle = mask_api.merge(mask_api.frPyObjects(rle, height, width))
    elif isinstance(rle["counts"], list):
        rle = mask_api.frPyObjects(rle, height, width)
    return float(mask_api.area(rle))


# --- scoring --------------------------------------------------------------------------------------


def score_results(
    ground_truth,
    results,
    iou_types,
    evaluator="hotcoco",
    image_ids=None,
    max_detections=100,
    keypoint_sigmas=None,
):
    """COCO's metrics of results, in full precision.

    ground_truth: path of the annotation file, or what read_ground_truth made of it.
    results: a list of ImageResults, or of the dicts of a results file; of equal scores in an image the earlier is
        matched first.
    iou_types: of "bbox", "segm", "keypoints".
    evaluator: "hotcoco" or "pycocotools"; their numbers are equal to the last bit.
    image_ids: score these images only (default: all of the file).
    max_detections: of a class in an image. COCO's is 100 (20 for keypoints, whatever is given here); metrics of another
        number compare with nobody's, and show it by a name like AR300 in place of AR100.
    keypoint_sigmas: {category id: [J floats]}, before those of the file; default COCO's for 17 keypoints, else the mean
        of COCO's.

    Returns (metrics, per_class); -1 where there is nothing to find.
        metrics: {"bbox": {"AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"},
            "segm": the same, "keypoints": {"AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl"}}
        per_class: {"bbox": {class name: AP}, ...}
    Masks and keypoints are scored by their own area even if the result carries a bbox, where pycocotools' loadRes would
    take the box's. The arguments are left as they are.
    Raises ValueError for results of unknown images, without the field to score, or with numbers that are not finite,
    and for keypoints where the file has none. Warns of results of unknown categories, and leaves them out.
    Source: pycocotools/cocoeval.py.
    """
    if evaluator not in EVALUATORS:
        raise ValueError(f"evaluator {evaluator!r}: must be one of {', '.join(EVALUATORS)}")
    if not set(iou_types) <= RESULT_FIELDS.keys():
        raise ValueError(f"iou types {', '.join(iou_types)}: must be of {', '.join(RESULT_FIELDS)}")
    if max_detections < 100:
        raise ValueError(f"max_detections {max_detections}: must be COCO's 100, or more")
    if not isinstance(ground_truth, GroundTruth):
        ground_truth = read_ground_truth(ground_truth)
    index = ground_truth.index
    sizes = dict(zip(index.image_ids.tolist(), index.sizes.tolist(), strict=True))
    wanted = set(sizes) if image_ids is None else set(image_ids)
    if not wanted <= sizes.keys():
        raise ValueError(
            f"image {min(wanted - sizes.keys())} is to be scored, but the annotation file has none such"
        )
    num_keypoints = len(index.keypoint_names)
    if "keypoints" in iou_types and not num_keypoints:
        raise ValueError("the annotation file has no keypoints to score against; score boxes or masks")
    category_ids = set(index.category_ids.tolist())
    category_ids = index.category_ids
    if not all(isinstance(found, ImageResults) for found in results):
        _check_records(results, iou_types, sizes, num_keypoints)
        known = set(category_ids.tolist())
        unknown = [result["category_id"] for result in results if result["category_id"] not in known]
        results = group_records([r for r in results if r["category_id"] in known], sizes, iou_types)
    else:
        _check_images(results, iou_types, sizes, num_keypoints)
        found_ids = np.concatenate([found.category_ids for found in results] or [category_ids])
        unknown = found_ids[~np.isin(found_ids, category_ids)].tolist()
    _warn_of_categories(unknown)

    # An evaluator ranks equal scores by image id and file order; small numbers in that order are safe in any float.
    by_image = {found.image_id: found for found in results}
    order = [
        place for place in np.argsort(index.image_ids, kind="stable") if index.image_ids[place] in wanted
    ]
    metrics, per_class = {}, {}
    for iou_type in iou_types:
        limits = [20] if iou_type == "keypoints" else [1, 10, max_detections]
        names, precisions, recalls = [], [], []
        for labels, sigmas in _split_by_sigmas(ground_truth, iou_type, keypoint_sigmas or {}):
            parts = _parts(ground_truth, by_image, order, iou_type, set(labels))
            precision, recall = EVALUATORS[evaluator](labels, parts, iou_type, limits, sigmas)
            names += [ground_truth.names[label - 1] for label in labels]
            precisions.append(precision)
            recalls.append(recall)
        precision, recall = np.concatenate(precisions, axis=2), np.concatenate(recalls, axis=1)
        metrics[iou_type] = _summarise(precision, recall, iou_type, limits)
        per_class[iou_type] = {name: _mean(precision[:, :, k, 0, -1]) for k, name in enumerate(names)}
    return metrics, per_class


def _check_images(results, iou_types, sizes, num_keypoints):
    """As _check_records, for ImageResults."""
    _check_listed([found.image_id for found in results], sizes)
    widths = {"bbox": 4, "keypoints": 3 * num_keypoints}
    for found in results:
        columns = {"score": (found.scores[:, None], 1)}
        columns |= {
            t: (found.boxes if t == "bbox" else found.keypoints, widths[t]) for t in iou_types if t in widths
        }
        for name, (column, width) in columns.items():
            if column is None or column.shape != (len(found), width) or not (np.abs(column) < LARGEST).all():
                raise ValueError(
                    f"a result of image {found.image_id} has no {name} of {width} finite numbers; scoring needs one"
                )
        if "segm" in iou_types and (found.counts is None or list(found.size) != sizes[found.image_id]):
            raise ValueError(
                f"image {found.image_id} has {'no masks' if found.counts is None else f'masks of size {found.size}'}, "
                f"but it is {sizes[found.image_id]} (height, width)"
            )


def _check_records(results, iou_types, sizes, num_keypoints):
    """Raises ValueError for what would give a wrong number or crash native code.

    sizes: {image_id: [height, width]}. num_keypoints: J.
    """
    _check_listed([result["image_id"] for result in results], sizes)
    _check_numbers(results, "score", 1)
    if "bbox" in iou_types:
        _check_numbers(results, "bbox", 4)
    if "keypoints" in iou_types:
        _check_numbers(results, "keypoints", 3 * num_keypoints)
    if "segm" in iou_types:
        for number, result in enumerate(results):
            size = result["segmentation"]["size"] if "segmentation" in result else None
            if size != sizes[result["image_id"]]:
                raise ValueError(
                    f"result {number} (image {result['image_id']}) has "
                    f"{'no mask' if size is None else f'a mask of size {size}'}, but its image is "
                    f"{sizes[result['image_id']]} (height, width)"
                )


def _check_listed(image_ids, sizes):
    unknown = sorted({str(image_id) for image_id in image_ids if image_id not in sizes})
    if unknown:
        raise ValueError(
            f"results of {len(unknown)} images that the annotation file does not list (ids {', '.join(unknown[:5])}); "
            "score them against the annotations of the images that were predicted"
        )


def _check_numbers(results, field, length):
    """Raises ValueError unless every result's `field` is `length` finite numbers (the score: one, not in a list)."""
    for number, result in enumerate(results):
        values = result.get(field)
        try:
            row = [values] if field == "score" else values
            good = len(row) == length and all(abs(value) < LARGEST for value in row)  # false for NaN
        except TypeError:  # not there, or not a number
            good = False
        if not good:
            raise ValueError(
                f"result {number} (image {result['image_id']}) has {field} {values!r:.60}; scoring needs "
                f"{'a finite number' if field == 'score' else f'{length} finite numbers'}"
            )


def _warn_of_categories(unknown):
    """unknown: the category id of each result that is left out."""
    if unknown:
        examples = ", ".join(sorted({str(category_id) for category_id in unknown})[:5])
        warnings.warn(
            f"{len(unknown)} results of categories that the annotation file does not list (ids {examples}): left out",
            stacklevel=3,
        )


def _split_by_sigmas(ground_truth, iou_type, sigmas_by_category):
    """Yield (labels, their sigmas) that together are all that have the iou type: an evaluator takes one set of sigmas.

    For boxes and masks that is once, with None.
    """
    if iou_type != "keypoints":
        yield list(range(1, len(ground_truth.names) + 1)), None
        return
    count = len(ground_truth.index.keypoint_names)
    default = COCO_SIGMAS if count == len(COCO_SIGMAS) else [sum(COCO_SIGMAS) / len(COCO_SIGMAS)] * count
    given, groups = {**ground_truth.sigmas, **sigmas_by_category}, {}
    for label in (np.flatnonzero(ground_truth.has_keypoints) + 1).tolist():
        category_id = int(ground_truth.index.category_ids[label - 1])
        groups.setdefault(tuple(given.get(category_id, default)), []).append(label)
    for sigmas, labels in groups.items():
        yield labels, list(sigmas)


class _Part(NamedTuple):
    """Some images as an evaluator takes them, under numbers of their own; N detections."""

    images: list[dict]
    annotations: list[dict]
    numbers: np.ndarray  # int64 [N], of the image
    labels: np.ndarray  # int64 [N]
    scores: np.ndarray  # float64 [N]
    values: list  # [N], as json has them

    def detections(self, field):
        """As the dicts of a results file."""
        columns = self.numbers.tolist(), self.labels.tolist(), self.scores.tolist(), self.values
        return [
            {"image_id": number, "category_id": label, "score": score, field: value}
            for number, label, score, value in zip(*columns, strict=True)
        ]


def _parts(ground_truth, by_image, order, iou_type, labels):
    """Yield the ground truth and the results as _Parts.

    by_image: {image id: ImageResults}. order: the images' places in the index. labels: of the categories that count.
    """
    index, number, annotation_id = ground_truth.index, 0, 0
    is_wanted = np.isin(np.arange(len(ground_truth.names)) + 1, list(labels))
    for start in range(0, len(order), IMAGES_AT_ONCE):
        images, annotations, columns = [], [], []
        for place in order[start : start + IMAGES_AT_ONCE]:
            number += 1
            height, width = index.sizes[place].tolist()
            images.append({"id": number, "height": height, "width": width})
            for annotation in ground_truth.annotations(place, iou_type, labels):
                annotation_id += 1  # from 1 on: COCO's matching takes id 0 for "unmatched"
                annotations.append({"id": annotation_id, "image_id": number, **annotation})
            found = by_image.get(int(index.image_ids[place]))
            if found is not None and len(found):
                found_places = np.searchsorted(index.category_ids, found.category_ids)
                found_places = np.minimum(found_places, len(index.category_ids) - 1)
                known = index.category_ids[found_places] == found.category_ids
                keep = np.flatnonzero(known & is_wanted[found_places])
                values = found.values(iou_type)
                if len(keep) < len(found):
                    values = [values[n] for n in keep.tolist()]
                columns.append(
                    (np.full(len(keep), number), found_places[keep] + 1, found.scores[keep], values)
                )
        numbers, part_labels, scores, values = zip(*columns, strict=True) if columns else ([], [], [], [])
        yield _Part(
            images,
            annotations,
            np.concatenate([*numbers, np.zeros(0, np.int64)]),
            np.concatenate([*part_labels, np.zeros(0, np.int64)]),
            np.concatenate([*scores, np.zeros(0)]),
            [value for part in values for value in part],
        )


def _evaluate_with_hotcoco(labels, parts, iou_type, limits, sigmas):
    """Returns (precision [T, R, K, S, L], recall [T, K, S, L]) float64, -1 where there is nothing to find."""
    params = hotcoco.Params(iou_type)
    params.max_dets = limits
    if sigmas is not None:
        params.kpt_oks_sigmas = sigmas
    stream = hotcoco.StreamingEval(
        [{"id": label, "name": str(label)} for label in labels], iou_type, params=params
    )
    for part in parts:
        if iou_type == "bbox":
            boxes = np.array(part.values, np.float64).reshape(-1, 4)
            detections = np.column_stack([part.numbers, boxes, part.scores, part.labels])
        else:  # without a box, so that the area is the mask's or the keypoints' own
            detections = part.detections(RESULT_FIELDS[iou_type])
        stream.update(part.images, part.annotations, detections)
    evaluation = stream.finalize()
    evaluation.accumulate()
    return evaluation.eval["precision"], evaluation.eval["recall"]


def _evaluate_with_pycocotools(labels, parts, iou_type, limits, sigmas):
    """As _evaluate_with_hotcoco. Not beside other threads: stdout is redirected to catch what the library prints."""
    images, annotations, detections = [], [], []
    for part in parts:
        images += part.images
        annotations += part.annotations
        detections += part.detections(RESULT_FIELDS[iou_type])
    for number, detection in enumerate(detections, start=1):
        if iou_type == "bbox":
            area = detection["bbox"][2] * detection["bbox"][3]
        elif iou_type == "segm":
            area = mask_api.area(detection["segmentation"])
        else:
            xs, ys = detection["keypoints"][0::3], detection["keypoints"][1::3]
            area = (max(xs) - min(xs)) * (max(ys) - min(ys))
        detection.update(id=number, area=area, iscrowd=0)
    categories = [{"id": label} for label in labels]
    with contextlib.redirect_stdout(io.StringIO()):
        coco_truth, coco_detections = COCO(), COCO()
        coco_truth.dataset = {"images": images, "categories": categories, "annotations": annotations}
        coco_truth.createIndex()
        coco_detections.dataset = {"images": images, "categories": categories, "annotations": detections}
        coco_detections.createIndex()
        evaluation = COCOeval(coco_truth, coco_detections, iou_type)
        evaluation.params.maxDets = limits
        if sigmas is not None:
            evaluation.params.kpt_oks_sigmas = np.array(sigmas)
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


# --- tables ---------------------------------------------------------------------------------------


def format_table(metrics):
    """score_results' metrics as text: a row for each number, boxes and masks side by side, keypoints below."""
    blocks = []
    for iou_types in (("bbox", "segm"), ("keypoints",)):
        iou_types = [iou_type for iou_type in iou_types if iou_type in metrics]
        if not iou_types:
            continue
        names = list(metrics[iou_types[0]])
        limits = ["20"] if "keypoints" in iou_types else [name[2:] for name in names[6:9]]  # AR1, AR10, AR100
        rows = [["", "IoU", "area", "detections", *(TITLES[iou_type] for iou_type in iou_types)]]
        for name in names:
            suffix = name[2:]
            iou = {"50": "0.50", "75": "0.75"}.get(suffix, "0.50:0.95")
            area = {"s": "small", "m": "medium", "l": "large"}.get(suffix, "all")
            limit = suffix if suffix in limits else limits[-1]
            rows.append([name, iou, area, limit, *(_format_number(metrics[t][name]) for t in iou_types)])
        blocks.append(_align(rows, left=3))
    return "\n\n".join(blocks)


def format_per_class(per_class, width=130):
    """score_results' AP of each class as text: in the order of the category ids, down the columns.

    As many classes stand side by side as there are tens of them, if a line of `width` characters holds them.
    """
    names = list(dict.fromkeys(name for classes in per_class.values() for name in classes))
    rows = [["class", *(TITLES[iou_type] for iou_type in per_class)]]
    for name in names:
        rows.append([name, *(_format_number(classes.get(name, -1.0)) for classes in per_class.values())])
    head, *lines = _align(rows, left=1).split("\n")
    gap, cell = " " * 3, max(map(len, [head, *lines]))
    num_columns = max(1, min((width + len(gap)) // (cell + len(gap)), math.ceil(len(lines) / 10)))
    height = math.ceil(len(lines) / num_columns)
    columns = [[head, *lines[start : start + height]] for start in range(0, len(lines), height)]
    table = itertools.zip_longest(*columns, fillvalue="")
    return "\n".join(gap.join(part.ljust(cell) for part in row).rstrip() for row in table)


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


# --- the command ----------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Score a COCO results file against its annotation file.")
    parser.add_argument("ground_truth", metavar="GT.json", help="annotation file")
    parser.add_argument("results", metavar="RESULTS.json", help="results file, as in detections.json")
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
    """Score and print. Returns the exit status: 2 after a mistake that the user can mend, told in one line."""
    args = parse_args(argv)
    try:
        results = read_results(args.results)
        carried = [iou_type for iou_type, field in RESULT_FIELDS.items() if results and field in results[0]]
        iou_types = args.iou_types or carried or ["bbox"]
        metrics, per_class = score_results(args.ground_truth, results, iou_types, evaluator=args.evaluator)
        report = {**metrics, "per_class": per_class} if args.per_class else metrics
        if args.json not in (None, "-"):
            write_json(args.json, report)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json == "-":
        print(json.dumps(report, indent=2))
        return 0
    print(format_table(metrics))
    if args.per_class:
        print("\n" + format_per_class(per_class))
    return 0


if __name__ == "__main__":
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    sys.exit(main())
