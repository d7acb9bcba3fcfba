"""Eq. 5 and panoptic maps against slow loops; label matching; what proposals must be."""

import pickle
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from ovref_inference.proposers.proposals import Proposals, as_proposals, owned_masks
from ovref_inference.segmenters import regions as module
from ovref_inference.segmenters.labels import in_vocabulary, match_labels
from ovref_inference.segmenters.regions import (
    NO_CLASS,
    ScoredRegions,
    panoptic,
    region_features,
    semantic,
    softmax,
)
from ovref_inference.vectors import l2_normalised


def random_regions(n=6, classes=4, size=(5, 7), seed=0):
    rng = np.random.default_rng(seed)
    return ScoredRegions(
        mask_probs_nhw=rng.random((n, *size), dtype=np.float32),
        scores_nc=softmax(rng.normal(size=(n, classes)), 0.5),
    )


def test_semantic_scores_are_sums_over_the_regions_of_each_pixel():
    regions = random_regions()
    found = semantic(regions)
    for y in range(5):
        for x in range(7):
            sums = [
                sum(
                    float(regions.mask_probs_nhw[i, y, x]) * float(regions.scores_nc[i, j])
                    for i in range(6)
                )
                for j in range(4)
            ]
            np.testing.assert_allclose(found.scores_chw[:, y, x], sums, rtol=1e-5)
            assert found.labels_hw[y, x] == np.argmax(sums)
    assert found.labels_hw.dtype == np.int32 and found.scores_chw.dtype == np.float32


def test_pixels_without_a_region_have_no_class_and_ties_go_to_the_first():
    mask_probs = np.zeros((1, 2, 2), np.float32)
    mask_probs[0, 0] = 1
    regions = ScoredRegions(mask_probs_nhw=mask_probs, scores_nc=np.float32([[0.5, 0.5, 0]]))
    assert semantic(regions).labels_hw.tolist() == [[0, 0], [NO_CLASS, NO_CLASS]]
    none = ScoredRegions(
        mask_probs_nhw=np.zeros((0, 2, 2), np.float32), scores_nc=np.zeros((0, 3), np.float32)
    )
    assert (semantic(none).labels_hw == NO_CLASS).all()
    assert semantic(none).scores_chw.shape == (3, 2, 2)


@pytest.mark.parametrize("at_once", [1, 36, 100, 1 << 22])
def test_the_best_class_is_found_some_rows_at_a_time(monkeypatch, at_once):
    monkeypatch.setattr(module, "_VALUES_AT_ONCE", at_once)
    regions = random_regions(n=4, classes=5, size=(9, 4))
    found = semantic(regions)
    sums = np.einsum("nc,nhw->chw", regions.scores_nc, regions.mask_probs_nhw)
    np.testing.assert_array_equal(found.labels_hw, sums.argmax(0))
    np.testing.assert_allclose(found.max_score_hw, sums.max(0), rtol=1e-5)


def test_labels_of_many_classes_take_no_memory_for_all_their_scores():
    """As float32, the scores of 200 classes and half a megapixel are 400 MB."""
    regions = random_regions(n=3, classes=200, size=(512, 1024))
    tracemalloc.start()
    try:
        found = semantic(regions)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64e6
    assert found.scores_of(slice(7, 8)).shape == (1, 512, 1024)


def test_a_segmentation_can_be_sent_to_another_process():
    found = semantic(random_regions())
    again = pickle.loads(pickle.dumps(found))
    np.testing.assert_array_equal(again.scores_chw, found.scores_chw)


def test_a_pixel_belongs_to_the_first_of_the_highest_products_and_to_none_of_weight_zero():
    mask_probs = np.random.default_rng(0).integers(0, 4, (5, 6, 7)).astype(np.float32) / 3
    mask_probs[3] = mask_probs[1]
    weights = np.array([0.0, 0.9, 0.6, 0.9, 0.3], np.float32)
    masks, areas = owned_masks(mask_probs, weights, 0.5)
    for y in range(6):
        for x in range(7):
            products = [float(weights[n] * mask_probs[n, y, x]) for n in range(5)]
            owner = products.index(max(products)) if max(products) > 0 else None
            for n in range(5):
                assert masks[n, y, x] == (n == owner and mask_probs[n, y, x] >= 0.5)
    assert areas.tolist() == [(probs >= 0.5).sum() for probs in mask_probs]
    assert masks[1].any() and not masks[0].any() and not masks[3].any()


def slow_panoptic(regions, things, min_score, overlap):
    """Pixel by pixel, from the paper's words, as (label, score, pixels) of each segment."""
    n, height, width = regions.mask_probs_nhw.shape
    kept = [i for i in range(n) if max(regions.scores_nc[i]) > min_score]
    owned = {i: set() for i in kept}
    for y in range(height):
        for x in range(width):
            products = [
                float(max(regions.scores_nc[i]) * regions.mask_probs_nhw[i, y, x]) for i in kept
            ]
            if kept:
                owned[kept[int(np.argmax(products))]].add((y, x))
    segments, stuff = [], {}
    for i in kept:
        whole = {
            (y, x)
            for y in range(height)
            for x in range(width)
            if regions.mask_probs_nhw[i, y, x] >= 0.5
        }
        own = owned[i] & whole
        if not own or len(own) < overlap * len(whole):
            continue
        label, score = int(np.argmax(regions.scores_nc[i])), float(max(regions.scores_nc[i]))
        if not things[label] and label in stuff:
            old = segments[stuff[label]]
            segments[stuff[label]] = (label, max(score, old[1]), old[2] | own)
            continue
        stuff.setdefault(label, len(segments))
        segments.append((label, score, own))
    return segments


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("min_score", "overlap"), [(0.0, 0.2), (0.4, 0.5), (0.0, 0.0)])
def test_panoptic_matches_a_slow_loop(seed, min_score, overlap):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(0, 7))
    blobs = rng.random((n, 6, 6), dtype=np.float32) ** 0.3
    ys, xs = rng.integers(0, 4, n), rng.integers(0, 4, n)
    inside = np.zeros((n, 6, 6), bool)
    for i in range(n):
        inside[i, ys[i] : ys[i] + 3, xs[i] : xs[i] + 4] = True
    regions = ScoredRegions(
        mask_probs_nhw=blobs * inside, scores_nc=softmax(rng.normal(size=(n, 3)), 0.4)
    )
    things = [True, False, True]
    found = panoptic(regions, things, min_score=min_score, overlap=overlap)
    expected = slow_panoptic(regions, things, min_score, overlap)
    assert sorted(found.labels) == list(range(1, len(expected) + 1)) == sorted(found.scores)
    for segment, (label, score, pixels) in enumerate(expected, start=1):
        assert found.labels[segment] == label
        assert found.scores[segment] == pytest.approx(score)
        assert {(int(y), int(x)) for y, x in np.argwhere(found.ids_hw == segment)} == pixels
    assert set(np.unique(found.ids_hw)) <= {0, *found.labels}


def test_things_are_separated_and_stuff_is_merged():
    masks = np.zeros((4, 2, 8), np.float32)
    for i in range(4):
        masks[i, :, 2 * i : 2 * i + 2] = 1
    scores = np.float32([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6]])
    found = panoptic(ScoredRegions(mask_probs_nhw=masks, scores_nc=scores), [True, False])
    assert found.ids_hw[0].tolist() == [1, 1, 2, 2, 3, 3, 3, 3]
    assert found.labels == {1: 0, 2: 0, 3: 1}
    assert found.scores == {1: pytest.approx(0.9), 2: pytest.approx(0.8), 3: pytest.approx(0.7)}
    with pytest.raises(ValueError, match="one entry for each of 2 classes"):
        panoptic(ScoredRegions(mask_probs_nhw=masks, scores_nc=scores), [True])


def test_softmax_is_stable_and_of_one_class_is_one():
    np.testing.assert_allclose(softmax(np.array([[0.0, 1.0]]), 0.001), [[0, 1]])
    np.testing.assert_allclose(softmax(np.array([[-3.0], [7.0]]), 0.01), 1)
    assert softmax(np.zeros((0, 3)), 1.0).shape == (0, 3)


@pytest.mark.parametrize("at_once", [2, 1000])
def test_names_match_by_spelling_first_and_by_text_above_the_threshold(at_once, monkeypatch):
    monkeypatch.setattr("ovref_inference.segmenters.labels._NAMES_AT_ONCE", at_once)
    classes = ["Red ", "green", "red"]
    class_texts = l2_normalised(np.array([[1.0, 0], [0, 1], [1, 0]]))
    names = ["red", "crimson", "olive", "green", "pink"]
    texts = l2_normalised(np.array([[0.0, 1], [1, 0.1], [1, 1], [1, 0], [1, 0.4]]))
    found = match_labels(names, texts, classes, class_texts, 0.95)
    # "red" is spelled so, whatever its text; "pink" is at 0.928.
    assert found.tolist() == [0, 0, -1, 1, -1]
    assert match_labels(names, texts, classes, class_texts, 0.9).tolist() == [0, 0, -1, 1, 0]
    exactly = float(texts[4] @ class_texts[0])
    assert match_labels(names, texts, classes, class_texts, exactly)[4] == -1
    assert match_labels([], texts[:0], classes, class_texts).shape == (0,)


def test_untrained_classes_get_the_geometric_mean_of_the_trained():
    trained = np.float32([[0.6, 0.2, 0.1, 0.1], [0.0, 0.001, 0.001, 0.998]])
    found = in_vocabulary(trained, np.array([2, -1, 2]), 3)
    np.testing.assert_allclose(found[:, 2], [0.7, 0.001], atol=1e-6)
    np.testing.assert_allclose(found[0, :2], (0.6 * 0.2 * 0.1) ** (1 / 3), rtol=1e-5)
    assert np.isfinite(found).all() and (found[1, :2] < 1e-6).all()
    assert in_vocabulary(trained[:0], np.array([2, -1, 2]), 3).shape == (0, 3)


def test_masks_become_proposals_and_the_rest_one_more():
    masks = np.zeros((1, 2, 3), bool)
    masks[0, 0] = True
    plain, covering = as_proposals(masks, rest=False), as_proposals(masks, rest=True)
    assert plain.mask_probs_nhw.tolist() == masks.astype(float).tolist()
    assert covering.mask_probs_nhw.tolist() == [masks[0].tolist(), (~masks[0]).tolist()]
    whole = np.ones((1, 2, 3), bool)
    assert len(as_proposals(whole, rest=True).mask_probs_nhw) == 1
    nothing = as_proposals(masks[:0], rest=True)
    assert nothing.mask_probs_nhw.all() and nothing.mask_probs_nhw.shape == (1, 2, 3)
    assert as_proposals(plain, rest=True) is plain
    with pytest.raises(ValueError, match="bool masks or Proposals"):
        as_proposals(masks.astype(np.uint8), rest=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_probs_nhw": np.zeros((2, 3), np.float32)}, "mask_probs_nhw"),
        ({"mask_probs_nhw": np.zeros((1, 2, 3))}, "float32"),
        ({"mask_probs_nhw": np.full((1, 2, 3), np.nan, np.float32)}, "finite"),
        ({"mask_probs_nhw": np.full((1, 2, 3), 1.5, np.float32)}, r"\[0, 1\]"),
        ({"class_probs_nc": np.zeros((1, 2), np.float32)}, "class_probs_nc"),
        (
            {"class_probs_nc": np.zeros((1, 2), np.float32), "trained_names": ("a", "b")},
            "class_probs_nc",
        ),
        ({"class_probs_nc": np.float32([[np.nan, 1]]), "trained_names": ("a",)}, "probabilities"),
    ],
)
def test_what_is_no_proposal_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Proposals(**({"mask_probs_nhw": np.zeros((1, 2, 3), np.float32)} | changes))


class Spoilt:
    """Finds no features under one of the masks."""

    def encode_regions(self, images, masks, heatmaps=None):
        return [(np.ones((len(m), 2), np.float32), np.arange(len(m)) != 1) for m in masks]


def test_empty_regions_are_left_out_and_spoilt_ones_refused():
    mask_probs = np.zeros((3, 2, 2), np.float32)
    mask_probs[1:] = 0.45
    found = Proposals(
        mask_probs_nhw=mask_probs,
        class_probs_nc=np.float32([[0, 1], [0.5, 0.5], [1, 0]]),
        trained_names=("a",),
    )
    image = np.zeros((2, 2, 3), np.uint8)
    with pytest.raises(ValueError, match="image 0: features of 1 of 2 regions are not finite"):
        region_features(Spoilt(), [image], [found], 0.4)
    ((kept, features),) = region_features(Spoilt(), [image], [found.chosen(np.array([1]))], 0.4)
    assert kept.class_probs_nc.tolist() == [[0.5, 0.5]]
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-6)
    ((kept, features),) = region_features(Spoilt(), [image], [found], 0.45)
    assert len(kept.mask_probs_nhw) == 0 == len(features)


def test_segmenters_of_proposals_need_no_torch():
    code = (
        "import sys, ovref_inference.segmenters.vocseg, ovref_inference.segmenters.retclip; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
