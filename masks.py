"""Binary masks of one image's objects, each kept only inside its own rectangle.

A COCO image of 640×480 with 7 objects has 2.1 MB of full-frame masks, of which a tenth lies inside the
objects' rectangles. Everything between the annotation file and the mask loss works on these rectangles.

Letters: N objects, H and W the frame's height and width, h and w a rectangle's. Rectangles are x0, y0, x1, y1
in whole pixels of the frame, x1 and y1 exclusive. Pixels are uint8 in {0, 1}, row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from numbers import Integral, Real
from typing import Any

import cv2
import numpy as np
import torch
from pycocotools import mask as coco_mask

# Caps that hold before any native code sees a number (its int and malloc arithmetic is unchecked).
MAX_PIXELS = 89_478_485  # of a frame: where Pillow begins to warn of decompression bombs, 9,459 × 9,459
MAX_COORDINATE = 100_000.0  # of a polygon, in pixels, either sign
MAX_OUTLINE_PIXELS = (
    4_000_000  # length of one polygon's outline; the rasteriser spends about 80 bytes a pixel of it
)


class CroppedMasks:
    """N binary masks of one image.

    rects: int64 [N, 4], tight around each mask's own pixels; an empty mask has x0 == x1 and y0 == y1.
    offsets: int64 [N + 1], where each bitmap starts in `pixels`.
    pixels: uint8 [sum of h_n * w_n] in {0, 1}, the row-major bitmaps one after another.
    size: (height, width) of the frame.
    """

    __slots__ = ("offsets", "pixels", "rects", "size")

    def __init__(
        self, rects: torch.Tensor, offsets: torch.Tensor, pixels: torch.Tensor, size: tuple[int, int]
    ) -> None:
        self.rects, self.offsets, self.pixels = rects, offsets, pixels
        self.size = (int(size[0]), int(size[1]))

    # ------------------------------------------------------------------ making them

    @classmethod
    def from_segmentations(cls, segmentations: Sequence[Any], height: int, width: int) -> CroppedMasks:
        """Rasterise COCO segmentations, touching only the pixels inside each object's rectangle.

        segmentations: per object either polygons [[x1, y1, x2, y2, ...], ...] in pixels (joined), or an
            RLE dict {"size": [H, W], "counts": compressed str/bytes or list of ints}. A polygon of fewer than
            three points is left out, and so is an odd number at its end.
        Bit-equal to pycocotools' full-frame decode: its own C code turns a polygon into runs (whose cost
        depends on the outline, not on the frame), and only the rectangle they span is painted. (Moving the
        polygon to a small frame would not be exact: 5x + 0.5 rounds otherwise at another x.)
        Raises ValueError for whatever native code must not see: see check_polygon and rle_counts.
        Source: the COCO mask API.
        """
        check_frame(height, width)
        polygons, polygon_owners, rles, rle_owners = [], [], [], []
        for owner, segmentation in enumerate(segmentations):
            if isinstance(segmentation, dict):
                rles.append(rle_counts(segmentation, height, width))
                rle_owners.append(owner)
            else:
                polygons += segmentation
                polygon_owners += [owner] * len(segmentation)
        polygons, kept = _usable_polygons(polygons)
        runs, first = _NO_RUNS, _NO_RUNS
        if polygons:
            runs, first = decode_counts([r["counts"] for r in coco_mask.frPyObjects(polygons, height, width)])
        owners = np.array(polygon_owners, np.int64)[kept]
        if rles:
            first = np.concatenate([first, len(runs) + np.cumsum([0] + [len(rle) for rle in rles[:-1]])])
            runs = np.concatenate([runs, *rles])
            owners = np.concatenate([owners, rle_owners])
        return cls._from_runs(runs, first, owners, len(segmentations), height, width)

    @classmethod
    def _from_runs(
        cls,
        runs: np.ndarray,
        first: np.ndarray,
        owners: np.ndarray,
        num_objects: int,
        height: int,
        width: int,
    ) -> CroppedMasks:
        """Paint run lengths into each object's tight rectangle.

        runs: int64, of all parts one after another; each part fills the frame, column by column, background first.
        first: int64 [parts], where each part's runs start. owners: int64 [parts], the object that a part belongs to.
        """
        part = np.repeat(np.arange(len(first)), np.diff(first, append=len(runs)))
        inked = ((np.arange(len(runs)) - first[part]) % 2 == 1) & (runs > 0)
        ends, part, length = np.cumsum(runs)[inked], part[inked], runs[inked]
        start = (
            ends - length - part * (height * width)
        )  # [R] first pixel of each run, counted down the columns
        owner = owners[part]
        if (owner[1:] < owner[:-1]).any():
            order = np.argsort(owner, kind="stable")
            start, length, owner = start[order], length[order], owner[order]

        rects = np.zeros((num_objects, 4), np.int64)
        x, y = np.divmod(start, height)
        if len(start):
            last_x, last_y = np.divmod(start + length - 1, height)
            wraps = last_x > x  # such a run reaches the frame's lower and upper edge
            newcomer = np.flatnonzero(np.diff(owner, prepend=-1))
            with_pixels = owner[newcomer]
            rects[with_pixels, 0] = np.minimum.reduceat(x, newcomer)
            rects[with_pixels, 1] = np.minimum.reduceat(np.where(wraps, 0, y), newcomer)
            rects[with_pixels, 2] = np.maximum.reduceat(last_x, newcomer) + 1
            rects[with_pixels, 3] = np.maximum.reduceat(np.where(wraps, height - 1, last_y), newcomer) + 1

        w, h = rects[:, 2] - rects[:, 0], rects[:, 3] - rects[:, 1]
        offsets = np.zeros(num_objects + 1, np.int64)
        np.cumsum(w * h, out=offsets[1:])
        # A run that wraps belongs to a rectangle of full height, where the columns still follow one another.
        ink = offsets[owner] + (x - rects[owner, 0]) * h[owner] + (y - rects[owner, 1])
        # The number of parts that cover a pixel, from where it grows and falls.
        depth = np.zeros(offsets[-1] + 1, np.int8 if len(first) < 128 else np.int32)
        np.add.at(depth, ink, depth.dtype.type(1))
        np.subtract.at(depth, ink + length, depth.dtype.type(1))
        columns = (np.cumsum(depth[:-1], dtype=depth.dtype) > 0).view(np.uint8)
        pixels = np.empty_like(columns)
        for lo, hi, rows in zip(offsets[:-1].tolist(), offsets[1:].tolist(), h.tolist(), strict=True):
            if rows:
                cv2.transpose(columns[lo:hi].reshape(-1, rows), dst=pixels[lo:hi].reshape(rows, -1))
        return cls(
            torch.from_numpy(rects), torch.from_numpy(offsets), torch.from_numpy(pixels), (height, width)
        )

    @classmethod
    def from_dense(cls, masks: torch.Tensor) -> CroppedMasks:
        """masks: uint8 or bool [N, H, W], nonzero inside."""
        height, width = masks.shape[1:]
        bitmaps = [(mask, 0, 0) for mask in (masks.cpu() != 0).to(torch.uint8).numpy()]
        return cls._from_bitmaps(bitmaps, (height, width))

    @classmethod
    def _from_bitmaps(cls, bitmaps: list[tuple[np.ndarray, int, int]], size: tuple[int, int]) -> CroppedMasks:
        """bitmaps: per object (uint8 [h, w], x0, y0); each is trimmed to its own pixels."""
        rects = np.zeros((len(bitmaps), 4), np.int64)
        trimmed = []
        for n, (bitmap, x0, y0) in enumerate(bitmaps):
            rows, columns = np.flatnonzero(bitmap.any(axis=1)), np.flatnonzero(bitmap.any(axis=0))
            if len(rows):
                top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
                rects[n] = x0 + left, y0 + top, x0 + right, y0 + bottom
                trimmed.append(bitmap[top:bottom, left:right].reshape(-1))
        offsets = np.zeros(len(bitmaps) + 1, np.int64)
        np.cumsum((rects[:, 2] - rects[:, 0]) * (rects[:, 3] - rects[:, 1]), out=offsets[1:])
        pixels = np.concatenate(trimmed) if trimmed else np.zeros(0, np.uint8)
        return cls(torch.from_numpy(rects), torch.from_numpy(offsets), torch.from_numpy(pixels), size)

    @classmethod
    def cat(cls, parts: Sequence[CroppedMasks]) -> CroppedMasks:
        """The objects of several CroppedMasks of one frame size, in order."""
        sizes = {part.size for part in parts}
        if len(sizes) != 1:
            raise ValueError(
                f"masks of frames {sorted(sizes)} cannot be joined; crop or pad them to one size first"
            )
        starts = np.cumsum([0] + [int(part.offsets[-1]) for part in parts])
        offsets = [part.offsets[:-1] + int(start) for part, start in zip(parts, starts, strict=False)]
        offsets.append(torch.tensor([int(starts[-1])], device=parts[0].offsets.device))
        return cls(
            torch.cat([part.rects for part in parts]),
            torch.cat(offsets),
            torch.cat([part.pixels for part in parts]),
            parts[0].size,
        )

    # ------------------------------------------------------------------ looking at them

    def __len__(self) -> int:
        return self.rects.shape[0]

    def __repr__(self) -> str:
        return f"CroppedMasks({len(self)} of {self.size[0]}×{self.size[1]}, {self.pixels.numel()} pixels)"

    def __getitem__(self, index: int | slice | torch.Tensor) -> CroppedMasks:
        """Some of the objects, by position, slice, bool [N] or int64 [M]; always a CroppedMasks."""
        numbers = torch.arange(len(self), device=self.rects.device)[index].reshape(-1)
        bounds = self.offsets.tolist()
        pieces = [self.pixels[bounds[n] : bounds[n + 1]] for n in numbers.tolist()]
        offsets = torch.zeros(len(pieces) + 1, dtype=torch.int64, device=self.offsets.device)
        torch.cumsum((self.offsets[1:] - self.offsets[:-1])[numbers], 0, out=offsets[1:])
        pixels = torch.cat(pieces) if pieces else self.pixels[:0]
        return CroppedMasks(self.rects[numbers], offsets, pixels, self.size)

    def bitmap(self, n: int) -> torch.Tensor:
        """uint8 [h, w] of one object, a view."""
        x0, y0, x1, y1 = self.rects[n].tolist()
        return self.pixels[self.offsets[n] : self.offsets[n + 1]].view(y1 - y0, x1 - x0)

    def dense(self) -> torch.Tensor:
        """uint8 [N, H, W]."""
        masks = torch.zeros((len(self), *self.size), dtype=torch.uint8, device=self.pixels.device)
        bounds = self.offsets.tolist()
        for n, (x0, y0, x1, y1) in enumerate(self.rects.tolist()):
            masks[n, y0:y1, x0:x1] = self.pixels[bounds[n] : bounds[n + 1]].view(y1 - y0, x1 - x0)
        return masks

    def areas(self) -> torch.Tensor:
        """int64 [N], pixels set in each mask."""
        inked = torch.zeros(len(self.pixels) + 1, dtype=torch.int64, device=self.pixels.device)
        torch.cumsum(self.pixels, 0, out=inked[1:])
        return inked[self.offsets[1:]] - inked[self.offsets[:-1]]

    def union(self) -> torch.Tensor:
        """uint8 [H, W]: 1 where any object is."""
        cover = torch.zeros(self.size, dtype=torch.uint8)
        for bitmap, x0, y0 in self._bitmaps():
            cover[y0 : y0 + bitmap.shape[0], x0 : x0 + bitmap.shape[1]] |= torch.from_numpy(bitmap)
        return cover

    def _bitmaps(self) -> list[tuple[np.ndarray, int, int]]:
        pixels, bounds = self.pixels.numpy(), self.offsets.tolist()
        return [
            (pixels[bounds[n] : bounds[n + 1]].reshape(y1 - y0, x1 - x0), x0, y0)
            for n, (x0, y0, x1, y1) in enumerate(self.rects.tolist())
        ]

    # ------------------------------------------------------------------ changing the frame (on the CPU)

    def hflip(self) -> CroppedMasks:
        """Mirrored left to right."""
        rects = self.rects.clone()
        rects[:, 0], rects[:, 2] = self.size[1] - self.rects[:, 2], self.size[1] - self.rects[:, 0]
        empty = self.rects[:, 0] == self.rects[:, 2]
        rects[empty] = self.rects[empty]
        pixels = torch.empty_like(self.pixels)
        mirrored = CroppedMasks(rects, self.offsets, pixels, self.size)
        for (bitmap, _, _), (target, _, _) in zip(self._bitmaps(), mirrored._bitmaps(), strict=True):
            if bitmap.size:
                cv2.flip(bitmap, 1, dst=target)
        return mirrored

    def resize(self, height: int, width: int) -> CroppedMasks:
        """Nearest neighbour, exactly torch's interpolate(mode="nearest") on the dense masks."""
        rows, columns = _nearest_source(self.size[0], height), _nearest_source(self.size[1], width)
        resized = []
        for bitmap, x0, y0 in self._bitmaps():
            top, bottom = np.searchsorted(rows, (y0, y0 + bitmap.shape[0]))
            left, right = np.searchsorted(columns, (x0, x0 + bitmap.shape[1]))
            resized.append((bitmap[rows[top:bottom] - y0][:, columns[left:right] - x0], left, top))
        return self._from_bitmaps(resized, (height, width))

    def crop(self, x0: int, y0: int, x1: int, y1: int) -> CroppedMasks:
        """What lies inside the rectangle x0, y0, x1, y1 of the frame becomes the new frame."""
        height, width = self.size
        if not (0 <= x0 <= x1 <= width and 0 <= y0 <= y1 <= height):
            raise ValueError(f"crop {(x0, y0, x1, y1)} reaches outside the frame of {height}×{width}")
        inside = []
        for bitmap, left, top in self._bitmaps():
            from_x, from_y = max(x0 - left, 0), max(y0 - top, 0)
            part = bitmap[from_y : max(y1 - top, 0), from_x : max(x1 - left, 0)]
            inside.append((part, left + from_x - x0, top + from_y - y0))
        return self._from_bitmaps(inside, (y1 - y0, x1 - x0))

    def pad(self, left: int, top: int, right: int, bottom: int) -> CroppedMasks:
        """The frame grows by so many empty pixels on each side."""
        shift = torch.tensor([left, top, left, top], dtype=torch.int64)
        size = (self.size[0] + top + bottom, self.size[1] + left + right)
        return CroppedMasks(self.rects + shift, self.offsets, self.pixels, size)

    def without(self, cover: torch.Tensor) -> CroppedMasks:
        """What is left where `cover`, uint8 [H, W], is 0."""
        cover = cover.numpy()
        left_over = [
            (bitmap & (cover[y0 : y0 + bitmap.shape[0], x0 : x0 + bitmap.shape[1]] == 0), x0, y0)
            for bitmap, x0, y0 in self._bitmaps()
        ]
        return self._from_bitmaps(left_over, self.size)

    # ------------------------------------------------------------------ moving them

    def to(self, device: torch.device | str, non_blocking: bool = False) -> CroppedMasks:
        tensors = (t.to(device, non_blocking=non_blocking) for t in (self.rects, self.offsets, self.pixels))
        return CroppedMasks(*tensors, self.size)

    def pin_memory(self) -> CroppedMasks:
        return CroppedMasks(
            self.rects.pin_memory(), self.offsets.pin_memory(), self.pixels.pin_memory(), self.size
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return CroppedMasks, (self.rects, self.offsets, self.pixels, self.size)


_NO_RUNS = np.zeros(0, np.int64)


def check_frame(height: int, width: int) -> None:
    """Raises ValueError unless a frame has at least one and at most MAX_PIXELS pixels."""
    if height < 1 or width < 1 or height * width > MAX_PIXELS:
        raise ValueError(
            f"a frame of {height}×{width} pixels; it must have at least one and at most {MAX_PIXELS:,} pixels"
        )


def _usable_polygons(polygons: list[Any]) -> tuple[list[np.ndarray], list[int]]:
    """(polygons of three and more points as float64 [2 * points], which ones they are). Raises as check_polygon does.

    All in one pass, since a call of numpy for each polygon costs more than rasterising it.
    """
    try:
        lengths = [len(polygon) for polygon in polygons]
        numbers = list(chain.from_iterable(polygons))
        values = np.array(numbers, np.float64) if set(map(type, numbers)) <= {int, float} else None
    except (TypeError, OverflowError):
        values = None
    # An outline is no longer than its points times twice the largest coordinate.
    if values is not None and len(values):
        largest = np.abs(values).max()
        if largest <= MAX_COORDINATE and largest * max(lengths) <= MAX_OUTLINE_PIXELS:
            ends = np.cumsum(lengths).tolist()
            kept = [n for n, length in enumerate(lengths) if length >= 6]
            return [values[ends[n] - lengths[n] : ends[n] - lengths[n] % 2] for n in kept], kept
    checked = [check_polygon(polygon) for polygon in polygons]
    kept = [n for n, points in enumerate(checked) if points is not None]
    return [checked[n] for n in kept], kept


def check_polygon(polygon: Any) -> np.ndarray | None:
    """One polygon as float64 [2 * points], or None where it has fewer than three points.

    polygon: numbers x1, y1, x2, y2, ... in pixels. An odd number at the end is left out, as pycocotools does.
    Raises ValueError for anything but a list of finite numbers within ±MAX_COORDINATE and an outline of at
    most MAX_OUTLINE_PIXELS: the native rasteriser crashes on them.
    """
    if not isinstance(polygon, (list, tuple, np.ndarray)):
        raise ValueError(
            f"polygon {polygon!r:.40} is not a list; a segmentation is a list of polygons, [[x1, y1, ...]]"
        )
    for kind in set(map(type, polygon)) if not isinstance(polygon, np.ndarray) else ():
        if not issubclass(kind, Real) or kind is bool:
            raise ValueError(f"polygon holds a {kind.__name__}, not numbers alone")
    if isinstance(polygon, np.ndarray) and (polygon.ndim != 1 or polygon.dtype.kind not in "fiu"):
        raise ValueError(
            f"polygon is an array of {polygon.dtype} {list(polygon.shape)}; give one row of numbers"
        )
    try:
        points = np.asarray(polygon[: len(polygon) // 2 * 2], np.float64)
    except OverflowError:
        raise ValueError("polygon holds an integer beyond the range of a double") from None
    if not np.isfinite(points).all():
        raise ValueError("polygon holds NaN or infinity")
    if points.size and np.abs(points).max() > MAX_COORDINATE:
        worst = points[np.abs(points).argmax()]
        raise ValueError(f"polygon has coordinate {worst:g}, beyond ±{MAX_COORDINATE:g} pixels")
    if points.size < 6:
        return None
    x, y = points[0::2], points[1::2]
    outline = np.maximum(np.abs(np.diff(x, append=x[0])), np.abs(np.diff(y, append=y[0]))).sum()
    if outline > MAX_OUTLINE_PIXELS:
        raise ValueError(f"polygon has an outline of {outline:,.0f} pixels, more than {MAX_OUTLINE_PIXELS:,}")
    return points


def rle_counts(rle: dict[str, Any], height: int, width: int) -> np.ndarray:
    """Run lengths, int64 [runs], of one RLE, column by column, background first.

    rle: {"size": [H, W], "counts": compressed str or bytes, or list of ints}.
    Raises ValueError unless the size is (height, width) and the runs are non-negative and fill it exactly:
    native code reads or writes past its buffers otherwise.
    """
    size = rle.get("size")
    if not isinstance(size, (list, tuple)) or [*size] != [height, width]:
        raise ValueError(f"RLE has size {size!r:.60}, but its image is {[height, width]} (height, width)")
    counts = rle.get("counts")
    if isinstance(counts, str):
        try:
            counts = counts.encode("ascii")
        except UnicodeEncodeError:
            raise ValueError("RLE counts hold characters outside the COCO alphabet") from None
    if isinstance(counts, bytes):
        runs = decode_counts([counts])[0]
    elif isinstance(counts, (list, tuple)):
        for kind in set(map(type, counts)):
            if not issubclass(kind, Integral) or kind is bool:
                raise ValueError(f"RLE counts hold a {kind.__name__}, not integers alone")
        if counts and not -1 < min(counts) <= max(counts) <= height * width:  # before they overflow int64
            raise ValueError(
                f"RLE has runs from {min(counts)} to {max(counts)}; none is negative or beyond {height}×{width} pixels"
            )
        runs = np.array(counts, np.int64)
    else:
        raise ValueError(f"RLE counts {counts!r:.40} are neither text nor a list of integers")
    if (runs < 0).any():
        raise ValueError("RLE has a negative run")
    if runs.sum() != height * width:
        raise ValueError(
            f"RLE runs cover {runs.sum()} pixels; they must cover all {height * width} of {height}×{width}"
        )
    return runs


def decode_counts(strings: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """(run lengths of all strings, int64 [runs]; where each string's start, int64 [strings]), of compressed counts.

    A character carries 5 bits, low bits first, and a sixth that says "more to come"; the fifth bit of a
    number's last character is its sign; from the fourth number on it is the difference to the number two
    before.
    Raises ValueError for a character outside the alphabet, for a number cut off or of over 7 characters, and for an
    empty string.
    """
    codes = np.frombuffer(b"".join(strings), np.uint8).astype(np.int64) - 48
    if codes.size and (codes.min() < 0 or codes.max() > 63):
        raise ValueError("RLE counts hold characters outside the COCO alphabet")
    string_ends = np.cumsum([len(s) for s in strings])
    last = np.flatnonzero(codes < 32)  # [numbers] the last character of each
    last_of_string = np.searchsorted(last, string_ends - 1)
    if len(last) < len(strings) or (last.take(last_of_string, mode="clip") != string_ends - 1).any():
        raise ValueError("RLE counts end in the middle of a number")
    begin = np.concatenate([_NO_RUNS, [0], last[:-1] + 1])
    width = last - begin + 1
    if width.max() > 7:
        raise ValueError("RLE counts hold a number of more than 35 bits")
    place = np.arange(codes.size) - np.repeat(begin, width)
    numbers = np.add.reduceat((codes & 31) << (5 * place), begin)
    numbers -= np.where(codes[last] & 16, 1 << (5 * width), 0)
    # Sum up every other number of a string, the odd ones from its second and the even ones from its third on.
    first = np.concatenate([_NO_RUNS, [0], last_of_string[:-1] + 1])
    part = np.repeat(np.arange(len(first)), np.diff(first, append=len(numbers)))
    place = np.arange(len(numbers)) - first[part]
    odd = np.cumsum(np.where(place % 2 == 1, numbers, 0))
    even = np.cumsum(np.where((place % 2 == 0) & (place > 0), numbers, 0))
    runs = np.where(place % 2 == 1, odd - odd[first][part], even - even[first][part])
    runs[first] = numbers[first]
    return runs, first


@lru_cache(maxsize=256)
def _nearest_source(source: int, target: int) -> np.ndarray:
    """int64 [target]: the pixel that torch's nearest interpolation takes for each one of an axis."""
    line = torch.arange(source, dtype=torch.float64).view(1, 1, source, 1)
    return torch.nn.functional.interpolate(line, size=(target, 1), mode="nearest").view(-1).long().numpy()
