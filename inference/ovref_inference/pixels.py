"""Preprocessing of images, the device of a model, and batches that fit into its memory."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate

from ovref_inference.errors import ModelError
from ovref_inference.images import check_image

logger = logging.getLogger(__name__)


RESAMPLING = {2: "bilinear", 3: "bicubic"}
"""PIL's numbers for the supported interpolations."""

FLAGS = {
    "do_resize", "do_center_crop", "do_pad", "do_rescale", "do_normalize", "do_convert_rgb",
    "do_reduce_labels", "do_convert_annotations",
}  # fmt: skip
"""Flags of an image processor that are honoured, or that concern sizes (`size_hw` sets them) and
labels."""


def device_of(name: str | None) -> torch.device:
    """The device of that name; None selects a GPU if there is one.

    Raises:
        ModelError: torch knows no such device, or this machine has none.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"there is no device {name!r}; give cpu, cuda or cuda:1") from error
    if device.type == "cuda" and not (device.index or 0) < torch.cuda.device_count():
        raise ModelError(
            f"the device {name} is not here: torch finds {torch.cuda.device_count()} GPUs"
        )
    return device


@dataclass(frozen=True)
class Pixels:
    """Preprocessing: images to the normalised pixels that a model expects."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    mode: str
    """Interpolation: `bilinear` or `bicubic`."""
    device: torch.device
    dtype: torch.dtype
    divisor: float = 255.0
    """Values from 0 to 255 are divided by this before normalisation."""

    @staticmethod
    def of_open_clip(model: Any, device: torch.device, dtype: torch.dtype) -> "Pixels":
        """Preprocessing of an open_clip model; its `resize_mode` is replaced by plain resizing.

        Raises:
            ModelError: it needs another interpolation or colour mode.
        """
        settings = model.visual.preprocess_cfg
        mean, std, mode = settings["mean"], settings["std"], settings["interpolation"]
        if mode not in RESAMPLING.values() or settings.get("mode", "RGB") != "RGB":
            raise ModelError(
                "preprocessing must be of RGB images, bilinear or bicubic, found mode "
                f"{settings.get('mode')!r} and interpolation {mode!r}"
            )
        return Pixels(tuple(mean), tuple(std), mode, device, dtype)

    @staticmethod
    def of_transformers(
        settings: Mapping[str, Any], device: torch.device, dtype: torch.dtype
    ) -> "Pixels":
        """Preprocessing of a transformers image processor, from its fields (`to_dict`).

        Rescaling, normalisation and resampling are honoured. Sizes, crops and padding are replaced
        by resizing to the size that is configured.

        Raises:
            ModelError: it does something else with images.
        """
        actions = [name for name in settings if name.startswith("do_") or name == "rescale_offset"]
        other = [name for name in actions if settings[name] and name not in FLAGS]
        if other:
            raise ModelError(f"the image processor's {', '.join(other)} is not supported")
        mode = RESAMPLING.get(settings.get("resample", -1))
        if mode is None:
            raise ModelError(
                f"the image processor's resample must be one of {RESAMPLING}, found "
                f"{settings.get('resample')!r}"
            )
        mean, std, divisor = (0.0,), (1.0,), 1.0
        if settings.get("do_normalize"):
            mean, std = (
                tuple(np.atleast_1d(settings[name]).tolist())
                for name in ("image_mean", "image_std")
            )
        if settings.get("do_rescale"):
            divisor = 1 / settings["rescale_factor"]
        return Pixels(mean, std, mode, device, dtype, divisor)

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
        return ((torch.cat(resized) / self.divisor - mean) / std).to(self.dtype)


class BatchSize:
    """Maximum number of items per forward pass; halved permanently if the device runs out of
    memory.

    Kernels round differently at another batch size: results then differ in the last bits from those
    of another machine. Where bytes matter, configure the smaller size.
    """

    def __init__(self, items: int) -> None:
        self.items = items


def batched(
    items: Sequence[Any], batch_size: int | BatchSize, run: Callable[[Sequence[Any]], Any]
) -> list[Any]:
    """Applies `run` to all items in batches, halving the batch size if GPU memory runs out.

    Args:
        batch_size: a `BatchSize` keeps the halved size for later calls.

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
            "out of memory with a batch of %d; continuing with %d", len(part), size.items
        )
    return done
