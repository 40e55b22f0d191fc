import math

import pytest
import torch
from torch import nn

from optim import Ema, LrSchedule, build_optimizer, default_lr, parameter_groups


def small_model():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def test_default_lr_scales_with_the_images_of_a_step():
    # 0.02 at 16 images: 2 images are an eighth of them.
    assert default_lr("sgd", 16) == pytest.approx(0.02)
    assert default_lr("sgd", 2) == pytest.approx(0.0025)


def test_parameter_groups_keep_norm_layers_apart_and_frozen_ones_out():
    model = small_model()
    model[0].weight.requires_grad_(False)
    other, norm = parameter_groups(model, 0.1, norm_weight_decay=0.0)
    assert [p.shape for p in norm["params"]] == [(4,), (4,)]
    assert norm["weight_decay"] == 0.0 and other["weight_decay"] == 0.1
    assert len(other["params"]) == 3  # two biases and the second weight
    (together,) = parameter_groups(model, 0.1)
    assert len(together["params"]) == 5


@pytest.mark.parametrize("opt", ["sgd", "sgd_nesterov", "adamw"])
def test_a_blocked_update_leaves_the_weights_alone(opt):
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = build_optimizer(opt, [{"params": [weight], "weight_decay": 0.0}], lr=0.1, momentum=0.9)
    weight.grad = torch.full((2,), math.nan)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert weight.tolist() == [1.0, 2.0]
    optimizer.found_inf = torch.zeros(())
    weight.grad = torch.ones(2)
    optimizer.step()
    assert weight.tolist() != [1.0, 2.0]


def test_warmup_then_steps():
    schedule = LrSchedule(
        "multisteplr", 100, milestones=[50, 80], gamma=0.1, warmup_steps=10, warmup_factor=0.1
    )
    # Linear from 0.1 to 1 over ten steps: at step 5 halfway, 0.55.
    assert schedule.factor(0) == pytest.approx(0.1)
    assert schedule.factor(5) == pytest.approx(0.55)
    assert [schedule.factor(s) for s in (10, 49)] == [1, 1]
    assert schedule.factor(50) == pytest.approx(0.1)
    assert schedule.factor(80) == pytest.approx(0.01)


def test_cosine_ends_at_zero():
    schedule = LrSchedule("cosineannealinglr", 100)
    assert schedule.factor(0) == 1
    assert schedule.factor(50) == pytest.approx(0.5)
    assert schedule.factor(100) == pytest.approx(0)


def test_schedule_depends_on_the_step_alone():
    weight = nn.Parameter(torch.ones(1))
    schedule = LrSchedule("multisteplr", 10, milestones=[5])
    optimizer = build_optimizer("sgd", [{"params": [weight]}], lr=0.4, momentum=0)
    for step in (0, 7, 3):
        assert schedule.apply(optimizer, step) == pytest.approx(0.4 * schedule.factor(step))


def test_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="use multisteplr or cosineannealinglr"):
        LrSchedule("step", 10)


def test_ema_averages_swaps_and_restores():
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.0)
    ema = Ema(model, decay=0.9)
    with torch.no_grad():
        model.weight.fill_(1.0)
    ema.update()
    # After one update the decay is min(0.9, 2 / 11); the average moves from 0 by 1 - 2/11 = 9/11.
    with ema.applied():
        assert model.weight.item() == pytest.approx(9 / 11)
    assert model.weight.item() == 1.0
    other = Ema(model, decay=0.9)
    other.load_state_dict(ema.state_dict())
    with other.applied():
        assert model.weight.item() == pytest.approx(9 / 11)


def test_ema_off_is_a_no_op():
    model = small_model()
    ema = Ema(model, decay=0.0)
    before = [p.clone() for p in model.parameters()]
    ema.update()
    with ema.applied():
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
