"""What a UNet's recorder does beyond test_attribution.py and test_diffusion.py.

Run: pytest tests/ovref/models/recorders/test_unet.py
"""

import numpy as np
import pytest
import torch

from generators import generator_of
from ovref.errors import ModelError
from ovref.models.loading import load_pipeline

OPTIONS = {"revision": None, "dtype": "float32", "device": "cpu"}
SETTINGS = {"scheduler": "lcm", "steps": 4, "guidance": 8.0, "size_hw": (64, 64)}


@pytest.fixture(scope="module")
def consistency_model(tiny_pipelines):
    """A latent consistency model: guidance is an input of its UNet."""
    pipeline = load_pipeline(str(tiny_pipelines["sd1"]), scheduler="lcm", **OPTIONS)
    torch.manual_seed(0)
    pipeline.unet = type(pipeline.unet).from_config(
        {**pipeline.unet.config, "time_cond_proj_dim": 8}
    )
    return pipeline


def test_a_latent_consistency_model_refuses_negative_prompts(consistency_model):
    with pytest.raises(ModelError, match="negative_prompt must be empty, found 'dog'"):
        generator_of(consistency_model, **SETTINGS, negative_prompt="dog")


@pytest.mark.parametrize("captions", [1, 2])
def test_embedded_guidance_ends_after_its_share_of_the_steps(consistency_model, captions):
    inputs = (["a cat", "dog"][:captions], [[(2,)], [(1,)]][:captions], [0, 1][:captions])
    found = {}
    for share in (0.5, 1.0):
        generator = generator_of(consistency_model, **SETTINGS, guided_share=share)
        found[share] = generator.generate(*inputs)
    different = np.abs(found[0.5][0].image_hwc.astype(int) - found[1.0][0].image_hwc)
    assert different.max() > 0
    assert np.isfinite(found[0.5][0].heatmaps_nhw).all() and found[0.5][0].heatmaps_nhw.any()
    assert not consistency_model.unet._forward_pre_hooks


def test_when_guidance_has_ended_the_embedding_is_that_of_guidance_one(consistency_model):
    seen = []
    inner = consistency_model.unet.time_embedding.register_forward_pre_hook(
        lambda module, args: seen.append(args[1])
    )
    one = ["a cat"], [[(2,)]], [0]
    generator_of(consistency_model, **SETTINGS, guided_share=0.5).generate(*one)
    partly = list(seen)
    seen.clear()
    generator_of(consistency_model, **{**SETTINGS, "guidance": 1.0}).generate(*one)
    inner.remove()
    assert [torch.allclose(w, seen[0]) for w in partly] == [False, False, True, True]


@pytest.mark.parametrize(
    "fields", [{"reading": "output"}, {"blocks": (1,)}, {"read_steps": (0.5, 1.0)}], ids=str
)
def test_settings_of_transformers_are_refused(tiny_pipelines, fields):
    pipeline = load_pipeline(str(tiny_pipelines["sd2"]), scheduler="ddim", **OPTIONS)
    with pytest.raises(ModelError, match="is for diffusion transformers"):
        generator_of(pipeline, size_hw=(64, 64), **fields)
