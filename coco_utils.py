"""COCO-format data: an annotation file and an image folder as a Dataset; category id ↔ label.

Letters: N objects of an image, J keypoints, K classes (labels 1..K, 0 background).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from coco_index import BadAnnotationFile, CocoIndex, Finding, read_index
from masks import CroppedMasks
from transforms import Target, Transform
from utils import UserError

MIN_VISIBLE_KEYPOINTS = 10  # of an image to be trained on, as in torchvision's reference; for 17 keypoints


class CocoDataset(torch.utils.data.Dataset):
    """Images and targets of one COCO annotation file.

    image_folder, annotation_file: paths. The file's `file_name`s are relative to the folder and stay inside it.
    transforms: (image, target, rng) -> (image, target), or None.
    with_masks: targets have "masks", and an object without a segmentation is none. with_keypoints: targets have
        "keypoints".
    training: leave out images without objects to learn from, as torchvision's reference does: none but crowds,
        only boxes of a side of at most one pixel, or, with keypoints, too few visible ones (10 in an image for
        COCO's 17 keypoints of a person, one for any other skeleton). keep_empty: leave them in.
    num_samples: at most so many images, drawn from `seed` alone, so they are the same on every rank.
    seed: also that of the transforms' randomness, a function of (seed, epoch, index).

    A key is an index, or (epoch, index). A sample is (image, target): image uint8 [3, H, W], RGB; target a dict of
    boxes float32 [N, 4] xyxy pixels, labels int64 [N], image_id int and, as asked for, masks (CroppedMasks) and
    keypoints float32 [N, J, 3].
    Images are decoded as stored: an EXIF orientation is ignored, as COCO and torchvision's reference do. A size
    that differs from the json's is an error.

    Raises UserError for a file that cannot be used and for missing images; warns of annotations that are left out.
    """

    def __init__(
        self,
        image_folder: str | Path,
        annotation_file: str | Path,
        transforms: Transform | None = None,
        *,
        with_masks: bool = True,
        with_keypoints: bool = False,
        training: bool = False,
        keep_empty: bool = False,
        num_samples: int | None = None,
        seed: int = 0,
    ) -> None:
        self.image_folder, self.annotation_file = Path(image_folder), Path(annotation_file)
        self.transforms, self.seed = transforms, seed
        self.with_masks, self.with_keypoints = with_masks, with_keypoints
        self.index = index = load_index(self.annotation_file)
        if with_keypoints and not index.keypoint_names:
            raise UserError(
                f"{annotation_file}: no category has keypoints; take a person_keypoints file, or a model without"
            )
        self._is_target = ~index.crowd
        if with_masks:
            self._is_target &= index.has_mask
        self._rows = np.arange(len(index.image_ids))  # place in the index of each image of this data set
        if training and not keep_empty:
            self._rows = np.flatnonzero(_images_to_learn_from(index, self._is_target, with_keypoints))
            if len(self._rows) == 0:
                raise UserError(
                    f"{annotation_file}: none of {len(index.image_ids)} images has an object to train on "
                    f"({len(index.labels)} annotations, {int(index.crowd.sum())} of them crowd, "
                    f"{int(self._is_target.sum())} usable); --keep-empty trains on images without objects"
                )
        if num_samples is not None:
            if num_samples < 1:
                raise UserError(f"a subset of {num_samples} images; it must have at least one")
            drawn = np.random.default_rng(seed).permutation(len(self._rows))[:num_samples]
            self._rows = self._rows[np.sort(drawn)]
        self._check_files()

    # ------------------------------------------------------------------ what it holds

    @property
    def classes(self) -> list[str]:
        """[K] names; label n is classes[n - 1]."""
        return self.index.classes

    @property
    def category_ids(self) -> list[int]:
        """[K] the json's ids; label n is category_ids[n - 1]."""
        return self.index.category_ids.tolist()

    @property
    def num_keypoints(self) -> int:
        return len(self.index.keypoint_names)

    @property
    def keypoint_flip(self) -> list[int]:
        """[J] the keypoint that each becomes in a mirror, by names: left_eye and right_eye trade places."""
        names = self.index.keypoint_names
        mirrored = [_swap_sides(name) for name in names]
        return [names.index(m) if m in names else n for n, m in enumerate(mirrored)]

    @property
    def image_ids(self) -> list[int]:
        return self.index.image_ids[self._rows].tolist()

    @property
    def image_sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each image, from the json."""
        return [(h, w) for h, w in self.index.sizes[self._rows].tolist()]

    @property
    def aspect_ratios(self) -> np.ndarray:
        """float64 [images], width / height."""
        sizes = self.index.sizes[self._rows]
        return sizes[:, 1] / sizes[:, 0]

    def __len__(self) -> int:
        return len(self._rows)

    # ------------------------------------------------------------------ samples

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[torch.Tensor, Target]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        image, target = self._load(index)
        if self.transforms is not None:
            rng = np.random.default_rng((self.seed, epoch, index))
            image, target = self.transforms(image, target, rng)
        return image, target

    def picture(self, index: int) -> tuple[np.ndarray, Target]:
        """An image as uint8 [H, W, 3], RGB, and its target, both without transforms: to look at."""
        image, target = self._load(index)
        return image.permute(1, 2, 0).numpy(), target

    def _load(self, index: int) -> tuple[torch.Tensor, Target]:
        row = self._rows[index]
        height, width = self.index.sizes[row].tolist()
        path = self.image_folder / os.fsdecode(self.index.file_names[row])
        pixels = read_image(path)
        if pixels.shape[:2] != (height, width):
            turned = " as stored (an EXIF orientation is not applied)" * (pixels.shape[:2] == (width, height))
            raise UserError(
                f"{path}: has {pixels.shape[0]}×{pixels.shape[1]} pixels{turned}, but {self.annotation_file} says "
                f"{height}×{width} (height × width) for image {self.index.image_ids[row]}; correct one of them"
            )
        image = torch.from_numpy(pixels).permute(2, 0, 1)
        return image, self._target(row, height, width)

    def _target(self, row: int, height: int, width: int) -> Target:
        columns = self.index
        found = np.arange(columns.first[row], columns.first[row + 1])
        found = found[self._is_target[found]]
        target: Target = {
            "boxes": torch.from_numpy(columns.boxes[found]),
            "labels": torch.from_numpy(columns.labels[found]),
            "image_id": int(columns.image_ids[row]),
        }
        if self.with_masks:
            segmentations = [columns.segmentations[n] for n in found.tolist()]
            target["masks"] = CroppedMasks.from_segmentations(segmentations, height, width)
        if self.with_keypoints:
            target["keypoints"] = torch.from_numpy(columns.keypoints[found])
        return target

    def _check_files(self) -> None:
        """Raises UserError with the first ten images that are not there."""
        if not self.image_folder.is_dir():
            raise UserError(f"{self.image_folder}: no such folder of images; check the path")
        missing = [
            name
            for name in (os.fsdecode(self.index.file_names[row]) for row in self._rows)
            if not (self.image_folder / name).is_file()
        ]
        if missing:
            raise UserError(
                f"{self.image_folder}: {len(missing)} of {len(self)} images of {self.annotation_file} are missing "
                f"({', '.join(missing[:10])}{', …' * (len(missing) > 10)}); check the folder"
            )


def load_index(annotation_file: Path) -> CocoIndex:
    """The columns of an annotation file. Raises UserError for its first error; warns once of each kind of fault."""
    advice = f"`python3 coco_utils.py check {annotation_file}` lists everything"
    try:
        index = read_index(annotation_file)
    except BadAnnotationFile as error:
        raise UserError(f"{annotation_file}: {error}") from None
    errors = [finding for finding in index.findings if finding.level == "error"]
    if errors:
        more = f" ({len(errors) - 1} more errors: {advice})" if len(errors) > 1 else ""
        raise UserError(f"{annotation_file}: {errors[0]}{more}")
    by_kind: dict[str, list[Finding]] = {}
    for finding in index.findings:
        by_kind.setdefault(finding.kind, []).append(finding)
    for kind, found in by_kind.items():
        examples = ", ".join(finding.subject for finding in found[:3]) + ", …" * (len(found) > 3)
        warnings.warn(f"{annotation_file}: {len(found)} {kind} ({examples}): {found[0].action}", stacklevel=2)
    return index


def _images_to_learn_from(index: CocoIndex, is_target: np.ndarray, with_keypoints: bool) -> np.ndarray:
    """bool [I]: the images with an object to train on."""

    def per_image(values: np.ndarray) -> np.ndarray:
        return np.diff(np.concatenate([[0], np.cumsum(values)])[index.first])

    sides = index.boxes[:, 2:] - index.boxes[:, :2]
    useful = per_image(is_target & (sides > 1).all(axis=1)) > 0
    if with_keypoints:
        visible = per_image(np.where(is_target, (index.keypoints[..., 2] > 0).sum(axis=1), 0))
        useful &= visible >= (MIN_VISIBLE_KEYPOINTS if len(index.keypoint_names) == 17 else 1)
    return useful


def _swap_sides(name: str) -> str:
    return name.replace("left", "\0").replace("right", "left").replace("\0", "right")


def read_image(path: Path) -> np.ndarray:
    """Decode an image file as stored: uint8 [H, W, 3], RGB."""
    try:
        data = np.fromfile(path, np.uint8)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    pixels = cv2.imdecode(data, flags) if data.size else None
    if pixels is None:
        raise UserError(
            f"{path}: is no image that OpenCV can decode; replace the file, or remove it from the json"
        )
    return pixels


def collate(samples: Sequence[tuple[torch.Tensor, Target]]) -> tuple[list[torch.Tensor], list[Target]]:
    """Samples -> (list of images, list of targets); images may differ in size."""
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


def init_worker(worker: int) -> None:
    """For a DataLoader's workers: each uses one thread."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def dataset_paths(root: str | Path | None, *, keypoints: bool = False) -> dict[str, tuple[Path, Path]]:
    """{"train", "val"} -> (image folder, annotation file) of the COCO 2017 layout below `root`.

    A folder name stored as a small text file (a symbolic link that an archive or checkout could not keep) is
    followed if it names a folder beside it. Files are not looked for otherwise.
    """
    if root is None:
        return {}
    root = Path(root)
    kind = "person_keypoints" if keypoints else "instances"
    return {
        split: (_follow(root / f"{split}2017"), root / "annotations" / f"{kind}_{split}2017.json")
        for split in ("train", "val")
    }


def _follow(folder: Path) -> Path:
    if folder.is_file() and folder.stat().st_size < 256:
        name = folder.read_text(errors="replace").strip()
        beside = folder.parent / name
        if name and Path(name).name == name and beside.is_dir():
            return beside
    return folder


def check_same_classes(train: Any, val: Any) -> None:
    """Raises UserError, naming the class, unless two CocoDatasets have the same categories."""
    ours, theirs = (dict(zip(d.category_ids, d.classes, strict=True)) for d in (train, val))
    for category_id in sorted(ours.keys() | theirs.keys()):
        mine, other = ours.get(category_id), theirs.get(category_id)
        if mine != other:
            raise UserError(
                f"{val.annotation_file}: category {category_id} is {_named(other)}, but {_named(mine)} in "
                f"{train.annotation_file}; both files must list the same categories"
            )


def _named(name: str | None) -> str:
    return "missing" if name is None else repr(name)
