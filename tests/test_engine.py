import math

import pytest
import torch
from torch import nn

from engine import LossWindow, NonFiniteLossError, Stopped, TrainState, predict, train_one_epoch
from optim import Ema, LrSchedule, build_optimizer


class TinyDetector(nn.Module):
    """One weight; the losses of a batch are (w - mean of the images)^2 and a constant. Detects one box an image."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, images, targets=None):
        if not self.training:
            return [
                {
                    "boxes": torch.tensor([[0.0, 0, 2, 2]]),
                    "labels": torch.tensor([2]),
                    "scores": torch.tensor([float(image.float().mean())]),
                }
                for image in images
            ]
        means = torch.stack([image.float().mean() for image in images])
        return {"a": ((self.w - means) ** 2).mean(), "b": self.w.sum() * 0 + 1.0}


class Batches(list):
    """A loader of fixed batches that knows the length of a whole epoch, as DataLoader's batch sampler does."""

    def __init__(self, values, batch_sampler=None):
        batches = [
            ([torch.full((3, 4, 4), v) for v in row], [{"image_id": 10 * i + j} for j in range(len(row))])
            for i, row in enumerate(values)
        ]
        super().__init__(batches)
        self.batch_sampler = batch_sampler or values


def make_state(lr=0.1):
    model = TinyDetector()
    groups = [{"params": list(model.parameters()), "initial_lr": lr}]
    optimizer = build_optimizer("sgd", groups, lr=lr, momentum=0.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return TrainState(model, optimizer, LrSchedule("multisteplr", 100), scaler, Ema(model, 0.0))


CPU = torch.device("cpu")


def test_a_step_is_one_update():
    state = make_state()
    metrics = train_one_epoch(state, Batches([[1.0], [2.0]]), device=CPU)
    # w: 0 -> 0 - 0.1 * 2 (0 - 1) = 0.2 -> 0.2 - 0.1 * 2 (0.2 - 2) = 0.56; losses 1 and 3.24.
    assert state.model.w.item() == pytest.approx(0.56)
    assert (state.step, state.batch) == (2, 2)
    assert metrics["losses"] == pytest.approx({"a": (1 + 3.24) / 2, "b": 1.0})
    assert metrics["lr"] == pytest.approx(0.1)


def test_accumulation_equals_one_large_batch_and_the_last_window_may_be_short():
    state = make_state()
    train_one_epoch(state, Batches([[1.0], [3.0], [5.0]]), device=CPU, accum_steps=2)
    # First window: mean gradient 2 (0 - 2) = -4, w = 0.4. Last window, one batch: 2 (0.4 - 5) = -9.2, w = 1.32.
    assert state.model.w.item() == pytest.approx(1.32)
    assert state.step == 2


def test_resuming_inside_an_epoch_keeps_the_windows():
    values = [[1.0], [3.0], [5.0]]
    state = make_state()
    state.batch = 2
    train_one_epoch(state, Batches(values[2:], batch_sampler=values), device=CPU, accum_steps=2)
    # Only the last, short window is left: w = 0 - 0.1 * 2 (0 - 5) = 1.
    assert state.model.w.item() == pytest.approx(1.0)
    assert (state.step, state.batch) == (1, 3)


def test_total_steps_end_the_epoch():
    state = make_state()
    train_one_epoch(state, Batches([[1.0]] * 5), device=CPU, total_steps=3)
    assert (state.step, state.batch) == (3, 3)


def test_gradients_are_clipped():
    state = make_state()
    train_one_epoch(state, Batches([[100.0]]), device=CPU, clip_grad_norm=0.5)
    assert state.model.w.item() == pytest.approx(0.05, rel=1e-4)  # 0.1 * 0.5 instead of 0.1 * 200


def test_records_come_every_print_freq_steps_and_at_the_end():
    records = []
    train_one_epoch(make_state(), Batches([[1.0]] * 5), device=CPU, print_freq=2, on_log=records.append)
    assert [record["step"] for record in records] == [2, 4, 5]
    assert records[0]["losses"]["a"] == pytest.approx((1 + 0.64) / 2)  # (0 - 1)^2 and (0.2 - 1)^2
    assert all(record["images_per_second"] > 0 for record in records)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_loss_stops_before_the_update(bad):
    state = make_state()
    with pytest.raises(NonFiniteLossError, match=r"step 1: a (nan|inf) on images \[10, 11\]"):
        train_one_epoch(state, Batches([[1.0], [1.0, bad], [1.0], [1.0]]), device=CPU, print_freq=20)
    # Only step 0 moved the weight; the steps after the bad one were left out as well.
    assert state.model.w.item() == pytest.approx(0.2)


def test_a_stop_is_taken_at_a_step_boundary():
    state = make_state()
    with pytest.raises(Stopped):
        train_one_epoch(
            state, Batches([[1.0]] * 6), device=CPU, accum_steps=2, should_stop=lambda: state.step == 2
        )
    assert (state.step, state.batch) == (2, 4)


def test_ema_and_schedule_move_with_the_step():
    state = make_state()
    state.ema = Ema(state.model, 0.5)
    state.schedule = LrSchedule("multisteplr", 2, milestones=[1], gamma=0.1)
    train_one_epoch(state, Batches([[1.0], [1.0]]), device=CPU)
    # w: 0.2, then 0.2 + 0.01 * 2 * 0.8 = 0.216.
    assert state.model.w.item() == pytest.approx(0.216)
    assert state.ema.num_updates == 2


def test_loss_window_averages_and_empties():
    window = LossWindow()
    window.add({"a": torch.tensor(1.0)}, [1], 0)
    window.add({"a": torch.tensor(3.0)}, [2], 1)
    assert window.read() == ({"a": 2.0}, 2)
    assert window.values == []


def test_predict_keeps_image_order_and_maps_labels():
    batches = Batches([[1.0, 2.0], [3.0]])
    results = predict(TinyDetector(), batches, device=CPU, category_ids=[7, 90])
    assert [(found.image_id, *found.category_ids, *found.scores) for found in results] == [
        (0, 90, 1),
        (1, 90, 2),
        (10, 90, 3),
    ]
    assert results[0].boxes.tolist() == [[0, 0, 2, 2]]
