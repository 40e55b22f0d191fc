"""A detector by name: torchvision's builders with a swappable backbone, norm and weights, and the fast parts put in."""

import torch
import torchvision
from torch import nn
from torchvision.models import detection, get_model, get_model_weights, list_models
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

import rcnn
import weights as weights_module
from masks import CroppedMasks
from utils import UserError

NAMES = list_models(module=detection)
NORMS = ("frozen", "batch", "sync", "group")
GROUP_NORM_GROUPS = 32
NORM_KINDS = (
    (FrozenBatchNorm2d, "frozen"),
    (nn.SyncBatchNorm, "sync"),
    (nn.BatchNorm2d, "batch"),
    (nn.GroupNorm, "group"),
    (nn.LayerNorm, "layer"),
)
# Stages that train by default once the backbone is pretrained, by builder; the others train 3. Source: torchvision.
DEFAULT_TRAINABLE = {"ssd300_vgg16": 4, "ssdlite320_mobilenet_v3_large": 6}
# Builders whose pretrained backbones keep live BatchNorm in torchvision; those of the others are frozen.
LIVE_NORM = (
    "fasterrcnn_resnet50_fpn_v2",
    "maskrcnn_resnet50_fpn_v2",
    "retinanet_resnet50_fpn_v2",
    "ssd300_vgg16",
    "ssdlite320_mobilenet_v3_large",
)


def build_model(
    name,
    num_classes,
    *,
    backbone=None,
    norm=None,
    norm_eps=None,
    trainable_layers=None,
    weights=None,
    weights_backbone=None,
    classes=None,
    category_ids=None,
    num_keypoints=None,
    min_size=None,
    max_size=None,
    rpn_score_thresh=None,
    rois_per_image=None,
    detections_per_image=None,
    reference_ops=False,
):
    """Build a detector with torchvision's architecture and state_dict keys.

    name: a torchvision detection builder. num_classes: K + 1, the background counted.
    backbone: any torchvision ResNet, ResNeXt, MobileNet, EfficientNet, ConvNeXt, Swin … by its builder's name,
        put under a new FPN; None keeps the builder's own.
    norm: frozen, batch, sync or group for the backbone; None: torchvision's rule, frozen once pretrained, else live.
    norm_eps: None keeps the layers' own, or what the weights ask for.
    trainable_layers: stages, counted from the last, that train; None: 3 once pretrained (all if not).
    weights, weights_backbone: see weights.py; classes and category_ids map COCO's 91-class heads onto the labels.
    min_size, max_size: pixels, resizing inside the model; min_size may be a tuple to draw from in training.
    rois_per_image: RoIs sampled for the heads in training, a quarter of them objects at most; None: 512.
    reference_ops: leave torchvision's own modules in, for comparison.
    Returns (model, report): what the weights matched, a weights.Report, or None without weights.
    Raises UserError for what cannot be built.
    """
    if name not in NAMES:
        raise UserError(f"--model {name}: unknown; torchvision has {', '.join(NAMES)}")
    options = {}
    if min_size is not None and takes_size(name):
        options["min_size"] = min_size
    if max_size is not None and takes_size(name):
        options["max_size"] = max_size
    if rpn_score_thresh is not None and "rcnn" in name:
        options["rpn_score_thresh"] = rpn_score_thresh
    if rois_per_image is not None and "rcnn" in name:
        options["box_batch_size_per_image"] = rois_per_image
    if detections_per_image is not None:
        options["box_detections_per_img" if "rcnn" in name else "detections_per_img"] = detections_per_image
    if num_keypoints is not None and name.startswith("keypointrcnn"):
        options["num_keypoints"] = num_keypoints
    model = get_model(name, weights=None, weights_backbone=None, num_classes=num_classes, **options)
    if backbone is not None:
        replace_backbone(model, backbone)

    pretrained = weights is not None or weights_backbone is not None
    if norm is None:
        norm = "frozen" if pretrained and name not in LIVE_NORM else "batch"
    convert_norm(model.backbone, norm)
    report = None
    if weights is not None:
        source = enum_member(name, weights)
        report = weights_module.load_weights(model, source, classes=classes, category_ids=category_ids)
    elif weights_backbone is not None:
        report = weights_module.load_backbone_weights(model, weights_backbone)
    if norm_eps is None and report is not None and norm == "frozen":
        norm_eps = report.norm_eps
    if norm_eps is not None:
        set_norm_eps(model.backbone, norm_eps)
    if trainable_layers is None and pretrained:
        trainable_layers = min(DEFAULT_TRAINABLE.get(name, 3), len(stages_of(model.backbone)))
    if trainable_layers is not None:
        freeze_stages(model.backbone, trainable_layers)
    if is_rcnn(model) and not reference_ops:
        rcnn.install_fast_parts(model)
    else:
        model.register_forward_pre_hook(torchvision_inputs)
    return model, report


def enum_member(name, weights):
    """`weights` as weights.py takes it: a bare member's name (DEFAULT, COCO_V1) belongs to the builder `name`."""
    members = get_model_weights(name).__members__
    return members.get(weights, weights)


def torchvision_inputs(module, args):
    """Before the forward of a model of torchvision's own parts: uint8 images become floats in [0, 1], masks frames."""
    images, *targets = args
    images = [image.float() / 255 if image.dtype == torch.uint8 else image for image in images]
    if targets and targets[0] is not None:
        targets[0] = [
            {name: v.dense() if isinstance(v, CroppedMasks) else v for name, v in target.items()}
            for target in targets[0]
        ]
    return (images, *targets)


def takes_size(name):
    """SSD's input size is part of its architecture; every other detector resizes to min_size/max_size."""
    return not name.startswith("ssd")


def iou_types(model):
    """What COCO scores for this model: always boxes; masks and keypoints where it has the heads."""
    types = ["bbox"]
    if isinstance(model, detection.MaskRCNN):
        types.append("segm")
    if isinstance(model, detection.KeypointRCNN):
        types.append("keypoints")
    return types


# --- backbones ---------------------------------------------------------------------------------------


def replace_backbone(model, name):
    """Put torchvision's classifier `name` under a new FPN with as many levels as the detector had."""
    old = model.backbone
    if not isinstance(old, BackboneWithFPN):
        raise UserError(f"--backbone {name}: only the FPN detectors take another backbone")
    if name not in list_models(module=torchvision.models):
        raise UserError(f"--backbone {name}: torchvision.models has no builder of that name")
    classifier = get_model(name, weights=None)
    num_levels = len(old.fpn.inner_blocks) if len(old.fpn.inner_blocks) in (3, 4) else 4
    if isinstance(classifier, torchvision.models.ResNet):
        body, layers = classifier, ["layer1", "layer2", "layer3", "layer4"]
    elif hasattr(classifier, "features"):
        body, layers = classifier.features, None
    else:
        raise UserError(f"--backbone {name}: has no convolutional stages to build an FPN on")
    channels_last_body = isinstance(classifier, torchvision.models.SwinTransformer)
    strides = stage_strides(body, layers, channels_last_body)
    chosen = [strides[stride] for stride in (4, 8, 16, 32)[-num_levels:] if stride in strides]
    if len(chosen) < num_levels:
        raise UserError(f"--backbone {name}: its stages have strides {sorted(strides)}; an FPN needs 4 to 32")
    extra = old.fpn.extra_blocks
    out_channels = old.out_channels
    if isinstance(extra, LastLevelP6P7):
        channels = chosen[-1][1] if not extra.use_P5 else out_channels
        extra = LastLevelP6P7(channels, out_channels)
    else:
        extra = LastLevelMaxPool()
    return_layers = {layer: str(level) for level, (layer, _) in enumerate(chosen)}
    model.backbone = BackboneWithFPN(body, return_layers, [c for _, c in chosen], out_channels, extra)
    if channels_last_body:
        model.backbone.body = ChannelsFirstBody(body, return_layers)


class ChannelsFirstBody(IntermediateLayerGetter):
    """Stages of a Swin transformer, whose maps are [B, H, W, C], as [B, C, H, W]."""

    def forward(self, x):
        return {name: out.permute(0, 3, 1, 2) for name, out in super().forward(x).items()}


@torch.no_grad()
def stage_strides(body, layers, channels_last):
    """{stride: (child's name, channels)} of the last child at each stride, from one small forward pass."""
    size = 64
    body.eval()
    x = torch.zeros(1, 3, size, size)
    found = {}
    for name, child in body.named_children():
        if layers is not None and name in ("avgpool", "fc"):
            break
        x = child(x)
        height, channels = (
            (x.shape[1], x.shape[3]) if channels_last and x.shape[-1] != size else (x.shape[2], x.shape[1])
        )
        if layers is None or name in layers:
            found[size // height] = (name, channels)
    body.train()
    return found


def stages_of(backbone):
    """The backbone's stages, first to last, each a list of modules: what trainable_layers counts."""
    body = backbone.body if isinstance(backbone, BackboneWithFPN) else backbone
    children = dict(body.named_children())
    if "layer1" in children:
        stem = [children[name] for name in ("conv1", "bn1") if name in children]
        return [stem] + [[children[f"layer{k}"]] for k in range(1, 5) if f"layer{k}" in children]
    if "features" in children:  # SSD's VGG: a stage ends before each pooling layer
        blocks = list(children["features"])
        starts = [0, *[i for i, block in enumerate(blocks) if isinstance(block, nn.MaxPool2d)][:4]]
    else:
        blocks = [
            leaf for child in children.values() for leaf in (child if is_plain_list(child) else [child])
        ]
        starts = [0, *(i for i, block in enumerate(blocks) if i > 0 and halves_the_map(block))]
    return [blocks[start:end] for start, end in zip(starts, [*starts[1:], len(blocks)], strict=True)]


def is_plain_list(module):
    return type(module) is nn.Sequential


def halves_the_map(block):
    """Whether a block of a feature extractor has a strided convolution or merges patches."""
    return any(
        (isinstance(module, nn.Conv2d) and max(module.stride) > 1)
        or type(module).__name__.startswith("PatchMerging")
        for module in block.modules()
    )


def freeze_stages(backbone, trainable):
    """Let only the last `trainable` stages train (0: none; all of them: everything)."""
    stages = stages_of(backbone)
    if not 0 <= trainable <= len(stages):
        raise UserError(f"--trainable-backbone-layers {trainable}: this backbone has 0 to {len(stages)}")
    for stage in stages[: len(stages) - trainable]:
        for module in stage:
            module.requires_grad_(False)


# --- norm layers ---------------------------------------------------------------------------------------


def convert_norm(module, kind):
    """Turn every batch norm below `module` into `kind`, weights, statistics and eps kept, in place."""
    if kind not in NORMS:
        raise UserError(f"--norm {kind}: choose one of {', '.join(NORMS)}")
    for name, child in module.named_children():
        if isinstance(child, (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)):
            setattr(module, name, converted_norm(child, kind))
        else:
            convert_norm(child, kind)


def converted_norm(old, kind):
    channels, eps = old.weight.numel(), old.eps
    if kind == "frozen":
        new = FrozenBatchNorm2d(channels, eps=eps)
    elif kind == "group":
        new = nn.GroupNorm(
            GROUP_NORM_GROUPS if channels % GROUP_NORM_GROUPS == 0 else channels, channels, eps=eps
        )
    else:
        momentum = getattr(old, "momentum", 0.1)
        new = {"batch": nn.BatchNorm2d, "sync": nn.SyncBatchNorm}[kind](channels, eps=eps, momentum=momentum)
    with torch.no_grad():
        for key in ("weight", "bias", "running_mean", "running_var"):
            if hasattr(new, key):
                getattr(new, key).copy_(getattr(old, key))
    return new


def set_norm_eps(module, eps):
    """Give every norm layer below `module` this eps."""
    for child in module.modules():
        if isinstance(child, tuple(cls for cls, _ in NORM_KINDS)):
            child.eps = eps


def describe_norm(model):
    """{"type", "eps"} of the backbone's norm layers: what a checkpoint records and a later load checks."""
    for module in model.backbone.modules():
        for cls, kind in NORM_KINDS:
            if isinstance(module, cls):
                return {"type": kind, "eps": module.eps}
    return {"type": "none", "eps": 0.0}


def is_rcnn(model):
    return isinstance(model, GeneralizedRCNN)
