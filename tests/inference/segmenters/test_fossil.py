"""Segmenters: eq. 4 and 5 against slow loops, and both segmenters on a world of flat colours."""

import math
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

from ovref.evaluation.oracle import label_masks, oracle_proposer
from ovref_inference.collection.clustering import spherical_kmeans
from ovref_inference.collection.prototypes import Prototypes, stacked
from ovref_inference.collection.retrieve import TEMPLATES
from ovref_inference.proposers.load import no_proposals, opencut_proposer
from ovref_inference.proposers.opencut import OpenCutConfig
from ovref_inference.segmenters import windows as module
from ovref_inference.segmenters.fossil import (
    FossilConfig,
    FossilSegmenter,
    TextOnlySegmenter,
    crop_scores,
    prototype_scores,
)
from ovref_inference.segmenters.labels import BoundedCache
from ovref_inference.segmenters.windows import WindowConfig
from ovref_inference.vectors import l2_normalised

COLOURS = {"red": (250, 20, 20), "green": (20, 250, 20), "blue": (20, 20, 250)}
CLASSES = list(COLOURS)


def prototypes_of(per_class, dim):
    vectors, counts = stacked([l2_normalised(v) if len(v) else v for v in per_class], dim)
    return Prototypes(vectors_nkd=vectors, counts=counts, nouns=((),) * len(counts))


def slow_eq5(feature, prototypes, gamma):
    """Eq. 5 for one region and the prototypes of one class, in plain Python."""
    similarities = []
    for prototype in prototypes:
        dot = sum(a * b for a, b in zip(feature, prototype, strict=True))
        lengths = math.sqrt(sum(a * a for a in feature)) * math.sqrt(sum(b * b for b in prototype))
        similarities.append(1 / (1 + math.exp(-dot / lengths)))
    return (1 - gamma) * sum(similarities) / len(similarities) + gamma * max(similarities)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_prototype_scores_match_a_slow_loop(gamma):
    rng = np.random.default_rng(0)
    per_class = [rng.normal(size=(count, 6)) for count in (3, 1, 5)]
    features = 7 * rng.normal(size=(9, 6))
    scores = prototype_scores(features, prototypes_of(per_class, 6), gamma)
    expected = [[slow_eq5(f, prototypes, gamma) for prototypes in per_class] for f in features]
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, atol=1e-6)


def test_a_class_without_prototypes_never_scores():
    prototypes = prototypes_of([np.ones((2, 3)), np.zeros((0, 3))], 3)
    scores = prototype_scores(np.ones((4, 3)), prototypes, 0.5)
    assert np.isneginf(scores[:, 1]).all() and np.isfinite(scores[:, 0]).all()
    nothing = prototypes_of([np.zeros((0, 3))] * 2, 3)
    assert np.isneginf(prototype_scores(np.ones((4, 3)), nothing, 0.5)).all()


def test_scores_of_no_regions():
    assert prototype_scores(np.zeros((0, 3)), prototypes_of([np.ones((1, 3))], 3), 0.5).shape == (
        0,
        1,
    )


def test_features_of_another_encoder_are_refused():
    with pytest.raises(ValueError, match=r"expected features \(n, 3\).*found \(4, 5\)"):
        prototype_scores(np.ones((4, 5)), prototypes_of([np.ones((2, 3))], 3), 0.5)


def pixels(features_hwd, masks_nhw, **options):
    """Scores of the pixels of one image whose scores are its features."""
    size_hw = masks_nhw.shape[1:]
    encoder = SimpleNamespace(encode=lambda crops: [features_hwd])
    (found,) = crop_scores(
        [np.zeros((4, *size_hw[1:], 3), np.uint8)],
        visual=encoder,
        proposer=lambda crops: [masks_nhw],
        score=lambda features_nd: features_nd,
        **options,
    )
    return found.pixels(slice(None)).numpy()


def test_pixels_take_their_region_and_uncovered_pixels_their_patch():
    features_hwd = np.arange(1, 13, dtype=np.float32).reshape(2, 3, 2)
    mask = np.zeros((1, 4, 6), bool)
    mask[0, :2, :4] = True  # the first two patches of the first row
    scores = pixels(features_hwd, mask)
    region = (features_hwd[0, 0] + features_hwd[0, 1]) / 2
    np.testing.assert_allclose(
        scores[:, mask[0]], np.broadcast_to(region[:, None], (2, mask.sum()))
    )
    # The last corner lies outside of all cell centres: its own patch alone counts.
    np.testing.assert_allclose(scores[:, -1, -1], features_hwd[-1, -1])


def test_uncovered_pixels_may_take_the_patch_that_covers_them():
    features_hwd = np.arange(1, 13, dtype=np.float32).reshape(2, 3, 2)
    masks_nhw = np.zeros((1, 4, 7), bool)
    masks_nhw[0, :2, :2] = True
    scores = pixels(features_hwd, masks_nhw, nearest=True)
    for y in range(4):
        for x in range(7):
            if not masks_nhw[0, y, x]:
                patch = features_hwd[y // 2, int((x + 0.5) * 3 / 7)]
                np.testing.assert_array_equal(scores[:, y, x], patch)


def test_a_mask_that_interpolation_loses_leaves_its_pixels_to_their_patches():
    features_hwd = np.arange(1, 9, dtype=np.float32).reshape(2, 2, 2)
    masks_nhw = np.zeros((2, 4, 16), bool)
    masks_nhw[0, 0, 0] = True
    masks_nhw[1, :, 8:] = True
    scores = pixels(features_hwd, masks_nhw, mask_grid="bilinear", nearest=True)
    np.testing.assert_array_equal(scores[:, 0, 0], features_hwd[0, 0])
    np.testing.assert_allclose(scores[:, 0, 8], features_hwd[:, 1].mean(0))


def test_empty_masks_are_passed_over_and_foreign_sizes_refused():
    features_hwd = np.ones((2, 2, 3), np.float32)
    np.testing.assert_allclose(pixels(features_hwd, np.zeros((2, 4, 4), bool)), 1)
    with pytest.raises(ValueError, match=r"size \(4, 4\), found \(1, 5, 4\)"):
        pixels(features_hwd, np.zeros((1, 5, 4), bool))


class ColourEncoder:
    """Dense features are mean colours of 2 x 2 patches, around grey."""

    def encode(self, images):
        cut = [i[: i.shape[0] // 2 * 2, : i.shape[1] // 2 * 2].astype(np.float32) for i in images]
        cells = [c.reshape(c.shape[0] // 2, 2, c.shape[1] // 2, 2, 3).mean((1, 3)) for c in cut]
        return [c - 90 for c in cells]


class StackedColours(ColourEncoder):
    """The same for images of one size, as one array."""

    def encode(self, images):
        return np.stack(super().encode(images))


class ColourTexts:
    """A text is the colour it names; other texts are grey."""

    def encode(self, texts):
        found = [next((COLOURS[c] for c in CLASSES if c in text), (91, 91, 91)) for text in texts]
        return l2_normalised(np.array(found, np.float32) - 90)


class ColourCollection:
    """A few noisy references for each of some colours."""

    url = "memory"
    manifest = SimpleNamespace(templates=TEMPLATES)

    def __init__(self, known=CLASSES):
        rng = np.random.default_rng(0)
        self.known = [np.array(COLOURS[c], np.float32) - 90 for c in known]
        self.references = [c + rng.normal(scale=15, size=(8, 3)) for c in self.known]
        self.nouns, self.noun_counts = list(known), np.full(len(known), 8)
        self.noun_embeddings = l2_normalised(np.array(self.known))
        self.asked = []

    def fossil_prototypes(self, text_embeddings, *, n, k, seed=0):
        self.asked.append((len(text_embeddings), n, k, seed))
        texts = l2_normalised(np.array(self.known)) @ text_embeddings.T
        per_class = [
            spherical_kmeans(self.references[texts[:, c].argmax()][:n], k, seed=seed)
            if texts[:, c].max() > 0.9
            else np.zeros((0, 3), np.float32)
            for c in range(len(text_embeddings))
        ]
        return prototypes_of(per_class, 3)


def picture(label_hw):
    return np.array([COLOURS[c] for c in CLASSES], np.uint8)[label_hw]


LABELS = np.array([[0, 0, 0, 1, 1], [0, 0, 0, 1, 1], [2, 2, 2, 2, 2]]).repeat(4, 0).repeat(4, 1)
WHOLE = FossilConfig(n=8, k=3, windows=None)


def fossil(config=WHOLE, proposer=no_proposals, collection=None):
    collection = collection or ColourCollection()
    return FossilSegmenter(collection, ColourEncoder(), ColourTexts(), proposer, config)


@pytest.mark.parametrize("oracle", [False, True])
def test_fossil_finds_the_colours_of_an_image_that_is_not_square(oracle):
    image = picture(LABELS)
    proposer = oracle_proposer([image], [label_masks(LABELS)]) if oracle else no_proposals
    (result,) = fossil(proposer=proposer).segment([image], CLASSES)
    np.testing.assert_array_equal(result.labels_hw, LABELS)
    assert result.labels_hw.dtype == np.int32 and result.missing == ()
    assert result.scores_chw.shape == (3, *LABELS.shape)


def test_fossil_takes_images_of_different_sizes_and_any_order_of_classes():
    images = [picture(LABELS), picture(LABELS.T), picture(np.full((2, 6), 1))]
    results = fossil().segment(images, CLASSES[::-1])
    expected = [LABELS, LABELS.T, np.full((2, 6), 1)]
    for result, label in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result.labels_hw, 2 - label)


def test_fossil_over_sliding_windows():
    windows = WindowConfig(short_side=12, long_side=40, crop=8, stride=4)
    (result,) = fossil(FossilConfig(n=8, k=3, windows=windows)).segment([picture(LABELS)], CLASSES)
    np.testing.assert_array_equal(result.labels_hw, LABELS)


def test_text_only_finds_the_colours():
    segmenter = TextOnlySegmenter(ColourEncoder(), ColourTexts(), no_proposals, windows=None)
    (result,) = segmenter.segment([picture(LABELS)], CLASSES)
    np.testing.assert_array_equal(result.labels_hw, LABELS)


def test_one_class_covers_everything():
    (result,) = fossil().segment([picture(LABELS)], ["red"])
    assert (result.labels_hw == 0).all() and np.isfinite(result.scores_chw).all()


def test_prototypes_are_made_once_for_each_list_of_classes():
    segmenter = fossil()
    first = segmenter.prepare(CLASSES)
    assert segmenter.prepare(tuple(CLASSES)) is first
    segmenter.segment([picture(LABELS)], CLASSES)
    assert segmenter.collection.asked == [(3, 8, 3, 0)]
    segmenter.segment([picture(LABELS)], ["red"])
    assert len(segmenter.collection.asked) == 2


def test_texts_are_encoded_once_for_each_list_of_classes():
    asked = []

    class Texts(ColourTexts):
        def encode(self, texts):
            asked.append(len(texts))
            return super().encode(texts)

    segmenter = TextOnlySegmenter(ColourEncoder(), Texts(), no_proposals, windows=None)
    for names in (CLASSES, tuple(CLASSES), CLASSES[:1]):
        segmenter.segment([picture(LABELS)], names)
    assert asked == [3 * len(TEMPLATES), len(TEMPLATES)]


def test_only_the_newest_lists_of_classes_are_remembered():
    segmenter = fossil()
    lists = [["red", f"red number {number}"] for number in range(100)]
    for names in lists:
        segmenter.prepare(names)
    assert list(segmenter._prepared) == [tuple(names) for names in lists[-BoundedCache.limit :]]


@pytest.mark.parametrize("at_once", [1, 1 << 22])
@pytest.mark.parametrize("windows", [None, WindowConfig(short_side=12, crop=8, stride=4)])
def test_a_class_without_support_is_reported_and_never_predicted(windows, at_once, monkeypatch):
    # One class at a time, as of a large image, or all.
    monkeypatch.setattr(module, "_VALUES_AT_ONCE", at_once)
    config = FossilConfig(n=8, k=3, windows=windows)
    segmenter = fossil(config, collection=ColourCollection(["red", "blue"]))
    with pytest.warns(UserWarning, match="no references for green"):
        (result,) = segmenter.segment([picture(LABELS)], CLASSES)
    assert result.missing == ("green",)
    assert np.isneginf(result.scores_chw[1]).all() and np.isfinite(result.scores_chw[[0, 2]]).all()
    assert not (result.labels_hw == 1).any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert segmenter.segment([picture(LABELS)], CLASSES)[0].missing == ("green",)


def test_no_support_at_all_is_an_error():
    with pytest.raises(ValueError, match="no references for any of"):
        fossil(collection=ColourCollection(["red"])).segment([picture(LABELS)], ["green", "blue"])


def test_no_images_and_no_classes():
    assert fossil().segment([], CLASSES) == []
    with pytest.raises(ValueError, match="non-empty texts"):
        fossil().segment([picture(LABELS)], [])


@pytest.mark.parametrize("settings", [{"n": 0}, {"k": 0}, {"gamma": 1.1}, {"gamma": -0.1}])
def test_parameters_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        FossilConfig(**settings)


def test_opencut_as_a_proposer_gives_masks_of_each_image_s_size():
    labels = [np.where(LABELS == 2, 1, 0), np.where(LABELS == 1, 2, 0)]
    config = OpenCutConfig(taus=(0.9,), stages=3, eta=0.0)
    propose = opencut_proposer(StackedColours(), config, device="cpu")
    proposed = propose([picture(label_hw) for label_hw in labels])
    for masks_nhw, label_hw in zip(proposed, labels, strict=True):
        # Of two parts one is cut out, what is left is uniform.
        assert masks_nhw.dtype == bool and masks_nhw.shape == (1, *label_hw.shape)
        assert (
            len(np.unique(label_hw[masks_nhw[0]])) == len(np.unique(label_hw[~masks_nhw[0]])) == 1
        )
