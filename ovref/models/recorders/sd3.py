"""Stable Diffusion 3 and 3.5: joint attention over image and text, in this order."""

import copy
from typing import Any

from ovref.models.joint_attribution import Layout
from ovref.models.recorders.recorder import (
    Reads,
    Spans,
    TransformerRecorder,
)
from ovref.models.tokens import token_positions

T5_CONTEXT = 256
"""`max_sequence_length` of the pipeline's call: tokens that T5 sees."""


class SD3Recorder(TransformerRecorder):
    """The text is the 77 tokens of both CLIP encoders, joined along channels, and then T5's."""

    network_name = "SD3Transformer2DModel"
    # Seg4Diff: block 9 of 24 at step 8 of 28.
    reads = Reads(reading="share", blocks=(9 / 24, 10 / 24), steps=(8 / 28, 9 / 28))
    layout = Layout(image="first")
    can_end_guidance = True
    halved = ("prompt_embeds", "pooled_prompt_embeds")

    def __init__(self, pipeline: Any):
        super().__init__(pipeline)
        self._clip = copy.deepcopy(pipeline.tokenizer)
        self._t5 = copy.deepcopy(pipeline.tokenizer_3) if pipeline.text_encoder_3 else None

    def positions(self, caption: str, spans: Spans) -> list[tuple[int, ...]]:
        context = self.pipeline.tokenizer_max_length
        found = token_positions(self._clip, caption, spans, max_length=context)
        if self._t5 is None:
            return found
        more = token_positions(self._t5, caption, spans, max_length=T5_CONTEXT)
        return [
            (*clip, *(context + position for position in t5))
            for clip, t5 in zip(found, more, strict=True)
        ]
