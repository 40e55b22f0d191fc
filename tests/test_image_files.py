"""Images come as RGB as stored; what is broken is named."""

import os
import pickle

import cv2
import numpy as np
import pytest
from PIL import Image

import image_files
from image_files import ImageError, find_faults, read_header, read_image


@pytest.fixture
def picture():
    return np.random.default_rng(1).integers(0, 256, (20, 30, 3)).astype(np.uint8)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("JPEG", mode) for mode in ("RGB", "L", "CMYK")]
    + [("PNG", mode) for mode in ("RGB", "L", "LA", "P", "1", "RGBA")]
    + [("BMP", mode) for mode in ("RGB", "L", "P", "1")]
    + [("TIFF", mode) for mode in ("RGB", "L", "LA", "P", "1", "RGBA", "CMYK")]
    + [("WEBP", mode) for mode in ("RGB", "RGBA")]
    + [("PPM", mode) for mode in ("RGB", "L", "1")],
)
def test_every_mode_becomes_rgb_as_pillow_does_it(tmp_path, picture, kind, mode):
    image = Image.fromarray(picture)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(picture[..., 0]))
    path = tmp_path / f"a.{kind.lower()}"
    image.convert(mode).save(path, kind)
    pixels = read_image(path, (20, 30))
    assert pixels.dtype == np.uint8 and pixels.shape == (20, 30, 3)
    expected = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert np.abs(pixels - expected).max() <= (1 if mode == "CMYK" else 0)


def test_sixteen_bits_are_scaled(tmp_path):
    gray = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    cv2.imwrite(str(tmp_path / "a.png"), gray)
    # value // 256 (Pillow would clip 256 and above to white)
    assert read_image(tmp_path / "a.png")[0, :, 0].tolist() == [0, 0, 1, 128, 255]


@pytest.mark.parametrize("size", [(1, 1), (3, 2000), (2000, 3)])
def test_odd_sizes(tmp_path, size):
    cv2.imwrite(str(tmp_path / "a.png"), np.full((*size, 3), 7, np.uint8))
    assert read_image(tmp_path / "a.png", size).shape == (*size, 3)


def test_exif_orientation_is_not_applied(tmp_path, picture):
    exif = Image.Exif()
    exif[274] = 6  # a viewer turns it by 90 degrees
    Image.fromarray(picture).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "a.png"), picture)
    assert (
        read_header(tmp_path / "a.png")[:2] == (20, 30) and read_header(tmp_path / "a.png").orientation == 6
    )
    with pytest.raises(ImageError, match=r"as stored \(its EXIF orientation 6 is not applied\).*says 30×20"):
        read_image(tmp_path / "a.png", (30, 20))


def test_broken_files_are_named(tmp_path, picture):
    Image.fromarray(picture).save(tmp_path / "a.jpg")
    Image.fromarray(picture).save(tmp_path / "a.png")
    jpeg, png = (tmp_path / "a.jpg").read_bytes(), (tmp_path / "a.png").read_bytes()
    for data, message in (
        (b"", "is empty"),
        (b"<html>", "is no image"),
        (jpeg[:-30], "is damaged"),
        (jpeg[:300], "is damaged|is no image"),
        (jpeg[:20], "is no image|is damaged"),
        (png[:-30], "is damaged"),
        (png[:200] + bytes(20) + png[220:], "is damaged"),
        (b"GIF89a" + bytes(30), "is no image"),
    ):
        path = tmp_path / "broken.jpg"
        path.write_bytes(data)
        with pytest.raises(ImageError, match=f"broken.jpg: ({message})"):
            read_image(path)
    with pytest.raises(ImageError, match=r"none.jpg: cannot be read \(No such file"):
        read_image(tmp_path / "none.jpg")


def test_a_picture_beyond_the_limit_is_not_decoded(tmp_path, monkeypatch):
    Image.fromarray(np.zeros((1000, 1000), np.uint8)).save(tmp_path / "a.png")
    monkeypatch.setattr(image_files, "MAX_PIXELS", 999_999)
    monkeypatch.setattr(cv2, "imdecode", None)
    with pytest.raises(ImageError, match="has 1000×1000 pixels, more than 999,999"):
        read_image(tmp_path / "a.png")


def test_a_size_that_differs_is_an_error_before_decoding(tmp_path, picture, monkeypatch):
    Image.fromarray(picture).save(tmp_path / "a.png")
    monkeypatch.setattr(cv2, "imdecode", None)
    with pytest.raises(
        ImageError, match=r"has 20×30 pixels, but the annotation file says 20×31 \(height × width\)"
    ):
        read_image(tmp_path / "a.png", (20, 31))


def test_missing_and_escaping_files(tmp_path):
    outside = tmp_path / "outside"
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    outside.mkdir()
    for path in (outside / "x.png", folder / "a.png", folder / "sub" / "b ä.png"):
        path.write_bytes(b"x")
    (folder / "in.png").symlink_to(folder / "a.png")
    (folder / "out.png").symlink_to(outside / "x.png")
    (folder / "broken.png").symlink_to(folder / "none.png")
    (folder / "dir").symlink_to(outside)
    os.mkdir(folder / "c.png")
    names = [
        "a.png",
        "sub/b ä.png",
        "in.png",
        "out.png",
        "broken.png",
        "dir/x.png",
        "c.png",
        "none/d.png",
        "e.png",
    ]
    missing, escaping = find_faults(folder, names)
    assert missing == ["broken.png", "c.png", "none/d.png", "e.png"]
    assert escaping == ["out.png", "dir/x.png"]
    (tmp_path / "link").symlink_to(folder)  # the folder itself may be a link
    assert find_faults(tmp_path / "link", ["a.png", "in.png"]) == ([], [])


def test_an_error_from_a_worker_is_still_one_line():
    error = ImageError("a.jpg: is damaged; fetch it again")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    traceback = f"Caught ImageError in worker 0.\nTraceback:\n  File ...\nimage_files.ImageError: {error}\n"
    assert str(ImageError(traceback)) == str(error)
