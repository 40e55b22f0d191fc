"""The yardstick: torchvision's reference scripts for detection, each job done again the way that they do it.

Written anew from what those scripts do (references/detection in torchvision's repository), with the same library
calls where the cost lies: Pillow, pycocotools, full-frame masks, float images, losses read at each step. Nothing here
trains or scores for this project; benchmark.py measures against it.

Letters: N objects of an image, D detections of an image.
"""

import contextlib
import copy
import io
import itertools
import math

import numpy as np
import torch
import torchvision
from PIL import Image
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import masks_to_boxes
from torchvision.transforms import functional as pictures

LSJ_SIZE = 1024  # pixels, of the square that large-scale jitter crops or pads to
LSJ_SCALES = (0.1, 2.0)
LSJ_FILL = (123, 117, 104)  # the mean colour of ImageNet

# pycocotools' 12 numbers in the order in which summarize() leaves them.
STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


# --- data -----------------------------------------------------------------------------------------------


class ReferenceDataset(torchvision.datasets.CocoDetection):
    """COCO images as floats [3, H, W] in 0..1 and targets with full-frame masks.

    labels: {category id: label}, or None for labels that are the json's category ids.
    augment: (PIL image, target) -> (PIL image, target), before the image becomes a tensor; or None.
    """

    def __init__(self, image_folder, annotation_file, augment=None, *, labels=None, with_masks=True):
        with contextlib.redirect_stdout(io.StringIO()):
            super().__init__(image_folder, annotation_file)
        self.augment, self.labels, self.with_masks = augment, labels, with_masks

    def __getitem__(self, index):
        image, annotations = super().__getitem__(index)
        target = self.convert(image, annotations, self.ids[index])
        if self.augment is not None:
            image, target = self.augment(image, target)
        return pictures.convert_image_dtype(pictures.pil_to_tensor(image)), target

    def convert(self, image, annotations, image_id):
        """Annotations -> tensors: boxes float32 [N, 4] xyxy, labels, masks uint8 [N, H, W], area, iscrowd, image_id."""
        width, height = image.size
        objects = [a for a in annotations if a["iscrowd"] == 0]
        boxes = torch.as_tensor([a["bbox"] for a in objects], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes[:, 0::2].clamp_(min=0, max=width)
        boxes[:, 1::2].clamp_(min=0, max=height)
        keep = (boxes[:, 3] > boxes[:, 1]) & (boxes[:, 2] > boxes[:, 0])
        labels = [self.labels[a["category_id"]] if self.labels else a["category_id"] for a in objects]
        target = {
            "boxes": boxes[keep],
            "labels": torch.tensor(labels, dtype=torch.int64)[keep],
            "image_id": image_id,
            "area": torch.tensor([a["area"] for a in objects])[keep],
            "iscrowd": torch.tensor([a["iscrowd"] for a in objects])[keep],
        }
        if self.with_masks:
            target["masks"] = frames([a["segmentation"] for a in objects], height, width)[keep]
        return target


def frames(segmentations, height, width):
    """Full-frame masks, uint8 [N, height, width], of COCO polygons or RLEs."""
    masks = []
    for segmentation in segmentations:
        is_compressed = isinstance(segmentation, dict) and not isinstance(segmentation["counts"], list)
        rles = segmentation if is_compressed else mask_api.frPyObjects(segmentation, height, width)
        mask = mask_api.decode(rles)
        if mask.ndim < 3:
            mask = mask[..., None]
        masks.append(torch.as_tensor(mask, dtype=torch.uint8).any(dim=2))
    return torch.stack(masks).to(torch.uint8) if masks else torch.zeros((0, height, width), dtype=torch.uint8)


def images_to_learn_from(dataset):
    """Positions of the images with an object that has both sides longer than a pixel: a pass over all annotations."""
    chosen = []
    for position, image_id in enumerate(dataset.ids):
        annotations = dataset.coco.loadAnns(dataset.coco.getAnnIds(imgIds=image_id, iscrowd=None))
        tiny = [any(side <= 1 for side in annotation["bbox"][2:]) for annotation in annotations]
        if annotations and not all(tiny):
            chosen.append(position)
    return chosen


def aspect_ratios(dataset, positions):
    """width / height of the images at these positions, from pycocotools' index."""
    images = [dataset.coco.imgs[dataset.ids[position]] for position in positions]
    return [float(image["width"]) / float(image["height"]) for image in images]


def hflip(image, target):
    """Mirror with probability 0.5."""
    if torch.rand(1) >= 0.5:
        return image, target
    boxes = target["boxes"].clone()
    boxes[:, [0, 2]] = image.size[0] - boxes[:, [2, 0]]
    target["boxes"] = boxes
    if "masks" in target:
        target["masks"] = target["masks"].flip(-1)
    return pictures.hflip(image), target


def large_scale_jitter(image, target):
    """Resize by 0.1 to 2 times what fits LSJ_SIZE, crop or pad to that square, mirror."""
    image, target = _scale_jitter(image, target)
    image, target = _fixed_size_crop(image, target)
    return hflip(image, target)


def _scale_jitter(image, target):
    width, height = image.size
    low, high = LSJ_SCALES
    ratio = min(LSJ_SIZE / height, LSJ_SIZE / width) * (low + (high - low) * float(torch.rand(1)))
    new_height, new_width = int(height * ratio), int(width * ratio)
    image = pictures.resize(image, [new_height, new_width], antialias=True)
    target["boxes"][:, 0::2] *= new_width / width
    target["boxes"][:, 1::2] *= new_height / height
    if "masks" in target:
        nearest = pictures.InterpolationMode.NEAREST
        target["masks"] = pictures.resize(target["masks"], [new_height, new_width], interpolation=nearest)
    return image, target


def _fixed_size_crop(image, target):
    width, height = image.size
    crop_height, crop_width = min(height, LSJ_SIZE), min(width, LSJ_SIZE)
    if (crop_height, crop_width) != (height, width):
        share = float(torch.rand(1))
        top, left = int((height - crop_height) * share), int((width - crop_width) * share)
        image = pictures.crop(image, top, left, crop_height, crop_width)
        boxes = target["boxes"] - torch.tensor([left, top, left, top])
        boxes[:, 0::2].clamp_(min=0, max=crop_width)
        boxes[:, 1::2].clamp_(min=0, max=crop_height)
        keep = (boxes[:, 0] < boxes[:, 2]) & (boxes[:, 1] < boxes[:, 3])
        target["boxes"], target["labels"] = boxes[keep], target["labels"][keep]
        if "masks" in target:
            target["masks"] = pictures.crop(target["masks"][keep], top, left, crop_height, crop_width)
    right, bottom = LSJ_SIZE - crop_width, LSJ_SIZE - crop_height
    image = pictures.pad(image, [0, 0, right, bottom], fill=LSJ_FILL)
    if "masks" in target:
        target["masks"] = pictures.pad(target["masks"], [0, 0, right, bottom], fill=0)
    return image, target


def copy_paste(images, targets):
    """Simple copy-paste within a batch: each image gets a random part of its neighbour's objects, edges blended.

    images: float [3, H, W] in 0..1. Returns new lists. Source: Ghiasi et al. 2021, as torchvision's reference does it.
    """
    pairs = zip(images, targets, [images[-1], *images[:-1]], [targets[-1], *targets[:-1]], strict=True)
    pasted = [_paste_objects(*pair) for pair in pairs]
    return [image for image, _ in pasted], [target for _, target in pasted]


def _paste_objects(image, target, other_image, other):
    count = len(other["masks"])
    if count == 0:
        return image, target
    chosen = torch.unique(torch.randint(0, count, (count,)))
    masks, labels = other["masks"][chosen], other["labels"][chosen]
    alpha = masks.sum(dim=0, keepdim=True).gt(0)
    alpha = pictures.gaussian_blur(alpha.to(torch.uint8), (5, 5), [2.0]).bool()
    masks = masks * alpha
    if image.shape != other_image.shape:
        size = list(image.shape[-2:])
        other_image = pictures.resize(other_image, size, antialias=True)
        nearest = pictures.InterpolationMode.NEAREST
        masks = pictures.resize(masks, size, interpolation=nearest)
        alpha = pictures.resize(alpha.to(torch.uint8), size, interpolation=nearest).bool()
    image = image * ~alpha + other_image * alpha
    covered = target["masks"] * ~alpha
    left = covered.sum((-1, -2)) > 0
    pasted = masks.sum((-1, -2)) > 0
    masks = torch.cat([covered[left], masks[pasted]])
    labels = torch.cat([target["labels"][left], labels[pasted]])
    boxes = masks_to_boxes(masks)
    keep = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    return image, {
        "boxes": boxes[keep],
        "labels": labels[keep],
        "masks": masks[keep],
        "image_id": target["image_id"],
    }


def collate(samples):
    return tuple(zip(*samples, strict=True))


def shuffled_batches(groups, batch_size):
    """One epoch of batches of images of the same group, in a random order from torch's generator.

    groups: group number of each image. Returns len(groups) // batch_size lists of positions: a batch begins when its
    group has enough images; what is left at the end is filled up with images of its group that were there before.
    """
    batches, waiting, seen = [], {}, {}
    for position in torch.randperm(len(groups)).tolist():
        group = int(groups[position])
        waiting.setdefault(group, []).append(position)
        seen.setdefault(group, []).append(position)
        if len(waiting[group]) == batch_size:
            batches.append(waiting.pop(group))
    for group in sorted(waiting, key=lambda group: -len(waiting[group])):
        if len(batches) < len(groups) // batch_size:
            again = itertools.cycle(seen[group])
            batches.append(list(itertools.islice(itertools.chain(waiting[group], again), batch_size)))
    return batches


def to_reference(image, target):
    """One of our samples as the reference's loader would give it: a float image and full-frame masks."""
    boxes = target["boxes"]
    converted = {
        "boxes": boxes,
        "labels": target["labels"],
        "image_id": target["image_id"],
        "area": (boxes[:, 2:] - boxes[:, :2]).prod(dim=1),
        "iscrowd": torch.zeros(len(boxes), dtype=torch.int64),
    }
    if "masks" in target:
        converted["masks"] = target["masks"].dense()
    if "keypoints" in target:
        converted["keypoints"] = target["keypoints"]
    return image.float() / 255, converted


# --- training -------------------------------------------------------------------------------------------


def build_mask_rcnn(backbone, num_classes, min_size, max_size, rois_per_image=512):
    """torchvision's Mask R-CNN on a ResNet and FPN that train from scratch: every stage, with live batch norms.

    backbone: a ResNet builder's name. num_classes: K + 1. min_size, max_size: pixels.
    """
    norm = torch.nn.BatchNorm2d
    body = resnet_fpn_backbone(backbone_name=backbone, weights=None, norm_layer=norm, trainable_layers=5)
    sizes = {"min_size": min_size, "max_size": max_size}
    return MaskRCNN(body, num_classes, **sizes, box_batch_size_per_image=rois_per_image)


def to_device(images, targets, device):
    images = [image.to(device) for image in images]
    targets = [
        {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in t.items()} for t in targets
    ]
    return images, targets


def train_one_epoch(model, optimizer, scheduler, loader, device, scaler=None):
    """The reference's loop: warm-up by a scheduler, losses reduced and read at each step, fp16 autocast with a scaler.

    loader: yields (images, targets). Returns the losses of each step as floats, a list of dicts.
    """
    model.train()
    read = []
    for images, targets in loader:
        images, targets = to_device(images, targets, device)
        with torch.autocast(device.type, dtype=torch.float16, enabled=scaler is not None):
            losses = model(images, targets)
            loss = sum(losses.values())
        total = sum(losses.values()).item()
        if not math.isfinite(total):
            raise RuntimeError(f"the loss is {total}")
        optimizer.zero_grad()
        if scaler is not None:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        else:
            loss.backward()
            optimizer.step()
        scheduler.step()
        read.append({name: value.item() for name, value in losses.items()})
    return read


def warm_up(optimizer, steps=1000):
    """The reference's first epoch: the learning rate climbs from a thousandth."""
    return torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1e-3, total_iters=steps)


# --- evaluation -----------------------------------------------------------------------------------------


class BatchEvaluator:
    """pycocotools driven batch by batch: each batch's results are matched at once, the matches kept until the end."""

    def __init__(self, coco, iou_types):
        self.coco = copy.deepcopy(coco)
        self.evaluators = {iou_type: COCOeval(self.coco, iouType=iou_type) for iou_type in iou_types}
        self.matches = {iou_type: [] for iou_type in iou_types}
        self.image_ids = []

    def update(self, predictions):
        """predictions: {image id: {"boxes" [D, 4] xyxy, "labels" category ids, "scores", "masks" [D, 1, H, W]}}."""
        image_ids = list(predictions)
        self.image_ids += image_ids
        to_results = {"bbox": box_results, "segm": mask_results}
        for iou_type, evaluator in self.evaluators.items():
            results = to_results[iou_type](predictions)
            with contextlib.redirect_stdout(io.StringIO()):
                evaluator.cocoDt = COCO.loadRes(self.coco, results) if results else COCO()
                evaluator.params.imgIds = image_ids
                evaluator.evaluate()
            shape = (-1, len(evaluator.params.areaRng), len(image_ids))
            self.matches[iou_type].append(np.asarray(evaluator.evalImgs).reshape(shape))

    def summarize(self):
        """{iou type: the 12 numbers by name} of all batches so far."""
        ids, order = np.unique(self.image_ids, return_index=True)
        metrics = {}
        for iou_type, evaluator in self.evaluators.items():
            matches = np.concatenate(self.matches[iou_type], axis=2)[..., order]
            evaluator.evalImgs = list(matches.flatten())
            evaluator.params.imgIds = ids.tolist()
            evaluator._paramsEval = copy.deepcopy(evaluator.params)
            with contextlib.redirect_stdout(io.StringIO()):
                evaluator.accumulate()
                evaluator.summarize()
            metrics[iou_type] = dict(zip(STATS, evaluator.stats.tolist(), strict=True))
        return metrics


def box_results(predictions):
    results = []
    for image_id, prediction in predictions.items():
        x0, y0, x1, y1 = prediction["boxes"].unbind(1)
        boxes = torch.stack((x0, y0, x1 - x0, y1 - y0), dim=1).tolist()
        scores, labels = prediction["scores"].tolist(), prediction["labels"].tolist()
        results += [
            {"image_id": image_id, "category_id": label, "bbox": box, "score": score}
            for label, box, score in zip(labels, boxes, scores, strict=True)
        ]
    return results


def mask_results(predictions):
    results = []
    for image_id, prediction in predictions.items():
        masks = prediction["masks"] > 0.5
        rles = [
            mask_api.encode(np.array(mask[0, :, :, None], dtype=np.uint8, order="F"))[0] for mask in masks
        ]
        for rle in rles:
            rle["counts"] = rle["counts"].decode("utf-8")
        scores, labels = prediction["scores"].tolist(), prediction["labels"].tolist()
        results += [
            {"image_id": image_id, "category_id": label, "segmentation": rle, "score": score}
            for label, rle, score in zip(labels, rles, scores, strict=True)
        ]
    return results


def coco_results(predictions):
    """One batch's COCO results, boxes and masks in one record each."""
    return [
        {**box, "segmentation": mask["segmentation"]}
        for box, mask in zip(box_results(predictions), mask_results(predictions), strict=True)
    ]


def paste(detections, height, width):
    """What torchvision's model does last: mask_probs [D, 28, 28] as full frames, "masks" float32 [D, 1, H, W]."""
    frames = paste_masks_in_image(detections["mask_probs"][:, None], detections["boxes"], (height, width))
    return {
        **{name: v for name, v in detections.items() if name != "mask_probs"},
        "masks": frames,
    }


@torch.inference_mode()
def evaluate(model, loader, device, category_ids, consume):
    """The reference's loop: forward (which pastes the masks), to the CPU, to the evaluator.

    loader: yields (images, targets). category_ids: label k is category_ids[k - 1].
    consume: gets each batch's predictions, as BatchEvaluator.update does.
    """
    model.eval()
    ids = torch.tensor(category_ids)
    for images, targets in loader:
        images = [image.to(device) for image in images]
        outputs = [{name: v.cpu() for name, v in output.items()} for output in model(images)]
        consume(
            {
                target["image_id"]: {**output, "labels": ids[output["labels"] - 1]}
                for target, output in zip(targets, outputs, strict=True)
            }
        )


# --- detectron2 -----------------------------------------------------------------------------------------


def build_detectron2(depth, num_classes, min_size, max_size, device):
    """detectron2's Mask R-CNN with an FPN, as its model zoo's 1x schedule has it, but with torchvision's input and
    stride placement, so that torchvision's weights mean the same in it. num_classes: K, without background.
    Raises ModuleNotFoundError where detectron2 cannot be imported.
    """
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    cfg = get_cfg()
    cfg.merge_from_list(
        [
            *("MODEL.DEVICE", str(device), "MODEL.META_ARCHITECTURE", "GeneralizedRCNN"),
            *("MODEL.MASK_ON", True, "MODEL.WEIGHTS", ""),
            *("MODEL.PIXEL_MEAN", [255 * 0.485, 255 * 0.456, 255 * 0.406]),
            *("MODEL.PIXEL_STD", [255 * 0.229, 255 * 0.224, 255 * 0.225]),
            *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.BACKBONE.FREEZE_AT", 2),
            *("MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.STRIDE_IN_1X1", False),
            *("MODEL.RESNETS.RES2_OUT_CHANNELS", 64 if depth < 50 else 256),
            *("MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"]),
            *("MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"]),
            *("MODEL.ANCHOR_GENERATOR.SIZES", [[32], [64], [128], [256], [512]]),
            *("MODEL.RPN.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"]),
            *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", 2000, "MODEL.RPN.PRE_NMS_TOPK_TEST", 1000),
            *("MODEL.RPN.POST_NMS_TOPK_TRAIN", 1000, "MODEL.RPN.POST_NMS_TOPK_TEST", 1000),
            *("MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.ROI_HEADS.NUM_CLASSES", num_classes),
            *("MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4", "p5"]),
            *("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_FC", 2),
            *("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 7),
            *("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead", "MODEL.ROI_MASK_HEAD.NUM_CONV", 4),
            *("MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 14),
            *("INPUT.MIN_SIZE_TRAIN", (min_size,), "INPUT.MAX_SIZE_TRAIN", max_size),
        ]
    )
    return build_model(cfg)


def detectron2_state(state):
    """torchvision's state_dict of a Mask R-CNN with a ResNet and FPN as detectron2's: names, background class last."""
    renamed = {}
    for key, value in state.items():
        if key.endswith("num_batches_tracked"):
            continue
        place, name = key.split(".")[:2], key
        if key.startswith("backbone.body."):
            name = "backbone.bottom_up." + key.removeprefix("backbone.body.")
            for old, new in (("downsample.0", "shortcut"), ("downsample.1", "shortcut.norm")):
                name = name.replace(old, new)
            for number in (1, 2, 3):
                name = name.replace(f"bn{number}.", f"conv{number}.norm.")
            for number in (1, 2, 3, 4):
                name = name.replace(f"layer{number}.", f"res{number + 1}.")
            name = name.replace("bottom_up.conv1", "bottom_up.stem.conv1")
        elif place == ["backbone", "fpn"]:
            kind, level = key.split(".")[2:4]
            kind = {"inner_blocks": "fpn_lateral", "layer_blocks": "fpn_output"}[kind]
            name = f"backbone.{kind}{int(level) + 2}.{key.rsplit('.', 1)[1]}"
        else:
            for old, new in (
                ("rpn.head.conv.0.0", "proposal_generator.rpn_head.conv"),
                ("rpn.head.cls_logits", "proposal_generator.rpn_head.objectness_logits"),
                ("rpn.head.bbox_pred", "proposal_generator.rpn_head.anchor_deltas"),
                ("box_head.fc6", "box_head.fc1"),
                ("box_head.fc7", "box_head.fc2"),
                ("mask_predictor.conv5_mask", "mask_head.deconv"),
                ("mask_predictor.mask_fcn_logits", "mask_head.predictor"),
            ):
                name = name.replace(old, new)
            for number in range(4):
                name = name.replace(f"mask_head.{number}.0", f"mask_head.mask_fcn{number + 1}")
        if "cls_score" in name:
            value = torch.cat([value[1:], value[:1]])
        elif "roi_heads.box_predictor.bbox_pred" in name:
            value = value[4:]
        elif "mask_head.predictor" in name:
            value = value[1:]
        renamed[name] = value
    return renamed


def detectron2_input(image, target, polygons, min_size, max_size):
    """One of our samples as detectron2's data mapper gives it: resized uint8 pixels, polygons, boxes.

    polygons: of each object, COCO's lists of numbers in the image's pixels.
    """
    from detectron2.structures import Boxes, Instances, PolygonMasks

    height, width = image.shape[-2:]
    scale = min(min_size / min(height, width), max_size / max(height, width))
    size = (int(height * scale + 0.5), int(width * scale + 0.5))
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    pixels = np.array(Image.fromarray(pixels).resize(size[::-1], Image.BILINEAR))
    ratio = torch.tensor([size[1] / width, size[0] / height])
    instances = Instances(size)
    instances.gt_boxes = Boxes(target["boxes"] * ratio.repeat(2))
    instances.gt_classes = target["labels"] - 1
    scaled = [
        [(np.asarray(p).reshape(-1, 2) * ratio.numpy()).reshape(-1) for p in parts] for parts in polygons
    ]
    instances.gt_masks = PolygonMasks(scaled)
    return {
        "image": torch.from_numpy(pixels).permute(2, 0, 1),
        "instances": instances,
        "height": height,
        "width": width,
    }


def train_detectron2(model, optimizer, scheduler, loader):
    """detectron2's plain training loop (tools/plain_train_net.py): the losses are read at each step.

    loader: yields (list of detectron2's input dicts, anything). Returns the losses of each step as floats.
    """
    from detectron2.utils.events import EventStorage

    model.train()
    read = []
    with EventStorage() as storage:
        for inputs, _ in loader:
            losses = model(list(inputs))
            loss = sum(losses.values())
            read.append({name: value.item() for name, value in losses.items()})
            storage.put_scalars(total_loss=sum(read[-1].values()), **read[-1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            storage.step()
    return read
