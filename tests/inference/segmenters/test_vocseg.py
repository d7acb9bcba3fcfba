"""VOCSeg: eqs. 2 to 5 against slow loops, and end to end on a world of colours."""

import math

import numpy as np
import pytest
from colour_world import Regions, Texts, collection, picture

from ovref_inference.collection.prototypes import Prototypes, stacked
from ovref_inference.proposers.proposals import Proposals
from ovref_inference.segmenters.regions import NO_CLASS
from ovref_inference.segmenters.vocseg import (
    VocSegConfig,
    VocSegSegmenter,
    ensemble_similarity,
    geometric_mean,
    prototype_similarity,
)
from ovref_inference.vectors import l2_normalised

NAMES = ["red", "green", "blue"]
LABELS = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 2, 2], [2, 2, 2, 2]])


def prototypes_of(per_class, dim):
    vectors, counts = stacked([l2_normalised(v) if len(v) else v for v in per_class], dim)
    return Prototypes(vectors_nkd=vectors, counts=counts, nouns=((),) * len(counts))


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


@pytest.mark.parametrize("alpha", [0.0, 0.35, 1.0])
def test_similarities_match_the_paper_in_plain_python(alpha):
    rng = np.random.default_rng(0)
    # Classes of one, of several prototypes, and one whose cosines are all negative.
    per_class = [rng.normal(size=(3, 5)), rng.normal(size=(1, 5)), -np.ones((4, 5))]
    features = np.concatenate([rng.normal(size=(6, 5)) * 9, np.ones((1, 5))])
    texts = l2_normalised(rng.normal(size=(3, 5)))
    prototypes = prototypes_of(per_class, 5)
    visual = prototype_similarity(features, prototypes)
    mixed = ensemble_similarity(features, prototypes, texts, alpha)
    for i, feature in enumerate(features):
        for j, vectors in enumerate(per_class):
            cosines = [cosine(feature, vector) for vector in vectors]
            eq2 = 0.5 * max(cosines) + sum(cosines) / (2 * len(cosines))
            assert visual[i, j] == pytest.approx(eq2, abs=1e-5)
            eq3 = alpha * eq2 + (1 - alpha) * cosine(feature, texts[j])
            assert mixed[i, j] == pytest.approx(eq3, abs=1e-5)
    assert visual[6, 2] == pytest.approx(-1, abs=1e-5)


def test_foreign_features_are_refused():
    prototypes = prototypes_of([np.ones((2, 3))], 3)
    with pytest.raises(ValueError, match=r"expected features \(n, 3\)"):
        prototype_similarity(np.ones((4, 5)), prototypes)
    with pytest.raises(ValueError, match="zero or not finite"):
        prototype_similarity(np.full((1, 3), np.nan), prototypes)
    assert prototype_similarity(np.zeros((0, 3)), prototypes).shape == (0, 1)


@pytest.mark.parametrize("alpha", [0.0, 0.35])
def test_a_class_without_prototypes_is_never_the_best(alpha):
    prototypes = prototypes_of([np.ones((1, 3)), np.zeros((0, 3))], 3)
    texts = l2_normalised(np.ones((2, 3)))
    found = ensemble_similarity(np.ones((2, 3)), prototypes, texts, alpha)
    assert np.isneginf(found[:, 1]).all() and np.isfinite(found[:, 0]).all()


@pytest.mark.parametrize("trained", [False, True])
def test_a_class_without_support_is_missing_and_gets_no_pixel(tmp_path, trained):
    """Nor by its text, nor by a proposer that was trained on it."""
    given = masks_of(LABELS)
    if trained:
        given = Proposals(
            mask_probs_nhw=given.astype(np.float32),
            class_probs_nc=np.float32([[0.0, 0.9, 0.1]] * 3),
            trained_names=("red", "pipette"),
        )
    it = segmenter(tmp_path, lambda images: [given], alpha=0.0)
    with pytest.warns(UserWarning, match="no references for pipette"):
        (found,) = it.segment([picture(LABELS, NAMES)], ["pipette", *NAMES])
    assert found.missing == ("pipette",) and not (found.labels_hw == 0).any()
    assert not found.scores_chw[0].any()


def test_fusion_is_a_weighted_geometric_mean():
    clip, trained = np.float32([[0.8, 0.2]]), np.float32([[0.1, 0.0]])
    np.testing.assert_allclose(geometric_mean(clip, trained, 0.7), [[0.8**0.7 * 0.1**0.3, 0]])
    np.testing.assert_allclose(geometric_mean(clip, trained, 1.0), clip)
    np.testing.assert_allclose(geometric_mean(clip, trained, 0.0), trained)


def masks_of(label_hw, names=NAMES):
    return np.stack([label_hw == i for i in range(len(names))])


def segmenter(tmp_path, proposer, counts=None, **config):
    world = collection(tmp_path, counts or {"red": 6, "green": 5, "blue": 4})
    return VocSegSegmenter(world, Regions(), Texts(), proposer, VocSegConfig(**config))


def test_it_finds_the_colours_of_images_of_any_size(tmp_path):
    labels = [LABELS, LABELS.T[:3], np.full((2, 5), 1)]
    images = [picture(label_hw, NAMES) for label_hw in labels]
    found = segmenter(
        tmp_path,
        lambda asked: [masks_of(label_hw) for label_hw in labels],
    ).segment(images, NAMES[::-1])
    for result, label_hw in zip(found, labels, strict=True):
        np.testing.assert_array_equal(result.labels_hw, 2 - label_hw)
        assert result.scores_chw.shape == (3, *label_hw.shape) and result.missing == ()


def test_whole_against_a_slow_loop_over_soft_overlapping_masks(tmp_path):
    """Eqs. 2 to 5 by hand, trained branch included: `blue` was not trained, `crimson` is `red`."""
    rng = np.random.default_rng(3)
    image = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    mask_probs = rng.random((3, 4, 4), dtype=np.float32)
    trained = np.float32([[0.7, 0.1, 0.1, 0.1], [0.1, 0.6, 0.1, 0.2], [0.02, 0.02, 0.01, 0.95]])
    given = Proposals(
        mask_probs_nhw=mask_probs,
        class_probs_nc=trained,
        trained_names=("crimson", "green", "yellow"),
    )
    it = segmenter(tmp_path, lambda images: [given], alpha=0.3, beta=0.6, tau=0.1, k=2)
    (found,) = it.segment([image], NAMES)
    prototypes = it.collection.prototypes(NAMES, 2)
    texts = it.texts(NAMES)
    z = np.zeros((3, 4, 4))
    for i in range(3):
        inside = mask_probs[i] > 0.4
        region = (image[inside].astype(float) - 90).mean(0)
        similarity = []
        for j in range(3):
            cosines = [cosine(region, vector) for vector in prototypes.vectors_nkd[j]]
            eq2 = 0.5 * max(cosines) + sum(cosines) / (2 * len(cosines))
            similarity.append(0.3 * eq2 + 0.7 * cosine(region, texts[j]))
        powers = [math.exp(s / 0.1) for s in similarity]
        typical = math.prod(float(p) for p in trained[i, :3]) ** (1 / 3)
        seen = [float(trained[i, 0]), float(trained[i, 1]), typical]
        for j in range(3):
            p = (powers[j] / sum(powers)) ** 0.6 * seen[j] ** 0.4
            z[j] += mask_probs[i] * p
    np.testing.assert_allclose(found.scores_chw, z, rtol=1e-3)
    np.testing.assert_array_equal(found.labels_hw, z.argmax(0))


@pytest.mark.parametrize("rest", [True, False])
def test_what_no_mask_covers(tmp_path, rest):
    masks = masks_of(LABELS)[:2]
    it = segmenter(tmp_path, lambda images: [masks], rest=rest)
    (found,) = it.segment([picture(LABELS, NAMES)], NAMES)
    expected = LABELS if rest else np.where(LABELS == 2, NO_CLASS, LABELS)
    np.testing.assert_array_equal(found.labels_hw, expected)


def test_no_proposals_no_images_and_one_class(tmp_path):
    none = np.zeros((0, 4, 4), bool)
    it = segmenter(tmp_path, lambda images: [none for _ in images], rest=False)
    image = picture(LABELS, NAMES)
    (found,) = it.segment([image], NAMES)
    assert (found.labels_hw == NO_CLASS).all() and not found.scores_chw.any()
    assert it.segment([], NAMES) == []
    covering = segmenter(tmp_path / "b", lambda images: [none for _ in images])
    (found,) = covering.segment([image], ["green"])
    assert (found.labels_hw == 0).all()
    np.testing.assert_allclose(found.scores_chw, 1)
    with pytest.raises(ValueError, match="non-empty texts"):
        it.segment([image], [])


def test_a_class_that_the_collection_lacks_gets_its_neighbours_prototypes(tmp_path):
    it = segmenter(tmp_path, lambda images: [masks_of(LABELS)], k=2)
    prototypes = it.prepare(["crimson", "green", "blue"])
    assert prototypes.nouns == (("red",), ("green",), ("blue",))
    (found,) = it.segment([picture(LABELS, NAMES)], ["crimson", "green", "blue"])
    np.testing.assert_array_equal(found.labels_hw, LABELS)


def test_a_collection_of_one_reference(tmp_path):
    it = segmenter(tmp_path, lambda images: [masks_of(LABELS)], counts={"green": 1}, alpha=0.9)
    (found,) = it.segment([picture(LABELS, NAMES)], ["green"])
    assert (found.labels_hw == 0).all()


def test_prototypes_and_texts_are_made_once(tmp_path):
    it = segmenter(tmp_path, lambda images: [masks_of(LABELS) for _ in images])
    images = [picture(LABELS, NAMES)] * 2
    it.segment(images, NAMES)
    it.segment(images, tuple(NAMES))
    assert len(it.texts._text.asked) == 1 and len(it._prepared) == 1
    # All regions of all images in one call.
    assert it.visual.calls == [(2, [3, 3])] * 2


def test_a_collection_whose_pictures_and_texts_are_in_two_spaces_is_refused(tmp_path):
    class Wide:
        def encode(self, texts):
            return np.ones((len(texts), 5), np.float32)

    world = collection(tmp_path, {"red": 3})
    it = VocSegSegmenter(world, Regions(), Wide(), lambda images: [])
    with pytest.raises(ValueError, match="texts of width 5"):
        it.segment([], ["red"])


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha": -0.1},
        {"alpha": 1.1},
        {"beta": 2.0},
        {"tau": 0.0},
        {"tau": float("nan")},
        {"k": 0},
        {"mask_threshold": 1.0},
    ],
)
def test_parameters_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        VocSegConfig(**settings)


def test_the_rest_of_soft_masks_is_a_region_of_its_own(tmp_path):
    activations = np.zeros((2, 4, 4), np.float32)
    activations[0, :2], activations[1, 2:, :2] = 0.9, 0.5
    activations[0, 2:, 2:] = 0.05  # so faint that no mask has it
    given = Proposals(
        mask_probs_nhw=activations,
        class_probs_nc=np.float32([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1]]),
        trained_names=("red", "green"),
    )
    whole = given.with_rest(0.4)
    rest = np.array(
        [[all(a[y, x] <= 0.4 for a in activations) for x in range(4)] for y in range(4)]
    )
    np.testing.assert_array_equal(whole.mask_probs_nhw, [*activations, rest])
    np.testing.assert_allclose(whole.class_probs_nc[2], 1 / 3)
    assert whole.with_rest(0.4) is whole
    labels_hw = np.where(rest, 2, np.where(activations[0] > 0.4, 0, 1))
    image, plain = picture(labels_hw, NAMES), segmenter(tmp_path / "a", lambda images: [given])
    (without,) = plain.segment([image], NAMES)
    assert (without.labels_hw[2:, 2:] == 0).all()
    it = segmenter(tmp_path / "b", lambda images: [given], rest_of_soft=True)
    (found,) = it.segment([image], NAMES)
    np.testing.assert_array_equal(found.labels_hw, labels_hw)
