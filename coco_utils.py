"""COCO-format data: an annotation file and an image folder as a Dataset; category id ↔ label.

    python3 coco_utils.py check ANNOTATIONS [--images DIR]
    python3 coco_utils.py download DIR

Letters: N objects of an image, J keypoints, K classes (labels 1..K, 0 background).
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch

import coco_check
import coco_download
import image_files
from coco_index import BadAnnotationFile, CocoIndex, Finding, read_index
from masks import CroppedMasks
from transforms import Target, Transform
from utils import UserError

Sample = tuple[torch.Tensor, Target]

MIN_VISIBLE_KEYPOINTS = (
    10  # in an image to be trained on, for COCO's 17 keypoints; as in torchvision's reference
)
NUM_HEADERS_CHECKED = (
    256  # images whose headers are read before training; a set of up to so many is read whole
)


class CocoDataset(torch.utils.data.Dataset):
    """Images and targets of one COCO annotation file.

    image_folder, annotation_file: paths. The file's `file_name`s are relative to the folder and stay inside it.
    transforms: (image, target, rng) -> (image, target), or None. It may be set later.
    with_masks: targets have "masks", and what has no segmentation is no object. with_keypoints: targets have
        "keypoints".
    training: leave out images without objects to learn from, as torchvision's reference does: those with none but
        crowds, with boxes of a side of at most one pixel alone, or, with keypoints, with too few visible ones (10
        in an image for COCO's 17 keypoints of a person; 1 for any other skeleton). keep_empty: leave them in.
    num_samples: at most so many images, drawn from `seed` alone, so they are the same on every rank.
    seed: of the subset, and of the transforms' randomness, which depends on (seed, epoch, index) alone.
    batch_transform: (list of samples, rng) -> list of samples, for what mixes the images of a batch.
    skip_broken: give the next image in place of one that cannot be decoded, with a warning. Which one that is
        depends on the files alone, so all ranks and runs do the same.

    A key is an index, or (epoch, index). A sample is (image, target): image uint8 [3, H, W], RGB; target a dict of
    boxes float32 [N, 4] xyxy pixels, labels int64 [N], image_id int and, as asked for, masks (CroppedMasks of N) and
    keypoints float32 [N, J, 3] (x, y, visibility). Crowds are never objects.

    Raises UserError for an annotation file that cannot be used, for images that are missing, lie outside the folder,
    or (ImageError) are broken or of another size than the file says. Warns of annotations that are left out.
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
        batch_transform: Callable[[list[Sample], np.random.Generator], list[Sample]] | None = None,
        skip_broken: bool = False,
    ) -> None:
        self.image_folder, self.annotation_file = Path(image_folder), Path(annotation_file)
        self.transforms, self.batch_transform, self.seed = transforms, batch_transform, seed
        self.with_masks, self.with_keypoints, self.skip_broken = with_masks, with_keypoints, skip_broken
        self.index = index = load_index(self.annotation_file)
        if with_keypoints and not index.keypoint_names:
            raise UserError(
                f"{annotation_file}: no category has keypoints; take a person_keypoints file, or a model without"
            )
        self._is_target = ~index.crowd & index.has_mask if with_masks else ~index.crowd
        self._images = np.arange(len(index.image_ids))  # place in the index of each image of this data set
        if training and not keep_empty:
            self._images = np.flatnonzero(_images_to_learn_from(index, self._is_target, with_keypoints))
            if len(self._images) == 0:
                kind = "keypoints" if with_keypoints else "a mask" if with_masks else "a box"
                raise UserError(
                    f"{annotation_file}: none of {len(index.image_ids)} images has an object with {kind} to train on "
                    f"({len(index.labels)} annotations, {int(index.crowd.sum())} of them crowd, "
                    f"{int(self._is_target.sum())} usable); --keep-empty trains on images without objects too"
                )
        if num_samples is not None:
            if num_samples < 1:
                raise UserError(f"a subset of {num_samples} images; it must have at least one")
            drawn = np.random.default_rng(seed).permutation(len(self._images))[:num_samples]
            self._images = self._images[np.sort(drawn)]
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
        mirrored = [n.replace("left", "\0").replace("right", "left").replace("\0", "right") for n in names]
        return [names.index(other) if other in names else n for n, other in enumerate(mirrored)]

    @property
    def image_ids(self) -> list[int]:
        return self.index.image_ids[self._images].tolist()

    @property
    def image_sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each image, from the json."""
        return [(height, width) for height, width in self.index.sizes[self._images].tolist()]

    @property
    def aspect_ratios(self) -> np.ndarray:
        """float64 [images], width / height."""
        sizes = self.index.sizes[self._images]
        return sizes[:, 1] / sizes[:, 0]

    def __len__(self) -> int:
        return len(self._images)

    # ------------------------------------------------------------------ samples

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        image, target = self._load(index)
        if self.transforms is not None:
            rng = np.random.default_rng((self.seed, epoch, index))
            image, target = self.transforms(image, target, rng)
        return image, target

    def __getitems__(self, keys: Sequence[int | tuple[int, int]]) -> list[Sample]:
        """The samples of one batch, through the batch transform; what a DataLoader calls."""
        samples = [self[key] for key in keys]
        if self.batch_transform is not None:
            entropy = np.array([key if isinstance(key, tuple) else (0, key) for key in keys]).reshape(-1)
            samples = self.batch_transform(samples, np.random.default_rng([self.seed, *entropy.tolist()]))
        return samples

    def picture(self, index: int) -> tuple[np.ndarray, Target]:
        """An image as uint8 [H, W, 3], RGB, and its target, without transforms: to look at."""
        image, target = self._load(index)
        return image.permute(1, 2, 0).numpy(), target

    def _load(self, index: int) -> Sample:
        """One image and target without transforms; the next one's if it is broken and may be skipped."""
        for attempt in range(len(self)):
            place = self._images[(index + attempt) % len(self)]
            try:
                pixels = image_files.read_image(self._path(place), tuple(self.index.sizes[place].tolist()))
            except image_files.ImageError as error:
                if not self.skip_broken:
                    raise
                warnings.warn(f"{error} (skipped: the next image takes its place)", stacklevel=2)
                continue
            return torch.from_numpy(pixels).permute(2, 0, 1), self._target(place)
        raise UserError(
            f"{self.image_folder}: none of the {len(self)} images can be decoded; check the folder"
        )

    def _path(self, place: int) -> Path:
        return self.image_folder / self.index.file_names[place]

    def _target(self, place: int) -> Target:
        index = self.index
        found = np.arange(index.first[place], index.first[place + 1])
        found = found[self._is_target[found]]
        target: Target = {
            "boxes": torch.from_numpy(index.boxes[found]),
            "labels": torch.from_numpy(index.labels[found]),
            "image_id": int(index.image_ids[place]),
        }
        if self.with_masks:
            segmentations = [index.segmentations[n] for n in found.tolist()]
            target["masks"] = CroppedMasks.from_segmentations(segmentations, *index.sizes[place].tolist())
        if self.with_keypoints:
            target["keypoints"] = torch.from_numpy(index.keypoints[found])
        return target

    def _check_files(self) -> None:
        """Raises UserError for images that are missing or outside, and for broken headers among the first looked at.

        Headers: of all images in a small set, of NUM_HEADERS_CHECKED spread over a large one.
        """
        if not self.image_folder.is_dir():
            raise UserError(f"{self.image_folder}: no such folder of images; check the path")
        names = self.index.file_names.tolist()
        names = [names[place] for place in self._images.tolist()]
        missing, escaping = image_files.find_faults(self.image_folder, names)
        for found, what, remedy in (
            (escaping, "lie outside the folder by a link", "copy them into it"),
            (missing, "are missing", "check the folder"),
        ):
            if found:
                more = f", and {len(found) - 10} more" if len(found) > 10 else ""
                raise UserError(
                    f"{self.image_folder}: {len(found)} of {len(self)} images of {self.annotation_file} {what} "
                    f"({', '.join(found[:10])}{more}); {remedy}"
                )
        if self.skip_broken:
            return
        spread = np.unique(np.linspace(0, len(self) - 1, min(len(self), NUM_HEADERS_CHECKED)).astype(int))
        turned = []
        for place in self._images[spread].tolist():
            header = image_files.read_header(self._path(place), tuple(self.index.sizes[place].tolist()))
            if header.orientation != 1:
                turned.append(self._path(place).name)
        if turned:
            warnings.warn(
                f"{self.image_folder}: {len(turned)} of {len(spread)} images looked at have an EXIF orientation "
                f"({', '.join(turned[:3])}{', …' * (len(turned) > 3)}): it is not applied, pixels are taken as stored",
                stacklevel=3,
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
        warnings.warn(f"{annotation_file}: {len(found)} {kind} ({examples}): {found[0].action}", stacklevel=3)
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


def check_same_classes(train: CocoDataset, val: CocoDataset) -> None:
    """Raises UserError, naming the class, unless the two data sets have the same categories."""
    ours, theirs = (dict(zip(d.category_ids, d.classes, strict=True)) for d in (train, val))
    for category_id in sorted(ours.keys() | theirs.keys()):
        names = [repr(d[category_id]) if category_id in d else "missing" for d in (ours, theirs)]
        if names[0] != names[1]:
            raise UserError(
                f"{val.annotation_file}: category {category_id} is {names[1]}, but {names[0]} in "
                f"{train.annotation_file}; both files must list the same categories"
            )


# --- loading ---------------------------------------------------------------------------------------------------


def collate(samples: Sequence[Sample]) -> tuple[list[torch.Tensor], list[Target]]:
    """Samples -> (list of images, list of targets); images may differ in size."""
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


def init_worker(worker: int) -> None:
    """For a DataLoader's workers: each computes in one thread."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def dataset_paths(root: str | Path | None, *, keypoints: bool = False) -> dict[str, tuple[Path, Path]]:
    """{"train", "val"} -> (image folder, annotation file) of the COCO 2017 layout below `root`; {} for None.

    A folder that is a small text file naming a folder beside it (what is left of a symbolic link where links could
    not be kept) stands for that folder.
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
        if name and Path(name).name == name and (folder.parent / name).is_dir():
            return folder.parent / name
    return folder


# --- the commands ------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: of check 0 clean, 1 warnings, 2 errors; of download 0 done, 1 failed; 2 for bad arguments."""
    parser = argparse.ArgumentParser(description="Check or download data sets in COCO's format.")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="name everything that is wrong with an annotation file")
    check.add_argument("annotations", type=Path, help="a COCO annotation file")
    check.add_argument(
        "--images", type=Path, help="its image folder: decode every image too (default: do not)"
    )
    download = commands.add_parser("download", help="fetch COCO 2017: 20 GB, resumable, verified")
    download.add_argument("folder", type=Path, help="where to; --data-path for training")
    args = parser.parse_args(arguments)
    if args.command == "check":
        return coco_check.check(args.annotations, args.images)
    try:
        coco_download.download(args.folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
