"""Batches of like-shaped images: one order per (seed, epoch), dealt to any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch


def create_aspect_ratio_groups(aspect_ratios: Sequence[float] | np.ndarray, k: int) -> np.ndarray:
    """Group number of each image, int64 [images].

    aspect_ratios: width / height of each image.
    k: half the number of bins; their edges are 2k + 1 powers of two from 1/2 to 2, for k = 0 the one edge 1.
        A negative k puts all images into one group.
    Source: torchvision's reference, `--aspect-ratio-group-factor`.
    """
    ratios = np.asarray(aspect_ratios, np.float64)
    if k < 0:
        return np.zeros(len(ratios), np.int64)
    edges = 2 ** np.linspace(-1, 1, 2 * k + 1) if k > 0 else np.ones(1)
    return np.searchsorted(edges, ratios, side="right").astype(np.int64)


class GroupedBatchSampler(torch.utils.data.Sampler[list[tuple[int, int]]]):
    """This rank's batches of one epoch, each a list of (epoch, index) keys of images of one group.

    Global batches (batch_size × num_ranks images of one group) are formed once, from an order that depends
    on (seed, epoch) alone, and cut into equal parts, one a rank. So at a step all ranks work on like shapes,
    and two ranks with batches of 4 see the images that one rank with batches of 8 sees. All batches are full
    and every rank has the same number of them, images // (batch_size × num_ranks): what is left of a group
    at the end is filled up with images of that group, as torchvision's reference does, or left out.

    group_ids: int [images], from create_aspect_ratio_groups.
    batch_size: images a rank and step.
    Raises ValueError if there are fewer images than one global batch holds.
    """

    def __init__(
        self,
        group_ids: Sequence[int] | np.ndarray,
        batch_size: int,
        *,
        rank: int = 0,
        num_ranks: int = 1,
        seed: int = 0,
    ) -> None:
        self.group_ids = np.asarray(group_ids, np.int64)
        self.batch_size, self.rank, self.num_ranks, self.seed = batch_size, rank, num_ranks, seed
        self.epoch, self.start_batch = 0, 0
        if not 0 <= rank < num_ranks:
            raise ValueError(f"rank {rank} of {num_ranks} ranks does not exist; ranks count from 0")
        if batch_size < 1:
            raise ValueError(f"a batch of {batch_size} images; --batch-size must be at least 1")
        if len(self) == 0:
            raise ValueError(
                f"{len(self.group_ids)} training images do not fill one batch of {batch_size} images on "
                f"each of {num_ranks} ranks ({batch_size * num_ranks} images); choose a smaller --batch-size"
            )

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """The next iteration gives epoch `epoch` from batch `start_batch` on (to resume within an epoch)."""
        self.epoch, self.start_batch = epoch, start_batch

    def __len__(self) -> int:
        """Batches of a whole epoch, whatever `start_batch`."""
        return len(self.group_ids) // (self.batch_size * self.num_ranks)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first = self.rank * self.batch_size
        for batch in self._global_batches()[self.start_batch :, first : first + self.batch_size]:
            yield [(self.epoch, index) for index in batch.tolist()]

    def _global_batches(self) -> np.ndarray:
        """int64 [len(self), batch_size * num_ranks]: image indices of the epoch, the same on every rank."""
        num_images = len(self.group_ids)
        size = self.batch_size * self.num_ranks
        # Samples draw from (seed, epoch, index); no index is num_images, so this stream is none of theirs.
        order = np.random.default_rng((self.seed, self.epoch, num_images)).permutation(num_images)
        groups = self.group_ids[order]
        batches, completed_at, leftovers = [], [], []
        for group in np.unique(groups):
            places = np.flatnonzero(groups == group)
            num_full = len(places) // size
            batches.append(order[places[: num_full * size]].reshape(num_full, size))
            completed_at.append(places[size - 1 : num_full * size : size])
            leftovers.append((places[num_full * size :], places))
        batches = np.concatenate(batches)[np.argsort(np.concatenate(completed_at))]
        leftovers.sort(key=lambda pair: -len(pair[0]))
        filled = [
            order[np.concatenate([left, np.resize(places, size - len(left))])]
            for left, places in leftovers[: len(self) - len(batches)]
        ]
        return np.concatenate([batches, *(row[None] for row in filled)])


def evaluation_batches(
    sizes: Sequence[tuple[int, int]], batch_size: int, *, rank: int = 0, num_ranks: int = 1
) -> list[list[int]]:
    """This rank's batches of an evaluation: every image once in all, none twice, like shapes together.

    sizes: (height, width) of each image. Batches are formed once for all ranks and dealt in turn, so the padding
    that an image gets, and with it each digit of its detections, does not depend on the number of ranks.
    Ranks may have one batch more or less than others, or none.
    """
    order = sorted(range(len(sizes)), key=lambda i: (sizes[i][1] / sizes[i][0], sizes[i], i))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return batches[rank::num_ranks]
