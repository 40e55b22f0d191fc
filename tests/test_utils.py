import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.multiprocessing

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


def agree_on_rank(rank, folder):
    """Run by two processes: what each learns from the other."""
    places = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in places.items()})
    *_, local_world = utils.init_distributed("cpu", f"file://{folder / 'rendezvous'}")
    utils.divide_threads(local_world)
    utils.barrier()
    learnt = {
        "mean": utils.all_reduce_mean(torch.tensor([float(rank), 4.0])).tolist(),
        "any": [utils.any_rank(rank == 1), utils.any_rank(False)],
        "votes": utils.votes(rank == 0, False, rank == 1),
        "json": utils.broadcast_json({"from": rank, "text": "é"}),
        "empty": utils.broadcast_json(None),
        "threads": torch.get_num_threads(),
    }
    torch.distributed.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps(learnt))


def test_ranks_agree(tmp_path):
    # Forked, as loader workers are: two fresh interpreters would import torch for ten seconds.
    torch.multiprocessing.start_processes(agree_on_rank, (tmp_path,), nprocs=2, start_method="fork")
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    # Ranks 0 and 1 give 0 and 1: the mean is 0.5. Both see rank 0's json and that rank 1 voted yes.
    assert first == second
    assert first["mean"] == [0.5, 4.0]
    assert first["any"] == [True, False]
    assert first["votes"] == [True, False, True]
    assert first["json"] == {"from": 0, "text": "é"}
    assert first["empty"] is None
    assert first["threads"] == max(1, utils.available_cpus() // 2)


@pytest.mark.slow
def test_second_processes_meet_apart_from_the_ranks(tmp_path):
    """Each rank's second process joins a group of their own while the ranks' own collectives go on."""
    script = """
        import json, multiprocessing, torch, utils

        def second(meeting, pipe):
            utils.join_meeting(**meeting)
            pipe.send((utils.get_rank(), utils.all_reduce_mean(torch.tensor([10.0 * utils.get_rank()])).tolist()))

        if __name__ == "__main__":
            rank, *_ = utils.init_distributed("cpu", sys.argv[1])
            store, meeting = utils.open_meeting(sys.argv[1])
            pipe, theirs = multiprocessing.Pipe()
            process = multiprocessing.get_context("spawn").Process(target=second, args=(meeting, theirs))
            process.start()
            means = [utils.all_reduce_mean(torch.tensor([float(rank)])).tolist() for _ in range(50)]
            got = pipe.recv()
            process.join()
            utils.barrier()  # rank 0 keeps the store until all have met
            print(json.dumps([means[-1], got]))
            torch.distributed.destroy_process_group()
    """
    first, second = (json.loads(out) for out in run_ranks(script, 2, tmp_path))
    assert first == [[0.5], [0, [5.0]]] and second == [[0.5], [1, [5.0]]]


def test_one_rank_has_nobody_to_meet():
    store, meeting = utils.open_meeting("env://")
    assert store is None
    utils.join_meeting(**meeting)
    assert not utils.is_distributed()


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


def test_own_randomness_leaves_the_stream_as_it_was():
    cpu = torch.device("cpu")
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    begun = torch.rand(2)
    with utils.own_randomness(7, cpu):
        inside = torch.rand(2)
    with utils.own_randomness(7, cpu):
        assert torch.equal(torch.rand(2), inside)
    assert torch.equal(torch.cat([begun, torch.rand(2)]), expected)


def test_a_folder_in_use_is_refused_until_its_run_has_ended_or_died(tmp_path):
    script = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import utils
with utils.only_run_in(sys.argv[1]):
    print("locked", flush=True)
    time.sleep(600)
"""
    holder = subprocess.Popen([sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "locked\n"
        expected = rf"{tmp_path}: another run is at work there \(process {holder.pid} on .* since .*\); .* --output-dir"
        with pytest.raises(UserError, match=expected), utils.only_run_in(tmp_path):
            pass
    finally:
        holder.kill()  # as a crash would: nothing is cleaned up
        holder.wait()
    for _ in range(2):
        with utils.only_run_in(tmp_path):
            assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")


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
