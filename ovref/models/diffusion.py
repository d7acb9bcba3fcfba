"""Generates images with text-to-image diffusion models, and the heatmaps of their nouns."""

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch

from ovref.errors import ModelError
from ovref.models.attribution import FACTORS, noun_weights
from ovref.models.recorders import recorder_of
from ovref.models.recorders.unet import recording
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


@torch.no_grad()
def attribute_images(
    pipeline: Any,
    images_bhwc: np.ndarray,
    captions: Sequence[str],
    positions: Sequence[Sequence[Sequence[int]]],
    timesteps: Sequence[int],
    seed: int,
    factors: Sequence[int] = FACTORS,
) -> np.ndarray:
    """Heatmaps of existing images, for measuring attribution against true masks.

    Each image is encoded, noised to each timestep as in training, and denoised once with its own
    caption, without guidance; the heatmap is the mean over timesteps.

    Args:
        pipeline: a pipeline of `load_pipeline`.
        images_bhwc: (images, H, W, 3) uint8 RGB; H and W multiples of 8.
        captions: one per image.
        positions: token positions per caption and noun (`token_positions`).
        timesteps: in [0, training timesteps).
        seed: seed of the noise; each image has the same noise at all timesteps.
        factors: see `Synthesize.factors`.

    Returns:
        (images, nouns, h, w) float32 >= 0 at the size of the latent.
    """
    unet, vae, device = pipeline.unet, pipeline.vae, pipeline.unet.device
    pixels = torch.from_numpy(images_bhwc).permute(0, 3, 1, 2).to(device, vae.dtype) / 127.5 - 1
    latents = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=torch.Generator("cpu").manual_seed(seed))
    noise = noise.to(device, latents.dtype)
    conditioning = conditioning_of(pipeline, captions, images_bhwc.shape[1:3])
    # Every supported scheduler keeps the model's table of signal levels.
    signal = pipeline.scheduler.alphas_cumprod.to(device, torch.float32)
    weights_bkn = noun_weights(positions, pipeline.tokenizer.model_max_length)
    with recording(unet, weights_bkn, tuple(latents.shape[2:]), factors) as attribution:
        for timestep in timesteps:
            level = signal[timestep]
            noised = level.sqrt() * latents + (1 - level).sqrt() * noise
            unet(noised.to(unet.dtype), timestep, **conditioning)
    return attribution.heatmaps_bnhw().cpu().numpy()


def conditioning_of(
    pipeline: Any, captions: Sequence[str], size_hw: tuple[int, int]
) -> dict[str, Any]:
    """The UNet's conditioning for captions, as keyword arguments, without guidance."""
    encoded = pipeline.encode_prompt(
        prompt=list(captions),
        device=pipeline.unet.device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
    )
    if isinstance(pipeline, diffusers.StableDiffusionPipeline):
        return {"encoder_hidden_states": encoded[0]}
    embeddings, _, pooled, _ = encoded
    # SDXL takes the original size, the top-left corner of the crop, and the target size.
    time_ids = torch.tensor([[*size_hw, 0, 0, *size_hw]] * len(captions))
    time_ids = time_ids.to(embeddings.device, embeddings.dtype)
    return {
        "encoder_hidden_states": embeddings,
        "added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids},
    }


def to_uint8(images_bchw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Converts images in [0, 1], (b, 3, H, W), to (b, H, W, 3) uint8 on their device, where fewer
    bytes remain to copy to the host; also returns which of them are finite, (b,) bool."""
    images = images_bchw.float()
    finite_b = images.isfinite().flatten(1).all(1)
    images = images.nan_to_num().mul(255).round()
    return images.to(torch.uint8).permute(0, 2, 3, 1).contiguous(), finite_b
