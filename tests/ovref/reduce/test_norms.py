"""Norms of visual embeddings, from their step into the collection: sorted out, grown, compacted."""

from dataclasses import replace

import numpy as np
import pytest
from reduce_fakes import COUNTS, EMBED, commit_step, make_references, reduce_into

from ovref.errors import InputError, MismatchError
from ovref.identity import canonical
from ovref.reduce import FilterSpec, ReduceSpec
from ovref.reduce.compact import compact
from ovref.reduce.int8 import in_int8
from ovref.storage.file_store import Store
from ovref_inference.collection import store as collections
from ovref_inference.collection.euclidean import euclidean_prototypes
from ovref_inference.collection.prototypes import PrototypeConfig
from ovref_inference.collection.reference_collection import ReferenceCollection
from ovref_inference.vectors import l2_normalised

KEPT = replace(EMBED, norms=True)
SPEC = ReduceSpec(
    prototypes=PrototypeConfig(k=4, min_references=8, neighbours=2),
    filter=FilterSpec(min_score=0.3),
)


def with_norms(references):
    """The same with norms of 1 to 5, by key."""
    rng = np.random.default_rng(7)
    return [replace(one, measures={"norm": float(rng.uniform(1, 5))}) for one in references]


def norms_of(collection):
    """Key -> norm."""
    rows = collection.rows(range(len(collection.visual)))
    return {row["key"]: float(collection.norms[i, 0]) for i, row in enumerate(rows)}


def wanted_of(references, least=0.3):
    return {one.key: one.measures["norm"] for one in references if one.score >= least}


def test_norms_stay_with_their_references(tmp_path):
    references = with_norms(make_references())
    step = commit_step(tmp_path / "run", references, embed=KEPT)
    reduce_into(tmp_path / "made", step, SPEC, embed=KEPT)
    with ReferenceCollection.open(tmp_path / "made", verify="full") as collection:
        assert norms_of(collection) == pytest.approx(wanted_of(references), rel=1e-3)
        assert 0 < len(collection) < sum(COUNTS.values())
    more = with_norms(make_references({"boat": 6, "cat": 5}, seed=1))
    other = commit_step(tmp_path / "more", more, run=1, embed=KEPT)
    base = Store.open(str(tmp_path / "made"))
    reduce_into(tmp_path / "made", other, SPEC, embed=KEPT, base=base)
    both = wanted_of(references) | wanted_of(more)
    with ReferenceCollection.open(tmp_path / "made", verify="full") as collection:
        assert norms_of(collection) == pytest.approx(both, rel=1e-3)
        gone = collection.ids_of(nouns=["boat"])
    collections.tombstone(str(tmp_path / "made"), gone.tolist(), "opt-out")
    manifest, paths = collections.fetch(str(tmp_path / "made"))
    work = tmp_path / "compacted"
    work.mkdir()
    _, files = compact(manifest, paths, work)
    with ReferenceCollection.open(files["norms"].parent, verify="full") as collection:
        left = norms_of(collection)
        assert left == pytest.approx({key: both[key] for key in left}, rel=1e-3)
        assert len(left) == len(both) - len(gone)


def test_norms_stay_beside_embeddings_in_8_bits(tmp_path):
    references = with_norms(make_references())
    step = commit_step(tmp_path / "run", references, embed=KEPT)
    spec = replace(SPEC, embeddings="int8")
    reduce_into(tmp_path / "made", step, spec, embed=KEPT)
    with ReferenceCollection.open(tmp_path / "made", verify="full") as collection:
        assert norms_of(collection) == pytest.approx(wanted_of(references), rel=1e-3)
    reduce_into(tmp_path / "halves", step, SPEC, embed=KEPT)
    manifest, paths = collections.fetch(str(tmp_path / "halves"))
    made, files = in_int8(manifest, paths, tmp_path / "converted", "another")
    assert made.embeddings == "int8" and files["norms"].stat().st_size > 0


def test_a_collection_has_all_norms_or_none(tmp_path):
    plain = make_references()
    step = commit_step(tmp_path / "run", plain)
    reduce_into(tmp_path / "made", step)
    assert not list((tmp_path / "made").glob("norms*"))
    with ReferenceCollection.open(tmp_path / "made") as collection:
        assert collection.norms is None
        with pytest.raises(ValueError, match=r"build it with embed\.norms=true"):
            euclidean_prototypes(collection, collection.textual[:1], n=3, k=1, norms=True)
    other = commit_step(tmp_path / "more", with_norms(make_references(seed=1)), run=1, embed=KEPT)
    base = Store.open(str(tmp_path / "made"))
    with pytest.raises(InputError, match="118 of 236 references have no norm"):
        reduce_into(tmp_path / "made", other, base=base, embed=KEPT)
    with pytest.raises(MismatchError, match="norms was True and is now False"):
        reduce_into(tmp_path / "other", other)
    assert "norms" not in canonical(EMBED)


def test_prototypes_are_means_of_what_the_encoder_gave(tmp_path):
    references = with_norms(make_references({"boat": 12, "cat": 9}, per_image=1))
    step = commit_step(tmp_path / "run", references, embed=KEPT)
    reduce_into(tmp_path / "made", step, ReduceSpec(), embed=KEPT)
    with ReferenceCollection.open(tmp_path / "made") as collection:
        texts_cd = np.asarray(collection.textual[:2], dtype=np.float32)
        found = euclidean_prototypes(collection, texts_cd, n=5, k=1, norms=True)
        plain = euclidean_prototypes(collection, texts_cd, n=5, k=1)
        for row, ids in enumerate(collection.search_text(texts_cd, 5).ids):
            raw_nd = l2_normalised(collection.visual[ids]) * np.float32(collection.norms[ids])
            mean_d = raw_nd.mean(0)
            np.testing.assert_allclose(
                found.vectors_nkd[row, 0], mean_d / np.linalg.norm(mean_d), atol=1e-4
            )
        assert np.abs(found.vectors_nkd - plain.vectors_nkd).max() > 1e-3
