import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import arguments
import benchmark
import benchmark_accuracy
import benchmark_fake_data
import benchmark_processes
import models
import reference
from benchmark_accuracy import TorchvisionRun, check_plain, compare, earlier_runs, run_flags
from benchmark_models import Workload
from coco_utils import CocoDataset, dataset_paths
from utils import UserError

RECIPE = """# a small one
--model maskrcnn_resnet50_fpn --backbone resnet18 --amp
--min-size 64 --max-size 96 --rois-per-image 16
--batch-size 2 --workers 0 --opt adamw --lr 0.001 --wd 0.01 --clip-grad-norm 5
--lr-scheduler cosineannealinglr --warmup-steps 2
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A data set of five made-up images, four of them wide; training and validation are the same."""
    root = tmp_path_factory.mktemp("accuracy") / "coco"
    benchmark_fake_data.write_fake_coco(root, 5, sizes=((100, 150, 4), (150, 100, 1)), seed=2)
    return root


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "small.args"
    path.write_text(RECIPE)
    return path


def settings(recipe, **changes):
    return SimpleNamespace(**{"recipe": recipe, "total_steps": 3, "device": "cpu", "threads": 1, **changes})


# --- numbers ----------------------------------------------------------------------------------------------


def test_means_are_compared_with_the_seeds_spread():
    # Means 0.5 and 0.4625; the spreads are 0.02 and 0.05, so 0.0375 lies within.
    difference, spread, is_within = compare([0.49, 0.5, 0.51], [0.4375, 0.4625, 0.4875])
    assert (difference, spread) == pytest.approx((0.0375, 0.05)) and is_within
    # 0.5 − 0.4 = 0.1, five times the spread; whoever is better.
    assert not compare([0.49, 0.51], [0.39, 0.41])[2] and not compare([0.39, 0.41], [0.49, 0.51])[2]


def made_run(arm, seed, box, mask):
    metrics = {"bbox": {"AP": box}, "segm": {"AP": mask}}
    return {"arm": arm, "seed": seed, "flags": [], "precision": "fp32", "commit": "c", "metrics": metrics}


class Tables:
    def __init__(self):
        self.rows = {}

    def table(self, title, columns, rows):
        self.rows[title] = rows
        assert all(len(row) == len(columns) for row in rows)


def test_tables_of_runs():
    runs = [
        made_run("ours", 0, 0.50, 0.6),
        made_run("torchvision", 0, 0.51, 0.4),
        made_run("ours", 1, 0.54, 0.6),
        made_run("torchvision", 1, 0.53, 0.5),
    ]
    report = Tables()
    benchmark_accuracy.accuracy_table(report, "AP", runs)
    # sd of 0.50 and 0.54: 0.04 / √2 = 0.0283
    assert report.rows["AP"][0] == ["ours (fp32)", "box", "0.5000", "0.5400", "0.5200", "0.0400", "0.0283"]
    assert [row[:2] for row in report.rows["AP"]] == [
        ["ours (fp32)", "box"],
        ["torchvision (fp32)", "box"],
        ["ours (fp32)", "mask"],
        ["torchvision (fp32)", "mask"],
    ]
    benchmark_accuracy.verdict_table(report, runs)
    (verdicts,) = [rows for title, rows in report.rows.items() if title != "AP"]
    assert verdicts == [
        ["ours − torchvision", "box", "+0.0000", "0.0224", "0.0400", "within the seeds' spread"],
        ["ours − torchvision", "mask", "+0.1500", "0.0500", "0.1000", "beyond the seeds' spread"],
    ]
    report = Tables()
    benchmark_accuracy.accuracy_table(report, "AP", runs[:2])
    assert report.rows["AP"][0][-2:] == ["0.0000", None]
    benchmark_accuracy.verdict_table(report, runs[:2])
    assert all(row[-1] == "one seed has no spread" for row in list(report.rows.values())[1])


# --- settings of a run --------------------------------------------------------------------------------------


def test_flags_of_the_arms(recipe):
    flags = {
        arm: run_flags(settings(recipe), "data", arm, 7)
        for arm in ("ours", "ours-fp32", "ours-reference-ops", "torchvision")
    }
    parsed = {arm: arguments.parse_args("", own) for arm, own in flags.items()}
    assert [args.amp for args in parsed.values()] == [True, False, False, False]
    assert [args.reference_ops for args in parsed.values()] == [False, False, True, False]
    for args in parsed.values():
        assert (args.dataset, args.data_path, args.seed, args.total_steps) == ("coco", "data", 7, 3)
        assert (args.min_size, args.lr, args.clip_grad_norm) == ([64], 0.001, 5.0)
    with pytest.raises(UserError, match=r"--recipe .*none.args: No such file"):
        run_flags(settings(recipe.with_name("none.args")), "data", "ours", 0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--backbone", "swin_t"],
            "its arm is a Mask R-CNN on a ResNet, not maskrcnn_resnet50_fpn on swin_t",
        ),
        (["--accum-steps", "2"], "its loop does not have the recipe's --accum-steps 2"),
        (["--data-augmentation", "lsj"], "does not have the recipe's --data-augmentation lsj"),
    ],
)
def test_what_the_plain_loop_cannot_follow_is_refused(flags, message):
    with pytest.raises(UserError, match=message):
        check_plain(arguments.parse_args("", ["--data-path", "data", *flags]))


# --- torchvision's arm --------------------------------------------------------------------------------------


def test_shuffled_batches_keep_to_groups_and_are_full():
    groups = np.array([0] * 9 + [1] * 5 + [2])
    torch.manual_seed(0)
    first, second = (reference.shuffled_batches(groups, 4) for _ in range(2))
    assert first != second
    for batches in (first, second):
        # 15 // 4 = 3 batches: two of group 0 and one of group 1; the 3 images left are too few for another.
        assert sorted(groups[batch[0]] for batch in batches) == [0, 0, 1]
        assert all(len(set(batch)) == 4 and len(set(groups[batch])) == 1 for batch in batches)
    torch.manual_seed(0)
    assert reference.shuffled_batches(groups, 4) == first
    # 7 // 3 = 2 batches: 3 images of group 0, and the largest rest, the two of group 1, filled up with one of them.
    groups = np.array([0, 0, 0, 0, 1, 1, 2])
    whole, filled = reference.shuffled_batches(groups, 3)
    assert groups[whole].tolist() == [0, 0, 0] and groups[filled].tolist() == [1, 1, 1]
    assert set(filled) == {4, 5}


def test_torchvisions_model_is_the_one_that_train_py_builds():
    theirs = reference.build_mask_rcnn("resnet18", 7, 64, 96, rois_per_image=16)
    ours, _ = models.build_model(
        "maskrcnn_resnet50_fpn", 7, backbone="resnet18", min_size=64, max_size=96, rois_per_image=16
    )
    shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    trains = [{name for name, p in model.named_parameters() if p.requires_grad} for model in (ours, theirs)]
    assert trains[0] == trains[1]
    assert models.describe_norm(ours) == models.describe_norm(theirs)
    for name in ("batch_size_per_image", "positive_fraction"):
        samplers = [model.roi_heads.fg_bg_sampler for model in (ours, theirs)]
        assert getattr(samplers[0], name) == getattr(samplers[1], name)
    assert [tuple(model.transform.min_size) for model in (ours, theirs)] == [(64,), (64,)]
    assert type(theirs.rpn).__module__.startswith("torchvision.")


@pytest.mark.slow
def test_torchvisions_arm_trains_and_detects(root, recipe, tmp_path):
    flags = run_flags(settings(recipe), root, "torchvision", 5)
    images, annotations = map(str, dataset_paths(root)["train"])
    run = TorchvisionRun("torchvision", Workload(images, annotations, workers=0), flags)
    assert len(run.data) == 5 and run.total_steps == 3
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    norms, rates = [], []

    def look(*_):  # after the clipping
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in run.model.parameters()]).item())
        rates.append(run.optimizer.param_groups[0]["lr"])

    run.optimizer.register_step_pre_hook(look)
    losses = run.train()
    assert len(losses) == 3 and "loss_mask" in losses[0]
    assert max(norms) <= 5.001  # clipped: a random start's gradients are larger
    # Warm-up over two steps, 0.001 and 0.5005 of the rate, then half a cosine: cos² of 0, 30° and 60°: 1, 0.75, 0.25.
    assert rates == pytest.approx([1e-6, 0.001 * 0.5005 * 0.75, 0.001 * 0.25])
    moved = [name for name, value in run.model.state_dict().items() if not torch.equal(value, before[name])]
    assert {"backbone.body.conv1.weight", "roi_heads.mask_predictor.mask_fcn_logits.bias"} <= set(moved)

    run.model.roi_heads.score_thresh = 0.0
    run.detect(tmp_path / "detections.json")
    results = json.loads((tmp_path / "detections.json").read_text())
    val = CocoDataset(*dataset_paths(root)["val"])
    assert {result["image_id"] for result in results} <= set(val.image_ids) and results
    assert {result["category_id"] for result in results} <= set(val.category_ids)
    assert set(results[0]) == {"image_id", "category_id", "bbox", "score", "segmentation"}


# --- the comparison -----------------------------------------------------------------------------------------


@pytest.fixture
def fake_runs(monkeypatch):
    """Let runs take no time: the list of (arm, seed) that were done."""
    done = []

    def run_once(args, truth, arm, seed, flags, folder):
        done.append((arm, seed))
        return {**made_run(arm, seed, 0.5 + seed / 100, 0.6), "flags": flags, "seconds": 60.0}

    monkeypatch.setattr(benchmark_accuracy, "run_once", run_once)
    return done


def compare_runs(root, recipe, file, *flags):
    common = [
        "accuracy",
        "--data-path",
        str(root),
        "--recipe",
        str(recipe),
        "--device",
        "cpu",
        "--json",
        str(file),
    ]
    return benchmark.main([*common, *flags])


def test_an_interrupted_comparison_goes_on(root, recipe, tmp_path, fake_runs, monkeypatch, capsys):
    file = tmp_path / "accuracy.json"
    arms = ["ours", "ours-reference-ops", "torchvision"]
    flags = ["--against", "torchvision", "--total-steps", "3"]
    chosen = ["--arms", "ours-fp32,ours-reference-ops"]
    assert compare_runs(root, recipe, file, *flags, "--seeds", "0", "1") == 0
    assert fake_runs == [(arm, seed) for seed in (0, 1) for arm in arms]
    assert len(json.loads(file.read_text())["measurements"]["runs"]) == 6
    fake_runs.clear()
    assert compare_runs(root, recipe, file, *flags, "--seeds", "1", "2") == 0
    assert fake_runs == [(arm, 2) for arm in arms]
    assert len(json.loads(file.read_text())["measurements"]["runs"]) == 9
    printed = capsys.readouterr().out
    assert (
        "ours − torchvision" in printed
        and "AP after 3 steps of small.args on coco, by pycocotools" in printed
    )
    # Other settings are other runs.
    fake_runs.clear()
    assert compare_runs(root, recipe, file, "--total-steps", "4", "--seeds", "0") == 0
    assert fake_runs == [("ours", 0), ("ours-reference-ops", 0)]
    # Chosen arms; the first one is compared with the others.
    fake_runs.clear()
    assert compare_runs(root, recipe, file, *chosen, "--total-steps", "4", "--seeds", "0", "1") == 0
    assert fake_runs == [("ours-fp32", 0), ("ours-fp32", 1), ("ours-reference-ops", 1)]
    assert "ours-fp32 − ours-reference-ops" in capsys.readouterr().out
    assert compare_runs(root, recipe, file, "--arms", "detectron2") == 2
    assert "--arms detectron2: choose from ours, ours-fp32" in capsys.readouterr().err

    # What was found before a failure stays.
    real = benchmark_accuracy.run_once

    def fail(args, truth, arm, *rest):
        if arm == "ours-reference-ops":
            raise benchmark_accuracy.ArmError("out of memory")
        return real(args, truth, arm, *rest)

    monkeypatch.setattr(benchmark_accuracy, "run_once", fail)
    assert compare_runs(root, recipe, file, "--total-steps", "5", "--seeds", "0") == 1
    assert "error: out of memory" in capsys.readouterr().err
    assert len(json.loads(file.read_text())["measurements"]["runs"]) == 15


def test_a_file_of_something_else_is_refused(root, recipe, tmp_path, fake_runs, capsys):
    file = tmp_path / "other.json"
    assert earlier_runs(None) == [] and earlier_runs(file) == []
    for content in ("{", "[]", '{"measurements": {}}'):
        file.write_text(content)
        assert compare_runs(root, recipe, file) == 2
        assert "holds no runs of `benchmark.py accuracy`; choose another file" in capsys.readouterr().err
        assert file.read_text() == content and fake_runs == []


@pytest.mark.slow
def test_a_failed_run_says_why(root, recipe, tmp_path, capsys):
    recipe.write_text(RECIPE + "--batch-size 99")
    assert compare_runs(root, recipe, tmp_path / "a.json", "--total-steps", "1", "--seeds", "0") == 1
    error = capsys.readouterr().err
    assert (
        "error: ours: `train.py --model maskrcnn_resnet50_fpn" in error
        and "choose a smaller --batch-size" in error
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the run by /proc")
def test_sigterm_ends_the_run_in_progress_too(root, recipe, tmp_path):
    script = str(Path(benchmark.__file__))
    flags = ["--data-path", str(root), "--recipe", str(recipe), "--device", "cpu", "--total-steps", "10000"]
    process = subprocess.Popen([sys.executable, script, "accuracy", *flags], cwd=tmp_path)
    try:
        deadline, children = time.monotonic() + 120, []
        while not children:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
            children = benchmark_processes.descendants(process.pid)
        process.terminate()
        assert process.wait(60) == 143
        assert not any(Path(f"/proc/{child}").exists() for child in children)
    finally:
        process.kill()


@pytest.mark.slow
def test_accuracy_from_end_to_end(root, recipe, tmp_path):
    file = tmp_path / "accuracy.json"
    flags = ["--against", "torchvision", "--total-steps", "2", "--seeds", "0", "--threads", "1"]
    assert compare_runs(root, recipe, file, *flags) == 0
    content = json.loads(file.read_text())
    runs = content["measurements"]["runs"]
    assert [run["arm"] for run in runs] == ["ours", "ours-reference-ops", "torchvision"]
    assert [run["precision"] for run in runs[1:]] == ["fp32", "fp32"]
    assert all(len(run["metrics"][kind]) == 12 for run in runs for kind in ("bbox", "segm"))
    assert len(content["tables"]) == 2
