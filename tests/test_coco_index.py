"""The columns hold what pycocotools reads, in its order."""

import json
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest

import coco_index
import coco_scan
from coco_index import read_index
from coco_scan import Irregular
from utils import UserError

COCO128 = Path(__file__).parents[1].parent / "shared/data/coco128/annotations/instances_train2017.json"


def content():
    return {
        "images": [
            {"id": 9, "height": 10, "width": 20, "file_name": "nine.png", "coco_url": "http://x"},
            {"id": 4, "height": 30, "width": 40, "file_name": "four/ä.png"},
        ],
        "annotations": [
            {
                "id": 3,
                "image_id": 4,
                "category_id": 90,
                "bbox": [1, 2, 3, 4],
                "segmentation": [[1, 2, 3, 2, 3, 5]],
            },
            {"id": 1, "image_id": 9, "category_id": 0, "bbox": [-5, 2, 100, 4], "segmentation": []},
            {
                "id": 2,
                "image_id": 4,
                "category_id": 0,
                "bbox": [5, 6, 7, 8],
                "segmentation": [[0, 0, 9, 0, 9, 9]],
            },
        ],
        "categories": [{"id": 90, "name": "cow"}, {"id": 0, "name": "cat"}],
    }


@pytest.mark.parametrize("layout", [{"indent": 1}, {}, {"separators": (",", ":")}])
def test_columns_by_hand(tmp_path, layout):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content(), **layout))
    index = read_index(path)
    assert index.image_ids.tolist() == [9, 4]
    assert index.sizes.tolist() == [[10, 20], [30, 40]]
    assert [index.file_names[n] for n in range(2)] == index.file_names.tolist() == ["nine.png", "four/ä.png"]
    assert index.category_ids.tolist() == [0, 90] and index.classes == ["cat", "cow"]
    # By image, then in the file's order: image 9 has annotation 1, image 4 has 3 and 2.
    assert index.first.tolist() == [0, 1, 3]
    assert index.annotation_ids.tolist() == [1, 3, 2]
    assert index.labels.tolist() == [1, 2, 1]
    # -5 + 100 = 95, clipped to 0..20; 1 + 3 = 4, 2 + 4 = 6.
    assert index.boxes.tolist() == [[0, 2, 20, 6], [1, 2, 4, 6], [5, 6, 12, 14]]
    assert index.crowd.tolist() == [False] * 3
    assert index.has_mask.tolist() == [False, True, True]
    for index_ in (index, pickle.loads(pickle.dumps(index))):
        assert [index_.segmentations[n] for n in range(3)] == [[], [[1, 2, 3, 2, 3, 5]], [[0, 0, 9, 0, 9, 9]]]
    assert [finding.subject for finding in index.findings] == ["annotation 1 (image 9)"]


def test_no_annotations(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content() | {"annotations": []}))
    index = read_index(path)
    assert (
        index.first.tolist() == [0, 0, 0]
        and index.boxes.shape == (0, 4)
        and index.keypoints.shape == (0, 0, 3)
    )


def test_keypoints(tmp_path):
    path = tmp_path / "a.json"
    data = content()
    data["categories"][0]["keypoints"] = ["left", "right"]
    data["annotations"][0]["keypoints"] = [1, 2, 2, 3.5, 4, 0]
    data["annotations"][1]["segmentation"] = [[1, 2, 3, 2, 3, 5]]
    path.write_text(json.dumps(data))
    index = read_index(path)
    assert index.keypoint_names == ["left", "right"]
    assert index.keypoints.tolist() == [[[0, 0, 0]] * 2, [[1, 2, 2], [3.5, 4, 0]], [[0, 0, 0]] * 2]
    for wrong, message in (
        ([1, 2, 2], "has keypoints of 3 numbers; it must be 6"),
        ([1, 2, 2, 3, 4, 3], "a keypoint visibility that is not 0, 1 or 2"),
        ([1, 2, 2, 3, "4", 0], "a keypoint that is no number"),
        ([1, 2, 2, 3, 1e9, 0], "a keypoint that is no number"),
    ):
        data["annotations"][0]["keypoints"] = wrong
        path.write_text(json.dumps(data))
        assert [message in str(finding) for finding in read_index(path).findings] == [True]
    data["categories"][1]["keypoints"] = ["left"]
    path.write_text(json.dumps(data))
    assert "category 90 has 2 keypoints; category 0 has 1" in str(read_index(path).findings[0])


def test_an_odd_file_name_alone_does_not_take_the_plain_way(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    data = content()
    data["images"][0]["file_name"] = "nine..o'clock 9:00.png"
    path.write_text(json.dumps(data))
    monkeypatch.setattr(coco_index, "_read_json", None)
    index = read_index(path)
    assert index.file_names[0] == "nine..o'clock 9:00.png" and len(index.labels) > 0


def test_a_file_that_changes_is_noticed(tmp_path):
    path = tmp_path / "a.json"
    text = json.dumps(content())
    path.write_text(text)
    index = read_index(path)
    path.write_text(text.replace("nine", "none-"))
    with pytest.raises(UserError, match="changed while in use"):
        index.segmentations[1]


def test_what_the_file_says_twice_is_read_as_json_reads_it(tmp_path):
    # A second "annotations" list replaces the first; the fast way declines such a file.
    path = tmp_path / "a.json"
    first, second = content(), content() | {"annotations": []}
    text = json.dumps(first)[:-1] + ', "annotations": []}'
    path.write_text(text)
    with pytest.raises(Irregular):
        coco_scan.read_regular_file(path)
    assert len(read_index(path).labels) == len(second["annotations"])


@pytest.mark.skipif(not COCO128.exists(), reason=f"{COCO128} is not there")
def test_coco_images_are_what_pycocotools_reads(monkeypatch):
    from pycocotools.coco import COCO

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = COCO(COCO128)
    plain = coco_scan.read_regular_file(COCO128)  # takes the fast way
    assert len(plain.annotations.ids) == 939
    index = read_index(COCO128)
    assert index.findings == []
    assert index.image_ids.tolist() == list(reference.imgs)
    assert index.category_ids.tolist() == sorted(reference.cats)
    for n, image_id in enumerate(reference.imgs):
        annotations = reference.loadAnns(reference.getAnnIds(imgIds=image_id))
        rows = range(index.first[n], index.first[n + 1])
        assert [a["id"] for a in annotations] == index.annotation_ids[rows].tolist()
        assert [a["category_id"] for a in annotations] == index.category_ids[index.labels[rows] - 1].tolist()
        assert [a["iscrowd"] for a in annotations] == index.crowd[rows].tolist()
        assert [a["segmentation"] for a in annotations] == [index.segmentations[row] for row in rows]
        boxes = np.array([a["bbox"] for a in annotations]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        height, width = index.sizes[n]
        assert np.allclose(index.boxes[rows], boxes.clip(0, [width, height, width, height]), atol=1e-4)
