"""Run: pytest tests/ovref/models/recorders/test_flux.py"""

import numpy as np
import pytest
import torch

from generators import generator_of
from ovref.errors import ModelError
from slow_attribution import assert_equals_slow, assert_tokens_are_nouns

FLOW = {"scheduler": "flow_euler", "size_hw": (32, 48)}
ALL_STEPS = (0.0, 1.0)


def starts(positions, keys):
    """The text comes first."""
    return keys - positions, 0


@pytest.mark.parametrize("reading", ["share", "output"])
@pytest.mark.parametrize("name", ["flux", "flux2", "flux2_klein"])
def test_a_mixed_batch_equals_explicit_attention(loaded, name, reading):
    """Blocks 1 and 2 have two streams, 4 has one."""
    assert_equals_slow(
        loaded(name), starts, read_blocks=(1, 2, 4), calls=(0, 1), blocks=(1, 2, 4),
        reading=reading, read_steps=ALL_STEPS, guidance=3.0 if name != "flux2_klein" else 1.0,
    )  # fmt: skip


def test_true_guidance_reads_the_captions_own_calls(loaded):
    """Each guided step calls the network twice, first for the captions."""
    options = {"read_steps": ALL_STEPS, "blocks": (0, 3), "read_blocks": (0, 3)}
    schnell = loaded("flux", guidance_embeds=False)
    assert_equals_slow(schnell, starts, calls=(0, 2), guidance=3.0, **options)
    assert_equals_slow(schnell, starts, calls=(0, 1), guidance=1.0, **options)
    klein = loaded("flux2_klein", distilled=False)
    assert_equals_slow(klein, starts, calls=(0, 2), guidance=3.0, **options)
    assert_equals_slow(
        klein, starts, calls=(0, 2, 3), steps=3, guidance=3.0, guided_share=0.3, **options
    )


def test_the_defaults_are_those_of_concept_attention(loaded):
    assert_equals_slow(loaded("flux"), starts, read_blocks=(2,), calls=(0, 1), guidance=3.0)
    assert_equals_slow(
        loaded("flux2_klein"), starts, read_blocks=(1, 2), calls=(2, 3), steps=4, guidance=1.0
    )


@pytest.mark.parametrize("name", ["flux", "flux2", "flux2_klein"])
def test_image_and_text_lie_where_they_are_looked_for(loaded, name):
    pipeline, found = loaded(name), []
    attn = pipeline.transformer.transformer_blocks[1].attn
    hook = attn.add_v_proj.register_forward_hook(lambda module, args, out: found.append(out))
    reference, _ = assert_equals_slow(
        pipeline, starts, read_blocks=(1,), calls=(0,), steps=1, blocks=(1,), guidance=1.0
    )
    hook.remove()
    value = reference.values[1][:, :, :-24].transpose(1, 2).flatten(2)
    torch.testing.assert_close(value, found[-1])


def test_nouns_are_found_in_the_text_that_is_attended_to(loaded):
    pipeline = loaded("flux")
    assert_tokens_are_nouns(pipeline, pipeline.tokenizer_2, pipeline.text_encoder_2)
    for name in ("flux2", "flux2_klein"):
        pipeline = loaded(name)
        tokenizer = getattr(pipeline.tokenizer, "tokenizer", pipeline.tokenizer)
        assert_tokens_are_nouns(pipeline, tokenizer, pipeline.text_encoder)
    padded = generator_of(loaded("flux2"), **FLOW).positions("a cat", [[(2, 5)]])
    assert padded == [(510,)]  # [/INST] is the last of 512


def test_a_mark_that_the_pipeline_deletes_does_not_move_nouns(loaded):
    generator = generator_of(loaded("flux2"), **FLOW)
    plain = generator.positions("a cat and a dog", [[(12, 15)]])
    assert generator.positions("a cat[IMG] and a dog", [[(17, 20)]]) == plain


def test_images_depend_on_embedded_guidance(loaded):
    images = [
        generator_of(loaded("flux"), steps=2, guidance=guidance, **FLOW).generate(
            ["cat"], [[]], [0]
        )[0].image_hwc.astype(int)
        for guidance in (1.0, 30.0)
    ]  # fmt: skip
    assert np.abs(images[0] - images[1]).max() > 0


@pytest.mark.parametrize(
    ("name", "fields", "named"),
    [
        ("flux", {"negative_prompt": "dog"}, "takes no negative prompt"),
        ("flux", {"guided_share": 0.5}, "cannot end guidance"),
        ("flux2", {"negative_prompt": "dog"}, "takes no negative prompt"),
        ("flux2_klein", {"guidance": 3.0}, "distilled and takes no guidance"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_met_are_refused(loaded, name, fields, named):
    with pytest.raises(ModelError, match=named):
        generator_of(loaded(name), steps=2, **{**FLOW, "guidance": 1.5, **fields})
