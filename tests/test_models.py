from functools import partial

import pytest
import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torchvision.models import WeightsEnum, get_model
from torchvision.models.detection import ssd, ssdlite
from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

import checkpoint
import models
from masks import CroppedMasks
from utils import UserError

SMALL = {"min_size": 64, "max_size": 64}
TARGET_MASKS = torch.zeros(1, 48, 64, dtype=torch.uint8)
TARGET_MASKS[0, 8:40, 8:40] = 1


def one_batch(keypoints=0):
    """Two uint8 images of one object each, as the data set gives them."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (3, 48, 64), dtype=torch.uint8, generator=generator) for _ in range(2)]
    target = {
        "boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]),
        "labels": torch.tensor([1]),
        "masks": CroppedMasks.from_dense(TARGET_MASKS),
    }
    if keypoints:
        target["keypoints"] = torch.tensor([[[20.0, 20.0, 1.0]] * keypoints])
    return images, [dict(target, image_id=i) for i in range(2)]


def check_step(model, keypoints=0):
    images, targets = one_batch(keypoints)
    losses = model.train()(images, targets)
    total = sum(losses.values())
    assert torch.isfinite(total)
    total.backward()
    with torch.no_grad():
        outputs = model.eval()(images)
    assert len(outputs) == 2 and all(output["boxes"].shape[1] == 4 for output in outputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", models.NAMES)
def test_every_detector_trains_and_detects(name):
    keypoints = 5 if name.startswith("keypoint") else 0
    torch.manual_seed(0)
    model, report = models.build_model(name, 4, num_keypoints=keypoints or None, **SMALL)
    assert report is None
    check_step(model, keypoints)
    stock = get_model(
        name,
        weights=None,
        weights_backbone=None,
        num_classes=4,
        **({"num_keypoints": 5} if keypoints else {}),
    )
    stock.load_state_dict(model.state_dict(), strict=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "backbone",
    ["mobilenet_v2", "efficientnet_v2_s", "swin_v2_t", "regnet_y_400mf", "densenet121", "vgg11", "vgg11_bn"],
)
def test_backbones_train_under_the_fpn(backbone):
    """The families that tests/test_detectors.py does not run."""
    torch.manual_seed(0)
    model, _ = models.build_model("maskrcnn_resnet50_fpn", 4, backbone=backbone, **SMALL)
    model.eval()
    shapes = [tuple(level.shape[1:]) for level in model.backbone(torch.zeros(1, 3, 64, 64)).values()]
    assert shapes == [(256, 16, 16), (256, 8, 8), (256, 4, 4), (256, 2, 2), (256, 1, 1)]
    check_step(model)


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        # two levels for the two rows of anchors of this builder, and the pooled one
        ("fasterrcnn_mobilenet_v3_large_fpn", [4, 2, 1]),
        # strides 8, 16, 32, then two strided convolutions
        ("retinanet_resnet50_fpn_v2", [8, 4, 2, 1, 1]),
        ("fasterrcnn_resnet50_fpn_v2", [16, 8, 4, 2, 1]),
    ],
)
def test_another_backbone_keeps_the_pyramid_of_its_builder(name, levels):
    model, _ = models.build_model(name, 4, backbone="resnet18", **SMALL)
    maps = model.eval().backbone(torch.zeros(1, 3, 64, 64))
    assert [level.shape[-1] for level in maps.values()] == levels
    norms = [type(m).__name__ for m in model.backbone.fpn.modules() if "Norm2d" in type(m).__name__]
    stock = get_model(name, weights=None, weights_backbone=None)
    assert norms == [type(m).__name__ for m in stock.backbone.fpn.modules() if "Norm2d" in type(m).__name__]
    check_step(model)


def test_torchvisions_own_parts_get_floats_and_frames():
    images, targets = one_batch()
    boxes_only = [{name: target[name] for name in ("boxes", "labels", "image_id")} for target in targets]
    floats, dense = models.torchvision_inputs(None, (images, targets))
    for image, found, target in zip(images, floats, dense, strict=True):
        assert torch.equal(found, image.float() / 255)
        assert target["masks"].dtype == torch.uint8 and torch.equal(target["masks"], TARGET_MASKS)
    assert all("masks" not in target for target in models.torchvision_inputs(None, (images, boxes_only))[1])


def test_fast_and_reference_parts_hold_the_same_parameters():
    fast, _ = models.build_model("maskrcnn_resnet50_fpn", 4, backbone="resnet18", **SMALL)
    reference, _ = models.build_model(
        "maskrcnn_resnet50_fpn", 4, backbone="resnet18", reference_ops=True, **SMALL
    )
    reference.load_state_dict(fast.state_dict(), strict=True)
    assert type(reference.rpn) is not type(fast.rpn)
    assert models.iou_types(fast) == models.iou_types(reference) == ["bbox", "segm"]
    check_step(reference)


@pytest.mark.parametrize(
    ("norm", "layer"), [("frozen", FrozenBatchNorm2d), ("batch", nn.BatchNorm2d), ("group", nn.GroupNorm)]
)
def test_norms_by_flag(norm, layer):
    model, _ = models.build_model("fasterrcnn_resnet50_fpn", 3, backbone="resnet18", norm=norm, norm_eps=1e-3)
    assert isinstance(model.backbone.body.bn1, layer)
    assert models.describe_norm(model) == {"type": norm, "eps": 1e-3}


def test_converted_norms_keep_weights_and_statistics():
    old = nn.BatchNorm2d(4, eps=1e-3)
    with torch.no_grad():
        for tensor in (old.weight, old.bias, old.running_mean, old.running_var):
            tensor.uniform_(0.5, 1.5)
    x = torch.randn(2, 4, 3, 3)
    frozen = models.converted_norm(old, "frozen")
    torch.testing.assert_close(frozen(x), old.eval()(x))
    torch.testing.assert_close(models.converted_norm(frozen, "batch").eval()(x), frozen(x))


def ssd_body(k):
    return ssd._vgg_extractor(torchvision.models.vgg16(), False, k)


def ssdlite_body(k):
    norm = partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)
    classifier = torchvision.models.mobilenet_v3_large(norm_layer=norm, reduced_tail=True)
    return ssdlite._mobilenet_extractor(classifier, k, norm)


def mobilenet_body(k):
    options = {"backbone_name": "mobilenet_v3_large", "norm_layer": nn.BatchNorm2d, "weights": None}
    return mobilenet_backbone(fpn=True, trainable_layers=k, **options)


def resnet_body(k, **options):
    options = {"backbone_name": "resnet50", "norm_layer": nn.BatchNorm2d, "weights": None, **options}
    return resnet_fpn_backbone(trainable_layers=k, **options)


@pytest.mark.parametrize(
    ("name", "body", "num_stages"),
    [
        ("ssd300_vgg16", ssd_body, 5),
        ("ssdlite320_mobilenet_v3_large", ssdlite_body, 6),
        ("fasterrcnn_mobilenet_v3_large_fpn", mobilenet_body, 6),
        ("fasterrcnn_resnet50_fpn", resnet_body, 5),
        ("fcos_resnet50_fpn", partial(resnet_body, returned_layers=[2, 3, 4]), 5),
    ],
)
def test_each_number_of_trainable_stages_freezes_what_torchvision_does(name, body, num_stages):
    model = get_model(name, weights=None, weights_backbone=None)
    assert len(models.stages_of(model.backbone)) == num_stages
    for k in range(num_stages, -1, -1):
        with torch.device("meta"):
            theirs = {
                key: p.requires_grad for key, p in body(k).named_parameters() if "extra_blocks" not in key
            }
        models.freeze_stages(model.backbone, k)
        ours = {
            key: p.requires_grad for key, p in model.backbone.named_parameters() if "extra_blocks" not in key
        }
        assert ours == theirs, f"{k} stages"
    with pytest.raises(
        UserError, match=f"--trainable-backbone-layers {num_stages + 1}: .* 0 to {num_stages}"
    ):
        models.freeze_stages(model.backbone, num_stages + 1)


@pytest.mark.parametrize(
    ("name", "num_stages", "trainable"),
    [
        ("ssd300_vgg16", 5, 4),
        ("ssdlite320_mobilenet_v3_large", 6, 6),
        ("fasterrcnn_mobilenet_v3_large_320_fpn", 6, 3),
        ("maskrcnn_resnet50_fpn", 5, 3),
        ("retinanet_resnet50_fpn_v2", 5, 3),
    ],
)
def test_a_pretrained_backbone_trains_torchvisions_default_of_stages(name, num_stages, trainable):
    model, _ = models.build_model(name, 4, weights_backbone="read elsewhere", state={})
    frozen = [
        all(not p.requires_grad for module in stage for p in module.parameters())
        for stage in models.stages_of(model.backbone)
    ]
    assert frozen == [True] * (num_stages - trainable) + [False] * trainable


@pytest.mark.parametrize(
    ("backbone", "first_of_stage"),
    [
        ("mobilenet_v3_small", ["0", "1", "2", "4", "9", "12"]),
        ("efficientnet_b0", ["0", "2", "3", "4", "6", "8"]),
        (
            "convnext_tiny",
            ["0", "2", "4", "6"],
        ),  # a normalised convolution between two stages belongs to the later
        ("swin_t", ["0", "2", "4", "6"]),
        ("densenet121", ["conv0", "pool0", "transition1", "transition2", "transition3"]),
        ("vgg11", ["0", "2", "5", "10", "15"]),  # the last pooling has nothing after it
        ("regnet_y_400mf", ["stem", "block1", "block2", "block3", "block4"]),
    ],
)
def test_stages_of_other_backbones_begin_where_the_map_is_halved(backbone, first_of_stage):
    model, _ = models.build_model("fasterrcnn_resnet50_fpn", 3, backbone=backbone)
    names = {module: name for name, module in model.backbone.body.named_children()}
    assert [names[stage[0]] for stage in models.stages_of(model.backbone)] == first_of_stage


@pytest.mark.parametrize("trainable", [0, 2, 5])
def test_stages_are_frozen_from_the_first_on(trainable):
    model, _ = models.build_model(
        "fasterrcnn_resnet50_fpn", 3, backbone="resnet18", trainable_layers=trainable
    )
    body = model.backbone.body
    stages = [body.conv1, body.layer1, body.layer2, body.layer3, body.layer4]
    trains = [all(p.requires_grad for p in stage.parameters()) for stage in stages]
    assert trains == [False] * (5 - trainable) + [True] * trainable
    assert all(p.requires_grad for p in model.backbone.fpn.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "yolo"}, "--model yolo: unknown"),
        ({"backbone": "resnet17"}, "no builder of that name"),
        ({"backbone": "vit_b_16"}, "VisionTransformer is not among .* ResNet, RegNet.* choose one of these"),
        ({"backbone": "squeezenet1_0"}, "SqueezeNet is not among"),
        ({"name": "ssd300_vgg16", "backbone": "resnet18"}, "only the FPN detectors"),
        ({"backbone": "swin_t", "norm": "group"}, "--norm group: .* layer norm.*; leave the flag out"),
        ({"name": "ssd300_vgg16", "norm": "frozen"}, "--norm frozen: .* no norm layers; leave the flag out"),
        ({"trainable_layers": 6}, "0 to 5"),
        ({"norm": "layer"}, "choose one of"),
    ],
)
def test_what_cannot_be_built_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        models.build_model(options.pop("name", "fasterrcnn_resnet50_fpn"), 3, **options)


# --- a classifier's weights -------------------------------------------------------------------------------


def last_map(name, classifier, x):
    """A classifier's features before it pools them, [B, C, H, W]."""
    if name.startswith("resnet"):
        return nn.Sequential(*list(classifier.children())[:-2])(x)
    if name.startswith("regnet"):
        return classifier.trunk_output(classifier.stem(x))
    x = classifier.features(x)
    return x.permute(0, 3, 1, 2) if name.startswith("swin") else x


@pytest.mark.parametrize(
    "name",
    [
        "resnet18", "regnet_y_400mf", "densenet121", "vgg11_bn", "mobilenet_v2", "efficientnet_b0", "convnext_tiny",
        "swin_t",
    ],
)  # fmt: skip
def test_a_classifiers_weights_give_its_features(tmp_path, name):
    torch.manual_seed(2)
    classifier = get_model(name).eval()
    for key, value in classifier.state_dict().items():
        if key.endswith(("running_mean", "running_var")):
            value.uniform_(0.5, 1.5)
    torch.save(classifier.state_dict(), tmp_path / "w.pth")
    model, report = models.build_model(
        "fasterrcnn_resnet50_fpn", 3, backbone=name, weights_backbone=tmp_path / "w.pth"
    )
    assert not report.missing and not report.reinitialised
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        *_, ours = model.eval().backbone.body(x).values()
        theirs = last_map(name, classifier, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


# --- SSDlite's two tails ---------------------------------------------------------------------------------


def random_mobilenet():
    """A classifier's weights as the ImageNet ones are laid out."""
    generator = torch.Generator().manual_seed(5)
    state = torchvision.models.mobilenet_v3_large().state_dict()
    for value in state.values():
        if value.is_floating_point():
            value.uniform_(0.5, 1, generator=generator).div_(value.numel() ** 0.5)
    return state


def test_ssdlite_takes_imagenet_weights_as_torchvision_does(tmp_path, monkeypatch):
    """torchvision builds SSDlite with half the channels in its tail unless ImageNet weights are put in."""
    name, enum = "ssdlite320_mobilenet_v3_large", "MobileNet_V3_Large_Weights.IMAGENET1K_V1"
    state = random_mobilenet()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: state)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.manual_seed(0)
    ours, report = models.build_model(name, 4, weights_backbone=enum)
    torch.manual_seed(1)
    theirs = get_model(name, weights=None, weights_backbone=enum, num_classes=4).eval()
    assert all(key.startswith("backbone.extra.") for key in report.missing)
    for key, value in theirs.backbone.features.state_dict().items():
        assert torch.equal(ours.backbone.features.state_dict()[key], value), key
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert models.describe_norm(ours) == {"type": "batch", "eps": 0.001}
    assert all(p.requires_grad for p in ours.parameters())
    images = [torch.rand(3, 100, 120), torch.rand(3, 90, 80)]
    with torch.no_grad():
        for a, b in zip(ours.eval()(images), theirs(images), strict=True):
            torch.testing.assert_close(a["boxes"], b["boxes"], atol=1e-3, rtol=0)
            assert torch.equal(a["labels"], b["labels"])

    torch.save(state, tmp_path / "classifier.pth")
    torch.save(ours.state_dict(), tmp_path / "detector.pth")
    for source in ({"weights_backbone": tmp_path / "classifier.pth"}, {"weights": tmp_path / "detector.pth"}):
        again, report = models.build_model(name, 4, **source)
        assert again.backbone.features[1][3][0].out_channels == 960
        assert not report.reinitialised
    resumed, report = models.build_model(name, 4, weights_backbone="gone.pth", state=ours.state_dict())
    assert report is None
    resumed.load_state_dict(ours.state_dict(), strict=True)
    scratch, _ = models.build_model(name, 4)
    assert scratch.backbone.features[1][3][0].out_channels == 480
    check_step(ours)


# --- norm by rule and by file ----------------------------------------------------------------------------


def written_checkpoint(path, model):
    """A checkpoint of ours, with the norm that it records."""
    content = {"model": checkpoint.plain_state_dict(model), "norm": models.describe_norm(model)}
    checkpoint.save({**content, "classes": ["a", "b"], "category_ids": [1, 2]}, path)
    return path


def test_pretrained_norms_are_frozen_except_where_torchvision_keeps_them_live(tmp_path):
    for name, backbone, kind in (
        ("fasterrcnn_resnet50_fpn", "resnet18", "frozen"),
        ("fasterrcnn_resnet50_fpn_v2", "resnet18", "batch"),
        ("ssdlite320_mobilenet_v3_large", None, "batch"),
    ):
        scratch, _ = models.build_model(name, 3, backbone=backbone)
        assert models.describe_norm(scratch)["type"] == "batch"
        path = tmp_path / f"{name}.pth"
        torch.save(scratch.state_dict(), path)
        pretrained, _ = models.build_model(name, 3, backbone=backbone, weights=path)
        assert models.describe_norm(pretrained)["type"] == kind


@pytest.mark.parametrize("norm", ["batch", "group", "frozen", "sync"])
def test_a_checkpoint_among_the_weights_brings_its_norm(tmp_path, norm):
    options = {"backbone": "resnet18", **SMALL}
    trained, _ = models.build_model("fasterrcnn_resnet50_fpn", 3, norm=norm, norm_eps=1e-3, **options)
    path = written_checkpoint(tmp_path / "checkpoint.pth", trained)
    tuned, report = models.build_model("fasterrcnn_resnet50_fpn", 3, weights=path, **options)
    assert models.describe_norm(tuned) == {"type": norm, "eps": 1e-3}
    assert not any("norm layers were" in note for note in report.notes)


def test_another_norm_than_the_checkpoints_is_said_or_refused(tmp_path):
    options = {"backbone": "resnet18", **SMALL}
    trained, _ = models.build_model("fasterrcnn_resnet50_fpn", 3, norm="frozen", **options)
    path = written_checkpoint(tmp_path / "frozen.pth", trained)
    _, report = models.build_model("fasterrcnn_resnet50_fpn", 3, weights=path, norm="batch", **options)
    assert "its norm layers were frozen, this model's are batch" in str(report)
    trained, _ = models.build_model("fasterrcnn_resnet50_fpn", 3, norm="group", **options)
    path = written_checkpoint(tmp_path / "group.pth", trained)
    with pytest.raises(UserError, match="pass --norm group"):
        models.build_model("fasterrcnn_resnet50_fpn", 3, weights=path, norm="frozen", **options)


@pytest.mark.parametrize("backbone", ["swin_t", "vgg11"])
def test_a_resumed_run_names_the_norm_that_its_backbone_has_anyway(backbone):
    model, _ = models.build_model("fasterrcnn_resnet50_fpn", 3, backbone=backbone)
    norm = models.describe_norm(model)
    again, _ = models.build_model(
        "fasterrcnn_resnet50_fpn", 3, backbone=backbone, norm=norm["type"], norm_eps=norm["eps"]
    )
    assert models.describe_norm(again) == norm


def test_group_norm_divides_any_number_of_channels_as_evenly_as_it_can():
    # 32 groups where 32 divides the channels, else the largest power of two that does: 24 = 8 x 3
    groups = {c: models.converted_norm(nn.BatchNorm2d(c), "group").num_groups for c in (64, 24, 40, 7)}
    assert groups == {64: 32, 24: 8, 40: 8, 7: 1}


def test_synchronised_norm_reaches_the_heads():
    model, _ = models.build_model("maskrcnn_resnet50_fpn_v2", 3, norm="sync")
    live = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert live and all(isinstance(m, models.SyncBatchNorm) for m in live)
    assert any(isinstance(m, models.SyncBatchNorm) for m in model.roi_heads.modules())


def sync_norm_on_rank(rank, folder):
    """Run by two processes: a training step of a synchronised norm on this rank's part of the batch."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    norm, parts, _ = norm_and_batches()
    norm = models.converted_norm(norm, "sync").train()
    x = parts[rank].requires_grad_()
    y = norm(x)
    (y * torch.arange(y.numel()).view_as(y).sin()).sum().backward()
    sums = [p.grad.clone() for p in norm.parameters()]
    for grad in sums:
        dist.all_reduce(grad)
    norm.eval()
    state = {key: value for key, value in norm.state_dict().items() if "running" in key}
    torch.save({"y": y, "x": x.grad, "sums": sums, **state}, folder / f"{rank}.pth")
    dist.destroy_process_group()


def norm_and_batches():
    """A batch norm with eps 0.01, and parts of 3 and of 1 images: the ranks need not have equal shares."""
    generator = torch.Generator().manual_seed(3)
    norm = nn.BatchNorm2d(4, eps=0.01)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.uniform_(0.5, 1.5, generator=generator)
    parts = [torch.randn(n, 4, 5, 6, generator=generator) * 3 + 100 for n in (3, 1)]
    return norm, parts, torch.cat(parts)


@pytest.mark.slow
def test_synchronised_norm_on_two_cpu_ranks_is_batch_norm_over_both_parts(tmp_path):
    torch.multiprocessing.start_processes(sync_norm_on_rank, (tmp_path,), nprocs=2, start_method="spawn")
    ranks = [torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in range(2)]
    norm, parts, x = norm_and_batches()
    x.requires_grad_()
    y = norm.train()(x)
    weights = torch.cat([torch.arange(part.numel()).view_as(part).sin() for part in parts])
    (y * weights).sum().backward()
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    close(torch.cat([rank["y"] for rank in ranks]), y)
    close(torch.cat([rank["x"] for rank in ranks]), x.grad)
    for rank in ranks:
        close(rank["sums"], [p.grad for p in norm.parameters()])
        for key in ("running_mean", "running_var"):
            close(rank[key], norm.state_dict()[key])
