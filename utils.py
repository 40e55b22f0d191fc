"""Ranks, devices, seeds and the small files of a run: what every front door needs around a model."""

import contextlib
import ctypes
import errno
import json
import os
import platform
import random
import subprocess
import sys
import time
import urllib.parse
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist


class UserError(ValueError):
    """A mistake that the user can mend; a front door prints it as one `error: …` line and exits with 2."""


# --- ranks ---------------------------------------------------------------------------------------


def init_distributed(device_type, dist_url="env://", world_size=1, timeout_seconds=1800):
    """Join the process group that torchrun, `torch.distributed.launch` or Slurm described.

    device_type: "cuda" or "cpu". The group carries CPU tensors over gloo and, on GPUs, CUDA tensors
    over NCCL. Without a launcher's environment, and with world_size 1, nothing is started.
    Returns (rank, world_size, local_rank, local_world_size).
    Raises UserError if the group cannot form, or if this machine has fewer GPUs than ranks.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        rank, world_size = int(env["RANK"]), int(env["WORLD_SIZE"])
        local_rank = int(env.get("LOCAL_RANK", 0))
        local_world_size = int(env.get("LOCAL_WORLD_SIZE", 1))
    elif "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", 1)) > 1:
        rank, world_size = int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"])
        local_rank = int(env.get("SLURM_LOCALID", 0))
        local_world_size = int(env.get("SLURM_NTASKS_PER_NODE", max(1, torch.cuda.device_count())))
    elif world_size > 1:
        raise UserError(
            f"--world-size {world_size}: no launcher set RANK and WORLD_SIZE; "
            f"start it with `torchrun --nproc-per-node {world_size} train.py …`"
        )
    else:
        return 0, 1, 0, 1
    if device_type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"rank {rank} wants GPU {local_rank}, but this machine has {torch.cuda.device_count()}; "
                "lower --nproc-per-node, or pass --device cpu"
            )
        torch.cuda.set_device(local_rank)
    try:
        dist.init_process_group(
            backend="cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo",
            init_method=dist_url,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_seconds),
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise UserError(
            f"rank {rank} cannot join the process group at {dist_url}: {str(error).splitlines()[0]}; "
            "on one machine `torchrun --standalone` picks a free port"
        ) from error
    return rank, world_size, local_rank, local_world_size


def is_distributed():
    return dist.is_available() and dist.is_initialized()


def get_rank():
    return dist.get_rank() if is_distributed() else 0


def get_world_size():
    return dist.get_world_size() if is_distributed() else 1


def is_main_process():
    return get_rank() == 0


def barrier():
    if is_distributed():
        dist.all_reduce(torch.zeros(1))  # over gloo: the CPU waits, the GPU's queue is left alone


def all_reduce_mean(values):
    """The mean over ranks of a 1-D float tensor, on its own device; the tensor itself with one rank."""
    if get_world_size() > 1:
        dist.all_reduce(values)
        values /= get_world_size()
    return values


def votes(*flags):
    """For each flag whether it is true on at least one rank; the same on every rank."""
    if get_world_size() == 1:
        return [bool(flag) for flag in flags]
    votes = torch.tensor([int(flag) for flag in flags])
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return votes.bool().tolist()


def any_rank(flag):
    """True on every rank if `flag` is true on at least one."""
    return votes(flag)[0]


def broadcast_json(value):
    """Rank 0's JSON-able value, on every rank. JSON, never a pickle."""
    if get_world_size() == 1:
        return value
    payload = json.dumps(value).encode() if is_main_process() else b""
    size = torch.tensor([len(payload)])
    dist.broadcast(size, src=0)
    data = torch.empty(int(size), dtype=torch.uint8)
    if is_main_process():
        data = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    dist.broadcast(data, src=0)
    return json.loads(data.numpy().tobytes())


def open_meeting(dist_url):
    """Make a place where a second process beside each rank can form a group of their own.

    dist_url: where the ranks have met. All ranks call. Returns (store, meeting): the place stays open as long as rank 0
    keeps the store; each rank gives its meeting, plain values, to its second process for join_meeting.
    """
    meeting = {"rank": get_rank(), "world_size": get_world_size(), "host": None, "port": None}
    if meeting["world_size"] == 1:
        return None, meeting
    store = None
    if is_main_process():
        host = urllib.parse.urlparse(dist_url).hostname or os.environ.get("MASTER_ADDR", "localhost")
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        meeting |= {"host": host, "port": store.port}
    place = broadcast_json({name: meeting[name] for name in ("host", "port")})
    return store, meeting | place


def join_meeting(rank, world_size, host, port, timeout_seconds=1800):
    """Join the group of second processes, over gloo; the arguments are one rank's meeting, see open_meeting."""
    if world_size > 1:
        store = dist.TCPStore(host, port, is_master=False)
        timeout = timedelta(seconds=timeout_seconds)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)


@contextlib.contextmanager
def main_process_first():
    """Rank 0 runs the block before the others enter it: for work whose result is cached on disk."""
    if not is_main_process():
        barrier()
    try:
        yield
    finally:
        if is_main_process():
            barrier()


# --- devices and processors ------------------------------------------------------------------------


def select_device(name, local_rank=0):
    """`name` ("cuda", "cuda:1", "cpu", or None: a GPU where there is one) as a torch.device."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch sees no GPU here; pass --device cpu, or leave the flag out")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", local_rank)
    return device


def available_cpus():
    """The processors that this process may use: its affinity and its container's quota respected."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cpus = min(cpus, max(1, round(int(quota) / int(period))))
    return cpus


def divide_threads(local_world_size):
    """Give this rank its share of the machine's processors (torchrun's default is one thread a rank)."""
    torch.set_num_threads(max(1, available_cpus() // local_world_size))


def keep_freed_memory():
    """Have glibc keep freed blocks instead of returning them to the kernel after each tensor.

    A training step on the CPU frees and allocates the same hundreds of megabytes; each fresh page costs
    a fault and a zeroing (BENCHMARKS.md has what this buys). Other C libraries are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    libc = ctypes.CDLL(None)
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, -1)  # never


def cpu_has_fast_bf16():
    """Whether this processor multiplies bfloat16 in hardware (AVX512-BF16, AMX, or Arm's BF16)."""
    with contextlib.suppress(OSError):
        flags = Path("/proc/cpuinfo").read_text()
        return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16"))
    return False


def amp_dtype(choice, device):
    """The autocast dtype for --amp-dtype `choice` on `device`, or None where AMP would only cost.

    auto: bfloat16 where the hardware multiplies it, else float16 on a GPU and nothing on a CPU.
    """
    if choice != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16}[choice]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.bfloat16 if cpu_has_fast_bf16() else None


def peak_memory_mb(device):
    """Most memory held so far: the GPU allocator's peak, or this process's resident peak. MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


# --- randomness --------------------------------------------------------------------------------------


def seed_everything(seed, rank=0):
    """Seed every generator of this process; ranks differ, so that they do not sample the same anchors."""
    random.seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)


def rng_state(device):
    """This process's torch generators as tensors, for the checkpoint."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state, device):
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


@contextlib.contextmanager
def own_randomness(seed, device):
    """Within the block torch's generators start from `seed`; afterwards they go on as if it had not been."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


# --- the files of a run --------------------------------------------------------------------------------


def prepare_output_dir(path):
    """Make the output folder; raises UserError, before any data is read, if nothing can be written there."""
    path = Path(path)
    probe = path / f".write-test-{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"--output-dir {path}: {error.strerror}; choose a folder that can be written"
        ) from error
    return path


@contextlib.contextmanager
def only_run_in(path):
    """Within the block no other process runs in the folder `path`; what is left of one that crashed is no hindrance.

    The lock is the kernel's, on `path`/.lock, and ends with the process; the file says whose it is. Raises UserError if
    another process holds it. Where the file system knows no locks, nothing is locked.
    """
    import fcntl  # not on Windows

    with open(Path(path) / ".lock", "a+") as file:
        try:
            # A POSIX lock: unlike flock's, it does not live on in the loader's workers when this process is killed.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                raise UserError(
                    f"{path}: another run is at work there ({file.read().strip()}); wait for its end, or give this one "
                    "another --output-dir"
                ) from None
        else:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()} since {time.strftime('%F %T')}\n")
            file.flush()
        yield


def describe_environment(device):
    """Versions, hardware and commit, as JSON-able facts for config.json and for bug reports."""
    import torchvision

    def git(*command):
        here = Path(__file__).parent
        out = subprocess.run(["git", *command], cwd=here, capture_output=True, text=True, check=False)
        return out.stdout.strip() if out.returncode == 0 else None

    processor = platform.processor()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processor": processor,
        "processors": available_cpus(),
        "world_size": get_world_size(),
        "commit": git("rev-parse", "HEAD"),
        "modified": bool(git("status", "--porcelain")),
    }


def write_json(path, value):
    """Write `value` as JSON so that a reader never meets half a file."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(value, indent=2) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def format_duration(seconds):
    """12.3 -> "12 s", 75 -> "1:15", 3 700 -> "1:01:40"."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    hours, rest = divmod(seconds, 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
