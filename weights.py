"""Weights of any common format put into a model, with a report of what matched.

A source is one of
    the name of torchvision weights    MaskRCNN_ResNet50_FPN_Weights.COCO_V1, ResNet50_Weights.DEFAULT
    .pth    a state_dict, or a checkpoint of ours or of torchvision's references: its averaged weights
            ("model_ema") where it has them, since its scores were theirs, else "model"
    .npz    Tensorpack's ResNets: ImageNet-R50-AlignPadding.npz, or a detector's backbone
    .pkl    detectron2's ResNets: R-50.pkl, R-101.pkl, or a detector's backbone

No file's code runs: .pth are read with weights_only=True, .npz without pickles, .pkl by an unpickler that can
make arrays of numbers and plain containers and nothing else.

What an import keeps exactly: every layer's output in eval mode, for inputs normalised with torchvision's mean
and std. Tensorpack's and detectron2's first convolution is turned from BGR to RGB. detectron2's also expects
pixels 0..255 less the mean; torchvision divides by the std besides, so the weights are multiplied with it. Both
projects subtract torchvision's mean, so there is no constant to fold, and zero padding means the same on both
sides. Not kept: detectron2's R-50 and R-101 stride in another convolution of a block than torchvision's, and the
report says so.
"""

import argparse
import hashlib
import itertools
import pickle
import re
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import torch
from torchvision.models import WeightsEnum, detection, get_model_weights, get_weight
from torchvision.models.detection.ssd import SSDFeatureExtractorVGG
from torchvision.models.detection.ssdlite import SSDLiteFeatureExtractorMobileNet

from checkpoint import content_hash, first_line
from utils import UserError, is_main_process, main_process_first

# torchvision trained these when its FrozenBatchNorm had no eps, and sets it to 0 when it loads them.
WITHOUT_EPS = (
    detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1,
    detection.MaskRCNN_ResNet50_FPN_Weights.COCO_V1,
    detection.KeypointRCNN_ResNet50_FPN_Weights.COCO_V1,
    detection.RetinaNet_ResNet50_FPN_Weights.COCO_V1,
)
FOREIGN_NORM_EPS = 1e-5  # Tensorpack's and detectron2's batch norm
# torchvision's published heads have 91 rows, one for each category id up to 90 that COCO planned; 0: background.
COCO_NAMES = detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]

# Layers whose size depends on the classes: [groups (anchors of a location), classes, block] rows in that order.
RCNN_PREDICTOR = re.compile(
    r"roi_heads\.(?:box_predictor\.(?:cls_score|(?P<boxes>bbox_pred))|mask_predictor\.mask_fcn_logits)"
    r"\.(?:weight|bias)"
)
DENSE_PREDICTOR = re.compile(
    r"head\.classification_head\.(?:cls_logits|module_list\.\d+(?:\.1)?)\.(?:weight|bias)"
)
KEYPOINT_PREDICTOR = re.compile(r"roi_heads\.keypoint_predictor\.kps_score_lowres\.(?:weight|bias)")

# Parameter names in torchvision's older files -> today's.
OLDER_NAMES = (
    (r"(backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(\w+)", lambda m: f"{m[1]}.0.{m[2]}"),
    (r"(rpn\.head\.conv)\.(\w+)", lambda m: f"{m[1]}.0.0.{m[2]}"),
    (r"(roi_heads\.mask_head)\.mask_fcn(\d+)\.(\w+)", lambda m: f"{m[1]}.{int(m[2]) - 1}.0.{m[3]}"),
    (r"(head\.\w+_head\.conv)\.([0246])\.(\w+)", lambda m: f"{m[1]}.{int(m[2]) // 2}.0.{m[3]}"),
    (r"(.*denselayer\d+\.(?:norm|conv))\.([12]\.\w+)", lambda m: m[1] + m[2]),
)


@dataclass
class Report:
    """What an import did, by the model's parameter names (`unexpected`: by the file's).

    missing: the file has none; reinitialised: the file's do not fit; both keep the model's own, fresh values.
    norm_eps: the eps that the weights want of the backbone's norm layers; None: the layers' own.
    """

    source: str
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    reinitialised: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    norm_eps: float | None = None

    def __str__(self):
        lines = [f"weights {self.source}: {len(self.loaded)} tensors loaded"]
        for what, names in (
            ("re-initialised", self.reinitialised),
            ("missing from the file, left as initialised", self.missing),
            ("in the file, not in the model", self.unexpected),
        ):
            if names:
                lines.append(
                    f"  {len(names)} {what}: {', '.join(names[:4])}{', …' if len(names) > 4 else ''}"
                )
        if self.norm_eps is not None:
            lines.append(f"  norm layers want eps {self.norm_eps:g}")
        return "\n".join(lines + [f"  {note}" for note in self.notes])


def load_weights(model, source, *, classes=None, category_ids=None):
    """Put a detector's weights into `model`.

    source: str or Path, a file or the name of torchvision weights; the enum member itself; what `read` gave.
    classes, category_ids: names and json ids of labels 1..K. Heads of other classes than these are mapped row
        by row where each label has its like in the file: the same category id, and the same name where both
        sides name it. A file of 91 rows that names no classes is taken for COCO. Otherwise the heads stay as
        initialised. A mapped class keeps its logits, boxes and masks bit for bit; a softmax over fewer classes
        shares out what the left-out ones had: next to nothing for the 10 ids that COCO never used.
    Returns a Report. Every rank must call it: the first downloads for all.
    Raises UserError, the model untouched, if the source cannot be had or is of another architecture.
    """
    file = read(source)
    if naming(file.state):
        raise UserError(
            f"{file.source}: not a torchvision detector; its backbone can be given to --weights-backbone"
        )
    if not any(key.startswith("backbone.") for key in file.state):
        raise UserError(
            f"{file.source}: holds no detector (its first tensor is {next(iter(file.state))!r}); "
            "give classifiers to --weights-backbone"
        )
    own = model.state_dict()
    report = Report(file.source, norm_eps=file.norm_eps)
    state = fit_heads(renamed(file.state, own), own, file.classes, classes, category_ids, report)
    match(state, own, report)
    present = {part_of(key) for key in report.loaded + report.reinitialised}
    refuse_missing(report, lambda key: part_of(key) not in present and not key.startswith("backbone."))
    copy(state, own, report)
    return report


def load_backbone_weights(model, source):
    """Put a classifier's weights, or those of a detector's backbone, into the feature extractor of `model`.

    That is `model.backbone.body` under an FPN, else (SSD, SSDlite) `model.backbone`, whose extra layers a
    classifier lacks. source, result and errors as for `load_weights`.
    """
    file = read(source)
    prefix = "backbone.body." if hasattr(model.backbone, "body") else "backbone."
    own = {key: value for key, value in model.state_dict().items() if key.startswith(prefix)}
    report = Report(file.source, norm_eps=file.norm_eps)
    state = file.state
    from_classifier = not any(key.startswith("backbone.") for key in state)
    if pattern := naming(state):
        state = from_foreign(file, pattern, model, report)
        report.norm_eps = FOREIGN_NORM_EPS
    elif from_classifier:
        state = {classifier_name(key, model.backbone, own, prefix): value for key, value in state.items()}
    state = renamed(state, own)
    match(state, own, report)
    new_in_ssd = (f"{prefix}extra.", f"{prefix}scale_weight")
    refuse_missing(report, lambda key: from_classifier and key.startswith(new_in_ssd))
    copy(state, own, report)
    return report


# --- matching ------------------------------------------------------------------------------------------


def match(state, own, report):
    """Sort names into `report`. state: the file's tensors under the model's names; own: the model's.

    Raises UserError if a tensor has another shape, or a stage of the backbone more blocks than the model's.
    """
    without_statistics = {
        key.removesuffix("running_mean")
        for key in state
        if key.endswith(".running_mean") and key not in own and key.replace("running_mean", "weight") in own
    }
    if without_statistics:
        report.notes.append(
            "the file has batch norm, the model has not: scale and shift of its norm layers start anew"
        )
    for key, value in state.items():
        if key not in own:
            if not key.endswith("num_batches_tracked"):
                report.unexpected.append(key)
        elif key.removesuffix("weight").removesuffix("bias") in without_statistics:
            report.reinitialised.append(key)
        elif value.shape == own[key].shape:
            report.loaded.append(key)
        elif KEYPOINT_PREDICTOR.fullmatch(key):
            report.reinitialised.append(key)
            report.notes.append(f"{key}: another number of keypoints")
        else:
            raise another_architecture(
                report, f"{key} is {tuple(value.shape)} in the file, {tuple(own[key].shape)} in the model"
            )
    placed = {*report.loaded, *report.reinitialised}
    report.missing += [key for key in own if key not in placed and not key.endswith("num_batches_tracked")]
    if not report.loaded:
        raise another_architecture(
            report, f"none of its {len(state)} tensors has a place ({next(iter(state))!r}, …)"
        )
    stages = {stage_of(key) for key in own} - {None}
    for key in report.unexpected:
        if stage_of(key) in stages and not key.endswith(("running_mean", "running_var")):
            raise another_architecture(report, f"the model has no {key}")


def refuse_missing(report, optional):
    """Raises UserError if a parameter that is not `optional(key)` is missing from the file."""
    missing = [key for key in report.missing if not optional(key)]
    if missing and all(key.endswith(("running_mean", "running_var")) for key in missing):
        raise UserError(
            f"{report.source}: its norm layers have no running statistics, as group norm's; pass --norm group"
        )
    if missing:
        raise another_architecture(
            report, f"it lacks {len(missing)} of the model's tensors ({missing[0]}, …)"
        )


def another_architecture(report, detail):
    return UserError(
        f"{report.source}: of another architecture: {detail}; choose the --model and --backbone it is of"
    )


@torch.no_grad()
def copy(state, own, report):
    for key in report.loaded:
        own[key].copy_(state[key])


def part_of(key):
    """roi_heads.mask_head.0.0.weight -> roi_heads.mask_head: what a file has as a whole or not at all."""
    return ".".join(key.split(".")[:2])


def stage_of(key):
    """The backbone's stage that a parameter lies in, or None. A stage has the same blocks in file and model."""
    found = re.match(r"backbone\.(?:body\.)?(?:features\.)?(layer\d+|\d+)\.", key)
    return found and found[1]


def renamed(state, own):
    """`state` with the names of torchvision's older files brought up to the model's."""

    def name_of(key):
        if key not in own:
            for pattern, today in OLDER_NAMES:
                found = re.fullmatch(pattern, key)
                if found and today(found) in own:
                    return today(found)
        return key

    return {name_of(key): value for key, value in state.items()}


def classifier_name(key, backbone, own, prefix):
    """A classifier's parameter's name in a detector; one of a module without a place comes back as it is."""
    found = re.fullmatch(r"features\.(\d+)\.(.+)", key)
    if found and isinstance(backbone, SSDFeatureExtractorVGG):  # cut in two at the fourth pooling layer
        at = int(found[1]) - len(backbone.features)
        name = key if at < 0 else f"extra.0.{at}.{found[2]}"
    elif found and isinstance(backbone, SSDLiteFeatureExtractorMobileNet):  # cut inside block number `cut`
        at, rest, cut = int(found[1]), found[2], len(backbone.features[0]) - 1
        if at < cut:
            name = f"features.0.{at}.{rest}"
        elif at > cut:
            name = f"features.1.{at - cut}.{rest}"
        elif rest.startswith("block.0."):
            name = f"features.0.{at}.{rest.removeprefix('block.0.')}"
        else:
            name = f"features.1.0.{rest.removeprefix('block.')}"
    else:
        name = key
    for candidate in (name, name.removeprefix("features."), name.removeprefix("trunk_output.")):
        module = f"{prefix}{candidate.split('.')[0]}."
        if any(ours.startswith(module) for ours in own):
            return prefix + candidate
    return key


# --- heads ---------------------------------------------------------------------------------------------


def class_layout(state):
    """{predictor's name: (groups, classes, block)}: its rows are groups x classes x block, the last fastest.

    classes counts the background; block is 4 where each class has its own box deltas.
    """
    layout = {}
    for key, value in state.items():
        groups = block = 1
        if found := RCNN_PREDICTOR.fullmatch(key):
            block = 4 if found["boxes"] else 1
        elif DENSE_PREDICTOR.fullmatch(key):
            boxes = key.replace("classification_head", "regression_head").replace("cls_logits", "bbox_reg")
            groups = state[boxes].shape[0] // 4 if boxes in state and state[boxes].dim() else 0
        else:
            continue
        rows = value.shape[0] if value.dim() else 0
        if groups and rows and rows % (groups * block) == 0:
            layout[key] = (groups, rows // (groups * block), block)
    return layout


def fit_heads(state, own, file_classes, classes, category_ids, report):
    """The file's tensors with the predictors' rows in the model's label order; without them if they do not fit."""
    theirs, ours = class_layout(state), class_layout(own)
    common = [key for key in ours if key in theirs]
    if not common:
        return state
    num_theirs, num_ours = theirs[common[0]][1], ours[common[0]][1]
    rows, why_not = match_classes(num_theirs, num_ours, file_classes, classes, category_ids)
    if rows is None:
        report.notes.append(
            f"heads re-initialised for {num_ours - 1} classes, the file has {num_theirs - 1}{why_not}"
        )
        report.reinitialised += common
        return {key: value for key, value in state.items() if key not in common}
    if rows == list(range(num_theirs)):
        return state
    report.notes.append(f"heads mapped by category id: {num_ours - 1} of the file's {num_theirs - 1} labels")
    state = dict(state)
    for key in common:
        if theirs[key][1] == num_theirs:
            state[key] = state[key].unflatten(0, theirs[key])[:, rows].flatten(0, 2)
    return state


def match_classes(num_theirs, num_ours, file_classes, classes, category_ids):
    """The file's row for the background and each of our labels.

    file_classes: {row: (category id, name)} or None; either half of a class may be None for unknown.
    Returns (rows, ""), or (None, why) if a class has no row.
    """
    if classes is None and category_ids is None:
        ours = None
    else:
        ours = list(itertools.zip_longest(category_ids or [], classes or []))
        assert len(ours) == num_ours - 1, f"{len(ours)} classes for a model of {num_ours - 1}"
        if file_classes is None and num_theirs == len(COCO_NAMES) != num_ours:
            file_classes = coco_classes(COCO_NAMES)
    if ours is None or file_classes is None:
        return (list(range(num_theirs)), "") if num_theirs == num_ours else (None, "")

    def alike(a, b):
        return a is None or b is None or str(a).casefold() == str(b).casefold()

    rows = [0]
    for category_id, name in ours:
        found = [
            row
            for row, (their_id, their_name) in file_classes.items()
            if row < num_theirs and alike(category_id, their_id) and alike(name, their_name)
        ]
        if len(found) != 1:
            return None, f" and no category id {category_id}" + (f" ({name})" if name else "")
        rows += found
    return rows, ""


def coco_classes(names):
    """{row: (category id, name)} of torchvision's published heads, whose rows are category ids."""
    return {row: (row, name) for row, name in enumerate(names) if row > 0 and name != "N/A"}


# --- Tensorpack and detectron2 -------------------------------------------------------------------------

# A block's convolutions, by every project's name for them -> torchvision's (convolution, norm).
CONVOLUTIONS = {
    **{f"conv{n}": (f"conv{n}", f"bn{n}") for n in "123"},
    **{f"branch2{letter}": (f"conv{n}", f"bn{n}") for n, letter in zip("123", "abc", strict=True)},
    **dict.fromkeys(("convshortcut", "shortcut", "branch1"), ("downsample.0", "downsample.1")),
}
NORM_PARTS = {
    **dict.fromkeys(("weight", "gamma", "s"), "weight"),
    **dict.fromkeys(("bias", "beta", "b"), "bias"),
    **dict.fromkeys(("running_mean", "mean/EMA", "rm"), "running_mean"),
    **dict.fromkeys(("running_var", "variance/EMA", "riv"), "running_var"),
}
TENSORPACK = re.compile(
    r"(?:conv0|group(?P<stage>\d)/block(?P<block>\d+)/(?P<conv>conv[123]|convshortcut))"
    r"/(?:W|[bg]n/(?P<norm>gamma|beta|mean/EMA|variance/EMA))"
)
CAFFE2 = re.compile(
    r"(?:(?:res_)?conv1|res(?P<stage>\d)_(?P<block>\d+)_(?P<conv>branch1|branch2[abc]))"
    r"_(?:w|[bg]n_(?P<norm>s|b|rm|riv|running_mean|running_var))"
)
DETECTRON2 = re.compile(
    r"(?:backbone\.)?(?:bottom_up\.)?"
    r"(?:stem\.conv1|res(?P<stage>\d)\.(?P<block>\d+)\.(?P<conv>conv[123]|shortcut))"
    r"\.(?:weight|norm\.(?P<norm>weight|bias|running_mean|running_var))"
)
RGB_MEAN = (123.675, 116.28, 103.53)  # of pixels 0..255; all of these projects subtract it
RGB_STD = (58.395, 57.12, 57.375)


def naming(state):
    """Which project named a ResNet's parameters: one of the patterns above, or None for torchvision's names."""
    for pattern, stem in ((TENSORPACK, "conv0/W"), (CAFFE2, "conv1_w"), (DETECTRON2, "stem.conv1.weight")):
        if any(key.endswith(stem) and pattern.fullmatch(key) for key in state):
            return pattern
    return None


def from_foreign(file, pattern, model, report):
    """A ResNet of Tensorpack or detectron2, named by `pattern`, as torchvision names, orders and scales it."""
    first_stage = 0 if pattern is TENSORPACK else 2  # group0 and res2 are layer1
    state = {}
    for key, value in file.state.items():
        found = pattern.fullmatch(key)
        if not found:
            state[key] = value
            continue
        block = "backbone.body."
        if found["stage"] is not None:
            block += f"layer{int(found['stage']) - first_stage + 1}.{found['block']}."
        convolution, norm = CONVOLUTIONS[found["conv"] or "conv1"]
        if found["norm"]:
            state[f"{block}{norm}.{NORM_PARTS[found['norm']]}"] = value
        else:
            if pattern is TENSORPACK and value.dim() == 4:
                value = value.permute(3, 2, 0, 1)  # [height, width, in, out] -> [out, in, height, width]
            state[f"{block}{convolution}.weight"] = value
    if pattern is CAFFE2 and any("bn_" in key for key in file.state):
        add_neutral_statistics(state)

    stem, second = "backbone.body.conv1.weight", state.get("backbone.body.layer1.0.conv2.weight")
    grouped = second is not None and second.shape[:1] != second.shape[1:2]  # ResNeXt
    bgr, std = file.author != "torchvision", RGB_STD  # else detectron2's own copy of torchvision's weights
    if bgr and pattern is DETECTRON2:
        report.notes.append("taken for a model of BGR images, detectron2's default INPUT.FORMAT")
    if bgr and pattern is not TENSORPACK and not grouped:
        std = (1.0, 1.0, 1.0)  # PIXEL_STD in detectron2's configurations, except for ResNeXt
        report.notes.append(
            "detectron2's R-50 and R-101 stride in the 1x1 convolution of layer2.0, layer3.0 and layer4.0, "
            "torchvision's in the 3x3: from layer2 on the features are not detectron2's until they are trained"
        )
    if state[stem].dim() == 4 and state[stem].shape[1] == 3:
        weight = state[stem].flip(1) if bgr else state[stem]
        state[stem] = scaled_to(model.transform, weight, std, file.source)
    return state


def add_neutral_statistics(state):
    """Batch norms whose statistics were merged into scale and shift get mean 0 and, with the eps, variance 1."""
    for key in [key for key in state if re.search(r"(bn\d|downsample\.1)\.weight$", key)]:
        norm = key.removesuffix("weight")
        state.setdefault(f"{norm}running_mean", torch.zeros_like(state[key]))
        state.setdefault(f"{norm}running_var", torch.full_like(state[key], 1 - FOREIGN_NORM_EPS))


def scaled_to(transform, weight, std, source):
    """The first convolution for our inputs. weight: float [O, 3, h, w] for RGB pixels (0..255 - RGB_MEAN) / std.

    As long as the means agree, (0..255 - mean) / std is our input * 255 * our std / std, at padded edges too.
    Raises UserError if they do not.
    """
    ours = torch.tensor(transform.image_mean) * 255
    if not torch.allclose(ours, torch.tensor(RGB_MEAN), atol=1e-3):
        raise UserError(
            f"{source}: made for images less a mean of {RGB_MEAN}, this model subtracts "
            f"{tuple(round(float(m), 3) for m in ours)}; use torchvision's weights for it"
        )
    scale = torch.tensor(transform.image_std) * 255 / torch.tensor(std)
    return weight * scale.to(weight.dtype)[:, None, None]


# --- files ---------------------------------------------------------------------------------------------


@dataclass
class WeightsFile:
    """One file, read.

    state: {name: CPU tensor}; classes: {row of the heads: (category id, name)}; norm_type, norm_eps: of the backbone,
    None for unknown (see models.describe_norm); author: a .pkl's __author__.
    """

    source: str
    state: dict
    classes: dict | None = None
    norm_eps: float | None = None
    norm_type: str | None = None
    author: str | None = None


def read(source):
    """Read a source (see the top) into a WeightsFile; one comes back as it is.

    Raises UserError if it is missing, damaged or refused.
    """
    if isinstance(source, WeightsFile):
        return source
    if isinstance(source, WeightsEnum):
        return read_torchvision(source)
    path = Path(source)
    if path.is_file():
        reader = {".npz": read_npz, ".pkl": read_pickle}.get(path.suffix.lower(), read_torch)
        file = reader(path)
        file.state = {key: value for key, value in file.state.items() if isinstance(value, torch.Tensor)}
        if not file.state:
            raise UserError(f"{path}: holds no weights: no tensor under a name")
        return file
    try:
        member = get_weight(str(source))
    except (ValueError, KeyError, TypeError):  # the last: a name of torchvision.models that is no enum
        raise UserError(
            f"{source}: neither a file nor the name of torchvision weights, "
            "such as MaskRCNN_ResNet50_FPN_Weights.COCO_V1 or ResNet50_Weights.IMAGENET1K_V2"
        ) from None
    return read_torchvision(member)


def read_torchvision(member):
    """torchvision's published weights, downloaded once into torch hub's folder."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(member.url).path).name
    with main_process_first():
        if path.exists() and not file_hash(path).startswith(published_hash(member)):
            path.unlink()
            raise UserError(
                f"{path}: removed, since its SHA-256 does not begin with {published_hash(member)}; "
                "run again to download it anew"
            )
        try:
            state = member.get_state_dict(
                progress=is_main_process(), check_hash=True, map_location="cpu", weights_only=True
            )
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(
                f"{member!r}: no download of {path.name} ({first_line(error)}); get {member.url} elsewhere "
                f"and put it at {path}, or pass the file itself"
            ) from error
    return WeightsFile(
        repr(member),
        dict(state),
        classes=coco_classes(member.meta.get("categories", ())),
        norm_eps=0.0 if member in WITHOUT_EPS else None,
    )


def published_hash(member):
    """The first digits of the SHA-256 of torchvision's weights, from their file name; "" for a name without."""
    found = torch.hub.HASH_REGEX.search(member.url)
    return found[1] if found else ""


def read_torch(path):
    """A .pth: a state_dict or a checkpoint. torchvision's references save an argparse.Namespace: it is let in."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load's errors for a damaged or refused file have no common class
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if wanted:
            detail = f"it wants to run {wanted[1]}"
        else:
            detail = "not from torch.save" if isinstance(error, pickle.UnpicklingError) else first_line(error)
        raise UserError(
            f"{path}: refused: damaged, or more than tensors and plain data ({detail})"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a state_dict")
    written = content.pop("sha256", None)
    if written is not None and written != content_hash(content):
        raise UserError(f"{path}: damaged: its content differs from the hash written with it")
    state = next(
        (content[k] for k in ("model_ema", "model", "state_dict") if isinstance(content.get(k), dict)), None
    )
    file = WeightsFile(str(path), without_wrappers(content if state is None else state))
    classes, category_ids, norm = (content.get(key) for key in ("classes", "category_ids", "norm"))
    if isinstance(classes, list) and isinstance(category_ids, list):
        file.classes = dict(enumerate(zip(category_ids, classes, strict=False), start=1))
    if isinstance(norm, dict):
        file.norm_type, file.norm_eps = norm.get("type"), norm.get("eps")
    elif state is not None:
        file.norm_eps = eps_of_reference(content.get("args"))
    elif file_hash(path).startswith(tuple(published_hash(member) for member in WITHOUT_EPS)):
        file.norm_eps = 0.0
    return file


def without_wrappers(state):
    """A state_dict without the prefixes of DistributedDataParallel, AveragedModel and torch.compile."""
    state = {key: value for key, value in state.items() if isinstance(key, str) and key != "n_averaged"}
    wrapper = re.compile(r"(?:module\.|_orig_mod\.)+")
    if all(wrapper.match(key) for key in state):
        return {wrapper.sub("", key, count=1): value for key, value in state.items()}
    return state


def eps_of_reference(args):
    """The eps of a model that torchvision's reference trained on from published weights, else None."""
    if not isinstance(args, argparse.Namespace) or not getattr(args, "weights", None):
        return None
    try:
        member = get_model_weights(args.model)[args.weights.split(".")[-1]]
    except (AttributeError, ValueError, KeyError):
        return None
    return 0.0 if member in WITHOUT_EPS else None


def read_npz(path):
    """Tensorpack's .npz: names may end in ":0"."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            state = {key.removesuffix(":0"): to_tensor(arrays[key]) for key in arrays.files}
    except Exception as error:  # zip, header and size errors have no common class
        raise UserError(
            f"{path}: refused: damaged, or not an .npz of plain arrays ({first_line(error)})"
        ) from error
    return WeightsFile(str(path), state)


def read_pickle(path):
    """detectron2's .pkl: {"model": {name: array}}, Detectron's {"blobs": …}, or the names at the top."""
    try:
        with open(path, "rb") as file:
            content = ArrayUnpickler(file, encoding="latin1").load()
        if not isinstance(content, dict):
            raise pickle.UnpicklingError(f"a {type(content).__name__}, not a dict of arrays")
        state = next(
            (content[key] for key in ("model", "blobs") if isinstance(content.get(key), dict)), content
        )
        state = {
            key: to_tensor(value.array())
            for key, value in state.items()
            if isinstance(key, str) and isinstance(value, PickledArray) and not key.endswith("_momentum")
        }
    except Exception as error:  # garbage makes an unpickler raise almost anything
        raise UserError(
            f"{path}: refused: damaged, or not a pickle of plain arrays ({first_line(error)})"
        ) from error
    return WeightsFile(str(path), state, author=content.get("__author__"))


def to_tensor(array):
    """A numpy array of numbers as float32 or int64. Raises ValueError for any other dtype."""
    if array.dtype.kind not in "fiub":
        raise ValueError(f"an array of {array.dtype}, not of numbers")
    dtype = np.float32 if array.dtype.kind == "f" else np.int64
    return torch.from_numpy(np.array(array, dtype=dtype, order="C"))


def file_hash(path):
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


class PickledDtype:
    """Stands in for numpy.dtype in a pickle: numpy's own trusts a file's offsets, which can crash Python."""

    def __init__(self, code, *_):
        if not re.fullmatch(r"[fiub]\d{1,2}", code):
            raise pickle.UnpicklingError(f"an array of dtype {code!r}, not of numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state):
        order, compound = state[1], state[2:5]
        if order not in ("<", ">", "=", "|") or any(part is not None for part in compound):
            raise pickle.UnpicklingError("an array of records, not of numbers")
        if order in "<>":
            self.dtype = self.dtype.newbyteorder(order)


class PickledArray:
    """Stands in for numpy.ndarray in a pickle: shape, dtype and bytes, checked when they become an array."""

    def __init__(self, *_):
        self.shape, self.dtype, self.fortran, self.data = (0,), PickledDtype("f4"), False, b""

    def __setstate__(self, state):
        _, self.shape, self.dtype, self.fortran, self.data = state

    def array(self):
        data = self.data.encode("latin1") if isinstance(self.data, str) else self.data  # str: from Python 2
        return np.frombuffer(data, self.dtype.dtype).reshape(self.shape, order="F" if self.fortran else "C")


class PickledBuffer(PickledArray):
    """An array as protocol 5 writes it."""

    def __init__(self, data, dtype, shape, order="C"):
        self.shape, self.dtype, self.fortran, self.data = shape, dtype, order == "F", data


class PickledBytes(bytes):
    """Bytes as protocols 0 to 2 write them: text and "latin1"."""

    def __new__(cls, text="", encoding="latin1"):
        return super().__new__(cls, text, "latin1")

    def __setstate__(self, state):
        raise pickle.UnpicklingError("bytes have no state")


PICKLE_NAMES = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): PickledBytes,
    ("__builtin__", "bytes"): PickledBytes,
    ("numpy", "ndarray"): PickledArray,
    ("numpy", "dtype"): PickledDtype,
    ("numpy.core.multiarray", "_reconstruct"): PickledArray,
    ("numpy._core.multiarray", "_reconstruct"): PickledArray,
    ("numpy.core.numeric", "_frombuffer"): PickledBuffer,
    ("numpy._core.numeric", "_frombuffer"): PickledBuffer,
}


class ArrayUnpickler(pickle._Unpickler):
    """Unpickles numbers, text, containers and numpy arrays; any other name is refused, nothing imported.

    It is pickle's Python form: the C one takes a file's word for the size of its memo, which a single flipped bit
    can make 64 GB. A few hundred arrays cost no time.
    """

    def find_class(self, module, name):
        if (module, name) not in PICKLE_NAMES:
            raise pickle.UnpicklingError(f"it wants to run {module}.{name}")
        return PICKLE_NAMES[module, name]
