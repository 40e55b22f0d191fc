"""The R-CNN family made fast in place: input transform, folded norms, and the batched RPN and RoI heads put in.

Parameters, state_dict keys and numbers stay torchvision's; `install_fast_parts` is the way in.

Letters: B images, N objects, J keypoints, D detections.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import cv2
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.ops import FrozenBatchNorm2d

from boxes import to_device
from masks import CroppedMasks
from roi_heads import RoIHeads
from rpn import RegionProposalNetwork


def install_fast_parts(model: GeneralizedRCNN) -> GeneralizedRCNN:
    """Make any torchvision Faster, Mask or Keypoint R-CNN fast, in place; returns the same model.

    Its RPN, RoI heads and transform give way to this project's, which hold the same submodules; frozen batch
    norms of the backbone are folded into their convolutions; the forward pass no longer waits for the device
    to check each image's boxes. state_dict keys stay, so checkpoints load strictly both ways. The model takes
    images as uint8 or as floats in [0, 1], and masks as CroppedMasks or uint8 [N, H, W].
    In evaluation, masks come as "mask_probs" float32 [D, 28, 28], not pasted.
    """
    model.transform = FastTransform.from_torchvision(model.transform)
    model.rpn = RegionProposalNetwork.from_torchvision(model.rpn)
    model.roi_heads = RoIHeads.from_torchvision(model.roi_heads)
    fold_frozen_batch_norms(model.backbone)
    model.__class__ = _fast_class(type(model))
    return model


def install_fast_input(model: nn.Module) -> nn.Module:
    """What a one-stage detector (RetinaNet, FCOS, SSD, SSDlite) shares with the R-CNNs, in place; returns the model.

    The input transform takes images as uint8 and masks in any form; frozen batch norms are folded. Under autocast
    anchors, losses and decoding are float32: torchvision rounds anchors to the features' dtype, which in bfloat16
    moves them by up to 4 pixels at 1,333, and computes the losses from rounded logits.
    """
    model.transform = FastTransform.from_torchvision(model.transform)
    fold_frozen_batch_norms(model.backbone)
    model.anchor_generator.register_forward_pre_hook(_shapes_in_float32)
    model.head.register_forward_hook(_outputs_in_float32)
    return model


def _shapes_in_float32(module, args):
    """Before an anchor generator, which reads shape, dtype and device of the features only."""
    images, features = args
    return images, [torch.empty((), device=f.device).expand(1, 1, *f.shape[-2:]) for f in features]


def _outputs_in_float32(module, args, outputs):
    return {name: output.float() for name, output in outputs.items()}


@cache
def _fast_class(cls: type) -> type:
    """`cls` with the forward pass of FastForward; still an instance of, say, torchvision's MaskRCNN."""
    return type(cls.__name__, (FastForward, cls), {"__module__": __name__, "__doc__": cls.__doc__})


class FastForward:
    """GeneralizedRCNN's forward pass without its host synchronisations."""

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[dict[str, Any]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Losses by name in training mode, else one dict of detections an image, in its own pixels.

        images: B tensors [3, H, W], uint8 or float in [0, 1], sizes may differ. targets, in training mode: see
        RoIHeads.forward, boxes and keypoints in the images' own pixels; the dicts are left as they are.
        Raises ValueError in training mode without targets or with boxes of no width or height.
        """
        if not self.training:
            targets = None
        elif targets is None:
            raise ValueError("training mode needs targets; pass them, or call model.eval() to detect")
        original_sizes = [tuple(image.shape[-2:]) for image in images]
        images, targets = self.transform(images, targets)
        features = self.backbone(images.tensors)
        if isinstance(features, Tensor):
            features = OrderedDict([("0", features)])
        proposals, proposal_losses = self.rpn(images, features, targets)
        detections, detector_losses = self.roi_heads(features, proposals, images.image_sizes, targets)
        if self.training:
            return {**detector_losses, **proposal_losses}
        return self.transform.postprocess(detections, images.image_sizes, original_sizes)


# ---------------------------------------------------------------------- input


class FastTransform(torchvision.models.detection.transform.GeneralizedRCNNTransform):
    """torchvision's input transform on uint8 images, with masks left cropped and in original pixels.

    The same numbers: divide by 255, normalise, resize bilinearly without antialiasing, pad with zeros.

    buckets: (height, width) of the only shapes that batches are padded to, smallest first, so that a compiled model
    sees few shapes (see shape_buckets); empty: a batch is padded to its own largest sides.
    """

    buckets: Sequence[tuple[int, int]] = ()

    @classmethod
    def from_torchvision(
        cls, transform: torchvision.models.detection.transform.GeneralizedRCNNTransform
    ) -> "FastTransform":
        return cls(
            transform.min_size,
            transform.max_size,
            transform.image_mean,
            transform.image_std,
            transform.size_divisible,
            transform.fixed_size,
            _skip_resize=transform._skip_resize,
        ).train(transform.training)

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[dict[str, Any]] | None = None
    ) -> tuple[ImageList, list[dict[str, Any]] | None]:
        """One padded batch and the targets that go with it.

        images: B tensors [3, H, W] on one device, uint8 or float in [0, 1]. targets: dicts with boxes [N, 4] xyxy,
        keypoints [N, J, 3] and masks, a CroppedMasks or dense [N, H, W]; never changed.
        Returns ImageList with tensors [B, 3, H', W'] in channels-last memory, float32 or, within autocast, its
        dtype, to which the first convolution would round them anyway; and new target dicts with boxes and
        keypoints in resized pixels, masks as CroppedMasks in original pixels.
        """
        for image in images:
            if image.dim() != 3:
                raise ValueError(
                    f"an image of shape {list(image.shape)}; images are tensors [3, height, width]"
                )
        device = images[0].device
        sizes = [self.resized_size(*image.shape[-2:]) for image in images]
        height, width = self.padded_size(sizes)
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else torch.float32
        shape = (len(images), images[0].shape[0], height, width)
        batch = torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last).zero_()
        mean, std = to_device([self.image_mean, self.image_std], device, torch.float32)[:, :, None, None]
        for slot, image, size in zip(batch, images, sizes, strict=True):
            if image.dtype == torch.uint8 and device.type == "cpu" and len(image) == 3:
                resized = _resized_on_cpu(image, size, mean, std)
            else:
                # uint8 / 255 as the loader of torchvision's reference would have done it
                image = image.float().div_(255) if image.dtype == torch.uint8 else image.float()
                resized = (image - mean) / std
                if size != image.shape[-2:]:
                    resized = F.interpolate(resized[None], size, mode="bilinear", align_corners=False)[0]
            slot[:, : size[0], : size[1]] = resized
        if targets is not None:
            targets = [
                self._resize_target(target, tuple(image.shape[-2:]), size)
                for target, image, size in zip(targets, images, sizes, strict=True)
            ]
        return ImageList(batch, sizes), targets

    def resized_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that an image of this size is resized to; in training, min_size is drawn per image."""
        if self.training and self._skip_resize:
            return height, width
        min_size = self.torch_choice(self.min_size) if self.training else self.min_size[-1]
        if self.fixed_size is not None:
            return self.fixed_size[1], self.fixed_size[0]
        scale = min(min_size / min(height, width), self.max_size / max(height, width))
        return int(height * scale), int(width * scale)

    def padded_size(self, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """(height, width) that holds images of these sizes: the smallest bucket, or multiples of size_divisible."""
        largest = [max(side) for side in zip(*sizes, strict=True)]
        for bucket in self.buckets:
            if largest[0] <= bucket[0] and largest[1] <= bucket[1]:
                return bucket
        height, width = (_round_up(side, self.size_divisible) for side in largest)
        return height, width

    @staticmethod
    def _resize_target(target, old_size, new_size):
        target = dict(target)
        target["boxes"] = _rescale(target["boxes"], old_size, new_size)
        if "keypoints" in target:
            target["keypoints"] = _rescale(target["keypoints"], old_size, new_size)
        if isinstance(target.get("masks"), Tensor):
            target["masks"] = CroppedMasks.from_dense(target["masks"]).to(target["boxes"].device)
        return target

    def postprocess(
        self,
        result: list[dict[str, Tensor]],
        image_shapes: Sequence[tuple[int, int]],
        original_image_sizes: Sequence[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """Detections in original pixels: boxes and keypoints are scaled back, mask_probs stay unpasted."""
        scaled = []
        for detections, size, original_size in zip(result, image_shapes, original_image_sizes, strict=True):
            places = {name: detections[name] for name in ("boxes", "keypoints") if name in detections}
            places = {name: _rescale(place, size, original_size) for name, place in places.items()}
            scaled.append({**detections, **places})
        return scaled


def _resized_on_cpu(image, size, mean, std):
    """A uint8 image [3, H, W], normalised and then resized to `size`, as float32 [3, H', W'] in channels-last memory.

    By OpenCV, in an eighth of torch's time, and closer to the exact interpolation: torch rounds coordinates to float32,
    which moves values by up to 4e-4 where neighbours differ most (measured; OpenCV's by 6e-7).
    """
    table = (torch.arange(256.0).div_(255) - mean[:, 0]) / std[
        :, 0
    ]  # [3, 256]: every value that a pixel can take
    pixels = cv2.LUT(image.permute(1, 2, 0).contiguous().numpy(), table.t()[None].contiguous().numpy())
    if size != image.shape[-2:]:
        pixels = cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_LINEAR)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def shape_buckets(
    min_size: int, max_size: int, divisible: int = 32, shares: Sequence[float] = (0.8, 0.9, 1.0)
) -> list[tuple[int, int]]:
    """Few (height, width) that hold every image resized to min_size/max_size, smallest first.

    For 800/1333: 800 by 1088, 1216 and 1344 in both orientations, which on COCO need 0.86 of the pixels of a fixed
    800x1344; last a square, for a batch of both orientations.
    """
    short, longest = (_round_up(min(side, max_size), divisible) for side in (min_size, max_size))
    lengths = sorted({max(short, _round_up(max_size * share, divisible)) for share in shares})
    buckets = [shape for length in lengths for shape in ((short, length), (length, short))]
    return list(dict.fromkeys([*buckets, (longest, longest)]))


def _round_up(value, divisible):
    return math.ceil(value / divisible) * divisible


def _rescale(places, old_size, new_size):
    """Boxes [..., 4] xyxy or keypoints [..., 3] (x, y, visibility), moved from one image size to another.

    The ratios are exact to float32, as in torchvision; as numbers they need no copy to the device.
    """
    ratio_y, ratio_x = (new / old for new, old in zip(new_size, old_size, strict=True))
    places = places.clone()
    is_boxes = places.shape[-1] == 4
    places[..., 0 : 3 if is_boxes else 1 : 2] *= ratio_x
    places[..., 1 : 4 if is_boxes else 2 : 2] *= ratio_y
    return places


# ---------------------------------------------------------------------- frozen batch norms


def fold_frozen_batch_norms(module: nn.Module) -> None:
    """Make every convolution below `module` do the work of the FrozenBatchNorm2d right after it, in place.

    torchvision's layer recomputes its scale and bias at each call, passes over the activations once more, and
    under autocast promotes them to float32. Folded, the scale is multiplied into the weight, once a step; the
    gradient flows through. Modules, parameters and state_dict keys stay.
    Only where the order of calls is certain: plain Sequentials, the stages of an IntermediateLayerGetter, and
    torchvision's ResNet blocks. Other frozen norms, and all live ones, are left as they are.
    """
    for parent in list(module.modules()):
        children = dict(parent.named_children())
        if isinstance(parent, (ResNet, BasicBlock, Bottleneck)):
            pairs = [(children.get(f"conv{n}"), children.get(f"bn{n}")) for n in (1, 2, 3)]
        elif type(parent).forward in (nn.Sequential.forward, IntermediateLayerGetter.forward):
            pairs = list(pairwise(children.values()))
        else:
            continue
        for conv, norm in pairs:
            if type(conv) is nn.Conv2d and type(norm) is FrozenBatchNorm2d:
                conv.__class__ = FoldedConv2d
                conv.folded_norm = (norm,)  # in a tuple: it is the parent's child, not the convolution's
                norm.__class__ = FoldedBatchNorm2d


class FoldedBatchNorm2d(FrozenBatchNorm2d):
    """A frozen batch norm whose work the convolution before it does; keeps the buffers."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class FoldedConv2d(nn.Conv2d):
    """A convolution and the frozen batch norm after it as one convolution.

    With scale = gamma / sqrt(variance + eps) its weight is weight * scale and its bias beta + (bias - mean) * scale,
    both rounded to autocast's dtype after folding. Where nothing trains, in evaluation without grad or in a frozen
    stage, they are kept until a tensor behind them is replaced or written to. In training they are folded at each
    call, and `train` forgets what was kept: torch's fused optimizers do not count their writes.
    """

    folded_norm: tuple[FrozenBatchNorm2d]

    def forward(self, x: Tensor) -> Tensor:
        device_type = self.weight.device.type
        autocast = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if autocast else self.weight.dtype
        parameters = list(self.parameters(recurse=False))
        if any(p.requires_grad for p in parameters) and (self.training or torch.is_grad_enabled()):
            weight, bias = self._fold(dtype)
        else:
            sources = [*parameters, *self.folded_norm[0].buffers()]
            weight, bias = self._keep("_kept_fold", sources, dtype, lambda: self._fold(dtype))
        return self._conv_forward(x, weight, bias)

    def train(self, mode: bool = True) -> "FoldedConv2d":
        self._kept_fold = None
        return super().train(mode)

    def _fold(self, dtype):
        norm = self.folded_norm[0]
        scale, shift = self._keep("_kept_affine", list(norm.buffers()), norm.eps, lambda: _affine(norm))
        weight = (self.weight * scale[:, None, None, None]).to(dtype)
        bias = shift if self.bias is None else torch.addcmul(shift, self.bias, scale)
        return weight, bias.to(dtype)

    def _keep(self, name, sources, setting, compute):
        """compute(), or what it gave last time if neither its sources nor the setting have changed since."""
        if torch.compiler.is_compiling():
            return compute()
        state = [setting, *((id(t), t._version, t.data_ptr()) for t in sources)]
        kept = getattr(self, name, None)
        if kept is None or kept[0] != state:
            # Outside inference mode, so that what evaluation leaves behind can be trained with. The sources are
            # kept too: a freed tensor's id and address could come back as another's.
            with torch.inference_mode(False), torch.no_grad():
                kept = (state, sources, compute())
            setattr(self, name, kept)
        return kept[2]


def _affine(norm):
    """Scale and shift, float [C] each, that a frozen batch norm applies."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias - norm.running_mean * scale
