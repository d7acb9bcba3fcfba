"""Segmenters with a partitioned collection give what they give with the undivided one."""

from dataclasses import replace

import numpy as np
import pytest
from colour_world import GREY, Regions, Texts, collection, picture, unit

from ovref_inference import ReferenceCollection
from ovref_inference.proposers.load import no_proposals
from ovref_inference.segmenters.corrclip import CorrClipConfig, CorrClipSegmenter
from ovref_inference.segmenters.retclip import RetClipConfig, RetClipSegmenter
from ovref_inference.segmenters.rns import RnsConfig, RnsSegmenter
from ovref_inference.segmenters.rns_head import RnsHeadConfig
from ovref_inference.segmenters.vocseg import VocSegConfig, VocSegSegmenter
from partitioned import divide

NAMES = ["red", "green", "blue", "yellow"]
LABELS = (
    np.array([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]).repeat(4, 0).repeat(4, 1)
)


class Dense:
    """Features are mean colours of 4 x 4 patches, around grey."""

    def encode(self, images):
        return [
            image.reshape(4, 4, 4, 4, 3).astype(np.float32).mean((1, 3)) - GREY for image in images
        ]


class Clip(Texts):
    """The whole image is its mean colour."""

    def encode_images(self, images):
        return np.stack([unit(image.reshape(-1, 3).mean(0)) for image in images])


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("colours")
    counts = {"red": 6, "crimson": 3, "green": 5, "blue": 4}
    whole = collection(folder / "whole", counts, noise=0.3)
    groups = [["blue", "crimson"], ["green"], ["red"]]
    divide(folder / "whole" / "collection", groups, folder / "divided", folder / "scratch")
    with ReferenceCollection.open(folder / "divided") as divided:
        for one in (whole, divided):  # as RNS takes it where both encoders are of one model
            one.manifest = replace(one.manifest, visual=one.manifest.textual)
        yield whole, divided
    whole.close()


def masks(images):
    return [np.stack([label == LABELS for label in range(4)]) for _ in images]


def retclip(of):
    return RetClipSegmenter(of, Regions(), Texts(), masks, RetClipConfig(k=4))


def vocseg(of):
    # With more prototypes the nouns would be rare, and borrow within their partitions.
    return VocSegSegmenter(of, Regions(), Texts(), masks, VocSegConfig(k=2))


def corrclip(of):
    regions = Regions()
    return CorrClipSegmenter(of, regions, regions, Texts(), masks, CorrClipConfig(k=4))


def rns(of):
    head = RnsHeadConfig(steps=40, learning_rate=0.05)
    return RnsSegmenter(of, Dense(), Clip(), no_proposals, RnsConfig(windows=None, head=head))


@pytest.mark.filterwarnings("ignore::UserWarning")  # of yellow, which has no references
@pytest.mark.parametrize("make", [retclip, vocseg, corrclip, rns])
def test_it_segments_equally(both, make):
    image_hwc = picture(LABELS, NAMES)
    whole, divided = (make(one).segment([image_hwc], [*NAMES, "crimson"])[0] for one in both)
    np.testing.assert_array_equal(divided.labels_hw, whole.labels_hw)
    np.testing.assert_allclose(divided.max_score_hw, whole.max_score_hw, atol=5e-3)
    assert divided.missing == whole.missing
