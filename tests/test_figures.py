import cv2
import numpy as np
import pytest
from pycocotools import mask as mask_api

import figures
import shapes
from coco_utils import CocoDataset, dataset_paths


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = shapes.write_shapes(tmp_path_factory.mktemp("data"), num_train=1, num_val=4)
    return CocoDataset(*dataset_paths(root)["val"])


def result(dataset, score=0.9):
    mask = np.zeros(dataset.image_sizes[0], np.uint8, order="F")
    mask[10:40, 10:40] = 1
    rle = mask_api.encode(mask)
    return {
        "image_id": dataset.image_ids[0],
        "category_id": dataset.category_ids[0],
        "bbox": [10, 10, 30, 30],
        "score": score,
        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
    }


def test_the_grid_shows_each_image_once_with_room_for_both(dataset):
    picture = figures.predictions(dataset, [], num_images=3)
    # Three pairs in two columns are two rows: 320 pixels and a 22-pixel title each, 6 pixels below each.
    assert picture.shape[0] == 2 * (320 + 22 + 6)
    assert picture.dtype == np.uint8 and picture.shape[2] == 3


def test_predictions_are_drawn_from_the_threshold_on(dataset):
    empty = figures.predictions(dataset, [], num_images=1)
    shown = figures.predictions(dataset, [result(dataset)], num_images=1)
    hidden = figures.predictions(dataset, [result(dataset, score=0.1)], num_images=1)
    assert np.array_equal(empty, hidden)
    assert not np.array_equal(empty, shown)
    half = empty.shape[1] // 4  # the left of the first pair: ground truth, the same in both
    assert np.array_equal(empty[:, :half], shown[:, :half])


def test_a_mask_colours_its_pixels_alone():
    image = np.zeros((320, 320, 3), np.uint8)
    mask = np.zeros((320, 320), np.uint8)
    mask[100:200, 100:200] = 1
    item = {"box": (100, 100, 200, 200), "label": 1, "text": "", "mask": mask, "keypoints": None}
    drawn = figures.draw(image, [item])
    assert (drawn[120:190, 120:190].sum(axis=2) > 0).all()
    assert (drawn[210:, 210:] == 0).all()
    assert (image == 0).all()


def test_write_makes_the_folder(tmp_path):
    picture = np.zeros((4, 5, 3), np.uint8)
    picture[..., 0] = 255  # red
    figures.write(tmp_path / "figures" / "x.png", picture)
    assert cv2.imread(str(tmp_path / "figures" / "x.png"))[0, 0].tolist() == [0, 0, 255]  # OpenCV reads BGR
