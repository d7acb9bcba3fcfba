"""Verbs on a collection whose textual embeddings are in their index alone, compared with the same
collection that has a file of them."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from array_fakes import EMBED, FakeTexts
from ovref.exchange.own_arrays import OwnArrays, collection_from_arrays
from ovref.reduce import ReduceSpec
from ovref_inference.collection import format as fmt
from ovref_inference.collection import store
from ovref_pipelines.explore.library import Library
from ovref_pipelines.verbs.status import place_text
from ovref_pipelines.verbs.verify import verify

NOUNS = ["cat", "dog", "elk", "fox"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The collection with the file and the one without."""
    folder = tmp_path_factory.mktemp("in_index")
    visual = np.random.default_rng(0).standard_normal((40, 8))
    captions = [f"{noun} number {number}" for number, noun in enumerate(NOUNS * 10)]
    arrays = OwnArrays(visual=visual, nouns=NOUNS * 10, captions=captions)
    made = {"whole": "stored", "without": "in_index"}
    for name, kind in made.items():
        spec = ReduceSpec(textual_embeddings=kind)
        collection_from_arrays(str(folder / name), arrays, EMBED, texts=FakeTexts(), spec=spec)
    assert not list((folder / "without").glob("textual*.npy"))
    return [str(folder / name) for name in made]


def test_verify_and_status(places, tmp_path):
    assert verify(places[1]) == []
    assert "40 references" in place_text(places[1])
    damaged = Path(shutil.copytree(places[1], tmp_path / "damaged"))
    path = damaged / fmt.FILES["textual_index"]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # a bit of the last embedding
    path.write_bytes(content)
    (problem,) = verify(str(damaged))
    assert "textual.faiss does not have the checksum" in problem
    path.unlink()
    (problem,) = verify(str(damaged))
    assert "textual.faiss" in problem and "missing" in problem


def test_the_explorer_shows_the_same(places):
    whole, without = map(Library, places)
    assert without.nouns("", "count", 0, 9) == whole.nouns("", "count", 0, 9)
    pages = [one.noun("dog", "suspicious", 0, 30) for one in (whole, without)]
    assert pages[0] == pages[1]
    number = pages[0]["references"][0]["id"]
    assert without.reference(number) == whole.reference(number)
    assert without.prototypes("fox") == whole.prototypes("fox")
    store.tombstone(places[1], [number], "wrong")
    without.reopen()
    assert without.about()["counts"]["tombstones"] == 1
    store.untombstone(places[1], [number])
