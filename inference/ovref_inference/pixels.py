"""Images as a model takes them, and batches that fit into a GPU's memory."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate

from ovref_inference.images import check_image

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pixels:
    """Images -> normalised pixels, as the model was trained on."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    mode: str
    device: torch.device
    dtype: torch.dtype

    @staticmethod
    def of_open_clip(model: Any, device: torch.device, dtype: torch.dtype) -> "Pixels":
        settings = model.visual.preprocess_cfg
        mean, std = tuple(settings["mean"]), tuple(settings["std"])
        return Pixels(mean, std, settings["interpolation"], device, dtype)

    def __call__(self, images: Sequence[np.ndarray], size_hw: tuple[int, int]) -> torch.Tensor:
        """(n, 3, *size_hw)."""
        resized = []
        for image in images:
            check_image(image)
            # A view such as image[..., ::-1] of OpenCV's BGR has strides that torch does not take.
            image = np.ascontiguousarray(image)
            pixels = torch.tensor(image, device=self.device).permute(2, 0, 1)[None].float()
            if pixels.shape[2:] != size_hw:
                pixels = interpolate(pixels, size=size_hw, mode=self.mode, antialias=True)
            resized.append(pixels.clamp(0, 255))
        mean = torch.tensor(self.mean, device=self.device)[:, None, None]
        std = torch.tensor(self.std, device=self.device)[:, None, None]
        return ((torch.cat(resized) / 255 - mean) / std).to(self.dtype)


class BatchSize:
    """How many items go into one pass at most; smaller for good once the device ran out of memory.

    Kernels round differently at another batch size: what is made after that differs in the last
    bits from what another machine makes. Where bytes matter, configure the smaller size.
    """

    def __init__(self, items: int) -> None:
        self.items = items


def batched(
    items: Sequence[Any], batch_size: int | BatchSize, run: Callable[[Sequence[Any]], Any]
) -> list[Any]:
    """`run` over all items in batches; out of GPU memory, with half the batch from there on.

    Args:
        batch_size: a `BatchSize` remembers the half for the calls to come.

    Raises:
        torch.OutOfMemoryError: a single item does not fit.
    """
    size = BatchSize(batch_size) if isinstance(batch_size, int) else batch_size
    done: list[Any] = []
    start = 0
    while start < len(items):
        part = items[start : start + size.items]
        try:
            done.append(run(part))
            start += len(part)
            continue
        except torch.OutOfMemoryError:
            if len(part) == 1:
                raise
        # Outside the handler, so that the failed call's tensors are free.
        size.items = len(part) // 2
        torch.cuda.empty_cache()
        logger.warning(
            "out of memory with %d items at once; going on with %d", len(part), size.items
        )
    return done
