"""The models and weights that all arms of a benchmark start from, and the workload that they share."""

from dataclasses import dataclass

import torch
from torchvision.models import get_model

import checkpoint as checkpoints
import coco_utils
import models

CANDIDATES_PER_IMAGE = (
    1000  # boxes above the score threshold before suppression: seen in trained models on COCO
)
SCORE_THRESHOLD = 0.05  # torchvision's, of a detection


@dataclass(frozen=True)
class Workload:
    """What all arms of a comparison work on."""

    images: str  # folder
    annotations: str  # COCO json
    model: str = "maskrcnn_resnet50_fpn"
    backbone: str | None = None
    weights: str | None = None  # a file of write_weights
    min_size: int = 800  # pixels
    max_size: int = 1333
    batch_size: int = 2
    num_batches: int = 8  # that are held in memory and gone through again and again
    workers: int | None = None  # None: batches from memory, without a loader
    threads: int = 1
    seed: int = 0
    device: str = "cpu"

    def dataset(self, **options):
        fields = {"with_masks": "maskrcnn" in self.model, "with_keypoints": "keypoint" in self.model}
        return coco_utils.CocoDataset(self.images, self.annotations, seed=self.seed, **fields, **options)


def build_ours(workload, dataset, eps, reference_ops=False):
    """This project's model as a pretrained recipe has it: frozen batch norms, the backbone's last stages train."""
    model, _ = models.build_model(
        workload.model,
        num_classes=len(dataset.classes) + 1,
        backbone=workload.backbone,
        norm="frozen",
        norm_eps=eps,
        trainable_layers=models.DEFAULT_TRAINABLE.get(workload.model, 3),
        num_keypoints=dataset.num_keypoints,
        min_size=workload.min_size,
        max_size=workload.max_size,
        reference_ops=reference_ops,
    )
    return model


def build_torchvision(workload, dataset, eps):
    """torchvision's own model with the same norms and frozen stages."""
    options = {}
    if models.takes_size(workload.model):
        options.update(min_size=workload.min_size, max_size=workload.max_size)
    if "keypoint" in workload.model:
        options["num_keypoints"] = dataset.num_keypoints
    model = get_model(
        workload.model,
        weights=None,
        weights_backbone=None,
        num_classes=len(dataset.classes) + 1,
        **options,
    )
    if workload.backbone is not None:
        models.replace_backbone(model, workload.backbone)
    models.convert_norm(model.backbone, "frozen")
    models.set_norm_eps(model.backbone, eps)
    models.freeze_stages(model.backbone, models.DEFAULT_TRAINABLE.get(workload.model, 3))
    return model


def load_weights(workload):
    """(state_dict, eps of the norms) as WeightsArm has written them."""
    content = torch.load(workload.weights, weights_only=True)
    return content["model"], content["eps"]


def write_weights(workload, path, checkpoint=None, confident=False):
    """Write the weights that all arms start from: a checkpoint's, or seeded ones with norms fitted to the images.

    path: the file to write. checkpoint: a training run's checkpoint, or None.
    confident: give a random classifier opinions, so that evaluation has about as many detections as a trained model.
    """
    torch.set_num_threads(workload.threads)
    dataset = workload.dataset(training=True)
    if checkpoint is not None:
        content = checkpoints.load(checkpoint)
        checkpoints.check_same_classes(content, dataset.classes, dataset.category_ids, checkpoint)
        state, eps = content["model"], content["norm"]["eps"]
    else:
        state, eps = seeded_weights(workload, dataset, confident)
    torch.save({"model": state, "eps": eps}, path)


def seeded_weights(workload, dataset, confident):
    """(state_dict, eps) of a random model whose activations have the scale of a trained one's."""
    torch.manual_seed(workload.seed)
    model = build_torchvision(workload, dataset, eps=1e-5)
    models.convert_norm(model.backbone, "batch")
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # a plain mean over what it sees
            module.reset_running_stats()
    images = [dataset[index][0].float() / 255 for index in range(min(4, len(dataset)))]
    with torch.no_grad():
        for image in images:
            batch, _ = model.transform([image])
            model.backbone(batch.tensors)
    models.convert_norm(model.backbone, "frozen")
    if confident and hasattr(model, "roi_heads"):
        make_confident(model.eval(), images)
    return model.state_dict(), 1e-5


@torch.no_grad()
def make_confident(model, images):
    """Scale and shift the classifier so that CANDIDATES_PER_IMAGE boxes pass the score threshold."""
    seen = []
    predictor = model.roi_heads.box_predictor
    handle = predictor.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    for image in images:
        model([image])
    handle.remove()
    logits = torch.cat(seen)
    wanted = CANDIDATES_PER_IMAGE * len(images) / logits.numel()
    scale, mean = 3 / logits.std(dim=0).mean(), logits.mean(dim=0)
    predictor.cls_score.weight.mul_(scale)
    predictor.cls_score.bias.sub_(mean).mul_(scale)
    logits = (logits - mean) * scale
    low, high = -50.0, 50.0
    for _ in range(40):
        background = (low + high) / 2
        shifted = torch.cat([logits[:, :1] + background, logits[:, 1:]], dim=1)
        too_many = (shifted.softmax(dim=1)[:, 1:] > SCORE_THRESHOLD).float().mean() > wanted
        low, high = (background, high) if too_many else (low, background)
    predictor.cls_score.bias[0] += high
