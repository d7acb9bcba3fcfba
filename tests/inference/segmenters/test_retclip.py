"""RetCLIP: scores and ensemble against slow loops, fallback, panoptic output on colours."""

import math
import warnings

import numpy as np
import pytest
from colour_world import COLOURS, Regions, Texts, collection, picture, unit

from ovref_inference import ReferenceCollection
from ovref_inference.collection import store
from ovref_inference.proposers.proposals import Proposals
from ovref_inference.segmenters.regions import NO_CLASS
from ovref_inference.segmenters.retclip import (
    RetClipConfig,
    RetClipSegmenter,
    ensemble,
    mixed,
    retrieval_scores,
)

NAMES = ["red", "green", "blue"]
LABELS = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 2, 2], [2, 2, 2, 2]])
COUNTS = {"red": 6, "green": 5, "blue": 4}


def slow_scores(distances, labels, classes, votes="best"):
    """One region, from the paper's words."""
    found = [(d, c) for d, c in zip(distances, labels, strict=True) if d != math.inf]
    scores = [0.0] * classes
    if not found:
        return scores
    low, high = min(d for d, _ in found), max(d for d, _ in found)
    total = 0.0
    for d, c in found:
        score = 1 - (d - low) / (high - low) if high > low else 1.0
        total += score
        if c >= 0:
            scores[c] = max(scores[c], score) if votes == "best" else scores[c] + score
    return scores if votes == "best" else [score / total for score in scores]


@pytest.mark.parametrize("votes", ["best", "share"])
def test_retrieval_scores_match_a_slow_loop(votes):
    rng = np.random.default_rng(0)
    distances = np.sort(rng.random((50, 7)), axis=1)
    distances[::3, 5:] = np.inf
    labels = rng.integers(-1, 4, (50, 7))
    labels[::3, 5:] = -1
    found = retrieval_scores(distances, labels, 4, votes)
    expected = [slow_scores(d, c, 4, votes) for d, c in zip(distances, labels, strict=True)]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found.max() == 1 if votes == "best" else (found.sum(1) <= 1 + 1e-6).all()


def test_min_max_of_a_constant_of_one_and_of_nothing():
    inf = np.inf
    distances = np.array([[0.3, 0.3, 0.3], [0.2, inf, inf], [inf, inf, inf], [0.1, 0.5, inf]])
    labels = np.array([[0, 2, -1], [1, -1, -1], [-1, -1, -1], [1, 0, -1]])
    found = retrieval_scores(distances, labels, 3)
    assert found.tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 0], [0, 1, 0]]
    shares = retrieval_scores(distances, labels, 3, "share")
    np.testing.assert_allclose(shares, [[1 / 3, 0, 1 / 3], [0, 1, 0], [0, 0, 0], [0, 1, 0]])
    assert retrieval_scores(np.zeros((0, 3)), np.zeros((0, 3), int), 2).shape == (0, 2)
    # Rounding is not stretched to the whole range.
    close = np.array([[0.25, 0.25 + 1e-8]])
    assert retrieval_scores(close, np.array([[0, 1]]), 2).tolist() == [[1, 1]]
    with pytest.raises(ValueError, match="finite"):
        retrieval_scores(np.array([[0.1, np.nan]]), np.zeros((1, 2), int), 1)


def test_the_ensemble_is_the_papers():
    clip, retrieved = np.float32([[0.7, 0.3]]), np.float32([[0.0, 1.0]])
    trained = np.float32([[0.9, 0.05]])
    open_nc = mixed(clip, retrieved, 0.3)
    np.testing.assert_allclose(open_nc, [[0.3 * 0 + 0.7 * 0.7, 0.3 * 1 + 0.7 * 0.3]], rtol=1e-6)
    found = ensemble(open_nc, trained, np.array([True, False]), 0.4, 0.7)
    expected = [[0.4 * 0.49 + 0.6 * 0.9, 0.7 * 0.51 + 0.3 * 0.05]]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def masks_of(label_hw):
    return np.stack([label_hw == i for i in range(3)])


def segmenter(tmp_path, proposer=None, counts=COUNTS, fallback=None, **config):
    return RetClipSegmenter(
        collection(tmp_path / "own", counts),
        Regions(),
        Texts(),
        proposer or (lambda images: [masks_of(LABELS) for _ in images]),
        RetClipConfig(**config),
        fallback=fallback,
    )


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("votes", ["best", "share"])
def test_it_finds_the_colours(tmp_path, gamma, votes):
    it = segmenter(tmp_path, gamma=gamma, votes=votes, k=4)
    (found,) = it.segment([picture(LABELS, NAMES)], NAMES[::-1])
    np.testing.assert_array_equal(found.labels_hw, 2 - LABELS)
    assert found.missing == ()


def slow_region(it, region, names, k, gamma, tau):
    """s_oov of one region by comparing with every reference of the collection."""
    own = it.collection
    nouns = [own.nouns[row] for row in own.noun_rows(np.arange(len(own.visual)))]
    cosines = [float(np.dot(region, vector.astype(np.float32))) for vector in own.visual]
    order = sorted(range(len(cosines)), key=lambda i: (-cosines[i], i))[:k]
    labels = [names.index(nouns[i]) if nouns[i] in names else -1 for i in order]
    retrieved = slow_scores([1 - cosines[i] for i in order], labels, len(names))
    texts = [math.exp(float(np.dot(region, unit(COLOURS[name]))) / tau) for name in names]
    return [gamma * r + (1 - gamma) * t / sum(texts) for r, t in zip(retrieved, texts, strict=True)]


def test_whole_against_a_comparison_with_every_reference(tmp_path):
    rng = np.random.default_rng(5)
    image = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    trained = np.float32([[0.5, 0.2, 0.3], [0.1, 0.1, 0.8], [0.3, 0.3, 0.4]])
    given = Proposals(
        mask_probs_nhw=rng.random((3, 4, 4), dtype=np.float32),
        class_probs_nc=trained,
        trained_names=("green", "yellow"),
    )
    it = segmenter(tmp_path, lambda images: [given], k=7, tau=0.2)
    (found,) = it.score([image], NAMES)
    for i in range(3):
        region = unit(image[given.mask_probs_nhw[i] > 0.5].astype(float).mean(0))
        oov = slow_region(it, region, NAMES, 7, 0.3, 0.2)
        typical = math.sqrt(float(trained[i, 0]) * float(trained[i, 1]))
        iv = [typical, float(trained[i, 0]), typical]
        weights = [0.7, 0.4, 0.7]
        expected = [w * o + (1 - w) * s for w, o, s in zip(weights, oov, iv, strict=True)]
        np.testing.assert_allclose(found.scores_nc[i], expected, rtol=2e-3)


def test_missing_classes_are_found_in_the_fallback(tmp_path):
    counts = {"red": 6, "green": 5}
    fallback = collection(tmp_path / "fallback", {"blue": 3, "red": 9}, seed=1)
    it = segmenter(tmp_path, counts=counts, fallback=fallback, gamma=1.0, k=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        labelled = it.prepare(NAMES)
        (found,) = it.segment([picture(LABELS, NAMES)], NAMES)
    np.testing.assert_array_equal(found.labels_hw, LABELS)
    # Of the fallback only what is missing: red is there already.
    assert labelled.extra_classes.tolist() == [2, 2, 2] and labelled.missing == ()
    # As good as one collection that holds them all.
    both = {"red": 6, "green": 5, "blue": 3}
    alone = segmenter(tmp_path / "both", counts=both, gamma=1.0, k=4)
    (expected,) = alone.segment([picture(LABELS, NAMES)], NAMES)
    np.testing.assert_array_equal(expected.labels_hw, found.labels_hw)


def test_a_class_of_neither_collection_is_missing(tmp_path):
    it = segmenter(tmp_path, counts={"red": 6, "green": 5})
    with pytest.warns(UserWarning, match="no references for blue: these classes will not be pred"):
        (found,) = it.segment([picture(LABELS, NAMES)], NAMES)
    assert found.missing == ("blue",) and not (found.labels_hw == 2).any()
    np.testing.assert_array_equal(found.labels_hw[LABELS < 2], LABELS[LABELS < 2])


@pytest.mark.parametrize("settings", [{"floor": None}, {"label_threshold": 0.9999}])
def test_a_class_near_enough_to_a_noun_or_without_a_floor_is_classified_by_text(tmp_path, settings):
    counts = {"red": 6, "green": 5} if "floor" in settings else {"red": 6, "green": 5, "blue": 3}
    names = ["red", "green", "blue"] if "floor" in settings else ["crimson", "green", "blue"]
    it = segmenter(tmp_path, counts=counts, **settings)
    with pytest.warns(UserWarning, match="these classes will be classified by text alone"):
        (found,) = it.segment([picture(LABELS, NAMES)], names)
    np.testing.assert_array_equal(found.labels_hw, LABELS)
    assert found.missing == ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        it.segment([picture(LABELS, NAMES)], names)


def test_nouns_near_a_class_count_for_it_and_others_do_not(tmp_path):
    it = segmenter(tmp_path, counts={"crimson": 4, "green": 4, "blue": 4, "yellow": 4})
    labelled = it.prepare(NAMES)
    nouns = dict(zip(it.collection.nouns, labelled.class_of_noun.tolist(), strict=True))
    assert nouns == {"crimson": 0, "green": 1, "blue": 2, "yellow": -1}


def test_deleted_references_stand_for_nothing(tmp_path):
    own = segmenter(tmp_path).collection
    gone = own.references_of("blue").tolist()
    own.close()
    url = tmp_path / "own" / "collection"
    store.tombstone(str(url), gone, "opt-out")
    it = RetClipSegmenter(
        ReferenceCollection.open(url), Regions(), Texts(), lambda images: [masks_of(LABELS)]
    )
    with pytest.warns(UserWarning, match="no references for blue"):
        assert it.prepare(NAMES).missing == ("blue",)


def test_collections_of_different_encoders_are_refused(tmp_path):
    other = collection(tmp_path / "other", {"blue": 2})
    other.manifest.visual.settings["size_hw"] = [1, 2]
    with pytest.raises(ValueError, match="different visual settings"):
        segmenter(tmp_path, fallback=other)


def test_panoptic_ids_tell_things_apart(tmp_path):
    masks = np.zeros((4, 2, 8), bool)
    for i in range(4):
        masks[i, :, 2 * i : 2 * i + 2] = True
    masks[3, :, 7] = False
    image = picture(np.array([[0, 0, 0, 0, 1, 1, 1, 1]] * 2), NAMES)
    it = segmenter(tmp_path, lambda images: [masks])
    (found,) = it.segment_panoptic([image], ["red", "green"], [True, False])
    assert found.ids_hw.tolist() == [[1, 1, 2, 2, 3, 3, 3, 0]] * 2
    assert found.labels == {1: 0, 2: 0, 3: 1}
    assert all(0.9 < score <= 1 for score in found.scores.values())


def test_no_proposals_and_one_reference(tmp_path):
    none = np.zeros((0, 4, 4), bool)
    it = segmenter(tmp_path, lambda images: [none for _ in images])
    image = picture(LABELS, NAMES)
    (found,) = it.segment([image], NAMES)
    assert (found.labels_hw == NO_CLASS).all()
    (segments,) = it.segment_panoptic([image], NAMES, [True] * 3)
    assert not segments.ids_hw.any() and segments.labels == {}
    assert it.segment([], NAMES) == []
    single = segmenter(tmp_path / "one", counts={"green": 1}, gamma=1.0)
    (found,) = single.segment([image], ["green"])
    assert (found.labels_hw == 0).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha": -0.1},
        {"beta": 1.5},
        {"gamma": 2.0},
        {"k": 0},
        {"votes": "most"},
        {"tau": -1.0},
        {"mask_threshold": 1.0},
        {"overlap": 1.1},
        {"min_score": -1.0},
    ],
)
def test_parameters_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        RetClipConfig(**settings)


def test_classes_that_the_proposer_did_not_find_are_pruned(tmp_path):
    def proposer(found):
        return lambda images: [
            Proposals(mask_probs_nhw=masks_of(LABELS).astype(np.float32), found_names=found)
        ]

    image, found = picture(LABELS, NAMES), ("green", "blue")
    (pruned,) = segmenter(tmp_path / "a", proposer(found), prune=True).score([image], NAMES)
    (whole,) = segmenter(tmp_path / "b", proposer(found)).score([image], NAMES)
    np.testing.assert_array_equal(pruned.scores_nc[:, 1:], whole.scores_nc[:, 1:])
    assert not pruned.scores_nc[:, 0].any() and whole.scores_nc[0, 0] > 0.9
    (open_,) = segmenter(tmp_path / "c", proposer(None), prune=True).score([image], NAMES)
    np.testing.assert_array_equal(open_.scores_nc, whole.scores_nc)


def test_labels_may_be_compared_as_bare_names(tmp_path):
    class Strict(Texts):
        """A template pulls every text to grey; a bare name is its colour."""

        def encode(self, texts):
            bare = np.array([text in COLOURS for text in texts])[:, None]
            return np.where(bare, super().encode(texts), unit((120, 100, 100))).astype(np.float32)

    classes = {}
    for bare in (False, True):
        it = segmenter(tmp_path / str(bare), bare_labels=bare, counts={"crimson": 4, "blue": 4})
        it.texts._text = it._bare._text = Strict()
        own = it._classes_of(it.collection, ("red", "blue"), it.texts(("red", "blue")))
        classes[bare] = dict(zip(it.collection.nouns, own.tolist(), strict=True))
    # The collection's own noun embeddings are no greys, so with templates only spelling agrees.
    assert classes == {False: {"blue": 1, "crimson": -1}, True: {"blue": 1, "crimson": 0}}
