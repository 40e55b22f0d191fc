"""The annotation records of a COCO json as columns, for large files: scanned in pieces, by all cores.

msgspec decodes the records straight into typed objects and checks the json's grammar on the way; segmentations stay in
the file as text, to be parsed when their image is loaded, and are checked here with array operations. A file of COCO's
size so costs a fifth of the time, and a twentieth of the memory, of one Python object a value. What is not usual about
a record is left to coco_records.py, which reads the piece around it one record after the other; so is a file of another
shape, or with an error.

Letters: R records, J keypoints.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import multiprocessing
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from io import FileIO
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np

import masks
from coco_records import Columns, Finding, check_segmentation, read_records

CHUNK_BYTES = 400_000  # of text at a time: enough for array operations, and still in the cache
OPENING_BYTES = 1_000_000  # the first record must end before; else the file is read in the plain way
PARALLEL_BYTES = 50_000_000  # from this size on, several processes read
MAX_PROCESSES = 8
MAX_USUAL_NUMBERS = 400  # of a polygon; with four digits before the point it keeps within MAX_OUTLINE_PIXELS

_ARRAYS = [field.name for field in fields(Columns) if field.name not in ("texts", "findings")]
_SEGMENTATION = np.frombuffer(b'"segmentation"', np.uint8)
_Coordinate = Annotated[float, msgspec.Meta(ge=-masks.MAX_COORDINATE, le=masks.MAX_COORDINATE)]


class Irregular(Exception):
    """The file, or a piece of it, has to be read in the plain way."""


class ImageRecord(msgspec.Struct, gc=False):
    """What is read of an image's record."""

    id: int
    height: int
    width: int
    file_name: str


class _Record(msgspec.Struct, gc=False):
    """What is read of an annotation's record."""

    id: int
    image_id: int
    category_id: int
    bbox: tuple[_Coordinate, _Coordinate, _Coordinate, _Coordinate]
    segmentation: msgspec.Raw = msgspec.Raw()
    area: Annotated[float, msgspec.Meta(ge=0)] = 0
    iscrowd: Literal[0, 1] = 0
    keypoints: list[_Coordinate] = []


class _Rle(msgspec.Struct, gc=False):
    """An RLE, compressed or not."""

    size: tuple[int, int]
    counts: str | list[Annotated[int, msgspec.Meta(ge=0)]]


_RLES = msgspec.json.Decoder(list[_Rle])
_RECORDS = msgspec.json.Decoder(list[_Record])
_IMAGES = msgspec.json.Decoder(list[ImageRecord])
_LIST = msgspec.json.Decoder(list[Any])
_OBJECT = msgspec.json.Decoder(dict[str, msgspec.Raw])


class RegularFile(NamedTuple):
    """A COCO json whose images and annotations are all sound in themselves."""

    images: list[ImageRecord]
    categories: list[Any]  # as json has them, unchecked
    annotations: Columns


def read_regular_file(path: Path) -> RegularFile:
    """Raises Irregular where the plain way is needed: to read the file at all, or to say what is wrong with it."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        opening = re.compile(rb'"annotations"\s*:\s*\[\s*').match(text, max(0, text.find(b'"annotations"')))
        if opening is None:
            raise Irregular
        begin = opening.end()
        end, others = _read_others(text, begin)
        separator = _learn_separator(text[begin : min(end, begin + OPENING_BYTES)], end - begin)
        parts = _split(text, begin, end, separator)
    images, categories = _decode(others["images"], _IMAGES), _decode(others["categories"], _LIST)
    common = separator, _keypoint_numbers(categories)
    if len(parts) > 1:
        with contextlib.suppress(OSError):  # no room for temporary files
            return RegularFile(images, categories, _read_parts(path, parts, *common))
    return RegularFile(images, categories, _read_part(path, begin, end, *common))


def _read_parts(path: Path, parts: list[tuple[int, int]], separator: bytes, keypoint_numbers: int) -> Columns:
    """The columns of all parts, each read by a process of its own."""
    gathered, common = _Gathered(0), (repeat(separator), repeat(keypoint_numbers))
    with (
        tempfile.TemporaryDirectory() as folder,
        warnings.catch_warnings(),  # Python warns of forking beside threads; these children run none
    ):
        warnings.simplefilter("ignore", DeprecationWarning)
        files = [f"{folder}/{number}" for number in range(len(parts))]
        with ProcessPoolExecutor(len(parts), multiprocessing.get_context("fork")) as pool:
            rest = pool.map(_store_part, files, repeat(path), *zip(*parts, strict=True), *common)
            for file, (texts, findings) in zip(files, rest, strict=True):
                arrays = {name: np.load(f"{file}-{name}.npy") for name in _ARRAYS}
                gathered.add(Columns(**arrays, texts=texts, findings=findings))
    return gathered.columns()


def _store_part(file: str, *part: Any) -> tuple[bytes, list[Finding]]:
    """Leave a part's arrays in files, which takes a third of the time of a pipe; gives its texts and findings."""
    columns = _read_part(*part)
    for name in _ARRAYS:
        np.save(f"{file}-{name}.npy", getattr(columns, name))
    return columns.texts, columns.findings


def _decode(text: bytes | msgspec.Raw, decoder: msgspec.json.Decoder) -> Any:
    try:
        return decoder.decode(text)
    except (ValueError, RecursionError):
        raise Irregular from None


def _check_utf8(text: bytes) -> None:
    """Raises Irregular unless a json reader could decode the text; msgspec does not look at what it skips."""
    if not text.isascii():
        try:
            text.decode()
        except UnicodeDecodeError:
            raise Irregular from None


def _read_others(text: mmap.mmap, begin: int) -> tuple[int, dict[str, msgspec.Raw]]:
    """(where the list of records that starts at `begin` ends, the file's other values)."""
    head = text[:begin] + b"]}"
    _check_utf8(head)
    before = _decode(head, _OBJECT)
    for end in islice(_possible_ends(text, begin), 100):
        tail = b'{"annotations":[' + text[end:]
        try:
            others = before | _decode(tail, _OBJECT)
        except Irregular:
            continue
        if {"images", "categories"} <= others.keys():
            _check_utf8(tail)
            if head.count(b'"annotations"') + tail.count(b'"annotations"') > 2:  # a list of that name twice
                raise Irregular
            return end, others
    raise Irregular


def _possible_ends(text: mmap.mmap, begin: int) -> Iterator[int]:
    """Where lists of objects end, just before their bracket; the last one first."""
    end = len(text)
    while (end := text.rfind(b"]", begin, end)) >= 0:
        behind = end
        while text[behind - 1 : behind].isspace():
            behind -= 1
        if text[behind - 1 : behind] == b"}":
            yield behind


def _learn_separator(text: bytes, num_bytes: int) -> bytes:
    """What stands between two records, from the brace that ends the one to the first key of the other.

    That key tells them from objects within a record. text: the first of the records, which take num_bytes in all.
    """
    for match in islice(re.finditer(rb'\}\s*,\s*\{\s*"[^"\\]*"', text), 1000):
        try:
            _decode(b"[" + text[: match.start() + 1] + b"]", _RECORDS)
        except Irregular:  # within the record, or there is something wrong with it
            continue
        return match[0]
    if len(text) < num_bytes:
        raise Irregular
    return b"},{"  # one record, or one that is not usual


def _keypoint_numbers(categories: list[Any]) -> int:
    """How many numbers the keypoints of an object have: 3J."""
    found = [category.get("keypoints") for category in categories if isinstance(category, dict)]
    return next((3 * len(names) for names in found if isinstance(names, list) and names), 0)


def _split(text: mmap.mmap, begin: int, end: int, separator: bytes) -> list[tuple[int, int]]:
    """(begin, end) of whole records for each process that reads."""
    begins, ends = [begin], []
    for target in np.linspace(begin, end, _num_processes(end - begin) + 1)[1:-1].astype(int).tolist():
        brace = text.find(separator, target, end)
        if brace >= begins[-1]:
            ends.append(brace + 1)
            begins.append(brace + separator.index(b"{"))
    return list(zip(begins, [*ends, end], strict=True))


def _num_processes(num_bytes: int) -> int:
    """How many processes read: this rank's share of the cores, where a file is worth it."""
    can_fork = hasattr(os, "fork") and not multiprocessing.current_process().daemon
    if num_bytes < PARALLEL_BYTES or not can_fork:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MAX_PROCESSES, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


# --- one process's part ---------------------------------------------------------------------------------------


def _read_part(path: Path, begin: int, end: int, separator: bytes, keypoint_numbers: int) -> Columns:
    """The columns of the records from byte `begin` to byte `end` of the file."""
    gathered = _Gathered((end - begin) // 300 + 1)
    usual_structures = {b""}  # of an annotation without a mask
    with open(path, "rb", buffering=0) as file:
        while begin < end:
            text = _read_whole_records(file, begin, end, separator)
            _check_utf8(text)
            try:
                gathered.add(_read_chunk(text, begin, keypoint_numbers, usual_structures))
            except Irregular:
                gathered.add(_read_chunk_plainly(text, keypoint_numbers))
            begin += len(text) + separator.index(b"{") - 1
    return gathered.columns()


class _Gathered:
    """Columns that grow without leaving holes in the heap: room for the records expected, real where it is used."""

    def __init__(self, expected_records: int) -> None:
        self.expected_records, self.size, self.texts_size = expected_records, 0, 0
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
                    grown = np.empty(
                        (max(self.expected_records, 2 * self.size), *values.shape[1:]), values.dtype
                    )
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


def _read_chunk_plainly(text: bytes, keypoint_numbers: int) -> Columns:
    try:
        columns = read_records(json.loads(b"[" + text + b"]"), keypoint_numbers // 3)
    except (ValueError, RecursionError):
        raise Irregular from None
    if any(finding.level == "error" for finding in columns.findings):
        raise Irregular
    return columns


def _read_chunk(text: bytes, place: int, keypoint_numbers: int, usual_structures: set[bytes]) -> Columns:
    """The columns of whole records, text[0] the first one's opening brace and text[-1] the last one's closing one.

    place: where in the file the text starts. usual_structures: see _find_unusual.
    Raises Irregular unless every record has the types of a _Record and no error.
    """
    records = _decode(b"[" + text + b"]", _RECORDS)
    num_records = len(records)
    try:
        ids = np.array([record.id for record in records], np.int64)
        image_ids = np.array([record.image_id for record in records], np.int64)
        category_ids = np.array([record.category_id for record in records], np.int64)
    except OverflowError:
        raise Irregular from None
    boxes = chain.from_iterable([record.bbox for record in records])
    columns = Columns(
        ids=ids,
        image_ids=image_ids,
        category_ids=category_ids,
        boxes=np.fromiter(boxes, np.float64, 4 * num_records).reshape(-1, 4),
        crowd=np.array([record.iscrowd for record in records], bool),
        places=np.zeros(num_records, np.int64),
        lengths=np.zeros(num_records, np.int32),
        rle_sizes=np.zeros((num_records, 2), np.int32),
        keypoints=_keypoints(records, keypoint_numbers),
    )
    _fill_in_segmentations(columns, [record.segmentation for record in records], text, usual_structures)
    columns.places[columns.lengths > 0] += place
    return columns


def _fill_in_segmentations(
    columns: Columns, segmentations: list[msgspec.Raw], text: bytes, usual_structures: set[bytes]
) -> None:
    """Places (in the text), lengths, rle_sizes and findings of the columns, from what the records of the text hold."""
    joined = b"|".join(segmentations)
    code = np.frombuffer(joined, np.uint8)
    ends = np.append(np.flatnonzero(code == ord("|")), len(joined))
    if len(ends) != len(segmentations):  # a bar within a text
        raise Irregular
    columns.lengths[:] = np.diff(ends, prepend=-1) - 1
    starts = ends - columns.lengths
    rows = np.flatnonzero(columns.lengths)
    spans = list(zip(starts[rows].tolist(), ends[rows].tolist(), strict=True))
    columns.places[rows] = _find_segmentations(text, joined, spans)
    is_rle = code[starts[rows]] == ord("{")
    rles, rle_spans = rows[is_rle], [spans[n] for n in np.flatnonzero(is_rle).tolist()]
    unusual = _find_unusual(_without(joined, rle_spans), usual_structures)
    sizes = _rle_sizes([joined[start:end] for start, end in rle_spans])
    if sizes is None:
        unusual = sorted([*unusual, *rles.tolist()])
    else:
        columns.rle_sizes[rles] = sizes
    for row in unusual:
        subject = f"annotation {columns.ids[row]} (image {columns.image_ids[row]})"
        try:
            found = json.loads(joined[starts[row] : ends[row]])
            usable, columns.rle_sizes[row] = check_segmentation(found, subject, columns.findings)
        except (ValueError, RecursionError):
            raise Irregular from None
        columns.lengths[row] *= bool(usable)


def _without(text: bytes, spans: list[tuple[int, int]]) -> bytes:
    """The text without the bytes from start to end of each span."""
    begins, ends = [0, *(end for _, end in spans)], [*(start for start, _ in spans), len(text)]
    return b"".join([text[begin:end] for begin, end in zip(begins, ends, strict=True)]) if spans else text


def _keypoints(records: list[_Record], keypoint_numbers: int) -> np.ndarray:
    """float32 [R, 3J], zeros for records without. Raises Irregular for what are not J times x, y, visibility."""
    found = np.zeros((len(records), keypoint_numbers), np.float32)
    rows = [row for row, record in enumerate(records) if record.keypoints] if keypoint_numbers else []
    if rows:
        if {len(records[row].keypoints) for row in rows} != {keypoint_numbers}:
            raise Irregular
        found[rows] = [records[row].keypoints for row in rows]
        visibility = found[:, 2::3]
        if not ((visibility == 0) | (visibility == 1) | (visibility == 2)).all():
            raise Irregular
    return found


def _find_segmentations(text: bytes, joined: bytes, spans: list[tuple[int, int]]) -> np.ndarray:
    """int64: where in the text of records the segmentations at these spans of `joined` start.

    Raises Irregular where it is not plain to see.
    """
    code = np.frombuffer(text, np.uint8)
    places = np.flatnonzero((code[:-1] == ord('"')) & (code[1:] == ord("s")))
    places = places[places < len(code) - len(_SEGMENTATION)]
    places = places[(code[places[:, None] + np.arange(len(_SEGMENTATION))] == _SEGMENTATION).all(axis=1)]
    # Every record counted has the key, so none has more of it, be it in another object or as a text.
    if len(places) != len(spans):
        raise Irregular
    places += len(_SEGMENTATION)
    for _ in range(2):  # to the colon, and from behind it to the value
        while (is_space := code[places] <= ord(" ")).any():
            places += is_space
        places += code[places] == ord(":")
    if b"\\" in text:  # which may be before a quote, or spell a letter of the key
        for place, (start, end) in zip(places.tolist(), spans, strict=True):
            if not text.startswith(joined[start:end], place):
                raise Irregular
    return places


def _find_unusual(polygons: bytes, usual_structures: set[bytes]) -> list[int]:
    """Which segmentations are anything but polygons of three and more points in plain decimal numbers.

    polygons: valid json, or nothing, with a bar between one and the next. usual_structures: brackets and commas of
    usual ones, as seen so far; added to here.
    """
    structures = polygons.translate(None, b"0123456789.- \t\r\n").split(b"|")
    different = set(structures)
    usual_structures.update(filter(_are_polygons, different - usual_structures))
    if usual_structures.issuperset(different):
        unusual = []
    else:
        unusual = [n for n, structure in enumerate(structures) if structure not in usual_structures]
        bounds = np.cumsum([0] + [len(s) + 1 for s in polygons.split(b"|")]).tolist()
        polygons = _without(polygons, [(bounds[n], bounds[n + 1] - 1) for n in unusual])
    if not _has_small_numbers(polygons):
        return [n for n, structure in enumerate(structures) if structure]
    return unusual


def _are_polygons(structure: bytes) -> bool:
    """Whether brackets and commas are those of polygons, each of an even number of 6 to MAX_USUAL_NUMBERS numbers."""
    commas = [len(polygon) for polygon in re.findall(rb",+(?=\])", structure)]
    return re.fullmatch(rb"\[(\[,+\],)*\[,+\]\]", structure) is not None and all(
        5 <= count < MAX_USUAL_NUMBERS and count % 2 for count in commas
    )


def _rle_sizes(rles: list[bytes]) -> np.ndarray | None:
    """int32 [RLEs, 2] height, width of RLEs as json, where all are sound; None for a closer look at each."""
    try:
        decoded = _RLES.decode(b"[" + b",".join(rles) + b"]")
        for rle in decoded:
            masks.check_frame(*rle.size)
        covered = [0 if isinstance(rle.counts, str) else sum(rle.counts) for rle in decoded]
        compressed = [n for n, rle in enumerate(decoded) if isinstance(rle.counts, str)]
        if compressed:
            runs, first = masks.decode_counts([decoded[n].counts.encode("ascii") for n in compressed])
            if (runs < 0).any():
                return None
            for n, total in zip(compressed, np.add.reduceat(runs, first).tolist(), strict=True):
                covered[n] = total
    except (ValueError, RecursionError):
        return None
    if covered != [rle.size[0] * rle.size[1] for rle in decoded]:
        return None
    return np.array([rle.size for rle in decoded], np.int32).reshape(-1, 2)


def _has_small_numbers(text: bytes) -> bool:
    """Whether the numbers of polygons, valid json without exponents, have at most four digits before the point."""
    code = np.frombuffer(text, np.uint8)
    digit, point = code - 48 < 10, code == 46
    pairs = digit[1:] & digit[:-1]
    fives = pairs[:-3] & pairs[2:-1] & digit[4:]  # [n]: places n to n + 4 hold digits
    return not fives.any() or not (fives[1:] & ~(digit | point)[: len(fives) - 1]).any()  # but for fractions
