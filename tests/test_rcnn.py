"""rcnn.py: whole models with the fast parts against stock torchvision for the same weights and sampled indices."""

import copy
import functools
from pathlib import Path

import pytest
import torch
import torchvision
from test_roi_heads import KeyedSampler, Watch
from torch import nn
from torchvision.models.detection import FasterRCNN, KeypointRCNN, MaskRCNN
from torchvision.models.detection.backbone_utils import (
    BackboneWithFPN,
    mobilenet_backbone,
    resnet_fpn_backbone,
)
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

import boxes
import models
import roi_heads
import rpn
from coco_utils import CocoDataset, collate, dataset_paths
from masks import CroppedMasks
from rcnn import FastTransform, FoldedConv2d, fold_frozen_batch_norms, install_fast_parts
from transforms import build_transforms

COCO128 = Path(__file__).parents[2] / "shared" / "data" / "coco128"

NUM_CLASSES = 4
NUM_KEYPOINTS = 3
CHANNELS = 16  # of the FPN; few, as are the proposals: each ReLU is a chance that rounding flips it
SETTINGS = {
    "min_size": 96,
    "max_size": 160,
    "rpn_post_nms_top_n_train": 60,
    "rpn_post_nms_top_n_test": 60,
    "box_batch_size_per_image": 1024,  # all of them: rounding may swap proposals of nearly equal score
    "box_detections_per_img": 15,
}


def make_model(kind, seed=0):
    """A small stock model. Frozen norms hold the statistics of its own activations, so values stay near 1. The
    backbone and the box head are smooth: a ReLU near zero that rounding flips moves a whole gradient.
    """
    torch.manual_seed(seed)
    body = torchvision.models.resnet18(norm_layer=FrozenBatchNorm2d)
    for block in list(body.modules()):
        if isinstance(getattr(block, "relu", None), nn.ReLU):
            block.relu = nn.SiLU()
    for layer in (body.conv1, body.bn1, body.layer1):
        layer.requires_grad_(False)
    levels = {f"layer{n}": str(n - 1) for n in (1, 2, 3, 4)}
    backbone = BackboneWithFPN(body, levels, [64, 128, 256, 512], CHANNELS, LastLevelMaxPool())
    calibrate(backbone)
    head = nn.Sequential(nn.Flatten(), nn.Linear(CHANNELS * 49, 32), nn.SiLU())
    predictor = FastRCNNPredictor(32, NUM_CLASSES)
    nn.init.normal_(predictor.cls_score.weight, std=0.1)
    nn.init.normal_(predictor.bbox_pred.weight, std=0.1)
    more = {}
    if kind is MaskRCNN:
        more = {
            "mask_head": MaskRCNNHeads(CHANNELS, (8,), 1),
            "mask_predictor": MaskRCNNPredictor(8, 8, NUM_CLASSES),
        }
    elif kind is KeypointRCNN:
        more = {
            "keypoint_head": KeypointRCNNHeads(CHANNELS, (8,)),
            "keypoint_predictor": KeypointRCNNPredictor(8, NUM_KEYPOINTS),
        }
    return kind(backbone, box_head=head, box_predictor=predictor, **SETTINGS, **more)


@torch.no_grad()
def calibrate(backbone):
    def measure(norm, inputs):
        norm.running_mean.copy_(inputs[0].mean((0, 2, 3)))
        norm.running_var.copy_(inputs[0].var((0, 2, 3)))
        norm.weight.copy_(torch.rand(norm.weight.shape) * 0.5 + 0.5)
        norm.bias.copy_(torch.randn(norm.bias.shape) * 0.1)

    norms = [module for module in backbone.modules() if isinstance(module, FrozenBatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(measure) for norm in norms]
    backbone(torch.randn(1, 3, 96, 128))
    for hook in hooks:
        hook.remove()


def make_batch(counts, sizes=((120, 150), (100, 90)), seed=1):
    """uint8 images and targets with dense masks that reach beyond their boxes."""
    generator = torch.Generator().manual_seed(seed)
    images, targets = [], []
    for count, (height, width) in zip(counts, sizes, strict=True):
        images.append(torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8))
        side = torch.rand(count, 2, generator=generator) * torch.tensor([width, height]) * 0.5 + 6
        corner = torch.rand(count, 2, generator=generator) * (torch.tensor([width, height]) - side)
        target_boxes = torch.cat([corner, corner + side], dim=1)
        masks = torch.zeros(count, height, width, dtype=torch.uint8)
        for mask, (x0, y0, x1, y1) in zip(masks, target_boxes.int().tolist(), strict=True):
            mask[y0 : y1 + 3, max(0, x0 - 2) : x1] = 1
            mask[(y0 + y1) // 2, :] = 0
        keypoints = torch.rand(count, NUM_KEYPOINTS, 2, generator=generator) * side[:, None] + corner[:, None]
        visible = torch.randint(0, 3, (count, NUM_KEYPOINTS, 1), generator=generator)
        targets.append(
            {
                "boxes": target_boxes,
                "labels": torch.randint(1, NUM_CLASSES, (count,), generator=generator),
                "masks": masks,
                "keypoints": torch.cat([keypoints, visible], dim=2),
            }
        )
    return images, targets


def as_floats(images):
    return [image / 255 for image in images]


def inject_sampling(monkeypatch, stock, counts, num_anchors, seed=2):
    """The same random keys for both models' samplers."""
    generator = torch.Generator().manual_seed(seed)
    for module, part, size in (
        (rpn, stock.rpn, num_anchors),
        (roi_heads, stock.roi_heads, SETTINGS["rpn_post_nms_top_n_train"] + max(1, *counts)),
    ):
        keys = torch.rand((len(counts), size), generator=generator)
        part.fg_bg_sampler = KeyedSampler(
            part.fg_bg_sampler, keys, [0] * len(counts) if module is rpn else counts
        )
        monkeypatch.setattr(
            module, "sample_balanced", lambda *args, k=keys, **_: boxes.sample_balanced(*args[:4], keys=k)
        )


def count_anchors(model, images):
    batch, _ = model.transform(images)
    features = model.backbone(batch.tensors)
    return sum(f.shape[2] * f.shape[3] for f in features.values()) * 3


@pytest.mark.parametrize("kind", [FasterRCNN, MaskRCNN, KeypointRCNN])
@pytest.mark.parametrize("counts", [(4, 2), (1, 0), (0, 0)], ids=str)
def test_training_step_equals_torchvisions(monkeypatch, kind, counts):
    """Losses within 1e-5 relative, gradients within 1e-4 of each parameter's largest, in float32."""
    assert_same_step(monkeypatch, kind, counts)


@pytest.mark.slow
def test_training_step_of_300_objects_equals_torchvisions(monkeypatch):
    # Six times the RoIs: more ReLUs that rounding may flip.
    assert_same_step(monkeypatch, MaskRCNN, (300, 3), gradient_tolerance=1e-3)


def assert_same_step(monkeypatch, kind, counts, gradient_tolerance=1e-4):
    stock = make_model(kind)
    fast = install_fast_parts(copy.deepcopy(stock))
    images, targets = make_batch(counts)
    inject_sampling(monkeypatch, stock, counts, count_anchors(fast, images))
    expected = stock(as_floats(images), targets)
    losses = fast(images, targets)
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(
            loss, expected[name], rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )
    sum(expected.values()).backward()
    sum(losses.values()).backward()
    for (name, parameter), theirs in zip(fast.named_parameters(), stock.parameters(), strict=True):
        if theirs.grad is None:
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        atol = gradient_tolerance * float(theirs.grad.abs().max()) + 2e-6
        torch.testing.assert_close(
            parameter.grad, theirs.grad, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.slow
@pytest.mark.skipif(not COCO128.exists(), reason=f"{COCO128} is not there")
def test_a_training_on_real_images_equals_torchvisions_step_by_step(monkeypatch):
    """At each step the same weights, mirrored images, polygons and samples: the same losses, gradients and norms."""
    torch.manual_seed(0)
    dataset = CocoDataset(
        *dataset_paths(COCO128)["train"], build_transforms("hflip", training=True), training=True
    )
    stock, fast = (
        models.build_model(
            "maskrcnn_resnet50_fpn", num_classes=81, backbone="resnet18", rois_per_image=64, reference_ops=reference,
            min_size=[192], max_size=256,
        )[0].to(memory_format=torch.channels_last).train()
        for reference in (True, False)
    )  # fmt: skip
    optimizer = torch.optim.AdamW(stock.parameters(), lr=1e-4)
    samplers = {part: part.fg_bg_sampler for part in (stock.rpn, stock.roi_heads)}
    generator, drawn = torch.Generator().manual_seed(1), {}

    def draw(module, *args):
        drawn[module] = torch.rand(args[0].shape, generator=generator)
        return boxes.sample_balanced(*args[:4], keys=drawn[module])

    for module in (rpn, roi_heads):
        monkeypatch.setattr(module, "sample_balanced", functools.partial(draw, module))
    for step in range(4):
        images, targets = collate(dataset.__getitems__([(step, 2 * step), (step, 2 * step + 1)]))
        images = as_floats(images)  # so that both resize with torch
        fast.load_state_dict(stock.state_dict())
        losses = fast(images, [dict(target) for target in targets])
        counts = [len(target["boxes"]) for target in targets]
        for part, module, objects in ((stock.rpn, rpn, [0, 0]), (stock.roi_heads, roi_heads, counts)):
            part.fg_bg_sampler = KeyedSampler(samplers[part], drawn[module], objects)
        expected = stock(images, [dict(target) for target in targets])
        assert losses.keys() == expected.keys() and "loss_mask" in losses
        for name, loss in losses.items():
            torch.testing.assert_close(loss, expected[name], rtol=5e-5, atol=1e-6)
        for model, own in ((fast, losses), (stock, expected)):
            model.zero_grad()
            sum(own.values()).backward()
        for part in ("backbone.body", "backbone.fpn", "rpn", "roi_heads.box", "roi_heads.mask"):
            ours, theirs = (
                torch.cat([p.grad.flatten() for name, p in model.named_parameters() if name.startswith(part)])
                for model in (fast, stock)
            )
            # A ReLU near zero that rounding flips moves a gradient by some 1e-4 of its length, here and there 1e-3.
            assert (ours - theirs).norm() < 5e-3 * theirs.norm(), (step, part)
        for ours, theirs in zip(fast.buffers(), stock.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        torch.nn.utils.clip_grad_norm_(stock.parameters(), 5.0)
        optimizer.step()


@pytest.mark.parametrize("kind", [FasterRCNN, MaskRCNN, KeypointRCNN])
def test_detections_equal_torchvisions(kind):
    stock = make_model(kind).eval()
    fast = install_fast_parts(copy.deepcopy(stock))
    images, _ = make_batch((0, 0))
    with torch.inference_mode():
        expected = stock(as_floats(images))
        found = fast(images)
    for detections, theirs, image in zip(found, expected, images, strict=True):
        detections, theirs = by_place(detections), by_place(theirs)
        assert len(theirs["boxes"]) > 5
        assert detections["labels"].tolist() == theirs["labels"].tolist()
        torch.testing.assert_close(detections["boxes"], theirs["boxes"], rtol=0, atol=1e-3)
        torch.testing.assert_close(detections["scores"], theirs["scores"], rtol=0, atol=1e-5)
        if kind is MaskRCNN:
            assert detections["mask_probs"].shape == (len(theirs["boxes"]), 28, 28)
            pasted = paste_masks_in_image(
                detections["mask_probs"][:, None], detections["boxes"], image.shape[-2:]
            )
            torch.testing.assert_close(pasted, theirs["masks"], rtol=0, atol=1e-4)
        if kind is KeypointRCNN:
            torch.testing.assert_close(detections["keypoints"], theirs["keypoints"], rtol=0, atol=1e-2)


def by_place(detections):
    """Detections sorted by label and box: rounding may swap those of nearly equal score."""
    place = detections["labels"] * 1e6 + detections["boxes"] @ torch.tensor([31.0, 17.0, 7.0, 1.0])
    return {name: values[place.argsort()] for name, values in detections.items()}


def test_bfloat16_step_stays_near_float32(monkeypatch):
    """The sum of losses within 5%: 8 bits a value, through 20 layers, also move proposals across IoU thresholds."""
    model = install_fast_parts(make_model(MaskRCNN))
    images, targets = make_batch((4, 2))
    inject_sampling(monkeypatch, model, (4, 2), count_anchors(model, images))
    expected = model(images, targets)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(images, targets)
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    torch.testing.assert_close(sum(losses.values()), sum(expected.values()), rtol=0.05, atol=0)
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_a_training_step_waits_for_the_device_twice(monkeypatch):
    """With the paths that a GPU takes: once in the RPN's suppression, once in the RoI heads."""
    monkeypatch.setattr(roi_heads.Bitmaps, "_by_object", roi_heads.Bitmaps._by_chunk)
    monkeypatch.setattr(boxes, "suppress_on_cpu", lambda b, _, *args: boxes.suppress_batched(b, *args[:3]))
    model = install_fast_parts(make_model(MaskRCNN))
    images, targets = make_batch((4, 2))
    for target in targets:
        target["masks"] = CroppedMasks.from_dense(target["masks"])
    monkeypatch.setattr(
        model.transform, "torch_choice", lambda sizes: sizes[0]
    )  # a host tensor on any device
    reads = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: reads.append(t.shape) or tolist(t))
    with Watch() as watch:
        losses = model(images, targets)
        sum(losses.values()).backward()
    assert len(watch.waits) + len(reads) <= 2, watch.waits


def test_state_dict_loads_strictly_both_ways():
    stock = make_model(MaskRCNN)
    state = copy.deepcopy(stock.state_dict())
    fast = install_fast_parts(make_model(MaskRCNN, seed=5))
    assert list(fast.state_dict()) == list(state)
    fast.load_state_dict(state, strict=True)
    stock.load_state_dict(fast.state_dict(), strict=True)
    assert isinstance(fast, MaskRCNN)


@pytest.mark.parametrize(
    "builder",
    ["fasterrcnn_resnet50_fpn_v2", "maskrcnn_resnet50_fpn_v2", "fasterrcnn_mobilenet_v3_large_320_fpn"],
)
@pytest.mark.slow
def test_every_builder_of_the_family_trains_and_detects(builder):
    options = {"min_size": 96, "max_size": 128, "num_classes": NUM_CLASSES}
    model = getattr(torchvision.models.detection, builder)(weights=None, weights_backbone=None, **options)
    names = list(model.state_dict())
    install_fast_parts(model)
    assert list(model.state_dict()) == names
    images, targets = make_batch((2, 0))
    losses = model(images, targets)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    with torch.inference_mode():
        assert len(model.eval()(images)) == 2


def test_one_feature_map_without_fpn():
    torch.manual_seed(0)
    layers = torchvision.models.resnet18(weights=None, norm_layer=FrozenBatchNorm2d).children()
    body = nn.Sequential(*list(layers)[:-3])  # up to layer3, of stride 16
    calibrate(body)
    body.out_channels = 256
    stock = FasterRCNN(
        body,
        rpn_anchor_generator=AnchorGenerator(((32, 64),), ((0.5, 1.0),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 7, 2),
        box_head=TwoMLPHead(256 * 49, 16),
        box_predictor=FastRCNNPredictor(16, NUM_CLASSES),
        **SETTINGS,
    ).eval()
    images, _ = make_batch((0, 0))
    fast = install_fast_parts(copy.deepcopy(stock))
    with torch.no_grad():
        for ours, theirs in zip(fast(images), stock(as_floats(images)), strict=True):
            assert len(theirs["boxes"]) > 0
            torch.testing.assert_close(ours["boxes"], theirs["boxes"], rtol=0, atol=1e-3)


# --- input transform -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fixed_size", [None, (96, 64)])
@pytest.mark.parametrize("training", [False, True])
def test_transform_equals_torchvisions(fixed_size, training):
    settings = {"min_size": (80, 96, 112), "max_size": 150, "fixed_size": fixed_size}
    stock = GeneralizedRCNNTransform(
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225], **settings
    )
    stock.train(training)
    fast = FastTransform.from_torchvision(stock)
    images, targets = make_batch((3, 0), sizes=((75, 131), (140, 90)))
    kept = copy.deepcopy(targets)
    torch.manual_seed(3)
    expected, expected_targets = stock(as_floats(images), targets)
    torch.manual_seed(3)
    batch, found_targets = fast(images, targets)
    assert batch.image_sizes == [tuple(size) for size in expected.image_sizes]
    # torch rounds coordinates to float32: times the largest step between neighbours, 4.4, that is 7e-5 at 150 pixels.
    torch.testing.assert_close(batch.tensors, expected.tensors, rtol=0, atol=7e-5)
    for image, found, (height, width) in zip(images, batch.tensors, batch.image_sizes, strict=True):
        exact = stock.normalize(image.double() / 255)[None]
        exact = nn.functional.interpolate(exact, (height, width), mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(found[:, :height, :width].double(), exact, rtol=0, atol=1e-6)
        assert not found[:, height:].any() and not found[:, :, width:].any()
    assert batch.tensors.is_contiguous(memory_format=torch.channels_last)
    for found, theirs, target in zip(found_targets, expected_targets, targets, strict=True):
        assert torch.equal(found["boxes"], theirs["boxes"])
        assert torch.equal(found["keypoints"], theirs["keypoints"])
        assert isinstance(found["masks"], CroppedMasks)
        assert torch.equal(found["masks"].dense(), target["masks"])
    for target, before in zip(targets, kept, strict=True):
        assert all(torch.equal(target[name], before[name]) for name in before)


def test_transform_takes_floats_and_cropped_masks_and_skips_resizing():
    images, targets = make_batch((2, 1), sizes=((64, 96), (50, 40)))
    stock = GeneralizedRCNNTransform(96, 150, [0.5] * 3, [0.25] * 3, _skip_resize=True).train()
    fast = FastTransform.from_torchvision(stock)
    cropped = [{**target, "masks": CroppedMasks.from_dense(target["masks"])} for target in targets]
    expected, _ = stock(as_floats(images), targets)
    batch, found = fast(as_floats(images), cropped)
    torch.testing.assert_close(batch.tensors, expected.tensors, rtol=0, atol=1e-6)
    assert [t["masks"] for t in found] == [t["masks"] for t in cropped]


def test_transform_hands_autocast_its_dtype():
    fast = FastTransform(96, 150, [0.5] * 3, [0.25] * 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert fast([torch.zeros(3, 20, 30)])[0].tensors.dtype == torch.bfloat16


def test_an_image_must_have_three_dimensions():
    with pytest.raises(ValueError, match=r"shape \[1, 3, 20, 30\]; images are tensors \[3, height, width\]"):
        FastTransform(96, 150, [0.5] * 3, [0.25] * 3)([torch.zeros(1, 3, 20, 30)])


def test_training_needs_targets():
    with pytest.raises(ValueError, match="training mode needs targets"):
        install_fast_parts(make_model(FasterRCNN))([torch.zeros(3, 64, 64)])


# --- folded norms --------------------------------------------------------------------------------------


def conv_and_norm(bias=False, trains=True, seed=0):
    torch.manual_seed(seed)
    block = nn.Sequential(nn.Conv2d(5, 7, 3, padding=1, bias=bias), FrozenBatchNorm2d(7), nn.ReLU())
    block.load_state_dict(random_state(block, seed))
    return block.requires_grad_(trains)


def random_state(block, seed):
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.rand(v.shape, generator=generator) + 0.1 for k, v in block.state_dict().items()}


@pytest.mark.parametrize("bias", [False, True])
def test_folding_keeps_outputs_and_gradients(bias):
    stock = conv_and_norm(bias)
    folded = copy.deepcopy(stock)
    fold_frozen_batch_norms(folded)
    assert type(folded[0]) is FoldedConv2d
    assert list(folded.state_dict()) == list(stock.state_dict())
    x = torch.randn(2, 5, 9, 8, requires_grad=True)
    ours, theirs = folded(x), stock(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    weights = torch.randn(ours.shape)
    our_gradients = torch.autograd.grad((ours * weights).sum(), [x, *folded.parameters()])
    their_gradients = torch.autograd.grad((theirs * weights).sum(), [x, *stock.parameters()])
    for our, their in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-4)


def test_folded_output_is_not_promoted_under_autocast():
    stock = conv_and_norm()
    folded = copy.deepcopy(stock)
    fold_frozen_batch_norms(folded)
    x = torch.randn(2, 5, 9, 8)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = folded(x), stock(x)
    assert (ours.dtype, theirs.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(ours.float(), stock(x), rtol=0.02, atol=0.05)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("change", ["load", "norm", "replaced data"])
def test_changed_weights_are_folded_anew(change, trains):
    block = conv_and_norm(trains=trains).eval()
    fold_frozen_batch_norms(block)
    x = torch.randn(1, 5, 4, 4)
    with torch.inference_mode():
        before = block(x)
    if change == "load":
        block.load_state_dict(random_state(block, 9))
    elif change == "norm":
        with torch.no_grad():
            block[1].running_var.mul_(2)
    else:  # as module.to() does
        block[0].weight.data = block[0].weight.data + 1
    with torch.inference_mode():
        assert_folded_anew(block, x, before)


def test_fused_optimizers_are_noticed():
    """torch's version counters do not move with them."""
    block = conv_and_norm()
    fold_frozen_batch_norms(block)
    x = torch.randn(1, 5, 4, 4)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1, fused=True)
    for _ in range(2):
        with torch.inference_mode():
            before = block.eval()(x)
        block.train()(x).sum().backward()
        with torch.inference_mode():
            block.eval()(x)  # even what is folded between backward and step is not kept for after it
        block.train()
        optimizer.step()
        with torch.inference_mode():
            assert_folded_anew(block.eval(), x, before)


def assert_folded_anew(block, x, before):
    stock = conv_and_norm()
    stock.load_state_dict(block.state_dict())
    assert not torch.equal(block(x), before)
    torch.testing.assert_close(block(x), stock(x), rtol=1e-5, atol=1e-5)


def test_evaluation_folds_once():
    block = conv_and_norm().eval()
    fold_frozen_batch_norms(block)
    with torch.no_grad():
        block(torch.randn(1, 5, 4, 4))
        kept = block[0]._kept_fold[2]
        block(torch.randn(1, 5, 4, 4))
    assert block[0]._kept_fold[2] is kept
    block(torch.randn(1, 5, 4, 4)).sum().backward()  # with grad, an evaluating model folds with grad
    assert block[0].weight.grad.any()


def test_a_frozen_weight_is_folded_once():
    block = conv_and_norm(trains=False)
    fold_frozen_batch_norms(block)
    with torch.inference_mode():
        block(torch.randn(1, 5, 4, 4))
    kept = block[0]._kept_fold[2]
    x = torch.randn(1, 5, 4, 4, requires_grad=True)
    block(x).sum().backward()  # what inference mode left behind can be trained through
    assert block[0]._kept_fold[2] is kept
    assert x.grad.isfinite().all()


def test_folding_compiles_without_a_graph_break():
    torch.compiler.reset()
    block = conv_and_norm()
    fold_frozen_batch_norms(block)
    x = torch.randn(1, 5, 4, 4)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), block(x))
    torch.compiler.reset()


def test_copies_of_a_folded_model_are_their_own():
    block = conv_and_norm(trains=False)
    fold_frozen_batch_norms(block)
    x = torch.randn(1, 5, 4, 4)
    before = block(x)
    copied = copy.deepcopy(block)
    copied.load_state_dict(random_state(copied, 9))
    assert torch.equal(block(x), before)
    assert not torch.equal(copied(x), before)


def test_only_frozen_norms_right_behind_a_convolution_are_folded():
    live = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    apart = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), FrozenBatchNorm2d(3))
    unknown_order = nn.ModuleDict({"conv": nn.Conv2d(3, 3, 1), "norm": FrozenBatchNorm2d(3)})
    model = nn.ModuleList([live, apart, unknown_order])
    before = [type(module) for module in model.modules()]
    fold_frozen_batch_norms(model)
    assert [type(module) for module in model.modules()] == before


ONE_STAGE = {
    "retinanet_resnet50_fpn": {"backbone": "resnet18", "norm": "frozen"},
    "fcos_resnet50_fpn": {"backbone": "resnet18", "norm": "frozen"},
    "ssd300_vgg16": {},
    "ssdlite320_mobilenet_v3_large": {},
}


def make_one_stage(name):
    """(fast, stock) of the same weights, with frozen norms that hold the statistics of their own activations."""
    options = {"min_size": 96, "max_size": 128, **ONE_STAGE[name]}
    torch.manual_seed(0)
    fast, stock = (
        models.build_model(name, NUM_CLASSES, reference_ops=on, **options)[0] for on in (False, True)
    )
    if options.get("norm") == "frozen":
        calibrate(stock.backbone)
    with torch.no_grad():
        for parameter in stock.head.parameters():  # or all boxes would score alike
            parameter.add_(torch.randn_like(parameter) * 0.05)
    fast.load_state_dict(stock.state_dict(), strict=True)
    return fast, stock


@pytest.mark.parametrize("name", ONE_STAGE)
def test_one_stage_detectors_keep_torchvisions_numbers(name):
    fast, stock = make_one_stage(name)
    assert isinstance(fast.transform, FastTransform) and not isinstance(stock.transform, FastTransform)
    folded = any(isinstance(module, FoldedConv2d) for module in fast.modules())
    assert folded == (ONE_STAGE[name].get("norm") == "frozen")
    images, targets = make_batch((3, 2 if name.startswith("ssd") else 0))
    found, expected = (model(images, targets) for model in (fast, stock))
    for term, loss in expected.items():
        torch.testing.assert_close(found[term], loss, rtol=1e-5, atol=1e-6)
    gradients = []
    for model, losses in ((fast, found), (stock, expected)):
        sum(losses.values()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    # Over all parameters: a ReLU near zero that rounding flips moves single gradients by more.
    assert (gradients[0] - gradients[1]).norm() < 1e-2 * gradients[1].norm()
    fast.load_state_dict(stock.state_dict())  # live norms have seen the training batch, rounded in two ways
    outputs = []
    for model in (fast, stock):
        model.head.register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        detections = [model.eval()(images) for model in (fast, stock)]
    for key, output in outputs[1].items():
        torch.testing.assert_close(outputs[0][key], output, rtol=1e-4, atol=1e-4 * output.abs().max().item())
    if "lite" in name:  # its untrained scores are all alike: which boxes remain is anyone's choice
        return
    for ours, theirs in zip(*detections, strict=True):
        ours, theirs = (torch.cat([d["boxes"], 100 * d["scores"][:, None]], dim=1) for d in (ours, theirs))
        apart = (ours[:, None] - theirs).abs().amax(dim=2).amin(dim=1)
        assert (apart < 1e-2).float().mean() > 0.9


@pytest.mark.parametrize(
    "name", ["retinanet_resnet50_fpn", "fcos_resnet50_fpn", "ssdlite320_mobilenet_v3_large"]
)
def test_anchors_and_losses_of_one_stage_detectors_are_float32_under_autocast(name):
    """bfloat16 has 8 bits of mantissa: torchvision's anchors are whole pixels off beyond 256."""
    fast, stock = make_one_stage(name)
    images, targets = make_batch((3, 2))
    anchors = {}
    for model in (fast, stock):
        model.anchor_generator.register_forward_hook(
            lambda m, args, out, model=model: anchors.update({model: out[0]})
        )
    exact = stock(images, targets)
    expected = anchors[stock]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = fast(images, targets)
        stock(images, targets)
    assert torch.equal(anchors[fast], expected) and anchors[fast].dtype == torch.float32
    for term, loss in exact.items():
        assert losses[term].dtype == torch.float32
        torch.testing.assert_close(losses[term], loss, rtol=0.03, atol=0.01)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet"])
def test_whole_bodies_are_folded(name):
    torch.manual_seed(0)
    if name == "mobilenet":
        backbone = mobilenet_backbone(
            backbone_name="mobilenet_v2", weights=None, fpn=True, norm_layer=FrozenBatchNorm2d
        )
    else:
        backbone = resnet_fpn_backbone(backbone_name=name, weights=None, norm_layer=FrozenBatchNorm2d)
    calibrate(backbone)
    folded = copy.deepcopy(backbone)
    fold_frozen_batch_norms(folded)
    assert not any(type(module) is FrozenBatchNorm2d for module in folded.modules())
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for ours, theirs in zip(folded(x).values(), backbone(x).values(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
