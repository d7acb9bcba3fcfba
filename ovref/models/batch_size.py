"""Finds the largest batch that fits on a GPU by generating a few images, which are discarded."""

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch

from ovref.models.diffusion import Generator

logger = logging.getLogger(__name__)

PROBED = (2, 4)
"""Batch sizes whose memory is measured."""
PROBE_STEPS = 2
"""Scheduler steps while measuring; memory does not depend on their number."""
LARGEST = 32
"""Largest batch: a UNet at 512 pixels keeps the device busy with far fewer."""
SHARE = 0.5
"""Share of the free memory for images. The rest is for encoders in the same worker, other workers
on the device, fragmentation and longer captions. It costs at most one halving of the batch."""


def largest_batch(peaks: Mapping[int, int], free: int) -> int:
    """The largest power of two, up to `LARGEST`, whose images fit into `SHARE` of the free memory.

    Memory is extrapolated linearly from the two measurements. With fewer than two, the result is
    the size that was measured, or 1.

    Args:
        peaks: batch size -> peak bytes, for those of `PROBED` that fit.
        free: free bytes, with the model loaded.
    """
    most = LARGEST if len(peaks) > 1 else max(peaks, default=1)
    size = 1
    while 2 * size <= most and predicted(peaks, 2 * size) <= SHARE * free:
        size *= 2
    return size


def predicted(peaks: Mapping[int, int], size: int) -> float:
    """Bytes for a batch of `size`, on the line through the first and last measurement."""
    first, last = min(peaks), max(peaks)
    slope = (peaks[last] - peaks[first]) / (last - first) if last > first else 0.0
    # Less memory for more images is allocator noise.
    return peaks[last] + max(0.0, slope) * (size - last)


def automatic_batch_size(pipeline: Any, generator: Generator) -> int:
    """`largest_batch` on this CUDA device, measured with images of `generator`.

    Leaves the pipeline unchanged.

    Args:
        pipeline: the generator's pipeline, on the device; not compiled, because it would compile
            for each size.
        generator: a generator with few steps.
    """
    scheduler = pipeline.scheduler
    pipeline.scheduler = copy.deepcopy(scheduler)
    peaks: dict[int, int] = {}
    try:
        for size in PROBED:
            if (peak := _peak(generator, size)) is None:
                break
            peaks[size] = peak
    finally:
        pipeline.scheduler = scheduler
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    chosen = largest_batch(peaks, free)
    found = [f"{size} took {peak / 1e9:.2f} GB" for size, peak in peaks.items()]
    found += [f"{size} did not fit" for size in PROBED[len(peaks) :][:1]]
    logger.info(
        "batch_size=auto: batches of %d, for which %g of %.2f GB free may be used; %s",
        chosen, SHARE, free / 1e9, ", ".join(found),
    )  # fmt: skip
    return chosen


def _peak(generator: Generator, size: int) -> int | None:
    """Additional peak bytes of a batch of `size`; None if it does not fit."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    try:
        positions = [[(2,), (5,)]] * size
        generator.generate_at_once(["two dogs and a cat"] * size, positions, range(size))
    except torch.OutOfMemoryError:
        return None
    return torch.cuda.max_memory_reserved() - before
