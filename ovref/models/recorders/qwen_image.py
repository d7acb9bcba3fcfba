"""Qwen-Image: joint attention over text and image, in this order, with masked padding."""

import copy
from collections.abc import Sequence
from typing import Any

from ovref.models.joint_attribution import Layout
from ovref.models.recorders.recorder import Reads, Spans, TransformerRecorder
from ovref.models.tokens import around_caption, token_positions

CONTEXT = 512
"""`max_sequence_length` of the pipeline's call: tokens after the dropped ones that are kept."""


class QwenImageRecorder(TransformerRecorder):
    """Qwen2.5-VL's tokens of the caption in a prompt template, without its first ones."""

    network_name = "QwenImageTransformer2DModel"
    reads = Reads(reading="share")
    layout = Layout(image="last")
    calls_per_guided_step = 2

    def __init__(self, pipeline: Any):
        super().__init__(pipeline)
        self._tokenizer = copy.deepcopy(pipeline.tokenizer)
        self._around = around_caption(pipeline.prompt_template_encode.format)

    def patch(self) -> int:
        return 2  # latents are packed two by two

    def guidance_is_embedded(self) -> bool:
        return bool(self.network.config.guidance_embeds)

    def positions(self, caption: str, spans: Spans) -> list[tuple[int, ...]]:
        dropped = self.pipeline.prompt_template_encode_start_idx
        before, after = self._around
        found = token_positions(
            self._tokenizer, caption, spans, max_length=CONTEXT + dropped,
            before=before, after=after,
        )  # fmt: skip
        return [tuple(position - dropped for position in noun) for noun in found]

    def guidance_options(self, captions: Sequence[str], settings: Any) -> dict[str, Any]:
        if self.guidance_is_embedded():
            return {"guidance_scale": settings.guidance, "true_cfg_scale": 1.0}
        if settings.guidance <= 1:
            return {"true_cfg_scale": 1.0}
        # A blank is the model's own empty prompt.
        return {
            "true_cfg_scale": settings.guidance,
            "negative_prompt": [settings.negative_prompt or " "] * len(captions),
        }
