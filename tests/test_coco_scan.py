"""The fast way to read annotations gives what the plain way gives, or declines."""

import contextlib
import json

import numpy as np
import pytest

import coco_scan
from coco_records import read_records
from coco_scan import Irregular, read_regular_file

NOTES = ["", "a|b", 'the "segmentation": [1]', "\\", "segmentation", "größe", "}, {", "}]", "\x7f/"]


def random_annotation(rng, annotation_id, keypoints=0):
    """One annotation in COCO's key order, of every kind of segmentation that is right."""
    kind = rng.choice(["polygons", "rle", "text rle", "none"], p=[0.7, 0.1, 0.1, 0.1])
    if kind == "none":
        segmentation = None
    elif kind == "polygons":
        parts = rng.integers(1, 4)
        segmentation = [
            np.round(rng.uniform(-3, 700, 2 * rng.integers(3, 9)), int(rng.integers(1, 9))).tolist()
            for _ in range(parts)
        ]
    elif kind == "rle":
        segmentation = {"counts": [5, 10, 5], "size": [4, 5]}
    else:
        segmentation = {"size": [4, 5], "counts": "5:5"}  # 5, 10, 5: each character is a number below 16
    annotation = {
        "segmentation": segmentation,
        "area": float(rng.uniform(0, 1e5)),
        "iscrowd": int(kind == "rle"),
        "image_id": int(rng.integers(1, 10**6)),
        "bbox": np.round(rng.uniform(0, 600, 4), int(rng.integers(0, 4))).tolist(),
        "category_id": int(rng.integers(0, 91)),
        "id": annotation_id,
    }
    if keypoints:
        points = np.stack([*rng.integers(0, 600, (2, keypoints)), rng.integers(0, 3, keypoints)], axis=1)
        annotation = {"num_keypoints": keypoints, "keypoints": points.reshape(-1).tolist(), **annotation}
    return annotation


def with_extras(rng, annotation):
    """The annotation with fields of other tools, without some of its own, and with words that may mislead."""
    for key in rng.permutation(["segmentation", "keypoints", "iscrowd", "area"])[
        : rng.integers(0, 2)
    ].tolist():
        annotation.pop(key, None)
    extras = {
        "attributes": {"occluded": False, "segmentation": [[1, 2, 3]], "id": "x"},
        "history": [{"a": 1}, {"a": None}],
        "note": str(rng.choice(NOTES)),
        "score": 1e-7,
        "segmentation_id": 3,
    }
    for key in rng.permutation(list(extras))[: rng.integers(0, 3)].tolist():
        annotation[key] = extras[key]
    return annotation


def random_file(rng, num_annotations=12, keypoints=0, shuffle_keys=False, extras=False):
    annotations = [random_annotation(rng, 100 + n, keypoints) for n in range(num_annotations)]
    if shuffle_keys:
        keys = rng.permutation(list(annotations[0])).tolist()
        annotations = [{key: annotation[key] for key in keys} for annotation in annotations]
    if extras:
        annotations = [with_extras(rng, annotation) for annotation in annotations]
    parts = {
        "info": {"year": 2017},
        "images": [{"id": 1, "file_name": "a.jpg", "width": 3, "height": 2}],
        "annotations": annotations,
    }
    category = {"id": 3, "name": "[cat}]"}
    parts["categories"] = [category | {"keypoints": [*"abcdefgh"[:keypoints]]} if keypoints else category]
    return {key: parts[key] for key in rng.permutation(list(parts)).tolist()}


def segmentation_of(columns, n, text):
    place, length = int(columns.places[n]), int(columns.lengths[n])
    source = columns.texts if place < 0 else text
    start = -1 - place if place < 0 else place
    return json.loads(source[start : start + length]) if length else []


def assert_same(columns, expected, text):
    for name in ("ids", "image_ids", "category_ids", "boxes", "crowd", "rle_sizes", "keypoints"):
        assert np.array_equal(getattr(columns, name), getattr(expected, name)), name
        assert getattr(columns, name).dtype == getattr(expected, name).dtype, name
    for n in range(len(columns.ids)):
        ours, theirs = segmentation_of(columns, n, text), segmentation_of(expected, n, text)
        if isinstance(ours, list):  # the file's text still has what is no polygon
            ours = [polygon for polygon in ours if len(polygon) >= 6]
        assert ours == theirs
    assert columns.findings == expected.findings


def assert_others_same(file, content):
    assert file.categories == content["categories"]
    for image, expected in zip(file.images, content["images"], strict=True):
        found = {"id": image.id, "file_name": image.file_name, "width": image.width, "height": image.height}
        assert found == {key: expected[key] for key in found}


def read_plainly(text, num_keypoints):
    content = json.loads(text)
    return content, read_records(content["annotations"], num_keypoints)


@pytest.mark.parametrize("layout", [{"separators": (",", ":")}, {}, {"indent": 1}, {"indent": "\t"}])
@pytest.mark.parametrize("keypoints", [0, 3])
@pytest.mark.parametrize("ascii", [True, False])
def test_the_fast_way_reads_what_the_plain_way_reads(tmp_path, layout, keypoints, ascii, monkeypatch):
    rng = np.random.default_rng(1)
    path = tmp_path / "a.json"
    for trial in range(20):
        monkeypatch.setattr(coco_scan, "CHUNK_BYTES", int(rng.integers(100, 5000)))
        content = random_file(rng, keypoints=keypoints, shuffle_keys=trial % 2 == 0, extras=trial % 4 > 1)
        text = json.dumps(content, **layout, ensure_ascii=ascii).encode()
        path.write_bytes(text)
        file = read_regular_file(path)
        assert_same(file.annotations, read_records(content["annotations"], keypoints), text)
        assert_others_same(file, content)


def test_several_processes_read_what_one_reads(tmp_path, monkeypatch):
    text = json.dumps(random_file(np.random.default_rng(2), num_annotations=200)).encode()
    path = tmp_path / "a.json"
    path.write_bytes(text)
    monkeypatch.setattr(coco_scan, "_num_processes", lambda num_bytes: 3)
    columns = read_regular_file(path).annotations
    assert_same(columns, read_plainly(text, 0)[1], text)
    # Where there is no room for what they leave, one process reads it all.
    monkeypatch.setattr(coco_scan.tempfile, "tempdir", str(tmp_path / "none"))
    assert_same(read_regular_file(path).annotations, columns, text)


def test_a_damaged_file_is_declined_or_read_alike(tmp_path, monkeypatch):
    """Change a few bytes of a regular file anywhere: never another answer, never a crash."""
    rng = np.random.default_rng(3)
    monkeypatch.setattr(coco_scan, "CHUNK_BYTES", 500)
    path = tmp_path / "a.json"
    read = declined = 0
    for trial in range(600):
        if trial % 20 == 0:
            regular = json.dumps(random_file(rng, num_annotations=5, extras=trial % 40 == 0)).encode()
        text = bytearray(regular)
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(0, len(text)))
            new = bytes(rng.choice(list(b'0019.-,[]{}": eENaidx\\\n'), rng.integers(0, 3)).astype(np.uint8))
            text[at : at + int(rng.integers(0, 3))] = new
        path.write_bytes(text)
        try:
            file = read_regular_file(path)
        except Irregular:
            declined += 1
            continue
        read += 1
        content, expected = read_plainly(bytes(text), 0)
        assert not any(finding.level == "error" for finding in expected.findings)
        assert_same(file.annotations, expected, bytes(text))
        assert_others_same(file, content)
    assert read > 20 and declined > 20


@pytest.mark.parametrize(
    "polygon",
    ["1,2,3,4,5", "1,2,3,4", "1,2,3,4,5,6,7", "1e1,2,3,4,5,6", "12345,2,3,4,5,6", "1.2345,2,3,4,5,6", ""],
)
def test_unusual_polygons_are_read_one_by_one(tmp_path, polygon):
    annotation = {
        "segmentation": [[1, 2, 3, 4, 5, 6]],
        "image_id": 1,
        "bbox": [0, 0, 1, 1],
        "category_id": 1,
        "id": 1,
    }
    text = json.dumps({"images": [], "categories": [], "annotations": [annotation, annotation]})
    text = text.replace("[[1, 2, 3, 4, 5, 6]]", f"[[{polygon}]]", 1).encode()
    path = tmp_path / "a.json"
    path.write_bytes(text)
    columns = read_regular_file(path).annotations
    assert_same(columns, read_plainly(text, 0)[1], text)


@pytest.mark.parametrize(
    "number",
    [
        "1.2.3",
        "01",
        "1.",
        ".5",
        "-",
        "--1",
        "1-2",
        "+1",
        "1 2",
        "",
        "NaN",
        "Infinity",
        "0x1",
        "1_000",
        "1e",
        "null",
    ],
)
@pytest.mark.parametrize("place", ["polygon", "bbox", "id"])
def test_what_is_no_json_number_is_declined(tmp_path, number, place):
    bbox, polygon, identity = "[0, 0, 1, 1]", "[[1, 2, 3, 4, 5, 6]]", "7"
    record = '{"segmentation": POLYGON, "image_id": 1, "bbox": BBOX, "category_id": 1, "id": ID}'
    right = record.replace("POLYGON", polygon).replace("BBOX", bbox).replace("ID", identity)
    wrong = record.replace("POLYGON", polygon.replace("4", number) if place == "polygon" else polygon)
    wrong = wrong.replace("BBOX", bbox.replace("0, 0", f"0, {number}") if place == "bbox" else bbox)
    wrong = wrong.replace("ID", number if place == "id" else identity)
    path = tmp_path / "a.json"
    path.write_text('{"images": [], "annotations": [%s, %s], "categories": []}' % (right, wrong))  # noqa: UP031
    with pytest.raises(Irregular):
        read_regular_file(path)


def test_a_float_is_no_id(tmp_path):
    path = tmp_path / "a.json"
    annotation = {"image_id": 1, "bbox": [0, 0, 1, 1], "category_id": 1, "id": 7}
    for wrong in ({"id": 7.0}, {"image_id": 1.5}, {"category_id": 2.0}, {"id": 2**53}, {"id": 2**70}):
        content = {"images": [], "annotations": [annotation, annotation | wrong], "categories": []}
        path.write_text(json.dumps(content))
        if wrong == {"id": 2**53}:  # right, though a double does not tell it from its neighbour
            assert read_regular_file(path).annotations.ids.tolist() == [7, 2**53]
            continue
        with pytest.raises(Irregular):
            read_regular_file(path)


def test_other_files_are_declined(tmp_path):
    path = tmp_path / "a.json"
    annotation = random_annotation(np.random.default_rng(4), 1)
    others = {"images": [], "categories": []}
    files = [
        b"",
        b"[]",
        b'{"annotations": []}',
        json.dumps({"annotations": [annotation]}).encode(),
        json.dumps({"x": {"annotations": [annotation], **others}}).encode(),
        json.dumps({"x": {"annotations": [annotation]}, "annotations": [], **others}).encode(),
        json.dumps({**others, "annotations": [annotation]}).encode()[:-30],
        json.dumps({"annotations": [annotation], **others}).encode()[:-1],
        json.dumps({"annotations": [annotation | {"note": "ab"}], **others}).encode().replace(b"ab", b"\xff"),
        json.dumps({"info": "ab", "annotations": [annotation], **others}).encode().replace(b"ab", b"\xff"),
        json.dumps({"annotations": [annotation], **others, "info": "ab"}).encode().replace(b"ab", b"\xff"),
        b"\xef\xbb\xbf" + json.dumps({"annotations": [annotation], **others}).encode(),
    ]
    for text in files:
        path.write_bytes(text)
        with pytest.raises((Irregular, ValueError)):
            read_regular_file(path)


def test_usual_segmentations_are_not_looked_at_one_by_one(tmp_path, monkeypatch):
    """Polygons with any number of digits behind the point, and RLEs of both kinds, cost no Python object a number."""
    content = random_file(np.random.default_rng(5), num_annotations=300)
    for annotation in content["annotations"][::3]:
        annotation["attributes"] = {"occluded": False, "note": "a\\b"}
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content, indent=1))
    monkeypatch.setattr(coco_scan, "CHUNK_BYTES", 2000)

    def check(segmentation, subject, findings):
        assert segmentation is None  # which is not usual
        return [], (0, 0)

    monkeypatch.setattr(coco_scan, "check_segmentation", check)
    monkeypatch.setattr(coco_scan, "_read_chunk_plainly", None)
    assert len(read_regular_file(path).annotations.ids) == 300


def test_a_key_in_other_letters_is_not_mixed_up(tmp_path):
    """Two records and twice the key, but both in the second one: the first spells it with an escape."""
    usual = {"image_id": 1, "bbox": [0, 0, 1, 1], "category_id": 1, "id": 1}
    first = usual | {"segmentation": [[1, 2, 3, 4, 5, 6]]}
    second = usual | {
        "attributes": {"segmentation": [[6, 5, 4, 3, 2, 1]]},
        "segmentation": [[7, 7, 8, 8, 9, 9]],
    }
    text = json.dumps({"images": [], "categories": [], "annotations": [first, second]})
    text = text.replace("segmentation", "segmentat\\u0069on", 1).encode()
    path = tmp_path / "a.json"
    path.write_bytes(text)
    assert_same(read_regular_file(path).annotations, read_plainly(text, 0)[1], text)


def test_an_rle_with_a_negative_run_is_declined(tmp_path):
    path = tmp_path / "a.json"
    for counts, is_right in (("5:5", True), ("5d0K", False), ([5, 20, -5], False)):  # 5, 20, -5: 20 in all
        annotation = {"image_id": 1, "bbox": [0, 0, 1, 1], "category_id": 1, "id": 1}
        annotation["segmentation"] = {"size": [4, 5], "counts": counts}
        path.write_text(json.dumps({"images": [], "categories": [], "annotations": [annotation]}))
        with contextlib.nullcontext() if is_right else pytest.raises(Irregular):
            read_regular_file(path)
