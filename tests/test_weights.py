"""Imports are checked against the network that the file was made from: its outputs must come back."""

import argparse
import email.message
import hashlib
import io
import os
import pickle
import re
import urllib.error
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models import WeightsEnum, detection, get_model_weights, list_models
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

import checkpoint
import weights
from utils import UserError
from weights import load_backbone_weights, load_weights

COCO_NAMES = weights.COCO_NAMES
COCO_IDS = [i for i, name in enumerate(COCO_NAMES) if i > 0 and name != "N/A"]  # the 80 in use
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def randomize(model, seed):
    """Give every parameter and statistic a value that no initialisation has; activations stay of order one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5, generator=generator)
            elif value.dim() > 1:
                value.normal_(std=(2 / value[0].numel()) ** 0.5, generator=generator)
            elif name.endswith("weight"):
                value.uniform_(0.5, 1.0, generator=generator)
            elif value.is_floating_point():
                value.normal_(std=0.1, generator=generator)
    return model


def small_rcnn(
    num_classes, seed=None, kind=detection.MaskRCNN, norm_layer=FrozenBatchNorm2d, backbone="resnet18"
):
    """A detector on a ResNet-18, for images of 64 pixels that keep nearly every box."""
    body = resnet_fpn_backbone(
        backbone_name=backbone, weights=None, norm_layer=norm_layer, trainable_layers=5
    )
    model = kind(
        body,
        num_classes,
        min_size=64,
        max_size=128,
        **({"box_score_thresh": 0.0} if "RCNN" in kind.__name__ else {}),
    )
    return model if seed is None else randomize(model, seed)


def detector_body(name="resnet50", norm_layer=FrozenBatchNorm2d):
    """Something with `backbone.body` and `transform`, as every FPN detector has."""
    model = nn.Module()
    model.backbone = resnet_fpn_backbone(backbone_name=name, weights=None, norm_layer=norm_layer)
    model.transform = detection.transform.GeneralizedRCNNTransform(64, 64, MEAN.tolist(), STD.tolist())
    return model.eval()


@pytest.fixture(scope="module")
def resnet50():
    return randomize(torchvision.models.resnet50(norm_layer=nn.BatchNorm2d), 1).eval()


@torch.no_grad()
def stages(network, images):
    """The outputs of layer1 to layer4."""
    x = network.maxpool(network.relu(network.bn1(network.conv1(images))))
    out = []
    for layer in (network.layer1, network.layer2, network.layer3, network.layer4):
        x = layer(x)
        out.append(x)
    return out


@torch.no_grad()
def assert_same_stages(body, network, seed=0, rtol=1e-4):
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
    for ours, theirs in zip(body(images).values(), stages(network, images), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol * theirs.abs().max().item())


@torch.no_grad()
def detect(model, seed=0, size=(64, 96)):
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(seed))
    return model.eval()(list(images))


def assert_same_detections(mapped, original, label_of, atol=1e-5):
    """label_of: original label -> mapped label.

    Compared by label, then score: a softmax over fewer rows rounds otherwise, so that detections of two labels whose
    scores agree to the last bits may trade places.
    """
    for ours, theirs in zip(detect(mapped), detect(original), strict=True):
        assert len(theirs["boxes"]) > 20
        theirs["labels"] = torch.tensor([label_of[label] for label in theirs["labels"].tolist()])
        for found in (ours, theirs):  # scores descend already
            order = found["labels"].argsort(stable=True)
            found.update({key: value[order] for key, value in found.items()})
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-5, atol=atol)


def saved(path, content):
    torch.save(content, path)
    return path


# --- .pth ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mask_rcnn():
    return small_rcnn(4, seed=2)


def assert_equal_state(model, other):
    for name, value in other.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def reference_args(**changed):
    """What torchvision's references save beside the weights."""
    return argparse.Namespace(
        **{
            "model": "maskrcnn_resnet50_fpn",
            "weights": None,
            "lr_steps": [16, 22],
            "device": "cuda",
            "amp": False,
        }
        | changed
    )


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {f"module.{k}": v for k, v in state.items()},
        lambda state: {"module._orig_mod." + k: v for k, v in state.items()},
        lambda state: {"model": state, "optimizer": {"state": {}}, "epoch": 3, "args": reference_args()},
        lambda state: {"model": {"module." + k: v for k, v in state.items()}, "args": reference_args()},
        lambda state: {"state_dict": OrderedDict(state)},
        lambda state: {
            "model": {k: torch.zeros_like(v) for k, v in state.items()},
            "model_ema": {"n_averaged": torch.tensor(7), **{"module." + k: v for k, v in state.items()}},
        },
    ],
    ids=["bare", "ddp", "compiled ddp", "reference", "reference ddp", "state_dict", "averaged"],
)
def test_pth_in_any_wrapping(tmp_path, mask_rcnn, wrap):
    model = small_rcnn(4)
    report = load_weights(model, saved(tmp_path / "w.pth", wrap(mask_rcnn.state_dict())))
    assert_equal_state(model, mask_rcnn)
    assert set(report.loaded) == set(model.state_dict())
    assert not (report.missing or report.unexpected or report.reinitialised or report.norm_eps)
    assert f"{tmp_path}/w.pth: {len(report.loaded)} tensors loaded" in str(report)


def test_reference_checkpoint_with_its_real_schedulers(tmp_path, mask_rcnn):
    optimizer = torch.optim.SGD(mask_rcnn.parameters(), lr=0.1, momentum=0.9)
    content = {
        "model": mask_rcnn.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": torch.optim.lr_scheduler.MultiStepLR(
            optimizer, [16, 22]
        ).state_dict(),  # holds a Counter
        "args": reference_args(weights="MaskRCNN_ResNet50_FPN_Weights.COCO_V1"),
        "epoch": 25,
    }
    report = load_weights(small_rcnn(4), saved(tmp_path / "model_25.pth", content))
    assert report.norm_eps == 0.0  # it went on from weights without eps
    content["args"] = reference_args(weights="COCO_V1", model="maskrcnn_resnet50_fpn_v2")
    assert load_weights(small_rcnn(4), saved(tmp_path / "m.pth", content)).norm_eps is None


def test_own_checkpoint_gives_its_average_and_eps_and_is_verified(tmp_path, mask_rcnn):
    state = checkpoint.plain_state_dict(mask_rcnn)
    content = {
        "model": {k: v + 1 for k, v in state.items()},
        "model_ema": state,
        "classes": ["a", "b", "c"],
        "category_ids": [3, 5, 7],
        "norm": {"type": "frozen", "eps": 0.0},
    }
    path = tmp_path / "best.pth"
    checkpoint.save(content, path)
    model = small_rcnn(4)
    report = load_weights(model, path, classes=["a", "b", "c"], category_ids=[3, 5, 7])
    assert_equal_state(model, mask_rcnn)
    assert report.norm_eps == 0.0 and not report.reinitialised

    model = small_rcnn(3)
    load_weights(model, path, classes=["c", "a"], category_ids=[7, 3])
    theirs, ours = (m.roi_heads.mask_predictor.mask_fcn_logits.weight for m in (mask_rcnn, model))
    assert torch.equal(ours, theirs[[0, 3, 1]])

    model = small_rcnn(4)
    report = load_weights(model, path, classes=["a", "b", "z"], category_ids=[3, 5, 7])
    assert "roi_heads.box_predictor.cls_score.weight" in report.reinitialised
    assert "no category id 7 (z)" in str(report)

    content["sha256"] = "0" * 64
    with pytest.raises(UserError, match="differs from the hash"):
        load_weights(small_rcnn(4), saved(path, content))


def test_another_number_of_classes_renews_the_heads_only(tmp_path, mask_rcnn):
    path = saved(tmp_path / "w.pth", mask_rcnn.state_dict())
    model = small_rcnn(7, seed=3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = load_weights(model, path)
    assert sorted(report.reinitialised) == [
        "roi_heads.box_predictor.bbox_pred.bias",
        "roi_heads.box_predictor.bbox_pred.weight",
        "roi_heads.box_predictor.cls_score.bias",
        "roi_heads.box_predictor.cls_score.weight",
        "roi_heads.mask_predictor.mask_fcn_logits.bias",
        "roi_heads.mask_predictor.mask_fcn_logits.weight",
    ]
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key] if key in report.reinitialised else mask_rcnn.state_dict()[key])
    assert "heads re-initialised for 6 classes, the file has 3" in str(report)


def test_box_detector_into_mask_detector_and_back(tmp_path, mask_rcnn):
    boxes = small_rcnn(4, seed=4, kind=detection.FasterRCNN)
    report = load_weights(small_rcnn(4), saved(tmp_path / "boxes.pth", boxes.state_dict()))
    assert report.missing and all(key.startswith("roi_heads.mask_") for key in report.missing)
    assert f"{len(report.missing)} missing from the file" in str(report)
    report = load_weights(
        small_rcnn(4, kind=detection.FasterRCNN), saved(tmp_path / "masks.pth", mask_rcnn.state_dict())
    )
    assert report.unexpected and all(key.startswith("roi_heads.mask_") for key in report.unexpected)
    # with other classes, mask predictors without a place are still named
    report = load_weights(small_rcnn(9, kind=detection.FasterRCNN), tmp_path / "masks.pth")
    assert "roi_heads.mask_predictor.mask_fcn_logits.weight" in report.unexpected


def test_names_of_older_torchvision_files(tmp_path, mask_rcnn):
    def older(key):
        for old, new in (
            ("backbone.fpn.inner_blocks.{}.", "backbone.fpn.inner_blocks.{}.0."),
            ("backbone.fpn.layer_blocks.{}.", "backbone.fpn.layer_blocks.{}.0."),
        ):
            for i in range(4):
                key = key.replace(new.format(i), old.format(i))
        for i in range(4):
            key = key.replace(f"roi_heads.mask_head.{i}.0.", f"roi_heads.mask_head.mask_fcn{i + 1}.")
        return key.replace("rpn.head.conv.0.0.", "rpn.head.conv.")

    state = {older(k): v for k, v in mask_rcnn.state_dict().items()}
    assert {
        "rpn.head.conv.weight",
        "roi_heads.mask_head.mask_fcn4.bias",
        "backbone.fpn.layer_blocks.3.bias",
    } <= set(state)
    model = small_rcnn(4)
    report = load_weights(model, saved(tmp_path / "old.pth", state))
    assert_equal_state(model, mask_rcnn)
    assert not report.missing and not report.unexpected


def test_older_retinanet_names(tmp_path):
    original = small_rcnn(3, seed=5, kind=detection.RetinaNet)
    state = {}
    for key, value in original.state_dict().items():
        for i in range(4):
            key = key.replace(f"_head.conv.{i}.0.", f"_head.conv.{2 * i}.")
        state[key] = value
    assert "head.regression_head.conv.6.weight" in state
    model = small_rcnn(3, kind=detection.RetinaNet)
    load_weights(model, saved(tmp_path / "old.pth", state))
    assert_equal_state(model, original)


def test_keypoints_of_another_number_are_renewed(tmp_path):
    def keypoint_rcnn(num_keypoints):
        backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
        return detection.KeypointRCNN(backbone, 2, num_keypoints=num_keypoints)

    report = load_weights(keypoint_rcnn(5), saved(tmp_path / "w.pth", keypoint_rcnn(17).state_dict()))
    assert report.reinitialised == [
        f"roi_heads.keypoint_predictor.kps_score_lowres.{p}" for p in ("weight", "bias")
    ]


@pytest.mark.parametrize(
    ("file", "model", "text"),
    [
        ("resnet34", "resnet18", r"the model has no backbone\.body\.layer1\.2"),
        ("resnet18", "resnet34", r"it lacks \d+ of the model's tensors \(backbone\.body\.layer1\.2"),
        ("resnet50", "resnet34", r"is \(64, 64, 1, 1\) in the file, \(64, 64, 3, 3\) in the model"),
    ],
)
def test_another_architecture_is_refused_and_leaves_the_model_alone(tmp_path, file, model, text):
    path = saved(tmp_path / "body.pth", torchvision.models.get_model(file).state_dict())
    target = detector_body(model)
    before = {k: v.clone() for k, v in target.state_dict().items()}
    with pytest.raises(UserError, match=text):
        load_backbone_weights(target, path)
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())
    whole = {f"backbone.body.{k}": v for k, v in torch.load(path, weights_only=True).items()}
    with pytest.raises(UserError, match=text):
        load_weights(target, saved(tmp_path / "whole.pth", whole))


def test_files_that_hold_something_else(tmp_path):
    model = detector_body("resnet18")
    path = saved(tmp_path / "classifier.pth", torchvision.models.resnet18().state_dict())
    with pytest.raises(
        UserError, match=r"holds no detector \(its first tensor is 'conv1.weight'\).*--weights-backbone"
    ):
        load_weights(model, path)
    with pytest.raises(UserError, match="none of its 1 tensors has a place"):
        load_backbone_weights(model, saved(tmp_path / "x.pth", {"x": torch.ones(1)}))
    with pytest.raises(UserError, match="holds no weights"):
        load_backbone_weights(model, saved(tmp_path / "x.pth", {"epoch": 3}))
    with pytest.raises(UserError, match="holds a list"):
        load_backbone_weights(model, saved(tmp_path / "x.pth", [1]))
    (tmp_path / "x.pth").write_bytes(b"<html>not found</html>")
    with pytest.raises(UserError, match="refused: damaged"):
        load_backbone_weights(model, tmp_path / "x.pth")
    with pytest.raises(UserError, match="neither a file nor the name of torchvision weights"):
        load_backbone_weights(model, tmp_path / "nowhere.pth")


# --- norm layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "model"), [(nn.BatchNorm2d, FrozenBatchNorm2d), (FrozenBatchNorm2d, nn.BatchNorm2d)]
)
def test_live_and_frozen_batch_norm_differ_in_a_counter_only(tmp_path, file, model):
    theirs = small_rcnn(4, seed=6, norm_layer=file)
    ours = small_rcnn(4, norm_layer=model)
    report = load_weights(ours, saved(tmp_path / "w.pth", theirs.state_dict()))
    assert not (report.missing or report.unexpected or report.reinitialised)
    body = torchvision.models.resnet18(norm_layer=file)
    report = load_backbone_weights(ours, saved(tmp_path / "b.pth", body.state_dict()))
    assert report.unexpected == ["fc.weight", "fc.bias"] and not report.missing
    assert torch.equal(ours.backbone.body.layer4[1].bn2.running_var, body.layer4[1].bn2.running_var)


def test_batch_norm_does_not_become_group_norm(tmp_path):
    def group_norm(channels):
        return nn.GroupNorm(32, channels)

    batch = randomize(torchvision.models.resnet18(), 7)
    model = detector_body("resnet18", group_norm)
    report = load_backbone_weights(model, saved(tmp_path / "w.pth", batch.state_dict()))
    assert torch.equal(model.backbone.body.layer1[0].conv1.weight, batch.layer1[0].conv1.weight)
    assert torch.equal(model.backbone.body.layer1[0].bn1.weight, torch.ones(64))
    assert {"backbone.body.bn1.weight", "backbone.body.bn1.bias"} <= set(report.reinitialised)
    assert "scale and shift of its norm layers start anew" in str(report)
    path = saved(tmp_path / "group.pth", torchvision.models.resnet18(norm_layer=group_norm).state_dict())
    with pytest.raises(UserError, match=r"no running statistics.*pass --norm group"):
        load_backbone_weights(detector_body("resnet18"), path)
    load_backbone_weights(model, path)


def test_eps_rule_is_torchvisions(monkeypatch):
    """Every detection enum through torchvision's own builder, without storage: which ends with eps 0?"""
    seen = set()
    for name in list_models(module=detection):
        if name.startswith("ssd"):
            continue  # no frozen norm
        for member in get_model_weights(name):
            with torch.device("meta"):
                empty = torchvision.models.get_model(name, weights=None, weights_backbone=None).state_dict()
                monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, state=empty, **__: state)
                model = torchvision.models.get_model(name, weights=member, weights_backbone=None)
            eps = {module.eps for module in model.modules() if isinstance(module, FrozenBatchNorm2d)}
            assert (eps == {0.0}) == (member in weights.WITHOUT_EPS), member
            seen.add(member)
    assert set(weights.WITHOUT_EPS) <= seen


# --- class mapping -------------------------------------------------------------------------------------


def silence(model, rows, bias=-40.0):
    """Rows that COCO never used do not fire in published weights; nor shall they here."""
    with torch.no_grad():
        model.weight[rows] = 0
        model.bias[rows] = bias


@pytest.fixture(scope="module")
def coco_mask_rcnn():
    """91 classes, confident and spread over labels, as trained models are."""
    model = small_rcnn(91, seed=8)
    unused = [row for row in range(1, 91) if row not in COCO_IDS]
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.weight.mul_(4)
        model.roi_heads.box_predictor.cls_score.bias.normal_(std=0.5)
    silence(model.roi_heads.box_predictor.cls_score, unused)
    return model


@pytest.mark.parametrize("named", [True, False])
def test_91_rows_onto_80_labels_give_the_same_detections(tmp_path, coco_mask_rcnn, named):
    model = small_rcnn(81)
    names = [COCO_NAMES[i] for i in COCO_IDS]
    path = saved(tmp_path / "coco.pth", coco_mask_rcnn.state_dict())
    report = load_weights(model, path, category_ids=COCO_IDS, classes=names if named else None)
    assert "heads mapped by category id: 80 of the file's 90 labels" in str(report)
    assert not report.reinitialised
    label_of = {category_id: label for label, category_id in enumerate(COCO_IDS, start=1)}
    assert {label_of[1], label_of[90]} == {1, 80}  # person and toothbrush
    assert_same_detections(model, coco_mask_rcnn, label_of)
    labels = torch.cat([d["labels"] for d in detect(model)])
    assert len(labels.unique()) > 5 and labels.max() > 12  # beyond the first gap in the ids


def test_a_subset_keeps_its_rows(tmp_path, coco_mask_rcnn):
    model = small_rcnn(4)
    ids = [1, 18, 90]  # person, dog, toothbrush
    path = saved(tmp_path / "coco.pth", coco_mask_rcnn.state_dict())
    report = load_weights(model, path, category_ids=ids, classes=["Person", "dog", "toothbrush"])
    assert not report.reinitialised
    rows = [0, *ids]
    theirs, ours = coco_mask_rcnn.roi_heads, model.roi_heads
    assert torch.equal(ours.box_predictor.cls_score.bias, theirs.box_predictor.cls_score.bias[rows])
    assert torch.equal(
        ours.mask_predictor.mask_fcn_logits.weight, theirs.mask_predictor.mask_fcn_logits.weight[rows]
    )
    deltas = theirs.box_predictor.bbox_pred.weight.reshape(91, 4, -1)[rows].reshape(16, -1)
    assert torch.equal(ours.box_predictor.bbox_pred.weight, deltas)


@pytest.mark.parametrize(
    ("ids", "names", "text"),
    [
        ([1, 2, 3], ["cat", "dog", "bird"], r"no category id 1 \(cat\)"),  # own data that counts from 1
        ([1, 18, 12], ["person", "dog", "street sign"], r"no category id 12 \(street sign\)"),  # never used
        ([1, 18, 12], None, "no category id 12"),
        ([1, 18, 91], None, "no category id 91"),
        ([0, 1, 2], None, "no category id 0"),  # never the background's row
    ],
)
def test_ids_that_mean_something_else_are_not_mapped(tmp_path, coco_mask_rcnn, ids, names, text):
    path = saved(tmp_path / "coco.pth", coco_mask_rcnn.state_dict())
    report = load_weights(small_rcnn(4), path, category_ids=ids, classes=names)
    assert len(report.reinitialised) == 6
    assert re.search(text, str(report))


def test_a_file_of_as_many_unnamed_classes_is_taken_as_it_is(tmp_path, mask_rcnn):
    model = small_rcnn(4)
    load_weights(
        model, saved(tmp_path / "w.pth", mask_rcnn.state_dict()), classes=list("abc"), category_ids=[4, 5, 6]
    )
    assert_equal_state(model, mask_rcnn)


@pytest.mark.parametrize("kind", [detection.RetinaNet, detection.FCOS])
def test_dense_heads_are_mapped_too(tmp_path, kind):
    original = small_rcnn(91, seed=9, kind=kind)
    head = original.head.classification_head
    unused = [row for row in range(91) if row not in COCO_IDS]  # row 0 is no label of these detectors
    with torch.no_grad():
        head.cls_logits.weight.mul_(0.3)
        head.cls_logits.bias.unflatten(0, (head.num_anchors, 91))[:, unused] = -40
    model = small_rcnn(81, kind=kind)
    report = load_weights(model, saved(tmp_path / "w.pth", original.state_dict()), category_ids=COCO_IDS)
    assert not report.reinitialised and not report.missing
    assert_same_detections(model, original, {i: label for label, i in enumerate(COCO_IDS, start=1)})


@pytest.mark.parametrize(
    "name", [pytest.param("ssd300_vgg16", marks=pytest.mark.slow), "ssdlite320_mobilenet_v3_large"]
)
def test_ssd_heads_are_mapped_too(tmp_path, name):
    def build(num_classes):
        return torchvision.models.get_model(
            name,
            weights=None,
            weights_backbone=None,
            num_classes=num_classes,
            score_thresh=0.012,
            nms_thresh=0.3,
        )

    torch.manual_seed(10)
    original = build(91)
    unused = [row for row in range(1, 91) if row not in COCO_IDS]
    with torch.no_grad():
        for module in original.head.classification_head.module_list:
            last = module if isinstance(module, nn.Conv2d) else module[1]
            last.weight.normal_(std=0.02)
            last.bias.normal_(std=0.3)
            last.bias.unflatten(0, (-1, 91))[:, unused] = -40
    model = build(81)
    report = load_weights(model, saved(tmp_path / "w.pth", original.state_dict()), category_ids=COCO_IDS)
    assert not report.reinitialised and not report.missing
    label_of = {i: label for label, i in enumerate(COCO_IDS, start=1)}
    assert_same_detections(model, original, label_of, atol=2e-4)  # pixels
    report = load_weights(build(6), tmp_path / "w.pth")
    heads = {key for key in original.state_dict() if key.startswith("head.classification_head")}
    assert report.reinitialised and set(report.reinitialised) <= heads


# --- Tensorpack ----------------------------------------------------------------------------------------

PARTS = {"weight": "gamma", "bias": "beta", "running_mean": "mean/EMA", "running_var": "variance/EMA"}


def tensorpack_name(key):
    """layer2.0.bn1.weight -> group1/block0/conv1/bn/gamma."""
    *layer, module, part = key.removeprefix("layer").split(".")
    if layer and layer[-1] == "downsample":  # downsample.0 is the convolution, downsample.1 its norm
        scope, norm = f"group{int(layer[0]) - 1}/block{layer[1]}/convshortcut", module == "1"
    else:
        scope = f"group{int(layer[0]) - 1}/block{layer[1]}/conv{module[-1]}" if layer else "conv0"
        norm = module.startswith("bn")
    return f"{scope}/bn/{PARTS[part]}" if norm else f"{scope}/W"


def tensorpack_arrays(network, suffix=""):
    """The arrays of ImageNet-R50-AlignPadding.npz for this network: HWIO kernels, the first for BGR images."""
    arrays = {}
    for key, value in network.state_dict().items():
        if key.startswith("fc") or key.endswith("num_batches_tracked"):
            continue
        if value.dim() == 4:
            value = value.flip(1) if key == "conv1.weight" else value
            value = value.permute(2, 3, 1, 0)
        arrays[tensorpack_name(key) + suffix] = value.contiguous().numpy()
    arrays[f"linear/W{suffix}"] = np.zeros((2048, 1000), np.float32)
    arrays[f"linear/b{suffix}"] = np.zeros(1000, np.float32)
    return arrays


@pytest.mark.parametrize("suffix", ["", ":0"])
def test_tensorpack(tmp_path, resnet50, suffix):
    arrays = tensorpack_arrays(resnet50, suffix)
    assert {
        f"{name}{suffix}" for name in ("conv0/W", "conv0/bn/mean/EMA", "group3/block2/conv3/bn/gamma")
    } <= set(arrays)
    assert f"group1/block0/convshortcut/bn/variance/EMA{suffix}" in arrays
    np.savez(tmp_path / "ImageNet-R50-AlignPadding.npz", **arrays)
    model = detector_body()
    report = load_backbone_weights(model, tmp_path / "ImageNet-R50-AlignPadding.npz")
    assert report.unexpected == ["linear/W", "linear/b"]
    assert not report.missing and not report.notes and report.norm_eps == 1e-5
    assert_same_stages(model.backbone.body, resnet50)
    with pytest.raises(UserError, match=r"not a torchvision detector.*--weights-backbone"):
        load_weights(model, tmp_path / "ImageNet-R50-AlignPadding.npz")


def test_tensorpack_stem_sees_bgr():
    """One kernel that reads blue only, in Tensorpack's order: channel 0 of the BGR image."""
    kernel = np.zeros((7, 7, 3, 1), np.float32)
    kernel[3, 3, 0, 0] = 2.0
    model = detector_body("resnet18")
    file = weights.WeightsFile("f", {"conv0/W": torch.from_numpy(kernel)})
    weight = weights.from_foreign(file, weights.TENSORPACK, model, weights.Report("f"))[
        "backbone.body.conv1.weight"
    ]
    assert weight.shape == (1, 3, 7, 7)
    assert weight[0, :, 3, 3].tolist() == [
        0.0,
        0.0,
        2.0,
    ]  # blue is last in RGB; same mean and std: no scaling


# --- detectron2 ----------------------------------------------------------------------------------------


def stem_for_detectron2(weight):
    """Weights [O, 3, h, w] for torchvision's normalised RGB, as for 0..255 BGR less the mean."""
    return (weight / (255 * STD)[:, None, None]).flip(1)


def merged_norm(state, key):
    """Scale and shift of a batch norm in eval mode: y = s x + b."""
    s = state[f"{key}.weight"] / (state[f"{key}.running_var"] + 1e-5).sqrt()
    return s, state[f"{key}.bias"] - s * state[f"{key}.running_mean"]


def caffe2_arrays(network):
    """The names and values of ImageNetPretrained/MSRA/R-50.pkl for this network."""
    state, arrays = network.state_dict(), {}
    for key in state:
        *layer, module, part = key.removeprefix("layer").split(".")
        if module == "fc" or part not in ("weight",) or module.startswith("bn") or module == "1":
            continue
        if layer and layer[-1] == "downsample":
            name, norm = f"res{int(layer[0]) + 1}_{layer[1]}_branch1", key.replace("0.weight", "1")
        elif layer:
            name = f"res{int(layer[0]) + 1}_{layer[1]}_branch2{'abc'[int(module[-1]) - 1]}"
            norm = key.replace(".conv", ".bn").removesuffix(".weight")
        else:
            name, norm = "conv1", "bn1"
        arrays[f"{name}_w"] = (stem_for_detectron2(state[key]) if name == "conv1" else state[key]).numpy()
        scale, shift = merged_norm(state, norm)
        prefix = "res_conv1_bn" if name == "conv1" else f"{name}_bn"
        arrays[f"{prefix}_s"], arrays[f"{prefix}_b"] = scale.numpy(), shift.numpy()
    arrays["conv1_b"] = np.zeros(64, np.float32)
    arrays["fc1000_w"], arrays["fc1000_b"] = np.zeros((1000, 2048), np.float32), np.zeros(1000, np.float32)
    arrays["conv1_w_momentum"] = np.zeros(3, np.float32)
    return arrays


def detectron2_arrays(network, prefix="", bgr=True):
    """detectron2's names: res2.0.conv1.norm.weight and stem.conv1.weight."""
    arrays = {}
    for key, value in network.state_dict().items():
        name = key if key.startswith("layer") else f"stem.{key}"
        for i in range(1, 5):
            name = name.replace(f"layer{i}", f"res{i + 1}").replace(f"bn{i}", f"conv{i}.norm")
        name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        arrays[prefix + name] = (
            stem_for_detectron2(value) if bgr and key == "conv1.weight" else value
        ).numpy()
    return arrays


def pickled(path, content, protocol=pickle.HIGHEST_PROTOCOL):
    path.write_bytes(pickle.dumps(content, protocol))
    return path


@pytest.mark.parametrize("blobs", [True, False])
def test_detectron2_caffe2_names(tmp_path, resnet50, blobs):
    arrays = caffe2_arrays(resnet50)
    assert {
        "conv1_w",
        "res_conv1_bn_s",
        "res2_0_branch2a_w",
        "res2_0_branch1_bn_b",
        "res5_2_branch2c_bn_s",
    } <= set(arrays)
    path = pickled(tmp_path / "R-50.pkl", {"blobs": arrays, "cfg": "MODEL:\n"} if blobs else arrays)
    model = detector_body()
    report = load_backbone_weights(model, path)
    assert sorted(report.unexpected) == ["conv1_b", "fc1000_b", "fc1000_w"]
    assert not report.missing and report.norm_eps == 1e-5
    assert "stride in the 1x1" in str(report)
    assert_same_stages(model.backbone.body, resnet50)


def test_detectron2_stem_by_its_own_arithmetic(tmp_path, resnet50):
    """What detectron2 computes from the picture's pixels is what we compute from torchvision's normalised ones."""
    arrays = caffe2_arrays(resnet50)
    model = detector_body()
    load_backbone_weights(model, pickled(tmp_path / "R-50.pkl", arrays))
    pixels = torch.randint(0, 256, (1, 3, 37, 51), generator=torch.Generator().manual_seed(3)).float()  # RGB
    bgr = (
        pixels.flip(1) - torch.tensor([103.53, 116.28, 123.675])[:, None, None]
    )  # MODEL.PIXEL_MEAN, PIXEL_STD 1
    scale, shift = (torch.from_numpy(arrays[f"res_conv1_bn_{part}"])[:, None, None] for part in "sb")
    theirs = F.conv2d(bgr, torch.from_numpy(arrays["conv1_w"].copy()), stride=2, padding=3) * scale + shift
    ours = (pixels / 255 - MEAN[:, None, None]) / STD[:, None, None]
    with torch.no_grad():
        ours = model.backbone.body.bn1(model.backbone.body.conv1(ours))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)  # the padded edge included


def test_detectron2_model_zoo_names(tmp_path, resnet50):
    arrays = detectron2_arrays(resnet50, "backbone.bottom_up.")
    arrays["roi_heads.box_predictor.cls_score.weight"] = np.zeros((81, 1024), np.float32)
    arrays["backbone.fpn_lateral2.weight"] = np.zeros((256, 256, 1, 1), np.float32)
    content = {"model": arrays, "__author__": "Detectron2 Model Zoo"}
    path = pickled(tmp_path / "model_final_f10217.pkl", content)
    model = detector_body()
    report = load_backbone_weights(model, path)
    assert not report.missing and "BGR" in str(report) and "stride in the 1x1" in str(report)
    assert {"roi_heads.box_predictor.cls_score.weight", "backbone.fpn_lateral2.weight"} <= set(
        report.unexpected
    )
    assert_same_stages(model.backbone.body, resnet50)
    with pytest.raises(UserError, match="not a torchvision detector"):
        load_weights(model, path)
    tensors = {key: torch.from_numpy(value.copy()) for key, value in arrays.items()}
    again = detector_body()
    load_backbone_weights(again, saved(tmp_path / "model_final.pth", {"model": tensors, "iteration": 9}))
    assert_equal_state(again.backbone.body, model.backbone.body)


def test_detectron2_copy_of_torchvision_is_rgb(tmp_path, resnet50):
    content = {
        "model": detectron2_arrays(resnet50, bgr=False),
        "__author__": "torchvision",
        "matching_heuristics": True,
    }
    model = detector_body()
    report = load_backbone_weights(model, pickled(tmp_path / "R-50.pkl", content))
    torch.testing.assert_close(model.backbone.body.conv1.weight, resnet50.conv1.weight, rtol=1e-6, atol=0)
    assert_same_stages(model.backbone.body, resnet50)
    assert not report.missing and not report.notes


def test_detectron2_resnext_divides_by_the_std_and_strides_as_torchvision(tmp_path):
    network = randomize(torchvision.models.resnext50_32x4d(norm_layer=nn.BatchNorm2d), 11).eval()
    arrays = caffe2_arrays(network)
    arrays["conv1_w"] = network.conv1.weight.detach().flip(1).numpy()
    model = detector_body("resnext50_32x4d")
    report = load_backbone_weights(model, pickled(tmp_path / "X.pkl", arrays))
    assert not report.notes
    assert_same_stages(model.backbone.body, network)


def test_another_mean_is_refused(tmp_path, resnet50):
    model = detector_body()
    model.transform.image_mean = [0.5, 0.5, 0.5]
    with pytest.raises(UserError, match=r"this model subtracts \(127.5, 127.5, 127.5\)"):
        load_backbone_weights(model, pickled(tmp_path / "R-50.pkl", caffe2_arrays(resnet50)))


def test_other_std_is_scaled_for(tmp_path, resnet50):
    """A model that divides by twice the std sees half the input: its first weights must be twice as large."""
    model = detector_body()
    model.transform.image_std = (2 * STD).tolist()
    load_backbone_weights(model, pickled(tmp_path / "R-50.pkl", caffe2_arrays(resnet50)))
    torch.testing.assert_close(
        model.backbone.body.conv1.weight, 2 * resnet50.conv1.weight, rtol=1e-5, atol=1e-6
    )


# --- pickles -------------------------------------------------------------------------------------------


class Python2Pickler(pickle._Pickler):
    """Writes bytes and text as Python 2 wrote its str: opcode T, the length, the raw bytes."""

    dispatch = dict(pickle._Pickler.dispatch)  # noqa: RUF012

    def save_raw(self, value):
        data = value if isinstance(value, bytes) else value.encode("latin1")
        self.write(b"T" + len(data).to_bytes(4, "little") + data)
        self.memoize(value)

    dispatch[bytes] = dispatch[str] = save_raw


def python2_pickle(content):
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(content)
    return file.getvalue()


ARRAYS = {
    "float": np.arange(12, dtype=np.float32).reshape(3, 4) - 5.25,
    "fortran": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
    "big endian": np.array([1.5, -2.0, 300.0], dtype=">f4"),
    "half": np.array([[0.5]], dtype=np.float16),
    "integer": np.array([7, -3], dtype=np.int16),
    "scalar": np.array(2.5, dtype=np.float32),
    "empty": np.zeros((0, 3), np.float32),
}


@pytest.mark.parametrize("writer", [0, 1, 2, 3, 4, 5, "python 2", "numpy 1"])
def test_restricted_unpickler_reads_arrays_of_every_protocol(tmp_path, writer):
    content = {"model": OrderedDict(ARRAYS), "__author__": "someone"}
    if writer == "python 2":
        data = python2_pickle(content)
    elif writer == "numpy 1":  # whose modules had no underscore
        data = pickle.dumps(content, 2).replace(b"cnumpy._core.", b"cnumpy.core.")
        assert b"cnumpy.core.multiarray\n_reconstruct\n" in data
    else:
        data = pickle.dumps(content, writer)
    path = tmp_path / "w.pkl"
    path.write_bytes(data)
    file = weights.read(path)
    assert file.author == "someone" and list(file.state) == list(ARRAYS)
    for key, array in ARRAYS.items():
        assert file.state[key].shape == array.shape
        assert np.array_equal(file.state[key].numpy(), array.astype(np.float64)), key
        assert file.state[key].dtype == (torch.int64 if key == "integer" else torch.float32)


class Attack:
    """Unpickles by calling a function of the attacker's choice."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def marks(path):
    """Ways to leave a file behind."""
    return [
        (os.system, f"touch {path}"),
        (eval, f"open({str(path)!r}, 'w')"),
        (exec, f"open({str(path)!r}, 'w')"),
        (open, str(path), "w"),
        (getattr, Path(str(path)), "touch"),
        (np.save, str(path), np.zeros(1)),
    ]


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_malicious_pickle_is_refused_without_side_effect(tmp_path, number, suffix):
    attack = Attack(*marks(tmp_path / "owned")[number])
    path = tmp_path / f"w{suffix}"
    content = {"model": {"conv1_w": np.zeros(1) if suffix == ".pkl" else torch.zeros(1), "x": attack}}
    if suffix == ".pkl":
        pickled(path, content, protocol=2)
    else:
        saved(path, content)
    with pytest.raises(UserError, match="refused") as caught:
        load_backbone_weights(detector_body("resnet18"), path)
    assert len(str(caught.value).splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name]


def test_refusal_names_what_the_file_wants(tmp_path):
    path = pickled(tmp_path / "w.pkl", {"x": Attack(os.system, "true")})
    with pytest.raises(UserError, match=r"it wants to run posix\.system"):
        weights.read(path)
    with pytest.raises(UserError, match=r"it wants to run posix\.system"):
        weights.read(saved(tmp_path / "w.pth", {"x": Attack(os.system, "true")}))


def test_namespace_is_let_in_only_while_reading(tmp_path):
    path = saved(tmp_path / "w.pth", {"args": reference_args(), "model": {"x": torch.ones(1)}})
    weights.read(path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


def dtype_with_state(state):
    """A pickle of {"w": array} whose dtype is given `state`, which numpy itself would believe."""

    class Dtype:
        def __reduce__(self):
            return np.dtype, ("V8", False, True), state

    class Array:
        def __reduce__(self):
            reconstruct = np.zeros(1).__reduce__()[0]
            return reconstruct, (np.ndarray, (0,), b"b"), (1, (1,), Dtype(), False, b"\x41" * 8)

    return pickle.dumps({"w": Array()}, 2)


@pytest.mark.parametrize(
    "data",
    [
        dtype_with_state(
            (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0)
        ),  # bytes as object pointers
        dtype_with_state(
            (3, "|", None, ("a",), {"a": (np.dtype("f8"), 2**40)}, 8, 1, 0)
        ),  # far out of bounds
        pickle.dumps({"w": np.array([None])}, 2),
        pickle.dumps({"w": np.array([("a", 1.0)], dtype=[("n", "U1"), ("v", "f4")])}, 2),
        pickle.dumps({"w": np.zeros(3)}, 2)[:-9],
        pickle.dumps([np.zeros(3)], 2),
        pickle.dumps({"w": np.zeros(3)}, 2).replace(
            b"K\x03\x85", b"J\xff\xff\xff\x7f\x85"
        ),  # shape (2^31 - 1,)
        b"",
        b"\x80\x02}.",
        b"garbage",
    ],
)
def test_damaged_or_hostile_arrays_are_refused(tmp_path, data):
    path = tmp_path / "w.pkl"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"refused|holds no weights"):
        weights.read(path)


@pytest.mark.parametrize("suffix", [".pkl", ".npz", ".pth"])
def test_any_damaged_file_is_read_or_refused(tmp_path, suffix):
    """Bytes overwritten at random places: a UserError or some weights, never another exception."""
    path = tmp_path / f"w{suffix}"
    arrays = {"conv0/W": np.ones((2, 3), np.float32), "conv0/bn/gamma": np.ones(3, np.float32)}
    if suffix == ".npz":
        np.savez(path, **arrays)
    elif suffix == ".pkl":
        pickled(path, {"model": arrays, "__author__": "x"}, protocol=2)
    else:
        saved(
            path,
            {
                "model": {k: torch.from_numpy(v) for k, v in arrays.items()},
                "classes": ["a"],
                "category_ids": [1],
            },
        )
    original = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        data = bytearray(original)
        for place in rng.integers(0, len(data), size=rng.integers(1, 4)):
            data[place] = rng.integers(0, 256)
        path.write_bytes(data[: rng.integers(1, len(data))] if rng.random() < 0.1 else data)
        try:
            assert weights.read(path).state
        except UserError:
            refused += 1
    assert refused > 30


def test_stand_ins_cannot_be_changed_by_a_file(tmp_path):
    """BUILD on an allowed name itself, with attributes to set, would outlive the file."""
    for module, name in weights.PICKLE_NAMES:
        data = b"\x80\x02" + f"c{module}\n{name}\n".encode() + b"N}U\x05owned\x88s\x86b."
        path = tmp_path / "w.pkl"
        path.write_bytes(data)
        with pytest.raises(UserError, match="refused"):
            weights.read(path)
        assert not hasattr(weights.PICKLE_NAMES[module, name], "owned")


def test_npz_with_a_pickle_inside_is_refused(tmp_path):
    np.savez(
        tmp_path / "w.npz",
        **{"conv0/W": np.array([Attack(os.system, f"touch {tmp_path}/owned")], dtype=object)},
    )
    with pytest.raises(UserError, match=r"refused.*allow_pickle"):
        weights.read(tmp_path / "w.npz")
    (tmp_path / "w.npz").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(UserError, match="refused"):
        weights.read(tmp_path / "w.npz")
    assert not (tmp_path / "owned").exists()


# --- downloads -----------------------------------------------------------------------------------------

RESNET18 = torchvision.models.ResNet18_Weights.IMAGENET1K_V1


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "hub" / "checkpoints"


def serve(monkeypatch, answer):
    def urlopen(_):
        if isinstance(answer, Exception):
            raise answer
        response = io.BytesIO(answer)
        response.info = email.message.Message
        return response

    monkeypatch.setattr(torch.hub, "urlopen", urlopen)


def test_offline_says_where_to_put_the_file(hub, monkeypatch):
    serve(monkeypatch, urllib.error.URLError("Name or service not known"))
    with pytest.raises(UserError) as caught:
        load_backbone_weights(detector_body("resnet18"), "ResNet18_Weights.IMAGENET1K_V1")
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    assert "no download of resnet18-f37072fd.pth" in text and "Name or service not known" in text
    assert f"put it at {hub}/resnet18-f37072fd.pth" in text and RESNET18.url in text


def test_bad_download_is_removed(hub, monkeypatch):
    serve(monkeypatch, b"not the weights")
    with pytest.raises(UserError, match=r"invalid hash value \(expected \"f37072fd\""):
        load_backbone_weights(detector_body("resnet18"), RESNET18)
    assert list(hub.iterdir()) == []


def test_damaged_file_in_the_cache_is_removed(hub, monkeypatch):
    serve(monkeypatch, urllib.error.URLError("offline"))
    hub.mkdir(parents=True)
    (hub / "resnet18-f37072fd.pth").write_bytes(b"half a download")
    with pytest.raises(UserError, match="removed, since its SHA-256 does not begin with f37072fd"):
        load_backbone_weights(detector_body("resnet18"), RESNET18)
    assert list(hub.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["FasterRCNN_ResNet50_FPN_Weights.COCO_V1", "FasterRCNN_ResNet50_FPN_Weights.DEFAULT"]
)
def test_published_weights_are_mapped_by_name_and_want_eps_0(
    hub, monkeypatch, coco_mask_rcnn, tmp_path, name
):
    """The whole way from a name, with a file of another architecture in the published one's place."""
    path = saved(tmp_path / "w.pth", coco_mask_rcnn.state_dict())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    monkeypatch.setattr(WeightsEnum, "url", f"https://example.invalid/published-{digest}.pth")
    serve(monkeypatch, path.read_bytes())
    model = small_rcnn(3)
    report = load_weights(model, name, category_ids=[17, 18], classes=["cat", "dog"])
    assert (hub / f"published-{digest}.pth").is_file()
    assert report.source == "FasterRCNN_ResNet50_FPN_Weights.COCO_V1" and report.norm_eps == 0.0
    assert "norm layers want eps 0" in str(report) and not report.reinitialised
    theirs = coco_mask_rcnn.roi_heads.box_predictor.cls_score.bias
    assert torch.equal(model.roi_heads.box_predictor.cls_score.bias, theirs[[0, 17, 18]])
    # the same bytes as a local file under any name are recognised by their hash
    assert load_weights(small_rcnn(4), path).norm_eps == 0.0
    # 90 classes of other names are not COCO's, even in a head of the same size
    report = load_weights(
        small_rcnn(91), name, category_ids=list(range(1, 91)), classes=[f"c{i}" for i in range(90)]
    )
    assert report.reinitialised


@pytest.mark.parametrize(
    "name", ["resnet50", "MaskRCNN_ResNet50_FPN_Weights.COCO_V9", "Resnet50.pth", "a/b.c", ""]
)
def test_unknown_names(name):
    with pytest.raises(UserError, match="neither a file nor the name"):
        weights.read(name)


# --- other backbones -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("builder", "backbone_enum", "classifier"),
    [
        pytest.param(
            "ssd300_vgg16",
            torchvision.models.VGG16_Weights.IMAGENET1K_FEATURES,
            "vgg16",
            marks=pytest.mark.slow,
        ),
        (
            "ssdlite320_mobilenet_v3_large",
            torchvision.models.MobileNet_V3_Large_Weights.IMAGENET1K_V1,
            "mobilenet_v3_large",
        ),
        (
            "fasterrcnn_mobilenet_v3_large_fpn",
            torchvision.models.MobileNet_V3_Large_Weights.IMAGENET1K_V1,
            "mobilenet_v3_large",
        ),
    ],
)
def test_classifiers_into_other_extractors_as_torchvision_does(
    tmp_path, monkeypatch, builder, backbone_enum, classifier
):
    """torchvision's builder, given the same classifier, is the oracle."""
    state = randomize(torchvision.models.get_model(classifier), 12).state_dict()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: state)
    build = torchvision.models.get_model_builder(builder)
    theirs = build(weights=None, weights_backbone=backbone_enum)
    ours = build(weights=None, weights_backbone=backbone_enum)
    randomize(ours.backbone, 13)
    report = load_backbone_weights(ours, saved(tmp_path / "w.pth", state))
    assert all(key.startswith("classifier.") for key in report.unexpected)
    for key, value in theirs.backbone.state_dict().items():
        if key in {name.removeprefix("backbone.") for name in report.loaded}:
            assert torch.equal(ours.backbone.state_dict()[key], value), key
    assert all(key.startswith(("backbone.extra", "backbone.scale_weight")) for key in report.missing)
    convolutions = [value for value in state.values() if value.dim() == 4]
    loaded = [key for key in report.loaded if ours.state_dict()[key].dim() == 4]
    assert len(loaded) == len(convolutions)

    detector = saved(tmp_path / "detector.pth", theirs.state_dict())
    again = build(weights=None, weights_backbone=backbone_enum)
    report = load_backbone_weights(again, detector)
    assert not report.missing
    extractor = again.backbone.body if hasattr(again.backbone, "body") else again.backbone
    assert_equal_state(
        extractor, theirs.backbone.body if hasattr(theirs.backbone, "body") else theirs.backbone
    )


@pytest.mark.parametrize("name", ["convnext_tiny", "densenet121"])
def test_extractors_of_a_classifiers_features(tmp_path, name):
    classifier = randomize(torchvision.models.get_model(name), 14)
    model = nn.Module()
    model.backbone = nn.Module()
    model.backbone.body = randomize(torchvision.models.get_model(name), 15).features
    state = classifier.state_dict()
    if name == "densenet121":  # the published files' names
        state = {k.replace(".norm1.", ".norm.1.").replace(".conv2.", ".conv.2."): v for k, v in state.items()}
        assert "features.denseblock1.denselayer1.norm.1.weight" in state
    report = load_backbone_weights(model, saved(tmp_path / "w.pth", state))
    assert not report.missing and all(key.startswith("classifier") for key in report.unexpected)
    assert_equal_state(model.backbone.body, classifier.features)


def test_deeper_convnext_is_refused(tmp_path):
    model = nn.Module()
    model.backbone = nn.Module()
    model.backbone.body = torchvision.models.convnext_tiny().features
    path = saved(tmp_path / "w.pth", torchvision.models.convnext_small().state_dict())
    with pytest.raises(UserError, match=r"the model has no backbone\.body\.5\.9"):
        load_backbone_weights(model, path)
