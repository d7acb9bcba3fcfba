"""Collections with embeddings in int8: reduced so, converted, grown, compacted, read by ranges."""

import dataclasses
import json

import faiss
import fsspec
import numpy as np
import pytest
from reduce_fakes import COUNTS, D_VISUAL, make_references, reduce_into

from ovref.exchange import publishing
from ovref.reduce import ReduceSpec
from ovref.storage.file_store import Store
from ovref_inference import CollectionError, ReferenceCollection
from ovref_inference.collection import format as fmt
from ovref_inference.collection import opening, store
from ovref_inference.collection.exact import exact_search
from ovref_inference.collection.int8 import decode_rows, encode_rows

INT8 = ReduceSpec(embeddings="int8")
ALL = sum(COUNTS.values())


@pytest.fixture(autouse=True)
def lists(monkeypatch):
    """Indexes have inverted lists, and everything remote is read in place."""
    monkeypatch.setattr("ovref.reduce.indexing.choose_index", lambda n, dim: "IVF4,SQfp16")
    monkeypatch.setattr(opening, "IN_PLACE_BYTES", 0)


@pytest.fixture
def both(place, reduced):
    """The same references in float16 and in int8."""
    step = place(make_references())
    return reduced(step, name="float16")[0], reduced(step, INT8, name="int8")[0]


def contents(folder):
    manifest = fmt.parse_manifest((folder / fmt.MANIFEST).read_bytes(), "")
    return {role: (folder / info.path).read_bytes() for role, info in manifest.files.items()}


def test_only_embeddings_and_indexes_differ_and_they_take_half_the_bytes(both):
    halves, bytes_ = (contents(folder) for folder in both)
    manifests = [json.loads((folder / fmt.MANIFEST).read_text()) for folder in both]
    assert "embeddings" not in manifests[0] and manifests[0]["format_version"] == 2
    assert manifests[1]["embeddings"] == "int8" and manifests[1]["format_version"] == 3
    for role in ("references", "nouns", "prototypes", "tombstones", "textual_index"):
        assert bytes_[role] == halves[role]
    assert len(bytes_["visual"]) == 128 + ALL * (D_VISUAL + 2)
    with ReferenceCollection.open(both[0]) as whole, ReferenceCollection.open(both[1]) as small:
        visual = np.asarray(whole.visual)
        np.testing.assert_array_equal(small.visual[:], decode_rows(encode_rows(visual)))
        before, after = whole.manifest.visual_index, small.manifest.visual_index
        assert (before.factory, after.factory) == ("IVF4,SQfp16", "IVF4,SQ8")
        points = [[(at.k, at.nprobe) for at in info.curve] for info in (before, after)]
        assert points[0] == points[1] and before.train_rows == after.train_rows
        indexes = [
            faiss.read_index(str(folder / fmt.FILES["visual_index"])) for folder in both
        ]
        assert [index.code_size for index in indexes] == [2 * D_VISUAL, D_VISUAL]
        # The lists hold the same references; what is decoded is as near as 8 bits can be.
        for index in indexes:
            index.make_direct_map()
        step = (visual.max(0) - visual.min(0)).astype(np.float64) / 255
        rows = indexes[1].reconstruct_n(0, ALL)
        assert (np.abs(rows - visual) <= 0.51 * step + 1e-6).all()
        for number in range(4):
            ids = [
                faiss.rev_swig_ptr(i.invlists.get_ids(number), i.invlists.list_size(number)).copy()
                for i in indexes
            ]
            np.testing.assert_array_equal(*ids)


def test_searches_and_prototypes_are_nearly_those_of_float16(both):
    with ReferenceCollection.open(both[0]) as whole, ReferenceCollection.open(both[1]) as small:
        queries = np.asarray(whole.visual[::5], np.float32)
        _, exact = exact_search(whole.visual, queries, 10)
        for collection, least in ((whole, 0.95), (small, 0.9)):
            found = collection.search_regions(queries, 10).ids
            same = [len(set(a) & set(b)) / 10 for a, b in zip(found, exact, strict=True)]
            assert np.mean(same) >= least
        _, by_int8 = exact_search(small.visual, queries, 10)
        assert np.mean(by_int8[:, 0] == exact[:, 0]) > 0.95
        texts = whole.noun_embeddings
        retrieved = [c.fossil_prototypes(texts, n=20, k=1).vectors_nkd for c in (whole, small)]
        np.testing.assert_allclose(*retrieved, atol=0.02)
        stored = [c.prototypes(["cat"], text_embeddings=texts[1:2]) for c in (whole, small)]
        np.testing.assert_array_equal(*(prototypes.vectors_nkd for prototypes in stored))


def test_a_converted_collection_has_the_bytes_of_one_reduced_so(both, tmp_path):
    target = tmp_path / "converted"
    publishing.publish(str(both[0]), str(target), title="x", int8=True)
    assert contents(target) == contents(both[1])
    manifest = store.read_manifest(str(target))
    wanted = store.read_manifest(str(both[1]))
    assert (manifest.visual_index, manifest.textual_index) == (
        wanted.visual_index, wanted.textual_index,
    )  # fmt: skip
    whole = store.read_manifest(str(both[0])).fingerprint
    assert manifest.build["converted"] == {"from": whole, "to": "int8"}
    assert manifest.fingerprint not in (whole, wanted.fingerprint)
    again = tmp_path / "again"  # nothing is left to convert
    publishing.publish(str(target), str(again), title="x", int8=True)
    assert store.read_manifest(str(again)).fingerprint == manifest.fingerprint


def test_the_recall_in_the_manifest_is_that_of_the_8_bit_codes(both):
    with ReferenceCollection.open(both[0]) as whole, ReferenceCollection.open(both[1]) as small:
        rows = np.asarray(whole.visual, np.float32)
        exact, _ = exact_search(rows, rows, 11)
        for point in small.manifest.visual_index.curve[:1]:
            assert point.k == 10
            index = faiss.read_index(str(both[1] / fmt.FILES["visual_index"]))
            options = faiss.SearchParametersIVF(nprobe=point.nprobe)
            _, ids = index.search(rows, ALL, params=options)
            found = []
            for row, neighbours in enumerate(ids):
                near = [i for i in neighbours if i not in (row, -1)][:10]
                lost = rows[near] @ rows[row] < exact[row, 10] - 1e-6
                found.append(1 - (lost.sum() + 10 - len(near)) / 10)
            assert point.recall == pytest.approx(np.mean(found), abs=0.02)


def test_nothing_of_deleted_references_is_in_a_published_int8_collection(both, tmp_path):
    store.tombstone(str(both[1]), [3, 5], "an opt-out")
    publishing.publish(str(both[1]), str(tmp_path / "there"), title="x")
    with ReferenceCollection.open(both[1]) as before:
        kept = np.setdiff1d(np.arange(ALL), [3, 5])
        visual = before.visual[kept]
    with ReferenceCollection.open(tmp_path / "there", verify="full") as opened:
        assert opened.manifest.embeddings == "int8" and len(opened) == ALL - 2
        np.testing.assert_array_equal(opened.visual[:], visual)


def test_a_grown_collection_keeps_the_bytes_of_its_rows(place, reduced):
    old, new = place(make_references()), place(make_references({"owl": 21}, seed=1), run=1)
    target, _ = reduced(old, INT8)
    summary = reduce_into(target, new, INT8, base=Store.open(str(target)))
    assert summary["added"] == 21
    at_once, _ = reduced([old, new], INT8, "at_once")
    for role in ("visual", "textual", "references"):
        assert contents(target)[role] == contents(at_once)[role]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_it_answers_alike_where_it_is_read_by_ranges(both, tmp_path):
    files = fsspec.filesystem("memory")
    for path in both[1].iterdir():
        files.pipe_file(f"/small/{path.name}", path.read_bytes())
    queries = np.random.default_rng(0).standard_normal((5, D_VISUAL))
    found = []
    for url in (str(both[1]), "memory://small"):
        with ReferenceCollection.open(url, cache=tmp_path / "cache") as opened:
            support = opened.search_regions(queries, 7)
            found.append((support.ids, support.scores, support.visual, opened.textual[3:9]))
            found[-1] += (opened.search_text(opened.noun_embeddings, 3).ids,)
    for local, remote in zip(*found, strict=True):
        np.testing.assert_array_equal(local, remote)


def test_a_manifest_that_says_otherwise_is_refused(both):
    manifest = store.read_manifest(str(both[1]))
    for change, message in (
        ({"embeddings": "float16", "format_version": 2}, "does not hold float16 numbers"),
        ({"embeddings": "int4"}, "stores embeddings as 'int4'.*version 3 has int8"),
    ):
        content = fmt.manifest_bytes(dataclasses.replace(manifest, **change))
        (both[1] / fmt.MANIFEST).write_bytes(content)
        with pytest.raises(CollectionError, match=message):
            ReferenceCollection.open(both[1])
