import json

import cv2
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import figures
from run_log import RunLog, short_name

RECORD = {
    "step": 10, "epoch": 1, "losses": {"loss_mask": 0.5, "loss_box_reg": 0.25}, "lr": 0.02, "grad_norm": 1.0,
    "images_per_second": 4.0, "batch_seconds": 0.5, "data_seconds": 0.01, "memory_mb": 2048.0,
}  # fmt: skip


@pytest.fixture
def log(tmp_path):
    log = RunLog(tmp_path, total_steps=100)
    yield log
    log.close()


def test_a_line_says_loss_rate_speed_time_and_memory(log, capsys):
    log.train(RECORD)
    line = capsys.readouterr().out
    for part in (
        "step 10/100",
        "loss 0.750",
        "mask 0.500",
        "box 0.250",
        "lr 0.02",
        "4.0 img/s",
        "eta",
        "2.0 GiB",
    ):
        assert part in line


def test_metrics_are_appended_as_json_lines(log, tmp_path):
    record = {"epoch": 0, "step": 10, "train": {"lr": 0.02}, "eval": None}
    log.epoch(record)
    log.epoch({**record, "epoch": 1, "eval": {"bbox": {"AP": 0.5}, "images_per_second": 3.0}})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0] == record
    assert lines[1]["eval"]["bbox"]["AP"] == 0.5


def test_tensorboard_has_the_scalars_under_their_steps(log, tmp_path):
    log.train(RECORD)
    log.epoch({"epoch": 0, "step": 10, "train": {}, "eval": {"bbox": {"AP": 0.5}, "images_per_second": 3.0}})
    log.close()
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss_mask")] == [(10, 0.5)]
    assert [(e.step, e.value) for e in events.Scalars("eval_bbox/AP")] == [(10, 0.5)]


def test_a_picture_goes_to_tensorboard_as_it_looks(log, tmp_path):
    picture = np.zeros((4, 5, 3), np.uint8)
    picture[..., 0] = 255  # red
    figures.write(tmp_path / "x.png", picture)
    log.picture("x", tmp_path / "x.png", 7)
    log.close()
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    (image,) = events.Images("x")
    decoded = cv2.imdecode(np.frombuffer(image.encoded_image_string, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    assert image.step == 7 and np.array_equal(decoded, picture)


def test_the_pace_is_the_median_of_the_records(log):
    for batch_seconds, data_seconds in (
        (9.0, 8.0),
        (0.5, 0.1),
        (0.4, 0.2),
    ):  # the first one waited for workers to start
        log.train({**RECORD, "batch_seconds": batch_seconds, "data_seconds": data_seconds})
    assert log.pace() == (0.5, 0.2)


def test_other_ranks_are_silent(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("run_log.is_main_process", lambda: False)
    log = RunLog(tmp_path, total_steps=100)
    log.say("x")
    log.train(RECORD)
    log.epoch({"epoch": 0, "step": 1, "train": {}, "eval": None})
    log.close()
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_short_names():
    assert [short_name(n) for n in ("loss_rpn_box_reg", "loss_classifier")] == ["rpn_box", "classifier"]
