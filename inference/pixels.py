"""Images as a model takes them, and batches that fit into a GPU's memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate


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
            pixels = torch.tensor(image, device=self.device).permute(2, 0, 1)[None].float()
            if pixels.shape[2:] != size_hw:
                pixels = interpolate(pixels, size=size_hw, mode=self.mode, antialias=True)
            resized.append(pixels.clamp(0, 255))
        mean = torch.tensor(self.mean, device=self.device)[:, None, None]
        std = torch.tensor(self.std, device=self.device)[:, None, None]
        return ((torch.cat(resized) / 255 - mean) / std).to(self.dtype)


def check_image(image_hwc: np.ndarray) -> None:
    """Raises ValueError for anything but (H, W, 3) uint8 with at least one pixel."""
    if image_hwc.ndim != 3 or image_hwc.shape[2] != 3 or image_hwc.dtype != np.uint8:
        raise ValueError(
            f"an image must be (H, W, 3) uint8, found {image_hwc.shape} {image_hwc.dtype}"
        )
    if image_hwc.size == 0:
        raise ValueError(f"an image must have a pixel, found {image_hwc.shape}")


def batched(
    items: Sequence[Any], batch_size: int, run: Callable[[Sequence[Any]], Any]
) -> list[Any]:
    """`run` over all items in batches; out of GPU memory, with half the batch from there on."""
    done: list[np.ndarray] = []
    start = 0
    while start < len(items):
        try:
            done.append(run(items[start : start + batch_size]))
            start += batch_size
        except torch.cuda.OutOfMemoryError:
            if batch_size == 1:
                raise
            torch.cuda.empty_cache()
            batch_size //= 2
    return done
