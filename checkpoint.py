"""Checkpoints: written atomically, hashed, loaded strictly, and never by running a pickle's code.

A checkpoint is a dict of plain types and tensors:
    model           state_dict; loads with strict=True into torchvision's builder of the same name
    model_ema       the averaged weights, a whole state_dict too, where --ema-decay is on
    optimizer, scaler, ema, rng (one entry a rank)
    progress        {"epoch", "batch", "step"}: where training goes on; {"best", "best_epoch"}: the best score so far
    classes, category_ids    label k is classes[k - 1], category_ids[k - 1] in the annotation file
    norm            {"type", "eps"} of the backbone's norm layers
    config          every setting as resolved
    sha256          over everything above
"""

import contextlib
import hashlib
import os
import re
import struct
import warnings
import zipfile
from pathlib import Path

import torch

from utils import UserError

NEWEST = "checkpoint.pth"
BEST = "best.pth"


def content_hash(value):
    """SHA-256 over a nest of dicts, lists, plain values and tensors: names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()

    def feed(item):
        if isinstance(item, torch.Tensor):
            item = item.detach().cpu().contiguous()
            digest.update(f"T{item.dtype}{tuple(item.shape)}".encode())
            if item.numel():
                digest.update(memoryview(item.reshape(-1).view(torch.uint8).numpy()))
        elif isinstance(item, dict):
            digest.update(b"D" + struct.pack("<q", len(item)))
            for key, child in item.items():
                feed(key)
                feed(child)
        elif isinstance(item, (list, tuple)):
            digest.update(b"L" + struct.pack("<q", len(item)))
            for child in item:
                feed(child)
        else:
            digest.update(f"{type(item).__name__}:{item!r};".encode())

    feed(value)
    return digest.hexdigest()


def save(checkpoint, path, *links):
    """Write `checkpoint` to `path`, and make each of `links` name the same bytes.

    Each name switches from the old file to the new one in a single rename, so that a crash or a full disk
    at any moment leaves the previous checkpoint readable. Raises OSError if the disk refuses.
    """
    path = Path(path)
    checkpoint = {key: value for key, value in checkpoint.items() if key != "sha256"}
    checkpoint["sha256"] = content_hash(checkpoint)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        for link in links:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            try:
                os.link(path, temporary)
            except OSError:  # a file system without hard links
                temporary.write_bytes(path.read_bytes())
            os.replace(temporary, link)
    finally:
        temporary.unlink(missing_ok=True)


def load(path):
    """Read and verify a checkpoint onto the CPU.

    Raises UserError if the file is missing, is not a checkpoint, holds anything but plain data (its code
    is not run), or differs from the hash written with it.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; --resume auto takes the newest in --output-dir")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: damaged, or not a checkpoint ({first_line(error)})") from error
    except Exception as error:  # pickle.UnpicklingError: refused content, or garbage
        raise UserError(f"{path}: refused: not a file of plain data ({first_line(error)})") from error
    if not isinstance(checkpoint, dict) or "model" not in checkpoint:
        raise UserError(
            f"{path}: not a training checkpoint (no 'model' in it); give bare weights to --weights"
        )
    written = checkpoint.pop("sha256", None)
    if written is not None and written != content_hash(checkpoint):
        raise UserError(f"{path}: damaged: its content differs from the hash written with it")
    return checkpoint


def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def find_newest(output_dir):
    """The newest readable checkpoint of a run, or (None, None) if there is none yet.

    A damaged one is named in a warning and the one before it is taken.
    Returns (path, checkpoint).
    """
    output_dir = Path(output_dir)
    candidates = [output_dir / NEWEST] if (output_dir / NEWEST).exists() else []
    candidates += [path for _, path in sorted(epoch_checkpoints(output_dir), reverse=True)]
    for path in candidates:
        try:
            return path, load(path)
        except UserError as error:
            warnings.warn(f"{error}; trying the one before it", stacklevel=2)
    if candidates:
        raise UserError(
            f"{output_dir}: none of its {len(candidates)} checkpoints can be read; start in another folder"
        )
    return None, None


def amend(path, progress, *links):
    """Change the progress in a checkpoint under every name that it has in its folder, and give it `links` as well."""
    path = Path(path)
    checkpoint = load(path)
    checkpoint["progress"].update(progress)
    names = [other for other in path.parent.glob("*.pth") if other != path and other.samefile(path)]
    save(checkpoint, path, *names, *links)


def epoch_checkpoints(output_dir):
    """[(epoch, path)] of the model_<epoch>.pth files in a folder."""
    found = []
    for path in Path(output_dir).glob("model_*.pth"):
        match = re.fullmatch(r"model_(\d+)\.pth", path.name)
        if match:
            found.append((int(match[1]), path))
    return found


def remove_old(output_dir, keep):
    """Delete all but the newest `keep` of the model_<epoch>.pth files."""
    found = sorted(epoch_checkpoints(output_dir))
    for _, path in found[: max(0, len(found) - keep)]:
        path.unlink(missing_ok=True)


def plain_state_dict(module):
    """A module's state_dict as a plain dict of detached CPU tensors, each with its own storage."""
    return {name: value.detach().to("cpu", copy=True) for name, value in module.state_dict().items()}


def check_same_classes(checkpoint, classes, category_ids, path):
    """Raises UserError if the checkpoint was trained on other classes than the data has."""
    if checkpoint.get("classes") == list(classes) and checkpoint.get("category_ids") == list(category_ids):
        return
    theirs, ours = checkpoint.get("classes") or [], list(classes)
    missing = [name for name in theirs if name not in ours]
    extra = [name for name in ours if name not in theirs]
    raise UserError(
        f"{path}: trained on {len(theirs)} classes, the data has {len(ours)}"
        + (f"; only in the checkpoint: {', '.join(missing[:5])}" if missing else "")
        + (f"; only in the data: {', '.join(extra[:5])}" if extra else "")
        + ("" if missing or extra else "; same names under other category ids")
        + "; to start from these weights with new heads, give the file to --weights"
    )


def check_same_norm(checkpoint, norm, path):
    """Raises UserError, naming the flag, if the model's norm layers would read the checkpoint differently."""
    theirs = checkpoint.get("norm")
    if theirs is not None and theirs != norm:
        raise UserError(
            f"{path}: its backbone has {theirs['type']} norm with eps {theirs['eps']:g}, this model "
            f"{norm['type']} with eps {norm['eps']:g}; pass --norm {theirs['type']} --norm-eps {theirs['eps']:g}"
        )


NOT_COMPARED = (
    "resume", "output_dir", "overwrite", "device", "print_freq", "workers", "norm", "norm_eps", "async_eval", "profile",
)  # fmt: skip


def changed_settings(old, new):
    """The settings that differ between two configs, as lines "lr: 0.02 -> 0.01"; norms have a check of their own."""
    keys = [key for key in new if key in old and key not in NOT_COMPARED and old[key] != new[key]]
    return [f"{key}: {old[key]} -> {new[key]}" for key in keys]
