"""The two loops: train_one_epoch moves the weights, predict turns a data set into COCO results."""

import contextlib
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from coco_results import predictions_to_results
from optim import Ema, LrSchedule
from utils import all_reduce_mean, get_world_size, peak_memory_mb


@dataclass
class TrainState:
    """Everything that a training step changes. A checkpoint is this, written down."""

    model: nn.Module  # the detector itself, or DistributedDataParallel around it
    optimizer: torch.optim.Optimizer
    schedule: LrSchedule
    scaler: torch.amp.GradScaler
    ema: Ema
    step: int = 0  # optimizer updates so far
    epoch: int = 0
    batch: int = 0  # batches of this epoch that are done

    @property
    def detector(self):
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model


class NonFiniteLossError(RuntimeError):
    """A loss was NaN or infinite; the update it belonged to, and all after it, were left out."""


class Stopped(Exception):
    """Training was asked to stop; the state stands between two steps."""


def autocast(device, dtype):
    """Mixed precision on `device` in `dtype`; None: full precision, a no-op."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def to_device(images, targets, device):
    """One batch to the device, asynchronously where its memory is pinned. The image ids stay ints."""
    images = [image.to(device, non_blocking=True) for image in images]
    targets = [
        {name: v if name == "image_id" else v.to(device, non_blocking=True) for name, v in t.items()}
        for t in targets
    ]
    return images, targets


@dataclass
class LossWindow:
    """The losses since the last look at them, left on the device until then: no step waits for its loss."""

    names: list[str] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)  # each [len(names)]
    image_ids: list[list[int]] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    def add(self, losses, image_ids, step):
        self.names = list(losses)
        self.values.append(torch.stack([loss.detach().float() for loss in losses.values()]))
        self.image_ids.append(image_ids)
        self.steps.append(step)

    def read(self):
        """The mean of each loss over batches and ranks, as floats, and empty the window.

        Raises NonFiniteLossError, on every rank, naming the step, the terms and this rank's images.
        """
        values = torch.stack(self.values)  # [batches, terms]
        # NaN and infinity survive the mean, so every rank sees that some rank had one.
        mean = all_reduce_mean(values.mean(0)).tolist()
        if not all(map(math.isfinite, mean)):
            raise NonFiniteLossError(self.explain(values))
        window, self.values, self.image_ids, self.steps = len(self.values), [], [], []
        return dict(zip(self.names, mean, strict=True)), window

    def explain(self, values):
        for row, image_ids, step in zip(values.tolist(), self.image_ids, self.steps, strict=True):
            bad = [
                f"{name} {value}"
                for name, value in zip(self.names, row, strict=True)
                if not math.isfinite(value)
            ]
            if bad:
                return (
                    f"step {step}: {', '.join(bad)} on images {image_ids}; the weights are as before that step. "
                    "Lower --lr, lengthen --warmup-steps, clip with --clip-grad-norm 1, or look at these images"
                )
        return "a loss was not finite on another rank, which names the images; the weights are as before that step"


def train_one_epoch(
    state,
    loader,
    *,
    device,
    amp_dtype=None,
    accum_steps=1,
    clip_grad_norm=0.0,
    total_steps=None,
    print_freq=20,
    on_log=lambda record: None,
    should_stop=lambda: False,
    mark=lambda name: None,
):
    """Train until the loader or total_steps ends; one step is one optimizer update over accum_steps batches.

    state: TrainState, moved on in place. loader: yields (images, targets) lists of one epoch; a whole epoch has
    len(loader.batch_sampler) batches, and the loader starts at batch state.batch of it. on_log gets a record
    every print_freq steps: {"step", "epoch", "losses", "lr", "grad_norm", "images_per_second", "batch_seconds",
    "data_seconds", "memory_mb"}; the seconds are those of a mean batch, and of its wait for the loader. mark is told
    when a part of a step is over: "data", "backward", and "optimizer" at its end; what lies between the first two,
    hooks on the model can tell apart.
    Returns the epoch's mean losses and images per second: {"losses", "lr", "images_per_second"}.
    Raises NonFiniteLossError, or Stopped at the first step's boundary after should_stop() is true.
    """
    model = state.model
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    synchronised = contextlib.nullcontext
    window, totals, num_batches = LossWindow(), {}, 0
    blocked = torch.zeros((), device=device)  # 1 from the first non-finite gradient on
    num_images = images_since_log = 0
    data_seconds = 0.0
    lr, grad_norm = 0.0, torch.zeros((), device=device)
    end = len(loader.batch_sampler)
    started = logged = waited = time.perf_counter()

    def look():
        """Read the window's losses and report them."""
        nonlocal num_batches, images_since_log, data_seconds, logged
        losses, batches = window.read()
        for name, value in losses.items():
            totals[name] = totals.get(name, 0.0) + value * batches
        num_batches += batches
        now = time.perf_counter()
        on_log(
            {
                "step": state.step,
                "epoch": state.epoch,
                "losses": losses,
                "lr": lr,
                "grad_norm": float(grad_norm),
                "images_per_second": images_since_log * get_world_size() / (now - logged),
                "batch_seconds": (now - logged) / batches,
                "data_seconds": data_seconds / batches,
                "memory_mb": peak_memory_mb(device),
            }
        )
        images_since_log, data_seconds, logged = 0, 0.0, now

    for images, targets in loader:
        data_seconds += time.perf_counter() - waited
        mark("data")
        image_ids = [target["image_id"] for target in targets]
        images, targets = to_device(images, targets, device)
        window_start = state.batch - state.batch % accum_steps
        window_size = min(accum_steps, end - window_start)  # the last window of an epoch may be short
        last = state.batch + 1 == window_start + window_size
        if isinstance(model, DistributedDataParallel):
            synchronised = contextlib.nullcontext if last else model.no_sync
        with synchronised():
            with autocast(device, amp_dtype):
                losses = model(images, targets)
            loss = sum(losses.values()) / window_size
            state.scaler.scale(loss).backward()
        mark("backward")
        window.add(losses, image_ids, state.step)
        state.batch += 1
        num_images += len(images)
        images_since_log += len(images)

        if last:
            lr = state.schedule.apply(state.optimizer, state.step)
            state.scaler.unscale_(state.optimizer)
            grad_norm = nn.utils.clip_grad_norm_(parameters, clip_grad_norm or math.inf)
            if not state.scaler.is_enabled():  # fp16's scaler drops such updates by itself
                blocked = torch.maximum(blocked, (~torch.isfinite(grad_norm)).float())
                state.optimizer.found_inf = blocked
            state.scaler.step(state.optimizer)
            state.scaler.update()
            state.optimizer.zero_grad(set_to_none=True)
            state.ema.update()
            state.step += 1
            mark("optimizer")
            finished = state.step == total_steps
            stop = should_stop()
            if state.step % print_freq == 0 or finished or stop or state.batch == end:
                look()
            if finished:
                break
            if stop:
                raise Stopped
        waited = time.perf_counter()

    seconds = time.perf_counter() - started
    return {
        "losses": {name: total / num_batches for name, total in totals.items()},
        "lr": lr,
        "images_per_second": num_images * get_world_size() / seconds,
    }


@torch.inference_mode()
def predict(model, loader, *, device, category_ids, amp_dtype=None, on_batch=lambda num_images: None):
    """Detect in this rank's images.

    loader: yields (images, targets); targets carry image_id. category_ids: label k is category_ids[k - 1].
    Returns a list of coco_results.ImageResults in the order of the images. Masks are pasted and encoded in threads
    while the model works on the next batches.
    """
    model.eval()
    pending = []
    # Beside a GPU the host has time; on a CPU the forward pass needs the cores itself.
    with ThreadPoolExecutor(max_workers=4 if device.type == "cuda" else 1) as pool:
        for images, targets in loader:
            sizes = [tuple(image.shape[-2:]) for image in images]
            image_ids = [target["image_id"] for target in targets]
            images = [image.to(device, non_blocking=True) for image in images]
            with autocast(device, amp_dtype):
                outputs = model(images)
            outputs = [{name: value.cpu() for name, value in output.items()} for output in outputs]
            pending.append(pool.submit(predictions_to_results, outputs, image_ids, sizes, category_ids))
            on_batch(len(images))
        return [found for batch in pending for found in batch.result()]


@torch.inference_mode()
def validation_loss(model, loader, *, device, amp_dtype=None):
    """The mean training losses over a data set: no gradient, and no running statistic moves.

    Returns {name: mean over all ranks' batches}; norm layers use their running statistics. Every rank must have
    at least one batch.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    sums, num_batches = {}, 0
    for images, targets in loader:
        images, targets = to_device(images, targets, device)
        with autocast(device, amp_dtype):
            losses = model(images, targets)
        sums = {name: sums.get(name, 0.0) + loss.float() for name, loss in losses.items()}
        num_batches += 1
    sums_and_count = torch.stack([*sums.values(), torch.tensor(float(num_batches), device=device)])
    totals = all_reduce_mean(sums_and_count.cpu()).tolist()  # over gloo: a side process has no other group
    return {name: total / totals[-1] for name, total in zip(sums, totals, strict=False)}
