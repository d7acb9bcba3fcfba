"""The CRF against one with every pair of pixels written out, and its effect on masks."""

import numpy as np
import pytest

from ovref_inference.proposers.config import CrfConfig
from ovref_inference.proposers.crf import cut_to_edges, gaussian_filter, mean_field, to_edges

PLAIN = CrfConfig(appearance_distance=100.0, appearance_colour=10.0, smoothness_weight=0.0)


def dense_filter(points_nd):
    """The normalised Gaussian filter by its definition."""
    squares = ((points_nd[:, None] - points_nd[None]) ** 2).sum(-1)
    kernel = np.exp(-squares / 2)
    root = 1 / np.sqrt(kernel.sum(1))
    return root[:, None] * kernel * root


def dense_mean_field(unary_nhw, image_hwc, config):
    labels, height, width = unary_nhw.shape
    unit = min(height, width) / 480
    places = np.array([(y, x) for y in range(height) for x in range(width)]) / unit
    colours = image_hwc.reshape(-1, 3).astype(float)
    near = dense_filter(places / config.smoothness_distance)
    both = np.concatenate(
        (places / config.appearance_distance, colours / config.appearance_colour), axis=1
    )
    links = config.smoothness_weight * near + config.appearance_weight * dense_filter(both)
    unary = unary_nhw.reshape(labels, -1).T
    q = np.exp(unary) / np.exp(unary).sum(1, keepdims=True)
    for _ in range(config.steps):
        q = np.exp(unary + links @ q)
        q /= q.sum(1, keepdims=True)
    return q.T.reshape(unary_nhw.shape)


def halves(height=24, width=32, at=13, noise=4.0):
    """Dark on the left of column `at`, bright on the right, with some noise."""
    rng = np.random.default_rng(0)
    columns = np.where(np.arange(width) < at, 60.0, 160.0)
    image = columns[None, :, None] + rng.normal(0, noise, (height, width, 3))
    return image.round().clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(("dim", "spread"), [(1, 8.0), (2, 6.0), (3, 3.0), (5, 2.0)])
def test_the_lattice_filters_like_the_gaussian(dim, spread):
    rng = np.random.default_rng(dim)
    points = rng.uniform(0, spread, (800, dim))
    values = np.concatenate((rng.random((800, 2)), points[:, :1] > spread / 2), axis=1)
    found, exact = gaussian_filter(points)(values.astype(np.float32)), dense_filter(points) @ values
    # The lattice replaces the Gaussian by a piecewise one: some percent, as in its paper.
    assert np.abs(found - exact).max() < 0.1
    assert np.abs(found - exact).mean() < 0.025
    assert np.corrcoef(found[:, 2], exact[:, 2])[0, 1] > 0.99


def test_far_points_do_not_touch():
    points = np.array([[0.0, 0.0], [0.0, 0.0], [50.0, 0.0]])
    matrix = gaussian_filter(points)(np.eye(3, dtype=np.float32))
    np.testing.assert_allclose(matrix, [[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]], atol=1e-5)


def test_points_too_far_for_integers_are_refused():
    with pytest.raises(ValueError, match="too many deviations"):
        gaussian_filter(np.array([[0.0] * 5, [1e6] * 5]))


@pytest.mark.parametrize("config", [PLAIN, CrfConfig(steps=3)])
def test_mean_field_is_that_of_the_written_out_field(config):
    rng = np.random.default_rng(1)
    image = halves()
    unary = rng.random((3, *image.shape[:2])).astype(np.float32)
    unary[0, :, :10] += 0.5
    unary[1, :, 20:] += 0.5
    found, exact = mean_field(unary, image, config), dense_mean_field(unary, image, config)
    np.testing.assert_allclose(found.sum(0), 1, atol=1e-5)
    assert (found.argmax(0) == exact.argmax(0)).mean() > 0.98
    assert np.abs(found - exact).mean() < 0.05


def test_a_mask_moves_to_the_edge_of_the_image():
    masks = np.zeros((1, 6, 8), dtype=bool)
    masks[0, :, :4] = True  # up to column 16, three beyond the edge
    (found,) = to_edges(masks, halves(), PLAIN)
    expected = np.zeros((24, 32), dtype=bool)
    expected[:, :13] = True
    np.testing.assert_array_equal(found, expected)


def test_masks_stay_apart_and_in_order():
    masks = np.zeros((2, 3, 4), dtype=bool)
    masks[0, :, 2:], masks[1, :, 0] = True, True  # column 1 is in none
    found = to_edges(masks, halves(at=16), PLAIN)
    assert found.shape == (2, 24, 32) and found.sum(0).max() == 1
    assert found[0, :, 20:].all() and found[1, :, :6].all()


def test_a_mask_that_loses_every_pixel_is_left_out():
    masks = np.zeros((1, 12, 16), dtype=bool)
    masks[0, 3, 3] = True
    assert to_edges(masks, np.full((24, 32, 3), 90, np.uint8), PLAIN).shape == (0, 24, 32)


def test_no_mask_and_one_pixel():
    assert to_edges(np.zeros((0, 2, 2), bool), halves(), PLAIN).shape == (0, 24, 32)
    np.testing.assert_array_equal(
        to_edges(np.ones((1, 1, 1), bool), np.zeros((1, 1, 3), np.uint8), CrfConfig()), [[[True]]]
    )


def test_large_images_are_done_at_480_pixels():
    image = halves(600, 500, at=200)
    masks = np.zeros((1, 6, 5), dtype=bool)
    masks[0, :, :2] = True
    masks[0, 3, 1] = False
    (found,) = to_edges(masks, image, PLAIN)
    assert found.shape == (600, 500)
    # Its edge is known to a pixel of the smaller image.
    assert found[:, :197].all() and not found[:, 203:].any()


@pytest.mark.parametrize(
    "settings",
    [
        {"appearance_distance": 0.0},
        {"appearance_colour": -1.0},
        {"smoothness_distance": float("nan")},
        {"appearance_weight": -1.0},
        {"smoothness_weight": -0.1},
        {"steps": 0},
    ],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        CrfConfig(**settings)


def test_each_cut_has_a_field_of_its_own_and_one_that_is_changed_wholly_is_left_out():
    image = halves()
    cuts = np.zeros((4, 6, 8), dtype=bool)
    cuts[0, :, :4] = True
    cuts[1, :, :3] = True  # overlaps the first
    cuts[3, 2, 2] = True  # which the field takes away
    found = cut_to_edges(cuts, image, PLAIN)
    expected = [to_edges(cut[None], image, PLAIN) for cut in cuts[:2]]
    np.testing.assert_array_equal(found, np.concatenate(expected))
    # Dense fields say the same of both.
    for cut, mask in zip(cuts[:2], found, strict=True):
        share = np.kron(cut, np.ones((4, 4))).astype(np.float32)
        exact = dense_mean_field(np.stack([share, 1 - share]), image, PLAIN).argmax(0) == 0
        assert (exact == mask).mean() > 0.98
    assert cut_to_edges(cuts[2:3], image, PLAIN).shape == (0, 24, 32)
