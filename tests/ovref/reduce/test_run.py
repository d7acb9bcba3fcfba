import dataclasses
import errno
import json
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from operator import attrgetter
from threading import Event

import numpy as np
import pytest
from reduce_fakes import (
    COUNTS,
    EMBED,
    FakeTexts,
    commit_step,
    direction,
    make_references,
    reduce_into,
)

from ovref.errors import InputError, MismatchError, StorageError
from ovref.reduce import FilterSpec, ReduceSpec, reduce_collection
from ovref.reduce.phases import in_process
from ovref.storage.file_store import Store
from ovref.storage.steps import open_step
from ovref_inference.collection import store as collections
from ovref_inference.collection.prototypes import PrototypeConfig
from ovref_inference.collection.reference_collection import ReferenceCollection
from ovref_inference.collection.retrieve import class_embeddings
from ovref_inference.encoders.config import TextEncoderConfig, VisualEncoderConfig
from ovref_inference.errors import CollectionError

SPEC = ReduceSpec(prototypes=PrototypeConfig(k=4, min_references=8, neighbours=2))


def content(folder):
    """File -> bytes of a published collection."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def in_any_order(tasks):
    """Runs tasks as workers elsewhere may: out of order, one of them twice, after pickling."""
    tasks = pickle.loads(pickle.dumps(list(tasks)))
    results = {number: tasks[number]() for number in [*reversed(range(len(tasks))), 0] if tasks}
    return iter([results[number] for number in range(len(tasks))])


def in_gathered_order(references, shards=3):
    return [reference for number in range(shards) for reference in references[number::shards]]


def test_the_collection_holds_the_references_in_the_order_of_the_shards(place, reduced):
    references = make_references()
    target, summary = reduced(place(references), SPEC)
    expected = in_gathered_order(references)
    with ReferenceCollection.open(target, verify="full") as collection:
        assert len(collection) == len(expected) == sum(COUNTS.values())
        np.testing.assert_array_equal(collection.visual, [r.visual for r in expected])
        np.testing.assert_array_equal(collection.textual, [r.textual for r in expected])
        for reference, row in zip(expected, collection.rows(range(len(expected))), strict=True):
            assert row["key"] == reference.key
            assert row["noun"] == reference.noun.text
            assert (row["span_start"], row["span_end"]) == (2, 2 + len(reference.noun.text))
            assert (row["x0"], row["y0"], row["x1"], row["y1"]) == reference.box_xyxy
            assert (row["caption"], row["source"]) == (reference.caption, "daam")
            assert row["area"] == np.float32(reference.area)
            assert row["score"] == np.float32(reference.score)
            assert row["seed"] == reference.seed
        manifest = collection.manifest
    assert summary["added"] == len(expected)
    assert summary["nouns"] == 5
    assert summary["rare_nouns"] == 1
    assert summary["most_frequent"][0] == ["boat", 40]
    assert summary["least_frequent"][0] == ["lion", 3]
    assert summary["dropped_before"] == {"corrupt_image": 3, "empty_mask": 3}
    assert summary["fingerprint"] == manifest.fingerprint
    assert (manifest.visual.model, manifest.visual.revision) == ("fake-visual", "v1")
    assert (manifest.visual.dim, manifest.textual.dim) == (12, 8)
    assert manifest.textual.settings == {"model": "fake-text", "revision": ""}
    assert (manifest.templates, manifest.weights) == (EMBED.templates, EMBED.weights)
    assert manifest.licences == ("CC-BY-4.0",)
    assert manifest.build["inputs"][0]["shards"] == ["00000", "00001", "00002"]


def test_stored_prototypes_are_those_a_query_would_make(place, reduced):
    target, _ = reduced(place(make_references()), SPEC)
    with ReferenceCollection.open(target) as collection:
        for row, noun in enumerate(collection.nouns):
            ((stored, used),) = collection._stored([row])
            embedding = collection.noun_embeddings[row]
            ((fresh, fresh_used),) = collection._fresh(
                [row], embedding[None], collection.prototype_config
            )
            np.testing.assert_allclose(stored, fresh, atol=1e-3)
            assert used == fresh_used
            assert (len(used) > 1) == (noun == "lion")
        np.testing.assert_allclose(
            collection.noun_embeddings, embeddings_of(collection.nouns), atol=1e-6
        )


def embeddings_of(nouns):
    rows = []
    for noun in nouns:
        row = sum(FakeTexts().encode([text.format(noun)])[0] for text in EMBED.templates)
        rows.append(row / np.linalg.norm(row))
    return rows


def test_prototypes_are_about_as_good_as_the_best_of_many_naive_runs(place, reduced):
    references = in_gathered_order(make_references(noise=0.6))
    target, _ = reduced(place(make_references(noise=0.6)), SPEC)
    with ReferenceCollection.open(target) as collection:
        found = collection.prototypes(["boat"])
    points = np.array([r.visual for r in references if r.noun.text == "boat"], np.float64)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    best = max(naive_spherical_kmeans(points, 4, seed) for seed in range(30))
    ours = (points @ found.vectors_nkd[0].T).max(axis=1).sum()
    assert ours > 0.97 * best


def naive_spherical_kmeans(points, k, seed):
    """The objective reached: the sum of every point's cosine with its centroid."""
    rng = np.random.default_rng(seed)
    centroids = points[rng.choice(len(points), k, replace=False)]
    for _ in range(50):
        nearest = (points @ centroids.T).argmax(axis=1)
        for cluster in range(k):
            total = points[nearest == cluster].sum(axis=0)
            if np.linalg.norm(total) > 0:
                centroids[cluster] = total / np.linalg.norm(total)
    return (points @ centroids.T).max(axis=1).sum()


def test_indexes_find_what_exact_search_finds(place, reduced):
    references = in_gathered_order(make_references())
    target, summary = reduced(place(make_references()), SPEC)
    assert summary["index"]["visual"] == {
        "factory": "SQfp16", "curve": [], "queries": "", "train_rows": 0,
    }  # fmt: skip
    queries = np.stack([direction(noun, 12) for noun in COUNTS]).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    visual = np.array([r.visual for r in references], np.float32)
    with ReferenceCollection.open(target) as collection:
        support = collection.search_regions(queries, 10)
    exact = np.argsort(-(queries @ visual.T), axis=1)[:, :10]
    assert np.mean([len(set(a) & set(b)) for a, b in zip(support.ids, exact, strict=True)]) > 9.7


def test_approximate_indexes_are_measured_by_what_they_will_be_asked(place, reduced, monkeypatch):
    monkeypatch.setattr("ovref.reduce.indexing.choose_index", lambda n, dim: "IVF16,SQfp16")
    references = make_references({"cat": 200, "dog": 200, "tree": 9, "boat": 20}, noise=0.5)
    target, summary = reduced(place(references), SPEC)
    curves = {}
    for role, queries in (("visual", "held-out rows"), ("textual", "class names")):
        info = summary["index"][role]
        assert (info["factory"], info["queries"]) == ("IVF16,SQfp16", queries)
        assert [point["k"] for point in info["curve"]] == [10, 20, 70, 150, 350]
        assert all(point["recall"] >= 0.95 for point in info["curve"])
        curves[role] = [point["nprobe"] for point in info["curve"]]
    assert curves["textual"] != curves["visual"]
    with ReferenceCollection.open(target) as collection:
        stored = [point.nprobe for point in collection.manifest.textual_index.curve]
        assert stored == curves["textual"]
        textual = np.asarray(collection.textual, np.float32)
        names = collection.noun_embeddings
        for point in collection.manifest.textual_index.curve:
            support = collection.search_text(names, point.k)
            exact = np.sort(names @ textual.T, axis=1)[:, -point.k]
            recall = (support.scores >= exact[:, None] - 1e-6).mean()
            assert recall == pytest.approx(point.recall, abs=1e-3)


def test_equal_references_give_equal_bytes_whatever_made_them(place, reduced):
    references = make_references()
    first, _ = reduced(place(references, run=0), SPEC, "first")
    # The same step elsewhere, its shards committed in another order by "other workers".
    again = place(references, run=0, name="elsewhere", order=[2, 0, 1])
    second, _ = reduced(again, SPEC, "second", run_tasks=in_any_order)
    left, right = content(first), content(second)
    manifests = [json.loads(files.pop("collection.json")) for files in (left, right)]
    assert left == right
    for manifest in manifests:
        manifest["build"]["inputs"][0].pop("step")
        manifest.pop("fingerprint")
    assert manifests[0] == manifests[1]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A step, its published files and the summary."""
    folder = tmp_path_factory.mktemp("undisturbed")
    step = commit_step(folder, make_references())
    summary = reduce_into(folder / "collection", step, SPEC)
    return step, content(folder / "collection"), summary


KILLS = {
    "first shard": ("ovref.reduce.gather.VectorWriter.append", 0),
    "second shard": ("ovref.reduce.gather.VectorWriter.append", 3),
    "filter": ("ovref.reduce.filter.write_rows", 0),
    "first index": ("ovref.reduce.indexing.write_index", 0),
    "second index": ("ovref.reduce.indexing.write_index", 1),
    "clustering": ("ovref.reduce.noun_prototypes.make_prototypes", 0),
    "third noun": ("ovref.reduce.noun_prototypes.VectorWriter.append", 2),
    "tombstones": ("ovref.reduce.run.fmt.write_table", 0),
    "end of gather": ("ovref.reduce.phases.os.replace", 0),
    "end of filter": ("ovref.reduce.phases.os.replace", 1),
    "end of prototypes": ("ovref.reduce.phases.os.replace", 3),
    "first upload": ("ovref_inference.collection.store._put", 0),
    "fifth upload": ("ovref_inference.collection.store._put", 4),
    "manifest": ("ovref_inference.collection.store._commit", 0),
    "cleaning": ("ovref.reduce.run._clean", 0),
    "deleting": ("ovref.reduce.run.shutil.rmtree", 6),
}
"""Where a reduction dies: in this function, after so many calls of it."""


@pytest.mark.parametrize("where", KILLS)
def test_a_reduction_killed_anywhere_goes_on_and_ends_in_the_same_bytes(
    undisturbed, tmp_path, monkeypatch, where
):
    step, files, summary = undisturbed
    target = tmp_path / "collection"
    with monkeypatch.context() as patch:
        die_in(patch, *KILLS[where])
        with pytest.raises(KeyboardInterrupt):
            reduce_into(target, step, SPEC)
    assert reduce_into(target, step, SPEC) == summary
    assert content(target) == files


def test_a_finished_phase_is_not_run_again(undisturbed, tmp_path, monkeypatch):
    step, files, _ = undisturbed
    with monkeypatch.context() as patch:
        die_in(patch, "ovref.reduce.noun_prototypes.make_prototypes", 0)
        with pytest.raises(KeyboardInterrupt):
            reduce_into(tmp_path / "collection", step, SPEC)
    for finished in ("gather", "filter_references", "build_indexes"):
        die_in(monkeypatch, f"ovref.reduce.run.{finished}", 0)
    reduce_into(tmp_path / "collection", step, SPEC)
    assert content(tmp_path / "collection") == files


def die_in(patch, path, calls_before):
    """Makes the function at `path` raise as a kill would, after so many calls."""
    parts = path.split(".")
    for split in range(len(parts) - 1, 0, -1):
        try:
            module = import_module(".".join(parts[:split]))
        except ModuleNotFoundError:
            continue
        owner = attrgetter(".".join(parts[split:-1]))(module) if parts[split:-1] else module
        break
    real, calls = getattr(owner, parts[-1]), []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == calls_before + 1:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    patch.setattr(owner, parts[-1], dying)


def test_a_reader_never_sees_a_half_written_collection(place, reduced, monkeypatch):
    step = place(make_references())
    with monkeypatch.context() as patch:
        die_in(patch, "ovref_inference.collection.store._commit", 0)
        with pytest.raises(KeyboardInterrupt):
            reduced(step, SPEC)
    target, _ = reduced(step, SPEC, "other")
    with pytest.raises(CollectionError, match=r"collection\.json is missing"):
        ReferenceCollection.open(target.with_name("collection"))
    assert len(ReferenceCollection.open(target)) == sum(COUNTS.values())


def test_a_published_collection_is_not_made_again(place, reduced, tmp_path):
    step = place(make_references())
    target, summary = reduced(step, SPEC)
    before = content(target)
    work = tmp_path / "never"
    _, again = reduced(step, SPEC, work=work)
    assert again == summary
    assert content(target) == before
    assert not work.exists()


def test_of_the_work_only_the_list_of_dropped_references_stays(place, reduced, tmp_path):
    work = tmp_path / "work"
    _, summary = reduced(place(make_references()), SPEC, work=work)
    names = [path.name for path in work.iterdir()]
    assert names == [f"{summary['fingerprint'][:16]}-dropped.parquet"]


def test_another_collection_is_not_replaced_unless_asked(place, reduced):
    step = place(make_references())
    target, first = reduced(step, SPEC)
    before = content(target)
    other = ReduceSpec(prototypes=PrototypeConfig(k=2))
    with pytest.raises(MismatchError, match="another collection"):
        reduced(step, other)
    assert content(target) == before
    _, second = reduced(step, other, replace=True)
    assert second["fingerprint"] != first["fingerprint"]
    assert collections.read_manifest(str(target)).prototypes["k"] == 2


@pytest.mark.parametrize(
    "counts",
    [{"cat": 1}, {"cat": 3}, {"cat": 2, "dog": 1}, {"cat": 60}],
    ids=["one reference", "fewer than K", "a noun with one", "one noun"],
)
def test_small_collections(place, reduced, counts):
    references = make_references(counts)
    target, summary = reduced(place(references, shards=4), ReduceSpec())
    total = sum(counts.values())
    with ReferenceCollection.open(target) as collection:
        assert collection.nouns == sorted(counts)
        found = collection.prototypes(list(counts))
        assert found.counts.tolist() == [min(10, total)] * len(counts)
        if total < 10:
            vectors = sorted(found.vectors_nkd[0].tolist())
            np.testing.assert_allclose(
                vectors, sorted(r.visual.astype(float).tolist() for r in references), atol=1e-3
            )
    assert summary["prototypes"] == min(10, total) * len(counts)


def test_no_references_are_an_error_and_no_collection(place, reduced, tmp_path):
    with pytest.raises(InputError, match="expected references, found none"):
        reduced(place([], shards=2))
    assert not (tmp_path / "collection").exists()


def test_an_incomplete_step_is_refused_unless_allowed(place, reduced):
    step = place(make_references(), order=[0, 2], finish=False)
    with pytest.raises(InputError, match="2 shards are committed"):
        reduced(step, SPEC)
    _, summary = reduced(step, SPEC, allow_incomplete=True)
    assert summary["added"] == len(make_references()) - len(make_references()[1::3])


def test_shards_of_other_encoders_are_refused(place, reduced):
    references = make_references({"cat": 6})
    narrow = [dataclasses.replace(r, visual=r.visual[:5]) for r in references[1::3]]
    mixed = list(references)
    mixed[1::3] = narrow
    with pytest.raises(InputError, match=r"widths \(5, 8\), the shards before it \(12, 8\)"):
        reduced(place(mixed), SPEC)


def test_growing_keeps_ids_and_equals_building_at_once(place, reduced):
    old = place(make_references(seed=0), run=0)
    new = place(make_references({"cat": 9, "owl": 12}, seed=1), run=1)
    at_once, _ = reduced([old, new], SPEC, "at_once")
    grown, first = reduced(old, SPEC, "grown")
    with ReferenceCollection.open(grown) as collection:
        rows_before = collection.rows(range(len(collection)))
    _, second = reduced(
        new, SPEC, "grown", base=Store.open(str(grown)), licences=("MIT", "CC-BY-4.0")
    )
    assert (first["added"], second["added"]) == (118, 21)
    with (
        ReferenceCollection.open(grown, verify="full") as left,
        ReferenceCollection.open(at_once, verify="full") as right,
    ):
        assert left.rows(range(118)) == rows_before
        assert left.rows(range(139)) == right.rows(range(139))
        np.testing.assert_array_equal(left.visual, right.visual)
        np.testing.assert_array_equal(left.textual, right.textual)
        names = ["cat", "owl", "lion"]
        np.testing.assert_array_equal(
            left.prototypes(names).vectors_nkd, right.prototypes(names).vectors_nkd
        )
        assert left.manifest.licences == ("CC-BY-4.0", "MIT")
        assert [entry["step"] for entry in left.manifest.build["inputs"]] == ["references"] * 2


@pytest.fixture
def small_parts(monkeypatch):
    """Inverted files, partitions and tasks that a hundred references fill several of."""
    monkeypatch.setattr("ovref.reduce.indexing.choose_index", lambda n, dim: "IVF4,SQfp16")
    monkeypatch.setattr("ovref.reduce.indexing.training_rows", lambda n, factory: (60, 100))
    monkeypatch.setattr("ovref.reduce.indexing.PART_ROWS", 32)
    monkeypatch.setattr("ovref.reduce.ivf.BLOCK", 16)
    monkeypatch.setattr("ovref.reduce.by_noun.SPAN_ROWS", 30)
    monkeypatch.setattr("ovref.reduce.by_noun.PARTITION_BYTES", 40 * 12 * 2)
    monkeypatch.setattr("ovref.reduce.noun_prototypes.NOUNS_A_TASK", 2)


def test_spread_over_tasks_in_any_order_gives_equal_bytes(place, reduced, small_parts, tmp_path):
    step = place(make_references())
    tasks_of = []

    def counted(tasks):
        tasks_of.append(len(tasks))
        return in_any_order(tasks)

    one, first = reduced(step, SPEC, "one")
    many, second = reduced(step, SPEC, "many", run_tasks=counted)
    assert first == second
    assert content(one) == content(many)
    # Training, parts, merging; neighbours, spans, partitions, clusters; tuning.
    assert tasks_of == [2, 8, 2, 1, 4, 3, 3, 2]
    assert not (tmp_path / "many_work" / second["fingerprint"][:16]).exists()


def test_parts_do_not_change_prototypes(place, reduced, request):
    step = place(make_references())
    whole, _ = reduced(step, SPEC, "whole")
    request.getfixturevalue("small_parts")
    parts, summary = reduced(step, SPEC, "parts")
    for name in ("prototypes.f16.npy", "nouns.parquet"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()
    assert summary["index"]["visual"]["train_rows"] == 60


@pytest.mark.parametrize("deleted", [[], [3, 4, 5]])
def test_growing_does_only_what_is_new_and_gives_the_bytes_of_building_at_once(
    place, reduced, small_parts, monkeypatch, deleted
):
    old = place(make_references(seed=0), run=0)
    new = place(make_references({"cat": 9, "owl": 12}, seed=1), run=1)
    at_once, whole = reduced([old, new], SPEC, "at_once")
    grown, _ = reduced(old, SPEC, "grown")
    with ReferenceCollection.open(grown) as collection:
        gone = {row["noun"] for row in collection.rows(deleted)}
    for target in (at_once, grown):
        if deleted:
            collections.tombstone(str(target), deleted, "opt-out")
    if deleted:  # applied by growing with nothing new
        _, whole = reduced([old, new], SPEC, "at_once", base=Store.open(str(at_once)))
    encoded = []
    monkeypatch.setattr(
        "ovref.reduce.noun_prototypes.class_embeddings",
        lambda texts, nouns, templates: (
            encoded.extend(nouns), class_embeddings(texts, nouns, templates)
        )[1],
    )  # fmt: skip
    started = []

    def watched(tasks):
        started.extend(task.func.__name__ for task in tasks)
        return in_process(tasks)

    _, summary = reduced(new, SPEC, "grown", base=Store.open(str(grown)), run_tasks=watched)
    assert encoded == ["owl"]
    # Of 118 old rows 112 are whole blocks: 6 old rows and 21 new ones are one part of each kind.
    assert (started.count("_old_part"), started.count("_part")) == (2, 2)
    with ReferenceCollection.open(grown) as collection:
        touched = {"cat", "owl", "lion"} | gone  # a lion takes in cats
        assert set(collection.nouns) - touched
    assert summary["nouns_clustered"] == len(touched)
    published = [collections.read_manifest(str(target)) for target in (grown, at_once)]
    for role in ("visual_index", "textual_index", "prototypes", "nouns", "visual", "references"):
        left, right = (
            (target / manifest.files[role].path).read_bytes()
            for target, manifest in zip((grown, at_once), published, strict=True)
        )
        assert left == right, role
    assert summary["index"] == whole["index"]


def test_other_settings_of_prototypes_make_all_of_them_anew(place, reduced):
    step = place(make_references())
    target, _ = reduced(step, SPEC)
    other = dataclasses.replace(SPEC, prototypes=PrototypeConfig(k=2, min_references=8))
    _, summary = reduced(step, other, base=Store.open(str(target)))
    assert summary["nouns_clustered"] == 5


def test_growing_takes_only_new_shards_and_twice_is_once(place, reduced):
    references = make_references()
    step = place(references, order=[0, 2], finish=False)
    target, _ = reduced(step, SPEC, allow_incomplete=True)
    step = place(references)
    base = Store.open(str(target))
    _, second = reduced(step, SPEC, base=base)
    assert second["added"] == len(references[1::3])
    before = content(target)
    _, third = reduced(step, SPEC, base=base)
    assert third["added"] == 0
    assert content(target) == before
    with ReferenceCollection.open(target) as collection:
        keys = [row["key"] for row in collection.rows(range(len(references)))]
    assert keys == [r.key for r in [*references[0::3], *references[2::3], *references[1::3]]]


def test_growing_killed_between_files_and_manifest_keeps_the_old_collection(
    place, reduced, monkeypatch
):
    old, new = place(make_references(), run=0), place(make_references(seed=1), run=1)
    target, _ = reduced(old, SPEC)
    base = Store.open(str(target))
    with monkeypatch.context() as patch:
        die_in(patch, "ovref_inference.collection.store._commit", 0)
        with pytest.raises(KeyboardInterrupt):
            reduced(new, SPEC, base=base)
    assert len(ReferenceCollection.open(target, verify="full")) == 118
    reduced(new, SPEC, base=base)
    assert len(ReferenceCollection.open(target, verify="full")) == 236


def test_growing_keeps_tombstones_and_leaves_them_out_of_prototypes(place, reduced):
    old, new = place(make_references(), run=0), place(make_references({"owl": 20}, seed=1), run=1)
    target, _ = reduced(old, SPEC)
    with ReferenceCollection.open(target) as collection:
        deleted = collection.references_of("boat")[:35].tolist()
    collections.tombstone(str(target), deleted, "opt-out")
    reduced(new, SPEC, base=Store.open(str(target)))
    with ReferenceCollection.open(target) as collection:
        assert len(collection) == 118 + 20 - 35
        row = collection.nouns.index("boat")
        ((stored, _),) = collection._stored([row])
        ((fresh, used),) = collection._fresh(
            [row], collection.noun_embeddings[[row]], collection.prototype_config
        )
        np.testing.assert_allclose(stored, fresh, atol=1e-3)
        assert len(used) > 1  # 5 of 40 are left: rare now
        assert collection._nouns.neighbours(row) == used[1:]


def test_a_collection_made_anew_does_not_bring_back_what_was_deleted(place, reduced):
    step = place(make_references())
    target, _ = reduced(step, SPEC)
    base = Store.open(str(target))
    collections.tombstone(str(target), [0, 1, 2], "opt-out")
    other = ReduceSpec(prototypes=PrototypeConfig(k=2, min_references=8))
    before = content(target)
    with pytest.raises(MismatchError, match=f"3 deleted references, .* base={target}"):
        reduced(step, other, replace=True)
    assert content(target) == before
    reduced(step, other, base=base, replace=True)
    assert collections.read_manifest(str(target)).settled_tombstones == 3
    (target / "collection.json").unlink()  # or else on purpose
    reduced(step, other, replace=True)
    assert collections.read_manifest(str(target)).settled_tombstones == 0


def test_growing_by_nothing_settles_tombstones_and_changes_prototypes(place, reduced):
    step = place(make_references())
    target, _ = reduced(step, SPEC)
    base = Store.open(str(target))
    collections.tombstone(str(target), [0, 1, 2], "opt-out")
    assert collections.read_manifest(str(target)).settled_tombstones == 0
    _, summary = reduced(step, SPEC, base=base)
    assert summary["added"] == 0
    assert collections.read_manifest(str(target)).settled_tombstones == 3
    before = content(target)
    reduced(step, SPEC, base=base)
    assert content(target) == before
    reduced(step, ReduceSpec(prototypes=PrototypeConfig(k=2, min_references=8)), base=base)
    with ReferenceCollection.open(target) as collection:
        assert len(collection) == 118 - 3
        assert collection.prototypes(["boat"]).counts.tolist() == [2]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"visual": VisualEncoderConfig(model="another")}, "visual"),
        ({"text": TextEncoderConfig(model="another")}, "text"),
        ({"templates": ("a {}",)}, "templates"),
        ({"weights": (1.0, 0.0)}, "weights"),
        ({"part": "background"}, "part"),
    ],
)
def test_embeddings_of_other_encoders_are_refused(place, tmp_path, change, field):
    other = dataclasses.replace(EMBED, **change)
    step, collection = place(make_references()), tmp_path / "collection"
    with pytest.raises(MismatchError, match=f"other settings: {field} was"):
        reduce_into(collection, step, SPEC, embed=other)
    reduce_into(collection, step, SPEC)
    others = commit_step(tmp_path / "others", make_references(seed=1), embed=other)
    with pytest.raises(MismatchError, match=r"cannot be grown.*" + field):
        reduce_into(tmp_path / "new", others, SPEC, embed=other, base=Store.open(str(collection)))


def test_a_collection_of_regions_does_not_grow_by_backgrounds(place, reduced, tmp_path):
    target, _ = reduced(place(make_references()), SPEC)
    before, around = content(target), dataclasses.replace(EMBED, part="background")
    others = commit_step(tmp_path / "others", make_references(seed=1), embed=around)
    with pytest.raises(MismatchError, match=r"its part is region, theirs is background"):
        reduce_into(target, others, SPEC, embed=around, base=Store.open(str(target)))
    assert content(target) == before


def test_a_step_that_holds_no_references_is_refused(tmp_path):
    step = open_step(Store.open(str(tmp_path)), "images", {"stages": [{"name": "synthesize"}]})
    with pytest.raises(MismatchError, match="holds no references"):
        reduce_into(tmp_path / "collection", step, SPEC)


def test_progress_is_reported_for_every_phase(place, reduced):
    events = []
    reduced(place(make_references()), SPEC, report=lambda *event: events.append(event))
    last = {phase: (done, total) for phase, done, total in events}
    assert list(last) == ["gather", "filter", "index", "prototypes", "tune", "publish"]
    assert all(done == total for done, total in last.values())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ReduceSpec(index_recall=0.0), "index_recall"),
        (lambda: FilterSpec(min_area=0.5, max_area=0.1), "min_area"),
        (lambda: FilterSpec(max_area=1.5), "max_area"),
        (lambda: FilterSpec(min_noun_agreement=2.0), "min_noun_agreement"),
        (lambda: FilterSpec(duplicate_cosine=-1.0), "duplicate_cosine"),
        (lambda: FilterSpec(agreement_neighbours=0), "agreement_neighbours"),
    ],
)
def test_values_out_of_range_name_the_field(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_reducing_needs_no_torch():
    code = "import sys, ovref.reduce; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_two_reductions_in_one_folder_take_turns(undisturbed, tmp_path, monkeypatch):
    """The same build was started twice by accident."""
    monkeypatch.setattr("ovref.reduce.phases.WAIT_SECONDS", 0.01)
    step, files, summary = undisturbed
    target, begun, waited = tmp_path / "collection", Event(), Event()

    def first_tells(phase, done, total):
        begun.set()
        waited.wait(20)  # in the midst of gathering

    def second_tells(phase, done, total):
        assert phase.startswith("waiting for another process")
        waited.set()

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(reduce_into, target, step, SPEC, report=first_tells)
        assert begun.wait(20)
        assert reduce_into(target, step, SPEC, report=second_tells) == summary
        assert first.result() == summary
    assert waited.is_set() and content(target) == files
    assert [path.name[16:] for path in (tmp_path / "collection_work").iterdir()] == [
        "-dropped.parquet"
    ]


def test_a_file_system_without_locks_is_said(undisturbed, tmp_path, monkeypatch):
    def without(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", without)
    with pytest.raises(StorageError, match=r"no locks .*choose a `work` folder on another"):
        reduce_into(tmp_path / "collection", undisturbed[0], SPEC)


def test_the_work_folder_may_be_lost(undisturbed, tmp_path, monkeypatch):
    step, files, _ = undisturbed
    with monkeypatch.context() as patch:
        die_in(patch, "ovref_inference.collection.store._put", 4)
        with pytest.raises(KeyboardInterrupt):
            reduce_into(tmp_path / "collection", step, SPEC)
    shutil.rmtree(tmp_path / "collection_work")
    reduce_into(tmp_path / "collection", step, SPEC)
    assert content(tmp_path / "collection") == files


def test_a_collection_is_made_and_grown_on_s3(undisturbed, tmp_path, monkeypatch, s3_endpoint):
    step, files, summary = undisturbed
    options = {"endpoint_url": s3_endpoint, "key": "testing", "secret": "testing"}
    output = Store.open("s3://bucket/collections/one", **options)
    monkeypatch.setenv("OVREF_CACHE", str(tmp_path / "cache"))
    work = tmp_path / "work"

    def run(step, **more):
        return reduce_collection(
            step, SPEC, embed=EMBED, texts=FakeTexts(), output=output, work=work,
            licences=("CC-BY-4.0",), **more,
        )  # fmt: skip

    with monkeypatch.context() as patch:
        die_in(patch, "ovref_inference.collection.store._put", 5)
        with pytest.raises(KeyboardInterrupt):
            run(step)
    assert not output.exists("collection.json")
    assert run(step) == summary == run(step)
    assert {name: output.read(name) for name in output.list()} == files
    new = commit_step(tmp_path / "new", make_references({"owl": 11}, seed=1), run=1)
    assert run(new, base=output)["added"] == 11
    with ReferenceCollection.open(output.url, storage_options=options) as collection:
        assert len(collection) == 118 + 11
        assert "owl" in collection.nouns
