"""Generates images, and attribution heatmaps of nouns, with Stable Diffusion 1.x, 2.x and XL."""

import copy
import logging
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.models.attention_processor import FusedAttnProcessor2_0
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError

from ovref.errors import ModelError
from ovref.models.attribution import FACTORS, noun_weights, recording
from ovref.models.schedulers import make_scheduler
from ovref.models.tokens import token_positions
from ovref_inference.models import resolve

logger = logging.getLogger(__name__)

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
"""Supported pipelines: `_class_name` in model_index.json."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class GeneratedImage:
    """A generated image and the heatmaps of its caption's nouns."""

    image_hwc: np.ndarray | None
    """(H, W, 3) uint8 RGB; None if the model's output was not finite."""
    heatmaps_nhw: np.ndarray
    """(nouns, h, w) float32 >= 0 at the size of the latent (`Attribution.heatmaps_bnhw`)."""


def load_pipeline(
    model: str, *, revision: str | None, scheduler: str, dtype: str, device: str
) -> Any:
    """A text-to-image pipeline, without safety checker, watermark and progress bar.

    Only safetensors files are read, so nothing is unpickled.

    Args:
        model: `miniature:stable_diffusion`, a Hugging Face id, or the path of a diffusers folder.
        revision: revision of the Hugging Face repository; None for its default branch or a folder.
        scheduler: a key of `schedulers.SCHEDULERS`.
        dtype: a key of `DTYPES`.
        device: torch device, such as `cuda` or `cpu`.

    Raises:
        ModelError: the model cannot be found, read or used for attribution.
    """
    path = resolve(model)
    named = f"the generator {model!r}" + (f" at revision {revision!r}" if revision else "")
    try:
        class_name = diffusers.DiffusionPipeline.load_config(path, revision=revision)["_class_name"]
        if class_name not in PIPELINES:
            raise ModelError(f"{named} is a {class_name}; attribution works with {PIPELINES}")
        extra = (
            {"safety_checker": None, "requires_safety_checker": False}
            if class_name == "StableDiffusionPipeline"
            else {"add_watermarker": False}
        )
        pipeline = getattr(diffusers, class_name).from_pretrained(
            path, revision=revision, dtype=DTYPES[dtype], use_safetensors=True, **extra
        )
    except (OSError, ValueError, KeyError, RuntimeError, HfHubHTTPError, SafetensorError) as error:
        raise ModelError(
            f"cannot load {named}: {error}. Expected a Hugging Face id that can be reached, or a "
            "folder with model_index.json and safetensors files"
        ) from error
    _check_text_to_image(pipeline, named)
    pipeline.scheduler = make_scheduler(scheduler, pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _check_text_to_image(pipeline: Any, named: str) -> None:
    """Raises ModelError for a model that needs more input than text, or lacks a text encoder."""
    channels, latents = pipeline.unet.config.in_channels, pipeline.vae.config.latent_channels
    if channels != latents:
        raise ModelError(
            f"{named} has a UNet of {channels} input channels, expected the {latents} of its "
            "latents: models for inpainting, depth or editing need an image besides the text and "
            "cannot be used"
        )
    if pipeline.tokenizer is None or pipeline.text_encoder is None:
        raise ModelError(
            f"{named} has no first text encoder (an SDXL refiner?), whose tokens attribution "
            "refers to: use a base model"
        )


def optimize_pipeline(
    pipeline: Any,
    *,
    compiled: bool,
    channels_last: bool,
    fused_projections: bool,
    cuda_graphs: bool = False,
) -> None:
    """Speeds up the pipeline in place; images change only by rounding.

    Args:
        pipeline: a pipeline of `load_pipeline`.
        compiled: compile UNet and decoder, each as one graph per input size. Compilation takes
            minutes the first time; later processes of the same user read the compiler's cache from
            disk.
        channels_last: use channels-last memory for their convolutions.
        fused_projections: compute query, key and value of self-attention in one product.
        cuda_graphs: launch compiled code as CUDA graphs where the compiler supports it.
    """
    unet, vae = pipeline.unet, pipeline.vae
    if fused_projections:
        # Not cross-attention: its keys come from few tokens, and attribution reads it.
        for name, module in unet.named_modules():
            if name.endswith("attn1"):
                module.fuse_projections()
                module.set_processor(FusedAttnProcessor2_0())
    if channels_last:
        unet.to(memory_format=torch.channels_last)
        vae.to(memory_format=torch.channels_last)
    if compiled:
        # Kernels chosen by timing would differ between workers, and so would the bytes.
        options = {"deterministic": True, "triton.cudagraphs": cuda_graphs}
        known = torch._inductor.list_options()
        options = {name: value for name, value in options.items() if name in known}
        unet.compile(fullgraph=True, dynamic=False, options=options)
        vae.decoder.compile(fullgraph=True, dynamic=False, options=options)


class Generator:
    """Generates a batch of images, each from its own seed, with the heatmaps of their nouns."""

    def __init__(self, pipeline: Any, settings: Any) -> None:
        """
        Args:
            pipeline: a pipeline of `load_pipeline`.
            settings: an `ovref.stages.synthesize.Synthesize` whose `batch_size` is a number. With
                `compiled`, smaller batches are padded to `batch_size` by repeating their last
                caption, so that a compiled UNet sees only one size.

        Raises:
            ModelError: the pipeline does not support the settings.
        """
        # Latent consistency models (LCM) take the guidance scale as an input of the UNet.
        if pipeline.unet.config.time_cond_proj_dim is not None:
            if settings.guided_share < 1:
                raise ModelError(
                    "this UNet is a latent consistency model, which has guidance built into every "
                    f"step: guided_share must be 1, found {settings.guided_share}"
                )
            if settings.negative_prompt:
                raise ModelError(
                    "this UNet is a latent consistency model, which ignores negative prompts: "
                    f"negative_prompt must be empty, found {settings.negative_prompt!r}"
                )
        try:
            pipeline.scheduler.set_timesteps(settings.steps)
        except ValueError as error:
            raise ModelError(
                f"the scheduler cannot make {settings.steps} steps: {error}"
            ) from error
        self._pipeline, self._settings = pipeline, settings
        self._guided_steps = guided_steps(settings.steps, settings.guidance, settings.guided_share)
        self._fill_up_to: int | None = settings.batch_size if settings.compiled else None
        self._most_at_once: int | None = None
        # A copy, because a fast tokenizer stores padding and truncation from call to call, and the
        # pipeline sets them while it generates, possibly in another thread.
        self._positions_tokenizer = copy.deepcopy(pipeline.tokenizer)
        # The scheduler, and the UNet while attention is recorded, hold the state of one batch.
        self._pipeline_lock = threading.Lock()

    def positions(
        self, caption: str, spans: Sequence[Sequence[tuple[int, int]]]
    ) -> list[tuple[int, ...]]:
        """`token_positions` with this pipeline's tokenizer. Safe while another thread generates."""
        return token_positions(self._positions_tokenizer, caption, spans)

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
            ModelError: the UNet's attention cannot be read.
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
        pipeline = self._pipeline
        height, width = self._settings.size_hw
        factor = pipeline.vae_scale_factor
        wanted = len(captions)
        if self._fill_up_to is not None:
            captions, positions, seeds = (
                [*items, *[items[-1]] * (self._fill_up_to - wanted)]
                for items in (captions, positions, seeds)
            )
        weights_bkn = noun_weights(positions, pipeline.tokenizer.model_max_length)
        # On the CPU, so that a seed gives the same noise on every device.
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        # None means the model's own empty conditioning: zeros for SDXL, otherwise an empty text.
        use_negative = self._settings.negative_prompt and self._settings.guidance > 1
        negative_prompt = [self._settings.negative_prompt] * len(captions) if use_negative else None
        latent_hw = (height // factor, width // factor)
        with (
            self._pipeline_lock,
            recording(pipeline.unet, weights_bkn, latent_hw, self._settings.factors) as attribution,
        ):
            pixels = pipeline(
                prompt=list(captions),
                negative_prompt=negative_prompt,
                num_inference_steps=self._settings.steps,
                guidance_scale=self._settings.guidance,
                height=height,
                width=width,
                generator=generators,
                output_type="pt",
                **self._partly_guided(),
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

    def _partly_guided(self) -> dict[str, Any]:
        """Arguments of the pipeline that end guidance after the guided share of the steps."""
        if self._guided_steps in (0, self._settings.steps):
            return {}
        names = ["prompt_embeds"]
        if isinstance(self._pipeline, diffusers.StableDiffusionXLPipeline):
            names += ["add_text_embeds", "add_time_ids"]
        return {
            "callback_on_step_end": _end_guidance_after(self._guided_steps),
            "callback_on_step_end_tensor_inputs": names,
        }


def guided_steps(steps: int, guidance: float, guided_share: float) -> int:
    """Number of guided steps per image, each of which costs two UNet passes."""
    return math.ceil(guided_share * steps) if guidance > 1 else 0


def _end_guidance_after(steps: int) -> Callable[..., dict[str, torch.Tensor]]:
    """A diffusers callback that switches guidance off after this many steps."""

    def step_ended(
        pipeline: Any, step: int, _timestep: Any, inputs: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        if step + 1 != steps:
            return {}
        pipeline._guidance_scale = 1.0
        return {name: tensor.chunk(2)[1] for name, tensor in inputs.items()}

    return step_ended


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
