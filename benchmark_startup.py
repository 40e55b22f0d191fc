"""`benchmark.py startup`: the first batch of a data set of COCO's size, and what its workers hold later."""

import statistics
from pathlib import Path

import benchmark_fake_data
from benchmark_processes import Arm, Arms, TreeMemory, rotated
from benchmark_report import between, ratio, spread, times
from benchmark_setup import data_set, opponents, workload


def run_startup(args, report, folder):
    """From a fresh process to the first batch of a set of COCO's size, and what its workers hold later."""
    source = data_set(args, folder, 128)
    data = benchmark_fake_data.repeat_coco(*source, folder / "repeated", args.images)
    size = Path(data[1]).stat().st_size
    report.progress(f"{args.images:,} images, an annotation file of {size / 1e6:,.0f} MB")
    names = ["ours", *opponents(args, ("torchvision",))]
    work = {**workload(args, data, batch_size=args.batch_size), "device": "cpu"}
    Path(data[1]).read_bytes()  # into the page cache, for whoever comes first
    rounds = {name: [] for name in names}
    for number_of_round in range(args.rounds):
        for name in rotated(names, number_of_round):
            rounds[name].append(start_once(name, work))
        report.progress(f"round {number_of_round + 1} of {args.rounds}")
    # Once more for the memory: to look at a process's pages stops it for a while.
    watched = {name: start_once(name, work, watch=True) for name in names}
    report.keep("rounds", {"timed": rounds, "watched": watched})
    seconds = {name: [answer["seconds"] for answer in answers] for name, answers in rounds.items()}
    peak = {name: answer["tree_mb"] for name, answer in watched.items()}
    own = {name: peak[name] - answer["imports_mb"] for name, answer in watched.items()}
    rows = [
        [
            name,
            statistics.median(seconds[name]),
            between(spread(seconds[name])),
            times(ratio(seconds[name], seconds["ours"])),
            peak[name],
            peak[name] / peak["ours"],
            own[name],
            own[name] / own["ours"],
        ]
        for name in rounds
    ]
    columns = ["arm", "s to the first batch", "range", "time ÷ ours, rounds / medians", "peak MB", "÷ ours"]
    columns += ["beyond imports MB", "÷ ours"]
    report.table(f"Start-up with {args.images:,} images, in a fresh process after its imports", columns, rows)
    if args.watch_batches > 0:
        watch_workers(args, report, names, {**work, "workers": args.workers})


def start_once(name, work, watch=False):
    """One fresh process up to its first batch: StartupArm.result; watched, also "tree_mb", peak with its helpers."""
    arm = Arm(name)
    memory = TreeMemory(arm.process.pid) if watch else None
    try:
        arm.start("startup", work)
        result = arm.ask("result")
        return {**result, "tree_mb": max(memory.stop(), result["host_mb"])} if watch else result
    finally:
        arm.close()


def watch_workers(args, report, names, work):
    """Unique memory of the loader's workers as batches go by."""
    seen = {}
    for name in names:
        with Arms(report) as arms:
            arms.open("startup", name, work)
            seen[name] = arms.ask(name, "watch_workers", num_batches=args.watch_batches)
    report.keep("workers", seen)
    rows = []
    for name, looks in seen.items():
        if looks:
            first, *_, last = [statistics.fmean(memory) for memory in looks["unique_mb"]]
            most = max(b - a for a, b in zip(looks["unique_mb"][0], looks["unique_mb"][-1], strict=True))
            rows.append([name, f"{looks['batches'][0]}–{looks['batches'][-1]}", first, last, most])
    columns = ["arm", "batches", "mean MB a worker at first", "at last", "most that one grew"]
    report.table(f"Unique memory of {args.workers} workers", columns, rows)
