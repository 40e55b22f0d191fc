"""The recipes are torchvision's, and what their comments promise is what torchvision publishes."""

import re
from pathlib import Path

import numpy as np
import pytest
from torchvision.models import get_model_weights

import arguments
import models
import train
from group_by_aspect_ratio import GroupedBatchSampler

RECIPES = Path(__file__).parents[1] / "recipes"
COCO_IMAGES = 117_266  # of train2017 with objects
# As torchvision's reference and the pull requests of its second weights (5756, 5763, 5773) print them:
# ranks, images a rank, learning rate, epochs, epochs at which it falls, weight decay, augmentation.
PUBLISHED = {
    "fasterrcnn_resnet50_fpn": (8, 2, 0.02, 26, [16, 22], 1e-4, "hflip"),
    "fasterrcnn_mobilenet_v3_large_fpn": (8, 2, 0.02, 26, [16, 22], 1e-4, "hflip"),
    "fasterrcnn_mobilenet_v3_large_320_fpn": (8, 2, 0.02, 26, [16, 22], 1e-4, "hflip"),
    "maskrcnn_resnet50_fpn": (8, 2, 0.02, 26, [16, 22], 1e-4, "hflip"),
    "keypointrcnn_resnet50_fpn": (8, 2, 0.02, 46, [36, 43], 1e-4, "hflip"),
    "retinanet_resnet50_fpn": (8, 2, 0.01, 26, [16, 22], 1e-4, "hflip"),
    "fcos_resnet50_fpn": (8, 2, 0.01, 26, [16, 22], 1e-4, "hflip"),
    "fasterrcnn_resnet50_fpn_v2": (32, 2, 0.1, 400, [352, 384], 4e-5, "lsj"),
    "maskrcnn_resnet50_fpn_v2": (32, 2, 0.1, 400, [352, 384], 4e-5, "lsj"),
    "retinanet_resnet50_fpn_v2": (8, 2, 1e-4, 26, [16, 22], 0.05, "multiscale"),
    "ssd300_vgg16": (8, 4, 0.002, 120, [80, 110], 5e-4, "ssd"),
    "ssdlite320_mobilenet_v3_large": (8, 24, 0.15, 660, None, 4e-5, "ssdlite"),
}
FROM_SCRATCH = {"fasterrcnn_resnet50_fpn_v2", "maskrcnn_resnet50_fpn_v2", "ssdlite320_mobilenet_v3_large"}


def recipe(name):
    """(its text, its arguments) of recipes/<name>.args"""
    path = RECIPES / f"{name}.args"
    return path.read_text(), arguments.parse_args("", [f"@{path}", "--data-path", "coco"])


def test_every_builder_has_its_recipe():
    names = {path.stem for path in RECIPES.glob("*.args")} - {"shapes"}
    assert names == set(models.NAMES) == set(PUBLISHED)


@pytest.mark.parametrize("name", models.NAMES)
def test_a_recipe_trains_its_builder_on_its_data(name):
    _, args = recipe(name)
    assert args.model == name
    assert args.dataset == ("coco_kp" if name.startswith("keypoint") else "coco")
    assert (args.weights is None, args.weights_backbone is None) == (True, name in FROM_SCRATCH)


@pytest.mark.parametrize("name", models.NAMES)
def test_the_expected_ap_is_the_published_one(name):
    text, _ = recipe(name)
    (line,) = re.findall(r"^# Expected on val2017: (.+)$", text, re.MULTILINE)
    expected = {kind: float(ap) for kind, ap in re.findall(r"(box|mask|keypoint) AP (0\.\d{3})\b", line)}
    published = get_model_weights(name)["COCO_V1"].meta["_metrics"]["COCO-val2017"]
    names = {"box": "box_map", "mask": "mask_map", "keypoint": "kp_map"}
    assert {names[kind]: round(100 * ap, 1) for kind, ap in expected.items()} == published


@pytest.mark.parametrize("name", models.NAMES)
def test_the_schedule_is_the_published_one(name):
    text, args = recipe(name)
    ranks, batch, lr, epochs, falls, weight_decay, augmentation = PUBLISHED[name]
    (said,) = re.findall(r"^# (\d+) ranks (?:\(.*\) )?of (\d+) images", text, re.MULTILINE)
    assert (int(said[0]), int(said[1]), args.batch_size) == (ranks, batch, batch)
    if args.lr is not None:
        assert f"--lr is for {ranks * batch} images a step" in text
    assert (args.weight_decay, args.data_augmentation) == (weight_decay, augmentation)

    sampler = GroupedBatchSampler(np.zeros(COCO_IMAGES), batch, num_ranks=ranks)
    steps_per_epoch, total_steps, resolved_lr, schedule = train.plan_schedule(
        args, len(sampler), batch * ranks
    )
    assert steps_per_epoch == COCO_IMAGES // (ranks * batch)
    assert (resolved_lr, total_steps) == (pytest.approx(lr), epochs * steps_per_epoch)
    if falls is None:
        assert (schedule.kind, schedule.factor(total_steps // 2)) == (
            "cosineannealinglr", pytest.approx(0.5, abs=1e-5),
        )  # fmt: skip
    else:
        assert (schedule.kind, schedule.gamma) == ("multisteplr", 0.1)
        assert schedule.milestones == [epoch * steps_per_epoch for epoch in falls]
        before, after = (schedule.factor(falls[0] * steps_per_epoch + step) for step in (-1, 0))
        assert (before, after) == (1.0, pytest.approx(0.1))
    # torchvision warms up for 1000 steps from a thousandth, or for one step less than an epoch
    assert (schedule.warmup_steps, schedule.factor(0)) == (min(1000, steps_per_epoch - 1), 1e-3)
