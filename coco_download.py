"""`coco_utils.py download`: COCO 2017's archives, fetched, verified and unpacked."""

from __future__ import annotations

import hashlib
import os
import shutil
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from utils import UserError

TIMEOUT_SECONDS = 60


class Archive(NamedTuple):
    url: str
    sha1: str
    holds: tuple[str, ...]  # what stands below the folder once it is unpacked


ARCHIVES = (
    Archive(
        "http://images.cocodataset.org/annotations/annotations_trainval2017.zip",
        "8551ee4bb5860311e79dace7e79cb91e432e78b3",
        tuple(
            f"annotations/{kind}_{split}2017.json"
            for kind in ("instances", "person_keypoints")
            for split in ("train", "val")
        ),
    ),
    Archive(
        "http://images.cocodataset.org/zips/val2017.zip",
        "4950dc9d00dbe1c933ee0170f5797584351d2a41",
        ("val2017",),
    ),
    Archive(
        "http://images.cocodataset.org/zips/train2017.zip",
        "10ad623668ab00c62c096f0ed636d6aff41faca5",
        ("train2017",),
    ),
)


def download(folder: Path, archives: tuple[Archive, ...] = ARCHIVES) -> None:
    """Fetch and unpack what is not there yet, so that `--data-path FOLDER` finds it.

    A transfer that was cut off goes on where it stopped. An archive is verified by its SHA-1 before a file of it is
    unpacked, and removed if it differs; each file unpacked is verified by the archive's checksum of it. An archive is
    unpacked beside its place and moved there when it is complete, so what is there is whole.
    Raises UserError if an archive cannot be fetched or is not the right one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for archive in archives:
        if all((folder / name).exists() for name in archive.holds):
            print(f"{folder}: has {', '.join(archive.holds)}")
            continue
        zip_file = folder / archive.url.rpartition("/")[2]
        if not zip_file.exists():
            _fetch(archive, zip_file)
        _verify(archive, zip_file)
        _unpack(zip_file, folder, archive)
        zip_file.unlink()


def _fetch(archive: Archive, zip_file: Path) -> None:
    """Download to `<name>.part`, from where that ends on, and rename it once it is complete."""
    part = zip_file.with_name(zip_file.name + ".part")
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(archive.url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
            if response.status != 206:
                done = 0  # the server gives the whole file
            total = done + int(response.headers.get("Content-Length", 0))
            with (
                open(part, "ab" if done else "wb") as file,
                tqdm(total=total, initial=done, unit="B", unit_scale=True, desc=zip_file.name) as bar,
            ):
                while block := response.read(1 << 20):
                    file.write(block)
                    bar.update(len(block))
    except urllib.error.HTTPError as error:
        if error.code != 416:  # the part is the whole file already
            raise UserError(f"{archive.url}: {error}; {_by_hand(archive, zip_file)}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"{archive.url}: cannot be fetched ({reason}); {_by_hand(archive, zip_file)}"
        ) from None
    else:
        if total and part.stat().st_size != total:
            raise UserError(
                f"{archive.url}: was cut off at {part.stat().st_size:,} bytes; run again to go on"
            )
    os.replace(part, zip_file)


def _by_hand(archive: Archive, zip_file: Path) -> str:
    return f"run again to go on, or put {archive.url.rpartition('/')[2]} in {zip_file.parent} and run again"


def _verify(archive: Archive, zip_file: Path) -> None:
    digest = hashlib.sha1(usedforsecurity=False)
    with open(zip_file, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    if digest.hexdigest() != archive.sha1:
        zip_file.unlink()
        raise UserError(
            f"{zip_file}: has SHA-1 {digest.hexdigest()}, not {archive.sha1}; it is removed, run again to fetch it anew"
        )


def _unpack(zip_file: Path, folder: Path, archive: Archive) -> None:
    """Unpack beside the final places, then move what the archive holds."""
    unfinished = zip_file.with_suffix(".unpacked")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        with zipfile.ZipFile(zip_file) as content:
            for member in tqdm(content.infolist(), unit="file", desc=f"unpacking {zip_file.name}"):
                content.extract(member, unfinished)  # keeps every path inside the folder
    except (OSError, zipfile.BadZipFile) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise UserError(f"{zip_file}: cannot be unpacked ({error}); make room, or fetch it anew") from None
    for source in sorted(unfinished.rglob("*")):
        target = folder / source.relative_to(unfinished)
        if source.is_dir() and str(source.relative_to(unfinished)) in archive.holds:
            os.replace(source, target)
        elif source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
    shutil.rmtree(unfinished)
