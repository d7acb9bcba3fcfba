import math

import numpy as np
import pytest

from ovref.config import parse
from ovref.errors import ConfigError
from ovref.ops.binarisation import (
    BinariseRule,
    binarise,
    contrast,
    min_max_scaled,
    resized,
    with_sigmoid,
)
from ovref.ops.masks import iou
from ovref.records import NO, UNSURE, YES

RULES = [
    BinariseRule(method=method, threshold=threshold, band=band)
    for method in ("standardised_sigmoid", "minmax")
    for threshold in (0.3, 0.45, 0.7)
    for band in (0.0, 0.1)
]


def heatmaps(n=3, h=8, w=6, seed=0):
    return np.random.default_rng(seed).random((n, h, w)).astype(np.float32) * 0.02


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_masks_are_the_thresholds_applied_pixel_by_pixel(rule):
    maps = heatmaps()
    masks = binarise(maps, (8, 6), rule)
    for m in range(3):
        values = [float(v) for v in maps[m].ravel()]
        mean = sum(values) / len(values)
        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
        for place, value in enumerate(values):
            if rule.method == "minmax":
                put = (value - min(values)) / (max(values) - min(values))
            else:
                put = 1 / (1 + math.exp(-(value - mean) / spread))
            expected = NO
            if put > rule.threshold - rule.band:
                expected = UNSURE
            if put > rule.threshold + rule.band:
                expected = YES
            assert masks[m].ravel()[place] == expected, (m, place, put)


def test_the_sigmoid_of_a_raw_heatmap_would_select_everything():
    """Why heatmaps are standardised first."""
    raw = heatmaps(1)[0]
    assert (1 / (1 + np.exp(-raw)) > 0.45).all()
    share = (binarise(raw[None], (8, 6), BinariseRule(threshold=0.45, band=0.0)) == YES).mean()
    assert 0.3 < share < 0.8


@pytest.mark.parametrize("scale", [1.0, 400.0])
def test_the_sigmoid_of_daams_own_values_is_stretched_afterwards(scale):
    """The third reading; it is the first one where values are small."""
    rule = BinariseRule(method="sigmoid_minmax", band=0.0)
    maps = heatmaps() * scale
    found = binarise(min_max_scaled(with_sigmoid(maps, rule)), (8, 6), rule)
    for m in range(3):
        values = [1 / (1 + math.exp(-float(v))) for v in maps[m].ravel()]
        low, high = min(values), max(values)
        for place, value in enumerate(values):
            put = (value - low) / (high - low)
            if abs(put - 0.45) > 1e-3:  # kept heatmaps have 11 bits
                assert found[m].ravel()[place] == (YES if put > 0.45 else NO)
    plain = binarise(maps, (8, 6), BinariseRule(band=0.0))
    assert ((found == plain).mean() > 0.97) == (scale == 1.0)
    np.testing.assert_array_equal(with_sigmoid(maps, BinariseRule()), maps)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_scale_and_offset_do_not_matter(rule):
    maps = heatmaps()
    expected = binarise(maps, (32, 24), rule)
    changed = binarise(maps * 1000 + 5, (32, 24), rule)
    assert (expected == changed).mean() > 0.999  # pixels on the threshold may round either way
    kept = binarise(min_max_scaled(maps), (32, 24), rule)
    assert (expected == kept).mean() > 0.995


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.threshold > 0.4], ids=str)
def test_a_clean_plateau_is_found(rule):
    heat = np.full((16, 12), 0.001, np.float32)
    heat[4:12, 3:9] = 0.02
    truth = np.full((64, 48), NO, np.uint8)
    truth[16:48, 12:36] = YES
    mask = binarise(heat[None], (64, 48), rule)[0]
    assert mask.shape == (64, 48) and mask.dtype == np.uint8
    assert iou(mask, truth) > 0.8


def test_band_only_turns_pixels_unsure():
    maps = heatmaps()
    plain = binarise(maps, (32, 24), BinariseRule(threshold=0.5, band=0.0))
    banded = binarise(maps, (32, 24), BinariseRule(threshold=0.5, band=0.1))
    assert set(np.unique(plain)) == {NO, YES}
    sure = banded != UNSURE
    assert 0 < sure.mean() < 1
    np.testing.assert_array_equal(banded[sure], plain[sure])


@pytest.mark.parametrize("rule", RULES[:2] + RULES[6:8], ids=str)
@pytest.mark.parametrize("value", [0.0, 1e-9, 0.3, 7.0])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_constant_heatmap_selects_nothing(rule, value, dtype):
    maps = np.full((1, 5, 7), value, dtype)
    assert not binarise(maps, (40, 56), rule).any()
    assert not binarise(min_max_scaled(maps), (40, 56), rule).any()


def test_edges():
    rule = BinariseRule()
    assert binarise(np.zeros((0, 4, 4)), (8, 8), rule).shape == (0, 8, 8)
    assert not binarise(np.ones((1, 1, 1)), (8, 8), rule).any()
    one = np.zeros((1, 9, 9), np.float32)
    one[0, 4, 4] = 1
    mask = binarise(one, (9, 9), BinariseRule(method="minmax", threshold=0.4, band=0.0))[0]
    assert (mask == YES).sum() == 1 and mask[4, 4] == YES


def test_stretched():
    maps = np.stack([np.linspace(0.01, 0.03, 12).reshape(3, 4), np.full((3, 4), 0.2)])
    kept = min_max_scaled(maps)
    assert kept.dtype == np.float16 and kept.shape == (2, 3, 4)
    np.testing.assert_allclose(kept[0].ravel(), np.linspace(0, 1, 12), atol=1e-3)
    assert not kept[1].any()
    assert min_max_scaled(np.zeros((0, 3, 4))).shape == (0, 3, 4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_value_spoils_its_own_heatmap_alone(bad):
    maps = heatmaps(2)
    maps[0, 1, 1] = bad
    kept = min_max_scaled(maps)
    assert np.isnan(kept[0]).all() and np.isfinite(kept[1]).all()


def test_contrast():
    heat = np.zeros((8, 8), np.float32)
    heat[:4] = 1
    mask = np.where(heat > 0.5, YES, NO).astype(np.uint8)
    assert contrast(heat, mask) == pytest.approx(2)  # two halves, one standard deviation each side
    assert contrast(-heat, mask) == pytest.approx(-2)
    assert contrast(heat, np.full((8, 8), YES, np.uint8)) == 0
    assert contrast(heat, np.full((8, 8), NO, np.uint8)) == 0
    assert contrast(np.ones((8, 8)), mask) == 0
    noise = np.random.default_rng(0).random((64, 64)).astype(np.float32)
    half = np.full((64, 64), NO, np.uint8)
    half[:32] = YES
    assert abs(contrast(noise, half)) < 0.1
    unsure = mask.copy()
    unsure[3] = UNSURE
    heat[3] = 0.5
    assert contrast(heat, unsure) > 2


def test_resized_keeps_size_order():
    assert resized(np.zeros((4, 6), np.float16), (20, 42)).shape == (20, 42)
    ramp = np.repeat(np.arange(8, dtype=np.float32)[:, None], 5, axis=1)
    up = resized(ramp, (32, 20))
    assert up[0].mean() < up[-1].mean() and np.ptp(up[16]) < 1e-5
    # Smooth, and beyond its ends at a step, as bicubic is and neither nearest nor bilinear.
    assert np.diff(up[8:24, 0]).min() > 0.2 and np.diff(up[8:24, 0]).max() < 0.3
    step = resized((ramp > 3.5).astype(np.float32), (32, 20))
    assert step.min() < -0.05 and step.max() > 1.05


@pytest.mark.parametrize(
    "fields",
    [{"threshold": 0.0}, {"threshold": 1.0}, {"band": -0.1}, {"threshold": 0.2, "band": 0.2}],
    ids=str,
)
def test_values_out_of_range_name_the_field(fields):
    with pytest.raises(ValueError, match=r"threshold|band"):
        BinariseRule(**fields)


def test_the_default_is_the_threshold_of_the_paper():
    assert BinariseRule() == BinariseRule(method="minmax", threshold=0.45, band=0.05)


def test_unknown_methods_are_refused():
    with pytest.raises(ConfigError, match="method"):
        parse(BinariseRule, {"method": "otsu"})


def test_standardised_a_small_thing_takes_the_even_ground_along():
    """The reason given in ops/binarisation.py for its default."""
    heat = np.zeros((1, 20, 20), np.float32)
    heat[0, :3, :5] = 1  # 3.75 percent
    shares = {
        method: (binarise(heat, (20, 20), BinariseRule(method=method, band=0.0)) == YES).mean()
        for method in ("minmax", "standardised_sigmoid")
    }
    assert shares == {"minmax": 15 / 400, "standardised_sigmoid": 1.0}
