"""Z-Image: one stream of image and caption, in this order, each padded to a multiple of 32."""

import copy
from collections.abc import Sequence
from typing import Any

from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF

from ovref.models.joint_attribution import Layout
from ovref.models.recorders.recorder import (
    Reads,
    Spans,
    TransformerRecorder,
)
from ovref.models.tokens import around_caption, token_positions

CONTEXT = 512
"""`max_sequence_length` of the pipeline's call: tokens that the text encoder sees."""


class ZImageRecorder(TransformerRecorder):
    """Qwen3's tokens of the caption in a chat template, without padding."""

    network_name = "ZImageTransformer2DModel"
    reads = Reads(reading="share")
    layout = Layout(image="first", image_multiple=SEQ_MULTI_OF, conditional="first")
    can_end_guidance = True
    unguided_scale = 0.0

    def __init__(self, pipeline: Any):
        super().__init__(pipeline)
        self._tokenizer = tokenizer = copy.deepcopy(pipeline.tokenizer)
        self._around = around_caption(
            lambda text: tokenizer.apply_chat_template(
                [{"role": "user", "content": text}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=True,
            )
        )

    def attentions(self) -> list[Any]:
        return [block.attention for block in self.network.layers]

    def patch(self) -> int:
        return 2

    def positions(self, caption: str, spans: Spans) -> list[tuple[int, ...]]:
        before, after = self._around
        return token_positions(
            self._tokenizer, caption, spans, max_length=CONTEXT, before=before, after=after
        )

    def guidance_options(self, captions: Sequence[str], settings: Any) -> dict[str, Any]:
        # This pipeline's scale counts from the conditional prediction, so it is one less.
        scale = settings.guidance - 1 if settings.guidance > 1 else 0.0
        return {
            "guidance_scale": scale,
            "negative_prompt": [settings.negative_prompt] * len(captions),
        }
