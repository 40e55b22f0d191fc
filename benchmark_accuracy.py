"""`benchmark.py accuracy`: the AP that this trainer and torchvision's plain loop reach in the same steps, over seeds.

Arms: "ours" is train.py with a recipe; "ours-fp32" the same without --amp; "ours-reference-ops" that with torchvision's
own modules; "torchvision" is torchvision's model and loop with the recipe's hyperparameters, in fp32. A run starts from
random weights in a process of its own and leaves COCO results; pycocotools scores the results of all.
"""

import functools
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Subset

import arguments
import coco_eval
import coco_utils
import reference
import shapes
import train
import utils
from benchmark_processes import Arm, ArmError
from benchmark_setup import chosen_arms, opponents
from group_by_aspect_ratio import create_aspect_ratio_groups
from utils import UserError

TRAIN_SCRIPT = Path(__file__).with_name("train.py")
ACCURACY_ARMS = ("ours", "ours-fp32", "ours-reference-ops", "torchvision")
RESULTS = "detections.json"  # as train.py names them
# What a recipe must leave as it is for torchvision's plain loop to follow it.
PLAIN_SETTINGS = {
    "weights": None,
    "weights_backbone": None,
    "trainable_backbone_layers": None,
    "norm": None,
    "data_augmentation": "hflip",
    "use_copypaste": False,
    "accum_steps": 1,
    "ema_decay": 0.0,
    "norm_weight_decay": None,
}


# --- torchvision's arm ------------------------------------------------------------------------------------


class TorchvisionRun:
    """An arm of `benchmark.py accuracy`: torchvision's loop as its users run it, from random weights to COCO results.

    flags: train.py's, whose model, sizes, batches, optimizer, schedule and number of steps it takes over.
    """

    def __init__(self, arm, workload, flags):
        torch.set_num_threads(workload.threads)
        self.args = args = arguments.parse_args(__doc__, flags)
        self.device = torch.device(workload.device)
        self.workers = workload.workers
        torch.manual_seed(args.seed)
        data = reference.ReferenceDataset(workload.images, workload.annotations, reference.hflip)
        self.category_ids = sorted(data.coco.cats)
        data.labels = {category_id: label for label, category_id in enumerate(self.category_ids, start=1)}
        positions = reference.images_to_learn_from(data)
        self.data = Subset(data, positions)
        self.val_data = reference.ReferenceDataset(*coco_utils.dataset_paths(args.data_path)["val"])
        ratios = reference.aspect_ratios(data, positions)
        self.groups = create_aspect_ratio_groups(ratios, args.aspect_ratio_group_factor)
        self.model = reference.build_mask_rcnn(
            args.backbone or "resnet50",
            len(self.category_ids) + 1,
            args.min_size or 800,
            args.max_size or 1333,
            args.rois_per_image or 512,
        ).to(self.device)
        num_batches = len(self.groups) // args.batch_size
        _, self.total_steps, lr, schedule = train.plan_schedule(args, num_batches, args.batch_size)
        self.optimizer = self.build_optimizer(lr)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, schedule.factor)

    def build_optimizer(self, lr):
        args, parameters = self.args, list(self.model.parameters())
        if args.opt == "adamw":
            optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=args.weight_decay)
        else:
            nesterov = args.opt == "sgd_nesterov"
            options = {"momentum": args.momentum, "weight_decay": args.weight_decay, "nesterov": nesterov}
            optimizer = torch.optim.SGD(parameters, lr=lr, **options)
        if args.clip_grad_norm:

            def clip(*_):
                torch.nn.utils.clip_grad_norm_(parameters, args.clip_grad_norm)

            optimizer.register_step_pre_hook(clip)
        return optimizer

    def batches(self):
        """Batches of shuffled epochs, one epoch after another, without end."""
        while True:
            keys = reference.shuffled_batches(self.groups, self.args.batch_size)
            options = {"collate_fn": reference.collate, "num_workers": self.workers}
            yield from DataLoader(self.data, batch_sampler=keys, **options)

    def train(self):
        """All steps; the losses of each, a list of {name: value}."""
        batches = itertools.islice(self.batches(), self.total_steps)
        return reference.train_one_epoch(self.model, self.optimizer, self.scheduler, batches, self.device)

    def detect(self, path):
        """Write the COCO results of the validation set."""
        loader = DataLoader(self.val_data, collate_fn=reference.collate, num_workers=self.workers)
        results = []

        def consume(predictions):
            results.extend(reference.coco_results(predictions))

        reference.evaluate(self.model, loader, self.device, self.category_ids, consume)
        Path(path).write_text(json.dumps(results))


def check_plain(args):
    """Raises UserError for settings that torchvision's plain loop would not follow."""
    if not args.model.startswith("maskrcnn_resnet50_fpn") or not (args.backbone or "resnet").startswith(
        "resnet"
    ):
        raise UserError(
            f"--against torchvision: its arm is a Mask R-CNN on a ResNet, not {args.model} on {args.backbone}; "
            "leave --against out, or choose another --recipe"
        )
    for name, value in PLAIN_SETTINGS.items():
        if getattr(args, name) != value:
            raise UserError(
                f"--against torchvision: its loop does not have the recipe's --{name.replace('_', '-')} "
                f"{getattr(args, name)}; leave --against out, or choose another --recipe"
            )


# --- one run ----------------------------------------------------------------------------------------------


def run_flags(args, root, arm, seed):
    """train.py's flags for one run: the recipe's, but for the arm, the seed and the number of steps."""
    try:
        lines = Path(args.recipe).read_text().splitlines()
    except OSError as error:
        raise UserError(
            f"--recipe {args.recipe}: {error.strerror}; give a file of train.py's flags"
        ) from None
    flags = [flag for line in lines for flag in shlex.split(line, comments=True)]
    if arm != "ours":
        flags = [flag for flag in flags if flag != "--amp"]
    if arm == "ours-reference-ops":
        flags.append("--reference-ops")
    steps = str(args.total_steps)
    flags += ["--data-path", str(root), "--device", args.device, "--seed", str(seed)]
    return [*flags, "--total-steps", steps, "--eval-every", steps]  # evaluated at the end alone


def run_train_script(args, arm, flags, folder):
    """train.py in a process of its own; returns the precision that it worked in."""
    limit = None
    if args.threads < utils.available_cpus():  # train.py takes all that it may use
        allowed = sorted(os.sched_getaffinity(0))[: args.threads]
        limit = functools.partial(os.sched_setaffinity, 0, allowed)
    command = [sys.executable, str(TRAIN_SCRIPT), *flags, "--output-dir", str(folder)]
    with open(folder / "output.txt", "w+") as output:
        status = subprocess.run(
            command, stdout=output, stderr=output, preexec_fn=limit, check=False
        ).returncode
        output.seek(0)
        if status != 0:
            tail = "".join(output.readlines()[-5:]).strip()
            raise ArmError(f"{arm}: `train.py {shlex.join(flags)}` ended with status {status}\n{tail}")
    dtype = json.loads((folder / "config.json").read_text())["resolved"]["amp_dtype"]
    return "fp32" if dtype == "None" else dtype.removeprefix("torch.")


def run_torchvision(args, flags, folder):
    """TorchvisionRun in a process of its own; returns the precision that it worked in."""
    settings = arguments.parse_args(__doc__, flags)
    images, annotations = map(str, coco_utils.dataset_paths(settings.data_path)["train"])
    workers = settings.workers
    if workers is None:
        workers = 4 if args.device.startswith("cuda") else 1
    work = {"images": images, "annotations": annotations, "workers": workers}
    arm = Arm("torchvision")
    try:
        arm.start("accuracy", {**work, "threads": args.threads, "device": args.device}, flags=flags)
        arm.ask("train")
        arm.ask("detect", path=str(folder / RESULTS))
    finally:
        arm.close()
    return "fp32"


def run_once(args, truth, arm, seed, flags, folder):
    """Train, detect and score once: a JSON-able record."""
    folder.mkdir()
    started = time.perf_counter()
    if arm == "torchvision":
        precision = run_torchvision(args, flags, folder)
    else:
        precision = run_train_script(args, arm, flags, folder)
    seconds = time.perf_counter() - started
    results = json.loads((folder / RESULTS).read_text())
    has_masks = "maskrcnn" in arguments.parse_args(__doc__, flags).model
    iou_types = ["bbox", "segm"] if has_masks else ["bbox"]
    metrics, _ = coco_eval.score_results(truth, results, iou_types, evaluator="pycocotools")
    return {
        "arm": arm,
        "seed": seed,
        "flags": flags,
        "precision": precision,
        "commit": utils.describe_environment(torch.device(args.device))["commit"],
        "seconds": seconds,
        "metrics": metrics,
    }


# --- the comparison ---------------------------------------------------------------------------------------


def accuracy_arms(args):
    """The arms of --arms, or ours, ours with torchvision's modules, and the opponent."""
    return chosen_arms(args, ACCURACY_ARMS) or [
        "ours",
        "ours-reference-ops",
        *opponents(args, ("torchvision",)),
    ]


def run_accuracy(args, report, folder):
    """Train every arm with every seed, and compare what they reach. Runs that --json's file has are not done again."""
    names = accuracy_arms(args)
    root = Path(args.data_path) if args.data_path else shapes.write_shapes(shapes.default_root())
    if "torchvision" in names:
        check_plain(arguments.parse_args(__doc__, run_flags(args, root, "torchvision", seed=0)))
    _, truth = coco_utils.dataset_paths(root)["val"]
    runs, chosen = earlier_runs(args.json), []
    report.keep("runs", runs)
    for seed, arm in itertools.product(dict.fromkeys(args.seeds), names):
        flags = run_flags(args, root, arm, seed)
        run = next((run for run in runs if (run["arm"], run["flags"]) == (arm, flags)), None)
        if run is None:
            run = run_once(args, truth, arm, seed, flags, folder / f"{arm}-{seed}")
            runs.append(run)
            report.keep("runs", runs)
        chosen.append(run)
        found = ", ".join(f"{name} AP {run['metrics'][kind]['AP']:.3f}" for kind, name in kinds(run))
        report.progress(f"{arm}, seed {seed}: {found} after {utils.format_duration(run['seconds'])}")
    commits = {run["commit"] for run in chosen}
    if len(commits) > 1:
        report.note(f"these runs are of {len(commits)} commits: {', '.join(sorted(map(str, commits)))}")
    title = f"AP after {args.total_steps} steps of {Path(args.recipe).name} on {root.name}, by pycocotools"
    accuracy_table(report, title, chosen)
    verdict_table(report, chosen)


def earlier_runs(path):
    """The runs in the JSON file of an earlier comparison; [] where there is none."""
    if path is None or not Path(path).exists():
        return []
    try:
        return json.loads(Path(path).read_text())["measurements"]["runs"]
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"--json {path}: holds no runs of `benchmark.py accuracy`; choose another file"
        ) from None


def kinds(run):
    """(iou type, what people call it) of those that a run was scored for."""
    return [(kind, name) for kind, name in (("bbox", "box"), ("segm", "mask")) if kind in run["metrics"]]


def by_arm(runs, kind):
    """{arm: AP of each seed}"""
    values = {}
    for run in runs:
        values.setdefault(run["arm"], []).append(run["metrics"][kind]["AP"])
    return values


def accuracy_table(report, title, runs):
    """AP of each arm and seed, their mean, and how far the seeds lie apart."""
    precision = {run["arm"]: run["precision"] for run in runs}
    rows = []
    for kind, name in kinds(runs[0]):
        for arm, values in by_arm(runs, kind).items():
            deviation = f"{statistics.stdev(values):.4f}" if len(values) > 1 else None
            row = [f"{arm} ({precision[arm]})", name, *(f"{value:.4f}" for value in values)]
            rows.append(
                [*row, f"{statistics.fmean(values):.4f}", f"{max(values) - min(values):.4f}", deviation]
            )
    seeds = dict.fromkeys(run["seed"] for run in runs)
    report.table(title, ["arm", "AP", *(f"seed {seed}" for seed in seeds), "mean", "max − min", "sd"], rows)


def compare(first, other):
    """(difference of the means, the larger max − min of the two, whether the one is within the other)."""
    difference = statistics.fmean(first) - statistics.fmean(other)
    spread = max(max(values) - min(values) for values in (first, other))
    return difference, spread, abs(difference) <= spread


def verdict_table(report, runs):
    """The first arm less each other one, against the spread of the seeds; its standard error takes the two apart."""
    rows = []
    for kind, name in kinds(runs[0]):
        values = by_arm(runs, kind)
        arm, first = next(iter(values.items()))
        for other, theirs in list(values.items())[1:]:
            difference, spread, is_within = compare(first, theirs)
            verdict, error = f"{'within' if is_within else 'beyond'} the seeds' spread", None
            if min(len(first), len(theirs)) == 1:
                verdict = "one seed has no spread"
            else:
                error = sum(statistics.variance(v) / len(v) for v in (first, theirs)) ** 0.5
                error = f"{error:.4f}"
            rows.append([f"{arm} − {other}", name, f"{difference:+.4f}", error, f"{spread:.4f}", verdict])
    columns = ["arms", "AP", "difference of means", "its standard error", "larger max − min", "verdict"]
    report.table("Difference of the means against the seeds' spread", columns, rows)
