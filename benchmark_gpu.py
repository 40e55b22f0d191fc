"""`benchmark.py gpu`: everything that needs a GPU, within ten minutes, what was found kept after each case."""

import statistics
import subprocess
import time
from typing import NamedTuple

import benchmark_fake_data
import coco_utils
from benchmark_processes import Arms
from benchmark_report import between, spread
from benchmark_setup import data_set, workload, write_weights
from benchmark_train import TIMED_PRODUCTS, ceiling, ceiling_table, part_table
from instruments import largest
from utils import UserError

GPU_WARMUP, GPU_ROUNDS, GPU_STEPS = 30, 3, 40


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
COMPILED = ("ours-compiled", "ours-graphs")
FIXED_SIZE = ((480, 806, 1),)  # resized to 793×1333, padded to 800×1344
TRACE_STEPS = 20
SMOKE = {"backbone": "resnet18", "min_size": 64, "max_size": 96}


def run_gpu(args, report, folder):
    """The GPU protocol within a budget: ceilings, torchvision's loop, ours with more and more on, evaluation."""
    cuda = args.device.startswith("cuda")
    if args.smoke:
        vars(args).update(SMOKE)
    num_images = 4 if args.smoke else 64
    fixed = benchmark_fake_data.write_fake_coco(
        folder / "fixed", num_images, sizes=FIXED_SIZE, seed=args.seed
    )
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
