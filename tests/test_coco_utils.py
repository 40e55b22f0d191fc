"""The Dataset: targets, filters, randomness, files."""

import json
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import coco_utils
from coco_utils import CocoDataset, check_same_classes, collate, dataset_paths
from group_by_aspect_ratio import GroupedBatchSampler
from transforms import build_transforms
from utils import UserError

SHARED = Path(__file__).parents[1].parent / "shared/data/coco128"
needs_coco128 = pytest.mark.skipif(not SHARED.exists(), reason=f"{SHARED} is not there")


def make_set(folder, annotations, num_images=3, categories=None, size=(24, 32)):
    """Write images 10, 20, ... and an annotation file; annotations get ids and a square mask where they have none."""
    folder.mkdir(exist_ok=True)
    height, width = size
    for n in range(num_images):
        noise = np.random.default_rng(n).integers(0, 256, (height, width, 3))
        cv2.imwrite(str(folder / f"{n}.png"), noise.astype(np.uint8))
    for n, annotation in enumerate(annotations):
        x, y, w, h = annotation.setdefault("bbox", [4, 4, 8, 8])
        annotation.setdefault("segmentation", [[x, y, x + w, y, x + w, y + h, x, y + h]])
        annotation.update(id=n + 1, category_id=annotation.get("category_id", 3))
    images = [
        {"id": 10 * (n + 1), "file_name": f"{n}.png", "height": height, "width": width}
        for n in range(num_images)
    ]
    content = {"images": images, "annotations": annotations}
    content["categories"] = categories or [{"id": 3, "name": "cat"}, {"id": 1, "name": "dog"}]
    (folder / "a.json").write_text(json.dumps(content))
    return folder, folder / "a.json"


def test_targets_by_hand(tmp_path):
    paths = make_set(
        tmp_path / "set",
        [
            {"image_id": 10, "bbox": [4, 6, 8, 2], "category_id": 3},
            {"image_id": 10, "iscrowd": 1},
            {"image_id": 10, "bbox": [-2, 0, 100, 4], "category_id": 1},
            {"image_id": 20, "segmentation": []},
        ],
    )
    with pytest.warns(UserWarning, match="1 annotations without a segmentation"):
        dataset = CocoDataset(*paths)
    assert len(dataset) == 3 and dataset.classes == ["dog", "cat"] and dataset.category_ids == [1, 3]
    image, target = dataset[0]
    assert image.shape == (3, 24, 32) and image.dtype == torch.uint8
    stored = cv2.imread(str(paths[0] / "0.png"))  # OpenCV's own order is BGR
    assert np.array_equal(image.permute(1, 2, 0).numpy(), stored[..., ::-1])
    # The crowd is no object. 4 + 8 = 12, 6 + 2 = 8; the second box is clipped to the image.
    assert (
        target["boxes"].tolist() == [[4, 6, 12, 8], [0, 0, 32, 4]] and target["boxes"].dtype == torch.float32
    )
    assert target["labels"].tolist() == [2, 1] and target["labels"].dtype == torch.int64
    assert target["image_id"] == 10
    # The second mask, from -2 to 98, is clipped by its own rule.
    assert target["masks"].rects.tolist() == [[4, 6, 12, 8], [0, 0, 32, 4]]
    assert set(target) == {"boxes", "labels", "masks", "image_id"}
    for index in (1, 2):  # without a mask, and without annotations at all
        target = dataset[index][1]
        assert (
            target["boxes"].shape == (0, 4) and target["labels"].shape == (0,) and len(target["masks"]) == 0
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        without = CocoDataset(*paths, with_masks=False)
    assert "masks" not in without[1][1] and without[1][1]["boxes"].tolist() == [[4, 4, 12, 12]]
    picture, target = dataset.picture(0)
    assert np.array_equal(picture, stored[..., ::-1]) and len(target["boxes"]) == 2


def test_training_leaves_out_images_without_objects(tmp_path):
    paths = make_set(
        tmp_path / "set",
        [
            {"image_id": 10, "iscrowd": 1},
            {"image_id": 20, "bbox": [3, 3, 1, 9]},  # a side of one pixel: nothing to learn from
            {"image_id": 20, "bbox": [3, 3, 9, 1]},
            {"image_id": 30, "bbox": [3, 3, 1, 9]},
            {"image_id": 30, "bbox": [3, 3, 2, 2]},
        ],
        num_images=4,
    )
    assert CocoDataset(*paths, training=True).image_ids == [30]
    assert CocoDataset(*paths, training=True, keep_empty=True).image_ids == [10, 20, 30, 40]
    assert CocoDataset(*paths).image_ids == [10, 20, 30, 40]
    # Both objects of image 30 are trained on.
    assert len(CocoDataset(*paths, training=True)[0][1]["boxes"]) == 2


def test_everything_filtered_is_an_error_with_counts(tmp_path):
    paths = make_set(tmp_path / "set", [{"image_id": 10, "iscrowd": 1}, {"image_id": 20, "iscrowd": 1}])
    message = (
        r"none of 3 images has an object with a mask to train on \(2 annotations, 2 of them crowd, 0 usable\)"
    )
    with pytest.raises(UserError, match=message):
        CocoDataset(*paths, training=True)
    assert len(CocoDataset(*paths, training=True, keep_empty=True)) == 3


def test_keypoints(tmp_path):
    names = ["nose", "left_eye", "right_eye"]
    categories = [{"id": 1, "name": "person", "keypoints": names}]
    keypoints = [1, 1, 2, 5, 1, 1, 9, 1, 0]
    paths = make_set(
        tmp_path / "set",
        [
            {"image_id": 10, "category_id": 1, "keypoints": keypoints},
            {"image_id": 20, "category_id": 1, "keypoints": [0] * 9},
            {"image_id": 30, "category_id": 1},
        ],
        categories=categories,
    )
    dataset = CocoDataset(*paths, with_keypoints=True, with_masks=False, training=True)
    assert dataset.image_ids == [10] and dataset.num_keypoints == 3 and dataset.keypoint_flip == [0, 2, 1]
    assert dataset[0][1]["keypoints"].tolist() == [[[1, 1, 2], [5, 1, 1], [9, 1, 0]]]
    dataset.transforms = build_transforms("hflip", training=True, keypoint_flip=dataset.keypoint_flip)
    flipped = next(t for t in (dataset[(epoch, 0)][1] for epoch in range(20)) if t["keypoints"][0, 0, 0] != 1)
    # Mirrored in a width of 32; the eyes trade places, what is not visible is 0.
    assert flipped["keypoints"].tolist() == [[[31, 1, 2], [0, 0, 0], [27, 1, 1]]]
    with pytest.raises(UserError, match="no category has keypoints"):
        CocoDataset(*make_set(tmp_path / "other", [{"image_id": 10}]), with_keypoints=True)


def test_ten_visible_keypoints_of_a_person(tmp_path):
    categories = [{"id": 1, "name": "person", "keypoints": [str(n) for n in range(17)]}]
    annotations = [
        {"image_id": image_id, "category_id": 1, "keypoints": [1, 1, 2] * visible + [0] * 3 * (17 - visible)}
        for image_id, visible in ((10, 9), (20, 10), (30, 5), (30, 5))
    ]
    paths = make_set(tmp_path / "set", annotations, categories=categories)
    # 9 are too few; the two objects of image 30 have 10 together.
    assert CocoDataset(*paths, with_keypoints=True, training=True).image_ids == [20, 30]


def test_a_subset_depends_on_the_seed_alone(tmp_path):
    paths = make_set(tmp_path / "set", [], num_images=12, size=(2, 2))
    subset = CocoDataset(*paths, num_samples=5, seed=1).image_ids
    assert len(set(subset)) == 5 and subset == sorted(subset)
    assert subset == CocoDataset(*paths, num_samples=5, seed=1).image_ids
    assert subset != CocoDataset(*paths, num_samples=5, seed=2).image_ids
    assert len(CocoDataset(*paths, num_samples=100)) == 12
    with pytest.raises(UserError, match="at least one"):
        CocoDataset(*paths, num_samples=0)


def flip_set(tmp_path):
    paths = make_set(tmp_path / "set", [{"image_id": 10 * (n + 1)} for n in range(8)], num_images=8)
    return CocoDataset(*paths, transforms=build_transforms("hflip", training=True), training=True, seed=3)


def test_randomness_is_of_seed_epoch_and_index(tmp_path):
    dataset = flip_set(tmp_path)
    flips = [[dataset[(epoch, n)][1]["boxes"][0, 0].item() for n in range(8)] for epoch in range(3)]
    assert flips == [[dataset[(epoch, n)][1]["boxes"][0, 0].item() for n in range(8)] for epoch in range(3)]
    assert flips[0] != flips[1] and set(flips[0]) == {4, 20}  # 32 - 12 = 20
    assert dataset[5][1]["boxes"].tolist() == dataset[(0, 5)][1]["boxes"].tolist()


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_any_number_of_workers_gives_the_same_batches(tmp_path, context):
    dataset = flip_set(tmp_path)
    dataset.batch_transform = reverse_and_darken

    def batches(workers):
        sampler = GroupedBatchSampler(np.zeros(8, int), 4, seed=1)
        sampler.set_epoch(2)
        loader = DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=workers,
            worker_init_fn=coco_utils.init_worker,
            multiprocessing_context=context if workers else None,
        )
        return list(loader)

    alone, shared = batches(0), batches(2 if context == "fork" else 1)
    assert len(alone) == len(shared) == 2
    for (images, targets), (other_images, other_targets) in zip(alone, shared, strict=True):
        assert all(map(torch.equal, images, other_images))
        for target, other in zip(targets, other_targets, strict=True):
            assert torch.equal(target["boxes"], other["boxes"]) and target["image_id"] == other["image_id"]
            assert torch.equal(target["masks"].dense(), other["masks"].dense())


def reverse_and_darken(samples, rng):
    darker = int(rng.integers(2, 10))
    return [(image // darker, target) for image, target in reversed(samples)]


def test_missing_images_are_listed(tmp_path):
    folder, path = make_set(tmp_path / "set", [], num_images=14)
    for n in range(2, 14):
        (folder / f"{n}.png").unlink()
    listed = (
        r"12 of 14 images of .*a.json are missing \(2.png, 3.png, .*11.png, and 2 more\); check the folder"
    )
    with pytest.raises(UserError, match=listed):
        CocoDataset(folder, path)
    with pytest.raises(UserError, match="no such folder of images"):
        CocoDataset(folder / "none", path)


def test_images_out_of_the_folder_are_refused(tmp_path):
    folder, path = make_set(tmp_path / "set", [])
    (tmp_path / "x.png").write_bytes((folder / "0.png").read_bytes())
    (folder / "0.png").unlink()
    (folder / "0.png").symlink_to("../x.png")
    with pytest.raises(UserError, match=r"1 of 3 images .* lie outside the folder by a link \(0.png\)"):
        CocoDataset(folder, path)


def test_a_size_that_differs_is_found_before_training(tmp_path):
    folder, path = make_set(tmp_path / "set", [])
    cv2.imwrite(str(folder / "1.png"), np.zeros((32, 24, 3), np.uint8))
    with pytest.raises(UserError, match=r"1.png: has 32×24 pixels, but the annotation file says 24×32"):
        CocoDataset(folder, path)


def test_broken_images_are_skipped_on_request(tmp_path):
    folder, path = make_set(tmp_path / "set", [{"image_id": 10 * (n + 1)} for n in range(3)])
    data = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(data[:-20])
    dataset = CocoDataset(folder, path)
    loader = DataLoader(dataset, batch_size=None, num_workers=1)
    with pytest.raises(UserError, match=r"2\.png: is damaged") as error:
        list(loader)
    assert "\n" not in str(error.value)
    dataset = CocoDataset(folder, path, skip_broken=True)
    with pytest.warns(UserWarning, match=r"2.png: is damaged.*\(skipped: the next image takes its place\)"):
        assert dataset[(1, 2)][1]["image_id"] == 10  # after the last comes the first
    for n in range(2):
        (folder / f"{n}.png").write_bytes(b"")
    with pytest.raises(UserError, match="none of the 3 images can be decoded"), pytest.warns(UserWarning):
        dataset[0]


def test_classes_must_be_the_same(tmp_path):
    def with_categories(name, *categories):
        categories = [{"id": number, "name": text} for number, text in categories]
        return CocoDataset(*make_set(tmp_path / name, [], categories=categories))

    train = with_categories("train", (1, "cat"), (2, "dog"))
    check_same_classes(train, with_categories("same", (2, "dog"), (1, "cat")))
    for name, categories, message in (
        ("missing", [(1, "cat")], "category 2 is missing, but 'dog' in"),
        ("renamed", [(1, "cat"), (2, "cow")], "category 2 is 'cow', but 'dog' in"),
        ("extra", [(1, "cat"), (2, "dog"), (3, "cow")], "category 3 is 'cow', but missing in"),
    ):
        with pytest.raises(UserError, match=rf"{name}.a.json: {message} .*train.a.json"):
            check_same_classes(train, with_categories(name, *categories))


def test_layout(tmp_path):
    (tmp_path / "train2017").mkdir()
    (tmp_path / "val2017").write_text("train2017")  # a link that became a file
    paths = dataset_paths(tmp_path)
    assert paths["train"] == (tmp_path / "train2017", tmp_path / "annotations/instances_train2017.json")
    assert paths["val"] == (tmp_path / "train2017", tmp_path / "annotations/instances_val2017.json")
    (tmp_path / "val2017").write_text("../train2017")
    assert dataset_paths(tmp_path)["val"][0] == tmp_path / "val2017"
    assert dataset_paths(tmp_path, keypoints=True)["val"][1].name == "person_keypoints_val2017.json"
    assert dataset_paths(None) == {}


@needs_coco128
def test_coco128():
    paths = dataset_paths(SHARED)
    train, val = CocoDataset(*paths["train"], training=True), CocoDataset(*paths["val"])
    assert len(train) == 126 and len(val) == 128 and len(train.classes) == 80  # two images without objects
    check_same_classes(train, val)
    image, target = val[0]
    assert (
        val.image_sizes[0] == tuple(image.shape[1:])
        and val.aspect_ratios[0] == image.shape[2] / image.shape[1]
    )
    # Most masks reach about as far as their boxes, which annotators gave to a hundredth of a pixel.
    corners = torch.cat([val[n][1]["boxes"] - val[n][1]["masks"].rects for n in range(20)])
    assert corners.abs().median() < 1
    assert target["image_id"] == 9


@needs_coco128
def test_the_check_command_finds_nothing_in_coco128(capsys):
    assert coco_utils.main(["check", str(SHARED / "annotations/instances_train2017.json")]) == 0
    assert (
        "128 images, 939 annotations usable (10 crowd), 80 classes: 0 errors, 0 warnings"
        in capsys.readouterr().out
    )
