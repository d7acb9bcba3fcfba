"""Stable Diffusion 1.x, 2.x and XL, and latent consistency models of their UNets."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import diffusers
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from ovref.errors import ModelError
from ovref.models.attribution import FACTORS, Attribution, Layer, noun_weights
from ovref.models.recorders.recorder import (
    Positions,
    Spans,
    end_guidance_after,
    guided_steps_of,
)
from ovref.models.tokens import token_positions


class UNetRecorder:
    """CLIP's tokens; DAAM on the cross-attention of the layers at the settings' `factors`."""

    network_name: ClassVar[str] = "UNet2DConditionModel"

    def __init__(self, pipeline: Any):
        self.pipeline = pipeline
        self.network = pipeline.unet
        # A copy, because a fast tokenizer stores padding and truncation from call to call, and the
        # pipeline sets them while it generates, possibly in another thread.
        self._tokenizer = copy.deepcopy(pipeline.tokenizer)

    def check(self, settings: Any) -> None:
        """Raises ModelError if the pipeline cannot do what the settings ask for."""
        for name, default in (("reading", None), ("blocks", None), ("read_steps", None)):
            if getattr(settings, name) != default:
                raise ModelError(
                    f"{name} is for diffusion transformers, but this model has a UNet, whose "
                    "cross-attention is read at all steps: choose its layers with factors"
                )
        # Latent consistency models (LCM) take the guidance scale as an input of the UNet.
        if self._is_consistency_model() and settings.negative_prompt:
            raise ModelError(
                "this UNet is a latent consistency model, which ignores negative prompts: "
                f"negative_prompt must be empty, found {settings.negative_prompt!r}"
            )

    def positions(self, caption: str, spans: Spans) -> list[tuple[int, ...]]:
        """Positions of each noun's tokens, from the start-of-text token at 0."""
        return token_positions(self._tokenizer, caption, spans)

    def options(self, captions: Sequence[str], settings: Any) -> dict[str, Any]:
        """Keyword arguments of the pipeline's call, but for size, steps and seeds."""
        # None means the model's own empty conditioning: zeros for SDXL, otherwise an empty text.
        use_negative = settings.negative_prompt and settings.guidance > 1
        options = {
            "guidance_scale": settings.guidance,
            "negative_prompt": [settings.negative_prompt] * len(captions) if use_negative else None,
        }
        guided = guided_steps_of(settings)
        if guided not in (0, settings.steps) and not self._is_consistency_model():
            halved = ["prompt_embeds"]
            if isinstance(self.pipeline, diffusers.StableDiffusionXLPipeline):
                halved += ["add_text_embeds", "add_time_ids"]
            options |= end_guidance_after(guided, {"_guidance_scale": 1.0}, halved)
        return options

    def provenance(self, settings: Any) -> dict[str, Any]:
        """Nothing: the settings say which layers are read."""
        return {}

    @contextmanager
    def recording(self, positions: Positions, settings: Any) -> Iterator[Attribution]:
        """Records attention while the pipeline generates one image per caption in the block."""
        height, width = settings.image_size_hw
        factor = self.pipeline.vae_scale_factor
        weights_bkn = noun_weights(positions, self.pipeline.tokenizer.model_max_length)
        latent_hw = (height // factor, width // factor)
        with (
            recording(self.network, weights_bkn, latent_hw, settings.factors) as attribution,
            self._embedded_guidance_ends(settings),
        ):
            yield attribution

    def _is_consistency_model(self) -> bool:
        return self.network.config.time_cond_proj_dim is not None

    @contextmanager
    def _embedded_guidance_ends(self, settings: Any) -> Iterator[None]:
        """The guidance that a latent consistency model embeds is 1 after its share of the steps."""
        guided = guided_steps_of(settings)
        if not self._is_consistency_model() or guided in (0, settings.steps):
            yield
            return
        calls = 0

        def called(network: Any, args: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            nonlocal calls
            calls += 1
            if calls <= guided:
                return args, options
            embedded = options["timestep_cond"]
            # The pipelines embed the scale less 1, as in the paper on latent consistency models.
            none = self.pipeline.get_guidance_scale_embedding(
                torch.zeros(len(embedded)), embedding_dim=embedded.shape[1]
            )
            return args, options | {"timestep_cond": none.to(embedded)}

        hook = self.network.register_forward_pre_hook(called, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()


@contextmanager
def recording(
    unet: Any,
    weights_bkn: torch.Tensor,
    latent_hw: tuple[int, int],
    factors: Sequence[int] = FACTORS,
) -> Iterator[Attribution]:
    """Records the cross-attention of a `UNet2DConditionModel` while it runs inside the block.

    Replaces only the processors of cross-attention at these factors, and restores them at the end
    in any case.

    Args:
        unet: the UNet of a Stable Diffusion 1.x, 2.x or XL pipeline.
        weights_bkn: of the captions in the batch (`noun_weights`).
        latent_hw: height and width of the latents.
        factors: down-sampling factors, relative to the latent, of the layers to record.

    Raises:
        ModelError: there is no such layer, or one has an attention that cannot be recorded.
    """
    names = [
        name
        for name in unet.attn_processors
        if is_recorded(name) and _factor(unet, name) in factors
    ]
    if not names:
        raise ModelError(
            f"{type(unet).__name__} has no attn2.processor outside its middle block at factors "
            f"{tuple(factors)} of the latent"
        )
    attentions = [unet.get_submodule(name.removesuffix(".processor")) for name in names]
    for name, attn in zip(names, attentions, strict=True):
        _check_readable(name, attn)
    layers = [
        Layer(
            factor=_factor(unet, name),
            heads=attn.heads,
            depth=attn.to_q.out_features // attn.heads,
        )
        for name, attn in zip(names, attentions, strict=True)
    ]
    before = [attn.processor for attn in attentions]
    attribution = Attribution(weights_bkn, latent_hw, layers, dtype=unet.dtype, device=unet.device)
    try:
        for number, attn in enumerate(attentions):
            attn.set_processor(_RecordingProcessor(attribution, number))
        yield attribution
    finally:
        for attn, processor in zip(attentions, before, strict=True):
            attn.set_processor(processor)


def is_recorded(processor_name: str) -> bool:
    """Whether this `unet.attn_processors` key is cross-attention outside the middle block."""
    return processor_name.endswith("attn2.processor") and not processor_name.startswith("mid_block")


def _factor(unet: Any, processor_name: str) -> int:
    """Down-sampling factor of a layer, relative to the latent: all blocks but the last halve."""
    side, number, _ = processor_name.split(".", 2)
    place = int(number) if side == "down_blocks" else len(unet.up_blocks) - 1 - int(number)
    return 2**place


def _check_readable(name: str, attn: Any) -> None:
    if type(attn.processor) is not AttnProcessor2_0:
        raise ModelError(
            f"{name} is {type(attn.processor).__name__}, expected AttnProcessor2_0: call "
            "unet.set_default_attn_processor() and do not fuse projections or add adapters"
        )
    unusual = {
        "spatial_norm": attn.spatial_norm is not None,
        "group_norm": attn.group_norm is not None,
        "norm_cross": bool(attn.norm_cross),
        "norm_q or norm_k": attn.norm_q is not None or attn.norm_k is not None,
        "residual_connection": attn.residual_connection,
    }
    if any(unusual.values()):
        found = ", ".join(option for option, present in unusual.items() if present)
        raise ModelError(f"{name} cannot be recorded: its attention uses {found}")


class _RecordingProcessor:
    """`AttnProcessor2_0` that also records query and key."""

    def __init__(self, attribution: Attribution, layer: int):
        self._attribution = attribution
        self._layer = layer

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if attention_mask is not None:
            raise ModelError("attribution does not know masked cross-attention")

        def split(states: torch.Tensor) -> torch.Tensor:
            rows, length, channels = states.shape
            return states.view(rows, length, attn.heads, channels // attn.heads).transpose(1, 2)

        query = split(attn.to_q(hidden_states))
        key = split(attn.to_k(encoder_hidden_states))
        value = split(attn.to_v(encoder_hidden_states))
        output = self._attribution.attend(self._layer, query, key, value)
        output = output.transpose(1, 2).flatten(2)
        output = attn.to_out[1](attn.to_out[0](output))
        return output if attn.rescale_output_factor == 1 else output / attn.rescale_output_factor
