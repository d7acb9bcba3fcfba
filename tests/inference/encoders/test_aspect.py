"""Images that keep their aspect ratio: each has the grid that an encoder of its size gives it."""

from dataclasses import replace

import numpy as np
import pytest

from ovref.evaluation.cached import CachedEncoder
from ovref.identity import canonical
from ovref_inference import ModelError
from ovref_inference.encoders.config import VisualEncoderConfig
from ovref_inference.encoders.load import load_visual_encoder
from ovref_inference.proposers.config import OpenCutProposerConfig

RNG = np.random.default_rng(0)
SIZES = {(64, 64): (64, 64), (50, 90): (53, 96), (80, 70): (73, 64), (1, 40): (2, 96)}
"""Size of an image -> its size with a short side of 64, or a long side of 96."""
CLIP = {"model": "miniature:clip", "library": "open_clip"}
CASES = {
    "tokens": ({**CLIP}, 8),
    "values": ({**CLIP, "features": "values"}, 8),
    "dinov2": ({"model": "miniature:dinov2"}, 4),
}


def load(size_hw, **options):
    return load_visual_encoder(VisualEncoderConfig(size_hw=size_hw, **options), device="cpu")


@pytest.mark.parametrize("case", CASES)
def test_each_image_is_encoded_as_by_an_encoder_of_its_size(case):
    options, patch = CASES[case]
    encoder = load((64, 96), aspect="kept", **options)
    sizes = [(50, 90), (64, 64), (80, 70), (50, 90), (1, 40)]
    images = [RNG.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    masks = [np.zeros((2, *size), bool) for size in sizes]
    for mask in masks:
        mask[0, :, : mask.shape[2] // 2] = True
    found, regions = encoder.encode(images), encoder.encode_regions(images, masks)
    for size in SIZES:
        alone = load(SIZES[size], **options)
        grid = tuple(max(1, (side + patch // 2) // patch) for side in SIZES[size])
        assert alone.grid_hw == encoder.grid_of(size) == grid
        for number in [i for i, one in enumerate(sizes) if one == size]:
            (wanted,) = alone.encode([images[number]])
            np.testing.assert_allclose(found[number], wanted, atol=1e-5)
            ((pooled, valid),) = alone.encode_regions([images[number]], [masks[number]])
            np.testing.assert_allclose(regions[number][0], pooled, atol=1e-5)
            assert regions[number][1].tolist() == valid.tolist() == [True, False]
    assert encoder.encode([]) == []
    # An evaluation's cache gives the same, of any company.
    cached = CachedEncoder(encoder)
    for one, other in zip(cached.encode(images), found, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert cached.encode([images[0], images[3]]).shape == (2, *found[0].shape)


def test_what_cannot_keep_its_aspect_is_refused():
    kept = {"size_hw": (64, 64), "aspect": "kept"}
    with pytest.raises(ValueError, match="for dense features"):
        VisualEncoderConfig(**CLIP, **kept, features="crop_binary")
    with pytest.raises(ModelError, match="resizes images itself"):
        load_visual_encoder(VisualEncoderConfig(model="own:any", **kept))
    with pytest.raises(ValueError, match="brought to one size"):
        OpenCutProposerConfig(keys=VisualEncoderConfig(model="x", features="keys", **kept))


def test_collections_keep_their_fingerprints():
    plain = VisualEncoderConfig(**CLIP)
    assert "aspect" not in canonical(plain)
    assert canonical(replace(plain, aspect="kept"))["aspect"] == "kept"
