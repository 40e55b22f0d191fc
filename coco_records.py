"""The annotation records of a COCO json as raw columns: fast where the file is regular, right where it is not.

`read_records` is the plain way: a json object a record, each checked field by field. It knows every message.
`read_regular_file` is the fast way to the same columns. A writer of annotation files prints one record like the
other, so the text is split into what repeats (keys and punctuation, compared as a whole), numbers (parsed as one
long json list) and segmentations (their grammar checked with array operations; they stay in the file as text, to be
parsed when their image is loaded). COCO's 118,287 images with 860,001 annotations so cost a tenth of the time and a
twentieth of the memory of one Python object a value. A file or record of another shape, or one with an error, is left
to the plain way.

Letters: R records, J keypoints, M numbers in a record.
"""

from __future__ import annotations

import json
import mmap
import multiprocessing
import os
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from io import FileIO
from itertools import repeat
from pathlib import Path
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


# --- the plain way ----------------------------------------------------------------------------------------------


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


# --- the fast way -----------------------------------------------------------------------------------------------

# Of text at a time: its arrays stay in the cache and in the heap, which is five times faster than 500,000.
CHUNK_BYTES = 100_000
LAYOUT_BYTES = 1_000_000  # the first record must end before; else the file is read in the plain way
PARALLEL_BYTES = 50_000_000  # from this size on, several processes read
MAX_PROCESSES = 8
MAX_USUAL_NUMBERS = 800  # of a polygon; with _has_plain_numbers' 4 digits it keeps within MAX_OUTLINE_PIXELS
_KEYS_READ = {"images", "annotations", "categories"} | {
    "id",
    "name",
    "keypoints",
    "file_name",
    "height",
    "width",
}
_NUMBER = b"0123456789.-"
_NOT_IN_NUMBER_LIST = bytes(set(range(256)) - set(_NUMBER + b","))


class Irregular(Exception):
    """The file, or a piece of it, has to be read in the plain way."""


class _Layout(NamedTuple):
    """What every record of a file looks like, taken from its first one."""

    skeleton: bytes  # a record without its numbers and segmentation, and what stands between it and the next
    between: bytes  # that last part alone, such as ", "
    colon: bytes  # between key and value
    comma: bytes  # between a value and the next key
    keys: list[str]
    fields: dict[str, slice]  # where the numbers of a key stand among the M numbers of a record
    num_numbers: int

    @property
    def separator(self) -> bytes:
        return b"}" + self.between + b"{"

    @property
    def num_keypoints(self) -> int:
        keypoints = self.fields.get("keypoints", slice(0, 0))
        return (keypoints.stop - keypoints.start) // 3


def read_regular_file(path: Path) -> tuple[dict[str, Any], Columns]:
    """(the json but for its annotations, the annotations' columns).

    Raises Irregular where the plain way is needed: to read the file at all, or to say what is wrong with it.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        opening = re.compile(rb'"annotations"\s*:\s*\[\s*').match(text, max(0, text.find(b'"annotations"')))
        if opening is None:
            raise Irregular
        begin = opening.end()
        end = _end_of_records(text, begin)
        layout = _learn_layout(text[begin : min(end, begin + LAYOUT_BYTES)])
        begins, ends = [begin], []
        for target in np.linspace(begin, end, _num_processes(end - begin) + 1)[1:-1].astype(int).tolist():
            brace = text.find(layout.separator, target, end)
            if brace >= begins[-1]:
                ends.append(brace + 1)
                begins.append(brace + len(layout.separator) - 1)
        ends.append(end)
        if len(begins) == 1:
            others = _read_others(text[:begin] + text[end:])
            return others, _read_part(path, begin, end, layout)
        with warnings.catch_warnings():  # Python warns of forking beside threads; these children run none
            warnings.simplefilter("ignore", DeprecationWarning)
            with ProcessPoolExecutor(len(begins), multiprocessing.get_context("fork")) as pool:
                parts = pool.map(_read_part, repeat(path), begins, ends, repeat(layout))
                others = _read_others(text[:begin] + text[end:])
                gathered = _Gathered(0)
                for part in parts:
                    gathered.add(part)
                return others, gathered.columns()


def _read_others(text: bytes) -> dict[str, Any]:
    """The json around the annotations, which are [] in this text; of records only what is read anywhere."""
    if text.count(b'"annotations"') != 1:
        raise Irregular
    # An image's addresses and dates take more memory than all that is read of it.
    others = _load_json(text, lambda record: {key: record[key] for key in record if key in _KEYS_READ})
    if not isinstance(others, dict) or others.get("annotations") != []:
        raise Irregular
    return others


def _end_of_records(text: mmap.mmap, begin: int) -> int:
    """Where the list of records that starts at `begin` ends, just behind its last brace."""
    step = 1 << 24
    for start in range(begin - begin % mmap.PAGESIZE, len(text), step):
        found = text.find(b"}]", max(start, begin), start + step + 1)
        if hasattr(text, "madvise"):  # the pages seen count as this process's memory until it lets them go
            text.madvise(mmap.MADV_DONTNEED, start, min(step, len(text) - start))
        if found >= 0:
            return found + 1
    raise Irregular


def _num_processes(num_bytes: int) -> int:
    """How many processes read: this rank's share of the cores, where a file is worth it."""
    can_fork = hasattr(os, "fork") and not multiprocessing.current_process().daemon
    if num_bytes < PARALLEL_BYTES or not can_fork:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MAX_PROCESSES, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def _load_json(text: bytes, object_hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    try:
        return json.loads(text, object_hook=object_hook)
    except (ValueError, RecursionError):
        raise Irregular from None


def _learn_layout(text: bytes) -> _Layout:
    """The layout of the first record in a text. Raises Irregular if it holds more than numbers and a segmentation."""
    match = re.compile(rb'"segmentation"\s*:\s*(\[[^"{}]*\]|\{[^{}]*\})').search(text)
    if match:
        text = text[: match.start(1)] + b"0" + text[match.end(1) :]
    length = text.find(b"}") + 1
    record = text[:length]
    try:
        pairs = json.loads(record, object_pairs_hook=list)
    except (ValueError, RecursionError):
        raise Irregular from None
    fields, position = {}, 0
    for key, value in pairs:
        values = value if isinstance(value, list) else [value]
        if set(key.encode()) & set(_NUMBER + b",") or not {type(v) for v in values} <= {int, float}:
            raise Irregular
        fields[key] = slice(position, position + len(values))
        position += len(values)
    widths = {key: fields[key].stop - fields[key].start for key in fields}
    expected = {"id": 1, "image_id": 1, "category_id": 1, "bbox": 4}
    expected |= {key: 1 for key in ("iscrowd", "area", "segmentation") if key in fields}
    if len(fields) != len(pairs) or any(widths.get(key) != width for key, width in expected.items()):
        raise Irregular
    if "segmentation" in fields and not match:
        raise Irregular
    between = re.compile(rb"(\s*,\s*)\{").match(text, length)
    between = between[1] if between else b","
    colon = re.search(rb'"(\s*:\s*)', record)
    comma = re.search(rb'(\s*,\s*)"', record)
    if not record.startswith(b'{"') or not colon or not comma:
        raise Irregular
    skeleton = record.translate(None, _NUMBER) + between
    return _Layout(skeleton, between, colon[1], comma[1], list(fields), fields, position)


def _read_part(path: Path, begin: int, end: int, layout: _Layout) -> Columns:
    """The columns of the records from byte `begin` to byte `end` of the file."""
    gathered = _Gathered((end - begin) // len(layout.skeleton) + 1)
    usual_structures: set[bytes] = set()
    with open(path, "rb", buffering=0) as file:
        while begin < end:
            text = _read_whole_records(file, begin, end, layout.separator)
            try:
                gathered.add(_read_chunk(text, begin, layout, usual_structures))
            except Irregular:
                gathered.add(_read_chunk_plainly(text, layout))
            begin += len(text) + len(layout.between)
    return gathered.columns()


class _Gathered:
    """Columns that grow without leaving holes in the heap: room for all records, of which only what is used is real."""

    def __init__(self, most_records: int) -> None:
        self.most_records, self.size, self.texts_size = most_records, 0, 0
        self.arrays: dict[str, np.ndarray] = {}
        self.texts: list[bytes] = []
        self.findings: list[Finding] = []

    def add(self, part: Columns) -> None:
        part.places[part.places < 0] -= self.texts_size
        start, self.size = self.size, self.size + len(part.ids)
        for name, values in vars(part).items():
            if isinstance(values, np.ndarray):
                array = self.arrays.get(name)
                if array is None or self.size > len(array):
                    grown = np.empty((max(self.most_records, 2 * self.size), *values.shape[1:]), values.dtype)
                    if array is not None:
                        grown[:start] = array[:start]
                    self.arrays[name] = array = grown
                array[start : self.size] = values
        self.texts.append(part.texts)
        self.texts_size += len(part.texts)
        self.findings += part.findings

    def columns(self) -> Columns:
        arrays = {name: array[: self.size] for name, array in self.arrays.items()}
        return Columns(**arrays, texts=b"".join(self.texts), findings=self.findings)


def _read_whole_records(file: FileIO, begin: int, end: int, separator: bytes) -> bytes:
    """Records from byte `begin` of the file on, of about CHUNK_BYTES, but at least one."""
    size = min(CHUNK_BYTES, end - begin)
    while True:
        file.seek(begin)
        text = file.read(size)
        if len(text) < size:
            raise Irregular  # the file is shorter than it was
        if begin + size == end:
            return text
        whole = text.rfind(separator) + 1
        if whole:
            return text[:whole]
        size = min(8 * size, end - begin)


def _read_chunk_plainly(text: bytes, layout: _Layout) -> Columns:
    if "keypoints" not in layout.keys and b'"keypoints"' in text:
        raise Irregular  # how many there are, the first record did not say
    columns = read_records(_load_json(b"[" + text + b"]"), layout.num_keypoints)
    if any(finding.level == "error" for finding in columns.findings):
        raise Irregular
    return columns


def _read_chunk(text: bytes, place: int, layout: _Layout, usual_structures: set[bytes]) -> Columns:
    """The columns of whole records, text[0] the first one's opening brace and text[-1] the last one's closing one.

    place: where in the file the text starts. usual_structures: see _find_unusual.
    Raises Irregular unless the text is valid json and every record is like the first and free of errors.
    """
    segmentations, places, reduced = _cut_out_segmentations(text, layout)
    # What is left is the skeleton over and over ...
    skeleton = reduced.translate(None, _NUMBER) + layout.between
    num_records = len(skeleton) // len(layout.skeleton)
    if skeleton != layout.skeleton * num_records:
        raise Irregular
    # ... with digits, points and signs only where numbers may stand ...
    code = np.frombuffer(reduced, np.uint8)
    in_number = (code - 45 < 13) & (code != 47)
    may_precede = (code == 32) | (code == 44) | (code == 58) | (code == 91) | in_number  # space , : [
    may_follow = (code == 44) | (code == 93) | (code == 125) | in_number  # , ] }
    if (in_number[1:] & ~may_precede[:-1]).any() or (in_number[:-1] & ~may_follow[1:]).any():
        raise Irregular
    # ... and as many valid numbers as there should be.
    table, is_decimal = _parse_numbers(reduced.translate(None, _NOT_IN_NUMBER_LIST))
    if len(table) != num_records * layout.num_numbers:
        raise Irregular
    table, is_decimal = (array.reshape(num_records, layout.num_numbers) for array in (table, is_decimal))

    def integers(key: str) -> np.ndarray:
        column = table[:, layout.fields[key].start]
        if is_decimal[:, layout.fields[key].start].any() or np.abs(column).max() >= 2**53:
            raise Irregular
        return column.astype(np.int64)

    def floats(key: str) -> np.ndarray:
        return table[:, layout.fields[key]] if key in layout.fields else table[:, :0]

    crowd, area, boxes, keypoints = floats("iscrowd"), floats("area"), floats("bbox"), floats("keypoints")
    visibility = keypoints[:, 2::3]
    if (
        ((crowd != 0) & (crowd != 1)).any()
        or not ((area >= 0) & (area < np.inf)).all()
        or max(np.abs(boxes).max(), np.abs(keypoints).max(initial=0)) > masks.MAX_COORDINATE
        or keypoints.shape[1] % 3
        or not ((visibility == 0) | (visibility == 1) | (visibility == 2)).all()
    ):
        raise Irregular

    ids, image_ids = integers("id"), integers("image_id")
    lengths, rle_sizes = np.zeros(num_records, np.int32), np.zeros((num_records, 2), np.int32)
    findings: list[Finding] = []
    if segmentations:
        lengths[:] = list(map(len, segmentations))
        for n in _find_unusual(segmentations, usual_structures):
            subject = f"annotation {ids[n]} (image {image_ids[n]})"
            try:
                usable, rle_sizes[n] = check_segmentation(_load_json(segmentations[n]), subject, findings)
            except Invalid:
                raise Irregular from None
            lengths[n] *= bool(usable)
    return Columns(
        ids=ids,
        image_ids=image_ids,
        category_ids=integers("category_id"),
        boxes=boxes.copy(),
        crowd=(crowd == 1).any(axis=1),
        places=places + place if segmentations else np.zeros(num_records, np.int64),
        lengths=lengths,
        rle_sizes=rle_sizes,
        keypoints=keypoints.astype(np.float32),
        findings=findings,
    )


def _cut_out_segmentations(text: bytes, layout: _Layout) -> tuple[list[bytes], np.ndarray, bytes]:
    """(the segmentations, where they start in the text, the text with a 0 for each of them)."""
    if "segmentation" not in layout.keys:
        return [], np.zeros(0, np.int64), text
    # An RLE has keys of its own, so it goes first; there are few.
    opening = b'"segmentation"' + layout.colon + b"{"
    pieces, rles, cuts, last = [], [], [], 0
    while (found := text.find(opening, last)) >= 0:
        start = found + len(opening) - 1
        pieces.append(text[last:start])
        last = text.find(b"}", start) + 1
        if last == 0:
            raise Irregular
        rles.append(text[start:last])
        cuts.append(start)
    if rles:
        text = b"0".join([*pieces, text[last:]])
    # The quotes now tell where keys start and end; whether they are the right keys, the skeleton says later.
    quotes = np.flatnonzero(np.frombuffer(text, np.uint8) == ord('"'))
    stride, key = 2 * len(layout.keys), 2 * layout.keys.index("segmentation")
    if len(quotes) % stride:
        raise Irregular
    starts = quotes[key + 1 :: stride] + 1 + len(layout.colon)
    if key + 2 < stride:
        ends = quotes[key + 2 :: stride] - len(layout.comma)
    else:
        ends = np.append(quotes[stride::stride] - len(layout.separator), len(text) - 1)
    if (starts > ends).any():
        raise Irregular
    first, last = starts.tolist(), ends.tolist()
    segmentations = [text[start:end] for start, end in zip(first, last, strict=True)]
    reduced = b"0".join([text[end:start] for end, start in zip([0, *last], [*first, len(text)], strict=True)])
    if rles:
        removed = np.cumsum([0] + [len(rle) - 1 for rle in rles])
        starts += removed[np.searchsorted(np.array(cuts) - removed[:-1], starts)]
        waiting = iter(rles)
        segmentations = [next(waiting, b"") if s == b"0" else s for s in segmentations]
        if b"" in segmentations or next(waiting, None) is not None:
            raise Irregular
    return segmentations, starts, reduced


def _parse_numbers(text: bytes) -> tuple[np.ndarray, np.ndarray]:
    """(float64 values, whether each has a point) of json numbers with a comma between. Raises Irregular."""
    code = np.frombuffer(text, np.uint8)
    owner = np.searchsorted(np.flatnonzero(code == ord(",")), np.flatnonzero(code == ord(".")))
    framed = np.frombuffer(b"," + text + b",", np.uint8)
    if not _is_well_formed(framed) or (owner[1:] == owner[:-1]).any():
        raise Irregular
    values = np.fromstring(text, sep=",")
    is_decimal = np.zeros(len(values), bool)
    is_decimal[owner] = True
    return values, is_decimal


def _find_unusual(segmentations: list[bytes], usual_structures: set[bytes]) -> list[int]:
    """Which segmentations are anything but polygons of three and more points in plain decimal numbers.

    usual_structures: brackets and commas of such segmentations, as seen so far; added to here.
    """
    structures = b"\n".join(segmentations).translate(None, b"0123456789.- ").split(b"\n")
    if len(structures) != len(segmentations):
        return list(range(len(segmentations)))
    usual_structures.update(filter(_are_polygons, set(structures) - usual_structures))
    unusual = [n for n, structure in enumerate(structures) if structure not in usual_structures]
    usual = segmentations
    if unusual:
        usual = [
            s for s, structure in zip(segmentations, structures, strict=True) if structure in usual_structures
        ]
    return unusual if _has_plain_numbers(b"\n".join(usual)) else list(range(len(segmentations)))


def _are_polygons(structure: bytes) -> bool:
    """Whether brackets and commas are those of polygons, each of an even number of 6 to MAX_USUAL_NUMBERS numbers."""
    commas = [len(polygon) for polygon in re.findall(rb",+(?=\])", structure)]
    return re.fullmatch(rb"\[(\[,+\],)*\[,+\]\]", structure) is not None and all(
        5 <= count < MAX_USUAL_NUMBERS and count % 2 for count in commas
    )


def _has_plain_numbers(text: bytes) -> bool:
    """Whether the numbers of a text of polygons are valid json of at most four digits and two more behind a point.

    The text holds digits, points, signs, commas, brackets, spaces and a line for each segmentation; its brackets and
    commas are known to be right.
    """
    code = np.frombuffer(text, np.uint8)
    if not _is_well_formed(code):
        return False
    digit, point = code - 48 < 10, code == 46
    pairs = digit[1:] & digit[:-1]
    fraction = point[:-3] & digit[2:-1]
    return not (
        (pairs[3:] & pairs[2:-1] & pairs[:-3]).any()  # five digits
        or (fraction & (digit | point)[3:]).any()
        or (point[:-2] & point[2:]).any()
    )


def _is_well_formed(code: np.ndarray) -> bool:
    """Whether what stands beside each character of numbers, commas and brackets may stand there by json's rules.

    Two points in one number are left to the caller.
    """
    digit = code - 48 < 10
    point, space, comma, opening = code == 46, code == 32, code == 44, code == 91
    closing = code == 93
    before, after = slice(None, -1), slice(1, None)
    wrong = (comma | closing)[after] & ~(digit | closing)[before]
    wrong |= ((code == 45) | opening)[after] & ~(comma | opening | space | (code == 10))[before]
    wrong |= space[after] & ~comma[before]
    wrong |= digit[after] & closing[before]
    wrong |= point[after] & ~digit[before]
    starts = digit[after] & ~(digit | point)[before]
    wrong[:-1] |= starts[:-1] & (code == 48)[1:-1] & digit[2:]  # 007
    return not wrong.any()
