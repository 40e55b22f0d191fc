"""coco_eval against pycocotools, COCO's own oracles, and numbers worked out by hand."""

import contextlib
import dataclasses
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import coco_eval
import coco_results
import pasting
from utils import UserError

ORACLE = Path(__file__).parents[1].parent / "shared" / "oracles" / "coco_val2014_fake100"
needs_oracle = pytest.mark.skipif(not ORACLE.exists(), reason=f"{ORACLE} is not there")
EVALUATORS = list(coco_eval.EVALUATORS)
pytestmark = pytest.mark.filterwarnings("ignore:.*annotations with")  # id 0, or without a segmentation
BOX_NAMES = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
KEYPOINT_NAMES = ["AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl"]


def oracle(name):
    return json.loads((ORACLE / name).read_text())


GT, BOXES, MASKS = (
    "instances_val2014_100.json",
    "instances_val2014_fakebbox100_results.json",
    "instances_val2014_fakesegm100_results.json",
)


# --- scoring: COCO's own oracles ----------------------------------------------------------------------------


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


# --- scoring: hotcoco, pycocotools and this module on made-up data sets -------------------------------------


def rectangle_rle(x, y, w, h, height, width):
    frame = np.zeros((height, width), np.uint8, order="F")
    frame[y : y + h, x : x + w] = 1
    rle = mask_api.encode(frame)
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def make_data_set(rng, num_images, category_ids, max_objects, max_detections, crowd_share):
    """A ground truth and results: rectangles of all of COCO's sizes, near and far detections, few different scores."""
    height, width = 130, 150
    images = [
        {"id": 7 * n, "height": height, "width": width, "file_name": f"{n}.png"} for n in range(num_images)
    ]
    annotations, results = [], []

    def rectangle():
        w, h = (int(2 + (size - 2) * rng.random() ** 2) for size in (width, height))
        return int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1)), w, h

    for image in images:
        objects = []
        for _ in range(rng.integers(0, max_objects + 1)):
            x, y, w, h = rectangle()
            objects.append((int(rng.choice(category_ids)), x, y, w, h))
            polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
            crowd = int(rng.random() < crowd_share)
            annotations.append(
                {
                    "id": 5 * len(annotations),  # 0 among them
                    "image_id": image["id"],
                    "category_id": objects[-1][0],
                    "bbox": [x, y, w, h],
                    "area": float(w * h),
                    "iscrowd": crowd,
                    "segmentation": rectangle_rle(x, y, w, h, height, width) if crowd else [polygon],
                }
            )
        for _ in range(rng.integers(0, max_detections + 1)):
            category_id, (x, y, w, h) = int(rng.choice(category_ids)), rectangle()
            if objects and rng.random() < 0.7:
                category_id, x, y, w, h = objects[rng.integers(len(objects))]
                x, y = (max(0, v + int(rng.integers(-2, 3))) for v in (x, y))
                w, h = min(w, width - x), min(max(1, h + int(rng.integers(-2, 3))), height - y)
            results.append(
                {
                    "image_id": image["id"],
                    "category_id": category_id,
                    "bbox": [x, y, w, h] if rng.random() < 0.5 else [x + 0.25, y - 0.125, w * 1.01, h / 3],
                    "score": float(rng.choice([0.25, 0.5, 0.5000001, 0.75])),
                    "segmentation": rectangle_rle(x, y, w, h, height, width),
                }
            )
    categories = [{"id": category_id, "name": f"class {category_id}"} for category_id in category_ids]
    return {"images": images, "annotations": annotations, "categories": categories}, results


def write(tmp_path, content, name="truth.json"):
    (tmp_path / name).write_text(json.dumps(content))
    return tmp_path / name


def pycocotools_stats(truth, results, iou_type, sigmas=None):
    """What a user of pycocotools does, step by step."""
    field = coco_results.RESULT_FIELDS[iou_type]
    results = [{key: r[key] for key in ("image_id", "category_id", "score", field)} for r in results]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = json.loads(json.dumps(truth))
        for number, annotation in enumerate(coco.dataset["annotations"], start=1):
            annotation["id"] = number
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), iou_type)
        if sigmas is not None:
            evaluation.params.kpt_oks_sigmas = np.array(sigmas)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist()


def scores_by_both(truth, results, iou_types, **options):
    hot, hot_classes = coco_eval.score_results(truth, results, iou_types, "hotcoco", **options)
    reference, reference_classes = coco_eval.score_results(
        truth, results, iou_types, "pycocotools", **options
    )
    assert hot == reference and hot_classes == reference_classes  # to the last bit
    return reference


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_images=st.integers(1, 4),
    category_ids=st.permutations([0, 3, 90]),
    num_categories=st.integers(1, 3),
    max_objects=st.sampled_from([0, 1, 6]),
    max_detections=st.sampled_from([1, 12, 140]),  # 100 of a class and image count
    crowd_share=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_the_evaluators_agree_to_the_last_bit(
    tmp_path, seed, num_images, category_ids, num_categories, max_objects, max_detections, crowd_share
):
    rng = np.random.default_rng(seed)
    category_ids = category_ids[:num_categories]
    truth, results = make_data_set(rng, num_images, category_ids, max_objects, max_detections, crowd_share)
    metrics = scores_by_both(write(tmp_path, truth), results, ["bbox", "segm"])
    for iou_type in ("bbox", "segm"):
        assert list(metrics[iou_type]) == BOX_NAMES
        if results:
            assert list(metrics[iou_type].values()) == pycocotools_stats(truth, results, iou_type)
        else:
            assert metrics[iou_type]["AP"] in (0, -1)


def test_columns_score_as_the_records_they_hold(tmp_path):
    rng = np.random.default_rng(8)
    truth, records = make_data_set(rng, 7, [0, 3, 90], 6, 20, 0.2)
    path = write(tmp_path, truth)
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    stray = {**records[0], "category_id": 7}
    columns = coco_results.group_records([stray, *records], sizes, ["bbox", "segm"])
    for evaluator in EVALUATORS:
        with pytest.warns(UserWarning, match=r"1 results of categories .* \(ids 7\)"):
            by_columns = coco_eval.score_results(path, columns[::-1], ["bbox", "segm"], evaluator)
        assert by_columns == coco_eval.score_results(path, records, ["bbox", "segm"], evaluator)


def test_any_number_of_images_at_once_gives_the_same_numbers(tmp_path, monkeypatch):
    truth, records = make_data_set(np.random.default_rng(9), 9, [1, 2], 6, 20, 0.2)
    path = write(tmp_path, truth)
    expected = coco_eval.score_results(path, records, ["bbox", "segm"])
    for count in (1, 4):
        monkeypatch.setattr(coco_eval, "IMAGES_AT_ONCE", count)
        assert coco_eval.score_results(path, records, ["bbox", "segm"]) == expected


@pytest.mark.parametrize(
    ("change", "iou_type", "message"),
    [
        ({"image_id": 17}, "bbox", r"1 images that the annotation file does not list \(ids 17\)"),
        ({"scores": np.array([math.nan])}, "bbox", "image 1 has no score of 1 finite numbers"),
        ({"boxes": np.array([[1, 2, math.inf, 4]])}, "bbox", "image 1 has no bbox of 4 finite numbers"),
        ({"boxes": None}, "bbox", "image 1 has no bbox"),
        ({"counts": None}, "segm", r"image 1 has no masks, but it is \[100, 100\]"),
        ({"size": (100, 99)}, "segm", r"image 1 has masks of size \(100, 99\), but it is \[100, 100\]"),
    ],
)
def test_columns_that_cannot_be_scored_are_refused(tmp_path, change, iou_type, message):
    truth, record = one_image()
    (found,) = coco_results.group_records([record], {1: (100, 100)}, ["bbox", "segm"])
    with pytest.raises(ValueError, match=message):
        coco_eval.score_results(write(tmp_path, truth), [dataclasses.replace(found, **change)], [iou_type])


def test_more_than_100_detections_are_scored_under_another_name(tmp_path):
    truth, results = make_data_set(np.random.default_rng(0), 1, [1], 6, 0, 0.0)
    truth["annotations"] = truth["annotations"][:1]
    x, y, w, h = truth["annotations"][0]["bbox"]
    far = {"image_id": 0, "category_id": 1, "bbox": [x, y, w / 4, h / 4], "score": 0.9}
    results = [far] * 150 + [{**far, "bbox": [x, y, w, h], "score": 0.1}]  # the 151st is the right one
    path = write(tmp_path, truth)
    assert scores_by_both(path, results, ["bbox"])["bbox"]["AR100"] == 0
    metrics = scores_by_both(path, results, ["bbox"], max_detections=300)["bbox"]
    assert metrics["AR300"] == 1 and "AR100" not in metrics
    # precision 1/151 at every recall (plus pycocotools' spacing in the denominator)
    assert metrics["AP"] == pytest.approx(1 / 151, abs=1e-12)
    rows = [line.split() for line in coco_eval.format_table({"bbox": metrics}).splitlines()]
    assert ["AR300", "0.50:0.95", "all", "300", "1.000"] in rows and [
        "APs",
        "0.50:0.95",
        "small",
        "300",
        "0.007",
    ] in rows


# --- scoring: by hand ---------------------------------------------------------------------------------------


ONE = pytest.approx(1)  # COCO divides by tp + fp + 2e-16


def one_image(**changes):
    """A 100×100 image with one object of 10×10 pixels, and the result that finds it."""
    polygon = [[10, 10, 20, 10, 20, 20, 10, 20]]
    annotation = {"id": 1, "image_id": 1, "category_id": 3, "bbox": [10, 10, 10, 10], "segmentation": polygon}
    annotation |= {"area": 100.0, "iscrowd": 0, **changes}
    truth = {
        "images": [{"id": n, "height": 100, "width": 100, "file_name": f"{n}.png"} for n in (1, 2)],
        "annotations": [{key: value for key, value in annotation.items() if value is not None}],
        "categories": [{"id": 3, "name": "cat"}, {"id": 1, "name": "dog"}],
    }
    result = {"image_id": 1, "category_id": 3, "score": 0.5, "bbox": [10.0, 10.0, 10.0, 10.0]}
    return truth, {**result, "segmentation": rectangle_rle(10, 10, 10, 10, 100, 100)}


def test_a_perfect_result(tmp_path):
    truth, result = one_image()
    path = write(tmp_path, truth)
    # one small object: no medium or large one to find; AR1 too is 1
    found = dict.fromkeys(BOX_NAMES, ONE) | {"APm": -1, "APl": -1, "ARm": -1, "ARl": -1}
    assert scores_by_both(path, [result], ["bbox", "segm"]) == {"bbox": found, "segm": found}
    _, per_class = coco_eval.score_results(path, [result], ["segm", "bbox"])
    assert per_class == {"segm": {"dog": -1, "cat": ONE}, "bbox": {"dog": -1, "cat": ONE}}


def test_a_box_off_by_a_pixel_and_an_inverted_mask_cost_ap(tmp_path):
    truth, result = one_image()
    path = write(tmp_path, truth)
    # one of ten columns beside the object: IoU 90 / 110 = 0.818, above 7 of the 10 thresholds 0.50, ..., 0.80
    shifted = {**result, "bbox": [11.0, 10.0, 10.0, 10.0]}
    assert scores_by_both(path, [shifted], ["bbox"])["bbox"]["AP"] == pytest.approx(0.7)
    outside = torch.ones(1, 1, 100, 100)
    outside[:, :, 10:20, 10:20] = 0
    [inverted] = pasting.encode_frames(outside)
    inverted = {"size": [100, 100], "counts": inverted.decode()}
    assert scores_by_both(path, [{**result, "segmentation": inverted}], ["segm"])["segm"]["AP"] == 0


def test_no_results_give_ap_0(tmp_path):
    truth, _ = one_image()
    nothing = dict.fromkeys(BOX_NAMES, 0.0) | {"APm": -1, "APl": -1, "ARm": -1, "ARl": -1}
    assert scores_by_both(write(tmp_path, truth), [], ["bbox", "segm"]) == {"bbox": nothing, "segm": nothing}


def test_annotation_id_0_is_found_like_any_other(tmp_path):
    truth, result = one_image(id=0)
    assert pycocotools_stats({**truth, "annotations": []}, [result], "bbox")[0] == -1
    assert scores_by_both(write(tmp_path, truth), [result], ["bbox", "segm"])["segm"]["AP"] == ONE


def test_a_missing_area_is_the_masks_and_a_missing_iscrowd_0(tmp_path):
    # An L of 100×100 without 90×90 has 1,900 pixels, so it is medium; its box of 10,000 would be large.
    corner = [[0, 0, 100, 0, 100, 10, 10, 10, 10, 100, 0, 100]]
    truth, result = one_image(segmentation=corner, bbox=[0, 0, 100, 100], area=None, iscrowd=None)
    result["bbox"] = [0, 0, 100, 100]
    metrics = scores_by_both(write(tmp_path, truth), [result], ["bbox"])["bbox"]
    assert (metrics["APs"], metrics["APm"], metrics["APl"]) == (-1, ONE, -1)
    truth["annotations"][0].pop("segmentation")
    metrics = scores_by_both(write(tmp_path, truth), [result], ["bbox"])["bbox"]
    assert (metrics["APs"], metrics["APm"], metrics["APl"]) == (-1, -1, ONE)


@pytest.mark.parametrize("counts", ["text", "list"])
def test_a_missing_area_is_counted_in_rles_too(tmp_path, counts):
    rle = rectangle_rle(10, 10, 10, 10, 100, 100)
    if counts == "list":
        rle = {"size": [100, 100], "counts": [1010, *[10, 90] * 9, 10, 8080]}
    truth, _ = one_image(segmentation=rle, area=None)
    assert coco_eval.read_ground_truth(write(tmp_path, truth)).areas.tolist() == [100]


def test_a_crowd_alone_is_nothing_to_find(tmp_path):
    truth, result = one_image(iscrowd=1, segmentation=rectangle_rle(10, 10, 10, 10, 100, 100))
    metrics = scores_by_both(write(tmp_path, truth), [result], ["bbox", "segm"])
    assert set(metrics["bbox"].values()) == set(metrics["segm"].values()) == {-1}
    assert coco_eval.format_table(metrics).count("n/a") == 24


def test_a_subset_of_the_images(tmp_path):
    truth, result = one_image()
    stray = {**result, "image_id": 2, "score": 0.9}  # a better score than the right one: precision 1/2
    path = write(tmp_path, truth)
    assert scores_by_both(path, [result, stray], ["bbox"])["bbox"]["AP"] == pytest.approx(0.5)
    assert scores_by_both(path, [result, stray], ["bbox"], image_ids=[1])["bbox"]["AP"] == ONE
    assert scores_by_both(path, [result, stray], ["bbox"], image_ids=[2])["bbox"]["AP"] == -1
    with pytest.raises(ValueError, match="image 3 is to be scored, but the annotation file has none such"):
        coco_eval.score_results(path, [], ["bbox"], image_ids=[1, 3])


def test_unknown_images_are_refused_and_unknown_categories_left_out(tmp_path):
    truth, result = one_image()
    path = write(tmp_path, truth)
    with pytest.raises(ValueError, match=r"1 images that the annotation file does not list \(ids 17\)"):
        coco_eval.score_results(path, [result, {**result, "image_id": 17}], ["bbox"])
    strays = [{**result, "category_id": 99, "score": 0.9}] * 2
    with pytest.warns(UserWarning, match=r"2 results of categories .* \(ids 99\): left out"):
        assert coco_eval.score_results(path, [*strays, result], ["bbox"])[0]["bbox"]["AP"] == ONE


@pytest.mark.parametrize("evaluator", EVALUATORS)
@pytest.mark.parametrize(
    ("iou_type", "field", "value"),
    [
        ("bbox", "score", math.nan),
        ("bbox", "score", None),
        ("bbox", "score", 10**400),
        ("bbox", "bbox", [1, 2, 3, 10**20]),
        ("bbox", "bbox", [1, 2, math.inf, 4]),
        ("bbox", "bbox", [1, 2, 3]),
        ("bbox", "bbox", None),
        ("segm", "score", math.nan),
        ("segm", "segmentation", rectangle_rle(0, 0, 5, 5, 100, 99)),
    ],
)
def test_results_that_cannot_be_ranked_or_matched_are_refused(tmp_path, evaluator, iou_type, field, value):
    truth, result = one_image()
    with pytest.raises(ValueError, match=r"result 1 \(image 1\) has"):
        coco_eval.score_results(
            write(tmp_path, truth), [result, {**result, field: value}], [iou_type], evaluator
        )


def test_results_without_masks_have_no_mask_ap(tmp_path):
    truth, result = one_image()
    result.pop("segmentation")
    with pytest.raises(ValueError, match=r"result 0 \(image 1\) has no mask, but its image is \[100, 100\]"):
        coco_eval.score_results(write(tmp_path, truth), [result], ["segm"])
    with pytest.raises(ValueError, match="the annotation file has no keypoints"):
        coco_eval.score_results(write(tmp_path, truth), [result], ["keypoints"])


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_the_arguments_are_left_as_they_are(tmp_path, evaluator, capfd):
    truth, result = one_image()
    dataset = coco_eval.read_ground_truth(write(tmp_path, truth))
    before, once = json.dumps(result), coco_eval.score_results(dataset, [result], ["bbox", "segm"], evaluator)
    assert coco_eval.score_results(dataset, [result], ["bbox", "segm"], evaluator) == once
    assert json.dumps(result) == before
    assert capfd.readouterr() == ("", "")  # the libraries' chatter is caught


def test_unknown_evaluators_and_iou_types_are_refused(tmp_path):
    path = write(tmp_path, one_image()[0])
    with pytest.raises(ValueError, match="evaluator 'cocoapi': must be one of hotcoco, pycocotools"):
        coco_eval.score_results(path, [], ["bbox"], "cocoapi")
    with pytest.raises(ValueError, match="iou types obb: must be of bbox, segm, keypoints"):
        coco_eval.score_results(path, [], ["obb"])
    with pytest.raises(ValueError, match="max_detections 5: must be COCO's 100, or more"):
        coco_eval.score_results(path, [], ["bbox"], max_detections=5)


# --- keypoints ----------------------------------------------------------------------------------------------


def two_keypoints(offset, category_ids=(1,)):
    """Objects of 100×100 pixels with two keypoints each, and results that are `offset` pixels off."""
    truth = {"images": [{"id": 1, "height": 200, "width": 900, "file_name": "1.png"}], "annotations": []}
    truth["categories"] = [
        {"id": c, "name": f"class {c}", "keypoints": ["head", "tail"]} for c in category_ids
    ]
    results = []
    for n, category_id in enumerate(category_ids):
        x = 300.0 * n
        truth["annotations"].append(
            {"id": n + 1, "image_id": 1, "category_id": category_id, "bbox": [x, 0, 100, 100], "area": 10_000}
            | {"iscrowd": 0, "keypoints": [x + 10, 10, 2, x + 90, 90, 1]}
        )
        points = [x + 10 + offset, 10.0, 1.0, x + 90, 90.0 - offset, 1.0]
        results.append({"image_id": 1, "category_id": category_id, "keypoints": points, "score": 0.5})
    return truth, results


def test_keypoints_by_hand(tmp_path):
    # COCO's sigmas average 1.138 / 17 = 0.06694. Both keypoints are 10 pixels off:
    # OKS = exp(−10² / (2 · 10,000 · (2 · 0.06694)²)) = exp(−0.27895) = 0.7566, above 0.50, ..., 0.75: 6 of 10.
    truth, results = two_keypoints(offset=10)
    metrics = scores_by_both(write(tmp_path, truth), results, ["keypoints"])["keypoints"]
    assert list(metrics) == KEYPOINT_NAMES
    expected = {"AP": 0.6, "AP50": 1, "AP75": 1, "APm": -1, "APl": 0.6}
    expected |= {"AR": 0.6, "AR50": 1, "AR75": 1, "ARm": -1, "ARl": 0.6}
    assert metrics == pytest.approx(expected)


def test_each_category_can_have_its_own_sigmas(tmp_path):
    # Category 0 by default 0.6 (above); category 5 with sigmas 0.05: OKS = exp(−100 / (20,000 · 0.01)) = 0.6065, above
    # 0.50, 0.55 and 0.60: 0.3.
    truth, results = two_keypoints(offset=10, category_ids=(5, 0))
    path = write(tmp_path, truth)
    sigmas = {5: [0.05, 0.05]}
    metrics = scores_by_both(path, results, ["keypoints"], keypoint_sigmas=sigmas)["keypoints"]
    assert metrics["AP"] == pytest.approx(0.45)
    _, per_class = coco_eval.score_results(path, results, ["keypoints"], keypoint_sigmas=sigmas)
    assert per_class["keypoints"] == pytest.approx({"class 0": 0.6, "class 5": 0.3})


def test_the_files_sigmas_are_used(tmp_path, capsys):
    # As above: category 0 has 0.6 by COCO's mean sigma, category 5 with sigmas 0.05 has 0.3.
    truth, results = two_keypoints(offset=10, category_ids=(5, 0))
    truth["categories"][0]["sigmas"] = [0.05, 0.05]
    path = write(tmp_path, truth)
    assert scores_by_both(path, results, ["keypoints"])["keypoints"]["AP"] == pytest.approx(0.45)
    assert coco_eval.main([str(path), str(write(tmp_path, results, "results.json")), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["keypoints"]["AP"] == pytest.approx(0.45)
    wide = {5: [1.0, 1.0]}  # OKS = exp(−100 / (20,000 · 4)) = 0.9988, above all ten: (0.6 + 1) / 2
    metrics = scores_by_both(path, results, ["keypoints"], keypoint_sigmas=wide)["keypoints"]
    assert metrics["AP"] == pytest.approx(0.8)


@pytest.mark.parametrize("sigmas", [[0.05], [0.05, 0], [0.05, "a"], [0.05, math.nan], 0.05, None])
def test_sigmas_that_are_none_are_refused(tmp_path, sigmas):
    truth, results = two_keypoints(offset=10)
    truth["categories"][0]["sigmas"] = sigmas
    with pytest.raises(
        UserError, match=r"category 1 has sigmas .* must be 2 positive numbers, one a keypoint"
    ):
        coco_eval.score_results(write(tmp_path, truth), results, ["keypoints"])


def test_keypoint_results_are_scored_by_their_own_area_not_their_boxes(tmp_path):
    truth, results = two_keypoints(offset=0)
    # A stray result with a better score: its keypoints span 50×50 (medium), its box 200×200 (large). As medium it is
    # no false positive among the large objects.
    stray = {**results[0], "keypoints": [700.0, 100.0, 1.0, 750.0, 150.0, 1.0], "score": 0.9}
    results = [
        {**stray, "bbox": [650.0, 0.0, 200.0, 200.0]},
        {**results[0], "bbox": [0.0, 0.0, 100.0, 100.0]},
    ]
    metrics = scores_by_both(write(tmp_path, truth), results, ["keypoints"])["keypoints"]
    assert metrics["AP"] == pytest.approx(0.5) and metrics["APl"] == ONE


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_keypoints=st.sampled_from([1, 5, 17]),
    max_results=st.sampled_from([2, 30]),
)
def test_the_evaluators_agree_on_keypoints(tmp_path, seed, num_keypoints, max_results):
    rng = np.random.default_rng(seed)
    truth = {"images": [{"id": n, "height": 300, "width": 300, "file_name": f"{n}.png"} for n in range(3)]}
    names = [f"point {n}" for n in range(num_keypoints)]
    truth["categories"] = [{"id": 1, "name": "person", "keypoints": names}, {"id": 2, "name": "ball"}]
    truth["annotations"], results = [], []
    for image in range(3):
        for _ in range(rng.integers(0, 5)):
            x, y, w, h = (float(v) for v in (*rng.integers(0, 100, 2), *rng.integers(20, 200, 2)))
            visible = rng.integers(0, 3, num_keypoints) * int(rng.random() < 0.8)
            points = np.stack(
                [x + w * rng.random(num_keypoints), y + h * rng.random(num_keypoints), visible], axis=1
            )
            annotation = {"id": len(truth["annotations"]) + 1, "image_id": image, "category_id": 1}
            annotation |= {"bbox": [x, y, w, h], "area": w * h * 0.7, "iscrowd": int(rng.random() < 0.1)}
            annotation |= {
                "keypoints": points.reshape(-1).tolist(),
                "num_keypoints": int((visible > 0).sum()),
            }
            truth["annotations"].append(annotation)
            for _ in range(rng.integers(0, max_results)):
                near = points + rng.normal(0, 8, points.shape) * [1, 1, 0]
                score = float(rng.choice([0.2, 0.5, 0.8]))
                results.append({"image_id": image, "category_id": 1, "keypoints": near.reshape(-1).tolist()})
                results[-1]["score"] = score
        truth["annotations"].append(
            {
                "id": 1000 + image,
                "image_id": image,
                "category_id": 2,
                "bbox": [1, 1, 9, 9],
                "area": 81,
                "iscrowd": 0,
            }
        )
    metrics = scores_by_both(write(tmp_path, truth), results, ["keypoints"])["keypoints"]
    if results:
        truth["annotations"] = [a for a in truth["annotations"] if a["category_id"] == 1]
        truth["categories"] = truth["categories"][:1]
        sigmas = (
            coco_eval.COCO_SIGMAS
            if num_keypoints == 17
            else [sum(coco_eval.COCO_SIGMAS) / 17] * num_keypoints
        )
        assert list(metrics.values()) == pycocotools_stats(truth, results, "keypoints", sigmas)


# --- tables and the command ---------------------------------------------------------------------------------


def test_the_table():
    box = dict(
        zip(
            BOX_NAMES,
            [0.5046, 0.697, 0.573, 0.586, 0.519, -1, 0.3874, 0.594, 0.595, 0.64, 0.566, 0],
            strict=True,
        )
    )
    mask = dict(zip(BOX_NAMES, [0.25] * 11 + [1.0], strict=True))
    keypoints = dict(zip(KEYPOINT_NAMES, [0.5] * 10, strict=True))
    assert coco_eval.format_table({"bbox": box, "segm": mask, "images_per_second": 3.0}) == "\n".join(
        [
            "       IoU        area    detections    box   mask",
            "AP     0.50:0.95  all            100  0.505  0.250",
            "AP50   0.50       all            100  0.697  0.250",
            "AP75   0.75       all            100  0.573  0.250",
            "APs    0.50:0.95  small          100  0.586  0.250",
            "APm    0.50:0.95  medium         100  0.519  0.250",
            "APl    0.50:0.95  large          100    n/a  0.250",
            "AR1    0.50:0.95  all              1  0.387  0.250",
            "AR10   0.50:0.95  all             10  0.594  0.250",
            "AR100  0.50:0.95  all            100  0.595  0.250",
            "ARs    0.50:0.95  small          100  0.640  0.250",
            "ARm    0.50:0.95  medium         100  0.566  0.250",
            "ARl    0.50:0.95  large          100  0.000  1.000",
        ]
    )
    box_block, keypoint_block = coco_eval.format_table({"bbox": box, "keypoints": keypoints}).split("\n\n")
    assert box_block.endswith("ARl    0.50:0.95  large          100  0.000")
    assert keypoint_block.splitlines()[:3] == [
        "      IoU        area    detections  keypoints",
        "AP    0.50:0.95  all             20      0.500",
        "AP50  0.50       all             20      0.500",
    ]
    assert keypoint_block.splitlines()[7] == "AR50  0.50       all             20      0.500"


def test_the_table_of_classes():
    assert coco_eval.format_per_class(
        {"bbox": {"cat": 0.5, "traffic light": -1.0, "dog": 1.0}, "segm": {"cat": 0.25, "dog": 0.0}}
    ) == "\n".join(
        [
            "class            box   mask",
            "cat            0.500  0.250",
            "traffic light    n/a    n/a",
            "dog            1.000  0.000",
        ]
    )


def test_many_classes_stand_side_by_side_in_the_order_of_their_ids():
    names = [f"category no {n:02}" for n in range(80)]  # 14 letters, as COCO's longest has
    per_class = {kind: {name: n / 100 for n, name in enumerate(names)} for kind in ("bbox", "segm")}
    lines = coco_eval.format_per_class(per_class).split("\n")
    # A class takes 14 + 2 + 5 + 2 + 5 = 28 characters, four of them and three gaps 121; five would be too many.
    assert len(lines) == 21
    assert lines[0] == "   ".join(["class             box   mask"] * 4)
    assert lines[1] == "   ".join(
        f"category no {n:02}  {n / 100:.3f}  {n / 100:.3f}" for n in (0, 20, 40, 60)
    )
    odd = {"bbox": dict(list(per_class["bbox"].items())[:43])}
    lines = coco_eval.format_per_class(odd).split(
        "\n"
    )  # 43 classes in five columns: of nine lines the last has four
    assert len(lines) == 10
    assert lines[-1] == "   ".join(f"category no {n:02}  {n / 100:.3f}" for n in (8, 17, 26, 35))


def test_classes_that_share_a_name_are_told_apart(tmp_path):
    truth, result = one_image()
    truth["categories"][1]["name"] = "cat"
    with pytest.warns(UserWarning, match="categories with the name of another"):
        _, per_class = coco_eval.score_results(write(tmp_path, truth), [result], ["bbox"])
    assert per_class == {"bbox": {"cat (1)": -1, "cat (3)": ONE}}


def test_the_command_prints_tables_or_json(tmp_path, capsys):
    truth, result = one_image()
    files = [str(write(tmp_path, truth)), str(write(tmp_path, [result], "results.json"))]
    assert coco_eval.main([*files, "--per-class"]) == 0
    table = capsys.readouterr().out
    assert "AP     0.50:0.95  all            100  1.000  1.000" in table
    assert "cat    1.000  1.000" in table
    assert coco_eval.main([*files, "--iou-type", "segm", "--json", "-"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == ["segm"]
    assert coco_eval.main([*files, "--per-class", "--json", "-"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == ["bbox", "segm", "per_class"]
    assert coco_eval.main([*files, "--json", str(tmp_path / "none" / "metrics.json")]) == 2
    printed, error = capsys.readouterr()
    assert printed == "" and error.startswith("error: ") and "No such file" in error


def test_the_command_scores_an_empty_file(tmp_path, capsys):
    truth, _ = one_image()
    assert (
        coco_eval.main([str(write(tmp_path, truth)), str(write(tmp_path, [], "r.json")), "--json", "-"]) == 0
    )
    assert json.loads(capsys.readouterr().out)["bbox"]["AP"] == 0


RLE = rectangle_rle(10, 10, 10, 10, 100, 100)


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ('[{"image_id": 1,', "is not valid JSON"),
        ({"images": []}, "holds a dict, not a list of results; is it the annotation file"),
        ([3], "result 0 is 3, not an object"),
        ([{"image_id": "1"}], "result 0 has image_id '1', not an integer"),
        ([{"category_id": None}], "result 0 has category_id None, not an integer"),
        ([{"score": "0.5"}], "result 0 has '0.5' where a number must be"),
        ([{"bbox": [1, 2, "3", 4]}], "result 0 has '3' where a number must be"),
        ([{"bbox": 7}], "result 0 has bbox 7, not a list"),
        ([{}, {"score": math.nan}], "result 1 (image 1) has score nan"),
        ([{"image_id": 4}], "results of 1 images that the annotation file does not list (ids 4)"),
        ([{"segmentation": [[1, 2, 3, 4, 5, 6]]}], "no compressed RLE"),
        ([{"segmentation": {"size": [100], "counts": "0"}}], "has an RLE of size [100]"),
        ([{"segmentation": {"size": [10**6, 10**6], "counts": "0"}}], "a frame of 1000000×1000000 pixels"),
        ([{"segmentation": {**RLE, "counts": RLE["counts"][:-2]}}], "result 0 RLE"),
        ([{"segmentation": {**RLE, "counts": RLE["counts"] + "1"}}], "result 0 RLE"),
        ([{"segmentation": {**RLE, "counts": "~é"}}], "result 0 RLE counts hold characters"),
        (
            [{"segmentation": {**RLE, "size": [50, 200]}}],
            "a mask of size [50, 200], but its image is [100, 100]",
        ),
    ],
)
def test_the_command_refuses_broken_results_in_one_line(tmp_path, capsys, results, message):
    truth, result = one_image()
    if isinstance(results, list):
        results = [{**result, **change} if isinstance(change, dict) else change for change in results]
    path = tmp_path / "results.json"
    path.write_text(results if isinstance(results, str) else json.dumps(results))
    assert coco_eval.main([str(write(tmp_path, truth)), str(path)]) == 2
    printed, error = capsys.readouterr()
    assert printed == "" and error.startswith("error: ") and error.count("\n") == 1
    assert message in error


def test_the_command_refuses_broken_annotations_and_missing_files(tmp_path, capsys):
    result = one_image()[1]
    files = [str(tmp_path / "truth.json"), str(write(tmp_path, [result], "results.json"))]
    for change in (  # native code would read or write where it must not
        {"segmentation": [[1e9, 0, 5, 5, 3, 3]]},
        {"segmentation": [[math.nan, 0, 5, 5, 3, 3]]},
        {"segmentation": {"size": [100, 100], "counts": [5, 5]}},
        {"segmentation": {**RLE, "counts": RLE["counts"][:-2]}},
        {"area": "big"},
    ):
        write(tmp_path, one_image(**change)[0])
        assert coco_eval.main(files) == 2
        printed, error = capsys.readouterr()
        assert printed == "" and error.count("\n") == 1
        assert error.startswith(f"error: {files[0]}: annotation 1 (image 1) has ")
    assert coco_eval.main([str(tmp_path / "none.json"), files[1]]) == 2
    assert coco_eval.main([files[0], str(tmp_path / "none.json")]) == 2
    assert (
        f"error: {tmp_path / 'none.json'}: No such file or directory; check the path\n"
        in capsys.readouterr().err
    )


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    counts=st.one_of(
        st.text(max_size=12), st.text(st.characters(min_codepoint=48, max_codepoint=111), max_size=12)
    ),
    size=st.one_of(st.just([2, 3]), st.lists(st.integers(-3, 2**40), max_size=3)),
)
def test_no_rle_crashes_the_interpreter(tmp_path, counts, size):
    truth, result = one_image()
    for image in truth["images"]:
        image.update(height=2, width=3)
    truth["annotations"] = []
    result["segmentation"] = {"size": size, "counts": counts}
    path, results = write(tmp_path, truth), write(tmp_path, [result], "results.json")
    for evaluator in EVALUATORS:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            assert coco_eval.main(
                [str(path), str(results), "--iou-type", "segm", "--evaluator", evaluator]
            ) in (0, 2)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=6,
)


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    change=st.dictionaries(
        st.sampled_from(["image_id", "category_id", "score", "bbox", "segmentation", "keypoints"]),
        JSON | st.lists(st.floats(width=32) | st.integers(-(10**25), 10**25), min_size=4, max_size=4),
        min_size=1,
    ),
    whole=st.none() | JSON,
)
@pytest.mark.filterwarnings("ignore:.*results of categories")
def test_no_results_file_crashes_the_command(tmp_path, change, whole):
    truth, result = one_image()
    path = write(tmp_path, truth)
    results = write(tmp_path, [result, {**result, **change}] if whole is None else whole, "results.json")
    for evaluator in EVALUATORS:
        with contextlib.redirect_stderr(io.StringIO()) as told, contextlib.redirect_stdout(io.StringIO()):
            status = coco_eval.main([str(path), str(results), "--evaluator", evaluator])
        assert (status, told.getvalue()[:7]) in ((0, ""), (2, "error: "))
