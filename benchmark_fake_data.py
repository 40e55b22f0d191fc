"""What benchmarks run on where there is no data set of that kind: made-up images, a set of COCO's size, detections."""

import json
import math
import os
import shutil
from pathlib import Path

import cv2
import numpy as np

# COCO train2017 has 118,287 images and 860,001 annotations; 924 times coco128 comes as near as repeating can.
FULL_SIZE = 118_272
# (height, width, weight) of made-up images: the commonest of COCO's.
IMAGE_SIZES = ((480, 640, 4), (427, 640, 3), (640, 480, 2), (640, 427, 1), (375, 500, 1))
NUM_CATEGORIES = 80
OBJECTS_PER_IMAGE = 7  # COCO's mean
MASK_SIDE = 28


def write_fake_coco(root, num_images, *, sizes=IMAGE_SIZES, seed=0):
    """Write made-up images and their annotations in COCO 2017's layout; train and val are the same.

    sizes: (height, width, weight) to draw from. An image has 1 to 13 star-shaped objects of the sizes that COCO's
    have, on a smooth background, as JPEG. Returns `root`.
    """
    rng = np.random.default_rng(seed)
    root = Path(root)
    (root / "train2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    weights = np.array([weight for *_, weight in sizes], float)
    images, annotations = [], []
    for image_id in range(1, num_images + 1):
        height, width, _ = sizes[rng.choice(len(sizes), p=weights / weights.sum())]
        canvas = cv2.resize(rng.integers(0, 256, (12, 16, 3), np.uint8), (width, height))
        canvas = cv2.add(
            canvas, rng.integers(0, 24, canvas.shape, np.uint8)
        )  # real photographs have noise too
        for _ in range(int(rng.integers(1, 2 * OBJECTS_PER_IMAGE))):
            outline = _star(rng, height, width)
            colour = tuple(int(value) for value in rng.integers(0, 256, 3))
            cv2.fillPoly(canvas, [outline.round().astype(np.int32)], colour)
            category_id = int(rng.integers(1, NUM_CATEGORIES + 1))
            annotations.append(_annotation(len(annotations) + 1, image_id, category_id, outline))
        name = f"{image_id:012}.jpg"
        cv2.imwrite(str(root / "train2017" / name), canvas)
        images.append({"file_name": name, "height": height, "width": width, "id": image_id})
    categories = [{"id": number, "name": f"thing {number}"} for number in range(1, NUM_CATEGORIES + 1)]
    content = json.dumps({"images": images, "annotations": annotations, "categories": categories})
    for split in ("train", "val"):
        (root / "annotations" / f"instances_{split}2017.json").write_text(content)
    (root / "val2017").symlink_to("train2017")
    return root


def _star(rng, height, width):
    """The outline of one object inside its image: float64 [points, 2] x, y in pixels."""
    half = np.exp(rng.uniform(np.log(8), np.log(min(height, width) / 3), 2))
    centre = rng.uniform(half, np.maximum(half + 1e-6, np.array([width, height]) - 1 - half))
    points = int(rng.integers(12, 41))
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    radius = rng.uniform(0.6, 1.0, points)
    return centre + half * radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _annotation(annotation_id, image_id, category_id, outline):
    outline = outline.round(2)
    low, high = outline.min(axis=0), outline.max(axis=0)
    x, y = outline.T
    area = abs(float(x @ np.roll(y, 1) - y @ np.roll(x, 1))) / 2
    return {
        "segmentation": [outline.flatten().tolist()],
        "area": area,
        "iscrowd": 0,
        "image_id": image_id,
        "bbox": [*low.tolist(), *(high - low).round(2).tolist()],
        "category_id": category_id,
        "id": annotation_id,
    }


def repeat_coco(image_folder, annotation_file, root, num_images):
    """Write a set of `num_images` images by repeating another one's under new ids.

    Image n has the pixels of image n modulo the source's length, as a hard link to one copy of it, and annotations
    that differ in nothing but their ids. Returns (image folder, annotation file).
    """
    content = json.loads(Path(annotation_file).read_text())
    root = Path(root)
    folder, originals = root / "images", root / "originals"
    folder.mkdir(parents=True)
    originals.mkdir()
    by_image = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    for image in content["images"]:
        (originals / image["file_name"]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(image_folder) / image["file_name"], originals / image["file_name"])
    # A record's text with places for its ids; the keys keep their order, as a file written by one program has it.
    image_texts = [_template(image, id="%I", file_name="%F") for image in content["images"]]
    annotation_texts = [
        [_template(annotation, id="%A", image_id="%I") for annotation in by_image[image["id"]]]
        for image in content["images"]
    ]
    annotations = root / "annotations.json"
    rest = {key: value for key, value in content.items() if key not in ("images", "annotations")}
    with open(annotations, "w") as file:
        file.write(json.dumps(rest)[:-1] + ', "images": [')
        for number in range(num_images):
            source = number % len(image_texts)
            name = f"{number + 1:012}{Path(content['images'][source]['file_name']).suffix}"
            os.link(originals / content["images"][source]["file_name"], folder / name)
            text = image_texts[source].replace('"%I"', str(number + 1)).replace("%F", name)
            file.write(", " * (number > 0) + text)
        file.write('], "annotations": [')
        written = 0
        for number in range(num_images):
            for template in annotation_texts[number % len(annotation_texts)]:
                text = template.replace('"%A"', str(written + 1)).replace('"%I"', str(number + 1))
                file.write(", " * (written > 0) + text)
                written += 1
        file.write("]}")
    return folder, annotations


def _template(record, **places):
    return json.dumps({**record, **places})


def made_up_detections(rng, boxes, labels, num_classes, height, width, count=100):
    """What a detector might say about one image, as numpy arrays.

    boxes: float [N, 4] xyxy pixels and labels: int [N], the image's objects. Half of the detections are objects moved
    by about a tenth of their size, the others lie anywhere. Returns boxes float32 [count, 4] xyxy inside the image,
    labels int64 [count] in 1..num_classes, scores float32 [count] falling, mask_probs float32 [count, 28, 28] in 0..1:
    blobs with a wavy edge.
    """
    near = count // 2 if len(boxes) else 0
    chosen = np.arange(near) % max(1, len(boxes))
    side = np.exp(rng.uniform(math.log(12), math.log(min(height, width) * 0.8), (count - near, 2)))
    corner = rng.uniform(0, 1, (count - near, 2)) * np.maximum(1, [width, height] - side)
    anywhere = np.concatenate([corner, corner + side], axis=1)
    moved = np.asarray(boxes, float).reshape(-1, 4)[chosen]
    sizes = np.tile(moved[:, 2:] - moved[:, :2], 2)
    found = np.concatenate([moved + rng.normal(0, 0.1, moved.shape) * sizes, anywhere])
    found = np.concatenate([found[:, :2], np.maximum(found[:, 2:], found[:, :2] + 2)], axis=1)
    found = np.clip(found, 0, [width, height, width, height])
    kinds = np.concatenate([np.asarray(labels)[chosen], rng.integers(1, num_classes + 1, count - near)])
    order = rng.permutation(count)
    return {
        "boxes": found[order].astype(np.float32),
        "labels": kinds[order].astype(np.int64),
        "scores": np.sort(rng.uniform(0.05, 1, count))[::-1].astype(np.float32),
        "mask_probs": _blobs(rng, count),
    }


def _blobs(rng, count):
    """float32 [count, 28, 28]: high inside a wavy ellipse, low outside, as a mask head's output is."""
    y, x = np.mgrid[0:MASK_SIDE, 0:MASK_SIDE] / (MASK_SIDE - 1) * 2 - 1
    centre = rng.uniform(-0.15, 0.15, (count, 2, 1, 1))
    radius = rng.uniform(0.6, 1.0, (count, 2, 1, 1))
    dx, dy = (x - centre[:, 0]) / radius[:, 0], (y - centre[:, 1]) / radius[:, 1]
    waves, phase = rng.integers(2, 7, (count, 1, 1)), rng.uniform(0, 2 * np.pi, (count, 1, 1))
    edge = 1 + 0.15 * np.sin(waves * np.arctan2(dy, dx) + phase)
    return (1 / (1 + np.exp(-10 * (edge - np.hypot(dx, dy))))).astype(np.float32)
