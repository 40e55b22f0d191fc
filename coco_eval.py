"""Predictions -> COCO results -> COCO's metrics -> a table; as a command, it scores a results file.

Letters: D detections of an image, M side of a mask head's output (28), J keypoints, T IoU thresholds (10),
R recall thresholds (101), K categories, A area ranges, L limits on the detections of a class in an image.
"""

import argparse
import contextlib
import io
import itertools
import json
import sys
import warnings
from pathlib import Path

import hotcoco
import numpy as np
import torch
import torch.distributed as dist
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from coco_utils import load_index
from masks import check_frame, rle_counts
from pasting import encode_frames, encode_masks
from utils import UserError, write_json

RESULT_FIELDS = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}  # by iou type
LARGEST = 1e12  # of a score or coordinate; the evaluators' arithmetic is safe with it
TITLES = {"bbox": "box", "segm": "mask", "keypoints": "keypoints"}

# How far annotators stray on each of COCO's 17 keypoints, from pycocotools' Params. For other keypoints nobody has
# measured it: they take the mean.
COCO_SIGMAS = [x / 1000 for x in (26, 25, 25, 35, 35, 79, 79, 72, 72, 62, 62, 107, 107, 87, 87, 89, 89)]


# --- predictions to results -----------------------------------------------------------------------


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


# --- the ground truth and a results file ----------------------------------------------------------


def read_ground_truth(path):
    """Read an annotation file for scoring.

    Returns {"images": [{"id", "height", "width"}], "categories": [{"id", "name", "keypoints": names}], "annotations"}.
    An annotation has id, image_id, category_id, bbox xywh (as in the file: not clipped), iscrowd (0 where missing),
    area (where missing the mask's, or else the box's), segmentation ([] where there is none), and with keypoints
    "keypoints" and "num_keypoints".
    Raises UserError for a file that cannot be used. Warns of annotations that are left out.
    """
    index = load_index(path)  # refuses what native code must not see
    content = json.loads(Path(path).read_bytes())
    sizes = dict(zip(index.image_ids.tolist(), index.sizes.tolist(), strict=True))
    usable = set(index.annotation_ids.tolist())
    categories = [
        {"id": category["id"], "name": name, "keypoints": category.get("keypoints", [])}
        for category, name in zip(content["categories"], _class_names(content["categories"]), strict=True)
    ]
    return {
        "images": [
            {"id": image_id, "height": height, "width": width} for image_id, (height, width) in sizes.items()
        ],
        "categories": categories,
        "annotations": [
            _fill_in(annotation, *sizes[annotation["image_id"]], with_keypoints=bool(index.keypoint_names))
            for annotation in content["annotations"]
            if annotation["id"] in usable
        ],
    }


def _fill_in(annotation, height, width, with_keypoints):
    """What scoring needs of an annotation, with what the file may leave out."""
    filled = {key: annotation[key] for key in ("id", "image_id", "category_id", "bbox")}
    filled["iscrowd"] = int(annotation.get("iscrowd", 0))
    segmentation = annotation.get("segmentation") or []
    if isinstance(segmentation, list):  # what is shorter is no polygon; an odd number at the end is ignored
        segmentation = [polygon[: len(polygon) // 2 * 2] for polygon in segmentation if len(polygon) >= 6]
    filled["segmentation"] = segmentation
    filled["area"] = annotation["area"] if "area" in annotation else _area(filled, height, width)
    if with_keypoints and annotation.get("keypoints"):
        filled["keypoints"] = annotation["keypoints"]
        visible = sum(visibility > 0 for visibility in annotation["keypoints"][2::3])
        count = annotation.get("num_keypoints")
        filled["num_keypoints"] = count if isinstance(count, int) else visible
    return filled


def read_results(path):
    """Read a COCO results file: the list of its dicts, in the file's order.

    Raises UserError if it is not a list of results, if an id or a number is none, or if an RLE does not fill its own
    size (native code would read past its buffers).
    """
    try:
        results = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; check the path") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not valid JSON ({error}); is it cut off?") from None
    if not isinstance(results, list):
        raise UserError(
            f"{path}: holds a {type(results).__name__}, not a list of results; is it the annotation file?"
        )
    for number, result in enumerate(results):
        try:
            _check_result(result)
        except ValueError as error:
            raise UserError(f"{path}: result {number} {error}") from None
    return results


def _check_result(result):
    """Raises ValueError for a result that is not of COCO's form. NaN and infinity pass: score_results refuses them."""
    if not isinstance(result, dict):
        raise ValueError(f"is {result!r:.40}, not an object")
    for key in ("image_id", "category_id"):
        if type(result.get(key)) is not int:
            raise ValueError(f"has {key} {result.get(key)!r:.40}, not an integer")
    numbers = [result.get("score"), *_list(result, "bbox"), *_list(result, "keypoints")]
    wrong = [number for number in numbers if type(number) not in (int, float)]
    if wrong:
        raise ValueError(f"has {wrong[0]!r:.40} where a number must be in its score, bbox or keypoints")
    if "segmentation" in result:
        rle = result["segmentation"]
        if not isinstance(rle, dict) or not isinstance(rle.get("counts"), str):
            raise ValueError("has a segmentation that is no compressed RLE; encode polygons first")
        size = _list(rle, "size")
        if [type(side) for side in size] != [int, int]:
            raise ValueError(f"has an RLE of size {size!r:.40}, not [height, width]")
        check_frame(*size)
        rle_counts(rle, *size)


def _list(record, key):
    value = record.get(key, [])
    if not isinstance(value, list):
        raise ValueError(f"has {key} {value!r:.40}, not a list")
    return value


def _class_names(categories):
    """A name for each category; those that share one are told apart by their id."""
    names = [category["name"] for category in categories]
    return [
        name if names.count(name) == 1 else f"{name} ({category['id']})"
        for category, name in zip(categories, names, strict=True)
    ]


def _area(annotation, height, width):
    """Pixels of the annotation's mask; without one, of its box."""
    rle = annotation["segmentation"]
    if not rle:
        return float(annotation["bbox"][2] * annotation["bbox"][3])
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
    results: COCO results; of equal scores in an image the earlier is matched first.
    iou_types: of "bbox", "segm", "keypoints".
    evaluator: "hotcoco" or "pycocotools"; their numbers are equal to the last bit.
    image_ids: score these images only (default: all of the file).
    max_detections: of a class in an image. COCO's is 100 (20 for keypoints, whatever is given here); metrics of another
        number compare with nobody's, and show it by a name like AR300 in place of AR100.
    keypoint_sigmas: {category_id: [J floats]}; default COCO's for 17 keypoints, else the mean of COCO's.

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
    if not isinstance(ground_truth, dict):
        ground_truth = read_ground_truth(ground_truth)
    sizes = {image["id"]: [image["height"], image["width"]] for image in ground_truth["images"]}
    category_ids = {category["id"] for category in ground_truth["categories"]}
    wanted = sizes.keys() if image_ids is None else set(image_ids)
    if not wanted <= sizes.keys():
        raise ValueError(
            f"image {min(wanted - sizes.keys())} is to be scored, but the annotation file has none such"
        )
    num_keypoints = max((len(category["keypoints"]) for category in ground_truth["categories"]), default=0)
    if "keypoints" in iou_types and not num_keypoints:
        raise ValueError("the annotation file has no keypoints to score against; score boxes or masks")
    _check_results(results, iou_types, sizes, num_keypoints)
    _warn_of_categories([r["category_id"] for r in results if r["category_id"] not in category_ids])

    metrics, per_class = {}, {}
    for iou_type in iou_types:
        limits = [20] if iou_type == "keypoints" else [1, 10, max_detections]
        fields = ("image_id", "category_id", "score", RESULT_FIELDS[iou_type])  # not the bbox beside a mask
        names, precisions, recalls = [], [], []
        truth = _annotations_of(ground_truth, iou_type, wanted)
        parts = _split_by_sigmas(truth, keypoint_sigmas or {}) if iou_type == "keypoints" else [(truth, None)]
        for truth, sigmas in parts:
            members = {category["id"]: category["name"] for category in truth["categories"]}
            detections = [
                {field: result[field] for field in fields}
                for result in results
                if result["image_id"] in wanted and result["category_id"] in members
            ]
            precision, recall = EVALUATORS[evaluator](truth, detections, iou_type, limits, sigmas)
            names += members.values()
            precisions.append(precision)
            recalls.append(recall)
        precision, recall = np.concatenate(precisions, axis=2), np.concatenate(recalls, axis=1)
        metrics[iou_type] = _summarise(precision, recall, iou_type, limits)
        per_class[iou_type] = {name: _mean(precision[:, :, k, 0, -1]) for k, name in enumerate(names)}
    return metrics, per_class


def _check_results(results, iou_types, sizes, num_keypoints):
    """Raises ValueError for what would give a wrong number or crash native code.

    sizes: {image_id: [height, width]}. num_keypoints: J.
    """
    unknown = sorted({str(result["image_id"]) for result in results if result["image_id"] not in sizes})
    if unknown:
        raise ValueError(
            f"results of {len(unknown)} images that the annotation file does not list (ids {', '.join(unknown[:5])}); "
            "score them against the annotations of the images that were predicted"
        )
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


def _annotations_of(ground_truth, iou_type, image_ids):
    """The ground truth as an evaluator takes it: of some images, with what one iou type needs.

    Categories come sorted by id; annotations are copies, numbered from 1: COCO's matching takes id 0 for "unmatched".
    """
    categories = sorted(ground_truth["categories"], key=lambda category: category["id"])
    annotations = [
        annotation for annotation in ground_truth["annotations"] if annotation["image_id"] in image_ids
    ]
    fields = ["image_id", "category_id", "iscrowd", "area", RESULT_FIELDS[iou_type]]
    if iou_type == "segm":
        annotations = [annotation for annotation in annotations if annotation["segmentation"]]
    elif iou_type == "keypoints":
        categories = [category for category in categories if category["keypoints"]]
        with_keypoints = {category["id"] for category in categories}
        none_visible = {"keypoints": [0, 0, 0] * len(categories[0]["keypoints"]), "num_keypoints": 0}
        annotations = [none_visible | a for a in annotations if a["category_id"] in with_keypoints]
        fields += ["bbox", "num_keypoints"]
    return {
        "images": [image for image in ground_truth["images"] if image["id"] in image_ids],
        "categories": categories,
        "annotations": [
            {"id": number, **{field: annotation[field] for field in fields}}
            for number, annotation in enumerate(annotations, start=1)
        ],
    }


def _split_by_sigmas(truth, sigmas_by_category):
    """Yield (a part of the ground truth, its sigmas): an evaluator takes one set of them for all its categories."""
    groups = {}
    for category in truth["categories"]:
        count = len(category["keypoints"])
        default = COCO_SIGMAS if count == len(COCO_SIGMAS) else [sum(COCO_SIGMAS) / len(COCO_SIGMAS)] * count
        groups.setdefault(tuple(sigmas_by_category.get(category["id"], default)), []).append(category)
    for sigmas, categories in groups.items():
        members = {category["id"] for category in categories}
        annotations = [
            annotation for annotation in truth["annotations"] if annotation["category_id"] in members
        ]
        yield {**truth, "categories": categories, "annotations": annotations}, list(sigmas)


def _evaluate_with_hotcoco(truth, detections, iou_type, limits, sigmas):
    """Returns (precision [T, R, K, A, L], recall [T, K, A, L]) float64, -1 where there is nothing to find."""
    coco = hotcoco.COCO(truth)
    evaluation = hotcoco.COCOeval(coco, coco.load_res(detections), iou_type)
    evaluation.params.max_dets = limits
    if sigmas is not None:
        evaluation.params.kpt_oks_sigmas = sigmas
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
