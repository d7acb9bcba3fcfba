"""What generating and attributing need to know of a family of generators."""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

from ovref.errors import ModelError
from ovref.models.joint_attribution import JointAttribution, Layout, Reading, recording

Spans = Sequence[Sequence[tuple[int, int]]]
"""For each noun, the character spans [start, end) of its occurrences in the caption."""
Positions = Sequence[Sequence[Sequence[int]]]
"""Per caption, per noun, the positions of its tokens (`Recorder.positions`)."""


class Heatmaps(Protocol):
    """The attribution of a batch, once it is generated."""

    def heatmaps_bnhw(self) -> torch.Tensor:
        """(captions, nouns, h, w) float32 >= 0; `nouns` is the maximum over captions."""


class Recorder(Protocol):
    """One family of generators: how its pipelines are called and its attention is read.

    Made with a pipeline of `loading.load_pipeline`. `settings` is an
    `ovref.stages.synthesize.Synthesize` everywhere.
    """

    def __init__(self, pipeline: Any): ...

    def check(self, settings: Any) -> None:
        """Raises ModelError if the pipeline cannot do what the settings ask for."""

    def positions(self, caption: str, spans: Spans) -> list[tuple[int, ...]]:
        """For each noun the positions of its tokens in the text that attention sees; empty for one
        beyond the context. Other threads may generate meanwhile."""

    def options(self, captions: Sequence[str], settings: Any) -> dict[str, Any]:
        """Keyword arguments of the pipeline's call, but for size, steps and seeds."""

    def provenance(self, settings: Any) -> dict[str, Any]:
        """What is read of the attention, for the provenance of an image."""

    def recording(self, positions: Positions, settings: Any) -> AbstractContextManager[Heatmaps]:
        """Records attention while the pipeline generates one image per caption in the block."""


@dataclass(frozen=True, kw_only=True)
class Reads:
    """Which reading of which blocks and steps a family's literature recommends."""

    reading: Reading
    blocks: tuple[float, float] = (0.0, 1.0)
    """From, to: shares of the blocks that have image and text in separate streams, or of all."""
    steps: tuple[float, float] = (0.0, 1.0)
    """From, to: shares of the steps."""


def guided_steps(steps: int, guidance: float, guided_share: float) -> int:
    """Guided steps of an image, each of which costs two passes of a network that does not embed
    the guidance."""
    return math.ceil(guided_share * steps) if guidance > 1 else 0


def guided_steps_of(settings: Any) -> int:
    """`guided_steps` of a Synthesize."""
    return guided_steps(settings.steps, settings.guidance, settings.guided_share)


def window(share: tuple[float, float], count: int) -> range:
    """The numbers of [share[0], share[1]) among `count`; never none of them."""
    # Rounded, so that a share such as 8 / 28 of 28 is not cut to 7.
    first = min(math.floor(round(share[0] * count, 6)), count - 1)
    return range(first, max(first + 1, math.ceil(round(share[1] * count, 6))))


class TransformerRecorder:
    """What the recorders of diffusion transformers share; a family overrides what differs."""

    network_name: ClassVar[str]
    """Class of its transformer in diffusers."""
    reads: ClassVar[Reads]
    readings: ClassVar[tuple[Reading, ...]] = ("share", "output")
    layout: ClassVar[Layout]
    can_end_guidance: ClassVar[bool] = False
    """Whether the pipeline can go on without guidance after some steps."""
    unguided_scale: ClassVar[float] = 1.0
    """The pipeline's guidance scale that means none."""
    halved: ClassVar[tuple[str, ...]] = ()
    """Tensors of the pipeline's call whose second half is the captions' own."""
    takes_negative_prompt: ClassVar[bool] = True
    calls_per_guided_step: ClassVar[int] = 1
    """1: captions and unconditional twins in one batch; 2: two calls, the captions' first."""

    def __init__(self, pipeline: Any):
        self.pipeline = pipeline
        self.network = pipeline.transformer

    # What families override.

    def attentions(self) -> list[Any]:
        """The attention module of each block, in the order of settings' `blocks`."""
        return [block.attn for block in self.network.transformer_blocks]

    def default_among(self) -> int:
        """Number of first blocks that the shares of `reads.blocks` refer to."""
        return len(self.attentions())

    def patch(self) -> int:
        """Latent pixels on the side of an image position."""
        return int(self.network.config.patch_size)

    def guidance_is_embedded(self) -> bool:
        """Whether the network takes the guidance scale as an input."""
        return False

    def guidance_options(self, captions: Sequence[str], settings: Any) -> dict[str, Any]:
        """Arguments for guidance and the negative prompt."""
        return {
            "guidance_scale": settings.guidance,
            "negative_prompt": [settings.negative_prompt] * len(captions),
        }

    def positions(self, caption: str, spans: Spans) -> list[tuple[int, ...]]:
        raise NotImplementedError

    # What is the same for all.

    def check(self, settings: Any) -> None:
        """Raises ModelError if the pipeline cannot do what the settings ask for."""
        name, kind = type(self.pipeline).__name__, self.network_name
        multiple = self.pipeline.vae_scale_factor * self.patch()
        if any(size % multiple for size in settings.image_size_hw):
            raise ModelError(
                f"{name} makes images whose height and width are multiples of {multiple}, found "
                f"{settings.image_size_hw}"
            )
        reading = settings.reading or self.reads.reading
        if reading not in self.readings:
            raise ModelError(
                f"reading {reading!r} needs joint attention, but {kind} has cross-attention, where "
                f"tokens have no output: choose {' or '.join(self.readings)}"
            )
        depth = len(self.attentions())
        if any(block >= depth for block in settings.blocks or ()):
            raise ModelError(f"{kind} has blocks 0 to {depth - 1}, found blocks {settings.blocks}")
        guided = settings.guidance > 1 and not self.guidance_is_embedded()
        if settings.guided_share < 1 and not (guided and self.can_end_guidance):
            raise ModelError(
                f"{name} cannot end guidance before the last step: guided_share must be 1, found "
                f"{settings.guided_share}"
            )
        if settings.negative_prompt and not (guided and self.takes_negative_prompt):
            raise ModelError(
                f"{name} takes no negative prompt at guidance {settings.guidance}: negative_prompt "
                f"must be empty, found {settings.negative_prompt!r}"
            )
        for field in ("factors", "fused_projections"):
            default = getattr(type(settings), field)
            if getattr(settings, field) != default:
                raise ModelError(
                    f"{field} is for UNets, but {name} has a transformer: leave it out"
                )

    def options(self, captions: Sequence[str], settings: Any) -> dict[str, Any]:
        """Keyword arguments of the pipeline's call, but for size, steps and seeds."""
        options = self.guidance_options(captions, settings)
        if settings.guidance > 1 and settings.guided_share < 1:
            ended = {"_guidance_scale": self.unguided_scale}
            options |= end_guidance_after(guided_steps_of(settings), ended, self.halved)
        return options

    def grid_hw(self, size_hw: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the grid of image positions."""
        pixels = self.pipeline.vae_scale_factor * self.patch()
        return size_hw[0] // pixels, size_hw[1] // pixels

    def read_blocks(self, settings: Any) -> tuple[int, ...]:
        """The blocks that are read."""
        if settings.blocks is not None:
            return tuple(settings.blocks)
        return tuple(window(self.reads.blocks, self.default_among()))

    def counted(self, settings: Any) -> list[bool]:
        """For each call of the network for a batch, whether it is read."""
        read = window(settings.read_steps or self.reads.steps, settings.steps)
        guided = 0 if self.guidance_is_embedded() else guided_steps_of(settings)
        twins = [False] * (self.calls_per_guided_step - 1)
        return [
            counted
            for step in range(settings.steps)
            for counted in (step in read, *(twins if step < guided else ()))
        ]

    def provenance(self, settings: Any) -> dict[str, Any]:
        """What is read of the attention, for the provenance of an image."""
        return {
            "reading": settings.reading or self.reads.reading,
            "blocks": list(self.read_blocks(settings)),
            "read_steps": [round(share, 4) for share in settings.read_steps or self.reads.steps],
        }

    @contextmanager
    def recording(self, positions: Positions, settings: Any) -> Iterator[JointAttribution]:
        """Records attention while the pipeline generates one image per caption in the block."""
        attribution = JointAttribution(
            positions,
            self.grid_hw(settings.image_size_hw),
            self.layout,
            settings.reading or self.reads.reading,
            device=self.pipeline._execution_device,
        )
        attentions = self.attentions()
        read = [attentions[block] for block in self.read_blocks(settings)]
        with recording(self.network, read, attribution, self.counted(settings)):
            yield attribution


def end_guidance_after(steps: int, ended: dict[str, Any], halved: Sequence[str]) -> dict[str, Any]:
    """Arguments of a pipeline's call that switch guidance off after some steps.

    Args:
        steps: guided steps.
        ended: attributes of the pipeline -> their values without guidance.
        halved: tensors of the pipeline's call whose second half is the captions' own.
    """

    def step_ended(
        pipeline: Any, step: int, _timestep: Any, inputs: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        if step + 1 != steps:
            return {}
        for name, value in ended.items():
            setattr(pipeline, name, value)
        return {name: inputs[name].chunk(2)[1] for name in halved}

    return {
        "callback_on_step_end": step_ended,
        "callback_on_step_end_tensor_inputs": list(halved),
    }
