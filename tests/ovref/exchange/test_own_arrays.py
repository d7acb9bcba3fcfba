"""Collections from arrays: what comes out is what went in, and can be searched."""

import sys
from importlib.util import find_spec

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import ovref
from array_fakes import EMBED, FakeTexts
from ovref.errors import InputError
from ovref.exchange.own_arrays import OwnArrays, collection_from_arrays, read_arrays
from ovref.exchange.picture_files import PublishedPictures
from ovref_inference import ReferenceCollection
from ovref_inference.collection.retrieve import class_embeddings, retrieval_embedding
from ovref_inference.errors import MissingPackageError


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    nouns = ["Cat", "dog", "tree"] * 20
    captions = [f"a {noun.lower()} number {i}" for i, noun in enumerate(nouns)]
    return OwnArrays(
        visual=5 * rng.standard_normal((60, 8)), nouns=nouns, captions=captions,
        more={"score": list(rng.random(60))},
    )  # fmt: skip


@pytest.fixture(scope="module")
def published(arrays, tmp_path_factory):
    folder = tmp_path_factory.mktemp("own") / "collection"
    summary = collection_from_arrays(
        str(folder), arrays, EMBED, texts=FakeTexts(), name="mine", licences=["mine: CC0-1.0"]
    )
    assert summary["references"] == summary["added"] == 60
    return folder


def test_vectors_nouns_and_captions_are_those_given(arrays, published):
    with ReferenceCollection.open(published) as collection:
        assert collection.nouns == ["cat", "dog", "tree"] and len(collection) == 60
        wanted = arrays.visual / np.linalg.norm(arrays.visual, axis=1, keepdims=True)
        assert np.abs(collection.visual - wanted).max() < 1e-3
        (row,) = collection.rows([30])
        assert (row["noun"], row["caption"], row["source"]) == ("cat", "a cat number 30", "mine")
        assert row["caption"][row["span_start"] : row["span_end"]] == "cat"
        assert row["score"] == pytest.approx(arrays.more["score"][30])
        texts = FakeTexts()
        textual = retrieval_embedding(
            class_embeddings(texts, ["cat"], EMBED.templates), texts.encode(["a cat number 30"])
        )
        assert np.abs(collection.textual[30] - textual[0]).max() < 1e-3
        support = collection.search_regions(wanted[[7]], k=1)
        assert support.ids.tolist() == [[7]] and support.nouns == [["dog"]]
        assert collection.prototypes(["tree"], text_embeddings=texts.encode(["tree"])).counts > 0
        assert collection.visual_config == EMBED.visual
        assert collection.manifest.licences == ("mine: CC0-1.0",)


def test_again_it_is_the_same_collection(arrays, published):
    before = (published / "collection.json").read_bytes()
    again = ovref.collection_from_arrays(
        str(published), arrays, EMBED, texts=FakeTexts(), name="mine", licences=["mine: CC0-1.0"]
    )
    assert again["references"] == 60 and (published / "collection.json").read_bytes() == before


def test_it_handles_like_any_other(published):
    import pickle

    collection = ReferenceCollection.open(published)
    assert "60 references of 3 nouns, own:mine 8 wide" in repr(collection)
    again = pickle.loads(pickle.dumps(collection))  # as a DataLoader does for its workers
    assert again.url == collection.url and np.array_equal(again.visual, collection.visual)
    table = collection.to_table(["noun", "score"])
    assert table.num_rows == 60 and table.column_names == ["noun", "score"]
    with pytest.raises(ValueError, match="has the columns id, key"):
        collection.to_table(["colour"])
    if find_spec("pandas"):  # in no extra that the tests need
        frame = collection.to_pandas(["noun", "score"])
        assert frame.to_dict("list") == table.to_pydict()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "pandas", None)
        with pytest.raises(MissingPackageError, match=r"to_pandas needs .*pandas"):
            collection.to_pandas()


def test_files_are_read(arrays, tmp_path):
    np.save(tmp_path / "v.npy", arrays.visual.astype(np.float32))
    table = {"noun": list(arrays.nouns), "caption": list(arrays.captions), "area": [0.5] * 60}
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    found = read_arrays(str(tmp_path / "v.npy"), str(tmp_path / "t.parquet"))
    assert isinstance(found.visual, np.memmap) and found.more == {"area": [0.5] * 60}
    assert found.nouns == table["noun"] and found.captions == table["caption"]
    pq.write_table(pa.table({"word": ["cat"]}), tmp_path / "w.parquet")
    for visual, table_name, message in (
        ("v.npy", "w.parquet", "needs a column noun, found word"),
        ("t.parquet", "t.parquet", "cannot read the vectors"),
        ("v.npy", "none.parquet", "cannot read the table"),
    ):
        with pytest.raises(InputError, match=message):
            read_arrays(str(tmp_path / visual), str(tmp_path / table_name))


def test_what_does_not_fit_is_refused(arrays, tmp_path):
    with pytest.raises(ValueError, match="visual has 60 rows, nouns 1"):
        OwnArrays(visual=arrays.visual, nouns=["cat"])
    visual = np.ones((2, 3))
    visual[1, 0] = np.nan
    broken = OwnArrays(visual=visual, nouns=["cat", "dog"])
    with pytest.raises(InputError, match="row 1 of the visual vectors is zero or not finite"):
        collection_from_arrays(str(tmp_path / "x"), broken, EMBED, texts=FakeTexts())
    nameless = OwnArrays(visual=np.ones((2, 3)), nouns=["cat", " "])
    with pytest.raises(InputError, match="reference 1 has an empty noun"):
        collection_from_arrays(str(tmp_path / "x"), nameless, EMBED, texts=FakeTexts())
    for column, value, message in (
        ("score", "high", "row 1 of the column score must be a number or empty, found 'high'"),
        ("x0", 0.5, "row 1 of the column x0 must be a whole number or empty, found 0.5"),
    ):
        odd = OwnArrays(visual=np.ones((2, 3)), nouns=["cat", "dog"], more={column: [None, value]})
        with pytest.raises(InputError, match=message):
            collection_from_arrays(str(tmp_path / "x"), odd, EMBED, texts=FakeTexts())
    nameless = OwnArrays(visual=np.ones((2, 3)), nouns=["cat", None])
    with pytest.raises(InputError, match="reference 1 has an empty noun"):
        collection_from_arrays(str(tmp_path / "x"), nameless, EMBED, texts=FakeTexts())
    unsafe = OwnArrays(visual=np.ones((2, 3)), nouns=["cat"] * 2, more={"key": ["a#0", "../b#0"]})
    with pytest.raises(InputError, match=r"reference 1: .* found '\.\./b#0'"):
        collection_from_arrays(str(tmp_path / "x"), unsafe, EMBED, texts=FakeTexts())
    assert not (tmp_path / "x").exists()


def test_what_a_table_leaves_empty_takes_the_default(tmp_path):
    arrays = OwnArrays(
        visual=np.eye(3), nouns=["cat", "dog", "tree"], captions=["a cat", None, "an oak"],
        more={"score": [0.5, None, 0.25], "x0": [None, 1, 2], "source": ["mine", None, None]},
    )  # fmt: skip
    collection_from_arrays(str(tmp_path / "x"), arrays, EMBED, texts=FakeTexts(), name="own")
    with ReferenceCollection.open(tmp_path / "x") as collection:
        rows = collection.rows([0, 1, 2])
    assert [row["caption"] for row in rows] == ["a cat", "dog", "an oak"]
    assert [(row["span_start"], row["span_end"]) for row in rows] == [(2, 5), (0, 3), (0, 0)]
    assert [row["score"] for row in rows] == [0.5, 1.0, 0.25]
    assert [row["x0"] for row in rows] == [0, 1, 2]
    assert [row["source"] for row in rows] == ["mine", "own", "own"]


def test_images_of_arrays_are_published_beside_the_collection(tmp_path):
    images = tmp_path / "images"
    (images / "deep").mkdir(parents=True)
    for name, value in (("a.png", 50), ("deep/b.png", 90)):
        Image.fromarray(np.full((8, 10, 3), value, np.uint8)).save(images / name)
    arrays = OwnArrays(
        visual=np.eye(4), nouns=["cat", "dog", "tree", "sky"],
        more={
            "image": ["a.png", "deep/b.png", "a.png", None], "x0": [2, 0, None, None],
            "y0": [1, 0, None, None], "x1": [5, 99, None, None], "y1": [4, 3, None, None],
        },
    )  # fmt: skip
    place = str(tmp_path / "x")
    collection_from_arrays(place, arrays, EMBED, texts=FakeTexts(), images=str(images))
    with ReferenceCollection.open(place) as collection:
        rows = {row["noun"]: row for row in collection.rows(range(4))}
    assert rows["cat"]["key"].partition("#")[0] == rows["tree"]["key"].partition("#")[0]
    found = dict(PublishedPictures(place).pictures([row["key"] for row in rows.values()]))
    assert found.keys() == {rows[noun]["key"] for noun in ("cat", "dog", "tree")}
    cat, dog, tree = (found[rows[noun]["key"]] for noun in ("cat", "dog", "tree"))
    assert (cat.image_hwc[0, 0, 0], dog.image_hwc[0, 0, 0]) == (50, 90)
    assert cat.mask_hw.sum() == 9 and cat.mask_hw[1:4, 2:5].all()
    assert dog.mask_hw.sum() == 30 and tree.mask_hw.all()
    for change, message in (
        ({"image": ["a.png", "c.png", None, None]}, "lacks 1 of 2 images, for one c.png"),
        ({"image": ["../x.png", None, None, None]}, r"found '\.\./x\.png'"),
        ({"score": [1.0] * 4}, "need the column `image`"),
    ):
        other = OwnArrays(visual=np.eye(4), nouns=["cat"] * 4, more=change)
        with pytest.raises(InputError, match=message):
            collection_from_arrays(
                str(tmp_path / "y"), other, EMBED, texts=FakeTexts(), images=str(images)
            )
    assert not (tmp_path / "y").exists()
