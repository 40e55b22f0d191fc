"""Made-up training batches from memory, of the sizes that real ones have: to measure a step without a loader.

Letters: J keypoints of an object.
"""

import math
from pathlib import Path

import numpy as np
import torch

from coco_utils import collate, load_index
from masks import CroppedMasks

# (height, width) of the commonest of COCO's images, as often as they occur among ten.
COCO_SIZES = [(480, 640)] * 4 + [(427, 640)] * 3 + [(640, 480)] * 2 + [(640, 427)]
COCO_NUM_IMAGES, COCO_NUM_CLASSES, COCO_NUM_KEYPOINTS = 118_287, 80, 17
OBJECTS_PER_IMAGE = 7  # COCO's mean
NUM_BATCHES = 8  # kept in memory and given in turn


class FakeDataset:
    """A data set of noise: star-shaped objects on random pixels. It has what a CocoDataset says about itself.

    annotation_file: take image sizes, classes and the length of an epoch from it; None: COCO's.
    with_masks, with_keypoints: what the targets have, as in CocoDataset.
    """

    def __init__(self, annotation_file=None, *, with_masks=True, with_keypoints=False, seed=0):
        self.with_masks, self.with_keypoints, self.seed = with_masks, with_keypoints, seed
        self.annotation_file = Path(annotation_file) if annotation_file else "made up"
        if annotation_file:
            index = load_index(self.annotation_file)
            self.sizes = index.sizes.tolist()
            self.classes, self.category_ids = index.classes, index.category_ids.tolist()
            self.num_keypoints, self.num_images = len(index.keypoint_names), len(index.image_ids)
        else:
            self.sizes, self.num_images = COCO_SIZES, COCO_NUM_IMAGES
            num_classes = 1 if with_keypoints else COCO_NUM_CLASSES
            self.category_ids = list(range(1, num_classes + 1))
            self.classes = [f"class {number}" for number in self.category_ids]
            self.num_keypoints = COCO_NUM_KEYPOINTS if with_keypoints else 0

    def __len__(self):
        return self.num_images

    def batch(self, number, batch_size):
        """(images, targets) as a loader gives them: images of one orientation, the same for the same number."""
        rng = np.random.default_rng((self.seed, number))
        wide = [size for size in self.sizes if size[1] >= size[0]]
        tall = [size for size in self.sizes if size[1] < size[0]]
        group = tall if rng.integers(len(self.sizes)) < len(tall) else wide
        return collate([self._sample(rng, *group[rng.integers(len(group))]) for _ in range(batch_size)])

    def _sample(self, rng, height, width):
        image = torch.from_numpy(rng.integers(0, 256, (3, height, width), np.uint8))
        count = int(rng.integers(1, 2 * OBJECTS_PER_IMAGE))
        half = np.exp(rng.uniform(math.log(8), math.log(max(9, min(height, width) / 3)), (count, 2)))
        half = np.minimum(half, np.array([width, height]) / 2)
        centre = rng.uniform(half, [width, height] - half)
        target = {
            "boxes": torch.from_numpy(
                np.concatenate([centre - half, centre + half], axis=1).astype(np.float32)
            ),
            "labels": torch.from_numpy(rng.integers(1, len(self.classes) + 1, count)),
            "image_id": 0,
        }
        if self.with_masks:
            angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
            radii = rng.uniform(0.6, 1.0, (count, 24))
            x = centre[:, :1] + half[:, :1] * radii * np.cos(angles)
            y = centre[:, 1:] + half[:, 1:] * radii * np.sin(angles)
            outlines = np.stack([x, y], axis=2).reshape(count, -1)
            polygons = [[outline.tolist()] for outline in outlines]
            target["masks"] = CroppedMasks.from_segmentations(polygons, height, width)
        if self.with_keypoints:
            spread = rng.uniform(-1, 1, (count, self.num_keypoints, 2))
            points = centre[:, None] + half[:, None] * spread
            visible = np.full((count, self.num_keypoints, 1), 2.0)
            target["keypoints"] = torch.from_numpy(
                np.concatenate([points, visible], axis=2).astype(np.float32)
            )
        return image, target


class FakeLoader:
    """Stands for a DataLoader and its batch sampler: NUM_BATCHES batches from memory, over and over.

    rank, num_ranks: each rank has batches of its own, and its share of an epoch. pin: in pinned memory.
    """

    num_workers = 0

    def __init__(self, dataset, batch_size, *, rank=0, num_ranks=1, pin=False):
        self.length = max(1, len(dataset) // (batch_size * num_ranks))
        numbers = range(rank * NUM_BATCHES, rank * NUM_BATCHES + min(NUM_BATCHES, self.length))
        self.batches = [dataset.batch(number, batch_size) for number in numbers]
        if pin:
            self.batches = [_pin(batch) for batch in self.batches]
        self.batch_sampler, self.start_batch = self, 0

    def set_epoch(self, epoch, start_batch=0):
        self.start_batch = start_batch

    def __len__(self):
        return self.length

    def __iter__(self):
        for number in range(self.start_batch, self.length):
            yield self.batches[number % len(self.batches)]


def _pin(batch):
    images, targets = batch
    targets = [
        {name: v if name == "image_id" else v.pin_memory() for name, v in target.items()}
        for target in targets
    ]
    return [image.pin_memory() for image in images], targets
