"""Classes that `ovref segment` reports as having no references of their own."""

import numpy as np
import pytest
from PIL import Image

from ovref.exchange.class_lists import read_classes
from ovref_inference import Prototypes
from ovref_inference.collection.class_support import ClassSupport
from ovref_inference.segmenters.retclip import Labelled
from ovref_inference.segmenters.rns import Prepared
from ovref_pipelines import cli
from ovref_pipelines.verbs.segment import _borrowed

OWN = ClassSupport(source="own", nouns=("sky",), cosine=1.0)
LAWN = ClassSupport(source="borrowed", nouns=("grass",), cosine=0.912)
FAR = ClassSupport(source="none", nouns=("cup",), cosine=0.3)
PROTOTYPES = Prototypes(
    vectors_nkd=np.zeros((4, 1, 2)), counts=np.ones(4), nouns=((),) * 4,
    support=(OWN, LAWN, LAWN, FAR),
)  # fmt: skip


@pytest.mark.parametrize(
    "prepared",
    [
        PROTOTYPES,
        (PROTOTYPES, None),
        PROTOTYPES.support,
        Prepared(
            references=None,
            texts_cd=np.zeros((3, 2)),
            answered=np.arange(4) < 3,
            support=PROTOTYPES.support,
        ),
    ],
    ids=["fossil or vocseg", "freeda", "corrclip", "rns"],
)
def test_a_class_that_borrows_is_named_unless_a_synonym_has_references(prepared):
    found = _borrowed(prepared, read_classes("sky;heaven,lawn,xqvz"))
    assert found == {"lawn": "borrowed from grass at cosine 0.91"}


def test_a_class_that_retclip_classifies_by_text_alone_is_named():
    labelled = Labelled(
        class_of_noun=np.array([0]), extra_md=np.zeros((0, 2)), extra_classes=np.zeros(0),
        missing=("xqvz",), by_text=("lawn", "heaven"),
    )  # fmt: skip
    found = _borrowed(labelled, read_classes("sky;heaven,lawn,xqvz"))
    assert found == {"lawn": "by its text alone"}


@pytest.mark.parametrize("more", [[], ["--set", "weights={}"]])
def test_a_collection_in_place_of_trained_weights_is_said_to_be_one(
    tiny_build, tmp_path, capsys, more
):
    place = str(tiny_build / "collection")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    code = cli.main([
        "segment", place, str(tmp_path), "--classes", "sky,grass", "--output",
        str(tmp_path / "out"), "--method", "clip_rc", *(one.format(place) for one in more),
    ])  # fmt: skip
    error = capsys.readouterr().err
    assert code == 2 and f"{place} is a collection, but clip_rc segments with trained" in error
