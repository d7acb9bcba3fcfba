"""Drawing captions with Stable Diffusion 1.x, 2.x and XL, with the attribution of their nouns."""

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
"""`_class_name` in model_index.json of the models whose attribution can be read."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """One generated image and the heatmaps of its caption's nouns."""

    image_hwc: np.ndarray | None
    """(H, W, 3) uint8 RGB; None when the model gave numbers that are not finite."""
    heatmaps_nhw: np.ndarray
    """(nouns, h, w) float32 >= 0 at the size of the latent (`Attribution.heatmaps_bnhw`)."""


def load_pipeline(
    model: str, *, revision: str | None, scheduler: str, dtype: str, device: str
) -> Any:
    """A text-to-image pipeline, ready to draw: no safety checker, no watermark, no progress bar.

    Only safetensors files are read, so nothing is unpickled.

    Args:
        model: `miniature:stable_diffusion`, a Hugging Face id, or the path of a diffusers folder.
        revision: of the Hugging Face repository; None for its default branch or a folder.
        scheduler: a key of `schedulers.SCHEDULERS`.
        dtype: a key of `DTYPES`.
        device: of torch, such as `cuda` or `cpu`.

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
    """Raises ModelError for a model that needs more than a text, or lacks what reads texts."""
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


def quicken(
    pipeline: Any,
    *,
    compiled: bool,
    channels_last: bool,
    fused_projections: bool,
    cuda_graphs: bool = False,
) -> None:
    """Makes a pipeline draw the same images faster, but for rounding.

    Args:
        pipeline: as `load_pipeline` gives it; changed in place.
        compiled: UNet and decoder are compiled, each as one graph, for every size they are called
            with; minutes the first time, then from the compiler's cache on the machine's disk,
            which all processes of a user share.
        channels_last: their convolutions work on channels-last memory.
        fused_projections: query, key and value of self-attention are one product.
        cuda_graphs: what is compiled for a GPU is launched as CUDA graphs where the compiler can.
    """
    unet, vae = pipeline.unet, pipeline.vae
    if fused_projections:
        # Cross-attention is left alone: its keys come from few tokens, and attribution reads it.
        for name, module in unet.named_modules():
            if name.endswith("attn1"):
                module.fuse_projections()
                module.set_processor(FusedAttnProcessor2_0())
    if channels_last:
        unet.to(memory_format=torch.channels_last)
        vae.to(memory_format=torch.channels_last)
    if compiled:
        # Kernels chosen by timing them would be others in another worker, and so would the bytes.
        options = {"deterministic": True, "triton.cudagraphs": cuda_graphs}
        known = torch._inductor.list_options()
        options = {name: value for name, value in options.items() if name in known}
        unet.compile(fullgraph=True, dynamic=False, options=options)
        vae.decoder.compile(fullgraph=True, dynamic=False, options=options)


class Generator:
    """Draws batches of captions, each from its own seed, with the heatmaps of their nouns."""

    def __init__(
        self,
        pipeline: Any,
        *,
        steps: int,
        guidance: float,
        size_hw: tuple[int, int],
        negative_prompt: str = "",
        factors: Sequence[int] = FACTORS,
        guided_share: float = 1.0,
        fill_up_to: int | None = None,
    ):
        """
        Args:
            pipeline: as `load_pipeline` gives it.
            steps: of the scheduler.
            guidance: classifier-free guidance scale; at 1 or less there is no guidance.
            size_hw: of the images, both multiples of 8.
            negative_prompt: what guidance leads away from; empty for what the model takes for
                nothing.
            factors: of the layers whose attention counts (`attribution.recording`).
            guided_share: share of the steps, from the first on, in (0, 1], that are guided; the
                others cost half as much.
            fill_up_to: smaller batches are drawn with their last caption repeated up to this many,
                so that a compiled UNet meets one size only; None leaves them as they are.

        Raises:
            ModelError: the pipeline cannot do what is asked for.
        """
        # Latent consistency models (LCM) take the guidance scale as an input of the UNet.
        if pipeline.unet.config.time_cond_proj_dim is not None:
            if guided_share < 1:
                raise ModelError(
                    "this UNet is a latent consistency model, which has guidance built in at every "
                    f"step: guided_share must be 1, found {guided_share}"
                )
            if negative_prompt:
                raise ModelError(
                    "this UNet is a latent consistency model, which ignores negative prompts: "
                    f"negative_prompt must be empty, found {negative_prompt!r}"
                )
        try:
            pipeline.scheduler.set_timesteps(steps)
        except ValueError as error:
            raise ModelError(f"the scheduler cannot make {steps} steps: {error}") from error
        self._pipeline = pipeline
        self._steps = steps
        self._guidance = guidance
        self._size_hw = size_hw
        self._negative_prompt = negative_prompt
        self._factors = tuple(factors)
        self._guided_steps = guided_steps(steps, guidance, guided_share)
        self._fill_up_to = fill_up_to
        self._most_at_once: int | None = None
        # A fast tokenizer keeps padding and truncation inside itself from call to call, and the
        # pipeline sets them while it generates, possibly in another thread.
        self._positions_tokenizer = copy.deepcopy(pipeline.tokenizer)
        # The pipeline's scheduler, and the UNet while it is recorded, hold the state of one batch.
        self._pipeline_lock = threading.Lock()

    def positions(
        self, caption: str, spans: Sequence[Sequence[tuple[int, int]]]
    ) -> list[tuple[int, ...]]:
        """`token_positions` in this pipeline's tokenizer. Other threads may generate meanwhile."""
        return token_positions(self._positions_tokenizer, caption, spans)

    def draw(
        self,
        captions: Sequence[str],
        positions: Sequence[Sequence[Sequence[int]]],
        seeds: Sequence[int],
    ) -> list[Drawing]:
        """One image per caption, drawn together.

        An image depends on its caption and seed alone, but for the rounding of kernels that add in
        another order at another batch size: equal batches give equal bytes. When the device runs
        out of memory, the batch is halved, and stays so.

        Args:
            captions: the prompts.
            positions: per caption, per noun, its token positions (`positions`).
            seeds: per caption, in [0, 2**63).

        Raises:
            torch.OutOfMemoryError: a single image does not fit.
            ModelError: the UNet's attention cannot be read.
        """
        drawings: list[Drawing] = []
        while len(drawings) < len(captions):
            stop = None if self._most_at_once is None else len(drawings) + self._most_at_once
            part = slice(len(drawings), stop)
            try:
                drawings += self.draw_at_once(captions[part], positions[part], seeds[part])
                continue
            except torch.OutOfMemoryError:
                size = self._fill_up_to or len(captions[part])
                if size == 1:
                    raise
            # Outside the handler, so that the failed call's tensors are free.
            self._most_at_once = size // 2
            if self._fill_up_to is not None:
                self._fill_up_to = size // 2
            torch.cuda.empty_cache()
            logger.warning(
                "out of memory drawing %d images at once; going on with %d", size, size // 2
            )
        return drawings

    def draw_at_once(
        self,
        captions: Sequence[str],
        positions: Sequence[Sequence[Sequence[int]]],
        seeds: Sequence[int],
    ) -> list[Drawing]:
        """`draw` in one batch, whether it fits or not.

        Raises:
            torch.OutOfMemoryError: it does not.
            ModelError: as `draw`.
        """
        pipeline = self._pipeline
        height, width = self._size_hw
        factor = pipeline.vae_scale_factor
        wanted = len(captions)
        if self._fill_up_to is not None:
            captions, positions, seeds = (
                [*items, *[items[-1]] * (self._fill_up_to - wanted)]
                for items in (captions, positions, seeds)
            )
        weights_bkn = noun_weights(positions, pipeline.tokenizer.model_max_length)
        # On the CPU, so that a seed means the same noise on every device.
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        # None is the model's own notion of nothing: zeros for SDXL, an empty text for the others.
        use_negative = self._negative_prompt and self._guidance > 1
        negative_prompt = [self._negative_prompt] * len(captions) if use_negative else None
        latent_hw = (height // factor, width // factor)
        with (
            self._pipeline_lock,
            recording(pipeline.unet, weights_bkn, latent_hw, self._factors) as attribution,
        ):
            images = pipeline(
                prompt=list(captions),
                negative_prompt=negative_prompt,
                num_inference_steps=self._steps,
                guidance_scale=self._guidance,
                height=height,
                width=width,
                generator=generators,
                output_type="pt",
                **self._partly_guided(),
            ).images
        pixels_bhwc, finite_b = (found.cpu().numpy() for found in to_uint8(images))
        heatmaps_bnhw = attribution.heatmaps_bnhw().cpu().numpy()
        return [
            Drawing(
                image_hwc=image_hwc if finite else None, heatmaps_nhw=heatmaps_nhw[: len(nouns)]
            )
            for image_hwc, finite, heatmaps_nhw, nouns in zip(
                pixels_bhwc, finite_b, heatmaps_bnhw, positions, strict=True
            )
        ][:wanted]

    def _partly_guided(self) -> dict[str, Any]:
        """Arguments of the pipeline that end guidance after its share of the steps."""
        if self._guided_steps in (0, self._steps):
            return {}
        names = ["prompt_embeds"]
        if isinstance(self._pipeline, diffusers.StableDiffusionXLPipeline):
            names += ["add_text_embeds", "add_time_ids"]
        return {
            "callback_on_step_end": _end_guidance_after(self._guided_steps),
            "callback_on_step_end_tensor_inputs": names,
        }


def guided_steps(steps: int, guidance: float, guided_share: float) -> int:
    """How many of an image's steps are guided and so cost twice."""
    return math.ceil(guided_share * steps) if guidance > 1 else 0


def _end_guidance_after(steps: int) -> Callable[..., dict[str, torch.Tensor]]:
    """A callback as diffusers documents it for guidance that changes while an image is drawn."""

    def step_ended(
        pipeline: Any, step: int, _timestep: Any, conditions: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        if step + 1 != steps:
            return {}
        pipeline._guidance_scale = 1.0
        return {name: tensor.chunk(2)[1] for name, tensor in conditions.items()}

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
    """Heatmaps of images that exist already, for measuring attribution against true masks.

    Each image is encoded, noised to each of the timesteps as in training, and denoised once under
    its own caption, without guidance; the heatmap is the mean over the timesteps.

    Args:
        pipeline: as `load_pipeline` gives it.
        images_bhwc: (images, H, W, 3) uint8 RGB; H and W multiples of 8.
        captions: one per image.
        positions: per caption, per noun, its token positions (`token_positions`).
        timesteps: in [0, steps of training).
        seed: of the noise; one noise per image is used at all timesteps.
        factors: as of `Generator`.

    Returns:
        (images, nouns, h, w) float32 >= 0 at the size of the latent.
    """
    unet, vae, device = pipeline.unet, pipeline.vae, pipeline.unet.device
    pixels = torch.from_numpy(images_bhwc).permute(0, 3, 1, 2).to(device, vae.dtype) / 127.5 - 1
    latents = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=torch.Generator("cpu").manual_seed(seed))
    noise = noise.to(device, latents.dtype)
    told = conditions(pipeline, captions, images_bhwc.shape[1:3])
    # Every scheduler that can be chosen keeps the model's table of signal levels.
    signal = pipeline.scheduler.alphas_cumprod.to(device, torch.float32)
    weights_bkn = noun_weights(positions, pipeline.tokenizer.model_max_length)
    with recording(unet, weights_bkn, tuple(latents.shape[2:]), factors) as attribution:
        for timestep in timesteps:
            level = signal[timestep]
            noised = level.sqrt() * latents + (1 - level).sqrt() * noise
            unet(noised.to(unet.dtype), timestep, **told)
    return attribution.heatmaps_bnhw().cpu().numpy()


def conditions(pipeline: Any, captions: Sequence[str], size_hw: tuple[int, int]) -> dict[str, Any]:
    """What the UNet takes beside the latents, for captions without guidance."""
    encoded = pipeline.encode_prompt(
        prompt=list(captions),
        device=pipeline.unet.device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
    )
    if isinstance(pipeline, diffusers.StableDiffusionPipeline):
        return {"encoder_hidden_states": encoded[0]}
    embeddings, _, pooled, _ = encoded
    # SDXL is told the size before scaling, the crop's corner, and the size wanted.
    time_ids = torch.tensor([[*size_hw, 0, 0, *size_hw]] * len(captions))
    time_ids = time_ids.to(embeddings.device, embeddings.dtype)
    return {
        "encoder_hidden_states": embeddings,
        "added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids},
    }


def to_uint8(images_bchw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[0, 1] to [0, 255], (b, H, W, 3) uint8, where they are: bytes are a fraction of what would
    have to be copied otherwise. And (b,) bool, which of them are finite."""
    images = images_bchw.float()
    finite_b = images.isfinite().flatten(1).all(1)
    images = images.nan_to_num().mul(255).round()
    return images.to(torch.uint8).permute(0, 2, 3, 1).contiguous(), finite_b
