"""Train a detector: wiring and the epoch loop.

python3 train.py                                    the built-in shapes, a few minutes on a laptop
python3 train.py --data-path DIR                    COCO 2017 as it unpacks
torchrun --nproc-per-node 8 train.py --data-path DIR
python3 train.py --data-path DIR --resume FILE --test-only
"""

import argparse
import contextlib
import functools
import math
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

import arguments
import async_eval
import checkpoint as checkpoints
import coco_eval
import coco_results
import coco_utils
import compilation
import engine
import fake_data
import figures
import models
import optim
import profiling
import shapes
import utils
from group_by_aspect_ratio import GroupedBatchSampler, create_aspect_ratio_groups, evaluation_batches
from run_log import RunLog
from transforms import SimpleCopyPaste, build_transforms
from utils import UserError

EXIT_USER_ERROR, EXIT_FAILED, EXIT_SIGTERM = 2, 1, 143
PICTURE = Path("figures", "predictions.png")
SNAPSHOT = ".evaluating.pth"  # the checkpoint whose weights are being evaluated beside training


class RunError(RuntimeError):
    """What ended a run after its first step, in one line."""


# --- wiring --------------------------------------------------------------------------------------------


class StopSignal:
    """Turns the first SIGTERM into a question asked at each step's boundary; a second one ends at once."""

    def __init__(self):
        self.received = False
        self.previous = signal.signal(signal.SIGTERM, self.receive)

    def receive(self, signum, frame):
        if self.received:
            raise SystemExit(EXIT_SIGTERM)
        self.received = True

    def __call__(self):
        return utils.any_rank(self.received)

    def restore(self):
        signal.signal(signal.SIGTERM, self.previous)


def choose_output_dir(args):
    """The run's folder, the same on all ranks: as given, the resumed checkpoint's, or a new one in runs/."""
    if args.output_dir is not None:
        return Path(args.output_dir)
    if args.resume:
        return Path(args.resume).parent
    runs, name, number = Path("runs"), "fake" if args.use_fake_data else args.dataset, 1
    while (runs / f"{name}-{number}").exists():
        number += 1
    return Path(utils.broadcast_json(str(runs / f"{name}-{number}")))


def build_datasets(args):
    """(train, val) as CocoDatasets; train is None in eval mode, val in train mode."""
    if args.dataset == "shapes":
        root = Path(args.data_path) if args.data_path else shapes.default_root()
        with utils.main_process_first():
            root = shapes.write_shapes(root)
    else:
        root = Path(args.data_path) if args.data_path else None
    paths = coco_utils.dataset_paths(root, keypoints=args.dataset == "coco_kp" or "keypoint" in args.model)
    if args.train_annotations:
        paths["train"] = (Path(args.train_images), Path(args.train_annotations))
    if args.val_annotations:
        paths["val"] = (Path(args.val_images), Path(args.val_annotations))
    needed = {"train": ("train",), "eval": ("val",)}.get(args.mode, ("train", "val"))
    for split in needed:
        if split not in paths and not args.use_fake_data:
            raise UserError(
                f"no {split} data: give --data-path, or --{split}-images and --{split}-annotations"
                + ("; --mode train goes without validation" if split == "val" else "")
            )
    fields = {"with_masks": "maskrcnn" in args.model, "with_keypoints": "keypoint" in args.model}
    if args.use_fake_data:
        return fake_data.FakeDataset(
            paths["train"][1] if "train" in paths else None, seed=args.seed, **fields
        ), None
    train = val = None
    if args.mode != "eval":
        train = coco_utils.CocoDataset(
            *paths["train"],
            training=True,
            keep_empty=args.keep_empty,
            skip_broken=args.skip_broken,
            num_samples=args.train_samples,
            seed=args.seed,
            **fields,
        )
        train.transforms = build_transforms(
            args.data_augmentation, training=True, keypoint_flip=train.keypoint_flip
        )
        if args.use_copypaste:
            train.batch_transform = SimpleCopyPaste()
    if args.mode != "train":
        val = coco_utils.CocoDataset(
            *paths["val"],
            num_samples=args.eval_samples,
            seed=args.seed,
            **fields,
        )
    if train is not None and val is not None:
        coco_utils.check_same_classes(train, val)
    return train, val


def build_train_loader(args, dataset, workers, device):
    sampler = GroupedBatchSampler(
        create_aspect_ratio_groups(dataset.aspect_ratios, args.aspect_ratio_group_factor),
        args.batch_size,
        rank=utils.get_rank(),
        num_ranks=utils.get_world_size(),
        seed=args.seed,
    )
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=coco_utils.collate,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        worker_init_fn=coco_utils.init_worker,
        generator=torch.Generator(),  # or each new iterator would draw from the stream that the anchors come from
    )


def build_fake_loader(args, dataset, workers, device):
    ranks = {"rank": utils.get_rank(), "num_ranks": utils.get_world_size()}
    return fake_data.FakeLoader(dataset, args.batch_size, **ranks, pin=device.type == "cuda")


def build_val_loader(args, dataset, workers, device):
    batches = evaluation_batches(
        dataset.image_sizes,
        args.eval_batch_size,
        rank=utils.get_rank(),
        num_ranks=utils.get_world_size(),
    )
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=coco_utils.collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=coco_utils.init_worker,
    )


def plan_schedule(args, batches_per_epoch, images_per_batch):
    """The run in steps: (steps_per_epoch, total_steps, lr, LrSchedule), defaults resolved."""
    steps_per_epoch = math.ceil(batches_per_epoch / args.accum_steps)
    epochs = args.epochs
    if epochs is None:
        epochs = math.ceil(args.total_steps / steps_per_epoch) if args.total_steps else 26
    total_steps = epochs * steps_per_epoch
    if args.total_steps is not None:
        total_steps = min(total_steps, args.total_steps)
    if args.lr_step_size:
        milestones = list(
            range(args.lr_step_size * steps_per_epoch, total_steps, args.lr_step_size * steps_per_epoch)
        )
    elif args.lr_steps:
        milestones = [s if args.total_steps else s * steps_per_epoch for s in args.lr_steps]
    else:
        milestones = [round(total_steps * fraction) for fraction in (16 / 26, 22 / 26)]
    warmup_steps = args.warmup_steps
    if warmup_steps is None:
        warmup_steps = min(1000, max(0, steps_per_epoch - 1), total_steps // 10)
    lr = args.lr if args.lr is not None else optim.default_lr(args.opt, images_per_batch * args.accum_steps)
    schedule = optim.LrSchedule(
        args.lr_scheduler, total_steps, milestones, args.lr_gamma, warmup_steps, args.warmup_factor
    )
    return steps_per_epoch, total_steps, lr, schedule


def sync_buffers(model):
    """Give every rank the first rank's buffers: live norm layers count their own images on each rank."""
    if utils.get_world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


@contextlib.contextmanager
def evaluated_weights(state):
    """Within the block the detector carries what is evaluated, equal on all ranks: its weights, or their average."""
    sync_buffers(state.detector)
    with state.ema.applied():
        sync_buffers(state.detector)
        yield state.detector


class Evaluator:
    """Scores detectors on the validation set, whose annotations are read once."""

    def __init__(self, args, dataset, loader, device, amp_dtype, output_dir):
        self.args, self.dataset, self.loader = args, dataset, loader
        self.device, self.amp_dtype, self.output_dir = device, amp_dtype, output_dir

    @functools.cached_property
    def ground_truth(self):
        return coco_eval.read_ground_truth(self.dataset.index)

    def __call__(self, detector):
        """All ranks call. Returns {"metrics", "per_class"} as JSON-able values on rank 0, None on the others.

        metrics: {"bbox": {"AP", …}, "segm": {…}, "images_per_second", …}; per_class: {"bbox": {class: AP}, …}.
        Leaves detections.json and a picture.
        """
        started = time.perf_counter()
        options = {"device": self.device, "amp_dtype": self.amp_dtype}
        # An evaluation draws from a stream of its own, so that training is the same with and without it.
        with utils.own_randomness(self.args.seed, self.device):
            results = engine.predict(detector, self.loader, category_ids=self.dataset.category_ids, **options)
            loss = engine.validation_loss(detector, self.loader, **options) if self.args.val_loss else None
        seconds = time.perf_counter() - started
        results = coco_results.gather_results(results, self.dataset.image_ids)
        if not utils.is_main_process():
            return None
        metrics, per_class = coco_eval.score_results(
            self.ground_truth,
            results,
            models.iou_types(detector),
            evaluator=self.args.evaluator,
            image_ids=self.dataset.image_ids,
        )
        metrics["images_per_second"] = len(self.dataset) / seconds
        metrics["scoring_seconds"] = time.perf_counter() - started - seconds
        if loss is not None:
            metrics["loss"] = loss
        coco_results.write_results(self.output_dir / "detections.json", results)
        shown = {self.dataset.image_ids[n] for n in figures.shown_images(self.dataset)}
        records = [record for found in results if found.image_id in shown for record in found.records()]
        figures.write(self.output_dir / PICTURE, figures.predictions(self.dataset, records))
        return {"metrics": metrics, "per_class": per_class}


def open_evaluator(settings, norm, output_dir, device, num_threads, meeting):
    """What the side process of a rank opens for its evaluations; returns state_dict -> report, see AsyncEvaluation.

    settings: the run's arguments. norm: its backbone's, {"type", "eps"}. meeting: for utils.join_meeting.
    """
    args = argparse.Namespace(**settings | {"mode": "eval", "norm": norm["type"], "norm_eps": norm["eps"]})
    utils.join_meeting(**meeting)
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(num_threads)
    torch.use_deterministic_algorithms(args.use_deterministic_algorithms)
    _, dataset = build_datasets(args)
    loader = build_val_loader(args, dataset, choose_workers(args, device), device)
    amp_dtype = utils.amp_dtype(args.amp_dtype, device) if args.amp else None
    evaluator = Evaluator(args, dataset, loader, device, amp_dtype, Path(output_dir))
    detector = None

    def evaluate(weights):
        nonlocal detector
        if detector is None:
            detector, _ = build_detector(args, dataset, device, state=weights)
        detector.load_state_dict(weights, strict=True)
        return evaluator(detector)

    return evaluate


def say_evaluation(report, step, num_images, output_dir, log):
    """Print an evaluation's tables and put its picture on TensorBoard."""
    metrics = report["metrics"]
    log.end_bar()
    log.say(coco_eval.format_table(metrics))
    log.say(coco_eval.format_per_class(report["per_class"]))
    log.picture("predictions", output_dir / PICTURE, step)
    log.say(
        f"evaluated {num_images} images at {metrics['images_per_second']:.1f} img/s; "
        f"scoring took {metrics['scoring_seconds']:.1f} s"
    )


def headline(metrics):
    """The one number that best.pth is chosen by: mask AP, keypoint AP or box AP, the hardest there is."""
    kind = next(kind for kind in ("segm", "keypoints", "bbox") if kind in metrics)
    return kind, metrics[kind]["AP"]


def gather_rng_states(device):
    """Every rank's generator states, in order, on every rank."""
    states = {name: value.cpu() for name, value in utils.rng_state(device).items()}
    if utils.get_world_size() == 1:
        return [states]
    gathered = [{} for _ in range(utils.get_world_size())]
    for name, value in states.items():
        parts = [torch.empty_like(value) for _ in gathered]
        dist.all_gather(parts, value)
        for rank_states, part in zip(gathered, parts, strict=True):
            rank_states[name] = part
    return gathered


def make_checkpoint(args, state, classes, category_ids, best, device):
    """The checkpoint's dict (see checkpoint.py), complete on rank 0; every rank must call."""
    sync_buffers(state.detector)
    rng = gather_rng_states(device)
    if not utils.is_main_process():
        return None
    detector = state.detector
    content = {
        "model": checkpoints.plain_state_dict(detector),
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "progress": {"epoch": state.epoch, "batch": state.batch, "step": state.step, **best},
        "rng": rng,
        "classes": list(classes),
        "category_ids": list(category_ids),
        "norm": models.describe_norm(detector),
        "config": vars(args),
    }
    if state.ema.decay:
        content["ema"] = state.ema.state_dict()
        with state.ema.applied():
            content["model_ema"] = checkpoints.plain_state_dict(detector)
    return content


def follow_checkpoint(args, content, path):
    """Complete the flags of the model as the run that wrote a checkpoint had them.

    Raises UserError if they name another model: its weights would not fit.
    """
    theirs = content["config"]
    if args.norm is None and args.norm_eps is None:
        args.norm, args.norm_eps = content["norm"]["type"], content["norm"]["eps"]
    # What was pretrained decides which stages train; the weights themselves are not read again.
    for name in ("backbone", "weights", "weights_backbone", "trainable_backbone_layers"):
        if getattr(args, name) is None:
            setattr(args, name, theirs.get(name))
    for name in ("model", "backbone"):
        if getattr(args, name) != theirs.get(name):
            given, wanted = getattr(args, name), theirs.get(name)
            mend = f"pass --{name} {wanted}" if wanted else f"leave out --{name} {given}"
            raise UserError(f"{path}: holds {name} {wanted or 'as it comes'}, not {given}; {mend}")


def restore(args, state, content, path, classes, category_ids, device, log):
    """Put a loaded checkpoint into the state; returns the best score so far. Says what differs from its run."""
    checkpoints.check_same_classes(content, classes, category_ids, path)
    checkpoints.check_same_norm(content, models.describe_norm(state.detector), path)
    state.detector.load_state_dict(content["model"], strict=True)
    progress = content["progress"]
    state.step, state.epoch, state.batch = progress["step"], progress["epoch"], progress["batch"]
    if args.mode == "eval":
        if "model_ema" in content:
            state.detector.load_state_dict(content["model_ema"], strict=True)
    else:
        lrs = [group["initial_lr"] for group in state.optimizer.param_groups]
        state.optimizer.load_state_dict(content["optimizer"])
        for group, lr in zip(state.optimizer.param_groups, lrs, strict=True):
            group["initial_lr"] = lr
        state.scaler.load_state_dict(content["scaler"])
        if state.ema.decay and "ema" in content:
            state.ema.load_state_dict(content["ema"])
        if len(content["rng"]) == utils.get_world_size():
            utils.set_rng_state(content["rng"][utils.get_rank()], device)
        else:
            log.say(
                f"note: {len(content['rng'])} ranks wrote {path}, {utils.get_world_size()} go on from it: new seeds"
            )
        for line in checkpoints.changed_settings(content["config"], vars(args)):
            log.say(f"changed since {path}: {line}")
    log.say(f"resumed {path}: epoch {state.epoch}, step {state.step}")
    return {"best": progress["best"], "best_epoch": progress["best_epoch"]}


# --- the run ---------------------------------------------------------------------------------------------


def choose_workers(args, device):
    """Loader processes a rank."""
    return args.workers if args.workers is not None else 4 if device.type == "cuda" else 1


def build_detector(args, dataset, device, state=None):
    """(detector on its device, report on what its weights matched, None where none were read).

    state: the state_dict that the caller will go on with, in place of the weights that args name.
    """
    detector, report = models.build_model(
        args.model,
        num_classes=len(dataset.classes) + 1,
        backbone=args.backbone,
        norm=args.norm,
        norm_eps=args.norm_eps,
        trainable_layers=args.trainable_backbone_layers,
        weights=args.weights,
        weights_backbone=args.weights_backbone,
        state=state,
        classes=dataset.classes,
        category_ids=dataset.category_ids,
        num_keypoints=dataset.num_keypoints,
        min_size=args.min_size,
        max_size=args.max_size,
        rpn_score_thresh=args.rpn_score_thresh,
        rois_per_image=args.rois_per_image,
        detections_per_image=args.detections_per_image,
        reference_ops=args.reference_ops,
    )
    detector.to(device, memory_format=torch.channels_last if args.channels_last else torch.preserve_format)
    if args.compile:
        compilation.compile_regions(detector, mode=args.compile)
    return detector, report


def main(args):
    """The run; returns the last metrics. Raises UserError before the first step for what the user can mend."""
    device_type = torch.device(args.device).type if args.device else utils.select_device(None).type
    _, _, local_rank, local_world_size = utils.init_distributed(device_type, args.dist_url, args.world_size)
    device = utils.select_device(args.device, local_rank)
    utils.divide_threads(local_world_size)
    utils.seed_everything(args.seed, utils.get_rank())
    torch.use_deterministic_algorithms(args.use_deterministic_algorithms)

    output_dir = choose_output_dir(args)
    if not utils.is_main_process():
        return run(args, device, output_dir)
    utils.prepare_output_dir(output_dir)
    with utils.only_run_in(output_dir):
        return run(args, device, output_dir)


def run(args, device, output_dir):
    """What main does in a folder of its own: open everything, then train or evaluate."""
    resume_path, resumed = None, None
    if args.resume == "auto":
        resume_path, resumed = checkpoints.find_newest(output_dir)
    elif args.resume:
        resume_path, resumed = Path(args.resume), checkpoints.load(args.resume)
    elif (output_dir / checkpoints.NEWEST).exists() and not args.overwrite and args.mode != "eval":
        raise UserError(
            f"{output_dir}: holds a run; go on with --resume auto, or start anew with --overwrite"
        )
    if resumed is not None:
        follow_checkpoint(args, resumed, resume_path)

    train_set, val_set = build_datasets(args)
    dataset = train_set or val_set
    detector, report = build_detector(args, dataset, device, state=resumed and resumed["model"])
    amp_dtype = utils.amp_dtype(args.amp_dtype, device) if args.amp else None
    workers = choose_workers(args, device)

    train_loader, total_steps, lr, schedule = None, 0, 0.0, None
    images_per_batch = args.batch_size * utils.get_world_size()
    if train_set is not None:
        open_loader = build_fake_loader if args.use_fake_data else build_train_loader
        train_loader = open_loader(args, train_set, workers, device)
        steps_per_epoch, total_steps, lr, schedule = plan_schedule(
            args, len(train_loader.batch_sampler), images_per_batch
        )
    evaluator = None
    if val_set is not None:
        if args.val_loss and len(val_set) < args.eval_batch_size * utils.get_world_size():
            raise UserError(
                f"--val-loss: {len(val_set)} validation images are no batch of {args.eval_batch_size} for each of "
                f"{utils.get_world_size()} ranks; start fewer ranks, or leave the flag out"
            )
        val_loader = build_val_loader(args, val_set, workers, device)
        evaluator = Evaluator(args, val_set, val_loader, device, amp_dtype, output_dir)

    groups = optim.parameter_groups(detector, args.weight_decay, args.norm_weight_decay)
    optimizer = optim.build_optimizer(args.opt, groups, lr, args.momentum)
    for group in optimizer.param_groups:
        group["initial_lr"] = lr
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype is torch.float16)
    state = engine.TrainState(
        detector, optimizer, schedule, scaler, optim.Ema(detector, args.ema_decay), epoch=args.start_epoch
    )
    log = RunLog(output_dir, total_steps)
    if report is not None:
        log.say(str(report))
    best = {"best": -math.inf, "best_epoch": None}
    if resumed is not None:
        best = restore(args, state, resumed, resume_path, dataset.classes, dataset.category_ids, device, log)
    if utils.get_world_size() > 1 and train_set is not None:
        # DDP copies the few gradients of 1×1 kernels whose strides differ in name only; it need not say so.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        state.model = torch.nn.parallel.DistributedDataParallel(
            detector,
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )
    if utils.is_main_process():
        environment = utils.describe_environment(device)
        resolved = {"lr": lr, "total_steps": total_steps, "workers": workers, "amp_dtype": str(amp_dtype)}
        resolved |= {"num_classes": len(dataset.classes), "norm": models.describe_norm(detector)}
        utils.write_json(
            output_dir / "config.json",
            {"arguments": vars(args), "resolved": resolved, "environment": environment},
        )
    describe_run(args, log, output_dir, device, amp_dtype, train_set, val_set, detector)

    if args.mode == "eval":
        with evaluated_weights(state) as weights:
            report = utils.broadcast_json(evaluator(weights))
        say_evaluation(report, state.step, len(val_set), output_dir, log)
        log.epoch({"epoch": state.epoch, "step": state.step, "train": None, "eval": report["metrics"]})
        log.close()
        return report["metrics"]

    log.say(
        f"{total_steps} steps of {images_per_batch * args.accum_steps} images, {steps_per_epoch} an epoch; "
        f"lr {lr:g}{'' if args.lr else ' (by the rule 0.02 per 16 images)' if args.opt != 'adamw' else ''}, "
        f"warm-up {schedule.warmup_steps} steps, "
        + (f"falling at {schedule.milestones}" if schedule.kind == "multisteplr" else "then half a cosine")
    )
    if state.step >= total_steps:
        log.say(f"nothing to do: {resume_path} has {state.step} of {total_steps} steps")
        log.close()
        return None
    return run_epochs(
        args, state, best, train_loader, evaluator, dataset, total_steps, device, amp_dtype, output_dir, log
    )


def run_epochs(
    args, state, best, loader, evaluator, dataset, total_steps, device, amp_dtype, output_dir, log
):
    """The epoch loop: train, evaluate, save. Returns the last evaluation's metrics.

    Raises RunError, and no UserError, once the first step is done.
    """
    stop = StopSignal()
    log.first_step = first_step = state.step
    started, metrics = time.perf_counter(), None
    snapshot = output_dir / SNAPSHOT
    beside = None
    if args.async_eval and evaluator is not None:
        beside = async_eval.AsyncEvaluation(
            open_evaluator,
            args.dist_url,
            settings=vars(args),
            norm=models.describe_norm(state.detector),
            output_dir=str(output_dir),
            device=str(device),
            num_threads=torch.get_num_threads(),
        )
    profiler = None
    if args.profile:
        hint = {"workers": loader.num_workers, "amp": amp_dtype is not None, "compiled": bool(args.compile)}
        profiler = profiling.StepProfiler(state.detector, device, output_dir / "profile", log.say, hint)

    def save(*links):
        if args.use_fake_data:  # what was learnt from noise must never be resumed by mistake
            return
        content = make_checkpoint(args, state, dataset.classes, dataset.category_ids, best, device)
        if content is not None:
            checkpoints.save(content, output_dir / checkpoints.NEWEST, *links)
            checkpoints.remove_old(output_dir, args.keep_checkpoints)
        utils.barrier()

    def take_in(report, epoch, step):
        """Say what an evaluation found; returns whether it is the best so far."""
        nonlocal metrics
        metrics = report["metrics"]
        say_evaluation(report, step, len(evaluator.dataset), output_dir, log)
        kind, score = headline(metrics)
        if score <= best["best"]:
            return False
        best.update(best=score, best_epoch=epoch)
        log.say(f"best so far: {kind} AP {score:.4f}")
        return True

    def collect(wait):
        """Take in the evaluation beside training, if it is done or once it is; returns whether it is the best."""
        done = beside.collect(wait) if beside is not None else None
        if done is None:
            return False
        record, report = done
        is_best = take_in(report, record["epoch"], record["step"])
        if utils.is_main_process():
            if is_best:
                checkpoints.amend(snapshot, best, output_dir / checkpoints.BEST)
            snapshot.unlink(missing_ok=True)
        log.epoch({**record, "eval": report["metrics"]})
        return is_best

    def between_steps():
        collect(wait=False)
        return stop()

    try:
        while state.step < total_steps:
            loader.batch_sampler.set_epoch(state.epoch, state.batch)
            train_metrics = engine.train_one_epoch(
                state,
                loader,
                device=device,
                amp_dtype=amp_dtype,
                accum_steps=args.accum_steps,
                clip_grad_norm=args.clip_grad_norm,
                total_steps=total_steps,
                print_freq=args.print_freq,
                on_log=log.train,
                should_stop=between_steps,
                mark=profiler or (lambda name: None),
            )
            epoch, finished = state.epoch, state.step >= total_steps
            if state.batch == len(loader.batch_sampler):
                state.epoch, state.batch = epoch + 1, 0
            record = {"epoch": epoch, "step": state.step, "train": train_metrics}
            links = [output_dir / f"model_{epoch}.pth"]
            evaluated = evaluator is not None and (finished or (epoch + 1) % args.eval_every == 0)
            if evaluated and beside is not None:
                collect(wait=True)
                save(*links, snapshot)
                with evaluated_weights(state) as detector:
                    beside.start(checkpoints.plain_state_dict(detector), record)
                continue
            report = None
            if evaluated:
                with evaluated_weights(state) as detector:
                    report = utils.broadcast_json(evaluator(detector))
                if take_in(report, epoch, state.step):
                    links.append(output_dir / checkpoints.BEST)
            save(*links)
            log.epoch({**record, "eval": report and report["metrics"]})
        collect(wait=True)
    except engine.Stopped:
        save()
        if collect(wait=True):
            save()  # the best score belongs into the checkpoint that a resume reads
        resume = "" if args.use_fake_data else f"; go on with --resume {output_dir / checkpoints.NEWEST}"
        log.say(f"stopped by SIGTERM at step {state.step}{resume}")
        raise
    except UserError as error:
        if state.step == first_step:
            raise
        raise RunError(own_message(error)) from error
    finally:
        stop.restore()
        if beside is not None:
            beside.close()
            if beside.pending is not None:
                log.epoch({**beside.pending, "eval": None})
        log.close()
    if profiler is not None:
        profiler.close()
    if args.compile:
        log.say(f"torch.compile made {compilation.num_graphs()} graphs")
    if utils.is_main_process():
        log.say(describe_limit(args, device, amp_dtype, loader.num_workers, *log.pace()))
    log.say(
        f"trained {state.step} steps in {utils.format_duration(time.perf_counter() - started)}; see {output_dir}"
    )
    return metrics


def describe_limit(args, device, amp_dtype, num_workers, batch_seconds, data_seconds):
    """What a batch waited for, the loader or the arithmetic, and the flag to try, as text.

    batch_seconds: of a typical batch, data_seconds of it spent waiting for the loader.
    """
    waiting = data_seconds / batch_seconds
    took = f"a batch of {args.batch_size} took {1000 * batch_seconds:.0f} ms"
    if args.use_fake_data:
        bound = 1000 * batch_seconds / (1 - profiling.DATA_BOUND_SHARE)
        return (
            f"{took} from memory; the same command without --use-fake-data is data-bound if it takes more than "
            f"{bound:.0f} ms, else compute-bound"
        )
    took += f", {1000 * data_seconds:.0f} ms of it ({waiting:.0%}) waiting for images"
    if waiting <= profiling.DATA_BOUND_SHARE and device.type == "cuda":
        return f"{took}\ncompute-bound or sync-bound: the loader keeps up; --profile tells which"
    settings = {"workers": num_workers, "amp": amp_dtype is not None, "compiled": bool(args.compile)}
    return f"{took}\n{profiling.verdict(waiting, None, **settings)}"


def describe_run(args, log, output_dir, device, amp_dtype, train_set, val_set, detector):
    """Print what will run, on what, with how much."""
    num_parameters = sum(p.numel() for p in detector.parameters())
    num_trainable = sum(p.numel() for p in detector.parameters() if p.requires_grad)
    norm = models.describe_norm(detector)["type"]
    precision = "fp32" if amp_dtype is None else f"{str(amp_dtype).removeprefix('torch.')} autocast"
    log.say(
        f"{args.model}{f' on {args.backbone}' if args.backbone else ''}: {num_parameters / 1e6:.1f} M parameters, "
        f"{num_trainable / 1e6:.1f} M train; {norm} norm; {precision} on {device}, {utils.get_world_size()} rank(s) of "
        f"{torch.get_num_threads()} thread(s)"
    )
    for name, dataset in (("train", train_set), ("val", val_set)):
        if dataset is not None:
            log.say(
                f"{name}: {len(dataset)} images, {len(dataset.classes)} classes, {dataset.annotation_file}"
            )
    log.say(f"output: {output_dir}")


def own_message(error):
    """A UserError's line, without the traceback of a loader's worker around it."""
    message = str(error).strip()
    return message.rsplit("UserError: ", 1)[-1] if "in DataLoader worker process" in message else message


def cli(argv=None):
    """Run the command line and return its exit status."""
    try:
        main(arguments.parse_args(__doc__, argv))
        return 0
    except UserError as error:
        if utils.is_main_process() or "DataLoader" in str(error):
            print(f"error: {own_message(error)}", file=sys.stderr)
        return EXIT_USER_ERROR
    except (RunError, engine.NonFiniteLossError, async_eval.EvaluationError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    except engine.Stopped:
        return EXIT_SIGTERM
    finally:
        if utils.is_distributed():
            dist.destroy_process_group()


if __name__ == "__main__":
    utils.keep_freed_memory()
    raise SystemExit(cli())
