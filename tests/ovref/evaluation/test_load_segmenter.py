"""A segmenter from a collection alone."""

import numpy as np
import pytest

import ovref_inference
from ovref.evaluation.cached import CachedModels
from ovref.evaluation.methods import Methods, Row
from ovref.evaluation.spec import EvaluateSpec
from ovref_inference.proposers.config import ProposerConfig
from ovref_inference.proposers.load import no_proposals
from ovref_inference.segmenters.fossil import FossilConfig
from ovref_inference.segmenters.freeda import FreedaConfig
from ovref_inference.segmenters.rns import RnsConfig
from paper_tables.datasets import miniature_scenes


@pytest.fixture(scope="module")
def data():
    return miniature_scenes("validation", 3)


def test_first_use_is_three_lines(collection_url, data):
    segmenter = ovref_inference.load_segmenter(collection_url, device="cpu")
    found = segmenter.segment(data.images, ["tree", "grass", "sky"])
    assert [one.labels_hw.shape for one in found] == [image.shape[:2] for image in data.images]
    assert segmenter.config.windows.crop == 64 and segmenter.config.n < 150
    segmenter.collection.close()


@pytest.mark.parametrize("method", ["freeda", "vocseg", "retclip", "corrclip", "rns"])
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


@pytest.mark.parametrize("method", ["freeda", "vocseg", "retclip", "corrclip", "rns"])
def test_a_row_of_an_evaluation_is_of_the_segmenter_that_it_names(
    collection_url, clip_collections, method
):
    """As an image, and by its segments where a segmenter scores regions."""
    urls = clip_collections | {"own": collection_url}
    url = urls[{"freeda": "own", "vocseg": "crop_binary"}.get(method, "values")]
    config = {"freeda": FreedaConfig(n=20, windows=None), "rns": RnsConfig(windows=None)}.get(
        method
    )
    settings = {method: config} if config else {}
    spec = EvaluateSpec(
        collection=url, output="", split="validation", scenes=1, rows=(method,), **settings
    )
    data = spec.open_data()
    (example,) = data
    with CachedModels(device="cpu") as models:
        methods = Methods(spec, data, models)
        methods.encode_batch([example])
        row = Row(name=method)
        found = methods.predict(row, example.image_hwc, segments=True)
        (own,) = methods.segmenter(row).segment([example.image_hwc], data.class_names)
        np.testing.assert_array_equal(found.labels_hw, own.labels_hw)
        loaded = ovref_inference.load_segmenter(
            url, method, device="cpu", config=getattr(spec, method),
            proposer=None if method == "freeda" else models.proposer(
                ProposerConfig(opencut=spec.opencut)
            ),
        )  # fmt: skip
        (other,) = loaded.segment([example.image_hwc], data.class_names)
        np.testing.assert_array_equal(found.labels_hw, other.labels_hw)
        if method == "retclip":
            (expected,) = loaded.segment_panoptic(
                [example.image_hwc], data.class_names, data.things
            )
            np.testing.assert_array_equal(found.panoptic.ids_hw, expected.ids_hw)
            assert found.panoptic.labels == expected.labels and found.scores == expected.scores
        loaded.collection.close()
