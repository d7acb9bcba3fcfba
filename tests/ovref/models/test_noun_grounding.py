"""The two routes: boxes turned into findings, and nouns matched to proposals."""

from types import SimpleNamespace

import numpy as np
import pytest

from ovref.models.noun_grounding import Matcher, ProposalRoute, _boxes_found
from ovref_inference.encoders.config import TextEncoderConfig, VisualEncoderConfig
from ovref_inference.encoders.pooling import pool_each
from ovref_inference.proposers.config import MaskFormerConfig, ProposerConfig

COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1)}


class Texts:
    """A text is the colour that it names."""

    def __init__(self):
        self.asked = []

    def encode(self, texts):
        self.asked += texts
        return np.array([next(v for n, v in COLOURS.items() if n in t) for t in texts], np.float32)


class Regions:
    """A region is its mean colour."""

    def __init__(self):
        self.heatmaps = []

    def encode_regions(self, images, masks, heatmaps=None):
        self.heatmaps.append(heatmaps)
        return [
            pool_each(image.astype(np.float32) / 255, some)
            for image, some in zip(images, masks, strict=True)
        ]


def route(min_similarity=-1.0):
    return ProposalRoute(
        proposer=ProposerConfig(mask_former=MaskFormerConfig(model="m")),
        visual=VisualEncoderConfig(model="m", library="open_clip", features="values"),
        text=TextEncoderConfig(model="m"),
        templates=("a {} thing",),
        min_similarity=min_similarity,
    )


def stripes(*names):
    """An image of vertical stripes and a mask for each."""
    image_hwc = np.zeros((4, 2 * len(names), 3), np.uint8)
    masks_nhw = np.zeros((len(names), 4, 2 * len(names)), dtype=bool)
    for number, name in enumerate(names):
        part = slice(2 * number, 2 * number + 2)
        image_hwc[:, part] = 255 * np.array(COLOURS.get(name, (0, 0, 0)))
        masks_nhw[number, :, part] = True
    return image_hwc, masks_nhw


def match(pictures, nouns, heatmaps=None, **changes):
    visual, texts = Regions(), Texts()
    soft = heatmaps or [None] * len(pictures)
    matcher = Matcher(
        lambda images: iter(zip([masks for _, masks in pictures], soft, strict=True)),
        visual,
        texts,
        route(**changes),
    )
    return list(matcher([image for image, _ in pictures], nouns)), visual, texts


def test_each_noun_gets_the_mask_that_is_most_similar():
    pictures = [stripes("blue", "red", "green"), stripes("green", "blue")]
    (first, second), _, texts = match(pictures, [["red", "green"], ["red blue", "green"]])
    for found, masks, expected in ((first, pictures[0][1], (1, 2)), (second, pictures[1][1], None)):
        assert [answer.noun for answer in found] == [0, 1]
        if expected:
            for answer, number in zip(found, expected, strict=True):
                np.testing.assert_array_equal(answer.mask_hw, masks[number])
                assert answer.score == pytest.approx(1.0)
    # Nothing there is red: as in the paper, the noun gets the best of what there is.
    assert second[0].score == pytest.approx(0.0)
    assert texts.asked == ["a red thing", "a green thing", "a red blue thing"], "each noun once"


def test_a_noun_without_a_similar_mask_is_left_out():
    found = match([stripes("green", "blue")], [["red", "green"]], min_similarity=0.5)[0][0]
    assert [answer.noun for answer in found] == [1]


def test_no_proposals_empty_ones_and_those_without_direction():
    image, masks = stripes("red", "black", "green")
    masks[0] = False
    nothing = (image, masks[:0])
    found = match([nothing, (image, masks)], [["red"], ["red", "green"]])[0]
    assert found[0] == []
    for answer in found[1]:
        np.testing.assert_array_equal(answer.mask_hw, masks[2])


def test_heatmaps_go_to_the_encoder_and_with_their_masks():
    image, masks = stripes("blue", "red")
    soft = np.stack([np.full(masks.shape[1:], value, np.float32) for value in (0.25, 0.75)])
    (found,), visual, _ = match([(image, masks)], [["red"]], heatmaps=[soft])
    assert (found[0].heatmap_hw == 0.75).all()
    assert visual.heatmaps[0][0] is soft
    (found,), visual, _ = match([(image, masks)], [["red"]])
    assert found[0].heatmap_hw is None and visual.heatmaps == [None]


def test_boxes_become_findings_with_both_scores():
    masks = np.zeros((2, 3, 4), dtype=bool)
    masks[0, 0] = True
    grounded = SimpleNamespace(
        detections=SimpleNamespace(
            boxes_xyxy=np.array([[0, 0, 4, 1.006], [1, 1, 2, 2]], np.float32),
            nouns=np.array([1, 0]),
            scores=np.array([0.75, 0.5], np.float32),
        ),
        masks_nhw=masks,
        predicted_iou=np.array([0.875, 1.02], np.float32),
    )
    first, second = _boxes_found(grounded)
    assert (first.noun, first.score) == (1, 0.75) and (second.noun, second.score) == (0, 0.5)
    np.testing.assert_array_equal(first.mask_hw, masks[0])
    assert first.facts == {"box_xyxy": [0.0, 0.0, 4.0, 1.01], "predicted_iou": 0.875}
    assert second.facts == {"box_xyxy": [1.0, 1.0, 2.0, 2.0], "predicted_iou": 1.02}
