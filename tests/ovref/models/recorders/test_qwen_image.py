"""Run: pytest tests/ovref/models/recorders/test_qwen_image.py"""

import pytest
import torch

from generators import generator_of
from ovref.errors import ModelError
from slow_attribution import assert_equals_slow, assert_tokens_are_nouns

FLOW = {"scheduler": "flow_euler", "size_hw": (32, 48)}


def starts(positions, keys):
    """The text comes first."""
    return keys - positions, 0


@pytest.mark.parametrize("reading", ["share", "output"])
@pytest.mark.parametrize("guidance", [1.0, 4.0], ids=["unguided", "guided"])
def test_a_mixed_batch_equals_explicit_attention(loaded, reading, guidance):
    """Its captions differ in length, so the shorter ones are masked."""
    calls = (0, 2) if guidance > 1 else (0, 1)
    assert_equals_slow(
        loaded("qwen_image"), starts, read_blocks=(0, 1, 2), calls=calls, guidance=guidance,
        reading=reading,
    )  # fmt: skip


def test_image_and_text_lie_where_they_are_looked_for(loaded):
    pipeline, found = loaded("qwen_image"), []
    attn = pipeline.transformer.transformer_blocks[1].attn
    hook = attn.add_v_proj.register_forward_hook(lambda module, args, out: found.append(out))
    reference, _ = assert_equals_slow(
        pipeline, starts, read_blocks=(1,), calls=(0,), steps=1, blocks=(1,)
    )
    hook.remove()
    value = reference.values[1][:, :, :-24].transpose(1, 2).flatten(2)
    torch.testing.assert_close(value, found[-1])


def test_nouns_are_found_behind_the_dropped_tokens_of_the_template(loaded):
    pipeline = loaded("qwen_image")
    assert_tokens_are_nouns(
        pipeline, pipeline.tokenizer, pipeline.text_encoder, lambda token, ids: token + 34
    )


def test_settings_that_cannot_be_met_are_refused(loaded):
    with pytest.raises(ModelError, match="cannot end guidance"):
        generator_of(loaded("qwen_image"), guidance=4.0, guided_share=0.5, **FLOW)
    with pytest.raises(ModelError, match="takes no negative prompt"):
        generator_of(loaded("qwen_image"), guidance=1.0, negative_prompt="dog", **FLOW)
