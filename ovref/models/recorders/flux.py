"""FLUX.1 and FLUX.2: joint attention over text and image, in this order, in double blocks with a
stream of their own for each and then in single blocks."""

import copy
from collections.abc import Sequence
from typing import Any

from ovref.errors import ModelError
from ovref.models.joint_attribution import Layout
from ovref.models.recorders.recorder import (
    Reads,
    Spans,
    TransformerRecorder,
)
from ovref.models.tokens import around_caption, token_positions

CONTEXT = 512
"""`max_sequence_length` of the pipelines' calls: tokens that the text encoder sees."""
IMAGE_MARK = "[IMG]"
"""Deleted from captions by the pipeline of FLUX.2."""


class _FluxRecorder(TransformerRecorder):
    layout = Layout(image="last")

    def attentions(self) -> list[Any]:
        blocks = [*self.network.transformer_blocks, *self.network.single_transformer_blocks]
        return [block.attn for block in blocks]

    def default_among(self) -> int:
        return len(self.network.transformer_blocks)

    def patch(self) -> int:
        return 2  # latents are packed two by two

    def guidance_is_embedded(self) -> bool:
        return bool(self.network.config.guidance_embeds)


class FluxRecorder(_FluxRecorder):
    """T5's tokens; CLIP gives only a vector of the whole caption."""

    network_name = "FluxTransformer2DModel"
    # ConceptAttention: double blocks 15 to 18 of 19, all steps.
    reads = Reads(reading="output", blocks=(15 / 19, 1.0))
    calls_per_guided_step = 2

    def __init__(self, pipeline: Any):
        super().__init__(pipeline)
        self._tokenizer = copy.deepcopy(pipeline.tokenizer_2)

    def positions(self, caption: str, spans: Spans) -> list[tuple[int, ...]]:
        return token_positions(self._tokenizer, caption, spans, max_length=CONTEXT)

    def guidance_options(self, captions: Sequence[str], settings: Any) -> dict[str, Any]:
        if self.guidance_is_embedded() or settings.guidance <= 1:
            return {"guidance_scale": settings.guidance}
        return {
            "true_cfg_scale": settings.guidance,
            "negative_prompt": [settings.negative_prompt] * len(captions),
        }


class Flux2Recorder(_FluxRecorder):
    """Mistral's tokens, or Qwen's (klein), of the caption in a chat template, padded to 512."""

    network_name = "Flux2Transformer2DModel"
    # ConceptAttention's own program: the last 3 of 8 double blocks, the last 30 % of 28 steps.
    reads = Reads(reading="output", blocks=(5 / 8, 1.0), steps=(0.7, 1.0))
    calls_per_guided_step = 2
    can_end_guidance = True
    takes_negative_prompt = False

    def __init__(self, pipeline: Any):
        super().__init__(pipeline)
        self._klein = "is_distilled" in pipeline.config
        tokenizer = copy.deepcopy(pipeline.tokenizer)
        if self._klein:
            self._tokenizer = tokenizer
            self._around = around_caption(
                lambda text: tokenizer.apply_chat_template(
                    [{"role": "user", "content": text}],
                    tokenize=False,
                    add_generation_prompt=True,
                    enable_thinking=False,
                )
            )
            self._special = True
            return
        self._tokenizer = tokenizer.tokenizer  # of the processor
        self._around = around_caption(
            lambda text: tokenizer.apply_chat_template(
                [_message("system", pipeline.system_message), _message("user", text)],
                tokenize=False,
                add_generation_prompt=False,
            )
        )
        # As the processor does with a template that begins with it.
        start = self._tokenizer.bos_token
        self._special = start is None or not self._around[0].startswith(start)

    def guidance_is_embedded(self) -> bool:
        return not self._klein

    def check(self, settings: Any) -> None:
        if self._klein and self.pipeline.config.is_distilled and settings.guidance > 1:
            raise ModelError(
                "this FLUX.2 is distilled and takes no guidance: guidance must be 1, found "
                f"{settings.guidance}"
            )
        super().check(settings)

    def positions(self, caption: str, spans: Spans) -> list[tuple[int, ...]]:
        if not self._klein:
            caption, spans = _without(IMAGE_MARK, caption, spans)
        before, after = self._around
        return token_positions(
            self._tokenizer,
            caption,
            spans,
            max_length=CONTEXT,
            before=before,
            after=after,
            padding="max_length",
            add_special_tokens=self._special,
        )

    def guidance_options(self, captions: Sequence[str], settings: Any) -> dict[str, Any]:
        return {"guidance_scale": settings.guidance}


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _without(mark: str, caption: str, spans: Spans) -> tuple[str, Spans]:
    """The caption without a mark, and the spans in it."""

    def moved(place: int) -> int:
        return len(caption[:place].replace(mark, ""))

    if mark not in caption:
        return caption, spans
    return caption.replace(mark, ""), [
        [(moved(start), moved(end)) for start, end in noun] for noun in spans
    ]
