"""Custom features and the four lines of Python, with the miniature's encoders."""

import numpy as np
import pytest
from PIL import Image

import ovref_inference
from ovref_inference.encoders import load_visual_encoder
from ovref_inference.segmenters import FossilConfig
from paper_tables.datasets import miniature_scenes


@pytest.fixture(scope="module")
def data():
    return miniature_scenes("validation", 1)


def test_features_and_masks_of_ones_own_give_the_segmenters_labels(collection_url, data):
    names, image_hwc = ["tree", "grass", "sky"], data.images[0]
    collection = ovref_inference.open(collection_url)
    config = FossilConfig(n=20, windows=None)
    segmenter = collection.segmenter("fossil", config=config, device="cpu")
    (wanted,) = segmenter.segment([image_hwc], names)
    (masks_nhw,) = segmenter.proposer([image_hwc])
    features_hwd = load_visual_encoder(collection.visual_config).encode([image_hwc])[0]
    found = ovref_inference.segment_features(
        collection, features_hwd, masks_nhw, names, config=config
    )
    assert np.array_equal(found.labels_hw, wanted.labels_hw)
    assert np.allclose(found.scores_chw, wanted.scores_chw, atol=1e-6)
    own = collection.segmenter("fossil", visual=segmenter.visual, config=config)
    assert np.array_equal(own.segment([image_hwc], names)[0].labels_hw, wanted.labels_hw)
    with pytest.raises(ValueError, match=r"expected features \(n, 96\)"):
        ovref_inference.segment_features(collection, features_hwd[..., :5], masks_nhw, names)
    with pytest.raises(ValueError, match="bool masks"):
        ovref_inference.segment_features(collection, features_hwd, masks_nhw * 1, names)
    collection.close()


def test_a_picture_is_read_upright(tmp_path):
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[0, 0] = 255
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    found = ovref_inference.read_image(tmp_path / "turned.png")
    assert found.shape == (6, 4, 3) and found[0, 3].tolist() == [255, 255, 255]
