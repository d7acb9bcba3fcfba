"""Collections without a file of textual embeddings: reduced so, grown, compacted, published."""

import dataclasses
import json

import fsspec
import numpy as np
import pytest
from reduce_fakes import COUNTS, make_references, reduce_into

from ovref.exchange import publishing
from ovref.reduce import ReduceSpec
from ovref.storage.file_store import Store
from ovref_inference import CollectionError, ReferenceCollection
from ovref_inference.collection import format as fmt
from ovref_inference.collection import opening, store
from ovref_inference.vectors import check_readable

WITHOUT = ReduceSpec(textual_embeddings="in_index")
ALL = sum(COUNTS.values())


@pytest.fixture(params=["SQfp16", "IVF4,SQfp16"])
def factory(request, monkeypatch):
    """Exact indexes, or ones with inverted lists."""
    monkeypatch.setattr("ovref.reduce.indexing.choose_index", lambda n, dim: request.param)
    return request.param


def contents(folder):
    manifest = fmt.parse_manifest((folder / fmt.MANIFEST).read_bytes(), "")
    return {role: (folder / info.path).read_bytes() for role, info in manifest.files.items()}


def test_only_that_file_is_missing_and_its_rows_are_read_all_the_same(place, reduced, factory):
    step = place(make_references())
    with_it, without = reduced(step)[0], reduced(step, WITHOUT, "without")[0]
    expected = contents(with_it)
    textual = expected.pop("textual")
    assert contents(without) == expected and textual
    assert not list(without.glob("textual*.npy"))
    manifest = json.loads((without / fmt.MANIFEST).read_text())
    assert (manifest["format_version"], manifest["textual_embeddings"]) == (5, "in_index")
    with ReferenceCollection.open(with_it) as a, ReferenceCollection.open(without) as b:
        found = [one.search_text(one.noun_embeddings, 6) for one in (a, b)]
        np.testing.assert_array_equal(found[0].ids, found[1].ids)
        np.testing.assert_array_equal(found[0].textual, found[1].textual)
        np.testing.assert_array_equal(np.asarray(a.textual), b.textual[:])


def test_int8_keeps_its_textual_embeddings_in_float16_in_the_index(place, reduced, tmp_path):
    step = place(make_references())
    whole = reduced(step)[0]
    spec = dataclasses.replace(WITHOUT, embeddings="int8")
    small = reduced(step, spec, "small")[0]
    converted = tmp_path / "converted"
    publishing.publish(str(reduced(step, WITHOUT, "without")[0]), str(converted), title="x",
                       int8=True)  # fmt: skip
    assert contents(converted) == contents(small)
    for folder in (small, converted):
        with ReferenceCollection.open(folder) as a, ReferenceCollection.open(whole) as b:
            assert (a.manifest.embeddings, a.manifest.format_version) == ("int8", 5)
            np.testing.assert_array_equal(a.textual[:], np.asarray(b.textual))


def test_growing_gives_what_reducing_at_once_gives(place, reduced, factory):
    old, new = place(make_references()), place(make_references({"owl": 21}, seed=1), run=1)
    target, _ = reduced(old, WITHOUT)
    assert reduce_into(target, new, WITHOUT, base=Store.open(str(target)))["added"] == 21
    assert contents(target) == contents(reduced([old, new], WITHOUT, "at_once")[0])
    # The file comes back where it is wanted.
    reduce_into(target, [], ReduceSpec(), base=Store.open(str(target)))
    assert contents(target) == contents(reduced([old, new], ReduceSpec(), "with_it")[0])


def test_nothing_of_deleted_references_is_published(place, reduced, factory, tmp_path):
    target, _ = reduced(place(make_references()), WITHOUT)
    with ReferenceCollection.open(target) as before:
        textual = before.textual[:]
    store.tombstone(str(target), [3, 5], "an opt-out")
    publishing.publish(str(target), str(tmp_path / "there"), title="x")
    with ReferenceCollection.open(tmp_path / "there", verify="full") as opened:
        assert opened.manifest.textual_embeddings == "in_index" and len(opened) == ALL - 2
        np.testing.assert_array_equal(opened.textual[:], np.delete(textual, [3, 5], axis=0))
    content = (tmp_path / "there" / fmt.FILES["textual_index"]).read_bytes()
    assert textual[4].tobytes() in content and textual[3].tobytes() not in content


def test_partitions_too(place, reduced):
    step = place(make_references())
    spec = dataclasses.replace(WITHOUT, partition_references=70)
    target, summary = reduced(step, spec, "parts")
    assert summary["partitions"] > 1 and not list(target.rglob("textual*.npy"))
    whole, _ = reduced(step, dataclasses.replace(spec, textual_embeddings="stored"), "whole")
    with ReferenceCollection.open(target, verify="full") as a, ReferenceCollection.open(whole) as b:
        assert (a.manifest.format_version, a.manifest.textual_embeddings) == (4, "in_index")
        np.testing.assert_array_equal(np.asarray(a.textual), np.asarray(b.textual))
        ids = a.references_of("cat")
        np.testing.assert_array_equal(a.textual[ids], b.textual[ids])
        check_readable(a.textual)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_in_place_it_is_searched_but_its_textual_embeddings_are_not_read(
    place, reduced, tmp_path, monkeypatch
):
    monkeypatch.setattr("ovref.reduce.indexing.choose_index", lambda n, dim: "IVF4,SQfp16")
    monkeypatch.setattr(opening, "IN_PLACE_BYTES", 0)
    target, _ = reduced(place(make_references()), WITHOUT)
    files = fsspec.filesystem("memory")
    for path in target.iterdir():
        files.pipe_file(f"/without/{path.name}", path.read_bytes())
    found = []
    for url, options in ((str(target), {}), ("memory://without", {}),
                         ("memory://without", {"copy": True})):  # fmt: skip
        with ReferenceCollection.open(url, cache=tmp_path / "cache", **options) as opened:
            support = opened.search_text(opened.noun_embeddings, 7)
            found.append((support.ids, support.scores))
            if url.startswith("memory") and not options:
                with pytest.raises(CollectionError, match="copy=True"):
                    check_readable(opened.textual)
            else:
                assert support.textual.shape == (5, 7, 8)
    for other in found[1:]:
        for one, expected in zip(other, found[0], strict=True):
            np.testing.assert_array_equal(one, expected)


def test_a_manifest_that_says_otherwise_is_refused(place, reduced):
    target, _ = reduced(place(make_references()), WITHOUT)
    manifest = store.read_manifest(str(target))
    for change, message in (
        ({"textual_embeddings": "stored"}, "version 5 textual ones in the index alone"),
        ({"textual_embeddings": "lost"}, "textual ones 'lost'"),
        ({"textual_embeddings": "stored", "format_version": 2}, "names no file for textual"),
    ):
        content = fmt.manifest_bytes(dataclasses.replace(manifest, **change))
        (target / fmt.MANIFEST).write_bytes(content)
        with pytest.raises(CollectionError, match=message):
            ReferenceCollection.open(target)
