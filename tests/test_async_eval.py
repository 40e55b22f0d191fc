import os
import signal
import time
from pathlib import Path

import pytest
import torch

from async_eval import AsyncEvaluation, EvaluationError
from utils import UserError


def open_summing(folder, meeting):
    """An evaluator whose report is the sum of the weights. It waits for a file that the test makes, and can fail."""
    (Path(folder) / "opened").open("a").write("x")
    assert meeting["world_size"] == 1

    def evaluate(weights):
        total = float(weights["w"].sum())
        if total == 1:
            raise UserError("image 7 is broken; replace it")
        if total == 2:
            raise ZeroDivisionError("on purpose")
        if total == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        while not (Path(folder) / "go").exists():
            time.sleep(0.01)
        return {"sum": total, "seed": torch.initial_seed()}

    return evaluate


def weights(total):
    return {"w": torch.tensor([float(total)])}


def test_training_goes_on_while_a_snapshot_is_evaluated(tmp_path):
    beside = AsyncEvaluation(open_summing, "env://", folder=str(tmp_path))
    try:
        assert beside.collect() is None and beside.collect(wait=True) is None  # nothing was started
        w, before = weights(10), torch.get_rng_state()
        beside.start(w, {"step": 4})
        w["w"].add_(1)  # training moves the weights; the snapshot stays
        assert beside.collect() is None  # the evaluation cannot be done: it waits for the file
        (tmp_path / "go").touch()
        record, report = beside.collect(wait=True)
        assert (record, report["sum"]) == ({"step": 4}, 10)
        assert beside.collect() is None and beside.pending is None
        assert torch.equal(torch.get_rng_state(), before)

        beside.start(weights(11), {"step": 5})
        assert beside.collect(wait=True)[1]["sum"] == 11
        assert (tmp_path / "opened").read_text() == "x"  # once for both

        beside.start(weights(1), {"step": 6})
        with pytest.raises(
            EvaluationError, match="evaluation of step 6 failed: image 7 is broken; replace it"
        ):
            beside.collect(wait=True)
        beside.start(weights(2), {"step": 7})
        with pytest.raises(
            EvaluationError, match=r"(?s)step 7 failed: Traceback.*ZeroDivisionError: on purpose"
        ):
            beside.collect(wait=True)
        beside.start(weights(3), {"step": 8})
        with pytest.raises(EvaluationError, match="step 8 failed: its process was killed"):
            beside.collect(wait=True)
    finally:
        beside.close()


def test_closing_ends_an_evaluation_that_runs(tmp_path):
    beside = AsyncEvaluation(open_summing, "env://", folder=str(tmp_path))
    beside.start(weights(10), {"step": 1})  # without the file it would never end
    process = beside.side.process
    beside.close()
    assert not process.is_alive()
    beside.close()
