"""The parts of the tables give what the segmenters give that people use."""

from dataclasses import replace

import numpy as np
import pytest

from ovref_inference.collection.reference_collection import ReferenceCollection
from ovref_inference.encoders.load import load_region_encoder, load_text_encoder
from ovref_inference.proposers.load import no_proposals
from ovref_inference.proposers.proposals import Proposals
from ovref_inference.segmenters.fossil import FossilConfig, FossilSegmenter, TextOnlySegmenter
from ovref_inference.segmenters.freeda import FreedaConfig
from ovref_inference.segmenters.retclip import RetClipConfig, RetClipSegmenter
from ovref_inference.segmenters.vocseg import VocSegConfig
from paper_tables.datasets import miniature_scenes
from paper_tables.parts import Parts, truth_proposer
from paper_tables.predictions import single_metric
from paper_tables.spec import TablesSpec

FOSSIL = FossilConfig(n=6, k=2, windows=None)


@pytest.fixture(scope="module")
def data():
    return miniature_scenes("validation", 4)


@pytest.fixture(scope="module")
def parts(table_collections, data):
    spec = TablesSpec(output="", collections=table_collections)
    with Parts(spec, [data], device="cpu") as parts:
        yield parts


def test_fossil_is_the_segmenter(parts, data, collection_url, embed):
    with ReferenceCollection.open(collection_url) as collection:
        segmenter = FossilSegmenter(
            collection,
            load_region_encoder(embed.visual),
            load_text_encoder(embed.text),
            no_proposals,
            FOSSIL,
        )
        expected = segmenter.segment(data.images, data.classes)
    for found, one in zip(parts.fossil(data, FOSSIL, "none"), expected, strict=True):
        np.testing.assert_array_equal(found.labels_hw, one.labels_hw)


def test_retclip_is_the_segmenter_with_its_instances(parts, data, clip_collections, embed):
    config = RetClipConfig(gamma=0.5, k=5)
    plain = parts.retclip(data, config, "truth")
    # The smallest score that counts is the configuration's: here half of all segments go.
    middle = float(np.median([score for one in plain for score in one.scores.values()]))
    config = replace(config, min_score=middle + 1e-6)
    with ReferenceCollection.open(clip_collections["values"]) as collection:
        segmenter = RetClipSegmenter(
            collection,
            load_region_encoder(collection.visual_config),
            load_text_encoder(embed.text),
            truth_proposer([data]),
            config,
        )
        maps = segmenter.segment(data.images, data.classes)
        segments = segmenter.segment_panoptic(data.images, data.classes, data.things)
    found = parts.retclip(data, config, "truth")
    for prediction, labels, panoptic in zip(found, maps, segments, strict=True):
        np.testing.assert_array_equal(prediction.labels_hw, labels.labels_hw)
        np.testing.assert_array_equal(prediction.panoptic.ids_hw, panoptic.ids_hw)
        assert prediction.panoptic.labels == panoptic.labels
        assert prediction.scores == panoptic.scores
    few, many = (sum(len(one.scores) for one in some) for some in (found, plain))
    assert 0 < few < many


def test_text_alone_has_the_templates_of_the_collection(parts, data, embed, monkeypatch):
    collection, templates = parts.named("fossil"), ("a drawing of nothing but a {}",)
    manifest = replace(collection.manifest, templates=templates)
    monkeypatch.setattr(collection, "manifest", manifest)
    text, dense = load_text_encoder(embed.text), load_region_encoder(parts.spec.clip)
    own, usual = (
        TextOnlySegmenter(dense, text, no_proposals, windows=None, **options)
        for options in ({"templates": templates}, {})
    )
    expected, other = (some.segment(data.images, data.classes) for some in (own, usual))
    differ = []
    for found, one, another in zip(parts.text_only(data, "none"), expected, other, strict=True):
        np.testing.assert_array_equal(found.labels_hw, one.labels_hw)
        differ.append((one.labels_hw != another.labels_hw).any())
    assert any(differ)


def test_true_masks_are_the_true_segments(parts, data):
    found = parts.named_proposals("truth")(data.images)
    for masks, truth in zip(found, data.panoptic, strict=True):
        assert len(masks) == len(truth.labels) and (masks.sum(0) == 1).all()
        np.testing.assert_array_equal(masks.argmax(0) + 1, truth.ids_hw)


def test_every_segmenter_knows_more_than_chance(parts, data):
    """In PQ with true masks (FreeDA: its superpixels), of which guessing gets 1 in 27."""
    found = {
        "fossil": parts.fossil(data, FOSSIL, "truth"),
        "text": parts.text_only(data, "truth"),
        "vocseg": parts.vocseg(data, VocSegConfig(k=3), "truth"),
        "vocseg none": parts.vocseg(data, VocSegConfig(k=3), "truth", "none"),
        "retclip": parts.retclip(data, RetClipConfig(), "truth"),
        "corrclip": parts.corrclip(data, parts.spec.segmenters.corrclip, "truth"),
        "freeda": parts.freeda(data, FreedaConfig(n=6, windows=None)),
    }
    scores = {name: single_metric(data, predictions, "pq") for name, predictions in found.items()}
    assert min(scores.values()) > 2 / 27, scores


def test_models_are_loaded_and_asked_once(parts, data):
    config = parts.named("fossil").visual_config
    assert parts.encoder(config) is parts.encoder(config)
    assert parts.named_proposals("opencut") is parts.named_proposals("opencut")
    first = parts.named_proposals("opencut")(data.images)
    assert parts.named_proposals("opencut")(data.images)[0] is first[0]


@pytest.mark.parametrize("name", ["trained", "sam_grid", "grounded_sam"])
def test_trained_proposers_cover_the_true_segments(parts, data, name):
    """The best proposal of each true segment; nothing at all would have 0."""
    best = []
    for found, truth in zip(parts.named_proposals(name)(data.images), data.panoptic, strict=True):
        masks = found.masks(0.5) if isinstance(found, Proposals) else found
        for segment in truth.labels:
            true_hw = truth.ids_hw == segment
            best.append(max(((m & true_hw).sum() / (m | true_hw).sum() for m in masks), default=0))
    assert np.mean(best) > 0.3
