"""Heatmaps of existing images, and what the UNet is called with."""

from collections.abc import Sequence
from typing import Any

import diffusers
import numpy as np
import torch

from ovref.models.attribution import FACTORS, noun_weights
from ovref.models.recorders.unet import recording


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
