"""What moves the weights: parameter groups, optimizers, the per-step learning rate and the EMA."""

import bisect
import contextlib
import math

import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

NORM_LAYERS = (
    nn.modules.batchnorm._BatchNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.LocalResponseNorm,
    FrozenBatchNorm2d,
)
IMAGES_PER_LR_UNIT = 16  # the batch at which torchvision, detectron2 and Detectron quote their learning rates
BASE_LR = {"sgd": 0.02, "sgd_nesterov": 0.02, "adamw": 1e-4}


def default_lr(opt, images_per_step):
    """The learning rate when none is given: the quoted one, scaled linearly to the images of a step.

    Source: Goyal et al., Accurate, Large Minibatch SGD, 2017.
    """
    return BASE_LR[opt] * images_per_step / IMAGES_PER_LR_UNIT


def parameter_groups(model, weight_decay, norm_weight_decay=None):
    """Trainable parameters as optimizer groups; those of norm layers apart if their decay differs."""
    if norm_weight_decay is None:
        return [{"params": [p for p in model.parameters() if p.requires_grad], "weight_decay": weight_decay}]
    norm, other = [], []
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        (norm if isinstance(module, NORM_LAYERS) else other).extend(own)
    groups = [
        {"params": other, "weight_decay": weight_decay},
        {"params": norm, "weight_decay": norm_weight_decay},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(opt, groups, lr, momentum):
    """opt: sgd, sgd_nesterov or adamw, each torch's fused form: one pass over the weights.

    The fused step also reads `found_inf`, which lets a non-finite update be dropped without asking the host.
    """
    if opt == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=True)
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=opt == "sgd_nesterov", fused=True)


class LrSchedule:
    """The learning rate as a pure function of the step, from warm-up through decay.

    Step s (0-based) runs at base_lr * warm-up(s) * decay(s). Warm-up climbs linearly from `warmup_factor`
    to 1 over `warmup_steps`; decay is `gamma` for each milestone passed ("multisteplr"), or half a cosine
    from 1 to 0 over `total_steps` ("cosineannealinglr"). Nothing but the step has to be saved to resume.
    """

    def __init__(self, kind, total_steps, milestones=(), gamma=0.1, warmup_steps=0, warmup_factor=1e-3):
        if kind not in ("multisteplr", "cosineannealinglr"):
            raise ValueError(f"learning rate schedule {kind!r}; use multisteplr or cosineannealinglr")
        self.kind = kind
        self.total_steps = total_steps
        self.milestones = sorted(milestones)
        self.gamma = gamma
        self.warmup_steps = warmup_steps
        self.warmup_factor = warmup_factor

    def factor(self, step):
        """What the base learning rate is multiplied with at `step`."""
        warmup = 1.0
        if step < self.warmup_steps:
            warmup = self.warmup_factor + (1 - self.warmup_factor) * step / self.warmup_steps
        if self.kind == "cosineannealinglr":
            return warmup * 0.5 * (1 + math.cos(math.pi * min(1, step / self.total_steps)))
        return warmup * self.gamma ** bisect.bisect_right(self.milestones, step)

    def apply(self, optimizer, step):
        """Set the rate of every group for `step`; returns the first group's."""
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * self.factor(step)
        return optimizer.param_groups[0]["lr"]


class Ema:
    """An exponential moving average of a model's floating-point weights and buffers.

    decay 0 switches it off: every method is then a no-op, and evaluation sees the model's own weights.
    Early steps use min(decay, (1 + n) / (10 + n)) after n updates, so that the start is soon forgotten.
    """

    def __init__(self, model, decay):
        self.decay = decay
        self.num_updates = 0
        state = model.state_dict() if decay else {}
        self.live = {name: value for name, value in state.items() if value.is_floating_point()}
        self.shadow = {name: value.detach().clone() for name, value in self.live.items()}

    @torch.no_grad()
    def update(self):
        if not self.decay:
            return
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        torch._foreach_lerp_(list(self.shadow.values()), list(self.live.values()), 1 - decay)

    def _swap(self):
        for name, live in self.live.items():
            shadow = self.shadow[name]
            kept = live.detach().clone()
            live.copy_(shadow)
            shadow.copy_(kept)

    @contextlib.contextmanager
    def applied(self):
        """Within the block the model carries the averaged weights."""
        with torch.no_grad():
            self._swap()
        try:
            yield
        finally:
            with torch.no_grad():
                self._swap()

    def state_dict(self):
        return {"num_updates": self.num_updates, "shadow": dict(self.shadow)}

    def load_state_dict(self, state):
        self.num_updates = state["num_updates"]
        for name, value in state["shadow"].items():
            self.shadow[name].copy_(value)
