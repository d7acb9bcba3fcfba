"""Run: pytest tests/ovref/models/recorders/test_pixart_sana.py"""

import numpy as np
import pytest

from generators import generator_of
from ovref.errors import ModelError
from slow_attribution import SPANS, assert_equals_slow, assert_tokens_are_nouns

DPM = {"scheduler": "dpm_solver++"}


def starts(positions, keys):
    """Queries are the image, keys the text."""
    return 0, 0


@pytest.mark.parametrize("guidance", [1.0, 4.0], ids=["unguided", "guided"])
@pytest.mark.parametrize("name", ["pixart", "sana"])
def test_a_mixed_batch_equals_explicit_attention(loaded, name, guidance):
    size_hw = (32, 48) if name == "pixart" else (32, 64)
    assert_equals_slow(
        loaded(name, **DPM), starts, read_blocks=(0, 1, 2), calls=(0, 1), guidance=guidance,
        size_hw=size_hw, **DPM,
    )  # fmt: skip


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_sana_sprint_embeds_its_guidance(loaded, steps):
    pipeline = loaded("sana", scheduler="scm", sprint=True)
    rows = []
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda module, args, options: rows.append(float(options["guidance"][0])), with_kwargs=True
    )
    assert_equals_slow(
        pipeline, starts, read_blocks=(0, 1, 2), calls=range(steps), guidance=4.5, steps=steps,
        size_hw=(32, 64), scheduler="scm",
    )  # fmt: skip
    hook.remove()
    assert rows == pytest.approx([0.45] * 2 * steps)
    with pytest.raises(ModelError, match="takes no negative prompt"):
        generator_of(pipeline, scheduler="scm", size_hw=(32, 64), negative_prompt="dog")


def test_pixarts_tokens_are_those_of_the_lower_case_caption(loaded):
    pipeline = loaded("pixart", **DPM)
    assert_tokens_are_nouns(pipeline, pipeline.tokenizer, pipeline.text_encoder)
    generator = generator_of(pipeline, size_hw=(32, 32), **DPM)
    assert generator.positions("  A CAT and a Dog ", [[(4, 7)], [(14, 17)]]) == (
        generator.positions("a cat and a dog", SPANS[0])
    )


def test_sanas_tokens_follow_its_instruction(loaded):
    pipeline = loaded("sana", **DPM)
    kept = 300

    def place(token, ids):
        return token + len(ids) - kept if token else 0

    assert_tokens_are_nouns(pipeline, pipeline.tokenizer, pipeline.text_encoder, place)


def test_a_noun_beyond_the_context_has_no_position(loaded):
    caption = "dog" + " x" * 400 + " cat"
    for name in ("pixart", "sana"):
        generator = generator_of(loaded(name, **DPM), size_hw=(32, 32), **DPM)
        dog, cat = generator.positions(caption, [[(0, 3)], [(len(caption) - 3, len(caption))]])
        assert dog and not cat


@pytest.mark.parametrize("name", ["pixart", "sana"])
def test_what_cross_attention_cannot_do_is_refused(loaded, name):
    with pytest.raises(ModelError, match="reading 'output' needs joint attention"):
        generator_of(loaded(name, **DPM), reading="output", size_hw=(32, 32), **DPM)
    with pytest.raises(ModelError, match="cannot end guidance before the last step"):
        generator_of(loaded(name, **DPM), guided_share=0.5, size_hw=(32, 32), **DPM)


def test_the_noise_of_an_image_is_that_of_its_seed(loaded):
    generator = generator_of(loaded("sana", **DPM), steps=2, size_hw=(32, 32), **DPM)
    one, two = generator.generate(["a cat", "a dog"], [[(1,)], [(1,)]], [5, 6])
    (alone,) = generator.generate(["a dog"], [[(1,)]], [6])
    assert np.abs(two.image_hwc.astype(int) - alone.image_hwc).max() <= 1
    assert np.abs(two.image_hwc.astype(int) - one.image_hwc).max() > 5
