"""Augmentation: policies on (image, target), geometry on boxes, masks and keypoints alike.

A transform is called as transform(image, target, rng) and returns (image, target). image: uint8 [3, H, W], RGB.
target: a dict of boxes float32 [N, 4] xyxy pixels, labels int64 [N], and where wanted masks (CroppedMasks of N)
and keypoints float32 [N, J, 3] (x, y, visibility). All randomness comes from rng, a numpy Generator. The target
given is never changed in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from torchvision.ops import box_iou
from torchvision.transforms.v2 import functional as colours

from masks import CroppedMasks

Target = dict[str, Any]
Transform = Callable[[torch.Tensor, Target, np.random.Generator], tuple[torch.Tensor, Target]]

# COCO's 17 keypoints of a person: left and right eye, ear, shoulder, elbow, wrist, hip, knee, ankle trade places.
COCO_KEYPOINT_FLIP = (0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15)
MEAN_COLOUR = (123, 117, 104)  # ImageNet's RGB, for what is added around an image
MULTISCALE_SIZES = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)


# --- geometry shared by the transforms ---------------------------------------------------------------------------


def select(target: Target, keep: torch.Tensor) -> Target:
    """The objects where `keep`, bool [N], in all fields."""
    fields = ("boxes", "labels", "masks", "keypoints")
    return {name: value[keep] if name in fields else value for name, value in target.items()}


def resize(image: torch.Tensor, target: Target, height: int, width: int) -> tuple[torch.Tensor, Target]:
    """Image (bilinear with antialias, equal to Pillow's) and objects; a mask that vanishes takes its object along."""
    old_height, old_width = image.shape[-2:]
    scale = torch.tensor([width / old_width, height / old_height])
    image = torch.nn.functional.interpolate(
        image[None], size=(height, width), mode="bilinear", antialias=True
    )[0]
    limits = torch.tensor([width, height, width, height])  # rounding may carry a box a little beyond
    target = dict(target, boxes=torch.minimum(target["boxes"] * scale.repeat(2), limits))
    if "keypoints" in target:
        target["keypoints"] = torch.cat(
            [target["keypoints"][..., :2] * scale, target["keypoints"][..., 2:]], -1
        )
    if "masks" in target:
        target["masks"] = target["masks"].resize(height, width)
    return image, select(target, _is_there(target))


def crop(
    image: torch.Tensor, target: Target, x0: int, y0: int, x1: int, y1: int
) -> tuple[torch.Tensor, Target]:
    """What lies inside the rectangle; objects of which nothing does are dropped.

    A box is clipped; one that is cut and has a mask becomes the rectangle of what is left of the mask.
    """
    width, height = x1 - x0, y1 - y0
    moved = target["boxes"] - torch.tensor([x0, y0, x0, y0])
    limits = torch.tensor([width, height, width, height])
    target = dict(target, boxes=torch.minimum(moved.clamp(min=0), limits))
    if "masks" in target:
        target["masks"] = target["masks"].crop(x0, y0, x1, y1)
        cut = (target["boxes"] != moved).any(dim=1)
        target["boxes"][cut] = target["masks"].rects[cut].float()
    if "keypoints" in target:
        target["keypoints"] = _shift(target["keypoints"], -x0, -y0, (height, width))
    return image[:, y0:y1, x0:x1], select(target, _is_there(target))


def pad(
    image: torch.Tensor, target: Target, left: int, top: int, height: int, width: int
) -> tuple[torch.Tensor, Target]:
    """The image at (left, top) on a canvas of MEAN_COLOUR, height × width."""
    old_height, old_width = image.shape[-2:]
    canvas = torch.tensor(MEAN_COLOUR, dtype=torch.uint8)[:, None, None].repeat(1, height, width)
    canvas[:, top : top + old_height, left : left + old_width] = image
    target = dict(target, boxes=target["boxes"] + torch.tensor([left, top, left, top]))
    if "masks" in target:
        target["masks"] = target["masks"].pad(left, top, width - old_width - left, height - old_height - top)
    if "keypoints" in target:
        target["keypoints"] = _shift(target["keypoints"], left, top, (height, width))
    return canvas, target


def _is_there(target: Target) -> torch.Tensor:
    """bool [N]: the box has an area and the mask, if there is one, a pixel."""
    there = (target["boxes"][:, 2:] > target["boxes"][:, :2]).all(dim=1)
    if "masks" in target:
        there &= target["masks"].rects[:, 2] > target["masks"].rects[:, 0]
    return there


def _shift(keypoints: torch.Tensor, x: int, y: int, size: tuple[int, int]) -> torch.Tensor:
    """Moved by (x, y); what is then outside the frame, or was not labelled, is (0, 0, 0)."""
    moved = keypoints + torch.tensor([x, y, 0])
    limits = torch.tensor([size[1], size[0]])
    inside = ((moved[..., :2] >= 0) & (moved[..., :2] < limits)).all(dim=-1) & (moved[..., 2] > 0)
    return moved * inside[..., None]


# --- the transforms ----------------------------------------------------------------------------------------------


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
    A keypoint that is not labelled becomes (0, 0, 0), as in torchvision's reference.
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
            if target["keypoints"].shape[1] != len(self.keypoint_flip):
                raise ValueError(
                    f"objects have {target['keypoints'].shape[1]} keypoints, but keypoint_flip has "
                    f"{len(self.keypoint_flip)}; give it the data set's own, CocoDataset.keypoint_flip"
                )
            keypoints = target["keypoints"][:, self.keypoint_flip]
            keypoints[..., 0] = width - keypoints[..., 0]
            target["keypoints"] = keypoints * (keypoints[..., 2:] > 0)
        return image.flip(-1), target


class RandomShortestSize:
    """Resize so that the shorter side is one of `min_sizes` and the longer at most `max_size` pixels."""

    def __init__(self, min_sizes: Sequence[int] = MULTISCALE_SIZES, max_size: int = 1333) -> None:
        self.min_sizes, self.max_size = list(min_sizes), max_size

    def __call__(
        self, image: torch.Tensor, target: Target, rng: np.random.Generator
    ) -> tuple[torch.Tensor, Target]:
        height, width = image.shape[-2:]
        shortest = self.min_sizes[rng.integers(len(self.min_sizes))]
        scale = min(shortest / min(height, width), self.max_size / max(height, width))
        return resize(image, target, max(1, int(height * scale)), max(1, int(width * scale)))


class LargeScaleJitter:
    """Resize by a random factor, then crop or pad at the right and bottom to size × size pixels.

    The factor is that of fitting the image into the square times a number drawn from `scales`. torchvision's
    ScaleJitter and FixedSizeCrop in one: where the result is larger than the square, what will remain is cut out of
    the image before it is resized, so that no pixel is computed in vain.
    Source: Ghiasi et al. 2021, "Simple Copy-Paste is a Strong Data Augmentation Method".
    """

    def __init__(self, size: int = 1024, scales: tuple[float, float] = (0.1, 2.0)) -> None:
        self.size, self.scales = size, scales

    def __call__(
        self, image: torch.Tensor, target: Target, rng: np.random.Generator
    ) -> tuple[torch.Tensor, Target]:
        height, width = image.shape[-2:]
        scale = self.size / max(height, width) * rng.uniform(*self.scales)
        share = rng.random()  # of what is cut off, how much at the left and the top
        new_height, new_width = max(1, int(height * scale)), max(1, int(width * scale))
        if max(new_height, new_width) > self.size:
            kept_height = min(height, max(1, round(height * self.size / new_height)))
            kept_width = min(width, max(1, round(width * self.size / new_width)))
            x, y = int((width - kept_width) * share), int((height - kept_height) * share)
            image, target = crop(image, target, x, y, x + kept_width, y + kept_height)
            new_height, new_width = min(new_height, self.size), min(new_width, self.size)
        image, target = resize(image, target, new_height, new_width)
        return pad(image, target, 0, 0, self.size, self.size)


class RandomPhotometricDistort:
    """Brightness, contrast, saturation, hue and the order of the channels, each with probability p.

    Source: Liu et al. 2016, "SSD"; ranges as in torchvision.
    """

    def __init__(self, p: float = 0.5) -> None:
        self.p = p

    def __call__(
        self, image: torch.Tensor, target: Target, rng: np.random.Generator
    ) -> tuple[torch.Tensor, Target]:
        steps = [
            lambda image: colours.adjust_contrast(image, rng.uniform(0.5, 1.5)),
            lambda image: colours.adjust_saturation(image, rng.uniform(0.5, 1.5)),
            lambda image: colours.adjust_hue(image, rng.uniform(-0.05, 0.05)),
        ]
        if rng.random() < 0.5:  # contrast comes first or last
            steps = [*steps[1:], steps[0]]
        steps.insert(0, lambda image: colours.adjust_brightness(image, rng.uniform(0.875, 1.125)))
        steps.append(lambda image: image[rng.permutation(3)])
        for step in steps:
            if rng.random() < self.p:
                image = step(image)
        return image, target


class RandomZoomOut:
    """With probability p, put the image somewhere on a canvas of up to `max_ratio` times its sides."""

    def __init__(self, max_ratio: float = 4.0, p: float = 0.5) -> None:
        self.max_ratio, self.p = max_ratio, p

    def __call__(
        self, image: torch.Tensor, target: Target, rng: np.random.Generator
    ) -> tuple[torch.Tensor, Target]:
        if rng.random() >= self.p:
            return image, target
        height, width = image.shape[-2:]
        ratio = rng.uniform(1, self.max_ratio)
        new_height, new_width = int(height * ratio), int(width * ratio)
        left, top = int((new_width - width) * rng.random()), int((new_height - height) * rng.random())
        return pad(image, target, left, top, new_height, new_width)


class RandomIoUCrop:
    """Crop to a random rectangle that holds the centre of an object and overlaps one by a random least IoU.

    Objects whose centre is outside are dropped. Source: Liu et al. 2016, "SSD"; constants as in torchvision.
    """

    LEAST_IOUS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)  # 1 leaves the image as it is
    TRIALS = 40

    def __call__(
        self, image: torch.Tensor, target: Target, rng: np.random.Generator
    ) -> tuple[torch.Tensor, Target]:
        height, width = image.shape[-2:]
        boxes = target["boxes"]
        if len(boxes) == 0:
            return image, target
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        while True:
            least_iou = self.LEAST_IOUS[rng.integers(len(self.LEAST_IOUS))]
            if least_iou >= 1:
                return image, target
            for _ in range(self.TRIALS):
                new_width, new_height = (
                    (np.array([width, height]) * rng.uniform(0.3, 1, 2)).astype(int).tolist()
                )
                if new_width < 1 or new_height < 1 or not 0.5 <= new_width / new_height <= 2:
                    continue
                spare = np.array([width - new_width, height - new_height])
                x0, y0 = (spare * rng.random(2)).astype(int).tolist()
                x1, y1 = x0 + new_width, y0 + new_height
                inside = ((centres > torch.tensor([x0, y0])) & (centres < torch.tensor([x1, y1]))).all(dim=1)
                window = torch.tensor([[x0, y0, x1, y1]], dtype=boxes.dtype)
                if inside.any() and box_iou(boxes[inside], window).max() >= least_iou:
                    return crop(image, select(target, inside), x0, y0, x1, y1)


class SimpleCopyPaste:
    """A transform of a batch: each image gets some of its neighbour's objects, by their masks, edges blended.

    Of a neighbour's N objects, N are drawn with repetition. What they cover is taken from the masks below; an object
    that is covered wholly is dropped, one covered in part gets the rectangle of the rest as its box, and its covered
    keypoints become labelled but not visible. An image of another size is resized first.
    Source: Ghiasi et al. 2021; torchvision's reference.
    """

    def __call__(
        self, samples: list[tuple[torch.Tensor, Target]], rng: np.random.Generator
    ) -> list[tuple[torch.Tensor, Target]]:
        neighbours = [samples[-1], *samples[:-1]]
        return [self._paste(*pair, rng) for pair in zip(samples, neighbours, strict=True)]

    def _paste(
        self,
        sample: tuple[torch.Tensor, Target],
        neighbour: tuple[torch.Tensor, Target],
        rng: np.random.Generator,
    ) -> tuple[torch.Tensor, Target]:
        (image, target), (source, pasted) = sample, neighbour
        num_objects = len(pasted["boxes"])
        if num_objects == 0:
            return image, target
        pasted = select(pasted, torch.from_numpy(np.unique(rng.integers(0, num_objects, num_objects))))
        if source.shape != image.shape:
            source, pasted = resize(source, pasted, *image.shape[-2:])
        cover = pasted["masks"].union()
        left_over = target["masks"].without(cover)
        changed = left_over.areas() != target["masks"].areas()
        boxes = torch.where(changed[:, None], left_over.rects.float(), target["boxes"])
        target = dict(target, boxes=boxes, masks=left_over)
        if "keypoints" in target:
            target["keypoints"] = _hide(target["keypoints"], cover)
        target = select(target, ~changed | (left_over.rects[:, 2] > left_over.rects[:, 0]))
        joined = {
            name: torch.cat([target[name], pasted[name]])
            for name in ("boxes", "labels", "keypoints")
            if name in target
        }
        joined["masks"] = CroppedMasks.cat([target["masks"], pasted["masks"]])
        return _blend(image, source, cover), {**target, **joined}


def _hide(keypoints: torch.Tensor, cover: torch.Tensor) -> torch.Tensor:
    """Visible keypoints under the cover, uint8 [H, W], become labelled but not visible (2 -> 1)."""
    height, width = cover.shape
    x, y = keypoints[..., 0].long().clamp(0, width - 1), keypoints[..., 1].long().clamp(0, height - 1)
    hidden = (cover[y, x] > 0) & (keypoints[..., 2] == 2)
    return torch.cat([keypoints[..., :2], (keypoints[..., 2] - hidden.float())[..., None]], dim=-1)


def _blend(image: torch.Tensor, source: torch.Tensor, cover: torch.Tensor) -> torch.Tensor:
    """`source` where `cover`, uint8 [H, W], is 1, with edges softened over 5 pixels (Gaussian, sigma 2)."""
    rows, columns = cover.any(dim=1).nonzero()[:, 0], cover.any(dim=0).nonzero()[:, 0]
    if len(rows) == 0:
        return image
    margin = 2
    y0, y1 = max(0, int(rows[0]) - margin), int(rows[-1]) + 1 + margin
    x0, x1 = max(0, int(columns[0]) - margin), int(columns[-1]) + 1 + margin
    alpha = cv2.GaussianBlur(
        cover[y0:y1, x0:x1].float().numpy(), (5, 5), 2.0, borderType=cv2.BORDER_REPLICATE
    )
    below, above = image[:, y0:y1, x0:x1].float(), source[:, y0:y1, x0:x1].float()
    image = image.clone()
    image[:, y0:y1, x0:x1] = torch.lerp(below, above, torch.from_numpy(alpha)).round().to(torch.uint8)
    return image


def build_transforms(
    policy: str,
    training: bool,
    *,
    keypoint_flip: Sequence[int] = COCO_KEYPOINT_FLIP,
) -> Compose:
    """The transforms of a policy by name, as in torchvision's reference; outside training, none.

    policy: "none"; "hflip": mirror with probability 0.5, which the others do as well; "multiscale": a random shorter
        side of 480 to 800; "lsj": large-scale jitter to 1024 × 1024; "ssd": colours, zoom out and IoU crop;
        "ssdlite": IoU crop.
    keypoint_flip: see RandomHorizontalFlip; CocoDataset.keypoint_flip has the data set's own.
    """
    policies: dict[str, list[Transform]] = {
        "none": [],
        "hflip": [],
        "multiscale": [RandomShortestSize()],
        "lsj": [LargeScaleJitter()],
        "ssd": [RandomPhotometricDistort(), RandomZoomOut(), RandomIoUCrop()],
        "ssdlite": [RandomIoUCrop()],
    }
    if policy not in policies:
        raise ValueError(f"data augmentation {policy!r} is unknown; choose one of {', '.join(policies)}")
    steps = policies[policy] if training else []
    if training and policy != "none":
        steps = [*steps, RandomHorizontalFlip(0.5, keypoint_flip)]
    return Compose(steps)
