"""Pictures of a run: validation images with their ground truth and, beside it, what the model sees in them."""

from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as mask_api

CELL = 320  # longest side of an image in the grid, pixels
MARGIN = 6
TITLE_HEIGHT = 22
BACKGROUND, INK = (255, 255, 255), (40, 40, 40)
# Paul Tol's "bright" and "vibrant" schemes: told apart by the colour-blind too.
PALETTE = [
    (68, 119, 170), (238, 102, 119), (34, 136, 51), (204, 187, 68), (102, 204, 238), (170, 51, 119),
    (238, 119, 51), (0, 153, 136), (204, 51, 17), (51, 187, 238), (238, 51, 119), (187, 187, 187),
]  # fmt: skip


def predictions(dataset, results, num_images=8, score_threshold=0.7, columns=2):
    """A grid of evaluated images: ground truth on the left of each pair, predictions on the right.

    dataset: CocoDataset. results: COCO results in the json's ids, of shown_images at least.
    Returns uint8 [H, W, 3] RGB.
    """
    by_image = {}
    for result in results:
        if result["score"] >= score_threshold:
            by_image.setdefault(result["image_id"], []).append(result)
    names = dict(zip(dataset.category_ids, dataset.classes, strict=True))
    pairs = []
    for index in shown_images(dataset, num_images):
        image, target = dataset.picture(index)
        truth = target_objects(target, dataset)
        found = [result_object(result, names) for result in by_image.get(target["image_id"], [])]
        left = titled(draw(image, truth), f"image {target['image_id']}: {len(truth)} annotated")
        right = titled(draw(image, found), f"{len(found)} predicted with score > {score_threshold:g}")
        pairs.append(np.concatenate([left, gap(left.shape[0], MARGIN), right], axis=1))
    return grid(pairs, columns)


def shown_images(dataset, num_images=8):
    """The indices of the images that predictions() shows: spread evenly over the set, the same ones each time."""
    chosen = np.linspace(0, len(dataset) - 1, min(num_images, len(dataset)))
    return np.unique(chosen.round().astype(int)).tolist()


def target_objects(target, dataset):
    """The objects of a target as dicts {"box", "label", "text", "mask", "keypoints"} to draw."""
    masks = target.get("masks")
    keypoints = target.get("keypoints")
    return [
        {
            "box": box,
            "label": label,
            "text": dataset.classes[label - 1],
            "mask": masks[n : n + 1].dense()[0].numpy() if masks is not None else None,
            "keypoints": keypoints[n].numpy() if keypoints is not None else None,
        }
        for n, (box, label) in enumerate(
            zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True)
        )
    ]


def result_object(result, names):
    """A COCO result as a dict to draw."""
    x, y, width, height = result["bbox"]
    category_ids = list(names)
    keypoints = result.get("keypoints")
    return {
        "box": (x, y, x + width, y + height),
        "label": category_ids.index(result["category_id"]) + 1,
        "text": f"{names[result['category_id']]} {result['score']:.2f}",
        "mask": mask_api.decode(result["segmentation"]) if "segmentation" in result else None,
        "keypoints": np.asarray(keypoints).reshape(-1, 3) if keypoints is not None else None,
    }


def draw(image, objects):
    """image: uint8 [H, W, 3] RGB. Objects are drawn largest first. Returns a copy scaled to CELL pixels."""
    scale = CELL / max(image.shape[:2])
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    shrink = scale < 1
    canvas = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrink else cv2.INTER_NEAREST)
    objects = sorted(objects, key=lambda o: -(o["box"][2] - o["box"][0]) * (o["box"][3] - o["box"][1]))
    for item in objects:
        colour = PALETTE[(item["label"] - 1) % len(PALETTE)]
        if item["mask"] is not None:
            mask = cv2.resize(item["mask"], (width, height), interpolation=cv2.INTER_NEAREST).astype(bool)
            canvas[mask] = (0.45 * canvas[mask] + 0.55 * np.array(colour)).astype(np.uint8)
            outline, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
            cv2.drawContours(canvas, outline, -1, colour, 1)
    for item in objects:
        colour = PALETTE[(item["label"] - 1) % len(PALETTE)]
        x0, y0, x1, y1 = (round(side * scale) for side in item["box"])
        cv2.rectangle(canvas, (x0, y0), (x1, y1), colour, 1)
        for x, y, visible in item["keypoints"] if item["keypoints"] is not None else ():
            if visible > 0:
                cv2.circle(canvas, (round(x * scale), round(y * scale)), 3, colour, -1)
                cv2.circle(canvas, (round(x * scale), round(y * scale)), 3, BACKGROUND, 1)
        write_text(canvas, item["text"], x0 + 2, max(y0, 12), colour)
    return canvas


def write_text(canvas, text, x, y, colour, scale=0.38):
    (width, height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
    x = min(max(0, x), max(0, canvas.shape[1] - width - 2))
    cv2.rectangle(canvas, (x - 1, y - height - 2), (x + width + 1, y + 2), colour, -1)
    ink = (0, 0, 0) if sum(colour) > 380 else BACKGROUND
    cv2.putText(canvas, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, scale, ink, 1, cv2.LINE_AA)


def titled(image, text):
    """The image centred in a CELL-sized field under a line of text."""
    height, width = image.shape[:2]
    field = np.full((CELL + TITLE_HEIGHT, CELL, 3), BACKGROUND, np.uint8)
    cv2.putText(field, text, (2, TITLE_HEIGHT - 8), cv2.FONT_HERSHEY_SIMPLEX, 0.42, INK, 1, cv2.LINE_AA)
    left = (CELL - width) // 2
    field[TITLE_HEIGHT : TITLE_HEIGHT + height, left : left + width] = image
    return field


def gap(height, width):
    return np.full((height, width, 3), BACKGROUND, np.uint8)


def grid(pictures, columns):
    """Pictures of one size in rows of `columns`, wide margins between them."""
    height, width = pictures[0].shape[:2]
    while len(pictures) % columns:
        pictures = [*pictures, gap(height, width)]
    rows = []
    for start in range(0, len(pictures), columns):
        row = [part for p in pictures[start : start + columns] for part in (gap(height, 4 * MARGIN), p)]
        row = np.concatenate([*row, gap(height, 4 * MARGIN)], axis=1)
        rows += [row, gap(MARGIN, row.shape[1])]
    return np.concatenate(rows)


def write(path, picture):
    """picture: uint8 [H, W, 3] RGB, as a PNG; its folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
