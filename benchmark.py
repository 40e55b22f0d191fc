"""Speed, measured: our way and others' taking turns in one run on the same images and weights.

python3 benchmark.py train --data-path DIR --against torchvision,detectron2     a training step, its parts, its ceiling
python3 benchmark.py eval --data-path DIR --against torchvision                 forward passes, and what follows them
python3 benchmark.py data --data-path DIR --against torchvision                 samples and batches, on one core
python3 benchmark.py startup --data-path DIR --against torchvision              the first batch at COCO's size
python3 benchmark.py gpu --json FILE                                            all that needs a GPU, in ten minutes

Every arm is a process of its own. They work one after another, a short turn each, round after round, so that what else
the machine does hits all alike; compare within a run, never across. --use-fake-data needs no data set.
"""

import argparse
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

import benchmark_data
import coco_utils
import utils
from benchmark_arms import VARIANTS
from benchmark_processes import Arm, ArmError, Arms, TreeMemory, rotated
from benchmark_report import Report, between, number, ratio, spread, times
from instruments import attainable_seconds, largest, total_flops
from utils import UserError

TRAIN_ARMS = (*VARIANTS, "torchvision", "torchvision-amp", "detectron2")
TIMED_PRODUCTS = 6  # of the forward pass, and as many of the backward pass: the dominant ones
DATA_STAGES = {
    "target": "decode, mirror, targets",
    "batch": "resized, normalised, padded batch",
    "lsj": "large-scale jitter",
    "copypaste": "large-scale jitter, copy-paste",
}
COMPILED = ("ours-compiled", "ours-graphs")
GPU_WARMUP, GPU_ROUNDS, GPU_STEPS = 30, 3, 40


# --- what is measured on ----------------------------------------------------------------------------------


def data_set(args, folder, num_images):
    """(image folder, annotation file) of --data-path, or of so many made-up images in the folder."""
    root = args.data_path
    if root is None:
        root = benchmark_data.write_fake_coco(folder / "fake", num_images, seed=args.seed)
    return coco_utils.dataset_paths(root)["train"]


def workload(args, data, **changes):
    """benchmark_arms.Workload as a dict."""
    images, annotations = data
    names = ("model", "backbone", "min_size", "max_size", "threads", "seed", "device")
    common = {name: getattr(args, name) for name in names}
    return {"images": str(images), "annotations": str(annotations), **common, **changes}


def write_weights(args, work, path, **settings):
    """Have the starting weights of all arms written; returns the workload that names them."""
    arm = Arm("weights")
    try:
        arm.start("weights", {**work, "device": "cpu"}, path=str(path), **settings)
    finally:
        arm.close()
    return {**work, "weights": str(path)}


def opponents(args, known):
    """The names in --against that this command can measure; the others are refused."""
    wanted = [name for name in (args.against or "").split(",") if name]
    for name in wanted:
        if name not in known:
            raise UserError(f"--against {name}: {args.benchmark} knows {', '.join(known)}")
    return wanted


# --- train ------------------------------------------------------------------------------------------------


def train_arms(args):
    """The arms of `train`: those of --arms, or ours and the opponents'."""
    if args.arms:
        names = args.arms.split(",")
        for name in names:
            if name not in TRAIN_ARMS:
                raise UserError(f"--arms {name}: choose from {', '.join(TRAIN_ARMS)}")
        return names
    names = ["ours"]
    if utils.amp_dtype("auto", torch.device(args.device)) is not None:
        names.append("ours-fp32")
    for peer in opponents(args, ("torchvision", "detectron2")):
        names.append(peer)
        if peer == "torchvision" and args.device.startswith("cuda"):
            names.append("torchvision-amp")
    return names


def run_train(args, report, folder):
    """One training step: its time against others', its losses, its parts and its ceiling."""
    names = train_arms(args)
    data = data_set(args, folder, args.batch_size * args.num_batches)
    work = workload(args, data, batch_size=args.batch_size, num_batches=args.num_batches)
    work = write_weights(args, work, folder / "weights.pth", checkpoint=args.checkpoint)
    work["workers"] = args.workers if args.with_loader else None
    with Arms(report) as arms:
        for name in names:
            arms.open("train", name, work)
            report.progress(f"{name} is open")
        precision = arms.ask_all("precision")
        losses = arms.ask_all("trace", steps=1)
        arms.ask_all("turn", steps=args.warmup)
        products = {name: arms.ask(name, "products") for name in ("ours", "ours-fp32")}
        products = {name: found for name, found in products.items() if found}
        turns = {name: ("turn", {"steps": args.steps}) for name in arms.running}
        if products:
            chosen = {name: largest(found, TIMED_PRODUCTS) for name, found in products.items()}
            arms.open("ceiling", "ceiling", work, products=chosen)
            turns["ceiling"] = ("turn", {})
        rounds = arms.take_turns(args.rounds, lambda n: turns)
        rates = rounds.pop("ceiling", [])
        arms.close("ceiling")
        memory = arms.ask_all("memory")
        breakdown = arms.ask_all("breakdown", steps=args.breakdown_steps)
    measured = {
        name: {
            "precision": precision[name],
            "first_losses": losses[name][0],
            "rounds": rounds[name],
            "memory": memory.get(name, {}),
            "breakdown": breakdown.get(name),
        }
        for name in rounds
    }
    report.keep("arms", measured)
    where = f"batch {args.batch_size}, {args.min_size}/{args.max_size}, {args.threads} threads, {args.device}"
    step_table(report, f"Training step ({where})", measured)
    loss_table(report, "Losses of the first step: the same weights and images, own random samples", measured)
    part_table(report, "Where a step's time goes, ms (run apart from the above)", measured)
    if rates:
        ceilings = {name: ceiling(products[name], chosen[name], rates, name) for name in products}
        report.keep("ceilings", ceilings)
        ceiling_table(report, ceilings, measured)


def step_table(report, title, measured):
    """Seconds, images per second, ratios and memory of train arms, a row each."""
    seconds = {name: [turn["seconds"] for turn in arm["rounds"]] for name, arm in measured.items()}
    bases = [name for name in ("ours", "ours-fp32") if name in measured]
    rows = []
    for name, arm in measured.items():
        own, parts = spread(seconds[name]), arm["breakdown"] or {}
        images = statistics.fmean(turn["images"] for turn in arm["rounds"])
        rows.append(
            [
                f"{name} ({arm['precision']})",
                own["median"],
                between(own),
                images / own["median"],
                *(times(ratio(seconds[name], seconds[base])) for base in bases),
                arm["memory"].get("device_mb", arm["memory"].get("host_mb")),
                parts.get("padded_pixels"),
                parts.get("positives"),
            ]
        )
    columns = ["arm", "s/step", "range", "img/s", *(f"time ÷ {base}, rounds / medians" for base in bases)]
    report.table(title, [*columns, "peak MB", "padded pixels/img", "positives/img"], rows)


def loss_table(report, title, measured):
    """The first step's losses side by side; detectron2 names its own differently, so rows are their union."""
    names = list(dict.fromkeys(term for arm in measured.values() for term in arm["first_losses"]))
    rows = [[term, *(arm["first_losses"].get(term) for arm in measured.values())] for term in names]
    rows.append(["sum", *(sum(arm["first_losses"].values()) for arm in measured.values())])
    report.table(title, ["loss", *measured], rows)


def part_table(report, title, measured):
    """Milliseconds of each part of a step, and its share."""
    parts = {name: arm["breakdown"]["seconds"] for name, arm in measured.items() if arm["breakdown"]}
    names = list(dict.fromkeys(part for seconds in parts.values() for part in seconds))
    totals = {name: sum(seconds.values()) for name, seconds in parts.items()}

    def cell(name, part):
        seconds = parts[name].get(part)
        return None if seconds is None else f"{number(1e3 * seconds)} ({seconds / totals[name]:.0%})"

    rows = [[part, *(cell(name, part) for name in parts)] for part in names]
    report.table(title, ["part", *parts], [*rows, ["all", *(1e3 * total for total in totals.values())]])


def ceiling(products, chosen, rates, name):
    """What the step's products would take at the rates measured for the largest of them (medians over the rounds)."""
    rate = {
        phase: statistics.median(turn[name][phase] for turn in rates)
        for phase in ("forward", "backward")
        if phase in rates[0][name]
    }
    return {
        "flops": {phase: total_flops(products, phase) for phase in rate},
        "rate": rate,
        "covered": total_flops(chosen) / total_flops(products),
        "attainable_seconds": attainable_seconds(products, rate),
        "products": chosen,
    }


def ceiling_table(report, ceilings, measured):
    """FLOPs of a step, the measured rate of its largest products, and the share of it that the step reaches."""
    rows = []
    for name, found in ceilings.items():
        if name not in measured:
            continue
        seconds = statistics.median(turn["seconds"] for turn in measured[name]["rounds"])
        rows.append(
            [
                name,
                *(f"{number(found['flops'][phase] / 1e9)}" for phase in ("forward", "backward")),
                *(f"{number(found['rate'][phase] / 1e9)}" for phase in ("forward", "backward")),
                f"{found['covered']:.0%}",
                found["attainable_seconds"],
                seconds,
                f"{found['attainable_seconds'] / seconds:.0%}",
            ]
        )
    columns = ["arm", "forward GFLOP", "backward GFLOP", "forward GFLOP/s", "backward GFLOP/s", "timed share"]
    title = "Ceiling: a step's convolutions and products at the rates of its largest ones, each timed alone"
    report.table(title, [*columns, "attainable s", "measured s", "share of ceiling"], rows)


# --- eval -------------------------------------------------------------------------------------------------


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
    repeated = benchmark_data.repeat_coco(*data, folder / "repeated", args.detections_images)
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
            own[name] / own["ours"],
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


# --- data -------------------------------------------------------------------------------------------------


def run_data(args, report, folder):
    """Images per second of one core: decode and targets, ready batches, large-scale jitter."""
    data = data_set(args, folder, args.images)
    peers = opponents(args, ("torchvision",))
    measured = {}
    for stage in DATA_STAGES:
        work = {**workload(args, data, batch_size=args.batch_size), "device": "cpu"}
        with Arms(report) as arms:
            for name in ["ours", *peers]:
                arms.open("data", name, work, stage=stage)
            arms.ask_all("turn", first=0, count=args.batch_size)
            rounds = arms.take_turns(
                args.rounds, lambda n: arms.all_do("turn", first=n * args.images, count=args.images)
            )
            measured[stage] = {"rounds": rounds, "memory": arms.ask_all("memory")}
        report.keep(stage, measured[stage])
    rows = []
    for stage, found in measured.items():
        seconds = {
            name: [t["seconds"] / t["images"] for t in found["rounds"][name]] for name in found["memory"]
        }
        for name, own in seconds.items():
            rates = spread([1 / value for value in own])
            row = [DATA_STAGES[stage], name, rates["median"], between(rates)]
            rows.append([*row, times(ratio(own, seconds["ours"])), found["memory"][name]["host_mb"]])
    columns = ["up to", "arm", "img/s per core", "range", "time ÷ ours, rounds / medians", "peak MB"]
    report.table("Data, one thread", columns, rows)


# --- startup ----------------------------------------------------------------------------------------------


def run_startup(args, report, folder):
    """From a fresh process to the first batch of a set of COCO's size, and what its workers hold later."""
    source = data_set(args, folder, 128)
    data = benchmark_data.repeat_coco(*source, folder / "repeated", args.images)
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
    report.keep("rounds", rounds)
    seconds = {name: [answer["seconds"] for answer in answers] for name, answers in rounds.items()}
    peak = {name: max(answer["tree_mb"] for answer in answers) for name, answers in rounds.items()}
    own = {name: peak[name] - answers[0]["imports_mb"] for name, answers in rounds.items()}
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


def start_once(name, work):
    """One fresh process up to its first batch: StartupArm.result and "tree_mb", the peak with its helper processes."""
    arm = Arm(name)
    watch = TreeMemory(arm.process.pid)
    try:
        arm.start("startup", work)
        result = arm.ask("result")
        return {**result, "tree_mb": max(watch.stop(), result["host_mb"])}
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


# --- gpu --------------------------------------------------------------------------------------------------


class GpuCase(NamedTuple):
    """One line of the GPU protocol, named ARM/BATCH SIZE/IMAGES."""

    arm: str
    batch_size: int
    images: str  # "fixed": every batch is padded to 800×1344; "mixed": COCO's shapes; "loader": those, really loaded
    again: bool = False

    def __str__(self):
        return f"{self.arm}/{self.batch_size}/{self.images}{'/again' * self.again}"

    @property
    def is_traced(self):
        """Whether the losses of its first steps are kept: ours and torchvision's on the same batches."""
        return self.arm in ("ours", "torchvision") and self.batch_size == 2 and self.images == "fixed"


# Most telling first: when the time is up, the rest is left out. The ladder is the ours-… arms at batch 16.
GPU_CASES = (
    GpuCase("torchvision-amp", 16, "fixed"),
    GpuCase("ours", 16, "fixed"),
    GpuCase("ours", 2, "fixed"),
    GpuCase("torchvision-amp", 2, "fixed"),
    GpuCase("torchvision", 2, "fixed"),
    GpuCase("ours", 12, "loader"),
    GpuCase("ours-compiled", 16, "fixed"),
    GpuCase("ours-graphs", 2, "fixed"),
    GpuCase("ours-graphs", 16, "fixed"),
    GpuCase("ours-dense-rpn", 16, "fixed"),
    GpuCase("ours-folded", 16, "fixed"),
    GpuCase("ours-reference-ops", 16, "fixed"),
    GpuCase("ours", 4, "fixed"),
    GpuCase("ours", 16, "mixed"),
    GpuCase("ours", 32, "fixed"),
    GpuCase("torchvision-amp", 16, "fixed", again=True),
)
FIXED_SIZE = ((480, 806, 1),)  # resized to 793×1333, padded to 800×1344
TRACE_STEPS = 20
SMOKE = {"backbone": "resnet18", "min_size": 64, "max_size": 96}


def run_gpu(args, report, folder):
    """The GPU protocol within a budget: ceilings, torchvision's loop, ours with more and more on, evaluation."""
    cuda = args.device.startswith("cuda")
    if args.smoke:
        vars(args).update(SMOKE)
    num_images = 4 if args.smoke else 64
    fixed = benchmark_data.write_fake_coco(folder / "fixed", num_images, sizes=FIXED_SIZE, seed=args.seed)
    data = {
        "fixed": coco_utils.dataset_paths(fixed)["train"],
        "mixed": data_set(args, folder, 2 * num_images),
    }
    data["loader"] = data["mixed"]
    weights = folder / "weights.pth"
    write_weights(args, workload(args, data["fixed"]), weights, confident=True)
    report.keep("clocks before", gpu_state(cuda))
    measure_device(args, report, workload(args, data["fixed"]))

    cases = gpu_cases(args, cuda)
    measured, products = {}, None
    deadline = report.started + args.budget_seconds
    for place, case in enumerate(cases):
        left = deadline - time.perf_counter()
        if left < 0:
            report.note(f"{case}: left out, {args.budget_seconds} s were over")
            continue
        work = workload(args, data[case.images], weights=str(weights), batch_size=case.batch_size)
        work["num_batches"] = max(1, num_images // case.batch_size)
        work["workers"] = args.workers if case.images == "loader" else None
        with Arms(report, essential=None) as arms:
            report.progress(f"{case}: {left:.0f} s left")
            found = measure_case(args, arms, case, work, left / (len(cases) - place + 1))
            if found is None:
                continue
            measured[str(case)] = found
            report.keep(str(case), found)
            if case.arm == "ours" and products is None:
                products = arms.ask("ours", "products")
    gpu_table(report, measured)
    trace_table(report, measured)
    part_table(report, "Where a step's time goes, ms (run apart from the above)", measured)
    if products:
        measure_ceiling(args, report, workload(args, data["fixed"]), products, measured)
    measure_gpu_evaluation(args, report, {**workload(args, data["mixed"]), "weights": str(weights)})
    report.keep("clocks after", gpu_state(cuda))


def gpu_cases(args, cuda):
    """The cases to run, in order: those of --cases, or all. Without a GPU torchvision has no --amp."""
    cases = [case._replace(batch_size=min(case.batch_size, 2)) if args.smoke else case for case in GPU_CASES]
    if not cuda:
        cases = [case._replace(arm=case.arm.replace("-amp", "")) for case in cases]
    by_name = {str(case): case for case in cases}
    chosen = args.cases.split(",") if args.cases else list(by_name)
    for name in chosen:
        if name not in by_name:
            raise UserError(f"--cases {name}: choose from {', '.join(by_name)}")
    return [by_name[name] for name in chosen]


def plan_steps(seconds, step_seconds, warmup, timed):
    """(warm-up steps, timed steps of a round): as many of those wanted as fit into `seconds`, at least one each.

    timed: steps of each of the GPU_ROUNDS rounds.
    """
    share = min(1.0, seconds / (step_seconds * (warmup + GPU_ROUNDS * timed)))
    return max(1, int(warmup * share)), max(1, int(timed * share))


def measure_case(args, arms, case, work, seconds):
    """Trace, warm up and time one arm in about `seconds`; None where it cannot."""
    started = time.perf_counter()
    arms.open("train", case.arm, work)

    def ask(call, **arguments):
        return arms.ask(case.arm, call, **arguments)

    begun = time.perf_counter()
    losses = ask("trace", steps=1)  # compiles, and chooses algorithms
    first_seconds = time.perf_counter() - begun
    if losses and case.is_traced:
        losses += ask("trace", steps=2 if args.smoke else TRACE_STEPS - 1)
    trial = ask("turn", steps=1 if args.smoke else 3)
    if case.arm not in arms.running:
        return None
    warmup, timed = (1, 1) if args.smoke else (GPU_WARMUP, GPU_STEPS)
    left = seconds - (time.perf_counter() - started)
    warmup, timed = plan_steps(max(0.0, left), trial["seconds"], warmup, timed)
    ask("turn", steps=warmup)
    graphs = ask("compiled_graphs")
    rounds = [ask("turn", steps=timed) for _ in range(GPU_ROUNDS)]
    if case.arm not in arms.running:
        return None
    return {
        "precision": ask("precision"),
        "first_step_seconds": first_seconds,
        "trace": losses,
        "warmup_steps": warmup,
        "timed_steps": timed,
        "rounds": rounds,
        "recompiles": ask("compiled_graphs") - graphs,
        "memory": ask("memory"),
        "syncs": ask("count_syncs") if args.device.startswith("cuda") else None,
        # Hooks would be compiled too, again.
        "breakdown": None if case.arm in COMPILED else ask("breakdown", steps=1 if args.smoke else 5),
    }


def gpu_table(report, measured):
    """A row for each case; the last columns say what moved the throughput beside the code."""
    peers = [name for name in measured if name.startswith("torchvision")]
    base = next((name for name in peers if "/16/" in name), peers[0] if peers else None)
    rates = {
        name: [turn["images"] / turn["seconds"] for turn in found["rounds"]]
        for name, found in measured.items()
    }
    rows = []
    for name, found in measured.items():
        milliseconds = spread([1e3 * turn["seconds"] for turn in found["rounds"]])
        parts = found["breakdown"] or {}
        rate = statistics.median(rates[name])
        rows.append(
            [
                f"{name} ({found['precision']})",
                milliseconds["median"],
                between(milliseconds),
                rate,
                rate / statistics.median(rates[base]) if base else None,
                found["first_step_seconds"],
                found["recompiles"],
                found["syncs"],
                found["memory"].get("device_mb", found["memory"]["host_mb"]),
                parts.get("padded_pixels"),
                parts.get("positives"),
            ]
        )
    columns = ["arm/batch/images", "ms/step", "range", "img/s", f"÷ {base or 'torchvision'}", "first step s"]
    columns += ["recompiles", "syncs/step", "peak MB", "padded pixels/img", "positives/img"]
    report.table("Training steps", columns, rows)


def trace_table(report, measured):
    """The sum of the losses at some of the first steps, of ours beside torchvision's."""
    traces = {name: found["trace"] for name, found in measured.items() if len(found["trace"]) > 1}
    if not traces:
        return
    length = min(map(len, traces.values()))
    rows = [
        [f"{step + 1}", *(sum(trace[step].values()) for trace in traces.values())]
        for step in sorted({0, length // 2, length - 1})
    ]
    title = "Sum of the losses by step: the same weights and images, own random samples"
    report.table(title, ["step", *traces], rows)


def gpu_state(cuda):
    """Clocks, power and temperature as nvidia-smi tells them; None without a GPU."""
    if not cuda:
        return None
    fields = "name,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return dict(zip(fields.split(","), answer.stdout.strip().split(", "), strict=False))


def measure_device(args, report, work):
    """The ceilings that any program has here: a large product, a large copy."""
    with Arms(report, essential=None) as arms:
        arms.open("ceiling", "ceiling", work, products={})
        side, megabytes = (256, 8) if args.smoke else (8192, 2048)
        found = arms.ask("ceiling", "device_ceilings", side=side, megabytes=megabytes)
    report.keep("device", found)
    if found:
        rows = [[found["dtype"], found["product_flops"] / 1e12, found["copy_bytes"] / 1e12]]
        columns = ["dtype", f"{side}³ product TFLOP/s", f"{megabytes} MB copy TB/s"]
        report.table("Ceilings of the device", columns, rows)


def measure_ceiling(args, report, work, products, measured):
    """The share of the ceiling that our first measured case reaches."""
    case, found = next((name, found) for name, found in measured.items() if name.startswith("ours/"))
    chosen = largest(products, TIMED_PRODUCTS)
    with Arms(report) as arms:
        arms.open("ceiling", "ceiling", work, products={case: chosen})
        rates = arms.take_turns(GPU_ROUNDS, lambda n: arms.all_do("turn")).get("ceiling")
    if rates:
        ceilings = {case: ceiling(products, chosen, rates, case)}
        report.keep("ceilings", ceilings)
        ceiling_table(report, ceilings, {case: found})


def measure_gpu_evaluation(args, report, work):
    """Images to COCO results, 128 of them."""
    batch_size, num_batches = (1, 2) if args.smoke else (8, 16)
    measured = {}
    for name in ("ours", "torchvision"):
        with Arms(report, essential=None) as arms:
            arms.open("eval", name, {**work, "num_batches": num_batches})
            arms.ask(name, "choose", batch_size=batch_size)
            arms.ask(name, "results", batches=1)
            found = arms.ask(name, "results", batches=num_batches)
            if found:
                measured[name] = {**found, "memory": arms.ask(name, "memory")}
    report.keep("evaluation", measured)
    rows = [
        [
            name,
            found["images"] / found["seconds"],
            found["memory"].get("device_mb", found["memory"]["host_mb"]),
        ]
        for name, found in measured.items()
    ]
    report.table(f"Evaluation, batch {batch_size}: images to results", ["arm", "img/s", "peak MB"], rows)


# --- the command line -------------------------------------------------------------------------------------


def parse_args(argv=None):
    description, _, epilog = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="benchmark", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--data-path", help="folder in COCO 2017's layout; its train part is measured on")
    common.add_argument(
        "--use-fake-data", action="store_true", help="made-up images of COCO's shapes instead"
    )
    common.add_argument("--against", help="comma-separated opponents: torchvision, for train also detectron2")
    common.add_argument("--model", default="maskrcnn_resnet50_fpn", help="a torchvision detection builder")
    common.add_argument("--backbone", help="another torchvision classifier under the FPN")
    common.add_argument("--min-size", type=int, default=800, help="pixels (default: 800)")
    common.add_argument("--max-size", type=int, default=1333, help="pixels (default: 1333)")
    common.add_argument("--device", help="cuda or cpu (default: a GPU where there is one)")
    common.add_argument(
        "--threads", type=int, default=utils.available_cpus(), help="of each arm (default: all)"
    )
    common.add_argument(
        "--seed", type=int, default=0, help="of weights, batches and made-up data (default: 0)"
    )
    common.add_argument("--json", metavar="FILE", help="keep everything there, written as it is found")
    common.add_argument("--markdown", action="store_true", help="print the tables as BENCHMARKS.md has them")

    train = commands.add_parser("train", parents=[common], help="one training step")
    train.add_argument("-b", "--batch-size", type=int, default=2, help="images a step (default: 2)")
    train.add_argument("--steps", type=int, default=1, help="steps a turn (default: 1)")
    train.add_argument("--arms", help=f"exactly these, comma-separated, instead: {', '.join(TRAIN_ARMS)}")
    train.add_argument(
        "--with-loader", action="store_true", help="batches from a real loader, not from memory"
    )
    train.add_argument("--workers", type=int, default=1, help="of that loader (default: 1)")

    evaluate = commands.add_parser("eval", parents=[common], help="evaluation")
    evaluate.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4], help="default: 1 4")
    evaluate.add_argument("--steps", type=int, default=2, help="batches a turn (default: 2)")
    evaluate.add_argument(
        "--detections-images", type=int, default=200,
        help="images of 100 made-up detections to paste, encode and score; 0: none (default: 200)",
    )  # fmt: skip

    for command in (train, evaluate):
        command.add_argument(
            "--warmup", type=int, default=1, help="turns' worth of steps before (default: 1)"
        )
        command.add_argument(
            "--num-batches", type=int, default=8,
            help="different batches, gone through again and again; eval: 0 for no forward passes (default: 8)",
        )  # fmt: skip
        command.add_argument("--breakdown-steps", type=int, default=2, help="for the parts (default: 2)")
        command.add_argument("--checkpoint", help="its weights instead of random ones; eval scores them too")

    data = commands.add_parser("data", parents=[common], help="samples and batches on one core")
    data.add_argument("-b", "--batch-size", type=int, default=2, help="images a batch (default: 2)")
    data.add_argument("--images", type=int, default=64, help="images a turn (default: 64)")

    startup = commands.add_parser("startup", parents=[common], help="the first batch at COCO's size")
    startup.add_argument("-b", "--batch-size", type=int, default=2, help="images a batch (default: 2)")
    startup.add_argument(
        "--images", type=int, default=benchmark_data.FULL_SIZE, help="of the set (default: %(default)s)"
    )
    startup.add_argument("--workers", type=int, default=4, help="whose memory is watched (default: 4)")
    startup.add_argument("--watch-batches", type=int, default=2000, help="so long; 0: not (default: 2000)")

    for command, rounds in ((train, 5), (evaluate, 5), (data, 5), (startup, 3)):
        command.add_argument("--rounds", type=int, default=rounds, help=f"default: {rounds}")

    gpu = commands.add_parser("gpu", parents=[common], help="the GPU protocol")
    gpu.add_argument("--budget-seconds", type=float, default=540, help="to be done in (default: 540)")
    gpu.add_argument("--cases", help="exactly these, comma-separated, by the names in the report")
    gpu.add_argument("--workers", type=int, default=12, help="of the loader case (default: 12)")
    gpu.add_argument(
        "--smoke", action="store_true", help="the small form: tiny model and images, single steps"
    )

    args = parser.parse_args(argv)
    if args.data_path and args.use_fake_data:
        parser.error("--data-path and --use-fake-data contradict each other")
    if not args.data_path and not args.use_fake_data and args.benchmark != "gpu":
        parser.error("what to measure on? --data-path DIR, or --use-fake-data")
    return args


COMMANDS = {"train": run_train, "eval": run_eval, "data": run_data, "startup": run_startup, "gpu": run_gpu}


def main(argv=None):
    """Run one benchmark. Returns the exit status: 0, 1 if an arm failed, 2 after a user's mistake."""
    args = parse_args(argv)
    try:
        args.device = str(utils.select_device(args.device))
        command = "python3 benchmark.py " + shlex.join(sys.argv[1:] if argv is None else argv)
        report = Report(args, command)
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            COMMANDS[args.benchmark](args, report, Path(folder))
        return report.finish()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ArmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
