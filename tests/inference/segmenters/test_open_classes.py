"""Proposers that were trained on texts: what they say of any class, in RetCLIP and VOCSeg."""

import math

import numpy as np
import pytest
from colour_world import COLOURS, Regions, Texts, collection, picture, unit

from ovref_inference.proposers.proposals import OpenClasses, Proposals
from ovref_inference.segmenters.labels import NamedTexts, trained_scores
from ovref_inference.segmenters.regions import ScoredRegions, panoptic
from ovref_inference.segmenters.retclip import (
    RetClipConfig,
    RetClipSegmenter,
    geometric_ensemble,
)
from ovref_inference.segmenters.vocseg import VocSegConfig, VocSegSegmenter

NAMES = ["red", "green", "blue"]
LABELS = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 2, 2], [2, 2, 2, 2]])
RNG = np.random.default_rng(0)
VOID = np.float32([-1.0, -1.0, 0.5])


def said(embeddings_nd, templates=("a {}.",), scale=3.0):
    return OpenClasses(
        embeddings_nd=np.float32(embeddings_nd), void_d=VOID, scale=scale, templates=templates
    )


def proposed(image, **fields):
    """The three regions, each with an embedding a little beside its own colour."""
    masks = np.stack([LABELS == i for i in range(3)])  # noqa: SIM300
    means = np.stack([unit(image[mask].astype(float).mean(0)) for mask in masks])
    fields = {"trained_names": ("red", "yellow"), "open_classes": said(means + 0.1)} | fields
    return Proposals(mask_probs_nhw=masks.astype(np.float32), **fields)


def slow_softmax(embedding, names, scale=3.0):
    """The probabilities of the names and void, by hand."""
    one = np.array(embedding) / np.linalg.norm(embedding)
    known = [unit(COLOURS[name]) for name in names] + [VOID / np.linalg.norm(VOID)]
    powers = [math.exp(scale * float(one @ text)) for text in known]
    return [power / sum(powers) for power in powers]


def test_probabilities_are_a_softmax_of_cosines_with_texts_and_void():
    embeddings = RNG.normal(size=(4, 3))
    texts = np.stack([unit(COLOURS[name]) for name in NAMES])
    found = said(embeddings).probabilities(texts)
    expected = [slow_softmax(one, NAMES) for one in embeddings]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    with pytest.raises(ValueError, match="3 wide and the texts 5"):
        said(embeddings).probabilities(np.ones((2, 5), np.float32))


def test_proposals_keep_what_is_said_together():
    embeddings, masks = RNG.normal(size=(3, 3)), np.zeros((3, 2, 2), np.float32)
    features = RNG.normal(size=(3, 4)).astype(np.float32)
    whole = Proposals(
        mask_probs_nhw=masks, open_classes=said(embeddings), features_nd=features, features_of="x"
    )
    for rows in (np.array([True, False, True]), np.array([2, 0])):
        some = whole.chosen(rows)
        np.testing.assert_array_equal(some.features_nd, features[rows])
        np.testing.assert_allclose(
            some.open_classes.embeddings_nd, said(embeddings[rows]).embeddings_nd
        )
    with pytest.raises(ValueError, match="the rest has no embedding"):
        whole.with_rest(0.5)
    seen = Proposals(mask_probs_nhw=masks, features_nd=features, features_of="x").with_rest(0.5)
    assert seen.features_nd is None and len(seen.mask_probs_nhw) == 4
    for fields, message in (
        ({"features_nd": features}, "given together"),
        ({"features_nd": features[:2], "features_of": "x"}, "must have 3 rows, found 2"),
        ({"open_classes": said(embeddings[:1])}, "open_classes must have 3 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            Proposals(mask_probs_nhw=masks, **fields)
    with pytest.raises(ValueError, match=r"must be \(n, d\) and void_d"):
        OpenClasses(embeddings_nd=features, void_d=VOID, scale=1.0, templates=("a {}.",))


def test_a_class_that_was_never_trained_has_scores_by_its_text():
    texts = Texts()
    found = Proposals(
        mask_probs_nhw=np.ones((2, 2, 2), np.float32),
        trained_names=("red",),
        open_classes=said([[1, 0, 0], [0, 1, 1]], templates=("one {} only",)),
    )
    scores = trained_scores(found, NAMES, NamedTexts(texts, ("a {}.", "the {} thing")), 0.95)
    assert scores.seen.tolist() == [True, False, False]
    for row, embedding in enumerate(([1, 0, 0], [0, 1, 1])):
        *classes, void = slow_softmax(embedding, NAMES)
        np.testing.assert_allclose(scores.void_n[row], void, rtol=1e-5)
        np.testing.assert_allclose(
            scores.scores_nc[row], np.array(classes) / sum(classes), rtol=1e-5
        )
    assert ["one red only", "one green only", "one blue only"] in texts.asked
    nothing = Proposals(mask_probs_nhw=np.ones((1, 2, 2), np.float32))
    with pytest.raises(ValueError, match="gives no class probabilities"):
        trained_scores(nothing, NAMES, NamedTexts(texts, ("{}",)), 0.95)


def retclip(tmp_path, **config):
    return RetClipSegmenter(
        collection(tmp_path, {"red": 6, "green": 5, "blue": 4}), Regions(), Texts(),
        lambda images: [proposed(image) for image in images],
        RetClipConfig(**({"k": 3, "tau": 0.2} | config)),
    )  # fmt: skip


@pytest.mark.parametrize("fusion", ["arithmetic", "geometric"])
def test_retclip_fuses_three_scores_and_void(tmp_path, fusion):
    image = picture(LABELS, NAMES)
    it = retclip(tmp_path, fusion=fusion, alpha=0.4, beta=0.7)
    (found,) = it.score([image], NAMES)
    plain = RetClipSegmenter(
        it.collection, Regions(), Texts(), lambda images: [proposed(image).mask_probs_nhw > 0.5],
        it.config,
    )  # fmt: skip
    (open_scores,) = plain.score([image], NAMES)
    embeddings = proposed(image).open_classes.embeddings_nd
    for row in range(3):
        *classes, void = slow_softmax(embeddings[row], NAMES)
        own = [one / sum(classes) for one in classes]
        fused = []
        for label, weight in enumerate((0.4, 0.7, 0.7)):  # red alone was trained
            ours = float(open_scores.scores_nc[row, label])
            if fusion == "arithmetic":
                fused.append(weight * ours + (1 - weight) * own[label])
            else:
                fused.append(ours**weight * own[label] ** (1 - weight))
        total = sum(fused) if fusion == "geometric" else 1.0
        expected = [(1 - void) * one / total for one in fused]
        np.testing.assert_allclose(found.scores_nc[row], expected, rtol=1e-4)
        np.testing.assert_allclose(found.void_n[row], void, rtol=1e-5)
    (labels,) = it.segment([image], NAMES)
    np.testing.assert_array_equal(labels.labels_hw, LABELS)


def test_geometric_fusion_without_weights_and_with_zeros():
    ours, own = np.float32([[0.5, 0.5], [0.0, 0.0]]), np.float32([[0.9, 0.1], [0.4, 0.6]])
    found = geometric_ensemble(ours, own, np.array([True, True]), 0.0, 0.0)
    np.testing.assert_allclose(found, own)
    found = geometric_ensemble(ours, own, np.array([True, False]), 0.5, 1.0)
    a, b = math.sqrt(0.5 * 0.9), 0.5
    np.testing.assert_allclose(found[0], [a / (a + b), b / (a + b)], rtol=1e-6)
    assert not found[1].any()
    with pytest.raises(ValueError, match="fusion must be"):
        RetClipConfig(fusion="both")


def test_features_of_the_same_clip_are_not_made_again(tmp_path):
    image, it = picture(LABELS, NAMES), retclip(tmp_path)
    given = np.stack([unit(COLOURS[name]) for name in ("green", "blue", "red")])
    it.proposer = lambda images: [
        proposed(image, features_nd=given, features_of="colours", open_classes=None)
    ]
    (found,) = it.segment([image], NAMES)
    np.testing.assert_array_equal(found.labels_hw, np.array([1, 2, 0])[LABELS])
    assert it.visual.calls == []
    it.proposer = lambda images: [
        proposed(image, features_nd=given, features_of="another", open_classes=None)
    ]
    (found,) = it.segment([image], NAMES)
    np.testing.assert_array_equal(found.labels_hw, LABELS)
    assert len(it.visual.calls) == 1


def test_a_region_that_shows_no_class_more_probably_is_no_segment():
    masks = np.stack([LABELS == i for i in range(3)]).astype(np.float32)  # noqa: SIM300
    regions = ScoredRegions(
        mask_probs_nhw=masks,
        scores_nc=np.float32([[0.4, 0.1], [0.2, 0.3], [0.3, 0.3]]),
        void_n=np.float32([0.5, 0.2, 0.3]),
    )
    found = panoptic(regions, [True, True])
    assert found.labels == {1: 1, 2: 0}
    np.testing.assert_array_equal(found.ids_hw, np.array([0, 1, 2])[LABELS])


def test_vocseg_has_p_hat_of_every_class(tmp_path):
    """Eq. 4: to the power of 1 - beta, with void in the softmax, as in zsseg."""
    image = picture(LABELS, NAMES)
    opened = collection(tmp_path, {"red": 6, "green": 5, "blue": 4})

    def scores(proposer):
        config = VocSegConfig(tau=0.2, k=2, beta=0.7)
        it = VocSegSegmenter(opened, Regions(), Texts(), proposer, config)
        return it.score([image], NAMES)[0].scores_nc

    alone = scores(lambda images: [proposed(image).mask_probs_nhw > 0.5])
    found = scores(lambda images: [proposed(image)])
    for row, embedding in enumerate(proposed(image).open_classes.embeddings_nd):
        own = slow_softmax(embedding, NAMES)[:-1]
        np.testing.assert_allclose(
            found[row], [a**0.7 * b**0.3 for a, b in zip(alone[row], own, strict=True)], rtol=1e-4
        )
