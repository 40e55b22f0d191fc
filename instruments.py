"""The instruments of a benchmark: memory, the time of each stage, a step's products and how fast they could be.

A product is one call of a convolution, its backward, or a matrix product; FLOPs count a multiplication and an addition
as two.
"""

import contextlib
import json
import time
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import utils

STAGES = (
    "transform",
    "backbone",
    "proposal_generator",
    "rpn",
    "head",
    "roi_heads",
)  # torchvision's, detectron2's


def synchronize(device):
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- memory -----------------------------------------------------------------------------------------------


def peak_memory_mb(device):
    """{"host_mb"} and on a GPU {"device_mb"}: the most memory that this process has held.

    VmHWM where the system has it: ru_maxrss starts from the parent's memory at the fork.
    """
    peak = {"host_mb": utils.peak_memory_mb(torch.device("cpu"))}
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        peak["host_mb"] = int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 2**10
    if device.type == "cuda":
        peak["device_mb"] = utils.peak_memory_mb(device)
    return peak


def unique_memory_mb(pid):
    """What would be freed if this process ended: its private pages, MiB. Linux."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 2**10


# --- stages -----------------------------------------------------------------------------------------------


class StepTimer:
    """Where a step's time goes: each mark books the time since the last one under a name."""

    def __init__(self, device):
        self.device, self.last, self.seconds = device, None, {}

    def mark(self, name):
        synchronize(self.device)
        now = time.perf_counter()
        if self.last is not None:
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now


class Probe:
    """Hooks on a detector, for as long as the block lasts, that time its stages and count what passes through it.

    mark: gets a name at the end of each stage; "copy" before the forward pass, "between stages" for what is between.
    """

    def __init__(self, model, mark):
        self.model, self.mark = model, mark
        self.num_images = self.num_pixels = self.num_positives = 0

    def __enter__(self):
        model = self.model
        self.handles = [
            model.register_forward_pre_hook(lambda *_: self.mark("copy")),
            model.backbone.register_forward_pre_hook(self.see_batch),
        ]
        for name in STAGES:
            if hasattr(model, name):
                stage = getattr(model, name)
                self.handles += [
                    stage.register_forward_pre_hook(lambda *_: self.mark("between stages")),
                    stage.register_forward_hook(lambda *_, name=name: self.mark(name)),
                ]
        self.handles.append(model.register_forward_hook(lambda *_: self.mark("between stages")))
        self.head = getattr(getattr(model, "roi_heads", None), "mask_head", None)
        if self.head is not None:
            self.handles.append(self.head.register_forward_pre_hook(self.see_rois))
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    def see_batch(self, module, args):
        num_images, _, height, width = args[0].shape
        self.num_images += num_images
        self.num_pixels += num_images * height * width

    def see_rois(self, module, args):
        self.num_positives += len(args[0])

    def counts(self):
        """{"padded_pixels", "positives"} an image: RoIs with a mask; None for a model without."""
        return {
            "padded_pixels": self.num_pixels / self.num_images,
            "positives": self.num_positives / self.num_images if self.head is not None else None,
        }


# --- counting ---------------------------------------------------------------------------------------------


class ProductRecorder(TorchDispatchMode):
    """Notes every product within its block, and in which phase of the step it ran.

    phase: "forward" or "backward"; whoever runs the step sets it.
    """

    def __init__(self):
        super().__init__()
        self.phase = "forward"
        self._found = {}  # (phase, call as text) -> [FLOPs of one call, number of calls]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        count_flops = flop_registry.get(func._overloadpacket)
        if count_flops is not None:
            call = {"op": func._schema.name, "overload": func._overloadname, "args": _describe(args)}
            flops = count_flops(*args, **kwargs, out_val=out)
            self._found.setdefault((self.phase, json.dumps(call)), [flops, 0])[1] += 1
        return out

    def products(self):
        """Dicts {"phase", "op", "overload", "args", "flops" (of one call), "calls"}, the largest share first."""
        found = [
            {"phase": phase, **json.loads(call), "flops": flops, "calls": calls}
            for (phase, call), (flops, calls) in self._found.items()
            if flops
        ]
        return sorted(found, key=lambda product: -product["flops"] * product["calls"])


def _describe(value):
    """An operator's argument as JSON: a tensor by its shape, strides and dtype."""
    if isinstance(value, torch.Tensor):
        return {
            "shape": list(value.shape),
            "stride": list(value.stride()),
            "dtype": str(value.dtype).removeprefix("torch."),
        }
    if isinstance(value, (list, tuple)):
        return [_describe(item) for item in value]
    return value


def total_flops(products, phase=None):
    """FLOPs of a step, or of one phase of it."""
    return sum(p["flops"] * p["calls"] for p in products if phase in (None, p["phase"]))


def largest(products, count):
    """The `count` products of each phase that take most of the step's FLOPs."""
    phases = ("forward", "backward")
    return [p for phase in phases for p in [q for q in products if q["phase"] == phase][:count]]


# --- timing -----------------------------------------------------------------------------------------------


class Replay:
    """One product on random numbers of the recorded shapes, strides and dtypes, ready to be timed.

    noise: float [M], repeated to fill every tensor (drawing each anew would take longer than the products).
    """

    def __init__(self, product, noise):
        self.product, self.device = product, noise.device
        namespace, name = product["op"].split("::")
        self.function = getattr(getattr(getattr(torch.ops, namespace), name), product["overload"])
        self.args = [_rebuild(value, noise) for value in product["args"]]

    @torch.no_grad()
    def seconds(self, min_seconds=0.1):
        """The best of several calls, at least two and for at least so long: seconds of one."""
        best, spent, calls = float("inf"), 0.0, 0
        while calls < 2 or spent < min_seconds:
            synchronize(self.device)
            started = time.perf_counter()
            self.function(*self.args)
            synchronize(self.device)
            elapsed = time.perf_counter() - started
            best, spent, calls = min(best, elapsed), spent + elapsed, calls + 1
        return best


def _rebuild(value, noise):
    if isinstance(value, dict):
        shape, stride = value["shape"], value["stride"]
        size = 1 + sum((length - 1) * step for length, step in zip(shape, stride, strict=True))
        flat = noise.to(getattr(torch, value["dtype"])).repeat(-(-size // len(noise)))
        return flat.as_strided(shape, stride)
    if isinstance(value, list):
        return [_rebuild(item, noise) for item in value]
    return value


def measure_rates(products, device):
    """{phase: FLOP/s} over these products, each timed alone and weighed by its share of the step."""
    noise = torch.randn(1_000_003, device=device)
    rates = {}
    for phase in ("forward", "backward"):
        chosen = [product for product in products if product["phase"] == phase]
        seconds = sum(Replay(product, noise).seconds() * product["calls"] for product in chosen)
        if seconds:
            rates[phase] = total_flops(chosen) / seconds
    return rates


def attainable_seconds(products, rates):
    """How long a step's products take at the measured rates, if nothing else took any time."""
    return sum(total_flops(products, phase) / rate for phase, rate in rates.items())


def device_ceilings(device, side, dtype, megabytes, repeats=5):
    """A large product and a large copy: {"product_flops": FLOP/s, "copy_bytes": bytes/s, read and written both}."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.randn(megabytes * 2**18, device=device)
    target = torch.empty_like(source)

    def best_of(work):
        times = []
        for _ in range(repeats + 1):  # the first warms up
            synchronize(device)
            started = time.perf_counter()
            work()
            synchronize(device)
            times.append(time.perf_counter() - started)
        return min(times[1:])

    return {
        "product_flops": 2 * side**3 / best_of(lambda: torch.mm(a, b)),
        "copy_bytes": 2 * source.nbytes / best_of(lambda: target.copy_(source)),
    }
