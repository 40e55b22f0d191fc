"""The built-in data set: exact masks, a stable stream, COCO's form, safe writing."""

import contextlib
import errno
import hashlib
import io
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

import shapes

ROOT = Path(shapes.__file__).parent
NUM_VAL = 100  # the default validation split: what the figures of a run are measured on


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The data set with its default validation split and a few training images."""
    return shapes.write_shapes(tmp_path_factory.mktemp("shapes"), num_train=20, num_val=NUM_VAL)


def load(folder, name):
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(folder / "annotations" / name))


def read_image(path):
    return cv2.imread(str(path))[:, :, ::-1]


# --- shapes by hand ------------------------------------------------------------------------------


def make_shape(kind, x=20, y=20, radius=10, degrees=0, stretch=64):
    """A Shape with position and radius in pixels."""
    return shapes.Shape(kind, x * 16, y * 16, radius * 16, degrees, stretch)


def test_square_by_hand():
    # Half a side is 7/10 of 10 pixels: edges at 13 and 27, between pixel centres 12.5 | 13.5 and 26.5 | 27.5.
    expected = np.zeros((40, 40), dtype=bool)
    expected[13:27, 13:27] = True
    assert np.array_equal(shapes.draw_mask(make_shape("square"), 40, 40), expected)


def test_stretch_makes_the_own_vertical_axis_longer():
    # 80 / 64 of half a side of 7 pixels is 8.75: 17.5 pixels, whose edges hold 18 pixel centres.
    # A turn by 90 degrees lays it down.
    upright = shapes.draw_mask(make_shape("square", stretch=80), 40, 40)
    assert (upright.any(1).sum(), upright.any(0).sum()) == (18, 14)
    lying = shapes.draw_mask(make_shape("square", stretch=80, degrees=90), 40, 40)
    assert (lying.any(1).sum(), lying.any(0).sum()) == (14, 18)


def test_shape_is_cut_at_the_frame():
    # The square of the test above, centred on the corner: a quarter of it, 7 x 7 pixels.
    mask = shapes.draw_mask(make_shape("square", x=0, y=0), 40, 40)
    assert mask.sum() == 49
    assert mask[:7, :7].all()
    assert not shapes.draw_mask(make_shape("square", x=-30), 40, 40).any()


@pytest.mark.parametrize(
    ("kind", "area"),
    [
        ("disc", 31416),  # pi r^2, r = 100
        ("ring", 21991),  # seven tenths of it
        ("square", 19600),  # (1.4 r)^2
        ("triangle", 12990),  # 3 sqrt(3) / 4 r^2
        ("star", 13519),  # 5 sin(36 degrees) r * 0.46 r
    ],
)
@pytest.mark.parametrize("degrees", [0, 17, 45, 200])
def test_areas(kind, area, degrees):
    mask = shapes.draw_mask(make_shape(kind, x=150, y=150, radius=100, degrees=degrees), 300, 300)
    assert mask.sum() == pytest.approx(area, rel=0.01)


def test_classes_have_the_size_they_are_asked_for():
    # A radius of `percent` of 200 pixels gives the area of a square of 200 pixels.
    for kind, (_, percent, _) in shapes.CLASSES.items():
        mask = shapes.draw_mask(make_shape(kind, x=200, y=200, radius=2 * percent), 400, 400)
        assert mask.sum() == pytest.approx(200**2, rel=0.03), kind


def test_star_points_up_and_has_five_arms():
    mask = shapes.draw_mask(make_shape("star", x=50, y=50, radius=40), 100, 100)
    assert mask[12, 50]  # the tip is at y = 10
    assert not mask[88, 50]  # the notch below is at y = 50 + 0.46 * 40 = 68
    assert mask[66, 50]
    circle = [(50 + 30 * np.cos(a), 50 + 30 * np.sin(a)) for a in np.deg2rad(np.arange(360))]
    around = np.array([mask[int(y), int(x)] for x, y in circle])
    assert (around != np.roll(around, 1)).sum() == 10


def test_bar_by_hand():
    # 2 radii long, an eighth of a radius wide: y from 4 to 36, x from 19 to 21.
    mask = shapes.draw_mask(make_shape("bar", radius=16), 40, 40)
    assert mask.sum() == 64
    assert mask[4:36, 19:21].all()


def test_crescent_and_ring_are_hollow():
    ring = shapes.draw_mask(make_shape("ring"), 40, 40)
    assert not ring[20, 20]
    assert ring[20, 12]
    # Bitten off at the own right: at 0 degrees the left remains, at 90 degrees (clockwise, y points down) the top.
    crescent = shapes.draw_mask(make_shape("crescent"), 40, 40)
    assert crescent[20, 11]
    assert not crescent[20, 24]
    turned = shapes.draw_mask(make_shape("crescent", degrees=90), 40, 40)
    assert turned[11, 20]
    assert not turned[24, 20]


# --- keypoints -----------------------------------------------------------------------------------


def test_keypoints_by_hand():
    # Radius 40, keypoints at 32 pixels from (50, 50). top: (50, 18). arms, at -18 degrees: cos 0.951 * 32 = 30.4,
    # sin 0.309 * 32 = 9.9: x = 80.4 and 19.6, y = 40.1. feet, at 54 degrees: 18.8 and 25.9: 68.8, 31.2 and 75.9.
    # Truncated: the pixel that holds the point. Points that lie on a pixel's edge may fall to either side.
    star = make_shape("star", x=50, y=50, radius=40)
    visible = shapes.draw_mask(star, 100, 100)
    keypoints = np.array(shapes.locate_keypoints(star, visible)).reshape(5, 3)
    expected = [[50, 18, 2], [19, 40, 2], [80, 40, 2], [31, 75, 2], [68, 75, 2]]
    assert list(shapes.KEYPOINTS) == ["top", "left_arm", "right_arm", "left_foot", "right_foot"]
    assert abs(keypoints - expected).max() <= 1
    assert keypoints[:, 2].tolist() == [2] * 5


def test_keypoints_covered_and_outside():
    star = make_shape("star", x=50, y=25, radius=40)  # the top is at y = 25 - 32, outside
    visible = shapes.draw_mask(star, 100, 100)
    visible[:, :30] = False  # something covers the left arm, at x = 19; the left foot is at x = 31
    keypoints = np.array(shapes.locate_keypoints(star, visible)).reshape(5, 3)
    assert keypoints[:, 2].tolist() == [0, 1, 2, 2, 2]
    assert keypoints[0].tolist() == [0, 0, 0]


def test_keypoints_of_the_data_set(folder):
    for split in ("train", "val"):
        instances = load(folder, f"instances_{split}2017.json")
        coco = load(folder, f"person_keypoints_{split}2017.json")
        assert coco.imgs == instances.imgs
        (category,) = coco.dataset["categories"]
        assert category["keypoints"] == list(shapes.KEYPOINTS)
        assert len(category["sigmas"]) == len(shapes.KEYPOINTS)
        assert {corner for bone in category["skeleton"] for corner in bone} == {1, 2, 3, 4, 5}
        stars = {i for i, a in instances.anns.items() if a["category_id"] == category["id"]}
        assert set(coco.anns) == stars  # the same ids in both files
        for annotation in coco.anns.values():
            x, y, v = np.array(annotation["keypoints"]).reshape(5, 3).T
            assert annotation["num_keypoints"] == (v > 0).sum()
            if annotation["iscrowd"]:
                assert not v.any()
                continue
            mask = coco.annToMask(annotation)
            assert (mask[y[v == 2], x[v == 2]] == 1).all()
            assert (mask[y[v == 1], x[v == 1]] == 0).all()
            # The names hold in the image: the turn is smaller than half the way to the next tip.
            top, left_arm, right_arm, left_foot, right_foot = range(5)
            for left, right in ((left_arm, right_arm), (left_foot, right_foot)):
                assert not (v[left] and v[right]) or x[left] < x[right]
            for foot in (left_foot, right_foot):
                assert not (v[top] and v[foot]) or y[top] < y[foot]
    seen = {v for a in coco.anns.values() if not a["iscrowd"] for v in a["keypoints"][2::3]}
    assert seen == {0, 1, 2}
    assert sorted({a["iscrowd"] for a in coco.anns.values()}) == [0, 1]


# --- segmentations -------------------------------------------------------------------------------


def test_outline_by_hand():
    mask = np.zeros((4, 5), dtype=bool)
    mask[1:3, 2:4] = True  # pixel edges: x 2..4, y 1..3
    (polygon,) = shapes._outline(mask)
    assert sorted(zip(polygon[::2], polygon[1::2], strict=True)) == [(2, 1), (2, 3), (4, 1), (4, 3)]
    mask[0, 0] = True
    assert len(shapes._outline(mask)) == 2
    holed = np.ones((3, 3), dtype=bool)
    holed[1, 1] = False
    assert shapes._outline(holed) is None


def test_segmentations_decode_to_the_mask():
    """Every form, on masks with touching corners, holes and parts, at the frame and inside."""
    rng = np.random.default_rng(20)
    forms = set()
    for density in (0.02, 0.1, 0.4, 0.9, 1.0):
        for _ in range(20):
            mask = rng.random((rng.integers(1, 9), rng.integers(1, 9))) < density
            mask[0, 0] = True
            polygons = shapes._segmentation(mask, iscrowd=0)
            crowd = shapes._segmentation(mask, iscrowd=1)
            forms.add(type(polygons))
            assert isinstance(crowd["counts"], list)
            for segmentation in (polygons, crowd):
                rle = segmentation
                if not (isinstance(rle, dict) and isinstance(rle["counts"], str)):
                    rle = coco_mask.frPyObjects(segmentation, *mask.shape)
                if isinstance(rle, list):
                    rle = coco_mask.merge(rle)
                assert np.array_equal(coco_mask.decode(rle), mask)
    assert forms == {list, dict}


# --- pictures ------------------------------------------------------------------------------------


def test_masks_are_the_drawn_pixels(monkeypatch):
    """In plain colours, an object is exactly where its colour is."""
    for constant in ("NOISE", "OBJECT_VARIATION", "BACKGROUND_VARIATION", "MAX_CLUTTER"):
        monkeypatch.setattr(shapes, constant, 0)
    num_covered = 0
    for index in range(40):
        image, items = shapes.draw_picture(1, 0, index)
        for item in items:
            y, x = np.argwhere(item.visible)[0]
            assert np.array_equal((image == image[y, x]).all(2), item.visible)
            if item.shape is not None:
                whole = shapes.draw_mask(item.shape, *item.visible.shape)
                assert not (item.visible & ~whole).any()
                assert item.visible.sum() * 100 >= whole.sum() * shapes.MIN_VISIBLE
                num_covered += item.visible.sum() < whole.sum()
    assert num_covered > 10


def test_paint_touches_the_mask_only():
    rng = shapes._random_stream(5)
    for _ in range(50):
        mask = np.zeros((30, 40), dtype=bool)
        mask[4:21, 7:33] = rng.randint(0, 2, size=(17, 26)).astype(bool)
        image = np.zeros((3, 30, 40), dtype=np.uint8)
        shapes._paint(rng, image, mask, np.array([200, 100, 150]), 20)
        assert np.array_equal((image > 0).all(0), mask)
        assert not image[:, ~mask].any()
        painted = image[:, mask].astype(int)
        assert (abs(painted - np.array([200, 100, 150])[:, None]) <= 20).all()


def test_textures_stay_in_range():
    rng = shapes._random_stream(6)
    for _ in range(200):
        texture = shapes._texture(rng, shapes._draw(rng, 1, 90), shapes._draw(rng, 1, 90))
        assert texture.min() >= 0
        assert texture.max() <= 255


def test_images_are_what_draw_picture_draws(folder):
    coco = load(folder, "instances_val2017.json")
    for index, image_id in enumerate(sorted(coco.imgs)[:10]):
        image, items = shapes.draw_picture(0, 1, index)
        record = coco.imgs[image_id]
        assert (record["height"], record["width"]) == image.shape[:2]
        assert np.array_equal(read_image(folder / "val2017" / record["file_name"]), image)
        annotations = coco.loadAnns(coco.getAnnIds(image_id))
        assert len(annotations) == len(items)
        for annotation, item in zip(annotations, items, strict=True):
            assert np.array_equal(coco.annToMask(annotation), item.visible)


# --- the data set --------------------------------------------------------------------------------


def test_annotations_agree_with_their_masks(folder):
    for path in sorted((folder / "annotations").iterdir()):
        coco = load(folder, path.name)
        assert len(coco.anns) == len(coco.dataset["annotations"])
        for annotation in coco.anns.values():
            rows, columns = np.nonzero(coco.annToMask(annotation))
            assert annotation["area"] == len(rows)
            x0, y0, x1, y1 = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
            assert annotation["bbox"] == [x0, y0, x1 - x0, y1 - y0]


def test_validation_split_has_every_case(folder):
    coco = load(folder, "instances_val2017.json")
    objects = [a for a in coco.anns.values() if not a["iscrowd"]]
    crowds = [a for a in coco.anns.values() if a["iscrowd"]]
    areas = np.array([a["area"] for a in objects])
    small, large = (areas < 32**2).mean(), (areas > 96**2).mean()
    assert 0.05 < small < 0.25
    assert 0.03 < large < 0.25
    assert {a["category_id"] for a in objects} == {2, 3, 7, 8, 13, 21}
    assert [c["id"] for c in coco.dataset["categories"]] == [2, 3, 7, 8, 13, 21]
    assert len(crowds) >= 3
    assert all(isinstance(a["segmentation"]["counts"], list) for a in crowds)
    forms = [type(a["segmentation"]) for a in objects]
    assert forms.count(list) > forms.count(dict) > 5
    assert any(isinstance(a["segmentation"], list) and len(a["segmentation"]) > 1 for a in objects)
    per_image = {i: coco.loadAnns(coco.getAnnIds(i)) for i in coco.imgs}
    assert sum(not a for a in per_image.values()) >= 1
    assert sum(bool(a) and all(x["iscrowd"] for x in a) for a in per_image.values()) >= 1
    assert len({(i["height"], i["width"]) for i in coco.imgs.values()}) == len(shapes.IMAGE_SIZES)
    train = load(folder, "instances_train2017.json")
    assert not set(train.imgs) & set(coco.imgs)


def test_colours_tell_nothing_about_the_class():
    """No class's mean colour is far from the mean of all."""
    colours = {kind: [] for kind in shapes.CLASSES}
    for index in range(150):
        image, items = shapes.draw_picture(3, 0, index)
        for item in items:
            colours[item.kind].append(image[item.visible].mean(0))
    means = np.array([np.mean(c, axis=0) for c in colours.values()])
    assert abs(means - means.mean(0)).max() < 45  # about 65 objects a class, each with a spread of 75


# --- the same everywhere -------------------------------------------------------------------------


def test_data_set_is_the_same_everywhere(tmp_path):
    """If this fails after a change of the generator: raise shapes.VERSION, then renew the three values."""
    folder = shapes.write_shapes(tmp_path, num_train=12, num_val=12)
    annotations, pixels = hashlib.sha256(), hashlib.sha256()
    for path in sorted((folder / "annotations").iterdir()):
        annotations.update(path.read_bytes())
    for path in sorted(folder.glob("*2017/*.png")):
        pixels.update(np.ascontiguousarray(read_image(path)).tobytes())
    assert (shapes.VERSION, annotations.hexdigest()[:16], pixels.hexdigest()[:16]) == (
        3,
        "3c21976ecd0ed8e8",
        "f66c5549952db722",
    )


def test_images_depend_on_seed_split_and_index_alone(tmp_path):
    few = shapes.write_shapes(tmp_path, num_train=2, num_val=1)
    more = shapes.write_shapes(tmp_path, num_train=4, num_val=3)
    other = shapes.write_shapes(tmp_path, num_train=2, num_val=1, seed=1)
    assert len({few, more, other}) == 3
    names = sorted(p.name for p in (few / "train2017").iterdir())
    assert names == sorted(p.name for p in (more / "train2017").iterdir())[:2]
    for name in names:
        image = read_image(few / "train2017" / name)
        assert np.array_equal(image, read_image(more / "train2017" / name))
        changed = read_image(other / "train2017" / name)
        assert image.shape != changed.shape or not np.array_equal(image, changed)
    assert not np.array_equal(shapes.draw_picture(0, 0, 0)[0], shapes.draw_picture(0, 1, 0)[0])


# --- writing -------------------------------------------------------------------------------------


def test_second_call_writes_nothing(tmp_path, monkeypatch):
    folder = shapes.write_shapes(tmp_path / "new" / "root", num_train=1, num_val=1)
    assert f"v{shapes.VERSION}" in folder.name
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    monkeypatch.setattr(shapes, "_write_split", None)
    assert shapes.write_shapes(tmp_path / "new" / "root", num_train=1, num_val=1) == folder
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_another_version_is_another_folder(tmp_path, monkeypatch):
    folder = shapes.write_shapes(tmp_path, num_train=1, num_val=1)
    monkeypatch.setattr(shapes, "VERSION", shapes.VERSION + 1)
    assert shapes.write_shapes(tmp_path, num_train=1, num_val=1) != folder


def test_processes_may_start_at_once(tmp_path):
    code = f"import shapes; print(shapes.write_shapes({str(tmp_path)!r}, num_train=20, num_val=3))"
    processes = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    printed = {process.communicate(timeout=120)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    (folder,) = tmp_path.iterdir()  # and nothing half-written beside it
    assert printed == {str(folder)}
    assert len(list((folder / "train2017").iterdir())) == 20
    assert len(json.loads((folder / "annotations" / "instances_val2017.json").read_text())["images"]) == 3


def test_slower_process_takes_the_faster_ones_folder(tmp_path, monkeypatch):
    write_split = shapes._write_split

    def overtaken(folder, name, split, num_images, seed):
        monkeypatch.setattr(shapes, "_write_split", write_split)
        finished = shapes.write_shapes(tmp_path, num_train=1, num_val=1)
        (finished / "mark").touch()
        write_split(folder, name, split, num_images, seed)

    monkeypatch.setattr(shapes, "_write_split", overtaken)
    folder = shapes.write_shapes(tmp_path, num_train=1, num_val=1)
    assert (folder / "mark").exists()
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_interrupted_writing_leaves_nothing(tmp_path, monkeypatch, failure):
    write_split = shapes._write_split

    def fail_on_the_second_split(folder, name, split, num_images, seed):
        if split == 1:
            raise failure
        write_split(folder, name, split, num_images, seed)

    monkeypatch.setattr(shapes, "_write_split", fail_on_the_second_split)
    expected = pytest.raises(ValueError, match=r"No space left on device.*--data-path")
    with expected if isinstance(failure, OSError) else pytest.raises(KeyboardInterrupt):
        shapes.write_shapes(tmp_path, num_train=1, num_val=1)
    assert list(tmp_path.iterdir()) == []


def test_user_errors(tmp_path):
    with pytest.raises(ValueError, match="0 training and 5 validation images; each must be at least 1"):
        shapes.write_shapes(tmp_path, num_train=0, num_val=5)
    with pytest.raises(ValueError, match="seed -1 is outside"):
        shapes.write_shapes(tmp_path, seed=-1)
    occupied = tmp_path / "file"
    occupied.touch()
    with pytest.raises(ValueError, match=r"file: cannot write the built-in data set.*--data-path"):
        shapes.write_shapes(occupied, num_train=1, num_val=1)


def test_default_root(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert shapes.default_root() == tmp_path / "maskrcnn"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the XDG specification
    assert shapes.default_root() == Path(os.path.expanduser("~/.cache/maskrcnn"))
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert shapes.default_root() == Path(os.path.expanduser("~/.cache/maskrcnn"))


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shapes, "write_shapes", partial(shapes.write_shapes, num_train=2, num_val=3))
    monkeypatch.setattr(sys, "argv", ["shapes.py", str(tmp_path)])
    shapes.main()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{tmp_path}/shapes-v")
    assert "2 training and 3 validation images, classes disc, ring" in line
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["shapes.py", str(tmp_path / "file")])
    with pytest.raises(SystemExit) as exit_info:
        shapes.main()
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")
