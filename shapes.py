"""The built-in data set: seeded pictures of shapes, written once as COCO 2017 json and PNG files.

Six classes of textured shapes on textured backgrounds, with clutter, overlap, holes, concave outlines,
truncation, crowds and images without objects. Stars carry five keypoints. Every pixel and every number
comes from integer arithmetic on a frozen random stream, so the data set is the same on every machine
and with every version of numpy and OpenCV; only the PNG compression may differ.

Letters: H, W height and width of an image in pixels. Positions in it and radii are whole numbers, 16 to the
pixel; the centre of pixel (x, y) is at (16x + 8, 16y + 8).
"""

import argparse
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from pycocotools import mask as coco_mask

# Names the cache folder. Raise it with every change of a pixel or an annotation: old caches then stay unread.
VERSION = 3

# --- difficulty ----------------------------------------------------------------------------------

# (height, width, weight). All of them become 128 pixels on the short side and 128 or 160 on the long one
# without rounding, and are wide enough for objects above COCO's 96 x 96.
IMAGE_SIZES = ((160, 160, 6), (160, 200, 4), (200, 160, 4), (144, 180, 3), (180, 144, 3))
# name -> (category id, radius in percent of the side of a square of the same area, weight).
# The ids have gaps, as COCO's have.
CLASSES = {
    "disc": (2, 56, 2),
    "ring": (3, 67, 2),
    "square": (7, 71, 2),
    "triangle": (8, 88, 2),
    "star": (13, 86, 3),
    "crescent": (21, 72, 2),
}
# (smallest, largest, weight): the square root of an object's area, in thousandths of the image's short side.
SCALES = ((620, 700, 8), (230, 500, 84), (130, 190, 8))
OBJECT_COUNTS = (1, 2, 3, 3, 3, 4, 4, 5)  # one is drawn for each image
MAX_TURN = 30  # degrees either way; a star is turned by half of it at most
STRETCH = 12  # an object is up to this many 64ths longer than wide
MIN_VISIBLE = 85  # percent of an object that must stay visible under those painted after it
MIN_INSIDE = 85  # percent of its extent, along x and along y, that must lie in the image
PLACING_TRIES = 12
# Lowest and highest R, G, B of a texture's mean colour. Objects are mostly the brighter ones, so that a short
# training from scratch is spent on their shapes rather than on telling them from the background.
BACKGROUND_COLOURS = (15, 105)
OBJECT_COLOURS = (90, 250)
MIN_CONTRAST = 170  # of an object's colour to the background and to every other object, sum over R, G, B
BACKGROUND_VARIATION = 30  # of a texture around its mean, each of R, G, B
OBJECT_VARIATION = 30
NOISE = 4
MAX_CLUTTER = 7  # bars and specks of no class in the background
CROWD_EVERY = 16  # one image in this many has a crowd region, the second one first
EMPTY_EVERY = 50  # two images in this many have no objects: the second, with a crowd, and the third first

# --- shapes --------------------------------------------------------------------------------------

# Radius of a shape in its own frame, and 1.0 of the sine table. Small enough for products in int32: with
# int64 drawing took twice as long, as malloc asks the kernel for each array of that size.
ONE = 1 << 12
COS = np.rint(np.cos(np.deg2rad(np.arange(360))) * ONE).astype(np.int32)
SIN = np.rint(np.sin(np.deg2rad(np.arange(360))) * ONE).astype(np.int32)


def _corners(*polar):
    """Polygon from (degrees, percent of the radius) pairs: int32 [corners, 2], in the shape's own frame."""
    return np.array([(COS[d % 360] * r // 100, SIN[d % 360] * r // 100) for d, r in polar])


# The y axis points down, so -90 degrees is the top.
TRIANGLE = _corners((-90, 100), (30, 100), (150, 100))
STAR = _corners(*((-90 + 36 * i, 46 if i % 2 else 100) for i in range(10)))

KEYPOINT_CLASS = "star"
# A fifth of the way in from each tip. A star is turned by less than 36 degrees, half the way to the next
# tip, so that the names are unambiguous; left and right are those of the viewer.
KEYPOINTS = {
    "top": (-90, 80),
    "left_arm": (-162, 80),
    "right_arm": (-18, 80),
    "left_foot": (126, 80),
    "right_foot": (54, 80),
}
SKELETON = [[1, 2], [1, 3], [2, 4], [3, 5], [4, 5]]
# Spread of each keypoint for the similarity of COCO's keypoint metric, about that of COCO's hips.
KEYPOINT_SIGMA = 0.1


class Shape(NamedTuple):
    """One shape in its place; x, y (of its centre) and radius are 16 to the pixel."""

    kind: str
    x: int
    y: int
    radius: int
    degrees: int  # clockwise, as y points down
    stretch: int  # half the length along the own vertical axis, in 64ths of the radius

    @property
    def reach(self):
        """No pixel of the shape lies farther from its centre along x or y."""
        return self.radius * self.stretch // 64 + 16


def _in_polygon(p, q, corners):
    """Even-odd rule: bool array, True where (p, q) lies inside the polygon."""
    inside = np.zeros(p.shape, dtype=bool)
    for (p1, q1), (p2, q2) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        if q1 == q2:
            continue
        if q1 > q2:
            p1, q1, p2, q2 = p2, q2, p1, q1
        crosses = (q1 <= q) & (q < q2) & ((p - p1) * (q2 - q1) < (q - q1) * (p2 - p1))
        inside ^= crosses
    return inside


def _in_shape(kind, p, q):
    """Membership in a shape of radius ONE: bool array for int32 coordinates of the shape's own frame.

    No point of it lies farther than ONE from the centre, a bar's corners excepted, by less than a pixel.
    """
    if kind == "disc":
        return p * p + q * q <= ONE * ONE
    if kind == "ring":
        squared = p * p + q * q
        return (squared <= ONE * ONE) & (squared >= ONE * ONE * 30 // 100)
    if kind == "square":
        return np.maximum(abs(p), abs(q)) <= ONE * 7 // 10
    if kind == "triangle":
        return _in_polygon(p, q, TRIANGLE)
    if kind == "star":
        return _in_polygon(p, q, STAR)
    if kind == "crescent":
        bite = p - ONE * 7 // 10
        return (p * p + q * q <= ONE * ONE) & (bite * bite + q * q > ONE * ONE * 60 // 100)
    assert kind == "bar", kind
    return (abs(p) <= ONE // 16) & (abs(q) <= ONE)


def draw_mask(shape, height, width):
    """Pixels whose centre lies in the shape: bool [height, width]."""
    mask = np.zeros((height, width), dtype=bool)
    x0, x1 = np.clip([(shape.x - shape.reach) // 16, (shape.x + shape.reach) // 16 + 1], 0, width)
    y0, y1 = np.clip([(shape.y - shape.reach) // 16, (shape.y + shape.reach) // 16 + 1], 0, height)
    dx = np.arange(x0 * 16 + 8 - shape.x, x1 * 16 + 8 - shape.x, 16, dtype=np.int32)[None, :]
    dy = np.arange(y0 * 16 + 8 - shape.y, y1 * 16 + 8 - shape.y, 16, dtype=np.int32)[:, None]
    cos, sin = COS[shape.degrees % 360], SIN[shape.degrees % 360]
    p = (dx * cos + dy * sin) // shape.radius  # int32 [H, W] of the box around the shape
    q = (dy * cos - dx * sin) // shape.radius * 64 // shape.stretch
    mask[y0:y1, x0:x1] = _in_shape(shape.kind, p, q)
    return mask


def locate_keypoints(shape, visible):
    """Keypoints of a star in COCO's form: [x1, y1, v1, x2, ...], whole pixels, in the order of KEYPOINTS.

    visible: bool [H, W], the star's visible pixels. v is 2 on them, 1 where something covers the
    star, and 0 (with x = y = 0) outside the image.
    """
    height, width = visible.shape
    cos, sin = int(COS[shape.degrees % 360]), int(SIN[shape.degrees % 360])
    keypoints = []
    for p, q in _corners(*KEYPOINTS.values()).tolist():
        q = q * shape.stretch // 64
        x = (shape.x + (p * cos - q * sin) * shape.radius // (ONE * ONE)) // 16
        y = (shape.y + (p * sin + q * cos) * shape.radius // (ONE * ONE)) // 16
        if 0 <= x < width and 0 <= y < height:
            keypoints += [x, y, 2 if visible[y, x] else 1]
        else:
            keypoints += [0, 0, 0]
    return keypoints


# --- pictures ------------------------------------------------------------------------------------


def _random_stream(*key):
    """RandomState, not Generator: numpy froze its stream, while Generator's may change with a release."""
    return np.random.RandomState(key)


def _draw(rng, low, high, size=None):
    """Random integers in low..high, both included: int, or int64 [size]."""
    drawn = rng.randint(low, high + 1, size=size, dtype=np.int64)
    return int(drawn) if size is None else drawn


def _choose(rng, choices):
    """One of (..., weight) tuples, as often as its weight says."""
    ticket = _draw(rng, 1, sum(choice[-1] for choice in choices))
    for choice in choices:
        ticket -= choice[-1]
        if ticket <= 0:
            return choice
    raise AssertionError("the weights sum to fewer than the tickets")


def _texture(rng, height, width):
    """A random pattern: int32 in 0..255 that broadcasts to [height, width]."""
    kind = _draw(rng, 0, 4)
    if kind == 0:
        return np.full((1, 1), 128, dtype=np.int32)
    x, y = np.arange(width, dtype=np.int32), np.arange(height, dtype=np.int32)
    degrees = _draw(rng, 0, 359)
    along = x[None, :] * COS[degrees] + y[:, None] * SIN[degrees]
    if kind == 1:  # gradient
        along = along - along.min()
        return along * 255 // max(1, int(along.max()))
    if kind == 2:  # stripes
        return (along // (ONE * _draw(rng, 3, 9)) % 2) * 255
    if kind == 3:  # checks
        across = y[:, None] * COS[degrees] - x[None, :] * SIN[degrees]
        period = ONE * _draw(rng, 4, 10)
        return ((along // period + across // period) % 2) * 255
    # Value noise: random values on a grid, linear in between.
    cell = _draw(rng, 5, 24)
    grid = _draw(rng, 0, 255, (height // cell + 2, width // cell + 2)).astype(np.int32)
    y, dy = np.divmod(y, cell)
    rows = (grid[y] * (cell - dy)[:, None] + grid[y + 1] * dy[:, None]) // cell
    x, dx = np.divmod(x, cell)
    return (rows[:, x] * (cell - dx) + rows[:, x + 1] * dx) // cell


def _paint(rng, image, mask, colour, variation):
    """Fill the mask's pixels with a random texture around a colour, in place.

    image: uint8 [3, H, W], RGB. mask: bool [H, W]. colour: int64 [3].
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return
    box = np.s_[..., rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    inside = mask[box]
    first, second = colour + _draw(rng, -variation, variation, (2, 3))
    shades = np.clip(first[:, None] + (second - first)[:, None] * np.arange(256) // 255, 0, 255)  # [3, 256]
    texture = _texture(rng, *inside.shape)
    for channel, shade in zip(image[box], shades.astype(np.uint8), strict=True):
        np.copyto(channel, shade[texture], where=inside)


def _contrasting_colour(rng, colours):
    """A random colour at least MIN_CONTRAST from all the given ones, or the farthest of 16: int64 [3]."""
    candidates = _draw(rng, *OBJECT_COLOURS, (16, 3))
    contrast = abs(candidates[:, None] - np.array(colours)[None]).sum(2).min(1)  # [16]
    enough = contrast >= MIN_CONTRAST
    return candidates[enough.argmax() if enough.any() else contrast.argmax()]


def _turn(rng, kind):
    """Random degrees that this kind of shape may be turned by."""
    most = MAX_TURN // 2 if kind == KEYPOINT_CLASS else MAX_TURN
    return _draw(rng, -most, most)


def _place(rng, kind, radius, height, width):
    """A Shape of this kind and radius at a random place in the image, at least MIN_INSIDE inside."""
    stretch, degrees = 64 + _draw(rng, 0, STRETCH), _turn(rng, kind)
    margin = radius * (2 * MIN_INSIDE - 100) // 100
    x = _draw(rng, min(margin, width * 8), max(width * 16 - margin, width * 8))
    y = _draw(rng, min(margin, height * 8), max(height * 16 - margin, height * 8))
    return Shape(kind, x, y, radius, degrees, stretch)


class Item(NamedTuple):
    """One object of a picture, or one crowd (shape None)."""

    kind: str
    shape: Shape | None
    visible: np.ndarray  # bool [H, W]


class _Picture:
    """An image under construction: what is painted later covers what was painted before."""

    def __init__(self, rng, height, width):
        self.rng = rng
        background = _draw(rng, *BACKGROUND_COLOURS, 3)
        self.colours = [background]
        self.image = np.empty((3, height, width), dtype=np.uint8)
        _paint(rng, self.image, np.ones((height, width), dtype=bool), background, BACKGROUND_VARIATION)
        self.items = []
        self.num_pixels = []  # of each item, before anything covered it

    def add_clutter(self):
        """Bars and specks of any colour, which belong to no class."""
        _, height, width = self.image.shape
        for _ in range(_draw(self.rng, 0, MAX_CLUTTER)):
            kind, radius = ("bar", _draw(self.rng, 96, 480)) if _draw(self.rng, 0, 1) else ("disc", 40)
            x, y = _draw(self.rng, 0, width * 16), _draw(self.rng, 0, height * 16)
            shape = Shape(kind, x, y, radius, _draw(self.rng, 0, 359), 64)
            _paint(self.rng, self.image, draw_mask(shape, height, width), _draw(self.rng, 0, 255, 3), 10)

    def add(self, kind, shape, mask):
        """Paint an item unless it would hide too much of an older one; returns whether it did."""
        left = [item.visible & ~mask for item in self.items]
        if any(v.sum() * 100 < n * MIN_VISIBLE for v, n in zip(left, self.num_pixels, strict=True)):
            return False
        colour = _contrasting_colour(self.rng, self.colours)
        self.colours.append(colour)
        _paint(self.rng, self.image, mask, colour, OBJECT_VARIATION)
        self.items = [item._replace(visible=v) for item, v in zip(self.items, left, strict=True)]
        self.items.append(Item(kind, shape, mask))
        self.num_pixels.append(int(mask.sum()))
        return True

    def add_object(self, kind, radius):
        """Try some places for an object; a crowded picture may stay without it."""
        _, height, width = self.image.shape
        for _ in range(PLACING_TRIES):
            shape = _place(self.rng, kind, radius, height, width)
            if self.add(kind, shape, draw_mask(shape, height, width)):
                return

    def add_crowd(self, kind):
        """A cluster of tiny shapes of one class, all of them one item."""
        _, height, width = self.image.shape
        centre_x, centre_y = _draw(self.rng, 480, width * 16 - 480), _draw(self.rng, 480, height * 16 - 480)
        mask = np.zeros((height, width), dtype=bool)
        for _ in range(_draw(self.rng, 14, 22)):
            x, y = centre_x + _draw(self.rng, -400, 400), centre_y + _draw(self.rng, -400, 400)
            tiny = Shape(kind, x, y, _draw(self.rng, 64, 100), _turn(self.rng, kind), 64)
            mask |= draw_mask(tiny, height, width)
        self.add(kind, None, mask)

    def finish(self):
        """uint8 [H, W, 3], RGB, with a little noise."""
        noise = self.rng.randint(-NOISE, NOISE + 1, size=self.image.shape[1:], dtype=np.int16)
        return np.clip(self.image + noise, 0, 255).astype(np.uint8).transpose(1, 2, 0)


def draw_picture(seed, split, index):
    """Draw one image of the data set: a pure function of its arguments.

    split: 0 for training, 1 for validation. Returns (uint8 [H, W, 3] in RGB, list of Item, oldest first).
    """
    rng = _random_stream(seed, split, index)
    height, width, _ = _choose(rng, IMAGE_SIZES)
    picture = _Picture(rng, height, width)
    picture.add_clutter()
    if index % CROWD_EVERY == 1:
        picture.add_crowd(list(CLASSES)[index // CROWD_EVERY % len(CLASSES)])
    if index % EMPTY_EVERY not in (1, 2):
        count = OBJECT_COUNTS[_draw(rng, 0, len(OBJECT_COUNTS) - 1)]
        # The large ones first: painted later they would bury the others.
        for smallest, largest, _ in sorted((_choose(rng, SCALES) for _ in range(count)), reverse=True):
            kind, percent, _ = _choose(rng, [(name, *values[1:]) for name, values in CLASSES.items()])
            side = _draw(rng, smallest, largest) * min(height, width) * 16 // 1000
            picture.add_object(kind, side * percent // 100)
    return picture.finish(), picture.items


# --- COCO's form ---------------------------------------------------------------------------------


def _outline(mask):
    """Polygons along the pixel edges of a mask, or None if it has a hole.

    mask: bool [H, W]. Returns [[x1, y1, x2, y2, ...], ...] in whole pixels, one closed loop for each part.
    Such polygons decode to exactly the mask, which slanted ones do not.
    """
    padded = np.pad(mask, 1).view(np.uint8)
    above_left, above_right = padded[:-1, :-1], padded[:-1, 1:]
    below_left, below_right = padded[1:, :-1], padded[1:, 1:]
    # A corner lies where one or three of the four pixels around it are set; two where they are set crosswise.
    odd = above_left ^ above_right ^ below_left ^ below_right
    crosswise = (above_left == below_right) & (above_right == below_left) & (above_left != above_right)
    num_corners = odd + 2 * crosswise
    y, x = np.nonzero(num_corners)
    times = num_corners[y, x]
    y, x = np.repeat(y, times), np.repeat(x, times)  # row by row
    # Within a row, and within a column, the corners pair up into the edges of the outline.
    beside = np.arange(len(x)) ^ 1
    by_column = np.lexsort((y, x))
    across = np.empty_like(beside)
    across[by_column] = by_column[beside]
    x, y, beside, across = x.tolist(), y.tolist(), beside.tolist(), across.tolist()
    polygons, num_pixels, seen = [], 0, [False] * len(x)
    for start in range(len(x)):
        if seen[start]:
            continue
        polygon, area, corner = [], 0, start
        while not seen[corner]:
            end = beside[corner]
            seen[corner] = seen[end] = True
            polygon += [x[corner], y[corner], x[end], y[end]]
            area += (x[end] - x[corner]) * y[corner]
            corner = across[end]
        polygons.append(polygon)
        num_pixels += abs(area)
    # The loop around a hole would add its area instead of taking it away.
    return polygons if num_pixels == mask.sum() else None


def _segmentation(mask, iscrowd):
    """COCO segmentation of exactly these pixels (bool [H, W]): polygons, or RLE if they have a hole.

    Crowds have uncompressed RLE, as in COCO's own files.
    """
    if iscrowd:
        pixels = mask.T.reshape(-1)  # column by column
        ends = np.flatnonzero(np.diff(np.concatenate(([0], pixels, [2]))))
        return {"size": list(mask.shape), "counts": np.diff(ends, prepend=0).tolist()}
    polygons = _outline(mask)
    if polygons is not None:
        return polygons
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")}


def annotate(item):
    """COCO annotation of an Item, without its ids: category_id, iscrowd, area, bbox, segmentation.

    The area is the number of visible pixels, the bbox (xywh, pixels) their bounding box. A star that is
    no crowd also gets keypoints and num_keypoints, a crowd of stars gets zeros.
    """
    iscrowd = int(item.shape is None)
    rows, columns = np.flatnonzero(item.visible.any(1)), np.flatnonzero(item.visible.any(0))
    x0, y0, x1, y1 = (int(v) for v in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    annotation = {
        "category_id": CLASSES[item.kind][0],
        "iscrowd": iscrowd,
        "area": int(item.visible.sum()),
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "segmentation": _segmentation(item.visible, iscrowd),
    }
    if item.kind == KEYPOINT_CLASS:
        empty = [0] * (3 * len(KEYPOINTS))
        keypoints = empty if iscrowd else locate_keypoints(item.shape, item.visible)
        annotation["keypoints"] = keypoints
        annotation["num_keypoints"] = sum(v > 0 for v in keypoints[2::3])
    return annotation


def _instances(images, annotations):
    """The json of all objects; keypoints belong to the other file."""
    return {
        "info": {"description": "shapes", "version": str(VERSION)},
        "images": images,
        "annotations": [
            {k: v for k, v in a.items() if k not in ("keypoints", "num_keypoints")} for a in annotations
        ],
        "categories": [
            {"id": category_id, "name": name, "supercategory": "shape"}
            for name, (category_id, _, _) in CLASSES.items()
        ],
    }


def _person_keypoints(images, annotations):
    """The json of the stars, with keypoints, in the form of COCO's person_keypoints files.

    Beyond COCO's fields the category has `sigmas`, since the keypoint metric knows only a person's 17.
    """
    category = {
        "id": CLASSES[KEYPOINT_CLASS][0],
        "name": KEYPOINT_CLASS,
        "supercategory": "shape",
        "keypoints": list(KEYPOINTS),
        "skeleton": SKELETON,
        "sigmas": [KEYPOINT_SIGMA] * len(KEYPOINTS),
    }
    return {
        "info": {"description": "shapes", "version": str(VERSION)},
        "images": images,
        "annotations": [a for a in annotations if "keypoints" in a],
        "categories": [category],
    }


# --- files ---------------------------------------------------------------------------------------


def _write_split(folder, name, split, num_images, seed):
    """Write `name`/*.png and the two json files of one split below `folder`."""
    image_folder = folder / name
    image_folder.mkdir()
    images, annotations = [], []
    for index in range(num_images):
        image, items = draw_picture(seed, split, index)
        image_id = 1_000_000 * split + 3 * index + 1  # with gaps, and different in the two splits
        file_name = f"{image_id:012d}.png"
        height, width, _ = image.shape
        done, png = cv2.imencode(".png", image[:, :, ::-1])
        assert done, file_name
        (image_folder / file_name).write_bytes(png.tobytes())
        images.append({"id": image_id, "file_name": file_name, "height": height, "width": width})
        for item in items:
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **annotate(item)})
    for kind, content in (("instances", _instances), ("person_keypoints", _person_keypoints)):
        text = json.dumps(content(images, annotations), separators=(",", ":"))
        (folder / "annotations" / f"{kind}_{name}.json").write_text(text)


def default_root():
    """The folder that caches the data set: `maskrcnn` in $XDG_CACHE_HOME, or else in ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(cache) if os.path.isabs(cache) else Path.home() / ".cache") / "maskrcnn"


def write_shapes(root, num_train=1000, num_val=100, seed=0):
    """Write the data set below `root`, unless it is there already.

    root: a folder, made if it is missing. num_train, num_val: images of each split, at least 1.
    seed: 0..2**32 - 1; another seed gives other pictures.
    Returns the Path of a COCO 2017 layout: annotations/{instances,person_keypoints}_{train,val}2017.json,
    train2017/*.png and val2017/*.png. It appears in one piece, so any number of processes may call this at once.
    Raises ValueError if a number is out of range or the files cannot be written.
    """
    if num_train < 1 or num_val < 1:
        raise ValueError(
            f"shapes: {num_train} training and {num_val} validation images; each must be at least 1"
        )
    if not 0 <= seed < 2**32:
        raise ValueError(f"shapes: seed {seed} is outside 0..{2**32 - 1}")
    root = Path(root)
    folder = root / f"shapes-v{VERSION}-{num_train}-{num_val}-{seed}"
    if folder.is_dir():
        return folder
    unfinished = root / f".{folder.name}-{uuid.uuid4().hex}"
    try:
        (unfinished / "annotations").mkdir(parents=True)
        _write_split(unfinished, "train2017", 0, num_train, seed)
        _write_split(unfinished, "val2017", 1, num_val, seed)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster
                raise
    except OSError as error:
        raise ValueError(
            f"{root}: cannot write the built-in data set ({error.strerror or error}); "
            "choose a folder with space and write permission, with --data-path"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def main():
    parser = argparse.ArgumentParser(description="Write the built-in data set and print where it is.")
    parser.add_argument(
        "root", metavar="DIR", nargs="?", type=Path, default=default_root(), help="default: %(default)s"
    )
    root = parser.parse_args().root
    try:
        folder = write_shapes(root)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    num_train, num_val = (len(list((folder / split).iterdir())) for split in ("train2017", "val2017"))
    print(f"{folder}: {num_train} training and {num_val} validation images, classes {', '.join(CLASSES)}")


if __name__ == "__main__":
    main()
