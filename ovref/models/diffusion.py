"""Generates images with text-to-image diffusion models, and the heatmaps of their nouns."""

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ovref.errors import ModelError
from ovref.models.recorders import recorder_of
from ovref.models.schedulers import set_timesteps

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GeneratedImage:
    """A generated image and the heatmaps of its caption's nouns."""

    image_hwc: np.ndarray | None
    """(H, W, 3) uint8 RGB; None if the model's output was not finite."""
    heatmaps_nhw: np.ndarray
    """(nouns, h, w) float32 >= 0, of a UNet at the size of its latent, of a transformer at that of
    its grid of image positions."""


class Generator:
    """Generates a batch of images, each from its own seed, with the heatmaps of their nouns."""

    def __init__(self, pipeline: Any, settings: Any) -> None:
        """
        Args:
            pipeline: a pipeline of `loading.load_pipeline`.
            settings: an `ovref.stages.synthesize.Synthesize` whose `batch_size` is a number. With
                `compiled`, smaller batches are padded to `batch_size` by repeating their last
                caption, so that a compiled network sees only one size.

        Raises:
            ModelError: the pipeline does not support the settings.
        """
        self._recorder = recorder_of(pipeline)
        self._recorder.check(settings)
        try:
            set_timesteps(pipeline.scheduler, settings.steps)
        except ValueError as error:
            raise ModelError(
                f"the scheduler cannot make {settings.steps} steps: {error}"
            ) from error
        self._pipeline, self._settings = pipeline, settings
        self.provenance: dict[str, Any] = self._recorder.provenance(settings)
        """Provenance of each image: what was read of a transformer's attention."""
        self._fill_up_to: int | None = settings.batch_size if settings.compiled else None
        self._most_at_once: int | None = None
        # The pipeline's scheduler, and the network while it is recorded, hold the state of one
        # batch.
        self._pipeline_lock = threading.Lock()

    def positions(
        self, caption: str, spans: Sequence[Sequence[tuple[int, int]]]
    ) -> list[tuple[int, ...]]:
        """Positions of each noun's tokens in the text that attention sees; empty for a noun beyond
        the context. Other threads may generate meanwhile.

        Args:
            caption: the prompt.
            spans: for each noun, the character spans [start, end) of its occurrences.
        """
        return self._recorder.positions(caption, spans)

    def generate(
        self,
        captions: Sequence[str],
        positions: Sequence[Sequence[Sequence[int]]],
        seeds: Sequence[int],
    ) -> list[GeneratedImage]:
        """Generates one image per caption, in one batch.

        An image depends only on its caption and seed, except for rounding, which depends on the
        batch size: equal batches give equal bytes. When the device runs out of memory, the batch
        size is halved for good.

        Args:
            captions: the prompts.
            positions: token positions per caption and noun (`positions`).
            seeds: one per caption, in [0, 2**63).

        Raises:
            torch.OutOfMemoryError: a single image does not fit.
            ModelError: the network's attention cannot be read.
        """
        images: list[GeneratedImage] = []
        while len(images) < len(captions):
            stop = None if self._most_at_once is None else len(images) + self._most_at_once
            part = slice(len(images), stop)
            try:
                images += self.generate_at_once(captions[part], positions[part], seeds[part])
                continue
            except torch.OutOfMemoryError:
                size = self._fill_up_to or len(captions[part])
                if size == 1:
                    raise
            # Outside the handler, so that the failed call's tensors have been freed.
            self._most_at_once = size // 2
            if self._fill_up_to is not None:
                self._fill_up_to = size // 2
            torch.cuda.empty_cache()
            logger.warning(
                "out of memory with batches of %d images; continuing with %d", size, size // 2
            )
        return images

    def generate_at_once(
        self,
        captions: Sequence[str],
        positions: Sequence[Sequence[Sequence[int]]],
        seeds: Sequence[int],
    ) -> list[GeneratedImage]:
        """Like `generate`, but without halving the batch.

        Raises:
            torch.OutOfMemoryError: it does not fit.
            ModelError: as `generate`.
        """
        height, width = self._settings.image_size_hw
        wanted = len(captions)
        if self._fill_up_to is not None:
            captions, positions, seeds = (
                [*items, *[items[-1]] * (self._fill_up_to - wanted)]
                for items in (captions, positions, seeds)
            )
        # On the CPU, so that a seed gives the same noise on every device.
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        with (
            self._pipeline_lock,
            self._recorder.recording(positions, self._settings) as attribution,
        ):
            pixels = self._pipeline(
                prompt=list(captions),
                num_inference_steps=self._settings.steps,
                height=height,
                width=width,
                generator=generators,
                output_type="pt",
                **self._recorder.options(captions, self._settings),
            ).images
        pixels_bhwc, finite_b = (found.cpu().numpy() for found in to_uint8(pixels))
        heatmaps_bnhw = attribution.heatmaps_bnhw().cpu().numpy()
        return [
            GeneratedImage(
                image_hwc=image_hwc if finite else None, heatmaps_nhw=heatmaps_nhw[: len(nouns)]
            )
            for image_hwc, finite, heatmaps_nhw, nouns in zip(
                pixels_bhwc, finite_b, heatmaps_bnhw, positions, strict=True
            )
        ][:wanted]


def to_uint8(images_bchw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Converts images in [0, 1], (b, 3, H, W), to (b, H, W, 3) uint8 on their device, where fewer
    bytes remain to copy to the host; also returns which of them are finite, (b,) bool."""
    images = images_bchw.float()
    finite_b = images.isfinite().flatten(1).all(1)
    images = images.nan_to_num().mul(255).round()
    return images.to(torch.uint8).permute(0, 2, 3, 1).contiguous(), finite_b
