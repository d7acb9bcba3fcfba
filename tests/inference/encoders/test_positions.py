"""Features without the directions that tell where a patch is."""

import numpy as np
import pytest

from ovref_inference import ModelError
from ovref_inference.encoders.load import VisualEncoderConfig, load_visual_encoder

RNG = np.random.default_rng(0)
IMAGES = [RNG.integers(0, 256, (48, 64, 3), dtype=np.uint8) for _ in range(3)]


def encoder(number, **options):
    config = VisualEncoderConfig(
        model="miniature:dinov2", size_hw=(64, 64), position_debias=number, **options
    )
    return load_visual_encoder(config, device="cpu")


def patches(found):
    return found.reshape(len(found), -1, found.shape[-1]).astype(np.float64)


def test_the_leading_directions_of_a_black_image_are_gone():
    plain, number = encoder(0), 8
    features, black = patches(plain.encode(IMAGES)), patches(plain.encode([IMAGES[0] * 0]))[0]
    black /= np.linalg.norm(black, axis=1, keepdims=True)
    covariance = np.cov(black, rowvar=False)
    values, vectors = np.linalg.eigh(covariance)
    leading = vectors[:, np.argsort(values)[::-1][:number]]
    expected = features - np.einsum("nlc,cr,dr->nld", features, leading, leading)

    found = patches(encoder(number).encode(IMAGES))

    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()
    assert np.abs(found @ leading).max() < 1e-3 * np.abs(features @ leading).max()


def test_places_are_harder_to_tell_afterwards():
    """A linear map from features to the row of a patch, fitted on one half of some images."""
    images = [RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(8)]
    rows = np.repeat(np.arange(16.0), 16)

    def error(number):
        features = patches(encoder(number).encode(images))
        known, asked = features[:4].reshape(4 * 256, -1), features[4:].reshape(4 * 256, -1)
        weights = np.linalg.lstsq(known, np.tile(rows, 4), rcond=1e-6)[0]
        return np.abs(asked @ weights - np.tile(rows, 4)).mean()

    assert error(8) > 1.2 * error(0)


def test_regions_are_pooled_of_the_same_features():
    encoded = encoder(4)
    mask = np.zeros((1, 48, 64), dtype=bool)
    mask[0, :24, :32] = True
    ((pooled, valid),) = encoded.encode_regions(IMAGES[:1], [mask])
    expected = encoded.encode(IMAGES[:1])[0, :8, :8].mean((0, 1))
    assert valid.all() and np.allclose(pooled[0], expected, atol=1e-5)


def test_images_that_keep_their_aspect_have_directions_of_their_own_size():
    found = encoder(4, aspect="kept").encode(IMAGES[:1])[0]
    config = VisualEncoderConfig(model="miniature:dinov2", size_hw=(48, 64), position_debias=4)
    expected = load_visual_encoder(config, device="cpu").encode(IMAGES[:1])[0]
    assert found.shape == expected.shape == (12, 16, 96)
    assert np.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("number", [96, 256])
def test_so_many_directions_that_nothing_is_left_are_refused(number):
    with pytest.raises(ModelError, match=f"position_debias={number} leaves nothing"):
        encoder(number)
    if number == 96:
        assert np.linalg.norm(encoder(95).encode(IMAGES)) > 0


def test_a_negative_number_is_refused():
    with pytest.raises(ValueError, match="position_debias"):
        encoder(-1)


def test_crops_have_no_places():
    with pytest.raises(ValueError, match="crops have no places"):
        VisualEncoderConfig(
            model="miniature:clip", library="open_clip", features="crop_none", position_debias=4
        )


def test_networks_that_pool_before_their_space_are_refused():
    with pytest.raises(ModelError, match="position_debias needs the patches"):
        load_visual_encoder(
            VisualEncoderConfig(
                model="miniature:clip_convnext",
                library="open_clip",
                size_hw=(64, 64),
                position_debias=2,
            ),
            device="cpu",
        )
