"""A COCO annotation file as columns, and everything that is wrong with it.

The one pass that training, evaluation and `coco_utils.py check` share. `read_index` gives columns (numpy arrays, no
Python object per annotation, so that forked loader workers share them without copying) and a list of findings: an
error makes the file unusable, a warning names what is left out or mended.

Letters: I images, A annotations that are kept, K categories, J keypoints of an object.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from msgspec import structs

import masks
from coco_records import Columns, Finding, is_integer, read_records, with_integer_ids
from coco_scan import ImageRecord, Irregular, read_regular_file
from utils import UserError


class Texts:
    """An immutable list of strings in two arrays."""

    def __init__(self, texts: Sequence[str]) -> None:
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        self.offsets = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum(list(map(len, encoded)), out=self.offsets[1:])
        self.flat = np.frombuffer(b"".join(encoded), np.uint8)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, n: int) -> str:
        return self.flat[self.offsets[n] : self.offsets[n + 1]].tobytes().decode("utf-8", "surrogatepass")

    def tolist(self) -> list[str]:
        """All of them, faster than one after the other."""
        flat, offsets = self.flat.tobytes(), self.offsets.tolist()
        return [flat[a:b].decode("utf-8", "surrogatepass") for a, b in pairwise(offsets)]


class Segmentations:
    """Polygons and RLEs of a file's annotations, left as json text: in the file itself, or in memory.

    places, lengths: int64 [A], see coco_records.Columns. Read with pread, so forked workers share the open file.
    """

    def __init__(self, path: Path, places: np.ndarray, lengths: np.ndarray, texts: bytes) -> None:
        self.path, self.places, self.lengths = path, places, lengths
        self.texts = np.frombuffer(texts, np.uint8)
        self._open()
        self._stamp = self._stamp_now()

    def _open(self) -> None:
        self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115 (open as long as the data set lives)

    def _stamp_now(self) -> tuple[int, int]:
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns

    def __getitem__(self, n: int) -> list[list[float]] | dict[str, Any]:
        """Polygons or an RLE as the file has them; [] without a mask. Raises UserError if the file has changed."""
        place, length = int(self.places[n]), int(self.lengths[n])
        if length == 0:
            return []
        if place < 0:
            text = self.texts[-1 - place : -1 - place + length].tobytes()
        else:
            if self._stamp_now() != self._stamp:
                raise UserError(f"{self.path}: changed while in use; leave it alone, and start again")
            text = os.pread(self._file.fileno(), length, place)
        return json.loads(text)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_file"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


@dataclass
class CocoIndex:
    """The columns of one annotation file. Annotations stand in the order of their images, then of the file."""

    path: Path
    category_ids: np.ndarray  # int64 [K], ascending; label n is category_ids[n - 1]
    classes: list[str]  # [K] names, in that order
    keypoint_names: list[str]  # [J], of the categories that have keypoints
    image_ids: np.ndarray  # int64 [I], in the file's order
    sizes: np.ndarray  # int64 [I, 2] height, width
    file_names: Texts  # [I]
    first: np.ndarray  # int64 [I + 1]: image i has annotations first[i] to first[i + 1]
    annotation_ids: np.ndarray  # int64 [A]
    labels: np.ndarray  # int64 [A] in 1..K
    boxes: np.ndarray  # float32 [A, 4] xyxy pixels, clipped to the image, none of them empty
    crowd: np.ndarray  # bool [A]
    segmentations: Segmentations  # [A]
    keypoints: np.ndarray  # float32 [A, J, 3]
    findings: list[Finding] = field(default_factory=list)

    @property
    def has_mask(self) -> np.ndarray:
        """bool [A]"""
        return self.segmentations.lengths > 0


class BadAnnotationFile(ValueError):
    """Nothing can be read from the file; `finding` says why."""

    def __init__(self, what: str, action: str) -> None:
        self.finding = Finding("error", "the file", what, action)
        super().__init__(str(self.finding))


def read_index(path: str | Path) -> CocoIndex:
    """Read and check a COCO annotation file.

    Returns the columns of what can be used and, in `findings`, everything that cannot. With an error among them
    the index must not be used.
    Raises BadAnnotationFile if there is no telling images from annotations: not json, or not COCO's three lists.
    """
    path = Path(path)
    try:
        index = _build_index(path, *read_regular_file(path))
        if not any(finding.level == "error" for finding in index.findings):
            return index
    except (Irregular, OSError, ValueError):  # mmap raises ValueError for an empty file
        pass
    content = _read_json(path)
    advice = "a COCO annotation file holds the lists images, annotations and categories"
    if not isinstance(content, dict):
        raise BadAnnotationFile(
            f"holds a {type(content).__name__}, not an object", f"{advice}; is this a results file?"
        )
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list):
            raise BadAnnotationFile(f"has no list {key!r}", advice)
    return _build_index(path, content["images"], content["categories"], content["annotations"])


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise BadAnnotationFile(f"cannot be read ({error.strerror})", "check the path") from None
    except json.JSONDecodeError as error:
        what = f"is not valid JSON at character {error.pos}, line {error.lineno} ({error.msg})"
        raise BadAnnotationFile(what, "is it cut off? fetch or write it again") from None
    except (ValueError, RecursionError) as error:
        raise BadAnnotationFile(f"is not valid JSON ({str(error)[:80]})", "write it again") from None


def _build_index(
    path: Path,
    image_records: list[ImageRecord] | list[Any],
    category_records: list[Any],
    annotations: Columns | list[Any],
) -> CocoIndex:
    """Everything that takes more than one record to know, of a regular file or of what json holds.

    Raises Irregular where a regular file's keypoints do not fit its categories; the plain way says how.
    """
    findings: list[Finding] = []
    categories = _read_categories(category_records, findings)
    keypoint_names = _common_keypoints(categories, findings)
    num_keypoints = len(keypoint_names)
    if isinstance(annotations, Columns):
        images = _read_faultless_images(image_records)
        if images is None:
            images = _read_images([structs.asdict(record) for record in image_records], findings)
        columns = annotations
        if columns.keypoints.shape[1] != 3 * num_keypoints:
            raise Irregular
        listed_images = images.ids
    else:
        images, columns = _read_images(image_records, findings), read_records(annotations, num_keypoints)
        listed_images = _ids(image_records)
    for records, name in ((image_records, "image"), (category_records, "category")):
        if not records:
            findings.append(
                Finding("error", "the file", f"has no {name} at all", f"it needs at least one {name}")
            )
    category_ids = np.array([category["id"] for category in categories], np.int64)
    for ids, name in ((images.ids, "image"), (category_ids, "category"), (columns.ids, "annotation")):
        values, counts = np.unique(ids, return_counts=True)
        for value, count in zip(values[counts > 1].tolist(), counts[counts > 1].tolist(), strict=True):
            action = f"give every {name} an id of its own"
            findings.append(Finding("error", f"{name} {value}", f"occurs {count} times", action))
    findings += columns.findings
    listed = listed_images, _ids(category_records)
    image_of, boxes, keep = _resolve(columns, images, category_ids, findings, *listed)
    order = keep[np.argsort(image_of[keep], kind="stable")]
    return CocoIndex(
        path=path,
        category_ids=category_ids,
        classes=[category["name"] for category in categories],
        keypoint_names=keypoint_names,
        image_ids=images.ids,
        sizes=images.sizes,
        file_names=Texts(images.file_names),
        first=np.searchsorted(image_of[order], np.arange(len(images.ids) + 1)),
        annotation_ids=columns.ids[order],
        labels=np.searchsorted(category_ids, columns.category_ids[order]) + 1,
        boxes=boxes[order],
        crowd=columns.crowd[order],
        segmentations=Segmentations(path, columns.places[order], columns.lengths[order], columns.texts),
        keypoints=columns.keypoints[order].reshape(len(order), num_keypoints, 3),
        findings=findings,
    )


def _resolve(
    columns: Columns,
    images: _Images,
    category_ids: np.ndarray,
    findings: list[Finding],
    listed_images: np.ndarray | list[int],
    listed_categories: list[int],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(image of each record or -1, boxes xyxy clipped to it, records to keep); adds the findings.

    listed_images, listed_categories: the ids of all records, with those that are in error.
    """
    image_of = _find(images.ids, columns.image_ids)
    listed = image_of >= 0
    known = _find(category_ids, columns.category_ids) >= 0
    sizes = np.concatenate([images.sizes, [[0, 0]]])  # the last for records without an image, numbered -1
    boxes = np.empty((len(image_of), 4), np.float32)
    for axis in (0, 1):  # one coordinate at a time, to hold less memory at once
        low, limit = columns.boxes[:, axis], sizes[:, 1 - axis][image_of]
        boxes[:, axis] = np.clip(low, 0, limit)
        boxes[:, axis + 2] = np.clip(low + columns.boxes[:, axis + 2], 0, limit)
    flat = (columns.boxes[:, 2:] <= 0).any(axis=1)
    outside = ~flat & (boxes[:, 2:] <= boxes[:, :2]).any(axis=1)
    wrong_rle = listed & (columns.rle_sizes[:, 0] > 0)
    wrong_rle[wrong_rle] = (columns.rle_sizes[wrong_rle] != sizes[image_of[wrong_rle]]).any(axis=1)
    # What belongs to an image or category that is itself in error is not reported over again.
    orphan, nameless = ~listed, ~known
    if orphan.any():
        orphan &= ~np.isin(columns.image_ids, listed_images)
    if nameless.any():
        nameless &= ~np.isin(columns.category_ids, listed_categories)

    def report(which: np.ndarray, level: str, what: str, action: str, kind: str = "") -> None:
        for n in np.flatnonzero(which).tolist():
            values = {
                "box": f"{columns.boxes[n].tolist()} (x, y, width, height)",
                "category": columns.category_ids[n],
                "rle": columns.rle_sizes[n].tolist(),
                "size": f"{sizes[image_of[n]].tolist()} (height, width)",
            }
            subject = f"annotation {columns.ids[n]} (image {columns.image_ids[n]})"
            findings.append(Finding(level, subject, what.format(**values), action, kind))

    what = "has category {category}, which the file does not list"
    report(nameless, "error", what, "add the category, or remove the annotation")
    what = "has an RLE of size {rle}, but its image is {size}"
    report(wrong_rle, "error", what, "correct one of them")
    action = "evaluation gives it another id, since pycocotools takes 0 for no match"
    report(columns.ids == 0, "warning", "has id 0", action, "annotations with id 0")
    kind = "annotations of images that the file does not list"
    report(orphan, "warning", "belongs to an image that the file does not list", "left out", kind)
    kind = "annotations with a box of no width or height"
    report(listed & flat, "warning", "has box {box} of no width or height", "left out", kind)
    kind = "annotations with a box outside their image"
    report(listed & outside, "warning", "has box {box} outside its image of {size}", "left out", kind)
    keep = listed & known & ~flat & ~outside
    kind, action = "annotations without a segmentation", "left out where masks are trained"
    report(keep & (columns.lengths == 0), "warning", "has no segmentation", action, kind)
    return image_of, boxes, np.flatnonzero(keep)


def _ids(records: list[Any]) -> list[int]:
    return [r["id"] for r in records if isinstance(r, dict) and is_integer(r.get("id"))]


def _find(ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where each wanted id stands in `ids`, int64; -1 if nowhere."""
    if len(ids) == 0:
        return np.full(len(wanted), -1)
    order = np.argsort(ids, kind="stable")
    place = order[np.minimum(np.searchsorted(ids, wanted, sorter=order), len(ids) - 1)]
    return np.where(ids[place] == wanted, place, -1)


# --- images and categories --------------------------------------------------------------------------------------


def _read_categories(records: list[Any], findings: list[Finding]) -> list[dict[str, Any]]:
    """The usable categories, by ascending id."""
    categories = []
    names: dict[str, int] = {}
    for record in with_integer_ids(records, "category", findings):
        name, subject = record.get("name"), f"category {record['id']}"
        keypoints = record.get("keypoints", [])
        if not isinstance(name, str) or not name:
            action = "give every category a name"
            findings.append(Finding("error", subject, f"has name {name!r:.40}", action))
        elif not isinstance(keypoints, list) or not all(isinstance(point, str) for point in keypoints):
            findings.append(
                Finding("error", subject, "has keypoints that are no list of names", "name each one")
            )
        else:
            if name in names:
                what = f"has the name {name!r} of category {names[name]}"
                kind = "categories with the name of another"
                findings.append(Finding("warning", subject, what, "they are taken for two classes", kind))
            names.setdefault(name, record["id"])
            categories.append(record)
    return sorted(categories, key=lambda record: record["id"])


def _common_keypoints(categories: list[dict[str, Any]], findings: list[Finding]) -> list[str]:
    """The keypoint names that all categories with keypoints share; [] if none has any."""
    with_keypoints = [category for category in categories if category.get("keypoints")]
    for category in with_keypoints[1:]:
        if len(category["keypoints"]) != len(with_keypoints[0]["keypoints"]):
            what = f"has {len(category['keypoints'])} keypoints"
            action = f"category {with_keypoints[0]['id']} has {len(with_keypoints[0]['keypoints'])}; give both as many"
            findings.append(Finding("error", f"category {category['id']}", what, action))
    return with_keypoints[0]["keypoints"] if with_keypoints else []


class _Images(NamedTuple):
    ids: np.ndarray  # int64 [I]
    sizes: np.ndarray  # int64 [I, 2] height, width
    file_names: list[str]  # [I]


def _read_faultless_images(records: list[ImageRecord]) -> _Images | None:
    """All images at once, in the file's order; None if one may be at fault."""
    names = [record.file_name for record in records]
    listing = "\n".join(["", *names, ""])
    suspicious = ("..", ":", "\\", "\0", "\n\n", "\n/")
    if listing.count("\n") != len(names) + 1 or any(text in listing for text in suspicious):
        return None
    try:
        ids = np.array([record.id for record in records], np.int64)
        sizes = np.array([(record.height, record.width) for record in records], np.int64).reshape(-1, 2)
    except OverflowError:
        return None
    if (sizes < 1).any() or sizes.prod(axis=1, dtype=np.float64).max(initial=0) > masks.MAX_PIXELS:
        return None
    return _Images(ids, sizes, names)


def _read_images(records: list[Any], findings: list[Finding]) -> _Images:
    """The images without an error, in the file's order; findings for the others."""
    ids, sizes, names = [], [], []
    for record in with_integer_ids(records, "image", findings):
        subject = f"image {record['id']}"
        height, width, file_name = record.get("height"), record.get("width"), record.get("file_name")
        if not is_integer(height) or not is_integer(width):
            what = f"has height {height!r:.40} and width {width!r:.40}"
            findings.append(Finding("error", subject, what, "give both as whole pixels"))
        elif height < 1 or width < 1 or height * width > masks.MAX_PIXELS:
            what = f"has {height}×{width} pixels (height × width)"
            action = f"an image must have at least one and at most {masks.MAX_PIXELS:,} pixels"
            findings.append(Finding("error", subject, what, action))
        elif not isinstance(file_name, str) or not file_name or "\0" in file_name:
            findings.append(Finding("error", subject, f"has file_name {file_name!r:.40}", "name its file"))
        elif _leaves_folder(file_name):
            action = "file names are relative to the image folder and stay inside it"
            findings.append(Finding("error", subject, f"has file_name {file_name!r:.80}", action))
        else:
            ids.append(record["id"])
            sizes.append((height, width))
            names.append(file_name)
    return _Images(np.array(ids, np.int64), np.array(sizes, np.int64).reshape(-1, 2), names)


def _leaves_folder(file_name: str) -> bool:
    """Whether a file name is absolute or has a part `..`, with either kind of slash."""
    parts = file_name.replace("\\", "/").split("/")
    return ".." in parts or parts[0] == "" or parts[0].endswith(":")
