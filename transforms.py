"""Augmentation: policies on (image, target), geometry on boxes, masks and keypoints alike.

A transform is called as transform(image, target, rng) and returns (image, target). image: uint8 [3, H, W], RGB.
target: a dict of boxes float32 [N, 4] xyxy pixels, labels int64 [N], and where wanted masks (CroppedMasks of N)
and keypoints float32 [N, J, 3] (x, y, visibility). All randomness comes from rng, a numpy Generator. The target
given is never changed in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

Target = dict[str, Any]
Transform = Callable[[torch.Tensor, Target, np.random.Generator], tuple[torch.Tensor, Target]]

# COCO's 17 person keypoints: left and right eyes, ears, shoulders, elbows, wrists, hips, knees, ankles trade places.
COCO_KEYPOINT_FLIP = (0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15)


class Compose:
    """One transform after the other."""

    def __init__(self, transforms: Sequence[Transform]) -> None:
        self.transforms = list(transforms)

    def __call__(
        self, image: torch.Tensor, target: Target, rng: np.random.Generator
    ) -> tuple[torch.Tensor, Target]:
        for transform in self.transforms:
            image, target = transform(image, target, rng)
        return image, target


class RandomHorizontalFlip:
    """Mirrors left to right with probability p.

    keypoint_flip: for each keypoint the number of its mirror image (a left eye's is the right eye).
    A keypoint that is not visible becomes (0, 0, 0), as in torchvision's reference.
    """

    def __init__(self, p: float = 0.5, keypoint_flip: Sequence[int] = COCO_KEYPOINT_FLIP) -> None:
        self.p = p
        self.keypoint_flip = list(keypoint_flip)

    def __call__(
        self, image: torch.Tensor, target: Target, rng: np.random.Generator
    ) -> tuple[torch.Tensor, Target]:
        if rng.random() >= self.p:
            return image, target
        width = image.shape[-1]
        target = dict(target)
        x0, y0, x1, y1 = target["boxes"].unbind(1)
        target["boxes"] = torch.stack([width - x1, y0, width - x0, y1], dim=1)
        if "masks" in target:
            target["masks"] = target["masks"].hflip()
        if "keypoints" in target:
            keypoints = target["keypoints"][:, self.keypoint_flip]
            keypoints[..., 0] = width - keypoints[..., 0]
            target["keypoints"] = keypoints * (keypoints[..., 2:] > 0)
        return image.flip(-1), target


class DenseMasks:
    """Masks as uint8 [N, H, W], for models that take full frames (torchvision's own)."""

    def __call__(
        self, image: torch.Tensor, target: Target, rng: np.random.Generator
    ) -> tuple[torch.Tensor, Target]:
        if "masks" in target:
            target = {**target, "masks": target["masks"].dense()}
        return image, target


def build_transforms(
    policy: str,
    training: bool,
    *,
    keypoint_flip: Sequence[int] = COCO_KEYPOINT_FLIP,
    reference_ops: bool = False,
) -> Compose:
    """The transforms of a policy by name; outside training, none but the mask format.

    policy: "none", or "hflip" (mirror with probability 0.5).
    keypoint_flip: see RandomHorizontalFlip; CocoDataset.keypoint_flip has the data set's own.
    reference_ops: give masks as uint8 [N, H, W], as torchvision's own detectors take them.
    """
    policies: dict[str, Callable[[], list[Transform]]] = {
        "none": list,
        "hflip": lambda: [RandomHorizontalFlip(0.5, keypoint_flip)],
    }
    if policy not in policies:
        raise ValueError(f"data augmentation {policy!r} is unknown; choose one of {', '.join(policies)}")
    steps = policies[policy]() if training else []
    return Compose(steps + [DenseMasks()] * reference_ops)
