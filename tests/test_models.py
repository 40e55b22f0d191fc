import pytest
import torch
from torch import nn
from torchvision.models import get_model
from torchvision.ops import FrozenBatchNorm2d

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
    ["resnet18", "resnext50_32x4d", "mobilenet_v3_large", "efficientnet_b0", "convnext_tiny", "swin_t"],
)
def test_backbones_train_under_the_fpn(backbone):
    torch.manual_seed(0)
    model, _ = models.build_model("maskrcnn_resnet50_fpn", 4, backbone=backbone, **SMALL)
    model.eval()
    shapes = [tuple(level.shape[1:]) for level in model.backbone(torch.zeros(1, 3, 64, 64)).values()]
    assert shapes == [(256, 16, 16), (256, 8, 8), (256, 4, 4), (256, 2, 2), (256, 1, 1)]
    check_step(model)


def test_fast_and_reference_parts_hold_the_same_parameters():
    fast, _ = models.build_model("maskrcnn_resnet50_fpn", 4, backbone="resnet18")
    reference, _ = models.build_model("maskrcnn_resnet50_fpn", 4, backbone="resnet18", reference_ops=True)
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
        ({"name": "ssd300_vgg16", "backbone": "resnet18"}, "only the FPN detectors"),
        ({"trainable_layers": 6}, "0 to 5"),
        ({"norm": "layer"}, "choose one of"),
    ],
)
def test_what_cannot_be_built_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        models.build_model(options.pop("name", "fasterrcnn_resnet50_fpn"), 3, **options)
