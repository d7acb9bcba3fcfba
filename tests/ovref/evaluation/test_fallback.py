"""RetCLIP's fallback: references of classes that the evaluated collection lacks."""

import shutil
from dataclasses import replace

import pytest

from ovref.errors import InputError, MismatchError
from ovref.evaluation.evaluate import evaluate
from ovref.evaluation.report import markdown
from ovref.evaluation.spec import EvaluateSpec
from ovref_inference.collection import store
from ovref_inference.collection.reference_collection import ReferenceCollection
from ovref_inference.segmenters.retclip import RetClipConfig


@pytest.fixture(scope="module")
def without_sky(clip_collections, tmp_path_factory):
    """A collection whose references of the sky are all deleted."""
    place = str(tmp_path_factory.mktemp("own") / "collection")
    shutil.copytree(clip_collections["values"], place)
    with ReferenceCollection.open(place) as collection:
        ids = collection.ids_of(nouns=["sky"])
    assert len(ids) > 5
    store.tombstone(place, [int(one) for one in ids], "a test")
    return place


def test_missing_classes_take_the_references_of_the_fallback(
    without_sky, clip_collections, collection_url, tmp_path
):
    spec = EvaluateSpec(
        collection=without_sky, output=str(tmp_path / "without"), split="validation", scenes=4,
        rows=("retclip_oracle",), retclip=RetClipConfig(gamma=1.0), pictures=0,
    )  # fmt: skip

    def run(changed):
        found = evaluate(changed, lambda line: None, device="cpu")
        (sky,) = [row for row in found["per_class"] if row["class"] == "sky"]
        return found, sky

    found, sky = run(spec)
    assert sky["iou"] == 0 and sky["references"] == 0 and sky["pixels"] > 0
    assert "fallback" not in found["collection"] and "fallback" not in markdown(found)
    fallback = replace(spec, fallback=clip_collections["values"], output=str(tmp_path / "with"))
    found, sky = run(fallback)
    whole, expected = run(
        replace(spec, collection=fallback.fallback, output=str(tmp_path / "whole"))
    )
    assert sky["iou"] > 0.5 and sky["references"] == expected["references"] > 0
    assert found["collection"]["fallback_references"] == whole["collection"]["references"]
    assert f"and {whole['collection']['references']} of the fallback" in markdown(found)
    # The counts are those of the two collections.
    with pytest.raises(MismatchError, match="fallback"):
        run(replace(fallback, fallback=""))
    with pytest.raises(InputError, match=r"fallback: .* built with different visual settings"):
        run(replace(fallback, fallback=collection_url, output=str(tmp_path / "other")))
    with pytest.raises(ValueError, match="fallback is for the rows retclip and retclip_oracle"):
        replace(fallback, rows=("text_only",))
