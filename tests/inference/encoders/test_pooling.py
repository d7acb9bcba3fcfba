"""Mean-region pooling against a slow loop over pixels."""

import numpy as np
import pytest

from ovref_inference.encoders.pooling import mask_weights, pool_regions


def slow_weights(mask, size_hw):
    """Each cell's covered part, by cutting every pixel into 60 x 60 equal dots."""
    (h, w), (height, width) = size_hw, mask.shape
    fine = np.repeat(np.repeat(mask, h * 12, axis=0), w * 12, axis=1)
    return fine.reshape(h, height * 12, w, width * 12).mean(axis=(1, 3))


@pytest.mark.parametrize(
    ("size_hw", "image_hw"),
    [((3, 4), (6, 8)), ((3, 4), (7, 5)), ((5, 2), (5, 2)), ((4, 6), (3, 2)), ((1, 1), (4, 3))],
)
def test_weights_agree_with_counting_dots(size_hw, image_hw):
    rng = np.random.default_rng(0)
    masks = rng.random((4, *image_hw)) < 0.4
    masks[0] = False
    masks[1] = True
    weights = mask_weights(masks, size_hw)
    expected = np.stack([slow_weights(mask, size_hw) for mask in masks])
    np.testing.assert_allclose(weights, expected, atol=1e-5)
    np.testing.assert_allclose(weights.mean(axis=(1, 2)), masks.mean(axis=(1, 2)), atol=1e-5)


def test_pooling_is_the_weighted_mean():
    rng = np.random.default_rng(1)
    features = rng.standard_normal((5, 7, 6))
    masks = rng.random((9, 23, 31)) < 0.2
    pooled, valid = pool_regions(features, masks)
    weights = mask_weights(masks, (5, 7))
    for row in range(9):
        total, weight = np.zeros(6), 0.0
        for i in range(5):
            for j in range(7):
                total += weights[row, i, j] * features[i, j]
                weight += weights[row, i, j]
        np.testing.assert_allclose(pooled[row], total / weight, atol=1e-5)
    assert valid.all() and pooled.dtype == np.float32


def test_one_pixel_takes_its_cell_and_a_full_mask_the_mean():
    features = np.arange(16, dtype=np.float32).reshape(4, 4, 1)
    masks = np.zeros((2, 64, 64), dtype=bool)
    masks[0, 63, 0] = True
    masks[1] = True
    pooled, valid = pool_regions(features, masks)
    np.testing.assert_allclose(pooled[:, 0], [12.0, 7.5], rtol=1e-6)
    assert valid.all()


def test_an_empty_mask_is_reported_and_never_nan():
    pooled, valid = pool_regions(np.ones((2, 2, 3)), np.zeros((1, 8, 8), dtype=bool))
    assert valid.tolist() == [False] and (pooled == 0).all()


def test_unsure_belongs_to_neither_side():
    features = np.array([[[1.0], [5.0]]])
    masks = np.array([[[255, 128]], [[128, 128]], [[0, 255]]], dtype=np.uint8)
    pooled, valid = pool_regions(features, masks)
    assert valid.tolist() == [True, False, True]
    np.testing.assert_allclose(pooled[:, 0], [1.0, 0.0, 5.0])


def test_features_that_are_not_finite_spoil_only_the_masks_that_touch_them():
    features = np.ones((1, 3, 2))
    features[0, 0] = np.nan
    features[0, 1, 1] = np.inf
    masks = np.eye(3, dtype=bool)[:, None, :]
    pooled, valid = pool_regions(features, masks)
    assert valid.tolist() == [False, False, True]
    assert np.isfinite(pooled).all() and pooled[2].tolist() == [1.0, 1.0]


def test_no_masks():
    pooled, valid = pool_regions(np.ones((2, 2, 3)), np.zeros((0, 8, 8), dtype=bool))
    assert pooled.shape == (0, 3) and valid.shape == (0,)


@pytest.mark.parametrize(
    ("features", "masks", "message"),
    [
        (np.ones((2, 2)), np.ones((1, 2, 2), bool), "features_hwd"),
        (np.ones((2, 2, 1)), np.ones((2, 2), bool), r"\(n, H, W\)"),
        (np.ones((2, 2, 1)), np.ones((1, 2, 2), np.uint8), "use bool for 0 and 1"),
        (np.ones((2, 2, 1)), np.ones((1, 2, 2)), "bool or uint8"),
        (np.ones((2, 2, 1)), np.ones((1, 0, 2), bool), "must have pixels"),
    ],
)
def test_other_shapes_and_values_are_refused(features, masks, message):
    with pytest.raises(ValueError, match=message):
        pool_regions(features, masks)


def test_many_masks_are_taken_in_parts(monkeypatch):
    rng = np.random.default_rng(2)
    masks = rng.random((7, 16, 16)) < 0.5
    whole = mask_weights(masks, (4, 4))
    monkeypatch.setattr("ovref_inference.encoders.pooling._CHUNK_PIXELS", 2 * 16 * 16)
    np.testing.assert_array_equal(mask_weights(masks, (4, 4)), whole)


@pytest.mark.parametrize(
    ("size_hw", "image_hw"), [((3, 4), (7, 5)), ((5, 2), (5, 2)), ((6, 6), (3, 9))]
)
def test_bilinear_weights_are_the_mask_at_the_centres_of_cells(size_hw, image_hw):
    masks = np.random.default_rng(0).random((3, *image_hw)) < 0.4
    found = mask_weights(masks, size_hw, "bilinear")
    for number, i, j in np.ndindex(found.shape):
        y = min(max((i + 0.5) * image_hw[0] / size_hw[0] - 0.5, 0), image_hw[0] - 1)
        x = min(max((j + 0.5) * image_hw[1] / size_hw[1] - 0.5, 0), image_hw[1] - 1)
        expected = 0.0
        for row in range(image_hw[0]):
            for column in range(image_hw[1]):
                share = max(0.0, 1 - abs(y - row)) * max(0.0, 1 - abs(x - column))
                expected += share * masks[number, row, column]
        assert found[number, i, j] == pytest.approx(expected, abs=1e-5)


def test_interpolation_may_lose_a_small_mask():
    features, masks = np.ones((2, 2, 3)), np.zeros((1, 16, 16), dtype=bool)
    masks[0, 0, 0] = True
    assert pool_regions(features, masks)[1].tolist() == [True]
    assert pool_regions(features, masks, "bilinear")[1].tolist() == [False]
