"""Prompts to images: generate an image for each caption, and a region for each noun."""

import logging
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np

from ovref.ahead import map_ahead
from ovref.config import STRICT
from ovref.contract import Dropped
from ovref.identity import ADDED_LATER, record_seed
from ovref.models.blank import blank_prompt
from ovref.models.tokens import mentions
from ovref.ops.binarisation import BinariseRule, binarise, contrast, min_max_scaled, with_sigmoid
from ovref.ops.masks import image_record, reject_reason, require_areas
from ovref.records import ImageRecord, Noun, Prompt, Region
from ovref.stored_images import jpeg_of
from ovref_inference.ranges import require_at_least, require_each_at_least, require_within

logger = logging.getLogger(__name__)

USUAL_BATCH_SIZE = 8
"""Default number of prompts in a batch."""
FINISHERS = min(4, os.cpu_count() or 1)
"""Threads that make records of generated images."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank weights that are added to a generator's."""

    __pydantic_config__ = STRICT

    model: str
    """A `.safetensors` file, a folder or a Hugging Face id."""
    revision: str | None = None
    """Revision on the Hugging Face hub."""
    file: str | None = None
    """File name in a folder or repository; needed where there are several."""
    scale: float = 1.0
    """What the weights are multiplied by before they are added."""


@dataclass(frozen=True, kw_only=True)
class Synthesize:
    """Generates images from prompts with a diffusion model and keeps a region for each noun.

    The device is not a setting: `build` uses CUDA if available.
    """

    name: ClassVar[str] = "synthesize"
    version: ClassVar[int] = 2
    __pydantic_config__ = STRICT

    model: str
    """`miniature:stable_diffusion`, a Hugging Face id, a folder of diffusers' layout, or a single
    `.safetensors` file, which needs `base`."""
    revision: str | None = None
    """Revision on the Hugging Face hub; a commit makes the collection reproducible."""
    scheduler: Literal[
        "ddim", "dpm_solver++", "sde_dpm_solver++", "unipc", "euler", "euler_ancestral", "lcm",
        "flow_euler", "scm",
    ] = "dpm_solver++"  # fmt: skip
    """The sampler; the noise schedule remains the model's. Models of flow matching (Stable
    Diffusion 3, FLUX, Qwen-Image, Z-Image) take `flow_euler`, Sana-Sprint takes `scm`."""
    steps: int = 25
    """Scheduler steps per image."""
    guidance: float = 7.5
    """Classifier-free guidance scale; at 1 or less there is no guidance and the cost halves. A
    model that embeds the guidance (FLUX.1-dev, FLUX.2-dev, LCM, Sana-Sprint) takes it as an input
    instead, at no cost."""
    guided_share: float = 1.0
    """Share of the steps, from the first on, with guidance; steps without it cost half as much. The
    first steps determine the layout, the last ones the details."""
    negative_prompt: str = ""
    """Negative prompt; empty for the model's own empty conditioning."""
    size_hw: tuple[int, int] = (512, 512)
    """Image height and width in pixels, multiples of 8; of 16 for transformers, of 32 for Sana."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of weights and activations; attribution is always accumulated in float32."""
    batch_size: int | Literal["auto"] = USUAL_BATCH_SIZE
    """Prompts per batch. Part of the identity: at another batch size, kernels round the last bits
    differently. `auto` measures how many fit into half of the free memory of each worker's GPU, at
    most 32 (8 without a GPU); the last bits then depend on the GPU."""
    compiled: bool = False
    """Compiles UNet and decoder, for a GPU. On an H100 4.69 instead of 3.41 images a second (Stable
    Diffusion 2.1-base, 50 steps, batches of 16); the first worker on a machine takes about 90
    seconds to compile. Rounds differently."""
    channels_last: bool = False
    """Channels-last memory for convolutions. On its own it makes a GPU slower (an H100 in bfloat16
    gives 2.94 instead of 3.41 images a second, because of PyTorch's group normalisation), and with
    `compiled` the compiler chooses layouts itself. Rounds differently."""
    fused_projections: bool = False
    """Query, key and value of self-attention as one product. Rounds differently."""
    run_seed: int = 0
    """Seed of the run; together with a record's key it determines the image's seed."""
    factors: tuple[int, ...] = (1, 2, 4)
    """Down-sampling factors, relative to the latent, of the attention layers used for heatmaps of
    UNets. The default is DAAM's; for a model with small latents, leave out the coarse layers."""
    binarise: BinariseRule = field(default_factory=BinariseRule)
    """How a heatmap becomes a mask."""
    min_area: float = 0.002
    """Regions whose YES pixels are a smaller fraction of the image are dropped as `empty_mask`."""
    max_area: float = 0.95
    """Regions whose YES pixels are a larger fraction of the image are dropped as `full_mask`."""
    jpeg_quality: int = 95
    """JPEG quality of stored images, 1 to 100, without chroma subsampling."""
    reading: Literal["share", "output"] | None = field(default=None, metadata=ADDED_LATER)
    """What a transformer's heatmap is: `share`, the probability with which image positions attend
    to the noun's tokens, or `output`, the product of the attention's outputs at image positions and
    at the noun's tokens. None for the default of the model's family."""
    blocks: tuple[int, ...] | None = field(default=None, metadata=ADDED_LATER)
    """Transformer blocks whose attention is read, from 0; None for the default of the family."""
    read_steps: tuple[float, float] | None = field(default=None, metadata=ADDED_LATER)
    """Part of a transformer's steps that is read, as shares of their number: (0.7, 1.0) for the
    last 30 %; at least one step is. None for the default of the family."""
    variant: str | None = field(default=None, metadata=ADDED_LATER)
    """Variant of the weight files: `fp16` for `*.fp16.safetensors`."""
    base: str | None = field(default=None, metadata=ADDED_LATER)
    """For a single-file model: the folder or Hugging Face id of its base model in diffusers'
    layout, of which configurations and tokenizers are taken."""
    loras: tuple[Lora, ...] = field(default=(), metadata=ADDED_LATER)
    """LoRAs that are added to the weights, such as those of few-step sampling."""
    aspect_ratio_hw: tuple[int, int] | None = field(default=None, metadata=ADDED_LATER)
    """Height to width, such as (2, 3): the image then has about as many pixels as `size_hw`, and a
    height and width that are multiples of 32."""
    offload: bool = field(default=False, metadata=ADDED_LATER)
    """Keeps text encoders, network and decoder in host memory while they are not running, so that
    larger models fit on a GPU; each batch then copies them over."""
    text_encoder_bits: Literal[8, 4] | None = field(default=None, metadata=ADDED_LATER)
    """Bits of the text encoders' weights, with bitsandbytes; None for those of `dtype`. With 8 bits
    (LLM.int8) the last bits of an image also depend on the other captions of its batch, and
    `offload` is refused."""

    def __post_init__(self):
        require_at_least("steps", self.steps, 1)
        require_at_least("guidance", self.guidance, 0)
        require_within("guided_share", self.guided_share, 0, 1, "(]")
        if any(size < 8 or size % 8 for size in self.size_hw):
            raise ValueError(f"size_hw must be multiples of 8, found {self.size_hw}")
        if self.aspect_ratio_hw is not None:
            require_each_at_least("aspect_ratio_hw", self.aspect_ratio_hw, 1)
        require_each_at_least("factors", self.factors, 1)
        if self.blocks is not None:
            require_each_at_least("blocks", self.blocks, 0)
        if self.read_steps is not None and not 0 <= self.read_steps[0] < self.read_steps[1] <= 1:
            raise ValueError(f"read_steps must be ordered in [0, 1], found {self.read_steps}")
        if self.batch_size != "auto":
            require_at_least("batch_size", self.batch_size, 1)
        if self.text_encoder_bits is not None and self.base is not None:
            raise ValueError(
                "text_encoder_bits needs a model in diffusers' layout, not a single file, which "
                f"diffusers cannot quantise: found base {self.base!r}"
            )
        if self.text_encoder_bits == 8 and self.offload:
            raise ValueError(
                "text_encoder_bits 8 does not go with offload: bitsandbytes keeps weights on the "
                "GPU when their model is moved away. Set text_encoder_bits to 4, whose weights are "
                "moved, or leave out offload"
            )
        require_areas(self.min_area, self.max_area)
        require_within("jpeg_quality", self.jpeg_quality, 1, 100)

    @property
    def image_size_hw(self) -> tuple[int, int]:
        """Height and width of the images: `size_hw`, or what `aspect_ratio_hw` makes of it."""
        if self.aspect_ratio_hw is None:
            return self.size_hw
        pixels, (tall, wide) = self.size_hw[0] * self.size_hw[1], self.aspect_ratio_hw
        height, width = math.sqrt(pixels * tall / wide), math.sqrt(pixels * wide / tall)
        return max(32, round(height / 32) * 32), max(32, round(width / 32) * 32)

    def build(self) -> "SynthesizeStage":
        """Loads the model.

        Raises:
            ModelError: it cannot be found, read or used.
        """
        pipeline = self._load()
        batch_size = self._batch_size(pipeline)
        self._optimize(pipeline)
        generator = replace(self, batch_size=batch_size).generator(pipeline)
        return SynthesizeStage(self, generator, batch_size, generator.provenance)

    def check(self) -> list["ImageRecord | Dropped"]:
        """Generates one image in a step or two, not compiled; see `ovref.check_models`."""
        pipeline = self._load()
        one = replace(self, batch_size=1, compiled=False, min_area=0.0, max_area=1.0)
        one._optimize(pipeline)
        one.generator(pipeline)  # refuses numbers of steps that the scheduler does not support
        brief = replace(one, steps=2 if self.guided_share < 1 else 1)
        return list(SynthesizeStage(brief, brief.generator(pipeline))(iter([blank_prompt()])))

    def _load(self) -> Any:
        import torch

        from ovref.models.loading import load_pipeline

        device = "cuda" if torch.cuda.is_available() else "cpu"
        logger.info("generating with %s on %s", self.model, device)
        return load_pipeline(
            self.model,
            revision=self.revision,
            scheduler=self.scheduler,
            dtype=self.dtype,
            device=device,
            variant=self.variant,
            base=self.base,
            loras=self.loras,
            offload=self.offload,
            text_encoder_bits=self.text_encoder_bits,
        )

    def _optimize(self, pipeline: Any) -> None:
        from ovref.models.loading import optimize_pipeline

        optimize_pipeline(
            pipeline,
            compiled=self.compiled,
            channels_last=self.channels_last,
            fused_projections=self.fused_projections,
        )

    def _batch_size(self, pipeline: Any) -> int:
        """The batch size; `auto` is measured, before anything is compiled."""
        if self.batch_size != "auto":
            return self.batch_size
        if pipeline._execution_device.type == "cpu":
            return USUAL_BATCH_SIZE
        from ovref.models.batch_size import PROBE_STEPS, automatic_batch_size

        probe = replace(self, steps=PROBE_STEPS, guided_share=1.0, batch_size=1, compiled=False)
        return automatic_batch_size(pipeline, probe.generator(pipeline))

    def generator(self, pipeline: Any) -> Any:
        """The `models.diffusion.Generator` of these settings, for a pipeline of `_load`.

        `batch_size` must be a number: `build` resolves `auto`.
        """
        from ovref.models.diffusion import Generator

        return Generator(pipeline, self)


@dataclass(frozen=True)
class _Request:
    """A prompt with the inputs of the generator."""

    prompt: Prompt
    nouns: list[tuple[int, Noun]]
    """Nouns to locate, with their numbers in the caption."""
    positions: list[tuple[int, ...]]
    """Token positions of each of them."""
    seed: int


class SynthesizeStage:
    """`Prompt` in; `ImageRecord`, or `Dropped`, out.

    Dropped records: `no_nouns`, `nonfinite_image`, `no_regions` (all of its regions were dropped).
    Dropped regions, under `<key>#<number of the noun in the prompt>`: `noun_beyond_context`,
    `nonfinite_heatmap`, `empty_mask`, `full_mask`.
    """

    def __init__(
        self,
        spec: Synthesize,
        generator: Any,
        batch_size: int | None = None,
        provenance: Mapping[str, Any] | None = None,
    ):
        """
        Args:
            spec: the settings.
            generator: a `models.diffusion.Generator`, or anything with its two methods.
            batch_size: resolved batch size; None takes the spec's.
            provenance: more of it for each record: what was read of a transformer's attention.
        """
        self._provenance = dict(provenance or {})
        self._source = (
            "concept_attention" if self._provenance.get("reading") == "output" else "daam"
        )
        self._spec = spec
        self._generator = generator
        self.batch_size = spec.batch_size if batch_size is None else batch_size
        """Prompts per batch."""

    def __call__(self, prompts: Iterator[Prompt]) -> Iterator[ImageRecord | Dropped]:
        # One thread generates the next batch while others make records of the previous one, so that
        # the device does not wait.
        for drops, generated in map_ahead(self._generate, self._batches(prompts), threads=1):
            yield from drops
            for answers in map_ahead(self._finished, generated, FINISHERS):
                yield from answers

    def _batches(self, prompts: Iterator[Prompt]) -> Iterator[tuple[list[Dropped], list[_Request]]]:
        """Batches of requests, each with the drops among its prompts, which do not count."""
        drops: list[Dropped] = []
        requests: list[_Request] = []
        for prompt in prompts:
            request, dropped = self._request(prompt)
            drops += dropped
            if request is not None:
                requests.append(request)
            if len(requests) == self.batch_size:
                yield drops, requests
                drops, requests = [], []
        if drops or requests:
            yield drops, requests

    def _request(self, prompt: Prompt) -> tuple[_Request | None, list[Dropped]]:
        if not prompt.nouns:
            return None, [Dropped(prompt.key, "no_nouns")]
        # A repeated noun is one region: its mentions are averaged, as in DAAM.
        spans = mentions(prompt.caption, prompt.nouns)
        texts = [noun.text for noun in prompt.nouns]
        firsts = [texts.index(text) for text in spans]
        positions = self._generator.positions(prompt.caption, list(spans.values()))
        dropped = [
            Dropped(f"{prompt.key}#{number}", "noun_beyond_context")
            for number, found in zip(firsts, positions, strict=True)
            if not found
        ]
        kept = [(n, found) for n, found in zip(firsts, positions, strict=True) if found]
        if not kept:
            return None, [*dropped, Dropped(prompt.key, "no_regions")]
        request = _Request(
            prompt=prompt,
            nouns=[(number, prompt.nouns[number]) for number, _ in kept],
            positions=[found for _, found in kept],
            seed=record_seed(self._spec.run_seed, prompt.key),
        )
        return request, dropped

    def _generate(
        self, batch: tuple[list[Dropped], list[_Request]]
    ) -> tuple[list[Dropped], list[tuple[_Request, Any]]]:
        drops, requests = batch
        if not requests:
            return drops, []
        images = self._generator.generate(
            [request.prompt.caption for request in requests],
            [request.positions for request in requests],
            [request.seed for request in requests],
        )
        return drops, list(zip(requests, images, strict=True))

    def _finished(self, generated: tuple[_Request, Any]) -> list[ImageRecord | Dropped]:
        request, image = generated
        if image.image_hwc is None:
            return [Dropped(request.prompt.key, "nonfinite_image")]
        return list(self._record(request, image.image_hwc, image.heatmaps_nhw))

    def _record(
        self, request: _Request, image_hwc: np.ndarray, heatmaps_nhw: np.ndarray
    ) -> Iterator[ImageRecord | Dropped]:
        spec, prompt = self._spec, request.prompt
        measured = {"batch_size": self.batch_size} if spec.batch_size == "auto" else {}
        kept_maps, regions = [], []
        # Masks are made from the stored float16 heatmaps, so that they can be reproduced.
        kept_nhw = min_max_scaled(with_sigmoid(heatmaps_nhw, spec.binarise))
        for (number, noun), heatmap_hw in zip(request.nouns, kept_nhw, strict=True):
            if not np.isfinite(heatmap_hw).all():
                yield Dropped(f"{prompt.key}#{number}", "nonfinite_heatmap")
                continue
            mask_hw = binarise(heatmap_hw[None], image_hwc.shape[:2], spec.binarise)[0]
            reason = reject_reason(mask_hw, spec.min_area, spec.max_area)
            if reason is not None:
                yield Dropped(f"{prompt.key}#{number}", reason)
                continue
            score = contrast(heatmap_hw, mask_hw)
            regions.append(Region(noun=noun, mask_hw=mask_hw, score=score, source=self._source))
            kept_maps.append(heatmap_hw)
        yield image_record(
            prompt,
            jpeg_of(image_hwc, spec.jpeg_quality),
            regions,
            kept_maps,
            seed=request.seed,
            provenance={
                "generator": spec.model,
                "revision": spec.revision,
                "scheduler": spec.scheduler,
                "steps": spec.steps,
                "guidance": spec.guidance,
                "guided_share": spec.guided_share,
                "negative_prompt": spec.negative_prompt,
                "dtype": spec.dtype,
                **measured,
                **self._provenance,
            },
        )
