import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

import coco_eval
import shapes
import train
from utils import UserError

ROOT = Path(__file__).parents[1]
COCO128 = ROOT.parent / "shared" / "data" / "coco128"
SMALL = [
    "--dataset=coco", "--device=cpu", "--backbone=resnet18", "--min-size=96", "--max-size=128", "--rois-per-image=16",
    "--detections-per-image=20", "--batch-size=2", "--workers=0", "--lr=0.005", "--warmup-steps=0", "--print-freq=1",
]  # fmt: skip
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc-per-node", "2"],
    "launch": ["torch.distributed.launch", "--nproc_per_node=2", "--use_env"],
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Images this small gain nothing from a second thread, and lose much where other processes want its core."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.utils, "available_cpus", lambda: 1)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A few of the built-in shapes, as COCO 2017 lays its files out."""
    return shapes.write_shapes(tmp_path_factory.mktemp("data"), num_train=10, num_val=5)


def run(data, output, *flags):
    """Train in this process; returns the exit status."""
    return train.cli([*SMALL, "--data-path", str(data), "--output-dir", str(output), *map(str, flags)])


def run_elsewhere(module, data, output, *flags, **options):
    """Train in processes of its own under a launcher's module; returns the finished process."""
    command = [sys.executable, "-m", *module] if module else [sys.executable]
    return subprocess.run(
        [
            *command,
            str(ROOT / "train.py"),
            *SMALL,
            "--data-path",
            str(data),
            "--output-dir",
            str(output),
            *flags,
        ],
        capture_output=True,
        text=True,
        timeout=400,
        env=os.environ | {"MASTER_PORT": "0", "OMP_NUM_THREADS": "1"},
        check=False,
        **options,
    )


def on_one_core():
    """Another number of threads than in this process would round differently."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def records(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def numbers(metrics):
    """The 24 numbers of an evaluation."""
    return {kind: metrics[kind] for kind in ("bbox", "segm")}


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A run of two epochs of four steps, and its folder."""
    output = tmp_path_factory.mktemp("run") / "out"
    assert run(data, output, "--epochs", 2, "--ema-decay", 0.5, "--val-loss") == 0
    return output


def test_a_run_leaves_every_file(data, finished):
    files = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    assert {
        "config.json", "metrics.jsonl", "checkpoint.pth", "best.pth", "model_0.pth", "model_1.pth",
        "detections.json", "figures/predictions.png",
    } <= files  # fmt: skip
    assert any(name.startswith("tb/events") for name in files)

    config = json.loads((finished / "config.json").read_text())
    assert config["arguments"]["batch_size"] == 2
    assert config["resolved"]["total_steps"] == 8
    first, second = records(finished)
    assert (first["epoch"], first["step"], second["epoch"], second["step"]) == (0, 4, 1, 8)
    assert set(first["train"]["losses"]) == {
        "loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg",
    }  # fmt: skip
    names = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
    assert list(second["eval"]["bbox"]) == list(second["eval"]["segm"]) == names
    assert second["eval"]["images_per_second"] > 0

    annotations = json.loads((data / "annotations" / "instances_val2017.json").read_text())
    detections = json.loads((finished / "detections.json").read_text())
    assert {d["category_id"] for d in detections} <= {c["id"] for c in annotations["categories"]}
    assert {d["image_id"] for d in detections} <= {i["id"] for i in annotations["images"]}


def test_the_detections_score_as_the_run_said(data, finished):
    metrics, _ = coco_eval.score_results(
        data / "annotations" / "instances_val2017.json",
        json.loads((finished / "detections.json").read_text()),
        ["bbox", "segm"],
        evaluator="pycocotools",
    )
    assert metrics == numbers(records(finished)[-1]["eval"])


def test_the_model_loads_strictly_into_torchvisions_builder(finished):
    checkpoint = torch.load(finished / "checkpoint.pth", weights_only=True)
    assert checkpoint["classes"] == list(shapes.CLASSES)
    stock = MaskRCNN(
        resnet_fpn_backbone(backbone_name="resnet18", weights=None), len(checkpoint["classes"]) + 1
    )
    stock.load_state_dict(checkpoint["model"], strict=True)
    stock.load_state_dict(checkpoint["model_ema"], strict=True)
    assert checkpoint["norm"] == {"type": "batch", "eps": 1e-5}


def test_test_only_repeats_the_last_evaluation(data, finished, tmp_path):
    assert run(data, tmp_path, "--resume", finished / "checkpoint.pth", "--test-only") == 0
    (record,) = records(tmp_path)
    assert record["train"] is None
    assert numbers(record["eval"]) == numbers(records(finished)[-1]["eval"])


@pytest.mark.slow
def test_resume_goes_on_as_if_never_stopped(data, finished, tmp_path):
    """The second epoch after a resume equals the second epoch of a run that was never interrupted, bit by bit."""
    part = tmp_path / "part"
    assert run(data, part, "--resume", finished / "model_0.pth", "--epochs", 2, "--ema-decay", 0.5) == 0
    resumed, whole = (torch.load(path / "checkpoint.pth", weights_only=True) for path in (part, finished))
    for name, value in whole["model"].items():
        assert torch.equal(value, resumed["model"][name]), name
    for name, value in whole["ema"]["shadow"].items():
        assert torch.equal(value, resumed["ema"]["shadow"][name]), name
    assert resumed["progress"]["step"] == 8
    assert records(part)[-1]["train"]["losses"] == records(finished)[-1]["train"]["losses"]


def open_patient_evaluator(output_dir, **settings):
    """train.open_evaluator, but the first evaluation waits until a later training step is done."""
    evaluate = train.open_evaluator(output_dir=output_dir, **settings)

    def wait_and_evaluate(weights):
        deadline = time.monotonic() + 300
        while not Path(output_dir, "a later step").exists():
            assert time.monotonic() < deadline, "no training step while the evaluation ran"
            time.sleep(0.05)
        return evaluate(weights)

    return wait_and_evaluate


@pytest.mark.slow
def test_evaluation_beside_training_gives_the_numbers_of_evaluation_between(
    data, finished, tmp_path, monkeypatch
):
    """Training steps are done while an evaluation runs, and all that the run leaves is equal to the last digit."""
    output = tmp_path / "async"
    monkeypatch.setattr(train, "open_evaluator", open_patient_evaluator)
    say = train.RunLog.train

    def note_step(self, record):
        if record["step"] == 6:  # of the second epoch; the first was evaluated after step 4
            (output / "a later step").touch()
        say(self, record)

    monkeypatch.setattr(train.RunLog, "train", note_step)
    assert run(data, output, "--epochs", 2, "--ema-decay", 0.5, "--async-eval", "--val-loss") == 0
    for ours, theirs in zip(records(output), records(finished), strict=True):
        assert numbers(ours["eval"]) == numbers(theirs["eval"])
        assert ours["eval"]["loss"] == theirs["eval"]["loss"]
        assert ours["train"]["losses"] == theirs["train"]["losses"]
        assert (ours["epoch"], ours["step"]) == (theirs["epoch"], theirs["step"])
    assert (output / "detections.json").read_bytes() == (finished / "detections.json").read_bytes()
    for name in ("checkpoint.pth", "best.pth", "model_0.pth", "model_1.pth"):
        ours, theirs = (torch.load(path / name, weights_only=True) for path in (output, finished))
        assert ours["progress"] == theirs["progress"], name
        for key, value in theirs["model_ema"].items():
            assert torch.equal(value, ours["model_ema"][key]), (name, key)
    assert not list(output.glob(".*.pth"))  # the snapshot is gone


@pytest.mark.slow
def test_evaluations_leave_the_random_stream_of_training_alone(finished, data, tmp_path):
    """Without any evaluation the weights are the same."""
    assert run(data, tmp_path, "--epochs", 2, "--ema-decay", 0.5, "--mode", "train") == 0
    ours, theirs = (torch.load(path / "checkpoint.pth", weights_only=True) for path in (tmp_path, finished))
    for name, value in theirs["model"].items():
        assert torch.equal(value, ours["model"][name]), name
    assert all(torch.equal(a["cpu"], b["cpu"]) for a, b in zip(ours["rng"], theirs["rng"], strict=True))


def open_failing_evaluator(**settings):
    raise UserError("image 7 is broken; replace it")


@pytest.mark.slow
def test_an_evaluation_that_fails_beside_training_ends_the_run(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "open_evaluator", open_failing_evaluator)
    assert run(data, tmp_path, "--epochs", 2, "--async-eval") == 1
    assert (
        capsys.readouterr().err == "error: the evaluation of step 4 failed: image 7 is broken; replace it\n"
    )
    assert records(tmp_path)[0]["eval"] is None and records(tmp_path)[0]["train"] is not None
    assert (tmp_path / "checkpoint.pth").exists()


def test_a_finished_run_has_nothing_to_resume(data, finished, capsys):
    before = (finished / "checkpoint.pth").stat().st_mtime_ns
    assert run(data, finished, "--resume", "auto", "--epochs", 2, "--ema-decay", 0.5) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert (finished / "checkpoint.pth").stat().st_mtime_ns == before


def test_a_folder_that_holds_a_run_is_not_overwritten(data, finished, capsys):
    assert run(data, finished, "--epochs", 1) == 2
    assert "--resume auto" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_evaluate_as_one(data, finished, tmp_path, launcher):
    """The same 24 numbers, to the last digit, under both spellings of the launcher."""
    done = run_elsewhere(
        LAUNCHERS[launcher], data, tmp_path, "--resume", str(finished / "checkpoint.pth"), "--test-only"
    )
    assert done.returncode == 0, done.stderr
    assert "2 rank(s)" in done.stdout
    (record,) = records(tmp_path)
    assert numbers(record["eval"]) == numbers(records(finished)[-1]["eval"])


@pytest.mark.slow
def test_two_processes_train_together_and_evaluate_beside_training(data, tmp_path):
    found = {}
    for name, flags in (("between", []), ("beside", ["--async-eval"])):
        output = tmp_path / name
        done = run_elsewhere(LAUNCHERS["torchrun"], data, output, "--epochs", "2", *flags)
        assert done.returncode == 0, done.stderr
        found[name] = records(output)
        assert [record["step"] for record in found[name]] == [2, 4]  # eight images, two ranks of two
        assert all(0 <= value < 100 for value in found[name][0]["train"]["losses"].values())
        assert len(torch.load(output / "checkpoint.pth", weights_only=True)["rng"]) == 2
    for ours, theirs in zip(found["beside"], found["between"], strict=True):
        assert numbers(ours["eval"]) == numbers(theirs["eval"])
        assert ours["train"]["losses"] == theirs["train"]["losses"]
    ours, theirs = (tmp_path / name / "detections.json" for name in found)
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.slow
def test_sigterm_saves_and_a_resume_goes_on(data, tmp_path):
    """The run stops within an epoch; resumed, it ends with the weights of a run that was never stopped."""
    output = tmp_path / "stopped"
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        *SMALL,
        "--data-path",
        str(data),
        "--output-dir",
        str(output),
    ]
    constant = ["--lr-steps", "1000", "--mode", "train"]  # one learning rate, whatever the length of the run
    process = subprocess.Popen(
        [*command, "--epochs", "30", *constant],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=on_one_core,
    )
    for line in process.stdout:
        if "step 2/" in line:
            process.send_signal(signal.SIGTERM)
            break
    rest = process.communicate(timeout=120)[0]
    assert process.returncode == 143, rest
    assert "stopped by SIGTERM at step" in rest
    step = torch.load(output / "checkpoint.pth", weights_only=True)["progress"]["step"]
    longer = ["--epochs", 30, "--total-steps", step + 3, *constant]
    assert run(data, output, "--resume", "auto", *longer) == 0
    straight = tmp_path / "straight"
    assert run(data, straight, *longer) == 0
    resumed, whole = (torch.load(path / "checkpoint.pth", weights_only=True) for path in (output, straight))
    assert resumed["progress"] == whole["progress"]
    for name, value in whole["model"].items():
        assert torch.equal(value, resumed["model"][name]), name


@pytest.mark.slow
def test_sigterm_waits_for_the_evaluation_beside_training(data, tmp_path):
    """The signal comes while the first epoch is evaluated: its numbers are logged, its best score is saved."""
    command = [sys.executable, str(ROOT / "train.py"), *SMALL, "--data-path", str(data)]
    process = subprocess.Popen(
        [*command, "--output-dir", str(tmp_path), "--epochs", "30", "--async-eval"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=on_one_core,
    )
    for line in process.stdout:
        if "step 5/" in line:
            process.send_signal(signal.SIGTERM)
            break
    rest = process.communicate(timeout=400)[0]
    assert process.returncode == 143, rest
    (record,) = records(tmp_path)
    assert (record["epoch"], record["step"]) == (0, 4)
    best = max(-1.0, record["eval"]["segm"]["AP"])
    saved = {name: torch.load(tmp_path / name, weights_only=True) for name in ("checkpoint.pth", "best.pth")}
    assert saved["best.pth"]["progress"]["step"] == 4 < saved["checkpoint.pth"]["progress"]["step"]
    assert all(content["progress"]["best"] == best for content in saved.values())
    assert not list(tmp_path.glob(".*.pth"))


def test_the_same_seed_gives_the_same_run_and_another_seed_another(data, tmp_path):
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(data, tmp_path / name, "--total-steps", 2, "--seed", seed, "--mode", "train") == 0
        weights.append(
            torch.load(tmp_path / name / "checkpoint.pth", weights_only=True)["model"][
                "rpn.head.cls_logits.weight"
            ]
        )
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_mistake_found_before_the_first_step_and_one_found_after_it(data, tmp_path, capsys, monkeypatch):
    """An image that breaks once the data set is open: in the first batch it is bad input (2), later a failure (1)."""
    open_loader = train.build_train_loader
    flags = ("--epochs", 1, "--mode", "train", "--batch-size", 1, "--total-steps", 2)
    for status, number in ((2, 0), (1, 1)):

        def open_and_break(args, dataset, workers, device, number=number):
            loader = open_loader(args, dataset, workers, device)
            ((_, index),) = list(loader.batch_sampler)[number]
            monkeypatch.setattr(dataset, "_load", break_at(index, dataset._load))
            return loader

        monkeypatch.setattr(train, "build_train_loader", open_and_break)
        assert run(data, tmp_path / str(status), *flags) == status
        printed = capsys.readouterr()
        assert printed.err == "error: a.png is damaged; fetch it again\n"
        assert ("step 1/2" in printed.out) == (status == 1)


def break_at(broken, load):
    def load_or_raise(index):
        if index == broken:
            raise UserError("a.png is damaged; fetch it again")
        return load(index)

    return load_or_raise


def test_fake_data_needs_no_loader_and_leaves_nothing_to_resume(data, tmp_path, capsys):
    flags = ["--model=maskrcnn_resnet50_fpn", "--total-steps", "2", "--use-fake-data"]
    assert run(data, tmp_path, *flags) == 0
    printed = capsys.readouterr().out
    assert (
        "from memory; the same command without --use-fake-data is data-bound if it takes more than" in printed
    )
    assert "8 classes" not in printed and "6 classes" in printed  # the data set's, of which no image is read
    assert not list(tmp_path.glob("*.pth"))
    assert records(tmp_path)[0]["eval"] is None and records(tmp_path)[0]["step"] == 2


def limit(batch_seconds, data_seconds, device="cpu", **flags):
    args = SimpleNamespace(batch_size=2, use_fake_data=False, compile=None, amp=False)
    for name, value in flags.items():
        setattr(args, name, value)
    return train.describe_limit(args, torch.device(device), None, 1, batch_seconds, data_seconds)


def test_the_last_lines_say_what_is_the_limit():
    assert limit(0.2, 0.1) == (
        "a batch of 2 took 200 ms, 100 ms of it (50%) waiting for images\n"
        "data-bound: 50% of each step waits for data; try --workers 2"
    )
    assert limit(0.2, 0.01).split("\n")[1].startswith("compute-bound: ")
    assert limit(0.2, 0.01, device="cuda").split("\n")[1].startswith("compute-bound or sync-bound: ")
    # A tenth of the whole may be waiting: 180 / (1 - 0.1) = 200 ms.
    assert limit(0.18, 0, use_fake_data=True).endswith("it takes more than 200 ms, else compute-bound")


def test_a_broken_image_ends_the_run_or_is_skipped(tmp_path, capsys):
    data = shapes.write_shapes(tmp_path / "data", num_train=4, num_val=1)
    broken = sorted((data / "train2017").iterdir())[1]
    broken.write_bytes(broken.read_bytes()[:-200])
    flags = ("--epochs", 1, "--mode", "train", "--keep-empty")
    assert run(data, tmp_path / "strict", *flags) in (1, 2)
    assert broken.name in capsys.readouterr().err
    with pytest.warns(UserWarning, match=f"{broken.name}.*skipped"):
        assert run(data, tmp_path / "lenient", *flags, "--skip-broken") == 0
    assert records(tmp_path / "lenient")[-1]["step"] == 2


@pytest.mark.slow
@pytest.mark.skipif(not COCO128.is_dir(), reason=f"{COCO128} is missing")
def test_real_images(tmp_path):
    """Real COCO images, polygons and category ids with gaps, in bf16 autocast."""
    samples = ("--train-samples", 8, "--eval-samples", 4)
    assert run(COCO128, tmp_path, "--epochs", 1, "--amp", "--amp-dtype", "bf16", *samples) == 0
    (record,) = records(tmp_path)
    assert record["step"] == 4
    assert all(0 <= value < 100 for value in record["train"]["losses"].values())
    checkpoint = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert (len(checkpoint["classes"]), checkpoint["category_ids"][-1]) == (80, 90)
