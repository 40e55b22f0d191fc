"""Where a training step's time goes: a few steps of a real run are watched, a trace is written, a verdict is given.

engine.train_one_epoch tells a StepProfiler when each part of a step is over. After a warm-up it watches three stretches
of steps, because watching changes what is watched: plain steps for the total and the wait for data, steps under
torch.profiler for the trace, and steps that wait for the device after each part for the breakdown.
"""

import os
import time
from pathlib import Path

import torch

from instruments import Probe, StepTimer, synchronize

WARMUP_STEPS = {"cpu": 3, "cuda": 20}
PLAIN_STEPS = {"cpu": 5, "cuda": 20}
TRACED_STEPS = {"cpu": 1, "cuda": 3}
PARTED_STEPS = {"cpu": 3, "cuda": 10}
DATA_BOUND_SHARE = 0.1  # of a step spent waiting for the loader
BUSY_SHARE = 0.85  # of a step in which a GPU that is well fed computes


class StepProfiler:
    """Called with the name of each part of a step that is over; prints its findings once, then does nothing.

    detector: whose stages are told apart. folder: gets trace.json, for chrome://tracing or Perfetto. say: prints.
    hint: settings of the run that decide which flag to try: {"workers", "amp", "compiled"}.
    """

    def __init__(self, detector, device, folder, say, hint):
        self.detector, self.device, self.folder, self.say, self.hint = (
            detector,
            device,
            Path(folder),
            say,
            hint,
        )
        self.kind = device.type if device.type in WARMUP_STEPS else "cpu"
        self.step, self.listener, self.busy = 0, None, None
        self.actions = {}  # number of a step -> what to do after it, in this order
        stretches = (
            (PLAIN_STEPS, self.start_plain, self.end_plain),
            (TRACED_STEPS, self.start_trace, self.end_trace),
            (PARTED_STEPS, self.start_parts, self.end_parts),
        )
        at = WARMUP_STEPS[self.kind]
        for lengths, start, end in stretches:
            self.actions.setdefault(at, []).append(start)
            at += lengths[self.kind]
            self.actions.setdefault(at, []).append(end)

    def __call__(self, part):
        if self.listener is not None:
            self.listener(part)
        if part == "optimizer":
            self.step += 1
            for action in self.actions.pop(self.step, ()):
                action()

    def close(self):
        """To be called at the end of the run, which may have been too short."""
        if self.actions:
            self.say(f"--profile needs {max(self.actions)} steps; this run had {self.step}")

    # Each stretch begins and ends right after a step.

    def start_plain(self):
        synchronize(self.device)
        self.began = self.left = time.perf_counter()
        self.waited = 0.0
        self.listener = self.see_wait

    def see_wait(self, part):
        now = time.perf_counter()
        if part == "data":
            self.waited += now - self.left
        self.left = now

    def end_plain(self):
        synchronize(self.device)
        self.listener = None
        steps = PLAIN_STEPS[self.kind]
        self.seconds, self.waited = (time.perf_counter() - self.began) / steps, self.waited / steps

    def start_trace(self):
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it complains about the GPU that is not there
        self.profile = torch.profiler.profile(activities=activities)
        self.profile.start()

    def end_trace(self):
        synchronize(self.device)
        self.profile.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.profile.export_chrome_trace(str(self.folder / "trace.json"))
        kernels = [
            (event.time_range.start, event.time_range.end)
            for event in self.profile.events()
            if event.device_type == torch.autograd.DeviceType.CUDA
        ]
        if kernels:  # microseconds
            span = max(end for _, end in kernels) - min(start for start, _ in kernels)
            self.busy = covered(kernels) / span
        del self.profile

    def start_parts(self):
        self.timer = StepTimer(self.device)
        self.timer.mark("start")
        self.probe = Probe(self.detector, self.timer.mark)
        self.probe.__enter__()
        self.listener = self.timer.mark

    def end_parts(self):
        self.probe.__exit__()
        self.listener = None
        steps = PARTED_STEPS[self.kind]
        parts = {name: seconds / steps for name, seconds in self.timer.seconds.items()}
        self.say(format_findings(self.seconds, self.waited, parts, self.busy))
        self.say(verdict(self.waited / self.seconds, self.busy, **self.hint))
        self.say(f"trace: {self.folder / 'trace.json'}")


def covered(intervals):
    """The length of the union of intervals (start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def format_findings(seconds, waited, parts, busy):
    """A step's milliseconds and, measured apart, each part's, as text. busy: share of the GPU's time, or None."""
    whole = sum(parts.values())
    lines = [
        f"a step takes {1000 * seconds:.1f} ms, of which it waits {1000 * waited:.1f} ms for data"
        + (f"; the GPU computes {busy:.0%} of the time" if busy is not None else "")
    ]
    lines += [
        f"  {name:15s} {1000 * part:9.1f} ms {part / whole:6.1%}" for name, part in parts.items() if part > 0
    ]
    return "\n".join(lines)


def verdict(waiting, busy, *, workers, amp, compiled):
    """One line: what bounds the step, and the flag to try.

    waiting: share of a step spent waiting for data. busy: share in which the GPU computes; None on a CPU.
    """
    if waiting > DATA_BOUND_SHARE:
        return f"data-bound: {waiting:.0%} of each step waits for data; try --workers {max(2, 2 * workers)}"
    if busy is not None and busy < BUSY_SHARE:
        advice = (
            "a larger --batch-size" if compiled else "--compile reduce-overhead, or a larger --batch-size"
        )
        return (
            f"sync-bound: the GPU computes only {busy:.0%} of the time, it waits for the host; try {advice}"
        )
    if not amp:
        return "compute-bound: arithmetic takes the time; try --amp"
    if busy is not None and not compiled:
        return "compute-bound: arithmetic takes the time; try --compile"
    return "compute-bound: arithmetic takes the time, and the flags that speed it up are on"
