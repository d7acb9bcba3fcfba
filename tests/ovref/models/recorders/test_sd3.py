"""Run: pytest tests/ovref/models/recorders/test_sd3.py"""

import numpy as np
import pytest
import torch

from generators import generator_of
from ovref.errors import ModelError
from ovref.models.loading import blocks_of, load_pipeline
from slow_attribution import CAPTIONS, SPANS, assert_equals_slow, assert_tokens_are_nouns

CLIP = 77
ALL_STEPS = (0.0, 1.0)
FLOW = {"scheduler": "flow_euler", "size_hw": (32, 48)}


def starts(positions, keys):
    """The image comes first."""
    return 0, positions


@pytest.mark.parametrize("reading", ["share", "output"])
@pytest.mark.parametrize("guidance", [1.0, 4.0], ids=["unguided", "guided"])
def test_a_mixed_batch_equals_explicit_attention(loaded, reading, guidance):
    reference, _ = assert_equals_slow(
        loaded("sd3"), starts, read_blocks=(0, 2), calls=(0, 1), guidance=guidance,
        reading=reading, blocks=(0, 2), read_steps=ALL_STEPS,
    )  # fmt: skip
    assert set(reference.maps) == {(block, call) for block in range(4) for call in range(2)}


def test_the_default_is_one_block_at_one_step(loaded):
    assert_equals_slow(loaded("sd3"), starts, read_blocks=(1,), calls=(1,), steps=4)
    generator = generator_of(loaded("sd3"), steps=28, **FLOW)
    assert generator.provenance["blocks"] == [1] and generator.provenance["reading"] == "share"
    assert generator._recorder.counted(generator._settings).index(True) == 8
    assert sum(generator._recorder.counted(generator._settings)) == 1


def test_image_and_text_lie_where_they_are_looked_for(loaded):
    """Values, which nothing rotates or normalises, against those of the text's own projection."""
    pipeline, found = loaded("sd3"), []
    attn = pipeline.transformer.transformer_blocks[1].attn
    hook = attn.add_v_proj.register_forward_hook(lambda module, args, out: found.append(out))
    reference, _ = assert_equals_slow(
        pipeline, starts, read_blocks=(1,), calls=(0,), steps=1, blocks=(1,)
    )
    hook.remove()
    value = reference.values[1][:, :, 8 * 12 // 4 :].transpose(1, 2).flatten(2)
    torch.testing.assert_close(value, found[-1])


def test_nouns_are_found_in_both_kinds_of_text_encoder(loaded):
    pipeline = loaded("sd3")
    assert_tokens_are_nouns(
        pipeline, pipeline.tokenizer, pipeline.text_encoder,
        lambda token, ids: token if token < CLIP else None,
    )  # fmt: skip
    assert_tokens_are_nouns(
        pipeline, pipeline.tokenizer_3, pipeline.text_encoder_3,
        lambda token, ids: token - CLIP if token >= CLIP else None,
    )  # fmt: skip


def test_without_t5_there_are_clips_tokens_only(loaded):
    pipeline = loaded("sd3", t5=False)
    with_t5 = generator_of(loaded("sd3"), **FLOW).positions(CAPTIONS[0], SPANS[0])
    without = generator_of(pipeline, **FLOW).positions(CAPTIONS[0], SPANS[0])
    assert without == [(2,), (5,)]
    assert [tuple(p for p in noun if p < CLIP) for noun in with_t5] == without
    assert_equals_slow(pipeline, starts, read_blocks=(1,), calls=(0,), steps=1)


def test_a_noun_beyond_clips_context_is_read_from_t5(loaded):
    caption = "x " * 90 + "dog"
    ((start, end),) = spans = [(len(caption) - 3, len(caption))]
    (found,) = generator_of(loaded("sd3"), **FLOW).positions(caption, [spans])
    assert found and min(found) >= CLIP and caption[start:end] == "dog"


def test_guidance_ends_after_its_share_of_the_steps(loaded):
    pipeline, rows = loaded("sd3"), []
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda module, args, options: rows.append(len(options["hidden_states"])),
        with_kwargs=True,
    )
    options = {**FLOW, "steps": 4, "guidance": 4.0, "read_steps": ALL_STEPS}
    positions = [[(2,), (5,)], [(1,)]]
    partly = generator_of(pipeline, guided_share=0.5, **options)
    (image, _) = partly.generate(["a cat and a dog", "dog"], positions, [0, 1])
    hook.remove()
    assert rows == [4, 4, 2, 2]
    (whole, _) = generator_of(pipeline, **options).generate(
        ["a cat and a dog", "dog"], positions, [0, 1]
    )
    assert np.abs(image.image_hwc.astype(int) - whole.image_hwc).max() > 0
    assert np.isfinite(image.heatmaps_nhw).all() and image.heatmaps_nhw.any()


def test_a_batch_equals_its_captions_one_at_a_time(loaded):
    generator = generator_of(loaded("sd3"), steps=2, guidance=4.0, **FLOW)
    positions = [generator.positions(c, s) for c, s in zip(CAPTIONS, SPANS, strict=True)]
    together = generator.generate(CAPTIONS, positions, [1, 2, 3])
    for b, one in enumerate(together):
        (alone,) = generator.generate(CAPTIONS[b : b + 1], positions[b : b + 1], [b + 1])
        np.testing.assert_allclose(one.heatmaps_nhw, alone.heatmaps_nhw, atol=1e-5)
        assert np.abs(one.image_hwc.astype(int) - alone.image_hwc).max() <= 1


def test_the_size_may_come_from_an_aspect_ratio(loaded):
    generator = generator_of(
        loaded("sd3"), scheduler="flow_euler", size_hw=(64, 64), aspect_ratio_hw=(1, 2), steps=1
    )
    (image,) = generator.generate(["a cat"], [[(2,)]], [0])
    assert image.image_hwc.shape == (32, 96, 3) and image.heatmaps_nhw.shape == (1, 4, 12)


def test_negative_prompts_and_captions_without_nouns(loaded):
    options = {**FLOW, "steps": 2, "guidance": 4.0}
    images = [
        generator_of(loaded("sd3"), negative_prompt=negative, **options).generate(
            ["cat"], [[]], [0]
        )[0]
        for negative in ("", "dog")
    ]
    assert images[0].heatmaps_nhw.shape == (0, 4, 6)
    assert np.abs(images[0].image_hwc.astype(int) - images[1].image_hwc).max() > 0


@pytest.mark.parametrize("reading", ["share", "output"])
def test_the_trained_miniature_equals_explicit_attention(reading):
    pipeline = load_pipeline(
        "miniature:stable_diffusion_3", revision=None, scheduler="flow_euler", dtype="float32",
        device="cpu",
    )  # fmt: skip
    assert_equals_slow(
        pipeline, starts, read_blocks=(1, 2), calls=(0,), steps=1, reading=reading,
        blocks=(1, 2), read_steps=ALL_STEPS, size_hw=(32, 48),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"blocks": (1, 4)}, r"has blocks 0 to 3, found blocks \(1, 4\)"),
        ({"negative_prompt": "dog", "guidance": 1.0}, "takes no negative prompt at guidance 1.0"),
        ({"guided_share": 0.5, "guidance": 1.0}, "cannot end guidance before the last step"),
        ({"fused_projections": True}, "fused_projections is for UNets"),
        ({"factors": (1,)}, "factors is for UNets"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_met_are_refused(loaded, fields, named):
    with pytest.raises(ModelError, match=named):
        generator_of(loaded("sd3"), steps=2, **{**FLOW, "guidance": 4.0, **fields})


@pytest.mark.slow
def test_recorded_blocks_are_one_graph(loaded):
    """A second batch compiles nothing, whether its steps are read or not."""
    pipeline = loaded("sd3")
    settings = {**FLOW, "steps": 3, "guidance": 4.0, "blocks": (1, 2), "read_steps": (0.3, 0.7)}
    batches = [
        (["a cat and a dog", "dog"], [[(2,), (5,)], [(1,)]], [0, 1]),
        (["dog", "a cat and a dog"], [[(1,)], [(2,), (5,)]], [2, 3]),
    ]
    plain = [generator_of(pipeline, **settings).generate(*batch) for batch in batches]
    torch._dynamo.reset()
    for block in blocks_of(pipeline.transformer):
        block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    try:
        generator = generator_of(pipeline, **settings)
        compiled = [generator.generate(*batches[0])]
        with torch._dynamo.config.patch(error_on_recompile=True):
            compiled.append(generator.generate(*batches[1]))
    finally:
        for block in pipeline.transformer.transformer_blocks:
            block._compiled_call_impl = None
        torch._dynamo.reset()
    for one, other in zip(plain, compiled, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(a.heatmaps_nhw, b.heatmaps_nhw, atol=1e-6)
            assert np.abs(a.image_hwc.astype(int) - b.image_hwc).max() <= 1
