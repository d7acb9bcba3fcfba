"""CorrCLIPv2's region queries against a slow loop, and end to end on a world of colours."""

import math

import numpy as np
import pytest
from colour_world import COLOURS, Regions, Texts, collection, picture, unit

from ovref_inference.collection.support import Support
from ovref_inference.segmenters.corrclip import (
    CorrClipConfig,
    CorrClipSegmenter,
    support_embeddings,
)
from ovref_inference.segmenters.regions import NO_CLASS

NAMES = ["red", "green", "blue"]
LABELS = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 2, 2], [2, 2, 2, 2]])
COUNTS = {"red": 6, "green": 5, "blue": 4}


def masks_of(label_hw):
    return np.stack([label_hw == i for i in range(3)])


class Blind(Regions):
    """Sees the same in every region: of itself it says nothing."""

    def encode_regions(self, images, masks, heatmaps=None):
        self.calls.append(len(images))
        return [(np.ones((len(m), 3), np.float32), np.ones(len(m), bool)) for m in masks]


def segmenter(tmp_path, clip=None, counts=COUNTS, proposer=None, **config):
    keys = Regions()
    return CorrClipSegmenter(
        collection(tmp_path, counts),
        keys,
        clip or keys,
        Texts(),
        proposer or (lambda images: [masks_of(LABELS) for _ in images]),
        CorrClipConfig(**config),
    )


@pytest.mark.parametrize("support", [0.0, 0.5, 1.0])
def test_it_finds_the_colours_and_encodes_regions_once(tmp_path, support):
    it = segmenter(tmp_path, support=support, k=3)
    (found,) = it.segment([picture(LABELS, NAMES)], NAMES[::-1])
    np.testing.assert_array_equal(found.labels_hw, 2 - LABELS)
    assert len(it.keys.calls) == 1


def test_what_regions_find_speaks_where_they_themselves_say_nothing(tmp_path):
    clip = Blind()
    it = segmenter(tmp_path, clip=clip, k=3)
    (found,) = it.segment([picture(LABELS, NAMES)], NAMES)
    np.testing.assert_array_equal(found.labels_hw, LABELS)
    assert clip.calls == [1]


def test_whole_against_a_comparison_with_every_reference(tmp_path):
    rng = np.random.default_rng(5)
    image = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    masks = rng.random((4, 4, 4)) < 0.4
    it = segmenter(tmp_path, proposer=lambda images: [masks], k=7, support=0.3, tau=0.2, rest=False)
    (found,) = it.score([image], NAMES)
    for i in range(4):
        region = unit(image[masks[i]].astype(float).mean(0))
        cosines = [float(np.dot(region, v.astype(np.float32))) for v in it.collection.visual]
        nearest = sorted(range(len(cosines)), key=lambda r: (-cosines[r], r))[:7]
        value = np.mean([it.collection.textual[r].astype(np.float32) for r in nearest], axis=0)
        value /= np.linalg.norm(value)
        scores = [
            0.7 * float(region @ unit(COLOURS[name])) + 0.3 * float(value @ unit(COLOURS[name]))
            for name in NAMES
        ]
        powers = [math.exp(score / 0.2) for score in scores]
        np.testing.assert_allclose(
            found.scores_nc[i], [power / sum(powers) for power in powers], rtol=2e-3
        )


def test_fewer_references_than_asked_for_and_none_at_all(tmp_path):
    it = segmenter(tmp_path, counts={"green": 1})
    (found,) = it.segment([picture(LABELS, NAMES)], ["green"])
    assert (found.labels_hw == 0).all()
    support = it.collection.search_regions(unit([[20, 250, 20]]), 3)
    assert support.ids.tolist() == [[0]]
    np.testing.assert_allclose(support_embeddings(support), [unit((20, 250, 20))], atol=1e-3)
    nothing = Support(
        ids=np.array([[-1]]), scores=np.float32([[-np.inf]]), collection=it.collection
    )
    with pytest.raises(ValueError, match="found nothing for 1 regions"):
        support_embeddings(nothing)


def test_below_the_threshold_is_background(tmp_path):
    image = picture(LABELS, NAMES)
    it = segmenter(tmp_path, background=0.9, k=3, tau=1.0)
    (found,) = it.segment([image], NAMES)
    assert (found.labels_hw == NO_CLASS).all()
    sure = segmenter(tmp_path / "b", background=0.9, k=3, tau=0.05)
    (found,) = sure.segment([image], NAMES)
    np.testing.assert_array_equal(found.labels_hw, LABELS)


def test_a_class_without_support_is_missing_and_gets_no_pixel(tmp_path):
    it = segmenter(tmp_path, k=3)
    with pytest.warns(UserWarning, match="no references for pipette"):
        (found,) = it.segment([picture(LABELS, NAMES)], ["pipette", *NAMES])
    assert found.missing == ("pipette",) and not found.scores_chw[0].any()
    np.testing.assert_array_equal(found.labels_hw, LABELS + 1)


def test_no_proposals_and_no_images(tmp_path):
    none = np.zeros((0, 4, 4), bool)
    it = segmenter(tmp_path, proposer=lambda images: [none for _ in images], rest=False)
    (found,) = it.segment([picture(LABELS, NAMES)], NAMES)
    assert (found.labels_hw == NO_CLASS).all()
    assert it.segment([], NAMES) == []


def test_regions_and_texts_in_two_spaces_are_refused(tmp_path):
    class Wide(Regions):
        def encode_regions(self, images, masks, heatmaps=None):
            return [(np.ones((len(m), 5), np.float32), np.ones(len(m), bool)) for m in masks]

    with pytest.raises(ValueError, match="regions of width 5"):
        segmenter(tmp_path, clip=Wide()).segment([picture(LABELS, NAMES)], NAMES)


@pytest.mark.parametrize("settings", [{"k": 0}, {"support": 1.5}, {"tau": 0.0}])
def test_parameters_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        CorrClipConfig(**settings)
