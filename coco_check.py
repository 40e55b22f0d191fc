"""`coco_utils.py check`: everything that is wrong with an annotation file and its images, one line each."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import image_files
from coco_index import BadAnnotationFile, CocoIndex, Finding, read_index


def check(annotation_file: Path, image_folder: Path | None = None) -> int:
    """Print every finding and a last line of counts.

    The findings are those that training acts on: both read the file through coco_index.read_index.
    image_folder: decode every image too.
    Returns 0 if there is nothing to say, 1 if there are warnings only, 2 if there is an error.
    """
    try:
        index = read_index(annotation_file)
    except BadAnnotationFile as error:
        print(f"error: {annotation_file}: {error}")
        print(f"{annotation_file}: 1 error, 0 warnings")
        return 2
    findings = index.findings
    if image_folder is not None:
        findings = findings + check_images(index, image_folder)
    for finding in findings:
        print(f"{finding.level}: {annotation_file}: {finding}")
    levels = [finding.level for finding in findings]
    errors, warnings = levels.count("error"), levels.count("warning")
    print(
        f"{annotation_file}: {_count(len(index.image_ids), 'image')}, {_count(len(index.labels), 'annotation')} usable "
        f"({int(index.crowd.sum())} crowd), {_count(len(index.classes), 'class', 'es')}: "
        f"{_count(errors, 'error')}, {_count(warnings, 'warning')}"
    )
    return 2 if errors else 1 if warnings else 0


def _count(number: int, name: str, plural: str = "s") -> str:
    return f"{number} {name}{plural if number != 1 else ''}"


def check_images(index: CocoIndex, folder: Path) -> list[Finding]:
    """Findings on the image files: missing, outside the folder, broken, of another size, turned by EXIF."""
    if not folder.is_dir():
        return [Finding("error", "the image folder", f"{folder} does not exist", "check the path")]
    names = index.file_names.tolist()
    missing, escaping = (set(found) for found in image_files.find_faults(folder, names))

    def check_image(n: int) -> Finding | None:
        subject = f"image {index.image_ids[n]}"
        if names[n] in missing:
            return Finding(
                "error", subject, f"is missing ({folder / names[n]})", "fetch it, or remove it from the file"
            )
        if names[n] in escaping:
            return Finding(
                "error", subject, f"is a link out of the folder ({folder / names[n]})", "copy it into it"
            )
        try:
            size: Any = tuple(index.sizes[n].tolist())
            orientation = image_files.read_header(folder / names[n], size).orientation
            image_files.read_image(folder / names[n], size)
        except image_files.ImageError as error:
            what, _, action = str(error).rpartition("; ")
            return Finding("error", subject, f"is unusable: {what}", action)
        if orientation != 1:
            what = f"has EXIF orientation {orientation} ({folder / names[n]})"
            return Finding("warning", subject, what, "it is not applied: pixels are taken as stored")
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # OpenCV decodes without Python's lock
        return [finding for finding in pool.map(check_image, range(len(names))) if finding is not None]
