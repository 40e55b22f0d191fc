"""coco_eval against torchvision's pasting, pycocotools, COCO's own oracles, and numbers worked out by hand."""

import contextlib
import io
import json
import math
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.models.detection.roi_heads import paste_masks_in_image

import coco_eval
from utils import UserError

ORACLE = Path(__file__).parents[1].parent / "shared" / "oracles" / "coco_val2014_fake100"
needs_oracle = pytest.mark.skipif(not ORACLE.exists(), reason=f"{ORACLE} is not there")
EVALUATORS = list(coco_eval.EVALUATORS)
BOX_NAMES = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
KEYPOINT_NAMES = ["AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl"]


# --- masks -------------------------------------------------------------------------------------------------


def torchvision_frames(probs, boxes, height, width):
    """bool [D, H, W]: the reference."""
    return (paste_masks_in_image(probs[:, None], boxes, (height, width)) > 0.5)[:, 0].numpy()


def pycocotools_rles(frames):
    rles = mask_api.encode(np.asfortranarray(frames.transpose(1, 2, 0).astype(np.uint8)))
    return [{"size": rle["size"], "counts": rle["counts"].decode()} for rle in rles]


def random_boxes(rng, num, height, width, kind):
    """xyxy float32 [num, 4] inside the frame, reaching outside of it, tiny, on whole pixels, or as high as it."""
    centre = rng.random((num, 2)) * [width, height]
    half = rng.random((num, 2)) ** 2 * [width, height] * (2.0 if kind == "outside" else 0.5)
    if kind == "tiny":
        half = rng.random((num, 2)) * 1.5
    boxes = np.concatenate([centre - half, centre + half], axis=1)
    if kind != "outside":
        boxes = np.clip(boxes, 0, [width, height, width, height])
    if kind == "whole":
        boxes = np.round(boxes)
    if kind == "high":
        boxes[:, 1], boxes[:, 3] = 0, height
    return torch.from_numpy(boxes.astype(np.float32))


def random_probs(rng, num, kind):
    """float32 [num, 28, 28]: noise, a few levels with many ties at the threshold, or smooth blobs like a model's."""
    if kind == "noise":
        return torch.from_numpy(rng.random((num, 28, 28), dtype=np.float32))
    if kind == "levels":
        return torch.from_numpy(rng.integers(0, 5, (num, 28, 28)).astype(np.float32) / 4)
    coarse = torch.from_numpy(rng.normal(0, 8, (num, 1, 5, 5)).astype(np.float32))
    return torch.nn.functional.interpolate(coarse, size=(28, 28), mode="bicubic")[:, 0].sigmoid()


@pytest.mark.parametrize("box_kind", ["inside", "outside", "tiny", "whole", "high"])
@pytest.mark.parametrize("mask_kind", ["noise", "levels", "blobs"])
def test_masks_are_pasted_and_encoded_as_by_torchvision_and_pycocotools(box_kind, mask_kind):
    rng = np.random.default_rng([ord(box_kind[0]), ord(mask_kind[0])])
    for _ in range(8):
        height, width = (int(n) for n in rng.integers(1, 120, 2))
        probs, boxes = random_probs(rng, 12, mask_kind), random_boxes(rng, 12, height, width, box_kind)
        frames = torchvision_frames(probs, boxes, height, width)
        expected = pycocotools_rles(frames)
        assert coco_eval.encode_masks(probs, boxes, height, width) == expected
        assert coco_eval.encode_frames(torch.from_numpy(frames)[:, None].float()) == expected
        for frame, (x0, y0, bitmap) in zip(
            frames, coco_eval.paste_masks(probs, boxes, height, width), strict=True
        ):
            pasted = np.zeros((height, width), bool)
            pasted[y0 : y0 + bitmap.shape[0], x0 : x0 + bitmap.shape[1]] = bitmap
            np.testing.assert_array_equal(pasted, frame)


def test_a_full_mask_covers_its_box():
    # Box 10..38 × 20..48, grown by 30/28 about (24, 34): 9..39 × 19..49, 31 pixels for 28 cells and a border of zeros.
    # Pixel i samples cell (i + 0.5) · 30/31 − 0.5: −0.02 → cell 0, a zero; 0.95 → 0.95 of cell 1; ... 28.05 → 0.95 of
    # cell 28; 29.02 → cell 29, a zero. So pixels 1 to 29 of 31 are inside: x 10..38, y 20..48, ends included.
    probs, boxes = torch.ones(1, 28, 28), torch.tensor([[10.0, 20.0, 38.0, 48.0]])
    [(x0, y0, bitmap)] = coco_eval.paste_masks(probs, boxes, height=60, width=50)
    ys, xs = np.nonzero(bitmap)
    assert (x0 + xs.min(), x0 + xs.max(), y0 + ys.min(), y0 + ys.max()) == (10, 38, 20, 48)
    assert bitmap.sum() == 29 * 29
    [rle] = coco_eval.encode_masks(probs, boxes, height=60, width=50)
    # 10 empty columns of 60 and 20 pixels; 29 columns of 29 with 31 between; from the last to the end of the frame
    runs = [10 * 60 + 20] + [29, 31] * 28 + [29, 50 * 60 - 620 - 28 * 60 - 29]
    [expected] = mask_api.frPyObjects([{"size": [60, 50], "counts": runs}], 60, 50)
    assert rle == {"size": [60, 50], "counts": expected["counts"].decode()}


def test_masks_are_the_same_in_any_number_of_chunks(monkeypatch):
    rng = np.random.default_rng(1)
    probs, boxes = random_probs(rng, 40, "noise"), random_boxes(rng, 40, 90, 70, "inside")
    at_once = coco_eval.encode_masks(probs, boxes, 90, 70)
    monkeypatch.setattr(coco_eval, "PIXELS_AT_ONCE", 500)
    assert coco_eval.encode_masks(probs, boxes, 90, 70) == at_once
    assert [m.shape for _, _, m in coco_eval.paste_masks(probs, boxes, 90, 70)][0] != (0, 0)


def test_no_masks():
    assert coco_eval.encode_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), 10, 10) == []
    assert coco_eval.paste_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), 10, 10) == []
    assert coco_eval.encode_frames(torch.zeros(0, 1, 10, 10)) == []


@pytest.mark.parametrize("side", [14, 28, 56])
def test_the_fast_resize_is_much_nearer_to_torch_than_its_tolerance(side):
    rng = np.random.default_rng(side)
    largest = 0.0
    for size in [1, 2, 3, 29, 30, 31, 100, 333, 640, 1333]:
        probs = rng.integers(0, 2, (side + 2, side + 2)).astype(
            np.float32
        )  # steps of 1: where weights matter most
        fast, exact = np.empty((97, size), np.float32), np.empty((97, size), np.float32)
        coco_eval._resize_fast(probs, 97, size, fast)
        coco_eval._resize_exactly(probs, 97, size, exact)
        largest = max(largest, np.abs(fast - exact).max())
    assert largest < coco_eval.RESIZE_TOLERANCE * (side + 2) / 2


# --- predictions to results ------------------------------------------------------------------------------------


def prediction(num, seed=0, height=60, width=80, **extra):
    rng = np.random.default_rng(seed)
    boxes = random_boxes(rng, num, height, width, "inside")
    labels = torch.from_numpy(rng.integers(1, 4, num))
    scores = torch.from_numpy(rng.random(num, dtype=np.float32))
    return {"boxes": boxes, "labels": labels, "scores": scores, **extra}


def test_results_by_hand():
    outputs = [
        {
            "boxes": torch.tensor([[1.0, 2.0, 4.0, 8.0], [0.0, 0.5, 10.25, 20.0]]),
            "labels": torch.tensor([3, 1]),
            "scores": torch.tensor([0.5, 0.75]),
            "keypoints": torch.tensor([[[1.0, 2.0, 1.0]], [[3.0, 4.5, 1.0]]]),
        },
        {
            "boxes": torch.zeros(0, 4),
            "labels": torch.zeros(0, dtype=torch.int64),
            "scores": torch.zeros(0),
            "keypoints": torch.zeros(0, 1, 3),
        },
    ]
    results = coco_eval.predictions_to_results(outputs, [42, 7], [(30, 20), (5, 5)], category_ids=[0, 18, 90])
    assert results == [
        {"image_id": 42, "category_id": 90, "bbox": [1, 2, 3, 6], "score": 0.5, "keypoints": [1, 2, 1]},
        {
            "image_id": 42,
            "category_id": 0,
            "bbox": [0, 0.5, 10.25, 19.5],
            "score": 0.75,
            "keypoints": [3, 4.5, 1],
        },
    ]
    assert json.loads(json.dumps(results)) == results


def test_unpasted_and_pasted_masks_give_the_same_results():
    sizes = [(60, 80), (33, 47)]
    rng = np.random.default_rng(3)
    unpasted, pasted = [], []
    for height, width in sizes:
        output, probs = prediction(9, height, height, width), random_probs(rng, 9, "blobs")
        unpasted.append({**output, "mask_probs": probs})
        pasted.append(
            {**output, "masks": paste_masks_in_image(probs[:, None], output["boxes"], (height, width))}
        )
    results = coco_eval.predictions_to_results(unpasted, [1, 2], sizes, [1, 2, 3])
    assert results == coco_eval.predictions_to_results(pasted, [1, 2], sizes, [1, 2, 3])
    frames = torchvision_frames(unpasted[1]["mask_probs"], unpasted[1]["boxes"], *sizes[1])
    assert [result["segmentation"] for result in results[9:]] == pycocotools_rles(frames)


def test_results_from_threads_and_from_inference_mode():
    rng = np.random.default_rng(4)
    outputs = [prediction(20, seed, mask_probs=random_probs(rng, 20, "blobs")) for seed in range(6)]
    expected = coco_eval.predictions_to_results(outputs, range(6), [(60, 80)] * 6, [5, 6, 7])
    with torch.inference_mode():
        outputs = [{name: value * 1 for name, value in output.items()} for output in outputs]
    with ThreadPoolExecutor(2) as pool:
        parts = pool.map(
            lambda n: coco_eval.predictions_to_results([outputs[n]], [n], [(60, 80)], [5, 6, 7]), range(6)
        )
        assert [result for part in parts for result in part] == expected


def test_a_label_without_a_category_is_refused():
    with pytest.raises(
        ValueError, match=r"image 9: predicted labels 1\.\.3, but the annotation file has 2 categories"
    ):
        coco_eval.predictions_to_results([prediction(20)], [9], [(60, 80)], [1, 2])


@pytest.mark.parametrize("name", ["boxes", "scores"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_prediction_that_is_not_finite_is_refused(name, value):
    output = prediction(3)
    output[name].view(-1)[1] = value
    with pytest.raises(ValueError, match="image 9: a predicted box or score is not finite"):
        coco_eval.predictions_to_results([output], [9], [(60, 80)], [1, 2, 3])


# --- gathering -----------------------------------------------------------------------------------------------------

IMAGE_IDS = [30, 10, 20, 5, 40]  # not sorted: the data set's order counts


def results_of(image_ids):
    """What a model finds: equal scores, and nothing in image 5."""
    return [
        {"image_id": image_id, "category_id": 1, "bbox": [float(n), 0.1, 2.0, 1 / 3], "score": 0.5}
        for image_id in image_ids
        for n in range(0 if image_id == 5 else 3)
    ]


def gather_on_rank(rank, folder):
    """Run by three processes: gather in groups of 1, 2 and 3 ranks, and leave what each rank got."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 3)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=3)
    got = {}
    for world_size in (1, 2, 3):
        group = dist.new_group(list(range(world_size)))
        if rank < world_size:
            mine = results_of(IMAGE_IDS[rank::world_size])
            got[f"{world_size} ranks"] = coco_eval.gather_results(mine, IMAGE_IDS, group)
    few = results_of([10] if rank == 0 else [])
    got["empty ranks"] = coco_eval.gather_results(few, IMAGE_IDS)
    for name, image_id in (("twice", 10), ("stranger", 99 if rank == 2 else 10 * rank + 10)):
        try:
            coco_eval.gather_results(results_of([image_id]), IMAGE_IDS)
        except ValueError as error:
            got[name] = str(error)
    dist.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps(got))


@pytest.fixture(scope="module")
def gathered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gather")
    # Forked, as loader workers are: three fresh interpreters would import torch for ten seconds.
    ranks = torch.multiprocessing.start_processes(
        gather_on_rank, (folder,), nprocs=3, join=False, start_method="fork"
    )
    joined = [ranks.join(timeout=60) for _ in range(3)]  # each call waits for one more to end
    assert joined[-1], "the ranks hang"
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(3)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_gather_what_one_process_finds(gathered, world_size):
    assert gathered[0][f"{world_size} ranks"] == results_of(IMAGE_IDS)
    for rank in range(1, world_size):
        assert gathered[rank][f"{world_size} ranks"] is None


def test_ranks_without_results(gathered):
    assert gathered[0]["empty ranks"] == results_of([10])


def test_an_image_of_two_ranks_or_of_another_data_set_is_refused(gathered):
    assert gathered[0]["twice"].startswith(
        "image 10 was evaluated by rank 0 and by rank 1; give each image to one"
    )
    assert gathered[0]["stranger"] == "rank 2 has results of image 99, which is not in the data set"


def test_one_process_without_a_group_sorts_too():
    shuffled = results_of(sorted(IMAGE_IDS))
    assert coco_eval.gather_results(shuffled, IMAGE_IDS) == results_of(IMAGE_IDS)


# --- scoring: COCO's own oracles -------------------------------------------------------------------------------------


def oracle(name):
    return json.loads((ORACLE / name).read_text())


GT, BOXES, MASKS = (
    "instances_val2014_100.json",
    "instances_val2014_fakebbox100_results.json",
    "instances_val2014_fakesegm100_results.json",
)


@needs_oracle
@pytest.mark.parametrize("evaluator", EVALUATORS)
@pytest.mark.parametrize("carried", ["boxes", "masks", "masks and boxes"])
def test_the_command_reproduces_the_oracles(evaluator, carried, tmp_path, capsys):
    expected = oracle("expected.json")
    if (
        carried == "masks and boxes"
    ):  # pycocotools' loadRes would take the masks' areas from the boxes: APs 0.410
        both = [{**mask, "bbox": box["bbox"]} for mask, box in zip(oracle(MASKS), oracle(BOXES), strict=True)]
        (tmp_path / "results.json").write_text(json.dumps(both))
        results = tmp_path / "results.json"
    else:
        expected = {"boxes": {"bbox": expected["bbox"]}, "masks": {"segm": expected["segm"]}}[carried]
        results = ORACLE / {"boxes": BOXES, "masks": MASKS}[carried]
    out = tmp_path / "metrics.json"
    status = coco_eval.main([str(ORACLE / GT), str(results), "--evaluator", evaluator, "--json", str(out)])
    assert status == 0
    metrics = json.loads(out.read_text())
    assert metrics.keys() == expected.keys()
    for iou_type, numbers in expected.items():
        assert list(metrics[iou_type]) == BOX_NAMES
        assert metrics[iou_type] == pytest.approx(numbers, rel=0, abs=1e-12)
    printed, chatter = capsys.readouterr()
    assert printed == coco_eval.format_table(metrics) + "\n" and chatter == ""


@needs_oracle
@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_equal_scores_are_ranked_in_the_files_order(evaluator):
    truth = coco_eval.read_ground_truth(ORACLE / GT)
    metrics, _ = coco_eval.score_results(truth, oracle(BOXES)[::-1], ["bbox"], evaluator)
    assert metrics["bbox"]["AP"] != pytest.approx(oracle("expected.json")["bbox"]["AP"], abs=1e-9)


@needs_oracle
def test_per_class_ap_averages_to_the_ap():
    metrics, per_class = coco_eval.score_results(ORACLE / GT, oracle(MASKS), ["segm"])
    present = [ap for ap in per_class["segm"].values() if ap > -1]
    assert len(per_class["segm"]) == 80 and 0 < len(present) < 80
    assert np.mean(present) == pytest.approx(metrics["segm"]["AP"], abs=1e-12)
