import json

import pytest
import torch
from test_engine import CPU, Batches, make_state

import profiling
from engine import train_one_epoch


def profile(tmp_path, num_steps, **changes):
    """What a run of so many steps of a tiny detector says about itself."""
    state, said = make_state(), []
    state.model.backbone = torch.nn.Identity()  # the stage whose input tells the padded size
    forward = state.model.forward

    def run_stages(images, targets=None):
        state.model.backbone(torch.stack(images))
        return forward(images, targets)

    state.model.forward = run_stages
    hint = {"workers": 1, "amp": False, "compiled": False, **changes}
    profiler = profiling.StepProfiler(state.model, CPU, tmp_path / "profile", said.append, hint)
    train_one_epoch(state, Batches([[1.0, 2.0]] * num_steps), device=CPU, mark=profiler)
    profiler.close()
    return said


def test_a_run_is_watched_once_and_told_where_its_time_goes(tmp_path):
    findings, verdict, trace = profile(tmp_path, 20)
    assert findings.startswith("a step takes ")
    lines = [line.split() for line in findings.splitlines()[1:]]
    assert [line[0] for line in lines[:2]] == ["data", "copy"]
    assert {"backbone", "backward", "optimizer"} <= {line[0] for line in lines}
    assert sum(float(line[-1].removesuffix("%")) for line in lines) == pytest.approx(100, abs=0.5)
    assert verdict.split(":")[0] in ("data-bound", "compute-bound")
    events = json.loads((tmp_path / "profile" / "trace.json").read_text())["traceEvents"]
    assert any("backward" in event.get("name", "").lower() for event in events)
    assert trace == f"trace: {tmp_path / 'profile' / 'trace.json'}"


def test_a_run_that_is_too_short_says_so(tmp_path):
    # On a CPU: 3 to warm up, 5 plain, 1 traced, 3 in parts.
    assert profile(tmp_path, 11) == ["--profile needs 12 steps; this run had 11"]
    assert len(profile(tmp_path, 12)) == 3


def test_the_hooks_are_gone_afterwards(tmp_path):
    state = make_state()
    state.model.backbone = torch.nn.Identity()
    profiler = profiling.StepProfiler(state.model, CPU, tmp_path, print, {})
    profiler.start_parts()
    assert state.model._forward_pre_hooks and state.model.backbone._forward_hooks
    profiler.probe.__exit__()
    assert not state.model._forward_pre_hooks and not state.model.backbone._forward_hooks


@pytest.mark.parametrize(
    ("intervals", "length"),
    [([], 0), ([(1, 3)], 2), ([(1, 3), (2, 5)], 4), ([(6, 7), (1, 3), (1, 2)], 3), ([(0, 9), (2, 3)], 9)],
)
def test_covered_counts_overlaps_once(intervals, length):
    assert profiling.covered(intervals) == length


@pytest.mark.parametrize(
    ("waiting", "busy", "amp", "compiled", "start", "flag"),
    [
        (0.3, None, True, False, "data-bound", "--workers 8"),
        (0.3, 0.5, True, True, "data-bound", "--workers 8"),
        (0.02, 0.6, True, False, "sync-bound", "--compile reduce-overhead"),
        (0.02, 0.6, True, True, "sync-bound", "--batch-size"),
        (0.02, 0.95, False, False, "compute-bound", "--amp"),
        (0.02, 0.95, True, False, "compute-bound", "--compile"),
        (0.02, 0.95, True, True, "compute-bound", "are on"),
        (0.02, None, False, False, "compute-bound", "--amp"),
        (0.02, None, True, False, "compute-bound", "are on"),
    ],
)
def test_the_verdict_names_the_bound_and_a_flag(waiting, busy, amp, compiled, start, flag):
    text = profiling.verdict(waiting, busy, workers=4, amp=amp, compiled=compiled)
    assert text.startswith(start) and flag in text
