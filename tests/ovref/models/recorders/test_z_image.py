"""Run: pytest tests/ovref/models/recorders/test_z_image.py"""

import pytest

from generators import generator_of
from slow_attribution import assert_equals_slow, assert_tokens_are_nouns

FLOW = {"scheduler": "flow_euler", "size_hw": (32, 48)}


def starts(positions, keys):
    """The image comes first, padded to 32 positions."""
    return 0, 32


@pytest.mark.parametrize("reading", ["share", "output"])
@pytest.mark.parametrize("guidance", [1.0, 4.0], ids=["unguided", "guided"])
def test_a_mixed_batch_equals_explicit_attention(loaded, reading, guidance):
    """Its captions differ in length; under guidance they come first."""
    assert_equals_slow(
        loaded("z_image"), starts, read_blocks=(0, 1, 2), calls=(0, 1), guidance=guidance,
        reading=reading, own="first",
    )  # fmt: skip


def test_guidance_ends_after_its_share_of_the_steps(loaded):
    assert_equals_slow(
        loaded("z_image"), starts, read_blocks=(1,), calls=(0, 1, 2), steps=3, guidance=4.0,
        guided_share=0.3, blocks=(1,), own="first",
    )  # fmt: skip


def test_the_image_comes_first(loaded):
    """What goes into the first layer at image positions does not depend on the caption's words."""
    pipeline, found = loaded("z_image"), []
    hook = pipeline.transformer.layers[0].register_forward_pre_hook(
        lambda module, args: found.append(args[0])
    )
    generator = generator_of(pipeline, steps=1, guidance=1.0, **FLOW)
    for caption in ("a cat", "a dog"):  # of equal numbers of tokens
        generator.generate([caption], [[]], [0])
    hook.remove()
    different = (found[0] - found[1]).abs().amax((0, 2)) > 0
    assert found[0].shape[1] > 32
    assert not different[:32].any() and different[32:].any()


def test_nouns_are_found_in_the_chat_template(loaded):
    pipeline = loaded("z_image")
    assert_tokens_are_nouns(pipeline, pipeline.tokenizer, pipeline.text_encoder)


def test_the_scale_of_guidance_means_the_same_as_elsewhere(loaded):
    pipeline, scales = loaded("z_image"), []
    for guidance in (0.0, 1.0, 5.0):
        generator = generator_of(pipeline, steps=1, guidance=guidance, **FLOW)
        generator.generate(["cat"], [[]], [0])
        scales.append(pipeline.guidance_scale)
    assert scales == [0.0, 0.0, 4.0]
