"""Caches change how often a model runs, and nothing of its results."""

import numpy as np
import pytest

from ovref.errors import StorageError
from ovref.evaluation.cached import (
    CachedEncoder,
    CachedModels,
    CachedProposer,
    CachedTexts,
    ResultCache,
)
from ovref.miniature.scenes import render
from ovref_inference.proposers.config import MaskFormerConfig, ProposerConfig
from ovref_inference.proposers.proposals import Proposals


class Model:
    """Encodes and proposes, and counts the images that it was asked about."""

    dim = 3

    def __init__(self):
        self.asked = 0

    def encode(self, images):
        self.asked += len(images)
        means = np.array([image.mean() for image in images], np.float32)
        return np.broadcast_to(means[:, None, None, None], (len(images), 2, 2, self.dim)).copy()

    def encode_regions(self, images, masks, heatmaps=None):
        self.asked += len(images)
        weights = heatmaps or masks
        return [
            (np.full((len(mask), self.dim), image.mean() + weight.sum()), mask.any((1, 2)))
            for image, mask, weight in zip(images, masks, weights, strict=True)
        ]

    def propose(self, images):
        self.asked += len(images)
        return [image[None, :, :, 0] > 100 for image in images]


@pytest.fixture
def images():
    return [np.full((4, 4 + i, 3), 60 * i, np.uint8) for i in range(4)]


def test_each_image_is_encoded_once(images):
    model = Model()
    encoder = CachedEncoder(model)
    first = encoder.encode([images[0], images[1], images[0]])
    again = encoder.encode([images[1], images[2]])
    assert model.asked == 3 and encoder.dim == 3
    np.testing.assert_array_equal(first, Model().encode([images[0], images[1], images[0]]))
    np.testing.assert_array_equal(again, Model().encode([images[1], images[2]]))
    assert encoder.encode([]).shape == (0, 2, 2, 3)


def test_regions_are_known_by_image_mask_and_heatmap(images):
    model = Model()
    encoder = CachedEncoder(model)
    small, large = np.zeros((2, 4, 4), bool), np.ones((2, 4, 4), bool)
    image = images[0]
    asked = [
        ([image], [small], None),
        ([image], [large], None),
        ([image], [large], [large * 0.5]),
        ([image + 1], [large], [large * 0.5]),
    ]
    for _ in range(2):
        for arguments in asked:
            found, expected = encoder.encode_regions(*arguments), Model().encode_regions(*arguments)
            np.testing.assert_array_equal(found[0][0], expected[0][0])
            np.testing.assert_array_equal(found[0][1], expected[0][1])
    assert model.asked == 4


def test_each_image_is_proposed_for_once(images):
    model = Model()
    proposer = CachedProposer(model.propose)
    for _ in range(2):
        for found, expected in zip(proposer(images), Model().propose(images), strict=True):
            np.testing.assert_array_equal(found, expected)
    assert model.asked == 4


def test_what_is_kept_in_a_folder_is_not_computed_again(images, tmp_path):
    dense, cuts = Model(), Model()
    masks = [np.ones((2, *image.shape[:2]), bool) for image in images]
    first = []
    for _ in range(2):
        cache = ResultCache(tmp_path / "dense")
        encoder = CachedEncoder(dense, cache)
        proposer = CachedProposer(cuts.propose, ResultCache(tmp_path / "masks"))
        features_nhwd = encoder.encode(images)
        regions = encoder.encode_regions(images, masks)
        found = [features_nhwd, *(part for one in regions for part in one), *proposer(images)]
        first = first or found
        assert len(found) == 13 and all(
            a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(first, found, strict=True)
        )
    assert dense.asked == 8 and cuts.asked == 4
    cache.clear()
    encoder.encode(images[:1])
    assert dense.asked == 8


def test_a_damaged_file_of_features_is_named(images, tmp_path):
    CachedEncoder(Model(), ResultCache(tmp_path)).encode(images[:1])
    (path,) = tmp_path.rglob("*.npz")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(StorageError, match=f"{path.name} is damaged .*delete it"):
        CachedEncoder(Model(), ResultCache(tmp_path)).encode(images[:1])


def test_images_of_equal_bytes_and_another_shape_are_others():
    model = Model()
    flat = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    CachedEncoder(model).encode([flat, flat.reshape(4, 2, 3)])
    assert model.asked == 2


def test_each_list_of_texts_and_each_image_is_encoded_once():
    class Lengths:
        asked = 0

        def encode(self, texts):
            self.asked += 1
            return np.array([[len(text)] for text in texts], np.float32)

        def encode_images(self, images):
            self.asked += len(images)
            return np.array([[image.mean()] for image in images], np.float32)

    encoder = Lengths()
    texts = CachedTexts(encoder)
    for _ in range(2):
        np.testing.assert_array_equal(texts.encode(["a", "bcd"]), [[1], [3]])
        np.testing.assert_array_equal(texts.encode(["bcd"]), [[3]])
    assert encoder.asked == 2
    image = np.full((2, 2, 3), 7, np.uint8)
    for _ in range(2):
        np.testing.assert_array_equal(texts.encode_images([image, image]), [[7], [7]])
    assert encoder.asked == 3


def test_segmenters_of_regions_get_soft_masks_and_the_proposer_s_own_classes():
    config = ProposerConfig(mask_former=MaskFormerConfig(model="miniature:maskformer"))
    with CachedModels(device="cpu") as models:
        propose = models.proposals(config, ("sky", "tree"))
        (found,) = propose([render(0, "test").image_hwc])
        assert propose is models.proposals(config, ("sky", "tree"))
    assert isinstance(found, Proposals) and found.class_probs_nc is not None
    assert "tree" in found.trained_names
    assert ((found.mask_probs_nhw > 0.05) & (found.mask_probs_nhw < 0.95)).any()
