"""PixArt-Alpha, PixArt-Sigma, Sana and Sana-Sprint: transformers with real cross-attention."""

import copy
import inspect
from collections.abc import Sequence
from typing import Any

from ovref.models.joint_attribution import Layout
from ovref.models.recorders.recorder import Reads, Spans, TransformerRecorder
from ovref.models.tokens import lowered, token_positions


class _CrossAttentionRecorder(TransformerRecorder):
    """DAAM on all blocks and steps: the maps of cross-attention, at the grid of image positions."""

    reads = Reads(reading="share")
    readings = ("share",)
    layout = Layout(image="queries")

    def __init__(self, pipeline: Any):
        super().__init__(pipeline)
        self._tokenizer = copy.deepcopy(pipeline.tokenizer)
        self._defaults = {
            name: parameter.default
            for name, parameter in inspect.signature(type(pipeline).__call__).parameters.items()
        }

    def attentions(self) -> list[Any]:
        return [block.attn2 for block in self.network.transformer_blocks]

    def guidance_options(self, captions: Sequence[str], settings: Any) -> dict[str, Any]:
        # Captions stay as they are but for lower case: cleaning would move the nouns.
        return {
            "guidance_scale": settings.guidance,
            "negative_prompt": settings.negative_prompt,
            "clean_caption": False,
            "use_resolution_binning": False,
        }


class PixArtRecorder(_CrossAttentionRecorder):
    """T5's tokens of the lower-case caption."""

    network_name = "PixArtTransformer2DModel"

    def positions(self, caption: str, spans: Spans) -> list[tuple[int, ...]]:
        text, moved = lowered(caption, spans)
        return token_positions(
            self._tokenizer, text, moved, max_length=self._defaults["max_sequence_length"]
        )


class SanaRecorder(_CrossAttentionRecorder):
    """Gemma's tokens of the lower-case caption after an instruction, of which only the first token
    and the last ones are kept."""

    network_name = "SanaTransformer2DModel"

    def __init__(self, pipeline: Any):
        super().__init__(pipeline)
        self._tokenizer.padding_side = "right"  # as the pipeline sets it
        self._instruction = "\n".join(self._defaults["complex_human_instruction"] or [])

    def guidance_is_embedded(self) -> bool:
        return bool(self.network.config.guidance_embeds)

    def guidance_options(self, captions: Sequence[str], settings: Any) -> dict[str, Any]:
        options = super().guidance_options(captions, settings)
        if self.guidance_is_embedded():
            del options["negative_prompt"]
            if settings.steps != 2:  # a second timestep of its own is for two steps only
                options["intermediate_timesteps"] = None
        return options

    def positions(self, caption: str, spans: Spans) -> list[tuple[int, ...]]:
        text, moved = lowered(caption, spans)
        kept = self._defaults["max_sequence_length"]
        if not self._instruction:
            return token_positions(self._tokenizer, text, moved, max_length=kept)
        whole = len(self._tokenizer.encode(self._instruction)) + kept - 2
        found = token_positions(
            self._tokenizer, text, moved, max_length=whole, before=self._instruction
        )
        cut = whole - kept  # of the whole, token 0 and the last `kept` - 1 remain
        return [
            tuple(position - cut for position in noun) if all(p > cut for p in noun) else ()
            for noun in found
        ]
