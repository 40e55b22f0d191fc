import io
import json
import mmap
import os
import queue
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import get_model

import benchmark
import benchmark_arms
import benchmark_fake_data
import benchmark_gpu
import benchmark_train
import checkpoint as checkpoints
import engine
import instruments
import models
import reference
from benchmark_data import DATA_STAGES
from benchmark_models import Workload, build_ours, build_torchvision, load_weights, write_weights
from benchmark_processes import Arm, ArmError, Arms, TreeMemory, Unavailable, rotated
from benchmark_report import between, format_markdown, format_table, number, ratio, spread, times
from coco_utils import CocoDataset, dataset_paths
from roi_align import FeaturePyramid
from utils import UserError

CPU = torch.device("cpu")
TINY = {"backbone": "resnet18", "min_size": 64, "max_size": 96}
TINY_FLAGS = ["--backbone", "resnet18", "--min-size", "64", "--max-size", "96", "--threads", "1"]


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    """(image folder, annotation file) of four made-up images, all of 480×806 pixels."""
    root = tmp_path_factory.mktemp("fake") / "coco"
    benchmark_fake_data.write_fake_coco(root, 4, sizes=((480, 806, 1),))
    return dataset_paths(root)["train"]


@pytest.fixture(scope="module")
def workload(fake, tmp_path_factory):
    """One image a batch for a small model, its weights written."""
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    work = Workload(*map(str, fake), **TINY, batch_size=1, num_batches=1, weights=str(path))
    write_weights(work, path, confident=True)
    return work


# --- numbers --------------------------------------------------------------------------------------------------


def test_ratio_is_taken_round_by_round():
    # Rounds: 6/2 = 3, 4/4 = 1, 10/5 = 2, so their median is 2; the medians are 6 and 4.
    found = ratio([6.0, 4.0, 10.0], [2.0, 4.0, 5.0])
    assert found == {"rounds": 2.0, "medians": 1.5, "low": 1.0, "high": 3.0}
    assert times(found) == "2.00 / 1.50"
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0, "values": [3.0, 1.0, 2.0]}


def test_steps_are_cut_to_the_time_there_is():
    # 30 + 3 × 40 = 150 steps of 0.1 s take 15 s; in 3 s a fifth of them; and never less than one.
    assert benchmark_gpu.plan_steps(100, 0.1, 30, 40) == (30, 40)
    assert benchmark_gpu.plan_steps(3.0, 0.1, 30, 40) == (6, 8)
    assert benchmark_gpu.plan_steps(0.0, 0.1, 30, 40) == (1, 1)


def test_cells():
    assert [number(v) for v in (1234.5, 123.4, 12.345, 0.01234, 0, None)] == [
        "1,234",
        "123",
        "12.3",
        "0.0123",
        "0",
        "–",
    ]
    assert between({"low": 1.0, "high": 20.0}) == "1.00–20.0"


def test_tables():
    table = {"title": "T", "columns": ["arm", "s"], "rows": [["ours", "1"], ["x", "12"]]}
    assert format_table(**table) == "T\narm    s\nours   1\nx     12"
    assert format_markdown(**table) == "**T**\n\n| arm | s |\n| --- | ---: |\n| ours | 1 |\n| x | 12 |"


# --- turns ----------------------------------------------------------------------------------------------------


class FakeReport:
    def __init__(self):
        self.notes, self.kept, self.complete = [], [], True

    def note(self, text):
        self.notes.append(text)

    def keep(self, name, value):
        self.kept.append((name, json.loads(json.dumps(value))))

    def progress(self, text):
        pass


class FakeArm:
    """Writes down when it was asked; fails at its `fails_at`-th turn."""

    def __init__(self, name, diary, fails_at=None, error=ArmError):
        self.name, self.diary, self.fails_at, self.error, self.closed = name, diary, fails_at, error, False

    def ask(self, call, **arguments):
        self.diary.append(self.name)
        if self.fails_at is not None and self.diary.count(self.name) > self.fails_at:
            raise self.error(f"{self.name} broke")
        return arguments["value"]

    def close(self):
        self.closed = True


def make_arms(*fakes, essential="ours"):
    arms = Arms(FakeReport(), essential)
    arms.running = {fake.name: fake for fake in fakes}
    return arms


def test_arms_take_turns_and_change_who_begins():
    diary = []
    arms = make_arms(FakeArm("ours", diary), FakeArm("b", diary))
    answers = arms.take_turns(3, lambda n: arms.all_do("turn", value=n))
    assert diary == ["ours", "b", "b", "ours", "ours", "b"]
    assert answers == {"ours": [0, 1, 2], "b": [0, 1, 2]}
    # Every answer is in the file before the next turn begins.
    assert arms.report.kept[:3] == [
        ("latest rounds", {"ours": [0]}),
        ("latest rounds", {"ours": [0], "b": [0]}),
        ("latest rounds", {"ours": [0], "b": [0, 1]}),
    ]
    assert len(arms.report.kept) == 6 and arms.report.kept[-1] == ("latest rounds", answers)
    assert rotated([1, 2, 3], 4) == [2, 3, 1] and rotated([], 2) == []


@pytest.mark.parametrize(("error", "complete"), [(ArmError, False), (Unavailable, True)])
def test_an_arm_that_fails_is_left_out_with_a_note(error, complete):
    diary = []
    broken = FakeArm("b", diary, fails_at=1, error=error)
    arms = make_arms(FakeArm("ours", diary), broken)
    answers = arms.take_turns(3, lambda n: arms.all_do("turn", value=n))
    assert answers == {"ours": [0, 1, 2]}
    assert broken.closed and arms.report.notes == ["b broke"]
    assert arms.report.complete is complete


def test_without_ours_there_is_nothing_to_compare():
    arms = make_arms(FakeArm("ours", [], fails_at=0))
    with pytest.raises(ArmError, match="ours broke"):
        arms.take_turns(1, lambda n: arms.all_do("turn", value=n))


def talk(*requests):
    answers = io.StringIO()
    benchmark_arms.serve(io.StringIO("".join(json.dumps(r) + "\n" for r in requests)), answers)
    return [json.loads(line) for line in answers.getvalue().splitlines()]


def test_an_arm_answers_line_by_line(workload, monkeypatch):
    kept = []
    monkeypatch.setattr("utils.keep_freed_memory", lambda: kept.append(True))
    work = vars(workload)
    start = {
        "call": "start",
        "arguments": {"kind": "ceiling", "arm": "ceiling", "workload": work, "products": {}},
    }
    assert talk(start, {"call": "turn", "arguments": {}}) == [{"result": None}, {"result": {}}]
    # The reference's users have the allocator as it comes.
    start["arguments"] = {"kind": "data", "arm": "torchvision", "workload": work, "stage": "target"}
    assert talk(start) == [{"result": None}] and kept == [True]


def test_an_arm_says_how_it_failed():
    def mistake():
        raise UserError("a mistake")

    assert benchmark_arms.answer(mistake) == {"mistake": "a mistake"}
    assert benchmark_arms.answer(lambda: __import__("no_such_peer")) == {
        "unavailable": "not installed (no_such_peer)"
    }
    assert "ZeroDivisionError" in benchmark_arms.answer(lambda: 1 / 0)["failed"]


def test_a_process_that_dies_is_reported(monkeypatch, tmp_path):
    script = tmp_path / "dies.py"
    script.write_text("import sys; input(); sys.exit('out of memory')")
    monkeypatch.setattr("benchmark_processes.ARMS_SCRIPT", script)
    arm = Arm("b")
    with pytest.raises(ArmError, match=r"b: its process ended with status 1 in 'turn'\nout of memory"):
        arm.ask("turn")
    arm.close()


# --- instruments ------------------------------------------------------------------------------------------------


def test_products_are_counted_by_phase_and_replayed():
    conv = torch.nn.Conv2d(3, 4, 3, padding=1)
    linear = torch.nn.Linear(4, 5)
    x = torch.randn(1, 3, 8, 8, requires_grad=True)
    with instruments.ProductRecorder() as recorder:
        out = linear(conv(x).mean((2, 3)))
        recorder.phase = "backward"
        out.sum().backward()
    products = recorder.products()
    # Forward: 2 · 64 places · 4 · 3 · 9 = 13,824, and 2 · 4 · 5 = 40; each has two products as large backward.
    assert instruments.total_flops(products, "forward") == 13_824 + 40
    assert instruments.total_flops(products, "backward") == 2 * (13_824 + 40)
    assert [p["op"] for p in instruments.largest(products, 1)] == [
        "aten::convolution",
        "aten::convolution_backward",
    ]
    rates = instruments.measure_rates(json.loads(json.dumps(products)), CPU)
    assert set(rates) == {"forward", "backward"} and min(rates.values()) > 0


def test_attainable_seconds():
    products = [{"phase": "forward", "flops": 10, "calls": 3}, {"phase": "backward", "flops": 40, "calls": 1}]
    # 30 / 10 + 40 / 20
    assert instruments.attainable_seconds(products, {"forward": 10.0, "backward": 20.0}) == 5.0
    found = benchmark_train.ceiling(
        products,
        products[:1],
        [{"ours": {"forward": 10.0, "backward": r}} for r in (5.0, 20.0, 80.0)],
        "ours",
    )
    assert found["attainable_seconds"] == 5.0 and found["covered"] == 30 / 70


def test_replayed_tensors_keep_their_layout():
    channels_last = torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last)
    described = instruments._describe(channels_last.bfloat16())
    rebuilt = instruments._rebuild(described, torch.randn(7))
    assert rebuilt.dtype == torch.bfloat16 and rebuilt.stride() == channels_last.stride()
    assert rebuilt.shape == channels_last.shape


def test_step_timer_books_all_time(monkeypatch):
    clock = iter([10.0, 11.0, 13.0, 16.0])
    monkeypatch.setattr(instruments.time, "perf_counter", lambda: next(clock))
    timer = instruments.StepTimer(CPU)
    for name in ("start", "a", "b", "a"):
        timer.mark(name)
    assert timer.seconds == {"a": 1.0 + 3.0, "b": 2.0}


def test_memory_is_read():
    before = instruments.unique_memory_mb(os.getpid())
    with mmap.mmap(-1, 50 * 2**20) as held:  # not from the heap, which may have as much to spare
        held.write(b"1" * len(held))
        assert instruments.unique_memory_mb(os.getpid()) > before + 45
        assert instruments.peak_memory_mb(CPU)["host_mb"] > 50


def test_helpers_count_in_the_memory_of_a_process():
    # The outer process holds little, its helper 60 MiB for a second.
    helper = "import time; held = b'1' * (60 << 20); time.sleep(1)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {helper!r}])"
    process = subprocess.Popen([sys.executable, "-c", outer])
    watch = TreeMemory(process.pid, interval_seconds=0.02)
    process.wait()
    assert watch.stop() > 60


# --- made-up data -----------------------------------------------------------------------------------------------


def test_fake_images_are_sound_and_seeded(tmp_path):
    for name in ("a", "b"):
        benchmark_fake_data.write_fake_coco(tmp_path / name, 3, seed=5)
    a, b = (CocoDataset(*dataset_paths(tmp_path / name)["train"], training=True) for name in "ab")
    assert len(a) == 3 and a.index.findings == [] and len(a.classes) == 80
    for index in range(3):
        (image, target), (same_image, same_target) = a[index], b[index]
        assert torch.equal(image, same_image) and torch.equal(target["boxes"], same_target["boxes"])
        assert (target["masks"].areas() > 0).all()
    assert (
        dataset_paths(tmp_path / "a")["val"][1].exists()
        and len(list((tmp_path / "a/val2017").iterdir())) == 3
    )


def test_a_repeated_set_differs_in_ids_alone(fake, tmp_path):
    source = CocoDataset(*fake)
    folder, annotations = benchmark_fake_data.repeat_coco(*fake, tmp_path, 10)
    content = json.loads(annotations.read_text())
    assert [image["id"] for image in content["images"]] == list(range(1, 11))
    ids = [annotation["id"] for annotation in content["annotations"]]
    assert ids == list(range(1, len(ids) + 1))
    repeated = CocoDataset(folder, annotations)
    assert len(repeated) == 10
    for index in (4, 9):  # the first and the second image again
        image, target = repeated[index]
        again, same = source[index % 4]
        assert target["image_id"] == index + 1
        assert torch.equal(image, again) and torch.equal(target["boxes"], same["boxes"])
        assert torch.equal(target["masks"].pixels, same["masks"].pixels)
    assert len({path.stat().st_ino for path in folder.iterdir()}) == 4


def test_made_up_detections():
    boxes = np.array([[10.0, 20, 60, 90]])
    made = [
        benchmark_fake_data.made_up_detections(np.random.default_rng(3), boxes, [7], 80, 100, 200, count=10)
        for _ in range(2)
    ]
    for name, value in made[0].items():
        assert np.array_equal(value, made[1][name])
    found = made[0]
    assert found["boxes"].shape == (10, 4) and found["mask_probs"].shape == (10, 28, 28)
    assert (found["boxes"] >= 0).all() and (found["boxes"] <= [200, 100, 200, 100]).all()
    assert (np.diff(found["scores"]) <= 0).all()
    assert (found["labels"] == 7).sum() >= 5 and found["labels"].min() >= 1 and found["labels"].max() <= 80
    nobody = benchmark_fake_data.made_up_detections(
        np.random.default_rng(3), np.zeros((0, 4)), [], 80, 100, 200, count=10
    )
    assert len(nobody["boxes"]) == 10


# --- the yardstick ------------------------------------------------------------------------------------------------


def test_reference_samples_equal_ours(fake):
    ours = CocoDataset(*fake, training=True)
    labels = {category_id: label for label, category_id in enumerate(ours.category_ids, start=1)}
    theirs = reference.ReferenceDataset(*map(str, fake), labels=labels)
    assert reference.images_to_learn_from(theirs) == list(range(4))
    assert reference.aspect_ratios(theirs, [0, 1]) == ours.aspect_ratios[:2].tolist()
    for index in range(2):
        (image, target), (their_image, their_target) = ours[index], theirs[index]
        assert (image.float() / 255 - their_image).abs().max() < 2 / 255  # two JPEG decoders
        assert torch.equal(target["masks"].dense(), their_target["masks"])
        assert torch.equal(target["labels"], their_target["labels"])
        assert torch.allclose(target["boxes"], their_target["boxes"], atol=1e-4)
        assert target["image_id"] == their_target["image_id"]
        converted, frames = reference.to_reference(image, target)
        assert torch.equal(frames["masks"], their_target["masks"]) and converted.dtype == torch.float32


def make_sample(size=(20, 10)):
    """A white image, (width, height), with one object of 4×2 pixels at its lower left corner."""
    width, height = size
    masks = torch.zeros(1, height, width, dtype=torch.uint8)
    masks[0, height - 2 :, :4] = 1
    target = {
        "boxes": torch.tensor([[0.0, height - 2, 4, height]]),
        "labels": torch.tensor([3]),
        "masks": masks,
        "image_id": 1,
    }
    return Image.new("RGB", size, (255, 255, 255)), target


def test_reference_frames_of_every_kind_of_segmentation():
    mask = np.zeros((4, 6), np.uint8)
    mask[1:3, 2:5] = 1
    compressed = reference.mask_api.encode(np.asfortranarray(mask))
    # Column by column: 9 pixels off, then 2 on and 2 off three times over, the last 6 in one.
    uncompressed = {"size": [4, 6], "counts": [9, 2, 2, 2, 2, 2, 5]}
    polygon = [[2, 1, 5, 1, 5, 3, 2, 3]]
    found = reference.frames(
        [polygon, uncompressed, compressed, {**compressed, "counts": compressed["counts"].decode()}], 4, 6
    )
    assert found.dtype == torch.uint8 and all(np.array_equal(frame, mask) for frame in found)
    assert reference.frames([], 4, 6).shape == (0, 4, 6)


def test_reference_hflip():
    torch.manual_seed(0)
    seen = set()
    for _ in range(20):
        _, target = reference.hflip(*make_sample())
        x0, x1 = target["boxes"][0, 0].item(), target["boxes"][0, 2].item()
        assert target["masks"][0, -1].nonzero().flatten().tolist() == list(range(int(x0), int(x1)))
        seen.add((x0, x1))
    assert seen == {(0.0, 4.0), (16.0, 20.0)}


def test_reference_large_scale_jitter_gives_squares():
    torch.manual_seed(1)
    for _ in range(4):
        image, target = reference.large_scale_jitter(*make_sample((60, 40)))
        assert image.size == (1024, 1024) and target["masks"].shape[1:] == (1024, 1024)
        assert len(target["boxes"]) == len(target["masks"]) == len(target["labels"])
        assert (target["boxes"] >= 0).all() and (target["boxes"] <= 1024).all()


def test_reference_copy_paste_takes_the_neighbours_objects():
    white, dark = torch.ones(3, 10, 20), torch.zeros(3, 10, 20)
    _, low = make_sample()
    high = {
        **low,
        "masks": low["masks"].flip(1),
        "boxes": torch.tensor([[0.0, 0, 4, 2]]),
        "labels": torch.tensor([5]),
    }
    images, targets = reference.copy_paste([white, dark], [low, high])
    assert targets[0]["labels"].tolist() == [3, 5] and targets[1]["labels"].tolist() == [5, 3]
    assert images[0][:, 0, 1].tolist() == [0, 0, 0]  # the dark image's object came along
    assert images[0][:, 9, 19].tolist() == [1, 1, 1]


def test_both_arms_score_the_same_numbers(fake):
    work = Workload(*map(str, fake))
    scores = {}
    for name in ("ours", "torchvision"):
        arm = benchmark_arms.AfterForward(name, work, detections_per_image=20)
        assert arm.turn(0, 3)["images"] == 3 and arm.turn(3, 3)["images"] == 1
        scores[name] = arm.score()["metrics"]
    assert scores["ours"] == scores["torchvision"]
    assert scores["ours"]["bbox"]["AP"] > 0.1 and set(scores["ours"]["segm"]) == set(reference.STATS)


def test_torchvision_weights_under_detectron2s_names():
    model = get_model("maskrcnn_resnet50_fpn", weights=None, weights_backbone=None, num_classes=4)
    models.convert_norm(model.backbone, "frozen")
    state = model.state_dict()
    renamed = reference.detectron2_state(state)
    assert len(renamed) == len(state)
    for name, source in (
        ("backbone.bottom_up.stem.conv1.weight", "backbone.body.conv1.weight"),
        ("backbone.bottom_up.stem.conv1.norm.running_var", "backbone.body.bn1.running_var"),
        ("backbone.bottom_up.res4.5.conv3.norm.bias", "backbone.body.layer3.5.bn3.bias"),
        ("backbone.bottom_up.res2.0.shortcut.norm.weight", "backbone.body.layer1.0.downsample.1.weight"),
        ("backbone.fpn_output5.bias", "backbone.fpn.layer_blocks.3.0.bias"),
        ("proposal_generator.rpn_head.anchor_deltas.weight", "rpn.head.bbox_pred.weight"),
        ("roi_heads.mask_head.mask_fcn4.weight", "roi_heads.mask_head.3.0.weight"),
        ("roi_heads.mask_head.deconv.weight", "roi_heads.mask_predictor.conv5_mask.weight"),
    ):
        assert torch.equal(renamed[name], state[source]), name
    # Background moves from the front to the end; boxes and masks have none of it.
    scores = state["roi_heads.box_predictor.cls_score.bias"]
    assert torch.equal(renamed["roi_heads.box_predictor.cls_score.bias"], scores[[1, 2, 3, 0]])
    assert torch.equal(
        renamed["roi_heads.box_predictor.bbox_pred.bias"],
        state["roi_heads.box_predictor.bbox_pred.bias"][4:],
    )
    assert renamed["roi_heads.mask_head.predictor.bias"].shape == (3,)


# --- arms ---------------------------------------------------------------------------------------------------------


def test_all_arms_start_from_the_same_weights(workload):
    dataset = workload.dataset(training=True)
    state, eps = load_weights(workload)
    ours, theirs = (build(workload, dataset, eps) for build in (build_ours, build_torchvision))
    for model in (ours, theirs):
        model.load_state_dict(state, strict=True)
    trains = [[name for name, p in model.named_parameters() if p.requires_grad] for model in (ours, theirs)]
    assert trains[0] == trains[1]
    assert not any("layer1" in name for name in trains[0]) and any("layer2" in name for name in trains[0])
    assert models.describe_norm(ours) == models.describe_norm(theirs) == {"type": "frozen", "eps": 1e-5}
    # Fitted norms keep activations at a trained model's scale.
    features = theirs.backbone(torch.randn(1, 3, 64, 96))
    assert 0.05 < features["3"].std() < 20


def test_ours_runs_the_real_loop_and_learns_the_same_as_torchvision(workload, monkeypatch):
    calls = []
    real = engine.train_one_epoch
    monkeypatch.setattr(engine, "train_one_epoch", lambda *a, **k: calls.append(k) or real(*a, **k))
    first = {}
    for name in ("ours-fp32", "torchvision"):
        arm = benchmark_arms.trainer(name, workload)
        first[name] = arm.trace(1)[0]
        assert arm.precision() == "fp32"
        if name == "ours-fp32":
            turn = arm.turn(2)
            assert turn["images"] == 1 and turn["seconds"] > 0
            assert len(calls) == 2 and arm.state.step == 3
    # The same weights and images; what differs is which anchors and RoIs were drawn.
    assert set(first["ours-fp32"]) == set(first["torchvision"])
    for term, value in first["torchvision"].items():
        assert first["ours-fp32"][term] == pytest.approx(value, rel=0.2), term


@pytest.mark.parametrize(
    ("name", "applies"),
    [
        ("ours-dense-rpn", lambda model: not model.rpn.sparse_backward),
        ("ours-unfolded", lambda model: not any("Folded" in type(m).__name__ for m in model.modules())),
        (
            "ours-roi-align-by-level",
            lambda model: FeaturePyramid.roi_align is benchmark_arms.torchvision_roi_align,
        ),
        ("ours-channels-first", lambda model: model.rpn.head.conv[0][0].weight.is_contiguous()),
    ],
)
def test_an_optimisation_switched_off_changes_no_loss(workload, monkeypatch, name, applies):
    monkeypatch.setattr(FeaturePyramid, "roi_align", FeaturePyramid.roi_align)  # to have it back afterwards
    monkeypatch.setattr("utils.amp_dtype", lambda choice, device: None)
    losses = []
    for arm in (benchmark_arms.trainer("ours", workload), benchmark_arms.trainer(name, workload)):
        torch.manual_seed(0)
        losses.append(arm.trace(1)[0])
    assert applies(arm.model)
    for term, value in losses[0].items():
        assert losses[1][term] == pytest.approx(value, rel=1e-3), term


@pytest.mark.parametrize("name", ["ours", "torchvision"])
def test_a_step_in_parts(workload, name):
    arm = benchmark_arms.trainer(name, workload)
    found = arm.breakdown(1)
    # 480×806 is resized by min(64 / 480, 96 / 806) = 0.1191 to 57×96 and padded to 64×96.
    assert found["padded_pixels"] == 64 * 96
    assert 0 < found["positives"] <= 128
    expected = {
        "data",
        "copy",
        "transform",
        "backbone",
        "rpn",
        "roi_heads",
        "between stages",
        "backward",
        "optimizer",
    }
    assert set(found["seconds"]) == expected and min(found["seconds"].values()) >= 0
    assert not arm.model._forward_hooks and not arm.model.backbone._forward_pre_hooks


def test_products_of_our_step(workload):
    arm = benchmark_arms.trainer("ours-fp32", workload)
    products = arm.products()
    phases = {phase: instruments.total_flops(products, phase) for phase in ("forward", "backward")}
    # Nothing is propagated back through the frozen stem and stage, and all else twice.
    assert 1 < phases["backward"] / phases["forward"] < 2


def test_a_real_loader_feeds_whole_turns(workload):
    work = Workload(**{**vars(workload), "workers": 0, "batch_size": 2})
    arm = benchmark_arms.trainer("torchvision", work)
    keys = [list(batch) for batch in arm.keys]
    for _ in range(2):
        batches = list(arm.source.take(3))
        assert [len(images) for images, _ in batches] == [2, 2, 2]
    ours = benchmark_arms.OurTrainer("ours-fp32", work)
    images = [target["image_id"] for _, targets in ours.source.take(2) for target in targets]
    assert images == [ours.dataset.image_ids[index] for batch in keys[:2] for _, index in batch]
    ours.rewind()
    assert images == [target["image_id"] for _, targets in ours.source.take(2) for target in targets]


def test_evaluation_finds_as_much_as_a_trained_model(workload):
    found = {}
    for name in ("ours-fp32", "torchvision"):
        arm = benchmark_arms.Evaluator(name, workload)
        arm.choose(1)
        found[name] = arm.forward(1)
        assert arm.results(1)["images"] == 1
    assert found["ours-fp32"]["detections"] == found["torchvision"]["detections"] == 100


@pytest.mark.parametrize("stage", list(DATA_STAGES))
@pytest.mark.parametrize("name", ["ours", "torchvision"])
def test_data_arms(workload, name, stage):
    arm = benchmark_arms.DataArm(name, workload, stage)
    assert arm.turn(3, 2)["images"] == 2


def test_startup_arms_reach_their_first_batch(workload):
    for name in ("ours", "torchvision"):
        arm = benchmark_arms.StartupArm(name, workload)
        result = arm.result()
        assert result["seconds"] > 0 and result["host_mb"] >= result["imports_mb"]


# --- the command -----------------------------------------------------------------------------------------------


def test_arguments(capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(["train"])
    assert stop.value.code == 2 and "--use-fake-data" in capsys.readouterr().err
    assert benchmark.main(["data", "--use-fake-data", "--against", "mmdet", "--images", "1"]) == 2
    assert "error: --against mmdet: data knows torchvision" in capsys.readouterr().err
    assert benchmark.main(["train", "--use-fake-data", "--arms", "ours,mine"]) == 2
    assert "error: --arms mine: choose from ours, ours-fp32" in capsys.readouterr().err


def test_gpu_cases():
    args = SimpleNamespace(smoke=False, cases=None)
    names = [str(case) for case in benchmark_gpu.gpu_cases(args, cuda=True)]
    assert names[0] == "torchvision-amp/16/fixed" and names[-1] == "torchvision-amp/16/fixed/again"
    assert len(names) == len(set(names)) == len(benchmark_gpu.GPU_CASES)
    args = SimpleNamespace(smoke=True, cases="ours/2/fixed")
    (case,) = benchmark_gpu.gpu_cases(args, cuda=False)
    assert (case.arm, case.batch_size, case.is_traced) == ("ours", 2, True)
    args = SimpleNamespace(smoke=True, cases="ours/99/fixed")
    with pytest.raises(UserError, match="--cases ours/99/fixed: choose from"):
        benchmark_gpu.gpu_cases(args, cuda=False)


class ArmInThisProcess(Arm):
    """An arm that need not import torch again: the same conversation, with a thread of the tests."""

    def __init__(self, name):
        self.name, self.requests, self.answers = name, queue.Queue(), queue.Queue()
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self):
        answers = SimpleNamespace(write=self.answers.put, flush=lambda: None)
        benchmark_arms.serve(iter(self.requests.get, None), answers)

    def talk(self, request):
        self.requests.put(request)
        return self.answers.get(timeout=300)

    def close(self):
        self.requests.put(None)
        self.thread.join()


@pytest.fixture
def in_this_process(monkeypatch):
    """Let arms work here; that they can do so in processes of their own is for test_startup_from_end_to_end."""
    monkeypatch.setattr("benchmark_processes.Arm", ArmInThisProcess)
    monkeypatch.setattr("benchmark_setup.Arm", ArmInThisProcess)


@pytest.mark.slow
def test_train_from_end_to_end(in_this_process, tmp_path, capsys):
    file = tmp_path / "train.json"
    flags = ["--use-fake-data", "--arms", "ours,torchvision", "--rounds", "2", "--num-batches", "1"]
    flags += ["-b", "1", "--breakdown-steps", "1", "--device", "cpu", "--json", str(file), "--markdown"]
    assert benchmark.main(["train", *flags, *TINY_FLAGS]) == 0
    content = json.loads(file.read_text())
    arms = content["measurements"]["arms"]
    assert {"ours", "torchvision"} <= set(arms)
    assert all(len(arm["rounds"]) == 2 and arm["memory"]["host_mb"] > 100 for arm in arms.values())
    assert 0 < content["measurements"]["ceilings"]["ours"]["covered"] <= 1
    printed = capsys.readouterr().out
    assert "| torchvision (fp32) |" in printed and content["environment"]["torch"] in printed


@pytest.mark.slow
def test_evaluation_of_a_checkpoint_from_end_to_end(in_this_process, workload, fake, tmp_path):
    state, eps = load_weights(workload)
    dataset = workload.dataset()
    content = {"model": state, "classes": dataset.classes, "category_ids": dataset.category_ids}
    checkpoints.save({**content, "norm": {"type": "frozen", "eps": eps}}, tmp_path / "checkpoint.pth")
    file = tmp_path / "eval.json"
    flags = ["--data-path", str(fake[0].parent), "--json", str(file), "--device", "cpu"]
    flags += ["--against", "torchvision", "--checkpoint", str(tmp_path / "checkpoint.pth")]
    flags += ["--batch-sizes", "1", "--steps", "1", "--rounds", "1", "--num-batches", "1"]
    flags += ["--breakdown-steps", "1", "--detections-images", "4"]
    assert benchmark.main(["eval", *flags, *TINY_FLAGS]) == 0
    content = json.loads(file.read_text())
    scores = content["measurements"]["scores"]
    assert {"ours", "ours-reference-ops-fp32", "torchvision"} <= set(scores)
    # One checkpoint, one truth; a random model finds next to nothing, whoever runs it.
    for arm in scores.values():
        assert arm["segm"]["AP"] == pytest.approx(scores["torchvision"]["segm"]["AP"], abs=1e-3)
    assert content["notes"] == ["24 of the 24 numbers are equal to the last bit"]


@pytest.mark.slow
def test_the_gpu_protocol_in_its_small_form(in_this_process, tmp_path):
    file = tmp_path / "gpu.json"
    flags = ["gpu", "--device", "cpu", "--smoke", "--threads", "1", "--workers", "1", "--json", str(file)]
    assert benchmark.main([*flags, "--cases", "ours/2/fixed"]) == 0
    content = json.loads(file.read_text())
    found = content["measurements"]
    assert len(found["ours/2/fixed"]["trace"]) == 3
    assert found["device"]["product_flops"] > 0 and set(found["evaluation"]) == {"ours", "torchvision"}
    titles = [table["title"] for table in content["tables"]]
    assert titles[:2] == ["Ceilings of the device", "Training steps"] and len(titles) == 6


@pytest.mark.slow
def test_startup_from_end_to_end(in_this_process, tmp_path):
    # The timed starts are real processes; the watched ones differ from them in how long they live alone.
    file = tmp_path / "startup.json"
    flags = [
        "--use-fake-data",
        "--against",
        "torchvision",
        "--rounds",
        "1",
        "--images",
        "200",
        "--workers",
        "2",
    ]
    assert benchmark.main(["startup", *flags, "--watch-batches", "10", "--json", str(file)]) == 0
    found = json.loads(file.read_text())["measurements"]
    for answer in found["rounds"]["watched"].values():
        assert answer["tree_mb"] >= answer["host_mb"] >= answer["imports_mb"] > 100
    assert all(0 < answer["seconds"] < 60 for (answer,) in found["rounds"]["timed"].values())
    assert [len(looks) for looks in found["workers"]["ours"]["unique_mb"]] == [2] * 5
