"""torch.compile for the parts of a detector whose shapes can be known in advance, and a count of what it compiled.

The whole detector does not compile well: what follows the RPN has as many rows as there are objects. Its backbone and
the convolutions of its RPN (or one-stage) head are most of its arithmetic, and depend on nothing but the batch's padded
shape. So batches are padded to a few shapes (rcnn.shape_buckets), each region is compiled once for each, and after
all shapes have been seen nothing is compiled any more.
"""

import torch
from torch import nn

from rcnn import FastTransform, shape_buckets

MODES = ("default", "reduce-overhead", "max-autotune")  # torch.compile's; the last two use CUDA graphs
MAX_GRAPHS_PER_REGION = (
    64  # buckets × (training, evaluation) × batch sizes; torch gives up at 8 of its own accord
)


def regions(detector: nn.Module) -> list[nn.Module]:
    """The modules that compile: the backbone and the head whose convolutions run over whole feature maps."""
    head = detector.rpn.head if hasattr(detector, "rpn") else detector.head
    return [detector.backbone, head]


def compile_regions(detector: nn.Module, **options) -> None:
    """Compile the detector's regions in place, each for static shapes, and give its input transform shape buckets.

    detector: from models.build_model, in fast mode or not. options: of torch.compile, such as mode.
    state_dict keys stay. Without a FastTransform (`--reference-ops`) shapes are as many as the data has.
    """
    transform = detector.transform
    if isinstance(transform, FastTransform) and transform.fixed_size is None:
        transform.buckets = shape_buckets(
            max(transform.min_size), transform.max_size, transform.size_divisible
        )
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_GRAPHS_PER_REGION)
    for region in regions(detector):
        region.compile(dynamic=False, **options)


def num_graphs() -> int:
    """Graphs that torch.compile has made so far in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
