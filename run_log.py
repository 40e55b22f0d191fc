"""What a run tells while it goes: a progress bar or lines, metrics.jsonl and TensorBoard, from rank 0 alone."""

import json
import sys
import time

import cv2
import numpy as np
from tqdm import tqdm

from utils import format_duration, is_main_process


class RunLog:
    """The voice of a run. On other ranks than the first every method is silent.

    total_steps: where the bar ends and what the ETA counts to. output_dir: None writes no files.
    On a terminal a bar is redrawn in place; elsewhere each record is a line of its own, fit for a log file.
    """

    def __init__(self, output_dir, total_steps=None, first_step=0):
        self.speaks = is_main_process()
        self.output_dir = output_dir if self.speaks else None
        self.total_steps = total_steps
        self.first_step = first_step
        self.started = time.perf_counter()
        self.bar = None
        self.board = None
        self.paces = []  # (seconds of a batch, of its wait for the loader), one a record
        if self.output_dir is not None:
            from torch.utils.tensorboard import SummaryWriter  # a second to import: not for every front door

            self.board = SummaryWriter(str(self.output_dir / "tb"))

    def say(self, text=""):
        """Print a line, above the bar if there is one."""
        if not self.speaks:
            return
        if self.bar is not None:
            self.bar.clear()
        print(text, flush=True)

    def train(self, record):
        """Report a record of engine.train_one_epoch."""
        if not self.speaks:
            return
        self.paces.append((record["batch_seconds"], record["data_seconds"]))
        step, losses = record["step"], record["losses"]
        total_loss = sum(losses.values())
        parts = " ".join(f"{short_name(name)} {value:.3f}" for name, value in losses.items())
        memory = f"{record['memory_mb'] / 1024:.1f} GiB"
        if sys.stderr.isatty():
            if self.bar is None:
                self.bar = tqdm(
                    total=self.total_steps, initial=self.first_step, unit="step", dynamic_ncols=True
                )
            self.bar.update(step - self.bar.n)
            self.bar.set_postfix_str(
                f"loss {total_loss:.3f}, {record['images_per_second']:.1f} img/s, {memory}"
            )
        else:
            self.say(
                f"epoch {record['epoch']}  step {step}/{self.total_steps}  loss {total_loss:.3f} ({parts})  "
                f"lr {record['lr']:.3g}  {record['images_per_second']:.1f} img/s  "
                f"data {record['data_seconds'] * 1000:.0f} ms  eta {self.eta(step)}  {memory}"
            )
        if self.board is not None:
            for name, value in losses.items():
                self.board.add_scalar(f"train/{name}", value, step)
            self.board.add_scalar("train/loss", total_loss, step)
            for name in ("lr", "grad_norm", "images_per_second", "data_seconds", "memory_mb"):
                self.board.add_scalar(f"run/{name}", record[name], step)

    def eta(self, step):
        done = max(1, step - self.first_step)
        return format_duration((time.perf_counter() - self.started) / done * (self.total_steps - step))

    def end_bar(self):
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def epoch(self, record):
        """Append a record to metrics.jsonl and put its metrics on TensorBoard."""
        if self.output_dir is None:
            return
        with open(self.output_dir / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
        for kind, metrics in (record["eval"] or {}).items():
            if isinstance(metrics, dict):
                for name, value in metrics.items():
                    self.board.add_scalar(f"eval_{kind}/{name}", value, record["step"])
        self.board.flush()

    def pace(self):
        """(seconds of a batch, seconds of it spent waiting for the loader): the medians of the records."""
        return tuple(np.median(self.paces, axis=0).tolist())

    def picture(self, name, path, step):
        """An image file, onto TensorBoard."""
        if self.board is not None:
            image = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
            self.board.add_image(name, image, step, dataformats="HWC")

    def close(self):
        self.end_bar()
        if self.board is not None:
            self.board.close()


def short_name(loss):
    """loss_rpn_box_reg -> rpn_box, loss_classifier -> classifier: what fits on a line."""
    return loss.removeprefix("loss_").removesuffix("_reg")
