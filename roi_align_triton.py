"""The sparse product of roi_align.py as a Triton kernel, for CUDA.

torch's embedding_bag reads one element a thread and the entries of a bag one after another. Here a program sums
a bag for many channels at once, ENTRIES table rows at a time: in the backward pass a feature pixel under many
small RoIs has thousands of entries, which would otherwise be thousands of loads in a row. Weights stay float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ENTRIES = 16  # of a bag that are loaded at once; a bin of RoIAlign at sampling ratio 2 has exactly 16
MAX_CHANNELS = 256  # of a program


def bag_sums(table: Tensor, rows: Tensor, bounds: Tensor, weights: Tensor) -> Tensor:
    """sum of weights[k] * table[rows[k]] over bounds[n] <= k < bounds[n + 1], for each of N bags: [N, C].

    table: [T, C], float32, bfloat16 or float16. rows: int32 [K] in 0..T-1, bounds: int32 [N + 1],
    weights: float32 [K]. Sums are formed in float32 and rounded once, to the table's dtype.
    """
    num_bags, num_channels = len(bounds) - 1, table.shape[1]
    sums = table.new_empty(num_bags, num_channels)
    if sums.numel() == 0:
        return sums
    channels = min(MAX_CHANNELS, triton.next_power_of_2(num_channels))
    grid = (num_bags, triton.cdiv(num_channels, channels))
    with torch.cuda.device_of(table):
        _bag_sums[grid](
            table.contiguous(), rows, bounds, weights, sums, num_channels, CHANNELS=channels, ENTRIES=ENTRIES
        )
    return sums


@triton.jit
def _bag_sums(
    table, rows, bounds, weights, sums, num_channels, CHANNELS: tl.constexpr, ENTRIES: tl.constexpr
):
    bag = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < num_channels
    start = tl.load(bounds + bag)
    end = tl.load(bounds + bag + 1)
    total = tl.zeros([CHANNELS], dtype=tl.float32)
    for first in range(start, end, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        is_entry = entry < end
        row = tl.load(rows + entry, mask=is_entry, other=0).to(tl.int64)
        weight = tl.load(weights + entry, mask=is_entry, other=0.0)
        place = table + row[:, None] * num_channels + channel[None, :]
        values = tl.load(place, mask=is_entry[:, None] & is_channel[None, :], other=0.0)
        total += tl.sum(values.to(tl.float32) * weight[:, None], axis=0)
    tl.store(sums + bag * num_channels + channel, total.to(sums.dtype.element_ty), mask=is_channel)
