"""FreeDA: superpixels and their pooling against slow loops, and end to end on a colour world."""

import math
from dataclasses import replace

import numpy as np
import pytest
from colour_world import GREY, Texts, collection, picture, unit

from ovref_inference.collection.prototypes import Prototypes, stacked
from ovref_inference.encoders.pooling import pool_regions
from ovref_inference.segmenters.cosines import best_cosines, prototype_cosines
from ovref_inference.segmenters.freeda import FreedaConfig, FreedaSegmenter
from ovref_inference.segmenters.regions import NO_CLASS
from ovref_inference.segmenters.superpixels import SuperpixelConfig, pool_labels, superpixels
from ovref_inference.segmenters.windows import WindowConfig
from ovref_inference.vectors import l2_normalised

NAMES = ["red", "green", "blue"]
LABELS = np.array([[0, 0, 0, 1, 1], [0, 0, 0, 1, 1], [2, 2, 2, 2, 2]]).repeat(8, 0).repeat(8, 1)
WHOLE = {"windows": None, "superpixels": SuperpixelConfig(sigma=0.0)}


@pytest.mark.parametrize("grid", [(3, 5), (4, 4), (7, 9), (1, 1), (13, 31)])
@pytest.mark.parametrize("size", [(12, 20), (13, 7), (1, 9), (30, 31)])
def test_pooling_of_labels_is_pooling_of_their_masks(grid, size):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(*grid, 6)).astype(np.float32)
    labels = np.unique(rng.integers(0, 5, size), return_inverse=True)[1].reshape(size)
    masks = labels == np.arange(labels.max() + 1)[:, None, None]
    expected, valid = pool_regions(features, masks)
    assert valid.all()
    np.testing.assert_allclose(pool_labels(features, labels), expected, atol=1e-5)


def test_pooling_refuses_what_is_not_finite():
    features = np.ones((2, 2, 3))
    features[1, 1, 0] = np.inf
    with pytest.raises(ValueError, match="not finite"):
        pool_labels(features, np.zeros((4, 4), int))


def test_superpixels_do_not_cross_edges_and_are_numbered_without_gaps():
    labels = superpixels(picture(LABELS, NAMES), SuperpixelConfig(sigma=0.0))
    assert labels.shape == LABELS.shape
    assert np.array_equal(np.unique(labels), np.arange(3))
    for number in range(3):
        assert len(np.unique(LABELS[labels == number])) == 1
    noise = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    many = superpixels(noise, SuperpixelConfig(scale=1.0, sigma=0.0, min_size=5))
    assert np.array_equal(np.unique(many), np.arange(many.max() + 1))
    assert np.bincount(many.ravel()).min() >= 5 and many.max() > 5


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 2), (3, 2)])
def test_superpixels_of_tiny_images(size):
    labels = superpixels(np.zeros((*size, 3), np.uint8), SuperpixelConfig())
    assert labels.shape == size and not labels.any()


@pytest.mark.parametrize("settings", [{"scale": 0.0}, {"sigma": -1.0}, {"min_size": 0}])
def test_superpixel_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        SuperpixelConfig(**settings)


class Dense:
    """Features are mean colours of 2 x 2 patches, around grey."""

    def encode(self, images):
        cut = [i[: i.shape[0] // 2 * 2, : i.shape[1] // 2 * 2].astype(np.float32) for i in images]
        cells = [c.reshape(c.shape[0] // 2, 2, c.shape[1] // 2, 2, 3).mean((1, 3)) for c in cut]
        return [c - GREY for c in cells]


class Clip(Texts):
    """The whole image is its mean colour."""

    def encode_images(self, images):
        return np.stack([unit(image.reshape(-1, 3).mean(0)) for image in images])


COUNTS = {"red": 6, "green": 5, "blue": 4}


def segmenter(tmp_path, counts=COUNTS, background_collection=None, **config):
    return FreedaSegmenter(
        collection(tmp_path / "own", counts),
        Dense(),
        Clip(),
        # At 0.8 the colour of most of a window would speak for all of it: this world has no shapes.
        FreedaConfig(**({"n": 4, "local": 0.95} | WHOLE | config)),
        background_collection=background_collection,
    )


def test_a_prototype_is_the_mean_of_the_nearest(tmp_path):
    it = segmenter(tmp_path)
    own, texts = it.collection, np.stack([unit((250, 20, 20)), unit((20, 250, 20))])
    found = it.prepare(["red", "green"])[0].vectors_nkd[:, 0]
    for row, text in enumerate(texts):
        cosines = own.textual.astype(np.float32) @ text
        # Rounded, because references of one noun are equally near but for the order of sums.
        nearest = np.argsort(-cosines.round(5), kind="stable")[:4]
        mean = own.visual[nearest].astype(np.float32).mean(0)
        np.testing.assert_allclose(found[row], mean / np.linalg.norm(mean), atol=1e-3)
    it.config = replace(it.config, n=350)
    everything = it.prepare(["green", "red"])[0].vectors_nkd[:, 0]
    np.testing.assert_allclose(everything[0], everything[1], atol=1e-6)


def test_it_finds_the_colours_of_images_of_different_sizes(tmp_path):
    labels = [LABELS, LABELS.T, np.full((2, 6), 1)]
    found = segmenter(tmp_path).segment([picture(one, NAMES) for one in labels], NAMES[::-1])
    for result, label_hw in zip(found, labels, strict=True):
        np.testing.assert_array_equal(result.labels_hw, 2 - label_hw)
        assert result.labels_hw.dtype == np.int32
        assert result.scores_chw.shape == (3, *label_hw.shape)


@pytest.mark.parametrize("local", [0.0, 0.8, 1.0])
def test_scores_are_the_local_and_the_global_term(tmp_path, local):
    it = segmenter(tmp_path, local=local)
    image = picture(LABELS, NAMES)
    (found,) = it.segment([image], NAMES)
    prototypes, _ = it.prepare(NAMES)
    window = unit(image.reshape(-1, 3).mean(0))
    for j, name in enumerate(NAMES):
        for y, x in ((0, 0), (3, 30), (20, 20)):
            feature = unit(image[y, x])
            near = 1 / (1 + math.exp(-float(feature @ prototypes.vectors_nkd[j, 0])))
            text = float(window @ it.texts([name])[0])
            expected = local * near + (1 - local) * text
            assert found.scores_chw[j, y, x] == pytest.approx(expected, abs=1e-4)


def test_sliding_windows_have_a_global_term_each(tmp_path):
    windows = WindowConfig(short_side=24, long_side=60, crop=16, stride=8)
    (found,) = segmenter(tmp_path, windows=windows).segment([picture(LABELS, NAMES)], NAMES)
    np.testing.assert_array_equal(found.labels_hw, LABELS)


def test_below_the_threshold_is_background(tmp_path):
    image = picture(LABELS, NAMES)
    names = ["red", "green"]
    (plain,) = segmenter(tmp_path, local=1.0).segment([image], names)
    assert set(np.unique(plain.labels_hw)) <= {0, 1}
    # A region of its class has the sigmoid of a cosine near 1, another one that of a negative.
    (found,) = segmenter(tmp_path / "b", local=1.0, background=0.6).segment([image], names)
    np.testing.assert_array_equal(found.labels_hw, np.where(LABELS == 2, NO_CLASS, LABELS))


def test_what_is_nearer_to_background_prototypes_gets_no_class(tmp_path):
    """Around red and green things it was blue; nothing is known of what was around yellow ones."""
    around = collection(tmp_path / "around", {"red": 3, "green": 3})
    blue = np.broadcast_to(unit((20, 20, 250)), around.visual.shape)
    around.visual = l2_normalised(blue).astype(np.float16)
    it = segmenter(tmp_path, background_collection=around)
    (found,) = it.segment([picture(LABELS, NAMES)], ["red", "green"])
    np.testing.assert_array_equal(found.labels_hw, np.where(LABELS == 2, NO_CLASS, LABELS))
    assert np.isneginf(found.scores_chw[:, LABELS == 2]).all()
    assert np.isfinite(found.scores_chw[0][LABELS == 0]).all()
    windows = WindowConfig(short_side=24, long_side=60, crop=16, stride=8)
    sliding = segmenter(tmp_path / "s", background_collection=around, windows=windows)
    (found,) = sliding.segment([picture(LABELS, NAMES)], ["red", "green"])
    np.testing.assert_array_equal(found.labels_hw, np.where(LABELS == 2, NO_CLASS, LABELS))


def test_of_several_background_prototypes_the_nearest_counts():
    rng = np.random.default_rng(0)
    features = l2_normalised(rng.normal(size=(6, 4)))
    per_class = [l2_normalised(rng.normal(size=(count, 4))) for count in (3, 1)]
    vectors, counts = stacked(per_class, 4)
    prototypes = Prototypes(vectors_nkd=vectors, counts=counts, nouns=((), ()))
    found = best_cosines(prototype_cosines(features, prototypes))
    for row, feature in zip(found, features, strict=True):
        expected = [max(float(feature @ vector) for vector in some) for some in per_class]
        np.testing.assert_allclose(row, expected, atol=1e-6)


def test_a_collection_of_regions_is_no_background_collection(tmp_path):
    around = collection(tmp_path / "around", COUNTS)
    around.manifest.build["embed"] = {"fields": {}}
    with pytest.raises(ValueError, match=r"holds regions.*embed.part=background"):
        segmenter(tmp_path, background_collection=around)
    for part in ("background", "surroundings"):  # the name before, in collections of that time
        around.manifest.build["embed"]["fields"]["part"] = part
        segmenter(tmp_path / part, background_collection=around)
    around.manifest.textual.settings["model"] = "another"
    with pytest.raises(ValueError, match="different textual settings"):
        segmenter(tmp_path / "c", background_collection=around)


@pytest.mark.parametrize("with_background", [False, True])
def test_a_class_without_support_is_missing_and_gets_no_pixel(tmp_path, with_background):
    around = collection(tmp_path / "around", {"yellow": 3}) if with_background else None
    it = segmenter(tmp_path, background_collection=around)
    with pytest.warns(UserWarning, match="no references for pipette"):
        (found,) = it.segment([picture(LABELS, NAMES)], ["pipette", *NAMES])
    assert found.missing == ("pipette",) and np.isneginf(found.scores_chw[0]).all()
    np.testing.assert_array_equal(found.labels_hw, LABELS + 1)


def test_one_class_one_reference_and_no_images(tmp_path):
    it = segmenter(tmp_path, counts={"green": 1})
    (found,) = it.segment([picture(LABELS, NAMES)], ["green"])
    assert (found.labels_hw == 0).all() and np.isfinite(found.scores_chw).all()
    with pytest.raises(ValueError, match="non-empty texts"):
        it.segment([picture(LABELS, NAMES)], [])


def test_features_that_are_not_finite_are_refused(tmp_path):
    class Spoilt(Dense):
        def encode(self, images):
            return [np.full_like(found, np.nan) for found in super().encode(images)]

    it = segmenter(tmp_path)
    it.visual = Spoilt()
    with pytest.raises(ValueError, match="not finite"):
        it.segment([picture(LABELS, NAMES)], NAMES)


@pytest.mark.parametrize("settings", [{"n": 0}, {"local": 1.2}, {"background_prototypes": 0}])
def test_parameters_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        FreedaConfig(**settings)
