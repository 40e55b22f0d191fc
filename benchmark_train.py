"""`benchmark.py train`: one training step, ours against others', its losses, its parts and its ceiling."""

import statistics

import torch

import utils
from benchmark_arms import VARIANTS
from benchmark_processes import Arms
from benchmark_report import between, number, ratio, spread, times
from benchmark_setup import chosen_arms, data_set, opponents, workload, write_weights
from instruments import attainable_seconds, largest, total_flops

TRAIN_ARMS = (*VARIANTS, "torchvision", "torchvision-amp", "detectron2")
TIMED_PRODUCTS = 6  # of the forward pass, and as many of the backward pass: the dominant ones


def train_arms(args):
    """The arms of `train`: those of --arms, or ours and the opponents'."""
    names = chosen_arms(args, TRAIN_ARMS)
    if names:
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
        arms.ask_all("rewind")  # only ours took a step to find its products
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
