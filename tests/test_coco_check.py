"""Broken annotation files and images: each has its answer, and training gives the same one as the check."""

import json
import math
import warnings

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import coco_utils
from coco_utils import CocoDataset
from utils import UserError

SQUARE = [[2, 2, 8, 2, 8, 8, 2, 8]]


def good_content():
    """Two images of 12×10 (height × width) with an object each; category ids with a gap, unsorted."""
    return {
        "images": [
            {"id": 5, "height": 12, "width": 10, "file_name": "a.png"},
            {"id": 6, "height": 12, "width": 10, "file_name": "b.png"},
        ],
        "annotations": [
            {
                "id": n,
                "image_id": image,
                "category_id": 7,
                "bbox": [2, 2, 6, 6],
                "area": 36,
                "iscrowd": 0,
                "segmentation": SQUARE,
            }
            for n, image in ((1, 5), (2, 6))
        ],
        "categories": [{"id": 7, "name": "cat"}, {"id": 0, "name": "dog"}],
    }


def write(folder, content):
    """Annotation file and images; content: a dict, or bytes as they are."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / "a.json").write_bytes(text)
    for name in ("a.png", "b.png"):
        cv2.imwrite(str(folder / name), np.zeros((12, 10, 3), np.uint8))
    return folder / "a.json"


def check(capsys, *arguments):
    """(exit status, lines) of `coco_utils.py check`."""
    status = coco_utils.main(["check", *map(str, arguments)])
    return status, capsys.readouterr().out.splitlines()


def annotation(**fields):
    """A change of the first annotation; None removes a field."""

    def change(content):
        first = content["annotations"][0]
        first.update(fields)
        content["annotations"][0] = {key: value for key, value in first.items() if value is not None}

    return change


def image(**fields):
    def change(content):
        content["images"][0].update(fields)

    return change


def segmentation(value):
    return annotation(segmentation=value)


def put(key, value):
    def change(content):
        content[key] = value

    return change


def append(key, value):
    def change(content):
        content[key].append(value)

    return change


def rle(counts, size=(12, 10)):
    return segmentation({"size": list(size), "counts": counts})


ERRORS = {
    "image list missing": (put("images", None), "has no list 'images'"),
    "annotation list is an object": (put("annotations", {}), "has no list 'annotations'"),
    "no images": (put("images", []), "has no image at all"),
    "no categories": (put("categories", []), "has no category at all"),
    "duplicate annotation id": (annotation(id=2), "annotation 2 occurs 2 times"),
    "duplicate image id": (
        append("images", {"id": 6, "height": 12, "width": 10, "file_name": "b.png"}),
        "image 6 occurs 2 times",
    ),
    "duplicate category id": (append("categories", {"id": 7, "name": "cow"}), "category 7 occurs 2 times"),
    "unknown category": (
        annotation(category_id=8),
        "annotation 1 (image 5) has category 8, which the file does not",
    ),
    "string id": (annotation(id="1"), "annotation number 1 has id '1', not an integer"),
    "string image id": (annotation(image_id="5"), "annotation 1 (image '5') has image_id '5'"),
    "string id of an image": (image(id="5"), "image number 1 has id '5', not an integer"),
    "float category id": (annotation(category_id=7.0), "has category_id 7.0"),
    "missing annotation id": (annotation(id=None), "annotation number 1 has no id"),
    "annotation is a list": (append("annotations", []), "annotation number 3 is [], not an object"),
    "iscrowd 2": (annotation(iscrowd=2), "has iscrowd 2"),
    "iscrowd text": (annotation(iscrowd="0"), "has iscrowd '0'"),
    "bbox missing": (annotation(bbox=None), "has bbox None"),
    "bbox of three": (annotation(bbox=[1, 2, 3]), "has bbox [1, 2, 3]"),
    "bbox NaN": (annotation(bbox=[1, math.nan, 3, 4]), "annotation 1 (image 5) has bbox [1, nan, 3, 4]"),
    "bbox of 1e9": (annotation(bbox=[1, 2, 1e9, 4]), "within ±100000 pixels"),
    "negative area": (annotation(area=-1), "has area -1"),
    "area text": (annotation(area="36"), "has area '36'"),
    "polygon NaN": (segmentation([[math.nan, 1, 2, 3, 4, 5]]), "NaN or infinity"),
    "polygon Infinity": (segmentation([[math.inf, 1, 2, 3, 4, 5]]), "NaN or infinity"),
    "polygon of 1e9": (segmentation([[1e9, 1, 2, 3, 4, 5]]), "coordinate 1e+09"),
    "polygon of text": (segmentation([["1", 1, 2, 3, 4, 5]]), "holds a str"),
    "flat polygon": (segmentation([1, 1, 5, 1, 5, 5]), "a flat list, where a list of polygons is due"),
    "segmentation is text": (segmentation("x"), "'x' is neither polygons nor an RLE"),
    "polygons nested too deep": (segmentation([SQUARE]), "holds a list"),
    "RLE too short": (rle([10, 20]), "RLE runs cover 30 pixels; they must cover all 120"),
    "RLE too long": (rle([100, 21]), "RLE runs cover 121 pixels"),
    "RLE negative": (rle([-1, 121]), "runs from -1 to 121"),
    "RLE of floats": (rle([60.0, 60.0]), "hold a float"),
    "RLE garbage": (rle("\x01\x02"), "outside the COCO alphabet"),
    "RLE cut off": (rle("oooo"), "end in the middle of a number"),
    "RLE without counts": (segmentation({"size": [12, 10]}), "neither text nor a list"),
    "RLE without size": (segmentation({"counts": [120]}), "RLE has size None"),
    "RLE of another size": (rle([120], (10, 12)), "has an RLE of size [10, 12], but its image is [12, 10]"),
    "RLE of 1e6 by 1e6": (rle([10**12], (10**6, 10**6)), "a frame of 1000000×1000000 pixels"),
    "image without width": (image(width=None), "image 5 has height 12 and width None"),
    "image of width 0": (image(width=0), "has 12×0 pixels"),
    "image too large": (image(width=10**8), "at most 89,478,485 pixels"),
    "image size as text": (image(height="12"), "has height '12'"),
    "file name missing": (image(file_name=None), "has file_name None"),
    "file name above": (image(file_name="../a.png"), "has file_name '../a.png'"),
    "file name above inside": (image(file_name="x/../../a.png"), "stay inside it"),
    "file name absolute": (image(file_name="/etc/passwd"), "has file_name '/etc/passwd'"),
    "file name of a drive": (image(file_name="C:\\a.png"), "stay inside it"),
    "category without name": (put("categories", [{"id": 7}]), "category 7 has name None"),
}

WARNINGS = {
    "annotation id 0": (
        annotation(id=0),
        "annotation 0 (image 5) has id 0; evaluation gives it another id",
        2,
    ),
    "orphan": (
        annotation(image_id=9),
        "annotation 1 (image 9) belongs to an image that the file does not list",
        1,
    ),
    "polygon of 2 numbers": (
        segmentation([[1, 1]]),
        "has a polygon of 2 numbers; the polygon is left out",
        1,
    ),
    "polygon of 4 numbers": (
        segmentation([[1, 1, 5, 5]]),
        "has a polygon of 4 numbers; the polygon is left out",
        1,
    ),
    "long and short polygon": (segmentation([*SQUARE, [1, 1, 5, 5]]), "has a polygon of 4 numbers", 2),
    "odd polygon": (
        segmentation([[*SQUARE[0], 3]]),
        "has a polygon of 9 numbers; the last number is ignored",
        2,
    ),
    "empty segmentation": (segmentation([]), "has no segmentation; left out where masks are trained", 1),
    "no segmentation": (segmentation(None), "has no segmentation; left out where masks are trained", 1),
    "box of width 0": (annotation(bbox=[2, 2, 0, 6]), "of no width or height; left out", 1),
    "box of negative height": (annotation(bbox=[2, 2, 6, -6]), "of no width or height; left out", 1),
    "box outside": (
        annotation(bbox=[20, 2, 6, 6]),
        "outside its image of [12, 10] (height, width); left out",
        1,
    ),
    "name used twice": (
        append("categories", {"id": 9, "name": "cat"}),
        "category 9 has the name 'cat' of category 7",
        2,
    ),
}

FINE = {
    "as it is": (lambda content: None, 2),
    "no area, no iscrowd": (annotation(area=None, iscrowd=None), 2),
    "uncompressed RLE": (rle([60, 60]), 2),
    "compressed RLE": (rle("l1l1"), 2),  # 60 is 28 + 32, in two characters: 48 + (28 + 32), 48 + 1; twice
    "box beyond the edge": (annotation(bbox=[-3, 5, 100, 100]), 2),
    "crowd only": (annotation(iscrowd=1), 1),
    "image without objects": (annotation(image_id=6), 1),
    "huge ids": (annotation(id=2**60), 2),
    "spaces and other letters": (image(file_name="ä b.png"), 2),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_named_and_training_refuses_with_the_same_words(name, tmp_path, capsys):
    change, text = ERRORS[name]
    content = good_content()
    change(content)
    path = write(tmp_path, content)
    status, lines = check(capsys, path)
    assert status == 2
    assert any(line.startswith(f"error: {path}: ") and text in line for line in lines), lines
    if name not in (
        "no images",
        "no categories",
        "string id of an image",
    ):  # these leave annotations without one
        assert "1 error, 0 warnings" in lines[-1]
    with pytest.raises(UserError) as error:
        CocoDataset(tmp_path, path, training=True)
    assert lines[0].startswith("error: " + str(error.value).partition(" (")[0])


@pytest.mark.parametrize("name", WARNINGS)
def test_warnings_are_named_and_training_does_what_they_say(name, tmp_path, capsys):
    change, text, num_trained = WARNINGS[name]
    content = good_content()
    change(content)
    path = write(tmp_path, content)
    status, lines = check(capsys, path)
    assert status == 1
    assert any(line.startswith(f"warning: {path}: ") and text in line for line in lines), lines
    with pytest.warns(UserWarning, match=r"a\.json: 1 ") as caught:
        dataset = CocoDataset(tmp_path, path, training=True)
    assert sum(str(path) in str(warning.message) for warning in caught) == len(lines) - 1
    assert len(dataset) == num_trained
    for index in range(len(dataset)):
        assert len(dataset[index][1]["boxes"]) == 1


@pytest.mark.parametrize("name", FINE)
def test_what_is_fine(name, tmp_path, capsys):
    change, num_trained = FINE[name]
    content = good_content()
    change(content)
    path = write(tmp_path, content)
    cv2.imwrite(str(tmp_path / "ä b.png"), np.zeros((12, 10, 3), np.uint8))
    status, lines = check(capsys, path, "--images", tmp_path)
    assert (status, len(lines)) == (0, 1) and "0 errors, 0 warnings" in lines[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = CocoDataset(tmp_path, path, training=True)
    assert len(dataset) == num_trained
    target = dataset[0][1]
    assert len(target["boxes"]) == len(target["masks"]) == (2 if name == "image without objects" else 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps(good_content()).encode()[:100], "is not valid JSON at character 96, line 1"),
        (b"", "is not valid JSON at character 0"),
        (b"[]", "holds a list, not an object"),
        (b'"text"', "holds a str, not an object"),
        (b"\xff\xfe\x00", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"images": [' + b"1" * 5000 + b"]}", "is not valid JSON"),
        (json.dumps(good_content()).replace("36", "36 36").encode(), "is not valid JSON at character"),
    ],
)
def test_what_is_no_annotation_file(text, message, tmp_path, capsys):
    path = write(tmp_path, text)
    status, lines = check(capsys, path)
    assert status == 2 and message in lines[0] and "1 error" in lines[-1]
    with pytest.raises(UserError) as error:
        CocoDataset(tmp_path, path)
    assert f"error: {error.value}" == lines[0]


def test_a_missing_file(tmp_path, capsys):
    status, lines = check(capsys, tmp_path / "none.json")
    assert status == 2 and "cannot be read (No such file or directory)" in lines[0]


def test_every_finding_is_named(tmp_path, capsys):
    content = good_content()
    content["annotations"][0]["bbox"] = [0, 0, 0, 0]
    content["annotations"][1]["category_id"] = 99
    content["images"][0]["height"] = -1
    path = write(tmp_path, content)
    status, lines = check(capsys, path)
    assert status == 2 and "2 errors" in lines[-1]
    with pytest.raises(
        UserError, match=r"image 5 has -1×10 .* \(1 more errors: `python3 coco_utils.py check"
    ):
        CocoDataset(tmp_path, path)


def test_broken_images(tmp_path, capsys):
    """Missing, empty, cut off, html, another size, turned by EXIF, a link out of the folder."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 3)).astype(np.uint8)
    folder = tmp_path / "images"
    folder.mkdir()
    names = [
        "good.jpg",
        "missing.jpg",
        "empty.jpg",
        "cut.jpg",
        "html.jpg",
        "size.jpg",
        "turned.jpg",
        "link.jpg",
    ]
    for name in names:
        if name != "missing.jpg":
            cv2.imwrite(str(folder / name), pixels)
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "cut.jpg").write_bytes((folder / "good.jpg").read_bytes()[:-40])
    (folder / "html.jpg").write_bytes(b"<html>not found</html>")
    cv2.imwrite(str(folder / "size.jpg"), pixels[:-1])
    exif = Image.Exif()
    exif[274] = 3
    Image.fromarray(pixels).save(folder / "turned.jpg", exif=exif)
    (tmp_path / "outside.jpg").write_bytes((folder / "good.jpg").read_bytes())
    (folder / "link.jpg").unlink()
    (folder / "link.jpg").symlink_to(tmp_path / "outside.jpg")
    content = good_content() | {"annotations": []}
    content["images"] = [
        {"id": n, "height": 12, "width": 10, "file_name": name} for n, name in enumerate(names)
    ]
    path = write(tmp_path, content)
    status, lines = check(capsys, path, "--images", folder)
    assert status == 2 and "6 errors, 1 warning" in lines[-1]
    for n, text in {
        1: "is missing",
        2: "is empty",
        3: "is damaged",
        4: "is no image",
        5: "has 11×10 pixels, but the annotation file says 12×10",
        6: "has EXIF orientation 3",
        7: "is a link out of the folder",
    }.items():
        assert any(f": image {n} " in line and text in line for line in lines), (text, lines)
    assert check(capsys, path, "--images", tmp_path / "none")[0] == 2


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([1, 5, 7, 1e9]),
    lambda inner: (
        st.lists(inner, max_size=7) | st.dictionaries(st.sampled_from(["size", "counts", "id"]), inner)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_content_crashes_the_check_or_the_loader(data, tmp_path):
    """Any value in any field: findings, or targets that can be made; the check and training agree."""
    content = good_content()
    for _ in range(data.draw(st.integers(1, 3))):
        records = content[data.draw(st.sampled_from(list(content)))]
        if not isinstance(records, list) or not records:
            continue
        record = data.draw(st.sampled_from(records))
        if isinstance(record, dict) and record:
            record[data.draw(st.sampled_from(sorted(record)))] = data.draw(JSON)
    path = write(tmp_path, content)
    status = coco_utils.main(["check", str(path)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            dataset = CocoDataset(tmp_path, path)
        except UserError as error:
            assert status == 2 or "missing" in str(error) or "has 12×10 pixels" in str(error)
            return
        assert status < 2
        for index in range(len(dataset)):
            target = dataset[index][1]
            assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"])
            assert (target["boxes"][:, 2:] > target["boxes"][:, :2]).all()
