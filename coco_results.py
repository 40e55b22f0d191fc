"""Predictions -> COCO results: held as columns image by image, gathered from all ranks, read from and written to files.

100 detections in each of 5,000 images take 0.6 GB as the dicts of a results file, and a quarter of it as columns.

Letters: D detections of an image, M side of a mask head's output (28), J keypoints.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from masks import check_frame, rle_counts
from pasting import encode_frames, encode_masks
from utils import UserError

RESULT_FIELDS = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}  # by iou type


@dataclass
class ImageResults:
    """The detections in one image. Their order decides between equal scores. What was not predicted is None."""

    image_id: int  # the json's
    size: tuple[int, int]  # height, width
    category_ids: np.ndarray  # int64 [D], the json's
    scores: np.ndarray  # float [D]
    boxes: np.ndarray | None = None  # float [D, 4], x, y, width, height in pixels
    keypoints: np.ndarray | None = None  # float [D, 3J], x, y, v of each
    counts: np.ndarray | None = None  # uint8, the masks' compressed RLE counts one after another
    counts_ends: np.ndarray | None = None  # int64 [D], where each mask's end

    def __len__(self):
        return len(self.scores)

    def values(self, iou_type):
        """What is scored, as lists for json: D boxes, D RLE dicts or D lists of keypoints; None if not predicted."""
        if iou_type != "segm":
            column = self.boxes if iou_type == "bbox" else self.keypoints
            return None if column is None else column.tolist()
        if self.counts is None:
            return None
        text, ends, size = self.counts.tobytes().decode("ascii"), self.counts_ends.tolist(), list(self.size)
        return [
            {"size": size, "counts": text[start:end]} for start, end in zip([0, *ends], ends, strict=False)
        ]

    def records(self):
        """The detections as COCO has them in a results file, a list of D dicts."""
        columns = {"category_id": self.category_ids.tolist(), "score": self.scores.tolist()}
        columns |= {field: self.values(iou_type) for iou_type, field in RESULT_FIELDS.items()}
        columns = {field: values for field, values in columns.items() if values is not None}
        return [
            {"image_id": self.image_id, **dict(zip(columns, row, strict=True))}
            for row in zip(*columns.values(), strict=True)
        ]


# --- predictions to results -----------------------------------------------------------------------


def predictions_to_results(outputs, image_ids, image_sizes, category_ids):
    """Turn some images' predictions into a list of ImageResults, detections in the model's order.

    outputs: per image a dict of boxes float [D, 4] xyxy in pixels, labels int64 [D] in 1..K, scores float [D], for
        masks either mask_probs float [D, M, M] or masks float [D, 1, H, W], and keypoints float [D, J, 3].
    image_ids: the json's ids. image_sizes: (height, width) each. category_ids: category_ids[label - 1] is the json's.
    Keeps and changes nothing, so that threads can run it beside the next forward.
    Raises ValueError for a box or score that is not finite, or a label without a category.
    """
    results = []
    category_ids = np.array(category_ids, np.int64)
    for output, image_id, (height, width) in zip(outputs, image_ids, image_sizes, strict=True):
        boxes = output["boxes"].detach().float().cpu()
        scores = output["scores"].detach().float().cpu()
        labels = output["labels"].cpu().numpy()
        if not (torch.isfinite(boxes).all() and torch.isfinite(scores).all()):
            raise ValueError(
                f"image {image_id}: a predicted box or score is not finite; the model has diverged"
            )
        if len(labels) and not 1 <= labels.min() <= labels.max() <= len(category_ids):
            raise ValueError(
                f"image {image_id}: predicted labels {labels.min()}..{labels.max()}, but the annotation file has "
                f"{len(category_ids)} categories; evaluate with the classes that the model was trained on"
            )
        found = ImageResults(
            image_id,
            (height, width),
            category_ids[labels - 1],
            scores.numpy(),
            torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).numpy(),
        )
        if "mask_probs" in output:
            found.counts, found.counts_ends = _join(encode_masks(output["mask_probs"], boxes, height, width))
        elif "masks" in output:
            found.counts, found.counts_ends = _join(encode_frames(output["masks"]))
        if "keypoints" in output:
            found.keypoints = output["keypoints"].detach().float().cpu().flatten(1).numpy()
        results.append(found)
    return results


def _join(counts: Iterable[bytes]):
    """(counts, counts_ends) of ImageResults."""
    counts = list(counts)
    return np.frombuffer(b"".join(counts), np.uint8), np.cumsum([len(c) for c in counts], dtype=np.int64)


# --- gathering ------------------------------------------------------------------------------------


def gather_results(results, image_ids, group=None):
    """Bring every rank's results to rank 0, in the order of the data set: the same list for any number of ranks.

    results: this rank's ImageResults, of images that no other rank has. image_ids: of the whole data set, in its order.
    group: one that carries CPU tensors (gloo); default: the default group, or no gathering where there is none.
    Returns the list on rank 0, None on the others. What travels is bytes in tensors of the exact size, no pickles.
    Raises ValueError on rank 0 for results of an image that two ranks had, or that the data set lacks.
    """
    shards = [results]
    if dist.is_available() and dist.is_initialized():
        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        payload = torch.frombuffer(bytearray(_pack(results)), dtype=torch.uint8)
        sizes = torch.zeros(world_size, dtype=torch.int64)
        sizes[rank] = len(payload)
        dist.all_reduce(sizes, group=group)
        if rank != 0:
            dist.send(payload, group=group, group_dst=0)
            return None
        for source in range(1, world_size):
            data = torch.empty(int(sizes[source]), dtype=torch.uint8)
            dist.recv(data, group=group, group_src=source)
            shards.append(_unpack(data.numpy()))

    position = {image_id: index for index, image_id in enumerate(image_ids)}
    rank_of_image = {}
    for rank, shard in enumerate(shards):
        for image_id in (found.image_id for found in shard):
            if image_id not in position:
                raise ValueError(f"rank {rank} has results of image {image_id}, which is not in the data set")
            if image_id in rank_of_image:
                raise ValueError(
                    f"image {image_id} was evaluated by rank {rank_of_image[image_id]} and by rank {rank}; "
                    "give each image to one rank, without padding the shards"
                )
            rank_of_image[image_id] = rank
    return sorted((found for shard in shards for found in shard), key=lambda found: position[found.image_id])


_COLUMNS = ("category_ids", "scores", "boxes", "keypoints", "counts", "counts_ends")


def _pack(results):
    """ImageResults as bytes: the length of a json header, the header, and the columns it describes."""
    header, columns = [], []
    for found in results:
        present = {name: getattr(found, name) for name in _COLUMNS if getattr(found, name) is not None}
        shapes = {name: [column.dtype.str, *column.shape] for name, column in present.items()}
        header.append([found.image_id, *found.size, shapes])
        columns += [column.tobytes() for column in present.values()]
    header = json.dumps(header).encode()
    return b"".join([len(header).to_bytes(8, "little"), header, *columns])


def _unpack(data):
    """What _pack was given. data: uint8 [bytes]; the columns remain views of it."""
    place = 8 + int.from_bytes(data[:8].tobytes(), "little")
    results = []
    for image_id, height, width, shapes in json.loads(data[8:place].tobytes()):
        columns = {}
        for name, (dtype, *shape) in shapes.items():
            end = place + np.dtype(dtype).itemsize * int(np.prod(shape))
            columns[name] = data[place:end].copy().view(dtype).reshape(shape)
            place = end
        results.append(ImageResults(image_id, (height, width), **columns))
    return results


# --- files ----------------------------------------------------------------------------------------


def write_results(path, results):
    """Write a COCO results file, image by image; a reader never meets half of it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w") as file:
            file.write("[")
            comma = ""
            for found in results:
                if len(found):
                    file.write(comma + json.dumps(found.records())[1:-1])
                    comma = ", "
            file.write("]")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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


def group_records(records, sizes, iou_types):
    """Checked records of a results file as ImageResults, the images in the order in which they first appear.

    sizes: {image id: (height, width)}. iou_types: only what these score is taken over.
    """
    by_image = {}
    for record in records:
        by_image.setdefault(record["image_id"], []).append(record)
    results = []
    for image_id, members in by_image.items():
        found = ImageResults(
            image_id,
            tuple(sizes[image_id]),
            np.array([member["category_id"] for member in members], np.int64),
            np.array([member["score"] for member in members], np.float64),
        )
        if "bbox" in iou_types:
            found.boxes = np.array([member["bbox"] for member in members], np.float64)
        if "keypoints" in iou_types:
            found.keypoints = np.array([member["keypoints"] for member in members], np.float64)
        if "segm" in iou_types:
            counts = (member["segmentation"]["counts"].encode("ascii") for member in members)
            found.counts, found.counts_ends = _join(counts)
        results.append(found)
    return results
