"""`benchmark.py eval`: forward passes in evaluation, images to results, and what follows the forward pass."""

import statistics

import torch

import benchmark_fake_data
import utils
from benchmark_processes import Arms
from benchmark_report import ratio, times
from benchmark_setup import data_set, opponents, workload, write_weights
from benchmark_train import part_table


def run_eval(args, report, folder):
    """Forward passes in evaluation, images to results, and what follows the forward pass on made-up detections."""
    data = data_set(args, folder, 2 * max(args.batch_sizes) * args.num_batches)
    peers = opponents(args, ("torchvision",))
    if args.num_batches > 0:
        measure_forward(args, report, folder, data, peers)
    if args.detections_images > 0:
        measure_after_forward(args, report, folder, data, peers)


def measure_forward(args, report, folder, data, peers):
    """Tables of forward passes for each batch size and, with a checkpoint, the metrics that each arm reaches."""
    work = workload(args, data, num_batches=args.num_batches)
    path = folder / "weights.pth"
    work = write_weights(args, work, path, checkpoint=args.checkpoint, confident=True)
    bf16 = utils.amp_dtype("auto", torch.device(args.device)) is not None
    with Arms(report) as arms:
        for name in ["ours", *["ours-fp32"] * bf16, *peers]:
            arms.open("eval", name, work)
        for batch_size in args.batch_sizes:
            arms.ask_all("choose", batch_size=batch_size)
            arms.ask_all("forward", batches=args.warmup)
            forward = arms.take_turns(args.rounds, lambda n: arms.all_do("forward", batches=args.steps))
            results = arms.take_turns(args.rounds, lambda n: arms.all_do("results", batches=args.steps))
            breakdown = arms.ask_all("breakdown", batches=args.breakdown_steps)
            memory = arms.ask_all("memory")
            found = {"forward": forward, "results": results, "breakdown": breakdown, "memory": memory}
            report.keep(f"batch {batch_size}", found)
            forward_table(report, args, batch_size, found)
        if args.checkpoint:
            arms.open("eval", "ours-reference-ops-fp32", work)
            scores = arms.ask_all("score", batch_size=args.batch_sizes[-1])
            report.keep("scores", scores)
            rows = [
                [f"{kind} {metric}", *(f"{arm[kind][metric]:.5f}" for arm in scores.values())]
                for kind in next(iter(scores.values()), {})
                for metric in ("AP", "AP50", "AP75")
            ]
            report.table(f"Metrics of {args.checkpoint}", ["", *scores], rows)


def forward_table(report, args, batch_size, found):
    seconds = {
        kind: {name: [t["seconds"] / t["images"] for t in turns] for name, turns in found[kind].items()}
        for kind in ("forward", "results")
    }
    rows = []
    for name in found["memory"]:
        forward, results = seconds["forward"][name], seconds["results"][name]
        rows.append(
            [
                name,
                1 / statistics.median(forward),
                times(ratio(forward, seconds["forward"]["ours"])),
                1 / statistics.median(results),
                times(ratio(results, seconds["results"]["ours"])),
                statistics.fmean(turn["detections"] for turn in found["forward"][name]),
                found["memory"][name].get("device_mb", found["memory"][name]["host_mb"]),
            ]
        )
    columns = [
        "arm",
        "forward img/s",
        "time ÷ ours",
        "to results img/s",
        "time ÷ ours",
        "detections/img",
        "peak MB",
    ]
    title = f"Evaluation, batch {batch_size} ({args.min_size}/{args.max_size}, {args.threads} threads, {args.device})"
    report.table(title, columns, rows)
    measured = {name: {"breakdown": parts} for name, parts in found["breakdown"].items()}
    title = "Where an image's forward pass goes, ms (torchvision pastes masks after its stages)"
    part_table(report, title, measured)


def measure_after_forward(args, report, folder, data, peers):
    """Paste, encode, gather and score made-up detections; the 24 numbers must be equal."""
    repeated = benchmark_fake_data.repeat_coco(*data, folder / "repeated", args.detections_images)
    work = workload(args, repeated)
    count = -(-args.detections_images // args.rounds)
    with Arms(report) as arms:
        for name in ["ours", *peers]:
            arms.open("after", name, work)
        encoding = arms.take_turns(args.rounds, lambda n: arms.all_do("turn", first=n * count, count=count))
        scoring = arms.ask_all("score")
        memory = arms.ask_all("memory")
    report.keep("after the forward pass", {"encoding": encoding, "scoring": scoring, "memory": memory})
    paste = {name: sum(turn["seconds"] for turn in encoding[name]) for name in scoring}
    total = {name: paste[name] + scoring[name]["seconds"] for name in scoring}
    own = {name: held["host_mb"] - held["base_mb"] for name, held in memory.items()}
    rows = [
        [
            name,
            paste[name],
            scoring[name]["seconds"],
            total[name],
            total[name] / total["ours"],
            memory[name]["host_mb"],
            own[name],
            own[name] / own["ours"] if own["ours"] else None,  # few detections fit what imports left free
        ]
        for name in memory
    ]
    columns = ["arm", "paste, encode, collect s", "score s", "all s", "÷ ours", "peak MB"]
    columns += ["beyond the start MB", "÷ ours"]
    title = (
        f"After the forward pass: {args.detections_images} images of 100 detections, {args.threads} threads"
    )
    report.table(title, columns, rows)
    if "torchvision" in scoring:
        mine, theirs = scoring["ours"]["metrics"], scoring["torchvision"]["metrics"]
        equal = sum(mine[kind][name] == theirs[kind][name] for kind in theirs for name in theirs[kind])
        report.note(f"{equal} of the {sum(map(len, theirs.values()))} numbers are equal to the last bit")
        report.complete &= mine == theirs
