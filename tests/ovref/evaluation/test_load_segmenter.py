"""A segmenter from a collection alone."""

import numpy as np
import pytest

import ovref_inference
from ovref.evaluation.datasets import miniature_scenes
from ovref_inference.proposers.load import no_proposals
from ovref_inference.segmenters.fossil import FossilConfig
from ovref_inference.segmenters.freeda import FreedaConfig


@pytest.fixture(scope="module")
def data():
    return miniature_scenes("validation", 3)


def test_first_use_is_three_lines(collection_url, data):
    segmenter = ovref_inference.load_segmenter(collection_url, device="cpu")
    found = segmenter.segment(data.images, ["tree", "grass", "sky"])
    assert [one.labels_hw.shape for one in found] == [image.shape[:2] for image in data.images]
    assert segmenter.config.windows.crop == 64 and segmenter.config.n < 150
    segmenter.collection.close()


@pytest.mark.parametrize("method", ["freeda", "vocseg", "retclip", "corrclip"])
def test_every_method(collection_url, clip_collections, data, method):
    urls = clip_collections | {"own": collection_url}
    url = urls[{"freeda": "own", "vocseg": "crop_binary"}.get(method, "values")]
    segmenter = ovref_inference.load_segmenter(
        url, method, proposer=no_proposals if method == "vocseg" else None, device="cpu"
    )
    (found,) = segmenter.segment(data.images[:1], data.classes)
    assert found.labels_hw.shape == data.images[0].shape[:2]
    segmenter.collection.close()


def test_region_queries_of_a_collection_that_is_not_of_clip_take_clip_besides(collection_url, data):
    segmenter = ovref_inference.load_segmenter(
        collection_url, "corrclip", proposer=no_proposals, device="cpu"
    )
    (found,) = segmenter.segment(data.images[:1], data.classes)
    assert segmenter.clip is not segmenter.keys and segmenter.clip.dim == 64
    assert found.labels_hw.min() >= 0
    segmenter.collection.close()


def test_settings_that_are_given_stay(collection_url, data):
    config = FossilConfig(n=3, k=1, windows=None)
    with ovref_inference.ReferenceCollection.open(collection_url) as collection:
        segmenter = ovref_inference.load_segmenter(
            collection, proposer=no_proposals, config=config, device="cpu"
        )
        assert segmenter.config is config and segmenter.collection is collection
        ovref_inference.load_segmenter(collection, "freeda", config=FreedaConfig(), device="cpu")


def test_what_cannot_be_made_is_refused(collection_url, clip_collections):
    for url, method, message in (
        (collection_url, "sam", "method must be one of fossil, freeda"),
        (clip_collections["crop_binary"], "vocseg", "is of masked crops.*give a proposer"),
    ):
        with pytest.raises(ValueError, match=message):
            ovref_inference.load_segmenter(url, method, device="cpu")


def test_strange_classes_get_no_pixel(collection_url, data):
    segmenter = ovref_inference.load_segmenter(collection_url, proposer=no_proposals, device="cpu")
    with pytest.warns(UserWarning, match="no references for MRI scanner"):
        found = segmenter.segment(data.images, ["MRI scanner", "sky", "Katze", "pipette"])
    for one in found:
        assert one.missing == ("MRI scanner", "Katze", "pipette")
        assert np.unique(one.labels_hw).tolist() == [1]
    segmenter.collection.close()
