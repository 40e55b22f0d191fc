"""The annotation records of a COCO json, checked one by one: what a sound record is, and what is wrong with another.

The plain way, which knows every message; coco_scan.py reads whole files of sound records faster.

Letters: R records, J keypoints.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

import masks


class Finding(NamedTuple):
    """One thing that is wrong: which subject, what it is, and how to mend it or what will be done."""

    level: str  # "error": the file cannot be used; "warning": it is, as `action` says
    subject: str  # "annotation 17 (image 3)"
    what: str
    action: str
    kind: str = ""  # what warnings are counted by, in the plural

    def __str__(self) -> str:
        return f"{self.subject} {self.what}; {self.action}"


@dataclass
class Columns:
    """R annotation records in the file's order, each sound in itself."""

    ids: np.ndarray  # int64 [R]
    image_ids: np.ndarray  # int64 [R]
    category_ids: np.ndarray  # int64 [R]
    boxes: np.ndarray  # float64 [R, 4], x, y, width, height in pixels
    crowd: np.ndarray  # bool [R]
    # Where a segmentation's json stands: at a byte of the file, or, if negative, at byte -1 - place of `texts`.
    places: np.ndarray  # int64 [R]
    lengths: np.ndarray  # int32 [R], in bytes; 0 without a mask
    rle_sizes: np.ndarray  # int32 [R, 2] height, width of an RLE; 0 for polygons
    keypoints: np.ndarray  # float32 [R, 3J]
    texts: bytes = b""
    findings: list[Finding] = field(default_factory=list)


class Invalid(ValueError):
    """A record that cannot be used: what is wrong, and how to mend it."""

    def __init__(self, what: str, action: str) -> None:
        super().__init__(what)
        self.what, self.action = what, action


def with_integer_ids(records: Sequence[Any], name: str, findings: list[Finding]) -> Iterable[dict[str, Any]]:
    """The records that are objects with an integer id; findings for the others.

    name: "image", "annotation" or "category".
    """
    for position, record in enumerate(records):
        if not isinstance(record, dict):
            what = f"is {record!r:.40}, not an object"
            findings.append(Finding("error", f"{name} number {position + 1}", what, "remove it"))
        elif not is_integer(record.get("id")):
            what = f"has id {record['id']!r:.40}, not an integer" if "id" in record else "has no id"
            action = f"give every {name} an integer id of its own"
            findings.append(Finding("error", f"{name} number {position + 1}", what, action))
        else:
            yield record


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def read_records(records: Sequence[Any], num_keypoints: int) -> Columns:
    """Check annotation records one by one; those with an error are left out of the columns."""
    findings: list[Finding] = []
    rows, places, texts, keypoint_rows = [], [], [], []
    text_size = 0
    for record in with_integer_ids(records, "annotation", findings):
        subject = f"annotation {record['id']} (image {record.get('image_id')!r:.40})"
        try:
            image_id, category_id = _reference(record, "image_id"), _reference(record, "category_id")
            crowd, box = _crowd(record), _box(record)
            _check_area(record)
            segmentation, rle_size = check_segmentation(record.get("segmentation"), subject, findings)
            keypoints = _keypoints(record, num_keypoints)
        except Invalid as error:
            findings.append(Finding("error", subject, error.what, error.action))
            continue
        text = json.dumps(segmentation).encode() if segmentation else b""
        rows.append((record["id"], image_id, category_id, crowd, len(text), *rle_size))
        places.append(-1 - text_size)
        texts.append(text)
        text_size += len(text)
        keypoint_rows.append((box, keypoints))
    integers = np.array(rows, np.int64).reshape(-1, 7)
    return Columns(
        ids=integers[:, 0],
        image_ids=integers[:, 1],
        category_ids=integers[:, 2],
        boxes=np.array([box for box, _ in keypoint_rows], np.float64).reshape(-1, 4),
        crowd=integers[:, 3].astype(bool),
        places=np.array(places, np.int64),
        lengths=integers[:, 4].astype(np.int32),
        rle_sizes=integers[:, 5:].astype(np.int32),
        keypoints=np.array([k for _, k in keypoint_rows], np.float32).reshape(len(rows), 3 * num_keypoints),
        texts=b"".join(texts),
        findings=findings,
    )


def _reference(record: dict[str, Any], key: str) -> int:
    if not is_integer(record.get(key)):
        raise Invalid(f"has {key} {record.get(key)!r:.40}", f"{key} must be an integer")
    return record[key]


def _crowd(record: dict[str, Any]) -> bool:
    crowd = record.get("iscrowd", 0)
    if not isinstance(crowd, (int, float)) or crowd not in (0, 1):
        raise Invalid(f"has iscrowd {crowd!r:.40}", "iscrowd must be 0 or 1")
    return bool(crowd)


def _is_coordinate(value: Any) -> bool:
    # Also false for NaN, which compares false.
    return type(value) in (int, float) and abs(value) <= masks.MAX_COORDINATE


def _box(record: dict[str, Any]) -> list[float]:
    box = record.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(type(value) in (int, float) for value in box):
        raise Invalid(f"has bbox {box!r:.60}", "bbox must be four numbers [x, y, width, height]")
    if not all(map(_is_coordinate, box)):
        raise Invalid(
            f"has bbox {box!r:.60}", f"its numbers must be finite and within ±{masks.MAX_COORDINATE:g} pixels"
        )
    return box


def _check_area(record: dict[str, Any]) -> None:
    area = record.get("area", 0)
    if type(area) not in (int, float) or not 0 <= area < np.inf:
        action = "area must be a number of pixels; without it evaluation takes the mask's"
        raise Invalid(f"has area {area!r:.40}", action)


def check_segmentation(
    segmentation: Any, subject: str, findings: list[Finding]
) -> tuple[list[list[float]] | dict[str, Any], tuple[int, int]]:
    """(segmentation without what is no polygon, RLE size); [] if no mask is left; (0, 0) if it is no RLE.

    Adds a warning for each polygon left out or cut. Raises Invalid for what cannot be used.
    """
    if segmentation is None:
        return [], (0, 0)
    try:
        if isinstance(segmentation, dict):
            size = segmentation.get("size")
            if not isinstance(size, list) or len(size) != 2 or not all(map(is_integer, size)):
                raise ValueError(f"RLE has size {size!r:.60}, not [height, width]")
            masks.check_frame(*size)
            masks.rle_counts(segmentation, *size)
            return segmentation, (size[0], size[1])
        if not isinstance(segmentation, list):
            raise ValueError(f"{segmentation!r:.40} is neither polygons nor an RLE")
        if segmentation and not any(isinstance(polygon, (list, dict)) for polygon in segmentation):
            raise ValueError("a flat list, where a list of polygons is due: [[x1, y1, x2, y2, ...], ...]")
        polygons = []
        for polygon in segmentation:
            what = f"has a polygon of {len(polygon)} numbers" if isinstance(polygon, list) else ""
            if masks.check_polygon(polygon) is None:
                kind = "polygons of fewer than three points"
                findings.append(Finding("warning", subject, what, "the polygon is left out", kind))
                continue
            if len(polygon) % 2:
                kind = "polygons of an odd number of numbers"
                findings.append(Finding("warning", subject, what, "the last number is ignored", kind))
            polygons.append(polygon)
        return polygons, (0, 0)
    except ValueError as error:
        raise Invalid(f"has a bad segmentation ({error})", "correct the segmentation, or remove it") from None


def _keypoints(record: dict[str, Any], num_keypoints: int) -> list[float]:
    """x, y, visibility of each keypoint; zeros if the annotation has none."""
    keypoints = record.get("keypoints")
    if not keypoints or num_keypoints == 0:
        return [0.0] * (3 * num_keypoints)
    if not isinstance(keypoints, list) or len(keypoints) != 3 * num_keypoints:
        found = len(keypoints) if isinstance(keypoints, list) else f"{keypoints!r:.40}"
        raise Invalid(
            f"has keypoints of {found} numbers", f"it must be {3 * num_keypoints}: x, y, visibility of each"
        )
    if not all(map(_is_coordinate, keypoints)):
        raise Invalid(
            "has a keypoint that is no number",
            f"numbers must be finite, within ±{masks.MAX_COORDINATE:g} pixels",
        )
    if not all(value in (0, 1, 2) for value in keypoints[2::3]):
        raise Invalid("has a keypoint visibility that is not 0, 1 or 2", "correct it")
    return keypoints
