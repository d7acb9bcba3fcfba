"""Growing: tombstones, references that are there already, what an earlier try left over."""

import numpy as np
import pytest
from reduce_fakes import COUNTS, commit_step, make_references, reduce_into

from ovref.errors import MismatchError
from ovref.reduce import ReduceSpec, run
from ovref.reduce.phases import in_process
from ovref.storage.file_store import Store
from ovref_inference.collection import store as collections
from ovref_inference.collection.prototypes import PrototypeConfig
from ovref_inference.collection.reference_collection import ReferenceCollection

SPEC = ReduceSpec(prototypes=PrototypeConfig(k=4, min_references=8, neighbours=2))
ALL = sum(COUNTS.values())


def grow(target, steps=(), spec=SPEC, **options):
    return reduce_into(target, steps, spec, base=Store.open(str(target)), **options)


def delete(target, *nouns):
    with ReferenceCollection.open(target) as collection:
        ids = collection.ids_of(nouns=nouns)
    collections.tombstone(str(target), ids.tolist(), "opt-out")
    return ids


def files_of(target, *roles):
    manifest = collections.read_manifest(str(target))
    return [(target / manifest.files[role].path).read_bytes() for role in roles]


def same_as_queries_make(target):
    """Whether all stored prototypes hold and are those that a query would cluster."""
    with ReferenceCollection.open(target, verify="full") as collection:
        rows = list(range(len(collection.nouns)))
        fresh = collection._fresh(rows, collection.noun_embeddings, collection.prototype_config)
        for stored, (vectors, used) in zip(collection._stored(rows), fresh, strict=True):
            assert (stored is None) == (len(vectors) == 0)
            if stored is not None:
                np.testing.assert_allclose(stored[0], vectors, atol=1e-3)
                assert stored[1][1:] == [noun for noun in used if noun != stored[1][0]]
    return True


def test_a_corpus_that_is_wholly_known_adds_nothing(place, reduced, tmp_path):
    references = make_references()
    target, _ = reduced(place(references), SPEC)
    roles = ("references", "visual", "textual", "visual_index", "nouns", "prototypes")
    before = files_of(target, *roles)
    # The same captions in shards of another size: another step, whose shards are not known.
    again = commit_step(tmp_path / "again", references, shards=5, run=1)
    summary = grow(target, again)
    assert (summary["added"], summary["nouns_clustered"]) == (0, 0)
    assert summary["filter"][1] == {
        "filter": "repeated_key", "before": 2 * ALL, "after": ALL,
    }  # fmt: skip
    assert files_of(target, *roles) == before
    once = (target / "collection.json").read_bytes()
    assert grow(target, again)["added"] == 0
    assert (target / "collection.json").read_bytes() == once


def test_a_deleted_noun_leaves_those_that_leant_on_it(place, reduced):
    """A lion is nearly a cat; without cats it needs another neighbour, whose references stay."""
    target, _ = reduced(place(make_references()), SPEC)
    with ReferenceCollection.open(target) as collection:
        assert collection._nouns.neighbours(collection.nouns.index("lion")) == [
            collection.nouns.index("cat")
        ]
    deleted = delete(target, "cat")
    summary = grow(target)
    assert summary["nouns_clustered"] == 2  # what stands for cats now, and the lion
    assert same_as_queries_make(target)
    with ReferenceCollection.open(target) as collection:
        assert len(collection) == ALL - len(deleted)
        assert collection.nouns == sorted(COUNTS)
        found = collection.prototypes(["cat", "lion"], floor=None)
        assert found.counts.tolist() == [4, 4]
        assert all("cat" not in nouns[1:] for nouns in found.nouns)
        support = collection.search_regions(np.eye(12, dtype=np.float32), ALL)
        assert not np.isin(deleted, support.ids).any()


def test_all_references_deleted(place, reduced):
    target, _ = reduced(place(make_references()), SPEC)
    delete(target, *COUNTS)
    summary = grow(target)
    assert (summary["prototypes"], summary["nouns_clustered"]) == (0, 0)
    assert same_as_queries_make(target)
    with ReferenceCollection.open(target) as collection:
        assert len(collection) == 0
        assert (collection.search_regions(np.eye(12, dtype=np.float32), 3).ids == -1).all()
        assert collection.prototypes(["cat"]).counts.tolist() == [0]
    # And what comes then has ids of its own.
    assert grow(target, place(make_references({"owl": 9}, seed=1), run=1))["added"] == 9
    assert same_as_queries_make(target)
    with ReferenceCollection.open(target) as collection:
        assert collection.references_of("owl").tolist() == list(range(ALL, ALL + 9))


def test_what_is_deleted_does_not_come_back_with_its_key(place, reduced, tmp_path):
    references = make_references()
    target, _ = reduced(place(references), SPEC)
    deleted = delete(target, "boat")
    again = commit_step(tmp_path / "again", references, run=1)
    assert grow(target, again)["added"] == 0
    with ReferenceCollection.open(target) as collection:
        assert len(collection) == ALL - len(deleted)
        assert collection.noun_counts[collection.nouns.index("boat")] == 0


def test_deleted_between_two_tries_to_grow(place, reduced, monkeypatch):
    """The phases of the first try, which knew of no tombstone, are not gone on with."""
    target, _ = reduced(place(make_references()), SPEC)
    new = place(make_references({"owl": 12}, seed=1), run=1)
    with monkeypatch.context() as patch:
        patch.setattr("ovref.reduce.run._assemble", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            grow(target, new)
    deleted = delete(target, "cat")
    assert grow(target, new)["added"] == 12
    assert same_as_queries_make(target)
    with ReferenceCollection.open(target) as collection:
        assert len(collection) == ALL + 12 - len(deleted)


def meanwhile(monkeypatch, call):
    """Calls at the end of the last phase before publishing."""
    assemble = run._assemble

    def assemble_and_call(*arguments):
        monkeypatch.setattr(run, "_assemble", assemble)
        summary = assemble(*arguments)
        call()
        return summary

    monkeypatch.setattr(run, "_assemble", assemble_and_call)


def test_deleted_while_it_grows(place, reduced, monkeypatch):
    """What was deleted must not come back with the collection that takes its place."""
    target, _ = reduced(place(make_references()), SPEC)
    new = place(make_references({"owl": 12}, seed=1), run=1)
    deleted = []
    meanwhile(monkeypatch, lambda: deleted.extend(delete(target, "cat")))
    with pytest.raises(MismatchError, match=r"was changed while .* run the same command again"):
        grow(target, new)
    assert grow(target, new)["added"] == 12
    with ReferenceCollection.open(target) as collection:
        assert len(collection) == ALL + 12 - len(deleted) and deleted


def test_grown_by_two_at_the_same_time(place, reduced, monkeypatch, tmp_path):
    """Who is later adds to what the other has added, and does not take its place."""
    target, _ = reduced(place(make_references()), SPEC)
    owls = place(make_references({"owl": 12}, seed=1), run=1)
    hens = place(make_references({"hen": 9}, seed=2), run=2)
    meanwhile(monkeypatch, lambda: grow(target, hens, work=tmp_path / "elsewhere"))
    with pytest.raises(MismatchError, match=r"holds another collection|was changed while"):
        grow(target, owls)
    assert grow(target, owls)["added"] == 12
    with ReferenceCollection.open(target) as collection:
        assert len(collection) == ALL + 12 + 9


def test_grown_by_another_machine_at_the_same_time(place, reduced, monkeypatch, tmp_path):
    target, _ = reduced(place(make_references()), SPEC)
    owls = place(make_references({"owl": 12}, seed=1), run=1)
    deleted = []

    def other():
        grow(target, owls, work=tmp_path / "elsewhere")
        deleted.extend(delete(target, "cat"))

    meanwhile(monkeypatch, other)
    assert grow(target, owls)["added"] == 12
    with ReferenceCollection.open(target) as collection:
        assert len(collection) == ALL + 12 - len(deleted) and deleted


def test_shards_of_the_same_names_with_other_contents_are_another_collection(reduced, tmp_path):
    """As of an output that was deleted and made again by a program that draws otherwise."""
    one, other = (
        commit_step(tmp_path / name, make_references(seed=seed))
        for name, seed in (("one", 0), ("other", 1))
    )
    assert one.fingerprint == other.fingerprint
    reduced(one, SPEC)
    with pytest.raises(MismatchError, match="holds another collection"):
        reduced(other, SPEC)


def test_another_version_makes_prototypes_and_centroids_anew(place, reduced, monkeypatch):
    monkeypatch.setattr("ovref.reduce.indexing.choose_index", lambda n, dim: "IVF4,SQfp16")
    target, _ = reduced(place(make_references()), SPEC)
    delete(target, "lion")
    monkeypatch.setattr(ReduceSpec, "version", ReduceSpec.version + 1)
    assert grow(target)["nouns_clustered"] == len(COUNTS)


@pytest.mark.parametrize("trained", [60, 50])
def test_parts_of_a_grown_index_begin_with_whole_blocks(place, reduced, monkeypatch, trained):
    """And with nothing of the old one where centroids would be trained on other rows."""
    monkeypatch.setattr("ovref.reduce.indexing.choose_index", lambda n, dim: "IVF4,SQfp16")
    monkeypatch.setattr("ovref.reduce.indexing.training_rows", lambda n, factory: (60, 100))
    monkeypatch.setattr("ovref.reduce.indexing.PART_ROWS", 32)
    monkeypatch.setattr("ovref.reduce.ivf.BLOCK", 16)
    old, new = place(make_references()), place(make_references({"owl": 21}, seed=1), run=1)
    target, _ = reduced(old, SPEC)
    monkeypatch.setattr("ovref.reduce.indexing.training_rows", lambda n, factory: (trained, 100))
    spans = []

    def watched(tasks):
        spans.extend(task.args[2:4] for task in tasks if task.func.__name__ == "_part")
        return in_process(tasks)

    summary = grow(target, new, run_tasks=watched)
    first = [(112, ALL + 21)] if trained == 60 else [(at, at + 32) for at in range(0, 128, 32)]
    first += [(128, ALL + 21)] * (trained == 50)
    assert spans == 2 * first
    at_once, whole = reduced([old, new], SPEC, "at_once")
    roles = ("visual_index", "textual_index")
    assert files_of(target, *roles) == files_of(at_once, *roles)
    assert summary["index"] == whole["index"]
