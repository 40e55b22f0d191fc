"""coco_results by hand, over threads and ranks, and as files."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from test_coco_eval import BOXES, EVALUATORS, GT, MASKS, ORACLE, needs_oracle, oracle
from test_pasting import pycocotools_rles, random_boxes, random_probs, torchvision_frames
from torchvision.models.detection.roi_heads import paste_masks_in_image

import coco_eval
import coco_results


def records_of(results):
    """A list of ImageResults as the dicts of a results file."""
    return [record for found in results for record in found.records()]


# --- predictions to results ---------------------------------------------------------------------------------


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
    results = coco_results.predictions_to_results(
        outputs, [42, 7], [(30, 20), (5, 5)], category_ids=[0, 18, 90]
    )
    assert [len(found) for found in results] == [2, 0]
    assert records_of(results) == [
        {"image_id": 42, "category_id": 90, "bbox": [1, 2, 3, 6], "score": 0.5, "keypoints": [1, 2, 1]},
        {
            "image_id": 42,
            "category_id": 0,
            "bbox": [0, 0.5, 10.25, 19.5],
            "score": 0.75,
            "keypoints": [3, 4.5, 1],
        },
    ]


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
    results = records_of(coco_results.predictions_to_results(unpasted, [1, 2], sizes, [1, 2, 3]))
    assert results == records_of(coco_results.predictions_to_results(pasted, [1, 2], sizes, [1, 2, 3]))
    frames = torchvision_frames(unpasted[1]["mask_probs"], unpasted[1]["boxes"], *sizes[1])
    counts = [result["segmentation"]["counts"].encode() for result in results[9:]]
    assert counts == pycocotools_rles(frames)


def test_results_from_threads_and_from_inference_mode():
    rng = np.random.default_rng(4)
    outputs = [prediction(20, seed, mask_probs=random_probs(rng, 20, "blobs")) for seed in range(6)]
    expected = coco_results.predictions_to_results(outputs, range(6), [(60, 80)] * 6, [5, 6, 7])
    with torch.inference_mode():
        outputs = [{name: value * 1 for name, value in output.items()} for output in outputs]
    with ThreadPoolExecutor(2) as pool:
        parts = pool.map(
            lambda n: coco_results.predictions_to_results([outputs[n]], [n], [(60, 80)], [5, 6, 7]), range(6)
        )
        assert records_of(found for part in parts for found in part) == records_of(expected)


def test_a_label_without_a_category_is_refused():
    with pytest.raises(
        ValueError, match=r"image 9: predicted labels 1\.\.3, but the annotation file has 2 categories"
    ):
        coco_results.predictions_to_results([prediction(20)], [9], [(60, 80)], [1, 2])


@pytest.mark.parametrize("name", ["boxes", "scores"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_prediction_that_is_not_finite_is_refused(name, value):
    output = prediction(3)
    output[name].view(-1)[1] = value
    with pytest.raises(ValueError, match="image 9: a predicted box or score is not finite"):
        coco_results.predictions_to_results([output], [9], [(60, 80)], [1, 2, 3])


# --- gathering ----------------------------------------------------------------------------------------------

TIMEOUT = timedelta(seconds=20)
IMAGE_IDS = [30, 10, 20, 5, 40]  # not sorted: the data set's order counts


def results_of(image_ids):
    """What a model finds: equal scores, and nothing in image 5."""
    results = []
    for image_id in image_ids:
        count = 0 if image_id == 5 else 3
        boxes = np.array([[float(n), 0.1, 2.0, 1 / 3] for n in range(count)]).reshape(-1, 4)
        masks = b"04" * count
        results.append(
            coco_results.ImageResults(
                image_id,
                (2, 2),
                np.ones(count, np.int64),
                np.full(count, 0.5, np.float32),
                boxes=boxes,
                counts=np.frombuffer(masks, np.uint8),
                counts_ends=np.arange(2, 2 * count + 1, 2),
            )
        )
    return results


def gather(results, image_ids, group=None):
    """gather_results as json-able records, or None."""
    gathered = coco_results.gather_results(results, image_ids, group)
    return gathered if gathered is None else records_of(gathered)


def gather_on_rank(rank, folder):
    """Run by three processes: gather in groups of 1, 2 and 3 ranks, and leave what each rank got."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 3)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=3, timeout=TIMEOUT)
    got = {}
    for world_size in (1, 2, 3):
        group = dist.new_group(list(range(world_size)), timeout=TIMEOUT)
        if rank < world_size:
            mine = results_of(IMAGE_IDS[rank::world_size])
            got[f"{world_size} ranks"] = gather(mine, IMAGE_IDS, group)
            if ORACLE.exists():
                image_ids = [image["id"] for image in oracle(GT)["images"]]
                mine = set(image_ids[rank::world_size])
                sizes = {image["id"]: (image["height"], image["width"]) for image in oracle(GT)["images"]}
                for name, iou_type in ((BOXES, "bbox"), (MASKS, "segm")):
                    shard = [result for result in oracle(name) if result["image_id"] in mine]
                    shard = coco_results.group_records(shard, sizes, [iou_type])
                    got[f"{name} of {world_size} ranks"] = gather(shard, image_ids, group)
    few = results_of([10] if rank == 0 else [])
    got["empty ranks"] = gather(few, IMAGE_IDS)
    for name, image_id in (("twice", 10), ("stranger", 99 if rank == 2 else 10 * rank + 10)):
        try:
            coco_results.gather_results(results_of([image_id]), IMAGE_IDS)
        except ValueError as error:
            got[name] = str(error)
    dist.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps(got))


@pytest.fixture(scope="module")
def gathered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gather")
    # Forked, as loader workers are: three fresh interpreters would import torch for ten seconds.
    ranks = torch.multiprocessing.start_processes(
        gather_on_rank, (folder,), nprocs=3, join=False, daemon=True, start_method="fork"
    )
    joined = [ranks.join(timeout=30) for _ in range(3)]  # each call waits for one more to end
    assert joined[-1], "the ranks hang"
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(3)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_gather_what_one_process_finds(gathered, world_size):
    assert gathered[0][f"{world_size} ranks"] == records_of(results_of(IMAGE_IDS))
    for rank in range(1, world_size):
        assert gathered[rank][f"{world_size} ranks"] is None


def test_ranks_without_results(gathered):
    assert gathered[0]["empty ranks"] == records_of(results_of([10]))


def test_an_image_of_two_ranks_or_of_another_data_set_is_refused(gathered):
    assert gathered[0]["twice"].startswith(
        "image 10 was evaluated by rank 0 and by rank 1; give each image to one"
    )
    assert gathered[0]["stranger"] == "rank 2 has results of image 99, which is not in the data set"


def test_one_process_without_a_group_sorts_too():
    shuffled = results_of(sorted(IMAGE_IDS))
    assert gather(shuffled, IMAGE_IDS) == records_of(results_of(IMAGE_IDS))


# --- files --------------------------------------------------------------------------------------------------


def test_a_results_file_is_what_json_would_write(tmp_path):
    path = tmp_path / "detections.json"
    for image_ids in (
        IMAGE_IDS,
        [5, 10],
        [5],
        [],
    ):  # images without detections first and last, and nothing at all
        results = results_of(image_ids)
        coco_results.write_results(path, results)
        assert path.read_text() == json.dumps(records_of(results))
    assert [file.name for file in tmp_path.iterdir()] == ["detections.json"]


def test_records_and_columns_are_the_same_results(tmp_path):
    sizes = dict.fromkeys(IMAGE_IDS, (2, 2))
    path = tmp_path / "detections.json"
    coco_results.write_results(path, results_of([30, 10]))
    records = coco_results.read_results(path)
    # 0: 4 pixels without the object; 4: then 4 with it
    assert records[0] == {
        "image_id": 30,
        "category_id": 1,
        "score": 0.5,
        "bbox": [0.0, 0.1, 2.0, 1 / 3],
        "segmentation": {"size": [2, 2], "counts": "04"},
    }
    assert records_of(coco_results.group_records(records, sizes, ["bbox", "segm"])) == records
    boxes_alone = coco_results.group_records(records, sizes, ["bbox"])
    assert boxes_alone[0].counts is None and "segmentation" not in boxes_alone[0].records()[0]


@needs_oracle
@pytest.mark.parametrize("evaluator", EVALUATORS)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_any_number_of_ranks_reproduces_the_oracles(gathered, evaluator, world_size):
    truth = coco_eval.read_ground_truth(ORACLE / GT)
    for iou_type, name in (("bbox", BOXES), ("segm", MASKS)):
        results = gathered[0][f"{name} of {world_size} ranks"]
        metrics, _ = coco_eval.score_results(truth, results, [iou_type], evaluator)
        assert metrics[iou_type] == pytest.approx(oracle("expected.json")[iou_type], rel=0, abs=1e-12)
