"""Every detector and backbone through the front door: ten steps, an evaluation, a resumed run, two ranks.

The images have 64 pixels, but for the SSDs, whose size is their architecture's.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchvision.models import detection, get_model
from torchvision.models.detection.backbone_utils import BackboneWithFPN, resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

import arguments
import models
import shapes
import train

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
NUM_CLASSES = len(shapes.CLASSES) + 1
LOSSES = {
    "rcnn": {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"},
    "retinanet": {"classification", "bbox_regression"},
    "fcos": {"classification", "bbox_regression", "bbox_ctrness"},
    "ssd": {"classification", "bbox_regression"},
}
# One model of each family. The FPN detectors stand on a small ResNet; the SSDs have only their own backbones.
FAMILIES = {
    "box": ["--model=fasterrcnn_resnet50_fpn", "--backbone=resnet18"],
    "mask": ["--model=maskrcnn_resnet50_fpn", "--backbone=resnet18"],
    "keypoint": ["--model=keypointrcnn_resnet50_fpn", "--backbone=resnet18"],
    "retinanet": ["--model=retinanet_resnet50_fpn", "--backbone=resnet18"],
    "fcos": ["--model=fcos_resnet50_fpn", "--backbone=resnet18"],
    "ssd": ["--model=ssd300_vgg16", "--batch-size=1"],
    "ssdlite": ["--model=ssdlite320_mobilenet_v3_large"],
}


def losses_of(name):
    kind = next(kind for kind in ("rcnn", "retinanet", "fcos", "ssd") if kind in name)
    own = {"maskrcnn": {"loss_mask"}, "keypointrcnn": {"loss_keypoint"}}
    return LOSSES[kind] | own.get(name.split("_")[0], set())


def iou_types_of(name):
    return {"bbox"} | {"maskrcnn": {"segm"}, "keypointrcnn": {"keypoints"}}.get(name.split("_")[0], set())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A few of the built-in shapes, as COCO 2017 lays its files out."""
    return shapes.write_shapes(tmp_path_factory.mktemp("data"), num_train=24, num_val=3)


def flags(data, output, *more):
    """The command line of a small run."""
    keypoints = any("keypointrcnn" in str(flag) for flag in more)
    return [
        f"--dataset={'coco_kp' if keypoints else 'coco'}", "--data-path", str(data), "--output-dir", str(output),
        "--device=cpu", "--workers=0", "--min-size=64", "--max-size=96", "--rois-per-image=8",
        "--detections-per-image=5", "--batch-size=2", "--lr=0.001", "--clip-grad-norm=5", "--warmup-steps=0",
        "--print-freq=5", *map(str, more),
    ]  # fmt: skip


def records(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def run_ten_steps(data, output, name, *more):
    """Train for ten steps and evaluate; check what every model owes; returns its state_dict."""
    assert (
        train.cli(
            flags(
                data, output, f"--model={name}", "--total-steps=10", "--eval-every=99", "--momentum=0", *more
            )
        )
        == 0
    )
    *_, record = records(output)
    assert record["step"] == 10
    for each in records(output):
        assert set(each["train"]["losses"]) == losses_of(name)
        assert all(math.isfinite(loss) and loss >= 0 for loss in each["train"]["losses"].values())
    scores = {kind: numbers for kind, numbers in record["eval"].items() if isinstance(numbers, dict)}
    assert set(scores) == iou_types_of(name)
    for numbers in scores.values():
        assert "AP" in numbers and all(-1 <= number <= 1 for number in numbers.values())
    content = torch.load(output / "checkpoint.pth", weights_only=True)
    assert all(torch.isfinite(value).all() for value in content["model"].values())
    return content["model"]


@pytest.mark.parametrize("name", models.NAMES)
def test_ten_steps_of_every_detector(data, tmp_path, name):
    small = ["--batch-size=1"] if name == "ssd300_vgg16" else []
    state = run_ten_steps(data, tmp_path, name, *small)
    size = {"num_classes": NUM_CLASSES}
    if name.startswith("keypoint"):  # one class has keypoints
        size = {"num_classes": 2, "num_keypoints": len(shapes.KEYPOINTS)}
    stock = get_model(name, weights=None, weights_backbone=None, **size)
    stock.load_state_dict(state, strict=True)


@pytest.mark.parametrize("name", models.NAMES)
def test_the_recipe_of_the_built_in_data_suits_every_detector(name):
    """Its small backbone takes the place of a ResNet-50, and of nothing else."""
    args = arguments.parse_args("", ["--model", name])
    assert args.backbone == ("resnet18" if "resnet50" in name else None)
    args = arguments.parse_args("", ["--model", name, "--backbone", "resnet34"])
    assert args.backbone == "resnet34"


def resnet_pyramid(name):
    return resnet_fpn_backbone(
        backbone_name=name, weights=None, norm_layer=torch.nn.BatchNorm2d, trainable_layers=5
    )


def features_pyramid(name, levels):
    """levels: {child of the classifier's features: channels}, of strides 4, 8, 16 and 32."""
    features = get_model(name, weights=None).features
    layers = {child: str(level) for level, child in enumerate(levels)}
    return BackboneWithFPN(features, layers, list(levels.values()), 256, LastLevelMaxPool())


BACKBONES = {
    "resnet18": lambda: resnet_pyramid("resnet18"),
    "resnext50_32x4d": lambda: resnet_pyramid("resnext50_32x4d"),
    "wide_resnet50_2": lambda: resnet_pyramid("wide_resnet50_2"),
    "mobilenet_v3_large": lambda: features_pyramid(
        "mobilenet_v3_large", {"3": 24, "6": 40, "12": 112, "16": 960}
    ),
    "efficientnet_b0": lambda: features_pyramid("efficientnet_b0", {"2": 24, "3": 40, "5": 112, "8": 1280}),
    "convnext_tiny": lambda: features_pyramid("convnext_tiny", {"1": 96, "3": 192, "5": 384, "7": 768}),
    "swin_t": lambda: features_pyramid("swin_t", {"1": 96, "3": 192, "5": 384, "7": 768}),
}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_ten_steps_on_every_family_of_backbones(data, tmp_path, backbone):
    """The weights load strictly into torchvision's own MaskRCNN on its own feature pyramid."""
    state = run_ten_steps(data, tmp_path, "maskrcnn_resnet50_fpn", f"--backbone={backbone}")
    detection.MaskRCNN(BACKBONES[backbone](), NUM_CLASSES).load_state_dict(state, strict=True)


def check_same_end(whole, part):
    contents = [torch.load(path / "checkpoint.pth", weights_only=True) for path in (whole, part)]
    assert contents[0]["progress"] == contents[1]["progress"]
    for name, value in contents[0]["model"].items():
        assert torch.equal(value, contents[1]["model"][name]), name
    last = [records(path)[-1] for path in (whole, part)]
    assert last[0]["train"]["losses"] == last[1]["train"]["losses"]
    assert scores_of(last[0]) == scores_of(last[1])


def scores_of(record):
    """The metrics of an evaluation, without its times."""
    return {kind: numbers for kind, numbers in record["eval"].items() if isinstance(numbers, dict)}


# Run on each of two ranks: every family once through and once resumed, in processes that are started once.
TWO_RANKS = """
import json, sys
import train
for command in json.load(open(sys.argv[1])):
    status = train.cli(command)
    assert status == 0, (status, command)
"""


@pytest.fixture(scope="module")
def two_ranks(data, tmp_path_factory):
    """{family: (folder of the whole run, folder of the resumed one)}, each of two processes."""
    folder = tmp_path_factory.mktemp("two")
    outputs, commands = {}, []
    for family, options in FAMILIES.items():
        whole, part = outputs[family] = folder / family / "whole", folder / family / "part"
        more = [*options, "--batch-size=1", "--train-samples=4", "--epochs=2", "--eval-every=99"]
        if family in SYNCHRONISED:
            more.append("--sync-bn")
        resumed = [*more, "--resume", whole / "model_0.pth"]
        for output, options in ((whole, more), (part, resumed)):  # a meeting place of its own for each run
            meeting = f"--dist-url=file://{folder}/{family}-{output.name}.store"
            commands.append(flags(data, output, *options, meeting))
    (folder / "run.py").write_text(TWO_RANKS)
    (folder / "commands.json").write_text(json.dumps(commands))
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            str(folder / "run.py"), str(folder / "commands.json"),
        ],
        capture_output=True, text=True, timeout=900, check=False, cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return outputs


SYNCHRONISED = ("box", "ssdlite")


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_train_and_resume_to_the_same_bits(data, tmp_path, two_ranks, family):
    whole, part = two_ranks[family]
    check_same_end(whole, part)
    content = torch.load(whole / "checkpoint.pth", weights_only=True)
    assert (content["progress"]["step"], len(content["rng"])) == (
        4,
        2,
    )  # four images, two ranks of one, twice
    assert content["norm"]["type"] == (
        "sync" if family in SYNCHRONISED else "none" if family == "ssd" else "batch"
    )
    name = FAMILIES[family][0].removeprefix("--model=")
    for record in records(whole):
        assert set(record["train"]["losses"]) == losses_of(name)
    assert set(scores_of(record)) == iou_types_of(name)


@pytest.mark.parametrize("family", ["keypoint", "retinanet"])
def test_one_process_scores_what_two_ranks_trained_alike(data, tmp_path, two_ranks, family):
    """The command names the model only: norm, backbone and frozen stages come from the checkpoint."""
    whole, _ = two_ranks[family]
    more = [FAMILIES[family][0], "--test-only", "--resume", whole / "checkpoint.pth"]
    assert train.cli(flags(data, tmp_path, *more)) == 0
    assert scores_of(records(tmp_path)[-1]) == scores_of(records(whole)[-1])


def test_a_resumed_run_keeps_the_stages_of_its_pretrained_backbone_frozen(data, tmp_path):
    """The run began from backbone weights that are gone when it goes on: frozen norm, three stages that train."""
    torch.manual_seed(0)
    torch.save(get_model("resnet18").state_dict(), tmp_path / "resnet18.pth")
    more = [*FAMILIES["box"], "--train-samples=4", "--eval-every=99"]
    start = ["--weights-backbone", tmp_path / "resnet18.pth"]
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert train.cli(flags(data, whole, *more, *start, "--epochs=2")) == 0
    (tmp_path / "resnet18.pth").unlink()
    assert train.cli(flags(data, part, *more, "--epochs=2", "--resume", whole / "model_0.pth")) == 0
    check_same_end(whole, part)
    content = torch.load(part / "checkpoint.pth", weights_only=True)
    assert content["norm"]["type"] == "frozen"
    assert torch.equal(
        content["model"]["backbone.body.layer1.0.conv1.weight"],
        torch.load(whole / "model_0.pth", weights_only=True)["model"]["backbone.body.layer1.0.conv1.weight"],
    )


@pytest.mark.parametrize("family", ["box", "ssdlite"])
def test_a_run_with_another_norm_is_refused_with_the_flag_that_mends_it(data, tmp_path, capsys, family):
    start = [*FAMILIES[family], "--total-steps=1", "--mode=train"]
    assert train.cli(flags(data, tmp_path / "run", *start)) == 0
    eps = {"box": "1e-05", "ssdlite": "0.001"}[family]
    saved = tmp_path / "run" / "checkpoint.pth"
    for wrong, has in (
        (["--norm=frozen"], f"frozen with eps {eps}"),
        (["--norm-eps=0.5"], "batch with eps 0.5"),
    ):
        capsys.readouterr()
        assert train.cli(flags(data, tmp_path / "other", *start, "--resume", saved, *wrong)) == 2
        assert capsys.readouterr().err == (
            f"error: {saved}: its backbone has batch norm with eps {eps}, this model {has}; "
            f"pass --norm batch --norm-eps {eps}\n"
        )
    mended = ["--total-steps=2", "--norm=batch", f"--norm-eps={eps}"]
    assert train.cli(flags(data, tmp_path / "mended", *start, "--resume", saved, *mended)) == 0


def test_a_checkpoint_of_another_model_is_refused_with_the_flag_that_mends_it(data, tmp_path, capsys):
    start = [*FAMILIES["box"], "--total-steps=1", "--mode=train"]
    assert train.cli(flags(data, tmp_path / "run", *start)) == 0
    saved = tmp_path / "run" / "checkpoint.pth"
    for wrong, mend in (
        ("--model=maskrcnn_resnet50_fpn", "pass --model fasterrcnn_resnet50_fpn"),
        ("--backbone=resnet34", "pass --backbone resnet18"),
    ):
        capsys.readouterr()
        assert train.cli(flags(data, tmp_path / "other", *start, "--resume", saved, wrong)) == 2
        assert mend in capsys.readouterr().err
