"""A detector by name: torchvision's builders with a swappable backbone, norm and weights, and the fast parts put in."""

import math
import typing
from collections import OrderedDict
from functools import partial
from itertools import chain

import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torchvision.models import detection, get_model, get_model_builder, get_model_weights, list_models
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.ssd import SSDFeatureExtractorVGG
from torchvision.models.detection.ssdlite import SSDLiteFeatureExtractorMobileNet, SSDLiteHead
from torchvision.ops import Conv2dNormActivation, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

import rcnn
import weights as weights_module
from masks import CroppedMasks
from utils import UserError, is_distributed

NAMES = list_models(module=detection)
NORMS = ("frozen", "batch", "sync", "group")
GROUP_NORM_GROUPS = 32
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
# Classifiers that an FPN can be put on: their children, one after another, halve the map.
PYRAMIDS = (
    torchvision.models.ResNet,
    torchvision.models.RegNet,
    torchvision.models.DenseNet,
    torchvision.models.VGG,
    torchvision.models.MobileNetV2,
    torchvision.models.MobileNetV3,
    torchvision.models.EfficientNet,
    torchvision.models.ConvNeXt,
    torchvision.models.SwinTransformer,
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
    state=None,
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
    backbone: any torchvision ResNet, ResNeXt, RegNet, MobileNet, EfficientNet, ConvNeXt, Swin … by its builder's
        name, put under a new FPN; None keeps the builder's own.
    norm: frozen, batch, sync or group for the backbone, sync also for batch norm in the heads; None: that of a
        checkpoint of ours among the weights, else torchvision's rule: frozen once pretrained, else live.
    norm_eps: None keeps the layers' own, or what the weights ask for.
    trainable_layers: stages, counted from the last, that train; None: torchvision's default once pretrained, 3 for
        most builders, all if not.
    weights, weights_backbone: see weights.py; classes and category_ids map COCO's 91-class heads onto the labels.
    state: the state_dict of a run that the caller will go on with. Weights are then not read, but the model is built
        as it was for them.
    min_size, max_size: pixels, resizing inside the model; min_size may be a tuple to draw from in training.
    rois_per_image: RoIs sampled for the heads in training, a quarter of them objects at most; None: 512.
    reference_ops: leave torchvision's own modules in, for comparison.
    Returns (model, report): what the weights matched, a weights.Report, or None if none were read.
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
    pretrained = weights is not None or weights_backbone is not None
    file = None
    if pretrained and state is None:
        file = weights_module.read(weights_backbone if weights is None else enum_member(name, weights))
        state = file.state

    model = get_model(name, weights=None, weights_backbone=None, num_classes=num_classes, **options)
    if backbone is not None:
        replace_backbone(model, backbone)
    elif name == "ssdlite320_mobilenet_v3_large" and state is not None and has_full_tail(state):
        give_full_tail(model, num_classes)
    norm = choose_norm(model, name, norm, pretrained, file)

    report = None
    if file is not None:
        if weights is not None:
            report = weights_module.load_weights(model, file, classes=classes, category_ids=category_ids)
        else:
            report = weights_module.load_backbone_weights(model, file)
        if file.norm_type not in (None, norm):
            report.notes.append(f"its norm layers were {file.norm_type}, this model's are {norm}")
        if norm_eps is None and norm in ("frozen", file.norm_type):
            norm_eps = report.norm_eps
    if norm_eps is not None:
        set_norm_eps(model.backbone, norm_eps)
    if trainable_layers is None and pretrained:
        trainable_layers = min(DEFAULT_TRAINABLE.get(name, 3), len(stages_of(model.backbone)))
    if trainable_layers is not None:
        freeze_stages(model.backbone, trainable_layers)
    if reference_ops:
        model.register_forward_pre_hook(torchvision_inputs)
    elif is_rcnn(model):
        rcnn.install_fast_parts(model)
    else:
        rcnn.install_fast_input(model)
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
    family = typing.get_type_hints(get_model_builder(name))["return"]
    if family not in PYRAMIDS:
        raise UserError(
            f"--backbone {name}: {family.__name__} is not among the classifiers whose stages can carry an FPN: "
            f"{', '.join(cls.__name__ for cls in PYRAMIDS)}; choose one of these"
        )
    body = stages_body(get_model(name, weights=None))
    channels_last_body = family is torchvision.models.SwinTransformer
    strides = stage_strides(body, channels_last_body)
    num_levels = len(old.fpn.inner_blocks)
    chosen = [strides[stride] for stride in (4, 8, 16, 32)[-num_levels:]]
    extra = old.fpn.extra_blocks
    out_channels = old.out_channels
    if isinstance(extra, LastLevelP6P7):
        channels = chosen[-1][1] if not extra.use_P5 else out_channels
        extra = LastLevelP6P7(channels, out_channels)
    else:
        extra = LastLevelMaxPool()
    return_layers = {layer: str(level) for level, (layer, _) in enumerate(chosen)}
    fpn_norm = nn.BatchNorm2d if any(isinstance(m, nn.BatchNorm2d) for m in old.fpn.modules()) else None
    model.backbone = BackboneWithFPN(
        body, return_layers, [c for _, c in chosen], out_channels, extra, fpn_norm
    )
    if channels_last_body:
        model.backbone.body = ChannelsFirstBody(body, return_layers)


class ChannelsFirstBody(IntermediateLayerGetter):
    """Stages of a Swin transformer, whose maps are [B, H, W, C], as [B, C, H, W]."""

    def forward(self, x):
        return {name: out.permute(0, 3, 1, 2) for name, out in super().forward(x).items()}


def stages_body(classifier):
    """The part of a classifier whose children, called one after another, are its stages."""
    if isinstance(classifier, torchvision.models.RegNet):
        stem, trunk = classifier.stem, classifier.trunk_output
        return nn.Sequential(OrderedDict([("stem", stem), *trunk.named_children()]))
    return classifier if isinstance(classifier, torchvision.models.ResNet) else classifier.features


@torch.no_grad()
def stage_strides(body, channels_last):
    """{stride: (child's name, channels)} of the last child at each stride, from one small forward pass."""
    size = 64
    body.eval()
    x = torch.zeros(1, 3, size, size)
    found = {}
    for name, child in body.named_children():
        if name in ("avgpool", "fc"):
            break
        x = child(x)
        height, channels = (
            (x.shape[1], x.shape[3]) if channels_last and x.shape[-1] != size else (x.shape[2], x.shape[1])
        )
        found[size // height] = (name, channels)
    return found


FULL_TAIL_CHANNELS = 960  # of MobileNetV3-Large's last convolution; the reduced tail has half of them


def has_full_tail(state):
    """Whether a MobileNetV3-Large, a classifier's or an SSDlite's, has all channels in its last blocks."""
    last = ("features.16.0.weight", "features.1.3.0.weight")  # in a classifier; in SSDlite's two parts
    return any(key.endswith(last) and value.shape[0] == FULL_TAIL_CHANNELS for key, value in state.items())


def give_full_tail(model, num_classes):
    """Widen SSDlite's last blocks to those of the ImageNet weights, as torchvision's builder does for them."""
    norm_layer = partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)
    features = get_model("mobilenet_v3_large", weights=None, norm_layer=norm_layer).features
    last_strided = [i for i, block in enumerate(features) if halves_the_map(block)][-1]
    model.backbone = SSDLiteFeatureExtractorMobileNet(features, last_strided, norm_layer).eval()
    with torch.no_grad():
        channels = [level.shape[1] for level in model.backbone(torch.zeros(1, 3, 64, 64)).values()]
    model.backbone.train()
    num_anchors = model.anchor_generator.num_anchors_per_location()
    model.head = SSDLiteHead(channels, num_anchors, num_classes, norm_layer)


def stages_of(backbone):
    """The backbone's stages, first to last, each a list of modules: what trainable_layers counts.

    A stage begins where the map is halved; a convolution after the last block is a stage of its own. SSD's new layers
    belong to none. Source: torchvision's builders.
    """
    if isinstance(backbone, SSDFeatureExtractorVGG):
        *blocks, _ = backbone.extra[0]  # the last of these is new
        blocks = [[block] for block in (*backbone.features, *blocks)]
    elif isinstance(backbone, SSDLiteFeatureExtractorMobileNet):  # cut in two inside a block
        (*first, expansion), (projection, *last) = backbone.features
        blocks = [*([block] for block in first), [expansion, projection], *([block] for block in last)]
    else:
        body = backbone.body if isinstance(backbone, BackboneWithFPN) else backbone
        children = dict(body.named_children())
        if "layer1" in children:  # ResNet, whose stem halves the map twice
            stem = [children[name] for name in ("conv1", "bn1") if name in children]
            return [stem] + [[children[f"layer{k}"]] for k in range(1, 5) if f"layer{k}" in children]
        blocks = [[child] for child in children.values()]
    while not any(True for module in blocks[-1] for _ in module.parameters()):
        blocks.pop()
    starts = [i for i, block in enumerate(blocks) if i == 0 or any(map(halves_the_map, block))]
    if isinstance(blocks[-1][0], Conv2dNormActivation) and starts[-1] != len(blocks) - 1:
        starts.append(len(blocks) - 1)
    ends = [*starts[1:], len(blocks)]
    return [list(chain(*blocks[start:end])) for start, end in zip(starts, ends, strict=True)]


def halves_the_map(block):
    """Whether a block of a feature extractor has a strided convolution or pooling, or merges patches."""

    def strided(module):
        if isinstance(module, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)):
            stride = module.stride
            return (max(stride) if isinstance(stride, tuple) else stride) > 1
        return type(module).__name__.startswith("PatchMerging")

    return any(map(strided, block.modules()))


def freeze_stages(backbone, trainable):
    """Let only the last `trainable` stages train (0: none; all of them: everything)."""
    stages = stages_of(backbone)
    if not 0 <= trainable <= len(stages):
        raise UserError(f"--trainable-backbone-layers {trainable}: this backbone has 0 to {len(stages)}")
    for stage in stages[: len(stages) - trainable]:
        for module in stage:
            module.requires_grad_(False)


# --- norm layers ---------------------------------------------------------------------------------------


def choose_norm(model, name, norm, pretrained, file):
    """Give the model's batch norms the kind that was asked for, or by the rule of build_model; returns the kind.

    Raises UserError if another norm is asked for than a backbone without batch norm has.
    """
    own = describe_norm(model)["type"]
    if own != "batch":
        if norm in (None, own):
            return own
        have = "no norm layers" if own == "none" else f"{own} norm, which cannot be exchanged"
        raise UserError(f"--norm {norm}: this backbone has {have}; leave the flag out")
    if norm is None and file is not None and file.norm_type in NORMS:
        norm = file.norm_type
    if norm is None:
        norm = "frozen" if pretrained and name not in LIVE_NORM else "batch"
    convert_norm(model if norm == "sync" else model.backbone, norm)
    return norm


def convert_norm(module, kind):
    """Turn every batch norm below `module` into `kind`, weights, statistics and eps kept, in place."""
    if kind not in NORMS:
        raise UserError(f"--norm {kind}: choose one of {', '.join(NORMS)}")
    for name, child in module.named_children():
        if isinstance(child, (nn.BatchNorm2d, FrozenBatchNorm2d)):
            setattr(module, name, converted_norm(child, kind))
        else:
            convert_norm(child, kind)


def converted_norm(old, kind):
    channels, eps = old.weight.numel(), old.eps
    if kind == "frozen":
        new = FrozenBatchNorm2d(channels, eps=eps)
    elif kind == "group":
        new = nn.GroupNorm(math.gcd(GROUP_NORM_GROUPS, channels), channels, eps=eps)
    else:
        momentum = getattr(old, "momentum", 0.1)
        new = {"batch": nn.BatchNorm2d, "sync": SyncBatchNorm}[kind](channels, eps=eps, momentum=momentum)
    with torch.no_grad():
        for key in ("weight", "bias", "running_mean", "running_var"):
            if hasattr(new, key):
                getattr(new, key).copy_(getattr(old, key))
    return new


class SyncBatchNorm(nn.BatchNorm2d):
    """torch's nn.SyncBatchNorm on GPUs; on CPU ranks, where torch has none, the same numbers summed over gloo.

    It is no nn.SyncBatchNorm itself, which DistributedDataParallel refuses on a CPU.
    """

    process_group = None
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def forward(self, x):
        """x: float [B, C, H, W]. In training mode the statistics are those of all ranks' x together."""
        if not self.training or not is_distributed():
            return super().forward(x)
        if x.device.type != "cpu":
            return nn.SyncBatchNorm.forward(self, x)
        dims, shape = (0, 2, 3), (-1, 1, 1)
        values = x.float()
        count = values.new_tensor([values.numel() / values.shape[1]])
        total, count = SumOverRanks.apply(torch.cat([values.sum(dims), count])).split([self.num_features, 1])
        mean = total / count
        centred = values - mean.view(shape)
        variance = SumOverRanks.apply(centred.square().sum(dims)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale.view(shape) + self.bias.view(shape)).to(x.dtype)


class SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over all ranks, for every rank; its gradient is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx, values):
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return SumOverRanks.forward(ctx, gradient)


NORM_KINDS = (
    (FrozenBatchNorm2d, "frozen"),
    (SyncBatchNorm, "sync"),
    (nn.BatchNorm2d, "batch"),
    (nn.GroupNorm, "group"),
    (nn.LayerNorm, "layer"),
)


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
