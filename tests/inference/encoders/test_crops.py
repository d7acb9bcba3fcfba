"""Masked crops against a slow loop over pixels, and what is refused."""

import subprocess
import sys

import numpy as np
import pytest

from ovref_inference.encoders.crops import CLIP_MEAN_RGB, masked_crop

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (9, 12, 3), dtype=np.uint8)
MASK = np.zeros((9, 12), bool)
MASK[2:7, 3:10] = RNG.random((5, 7)) < 0.5
MASK[2, 3] = MASK[6, 9] = True
HEATMAP = RNG.normal(size=(9, 12))


def slow_crop(image, mask, masking, heatmap, fill):
    """Pixel by pixel, from the paper's words."""
    ys, xs = np.nonzero(mask)
    low, high = heatmap.min(), heatmap.max()
    rows = []
    for y in range(ys.min(), ys.max() + 1):
        row = []
        for x in range(xs.min(), xs.max() + 1):
            weight = {
                "none": 1.0,
                "binary": 1.0 if mask[y, x] else 0.0,
                "heatmap": (heatmap[y, x] - low) / (high - low),
            }[masking]
            row.append([weight * image[y, x, c] + (1 - weight) * fill[c] for c in range(3)])
        rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize("masking", ["binary", "heatmap", "none"])
@pytest.mark.parametrize("fill", [CLIP_MEAN_RGB, (0, 0, 0), (255, 255, 255)])
def test_crops_match_a_slow_loop(masking, fill):
    found = masked_crop(IMAGE, MASK, masking, heatmap_hw=HEATMAP, fill_rgb=fill)
    assert found.dtype == np.uint8 and found.shape == (5, 7, 3)
    assert np.abs(found - slow_crop(IMAGE, MASK, masking, HEATMAP, fill)).max() <= 0.501


def test_binary_keeps_the_region_bit_by_bit_and_erases_the_rest():
    found = masked_crop(IMAGE, MASK)
    inside = MASK[2:7, 3:10]
    np.testing.assert_array_equal(found[inside], IMAGE[2:7, 3:10][inside])
    assert np.unique(found[~inside], axis=0).tolist() == [[123, 117, 104]]


def test_a_binary_heatmap_is_the_binary_strategy():
    soft = masked_crop(IMAGE, MASK, "heatmap", heatmap_hw=MASK * 0.25)
    np.testing.assert_array_equal(soft, masked_crop(IMAGE, MASK, "binary"))


def test_a_constant_heatmap_attenuates_nothing():
    soft = masked_crop(IMAGE, MASK, "heatmap", heatmap_hw=np.full(MASK.shape, 0.3))
    np.testing.assert_array_equal(soft, masked_crop(IMAGE, MASK, "none"))


@pytest.mark.parametrize("masking", ["binary", "none"])
def test_one_pixel_and_the_whole_image(masking):
    pixel = np.zeros_like(MASK)
    pixel[-1, -1] = True
    np.testing.assert_array_equal(masked_crop(IMAGE, pixel, masking), IMAGE[-1:, -1:])
    whole = masked_crop(IMAGE, np.ones_like(MASK), masking)
    np.testing.assert_array_equal(whole, IMAGE)
    whole[:] = 0
    assert IMAGE.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_hw": np.zeros((9, 12), bool)}, "empty"),
        ({"mask_hw": MASK.T}, r"mask_hw must be \(9, 12\)"),
        ({"mask_hw": MASK.astype(np.uint8)}, "bool"),
        ({"image_hwc": IMAGE[..., 0]}, "image_hwc"),
        ({"image_hwc": IMAGE / 255}, "uint8"),
        ({"masking": "blur"}, "blur"),
        ({"masking": "heatmap"}, "found None"),
        ({"masking": "heatmap", "heatmap_hw": HEATMAP.T}, "heatmap_hw"),
        ({"masking": "heatmap", "heatmap_hw": np.where(MASK, np.nan, 1)}, "finite"),
        ({"masking": "heatmap", "heatmap_hw": np.where(MASK, np.inf, 1)}, "finite"),
    ],
)
def test_what_cannot_be_cropped_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        masked_crop(**({"image_hwc": IMAGE, "mask_hw": MASK} | changes))


def test_cropping_needs_no_torch():
    code = "import sys, ovref_inference.encoders.crops; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
