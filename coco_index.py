"""A COCO annotation file as columns, and everything that is wrong with it.

The one pass that training and `coco_utils.py check` share: `read_index` gives columns (numpy arrays and flat
bytes, no Python object per annotation, so that forked loader workers share them without copying) and a list of
findings. An error makes the file unusable; a warning names what is left out or mended. faults.md's numbers 1-29.

Letters: I images, A annotations that are kept, K categories, J keypoints of an object.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import masks


class Finding(NamedTuple):
    """One thing that is wrong: with what, which one, what it is, and what to do or what will be done."""

    level: str  # "error": the file cannot be used; "warning": it is, as `action` says
    subject: str  # "annotation 17 (image 3)"
    what: str
    action: str
    kind: str = ""  # what warnings are counted by: "annotations of images that the file does not list"

    def __str__(self) -> str:
        return f"{self.subject} {self.what}; {self.action}"


class Texts:
    """An immutable list of byte strings in two arrays."""

    def __init__(self, texts: Sequence[bytes]) -> None:
        self.offsets = np.zeros(len(texts) + 1, np.int64)
        np.cumsum([len(text) for text in texts], out=self.offsets[1:])
        self.flat = np.frombuffer(b"".join(texts), np.uint8)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, n: int) -> bytes:
        return self.flat[self.offsets[n] : self.offsets[n + 1]].tobytes()


@dataclass
class CocoIndex:
    """The columns of one annotation file. Annotations stand in the order of their images, then of the file."""

    path: Path
    category_ids: np.ndarray  # int64 [K], ascending; label n is category_ids[n - 1]
    classes: list[str]  # [K] names, in that order
    keypoint_names: list[str]  # [J], of the categories that have keypoints
    image_ids: np.ndarray  # int64 [I], in the file's order
    sizes: np.ndarray  # int64 [I, 2] height, width
    file_names: Texts  # [I], UTF-8
    first: np.ndarray  # int64 [I + 1]: image i has annotations first[i] to first[i + 1]
    annotation_ids: np.ndarray  # int64 [A]
    labels: np.ndarray  # int64 [A] in 1..K
    boxes: np.ndarray  # float64 [A, 4] xyxy pixels, clipped to the image, none of them empty
    crowd: np.ndarray  # bool [A]
    segmentations: Texts  # [A], json; empty where an annotation has no mask
    keypoints: np.ndarray  # float32 [A, J, 3]
    findings: list[Finding] = field(default_factory=list)

    def segmentation(self, n: int) -> Any:
        """Polygons or RLE of annotation n, as in the file; [] if it has none."""
        text = self.segmentations[n]
        return json.loads(text) if text else []


class BadAnnotationFile(ValueError):
    """What is wrong with a file of which nothing can be read; `finding` says it."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(str(finding))
        self.finding = finding


def read_index(path: str | Path) -> CocoIndex:
    """Read and check a COCO annotation file.

    Returns the columns of what can be used and, in `findings`, everything that cannot. With an error among them
    the index must not be trained on.
    Raises BadAnnotationFile if there is no telling images from annotations: not json, or not COCO's three lists.
    """
    path = Path(path)
    content = _read_json(path)
    findings: list[Finding] = []
    categories = _read_categories(content["categories"], findings)
    images = _read_images(content["images"], findings)
    if not images:
        findings.append(Finding("error", "the file", "has no images", "give it at least one"))
    if not categories:
        findings.append(Finding("error", "the file", "has no categories", "give it at least one"))
    return _build_index(path, categories, images, content["annotations"], findings)


# --- the file's own grammar ---------------------------------------------------------------------------------


def _read_json(path: Path) -> dict[str, Any]:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise BadAnnotationFile(
            Finding("error", "the file", f"cannot be read ({error.strerror})", "check the path")
        ) from None
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        what = f"is not valid JSON at character {error.pos}, line {error.lineno} ({error.msg})"
        raise BadAnnotationFile(Finding("error", "the file", what, "is it cut off? fetch it again")) from None
    except (ValueError, RecursionError) as error:
        what = f"is not valid JSON ({str(error)[:80]})"
        raise BadAnnotationFile(Finding("error", "the file", what, "write it anew")) from None
    if not isinstance(content, dict):
        what = f"holds a {type(content).__name__}, not an object"
        action = "a COCO annotation file is {images, annotations, categories}; is this a results file?"
        raise BadAnnotationFile(Finding("error", "the file", what, action))
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list):
            what = f"has no list {key!r}"
            action = "a COCO annotation file has the lists images, annotations and categories"
            raise BadAnnotationFile(Finding("error", "the file", what, action))
    return content


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class _Invalid(ValueError):
    """A record that cannot be used: what is wrong, and how to mend it."""

    def __init__(self, what: str, action: str) -> None:
        super().__init__(what)
        self.what, self.action = what, action


def _records(records: Sequence[Any], name: str, findings: list[Finding]) -> Iterable[dict[str, Any]]:
    """The records that are objects with an integer id, each id once; findings for the others."""
    seen: set[int] = set()
    for position, record in enumerate(records):
        if not isinstance(record, dict):
            what = f"is {record!r:.40}, not an object"
            findings.append(Finding("error", f"{name} number {position + 1}", what, "remove it"))
        elif not _is_integer(record.get("id")):
            what = f"has id {record['id']!r:.40}, not an integer" if "id" in record else "has no id"
            action = f"give every {name} an integer id of its own"
            findings.append(Finding("error", f"{name} number {position + 1}", what, action))
        elif record["id"] in seen:
            action = f"give every {name} an id of its own"
            findings.append(Finding("error", f"{name} {record['id']}", "occurs more than once", action))
        else:
            seen.add(record["id"])
            yield record


def _read_categories(records: list[Any], findings: list[Finding]) -> list[dict[str, Any]]:
    """The usable categories, by ascending id."""
    categories = []
    names: dict[str, int] = {}
    for record in _records(records, "category", findings):
        name, subject = record.get("name"), f"category {record['id']}"
        if not isinstance(name, str) or not name:
            findings.append(Finding("error", subject, f"has name {name!r:.40}", "give every category a name"))
            continue
        if name in names:
            what = f"has the name {name!r} of category {names[name]}"
            action = "they are trained as two classes"
            findings.append(Finding("warning", subject, what, action, "categories with the name of another"))
        names.setdefault(name, record["id"])
        keypoints = record.get("keypoints", [])
        if not isinstance(keypoints, list) or not all(isinstance(point, str) for point in keypoints):
            findings.append(
                Finding("error", subject, "has keypoints that are no list of names", "name every keypoint")
            )
            continue
        categories.append(record)
    return sorted(categories, key=lambda record: record["id"])


class _Image(NamedTuple):
    id: int
    height: int
    width: int
    file_name: str


def _read_images(records: list[Any], findings: list[Finding]) -> list[_Image]:
    images = []
    for record in _records(records, "image", findings):
        subject = f"image {record['id']}"
        height, width, file_name = (record.get(key) for key in ("height", "width", "file_name"))
        if not _is_integer(height) or not _is_integer(width):
            what = f"has height {height!r:.40} and width {width!r:.40}"
            findings.append(Finding("error", subject, what, "give both as whole pixels"))
        elif height < 1 or width < 1 or height * width > masks.MAX_PIXELS:
            what = f"has {height}×{width} pixels (height × width)"
            action = f"an image must have at least one and at most {masks.MAX_PIXELS:,} pixels"
            findings.append(Finding("error", subject, what, action))
        elif not isinstance(file_name, str) or not file_name or "\0" in file_name:
            findings.append(Finding("error", subject, f"has file_name {file_name!r:.40}", "name its file"))
        elif leaves_folder(file_name):
            action = "file names are relative to the image folder and stay inside it"
            findings.append(Finding("error", subject, f"has file_name {file_name!r:.80}", action))
        else:
            images.append(_Image(record["id"], height, width, file_name))
    return images


def leaves_folder(file_name: str) -> bool:
    """Whether a file name is absolute or has a part `..`, in either kind of slash."""
    parts = file_name.replace("\\", "/").split("/")
    return ".." in parts or parts[0] == "" or (len(parts[0]) == 2 and parts[0][1] == ":")


# --- annotations -----------------------------------------------------------------------------------------------


def _build_index(
    path: Path,
    categories: list[dict[str, Any]],
    images: list[_Image],
    records: list[Any],
    findings: list[Finding],
) -> CocoIndex:
    index_of_image = {image.id: i for i, image in enumerate(images)}
    label_of_category = {category["id"]: n + 1 for n, category in enumerate(categories)}
    keypoint_names: list[str] = next((c["keypoints"] for c in categories if c.get("keypoints")), [])
    for category in categories:
        if len(category.get("keypoints") or keypoint_names) != len(keypoint_names):
            what = f"has {len(category['keypoints'])} keypoints where another has {len(keypoint_names)}"
            action = "all categories with keypoints must have equally many"
            findings.append(Finding("error", f"category {category['id']}", what, action))

    rows = []  # (image index, annotation id, label, box xyxy, crowd, segmentation text)
    all_keypoints = []
    for record in _records(records, "annotation", findings):
        subject = f"annotation {record['id']} (image {record.get('image_id')!r:.40})"
        try:
            image_id, category_id = _reference(record, "image_id"), _reference(record, "category_id")
            if category_id not in label_of_category:
                raise _Invalid(
                    f"has category {category_id}, which the file does not list", "add the category"
                )
            crowd = _read_crowd(record)
            box = _read_box(record)
            image = images[index_of_image[image_id]] if image_id in index_of_image else None
            segmentation = _read_segmentation(record, image, subject, findings)
            keypoints = _read_keypoints(record, len(keypoint_names))
        except _Invalid as error:
            findings.append(Finding("error", subject, error.what, error.action))
            continue
        if record["id"] == 0:
            kind = "annotations with id 0"
            action = "evaluation gives it another id, since pycocotools takes 0 for no match"
            findings.append(Finding("warning", subject, "has id 0", action, kind))
        if image is None:
            kind = "annotations of images that the file does not list"
            findings.append(
                Finding("warning", subject, "belongs to an image that is not listed", "left out", kind)
            )
            continue
        x, y, w, h = box
        x0, x1 = (min(max(value, 0.0), image.width) for value in (x, x + w))
        y0, y1 = (min(max(value, 0.0), image.height) for value in (y, y + h))
        if not (x1 > x0 and y1 > y0):
            flat = not (w > 0 and h > 0)
            kind = (
                "annotations with a box of no width or height" if flat else "annotations outside their image"
            )
            what = f"has box {[x, y, w, h]} " + ("of no width or height" if flat else "outside the image")
            findings.append(Finding("warning", subject, what, "left out", kind))
            continue
        if not segmentation and "segmentation" in record:
            kind = "annotations with an empty segmentation"
            findings.append(
                Finding(
                    "warning", subject, "has an empty segmentation", "left out where masks are trained", kind
                )
            )
        rows.append(
            (
                index_of_image[image_id],
                record["id"],
                label_of_category[category_id],
                (x0, y0, x1, y1),
                crowd,
                json.dumps(segmentation).encode() if segmentation else b"",
            )
        )
        all_keypoints.append(keypoints)

    order = sorted(range(len(rows)), key=lambda n: rows[n][0])
    rows = [rows[n] for n in order]
    image_of_row = np.array([row[0] for row in rows], np.int64)
    keypoints = np.zeros((len(rows), len(keypoint_names), 3), np.float32)
    for row, n in enumerate(order):
        if all_keypoints[n] is not None:
            keypoints[row] = np.reshape(all_keypoints[n], (-1, 3))
    return CocoIndex(
        path=path,
        category_ids=np.array([category["id"] for category in categories], np.int64),
        classes=[category["name"] for category in categories],
        keypoint_names=keypoint_names,
        image_ids=np.array([image.id for image in images], np.int64),
        sizes=np.array([(image.height, image.width) for image in images], np.int64).reshape(-1, 2),
        file_names=Texts([image.file_name.encode("utf-8", "surrogatepass") for image in images]),
        first=np.searchsorted(image_of_row, np.arange(len(images) + 1)),
        annotation_ids=np.array([row[1] for row in rows], np.int64),
        labels=np.array([row[2] for row in rows], np.int64),
        boxes=np.array([row[3] for row in rows], np.float64).reshape(-1, 4),
        crowd=np.array([row[4] for row in rows], bool),
        segmentations=Texts([row[5] for row in rows]),
        keypoints=keypoints,
        findings=findings,
    )


def _reference(record: dict[str, Any], key: str) -> int:
    if not _is_integer(record.get(key)):
        raise _Invalid(f"has {key} {record.get(key)!r:.40}", f"{key} must be an integer")
    return record[key]


def _read_crowd(record: dict[str, Any]) -> bool:
    crowd = record.get("iscrowd", 0)
    if not isinstance(crowd, (int, float)) or crowd not in (0, 1):
        raise _Invalid(f"has iscrowd {crowd!r:.40}", "iscrowd must be 0 or 1")
    return bool(crowd)


def _read_box(record: dict[str, Any]) -> tuple[float, float, float, float]:
    box = record.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(value) for value in box):
        raise _Invalid(f"has bbox {box!r:.60}", "bbox must be four numbers [x, y, width, height]")
    if not all(abs(value) <= masks.MAX_COORDINATE for value in box):  # NaN compares false
        raise _Invalid(
            f"has bbox {box!r:.60}", f"numbers must be finite, within ±{masks.MAX_COORDINATE:g} pixels"
        )
    return tuple(map(float, box))


def _read_segmentation(
    record: dict[str, Any], image: _Image | None, subject: str, findings: list[Finding]
) -> Any:
    """The segmentation without what is no polygon; [] if nothing is left."""
    segmentation = record.get("segmentation")
    if segmentation is None:
        return []
    try:
        if isinstance(segmentation, dict):
            if image is not None:
                masks.rle_counts(segmentation, image.height, image.width)
            return segmentation
        if not isinstance(segmentation, list):
            raise _Invalid(f"has segmentation {segmentation!r:.40}", "give polygons or an RLE")
        if segmentation and all(_is_number(value) for value in segmentation):
            raise _Invalid(
                "has a segmentation of bare numbers",
                "it must be a list of polygons: [[x1, y1, x2, y2, ...], ...]",
            )
        polygons = []
        for polygon in segmentation:
            if masks.check_polygon(polygon) is None:
                what = f"has a polygon of {len(polygon)} numbers"
                kind = "polygons of fewer than three points"
                findings.append(Finding("warning", subject, what, "left out", kind))
                continue
            if len(polygon) % 2:
                what = f"has a polygon of {len(polygon)} numbers"
                kind = "polygons with an odd number of numbers"
                findings.append(Finding("warning", subject, what, "its last number is ignored", kind))
            polygons.append(polygon)
        return polygons
    except _Invalid:
        raise
    except ValueError as error:
        raise _Invalid(f"has a bad segmentation: {error}", "correct or remove it") from None


def _read_keypoints(record: dict[str, Any], num_keypoints: int) -> list[float] | None:
    """x, y, visibility of each keypoint; None if the annotation has none."""
    keypoints = record.get("keypoints")
    if not keypoints or num_keypoints == 0:
        return None
    if not isinstance(keypoints, list) or len(keypoints) != 3 * num_keypoints:
        length = len(keypoints) if isinstance(keypoints, list) else f"{keypoints!r:.40}"
        raise _Invalid(
            f"has keypoints {length}", f"it must be {3 * num_keypoints} numbers, 3 for each keypoint"
        )
    if not all(_is_number(v) and math.isfinite(v) and abs(v) <= masks.MAX_COORDINATE for v in keypoints):
        raise _Invalid("has a keypoint that is no finite number", "correct or remove it")
    if not all(v in (0, 1, 2) for v in keypoints[2::3]):
        raise _Invalid("has a keypoint visibility other than 0, 1 and 2", "correct it")
    return keypoints
