import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import utils
from utils import UserError

ROOT = Path(__file__).parents[1]


def run_ranks(script, num_ranks, tmp_path):
    """Run `script` in num_ranks processes that meet over loopback; returns their outputs in rank order."""
    path = tmp_path / "ranks.py"
    path.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + textwrap.dedent(script))
    rendezvous = tmp_path / "rendezvous"
    ranks = []
    for rank in range(num_ranks):
        env = os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_WORLD_SIZE": str(num_ranks),
        }
        ranks.append(
            subprocess.Popen(
                [sys.executable, str(path), f"file://{rendezvous}"],
                env=env | {"LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    for rank, (_, err) in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, err
    return [out for out, _ in outputs]


def test_ranks_agree(tmp_path):
    script = """
        import json, torch, utils
        rank, world, _, local_world = utils.init_distributed("cpu", sys.argv[1])
        utils.divide_threads(local_world)
        utils.barrier()
        print(json.dumps({
            "mean": utils.all_reduce_mean(torch.tensor([float(rank), 4.0])).tolist(),
            "any": [utils.any_rank(rank == 1), utils.any_rank(False)],
            "json": utils.broadcast_json({"from": rank, "text": "é"}),
            "empty": utils.broadcast_json(None),
            "threads": torch.get_num_threads(),
        }))
        torch.distributed.destroy_process_group()
    """
    first, second = (json.loads(out) for out in run_ranks(script, 2, tmp_path))
    # Ranks 0 and 1 give 0 and 1: the mean is 0.5. Both see rank 0's json and that rank 1 voted yes.
    assert first == second
    assert first["mean"] == [0.5, 4.0]
    assert first["any"] == [True, False]
    assert first["json"] == {"from": 0, "text": "é"}
    assert first["empty"] is None
    assert first["threads"] == max(1, utils.available_cpus() // 2)


def test_one_process_needs_no_group():
    assert utils.init_distributed("cpu") == (0, 1, 0, 1)
    assert utils.all_reduce_mean(torch.tensor([3.0])).tolist() == [3.0]
    assert utils.broadcast_json([1]) == [1]
    assert utils.any_rank(True) and not utils.any_rank(False)
    utils.barrier()


def test_ranks_without_a_launcher_are_refused():
    with pytest.raises(UserError, match="torchrun --nproc-per-node 2"):
        utils.init_distributed("cpu", world_size=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_refused():
    assert utils.select_device(None) == torch.device("cpu")
    with pytest.raises(UserError, match="torch sees no GPU here"):
        utils.select_device("cuda")


def test_amp_dtype():
    cpu = torch.device("cpu")
    assert utils.amp_dtype("bf16", cpu) is torch.bfloat16
    assert utils.amp_dtype("fp16", cpu) is torch.float16
    assert utils.amp_dtype("auto", cpu) in (torch.bfloat16, None)


def test_seeds_differ_by_rank_and_repeat():
    utils.seed_everything(3, rank=0)
    first = torch.rand(2)
    utils.seed_everything(3, rank=1)
    assert not torch.equal(first, torch.rand(2))
    utils.seed_everything(3, rank=0)
    assert torch.equal(first, torch.rand(2))


def test_rng_state_round_trip():
    cpu = torch.device("cpu")
    state = utils.rng_state(cpu)
    first = torch.rand(3)
    utils.set_rng_state(state, cpu)
    assert torch.equal(first, torch.rand(3))


def test_an_output_dir_that_cannot_be_written_is_refused(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match="choose a folder"):
        utils.prepare_output_dir(file)
    with pytest.raises(UserError, match="choose a folder"):
        utils.prepare_output_dir(file / "below")
    assert utils.prepare_output_dir(tmp_path / "a" / "b").is_dir()
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_write_json_replaces_whole_files(tmp_path):
    path = tmp_path / "x.json"
    utils.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        utils.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["x.json"]


def test_environment_is_jsonable():
    facts = utils.describe_environment(torch.device("cpu"))
    assert json.loads(json.dumps(facts))["torch"] == torch.__version__


@pytest.mark.parametrize(("seconds", "text"), [(12.3, "12 s"), (75, "1:15"), (3700, "1:01:40"), (-1, "0 s")])
def test_format_duration(seconds, text):
    assert utils.format_duration(seconds) == text


def test_memory_is_counted():
    assert utils.peak_memory_mb(torch.device("cpu")) > 10
