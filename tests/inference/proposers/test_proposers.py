"""Proposers with models: masks are disjoint, have the images' sizes, and come from the models."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ovref_inference.encoders.config import VisualEncoderConfig
from ovref_inference.proposers.config import (
    CrfConfig,
    GroundedSamConfig,
    GroundingDinoConfig,
    MaskFormerConfig,
    OpenCutProposerConfig,
    ProposerConfig,
    SamConfig,
    SamGridConfig,
)
from ovref_inference.proposers.crf import cut_to_edges
from ovref_inference.proposers.load import (
    grounded_sam_proposals,
    grounded_sam_proposer,
    load_proposer,
    mask_former_proposer,
    opencut_proposer,
    sam_grid_proposer,
    without_overlap,
)
from ovref_inference.proposers.opencut import OpenCutConfig, raw_cuts, refine
from ovref_inference.proposers.proposals import Proposals

RNG = np.random.default_rng(0)
IMAGES = [RNG.integers(0, 256, (*hw, 3), dtype=np.uint8) for hw in ((6, 7), (5, 4))]


def owner_of(masks_nhw, scores_n, y, x):
    """Which mask a pixel goes to, by looking at all of them."""
    having = [n for n in range(len(masks_nhw)) if masks_nhw[n, y, x]]
    return max(having, key=lambda n: (scores_n[n], -n), default=None)


def test_overlaps_go_to_the_higher_score():
    for count in (1, 3, 8):
        masks = RNG.random((count, 6, 7)) < 0.4
        scores = RNG.integers(0, 4, count).astype(np.float32)
        left = without_overlap(masks, scores)
        assert left.sum(0).max() <= 1
        np.testing.assert_array_equal(left.any(0), masks.any(0))
        order = sorted(range(count), key=lambda n: (-scores[n], n))
        owners = [[owner_of(masks, scores, y, x) for x in range(7)] for y in range(6)]
        expected = [np.array(owners) == n for n in order]
        np.testing.assert_array_equal(left, [mask for mask in expected if mask.any()])


def test_no_masks_and_empty_ones():
    assert without_overlap(np.zeros((0, 3, 4), bool), np.zeros(0)).shape == (0, 3, 4)
    assert without_overlap(np.zeros((2, 3, 4), bool), np.zeros(2)).shape == (0, 3, 4)
    twice = without_overlap(np.ones((2, 3, 4), bool), np.array([0.1, 0.2]))
    assert twice.shape == (1, 3, 4), "what is wholly covered is left out"


def overlapping(size_hw):
    masks = np.zeros((2, *size_hw), dtype=bool)
    masks[0, :, :3], masks[1, :3] = True, True
    return masks, np.array([0.5, 0.75], np.float32)


def test_the_grid_of_sam():
    sam = SimpleNamespace(
        of_grid=lambda images, config: (overlapping(image.shape[:2]) for image in images)
    )
    for image, masks in zip(IMAGES, sam_grid_proposer(sam, GRID)(IMAGES), strict=True):
        (second, first), _ = overlapping(image.shape[:2])
        np.testing.assert_array_equal(masks, [first, second & ~first])

    whole = sam_grid_proposer(sam, replace(GRID, exclusive=False))(IMAGES)
    np.testing.assert_array_equal(whole[0], overlapping((6, 7))[0])


def test_boxes_and_sam_from_class_names():
    asked = []

    def find(images, nouns):
        asked.append(nouns)
        for image in images:
            masks, scores = overlapping(image.shape[:2])
            yield SimpleNamespace(masks_nhw=masks, detections=SimpleNamespace(scores=scores))

    propose = grounded_sam_proposer(SimpleNamespace(find=find), ["cat", "dog"])
    for image, masks in zip(IMAGES, propose(IMAGES), strict=True):
        (second, first), _ = overlapping(image.shape[:2])
        np.testing.assert_array_equal(masks, [first, second & ~first])
    assert asked == [[["cat", "dog"]] * 2]


@pytest.mark.parametrize("exclusive", [True, False])
def test_proposals_of_class_names_say_what_was_found_and_may_overlap(exclusive):
    def find(images, nouns):
        for image in images:
            masks, scores = overlapping(image.shape[:2])
            detections = SimpleNamespace(scores=scores, nouns=np.array([2, 2]))
            yield SimpleNamespace(masks_nhw=masks, detections=detections)

    config = GroundedSamConfig(
        detector=GroundingDinoConfig(model="none"), sam=SamConfig(model="none"), exclusive=exclusive
    )
    names = ["cat", "dog", "bird"]
    propose = grounded_sam_proposals(SimpleNamespace(find=find), names, config)
    for image, found in zip(IMAGES, propose(IMAGES), strict=True):
        (second, first), _ = overlapping(image.shape[:2])
        expected = [first, second & ~first] if exclusive else [second, first]
        np.testing.assert_array_equal(found.masks(0.5), expected)
        assert found.found_names == ("bird",)
    with pytest.raises(ValueError, match="needs class names"):
        load_proposer(ProposerConfig(grounded_sam=config))


def test_mask_former():
    def propose(images):
        for image in images:
            masks, _ = overlapping(image.shape[:2])
            yield Proposals(
                mask_probs_nhw=masks[::-1] * np.float32(0.9),
                class_probs_nc=np.array([[0.9, 0.1], [0.8, 0.2]], np.float32),
                trained_names=("thing",),
            )

    every = MaskFormerConfig(model="none", min_kept=0.0)
    masks = mask_former_proposer(SimpleNamespace(propose=propose), every)(IMAGES)
    (second, first), _ = overlapping((6, 7))
    np.testing.assert_array_equal(masks[0], [first, second & ~first])
    every = MaskFormerConfig(model="none", exclusive=False)
    masks = mask_former_proposer(SimpleNamespace(propose=propose), every)(IMAGES)
    np.testing.assert_array_equal(masks[0], [first, second])


def test_opencut_with_a_field_at_each_cut_refines_pixels():
    rng = np.random.default_rng(0)
    image = np.where(np.arange(32) < 13, 60, 160)[None, :, None] + rng.integers(0, 9, (24, 32, 3))
    image = image.astype(np.uint8)
    keys = image[::4, ::4].astype(np.float32) - 110
    encoder = SimpleNamespace(encode=lambda images: np.stack([keys for _ in images]))
    config = OpenCutConfig(taus=(0.5,), stages=2, eta=0)
    crf = CrfConfig(appearance_distance=100.0, appearance_colour=10.0, smoothness_weight=0.0)
    (found,) = opencut_proposer(encoder, config, crf=crf, crf_at="cuts", device="cpu")([image])
    cuts = raw_cuts(torch.from_numpy(keys)[None], config)[0]
    np.testing.assert_array_equal(found, refine(cut_to_edges(cuts, image, crf), config))
    # The edge at column 13, which lies within a patch.
    assert found.shape == (1, 24, 32)
    assert (found[0] == (np.arange(32) < 13)).all() or (found[0] == (np.arange(32) >= 13)).all()


OPENCUT = OpenCutProposerConfig(
    keys=VisualEncoderConfig(model="miniature:dinov2", size_hw=(64, 64)),
    cut=OpenCutConfig(taus=(0.75,), stages=2),
)
MASK_FORMER = MaskFormerConfig(model="miniature:maskformer")
GRID = SamGridConfig(
    sam=SamConfig(model="miniature:sam"),
    points_per_side=4,
    min_predicted_iou=0.5,
    min_stability=0.5,
)


@pytest.mark.parametrize(
    "config",
    [{"opencut": OPENCUT}, {"sam_grid": GRID}, {"mask_former": MASK_FORMER}],
    ids=lambda config: next(iter(config)),
)
def test_the_miniatures_models_load_and_propose(config):
    from ovref.miniature.scenes import render

    images = [render(seed, "test").image_hwc for seed in range(2)]
    for image, masks in zip(
        images, load_proposer(ProposerConfig(**config), device="cpu")(images), strict=True
    ):
        assert masks.dtype == bool and masks.shape[1:] == image.shape[:2]
        assert len(masks) > 0 and masks.any((1, 2)).all() and masks.sum(0).max() <= 1
