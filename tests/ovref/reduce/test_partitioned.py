"""A partitioned collection holds what an undivided one would, whoever makes it and however often
they are killed."""

import json
import pickle
import random
import secrets

import numpy as np
import pytest
from reduce_fakes import EMBED, FakeTexts, commit_step, direction, make_references, reduce_into
from test_run import die_in

from ovref.errors import InputError, MismatchError, StorageError
from ovref.reduce import FilterSpec, ReduceSpec, reduce_collection
from ovref.reduce.partition_tree import read_tree
from ovref.storage.file_store import Store
from ovref_inference.collection import format as fmt
from ovref_inference.collection import store as collections
from ovref_inference.collection.prototypes import PrototypeConfig
from ovref_inference.collection.reference_collection import ReferenceCollection

COUNTS = {
    "boat": 40, "bridge": 12, "cat": 30, "dog": 25, "fox": 18, "lamp": 9, "lion": 3, "owl": 6,
    "rock": 22, "sofa": 14, "tree": 20, "van": 31,
}  # fmt: skip
ALL = sum(COUNTS.values())
MOST = 90
PROTOTYPES = PrototypeConfig(k=4, min_references=8, neighbours=2)
UNDIVIDED = ReduceSpec(prototypes=PROTOTYPES)
SPEC = ReduceSpec(prototypes=PROTOTYPES, partition_references=MOST)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_both(tmp_path_factory.mktemp("made"))


def make_both(folder):
    """A step, its undivided and its partitioned collection, and the latter's summary."""
    step = commit_step(folder, make_references(COUNTS))
    reduce_into(folder / "undivided", step, UNDIVIDED)
    summary = reduce_into(folder / "partitioned", step, SPEC)
    return step, folder / "undivided", folder / "partitioned", summary


def content(folder):
    """File -> bytes of everything at the place of a collection."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def manifest_of(folder):
    return fmt.parse_manifest((folder / "collection.json").read_bytes(), str(folder))


def partitions(folder):
    """The partitions, each opened alone, all files verified."""
    return [
        ReferenceCollection.open(folder / part.path, verify="full")
        for part in manifest_of(folder).partitions
    ]


def rows_of(collection):
    """Key -> row without its id, and both embeddings."""
    found = {}
    for row in collection.rows(range(len(collection.visual))):
        at = row.pop("id")
        found[row["key"]] = row, collection.visual[at].tolist(), collection.textual[at].tolist()
    return found


def every_row(folder):
    return {key: row for part in partitions(folder) for key, row in rows_of(part).items()}


def in_any_order(tasks):
    """Runs tasks as workers elsewhere may: shuffled, one of them twice, after pickling."""
    tasks = pickle.loads(pickle.dumps(list(tasks)))
    order = list(range(len(tasks)))
    random.Random(len(tasks)).shuffle(order)
    results = {number: tasks[number]() for number in [*order, *order[:1]]}
    return iter([results[number] for number in range(len(tasks))])


def test_partitions_hold_the_references_of_the_undivided_collection(made):
    _, undivided, partitioned, summary = made
    opened, parts = ReferenceCollection.open(undivided), partitions(partitioned)
    assert every_row(partitioned) == rows_of(opened)
    nouns = [noun for part in parts for noun in part.nouns]
    assert sorted(nouns) == opened.nouns == sorted(COUNTS)
    sizes = [len(part) for part in parts]
    assert max(sizes) <= MOST and len(parts) < 2.5 * ALL / MOST
    manifest = manifest_of(partitioned)
    assert manifest.counts["references"] == sum(sizes) == ALL
    assert [(p.references, p.nouns) for p in manifest.partitions] == [
        (len(part), len(part.nouns)) for part in parts
    ]
    for part, info in zip(parts, manifest.partitions, strict=True):
        assert part.manifest.fingerprint == info.fingerprint
        # In the order of the shards, as in the undivided collection.
        keys = [row["key"] for row in part.rows(range(len(part)))]
        whole = [row["key"] for row in opened.rows(range(ALL)) if row["key"] in set(keys)]
        assert keys == whole
    assert (summary["partitions"], summary["largest_partition"]) == (len(parts), max(sizes))
    assert not (partitioned / "_scatter").exists()


def test_its_manifest_says_what_that_of_the_undivided_one_says(made):
    _, undivided, partitioned, summary = made
    left, right = manifest_of(undivided), manifest_of(partitioned)
    for name in ("visual", "textual", "templates", "weights", "prototypes", "licences"):
        assert getattr(left, name) == getattr(right, name)
    for name in ("inputs", "embed", "provenance"):
        assert left.build[name] == right.build[name]
    whole = left.build["summary"]
    for name in (
        "references", "added", "dropped_before", "filter", "nouns", "rare_nouns", "most_frequent",
        "least_frequent", "prototypes",
    ):  # fmt: skip
        assert summary[name] == whole[name], name
    assert right.counts == left.counts
    assert all(manifest_of(partitioned / part.path).licences == left.licences
               for part in right.partitions)  # fmt: skip


def test_nouns_have_the_same_prototypes(made):
    _, undivided, partitioned, _ = made
    opened = ReferenceCollection.open(undivided)
    for part in partitions(partitioned):
        rows = [row for row, count in enumerate(part.noun_counts) if count >= PROTOTYPES.needed]
        names = [part.nouns[row] for row in rows]
        np.testing.assert_array_equal(
            part.prototypes(names).vectors_nkd, opened.prototypes(names).vectors_nkd
        )
        at = [opened.nouns.index(noun) for noun in part.nouns]
        np.testing.assert_array_equal(part.noun_embeddings, opened.noun_embeddings[at])
    with ReferenceCollection.open(partitioned) as whole:  # rare nouns borrow in their partition
        for part in partitions(partitioned):
            left, right = (one.prototypes(part.nouns) for one in (whole, part))
            assert left.nouns == right.nouns
            np.testing.assert_array_equal(left.vectors_nkd, right.vectors_nkd)
        assert any(len(used) > 1 for used in whole.prototypes(sorted(COUNTS)).nouns)


@pytest.mark.parametrize("kind", ["text", "regions"])
def test_searching_it_finds_what_searching_the_undivided_collection_finds(made, kind):
    """Indexes of so few references are exact."""
    _, undivided, partitioned, _ = made
    dim = 8 if kind == "text" else 12
    queries = np.stack([direction(noun, dim) for noun in COUNTS])
    found = []
    for folder in (undivided, partitioned):
        with ReferenceCollection.open(folder) as opened:
            support = getattr(opened, f"search_{kind}")(queries, 7)
            keys = [[row["key"] for row in opened.rows(ids)] for ids in support.ids]
            found.append((keys, support.scores))
    assert found[0][0] == found[1][0]
    np.testing.assert_allclose(found[0][1], found[1][1], atol=1e-6)


def test_one_partition_is_the_undivided_collection(made, tmp_path):
    step, undivided, _, _ = made
    spec = ReduceSpec(prototypes=PROTOTYPES, partition_references=ALL)
    assert reduce_into(tmp_path / "one", step, spec)["partitions"] == 1
    left = content(undivided)
    right = content(tmp_path / "one" / manifest_of(tmp_path / "one").partitions[0].path)
    for files in (left, right):
        files.pop("collection.json")
    assert left == right


@pytest.mark.parametrize(
    ("counts", "most", "sizes"),
    [
        ({"cat": 90, "dog": 5, "owl": 6}, 20, [5, 6, 90]),
        ({"cat": 7}, 3, [7]),
        ({"cat": 20, "dog": 30}, 1, [20, 30]),
    ],
    ids=["one noun larger than a partition", "one noun", "fewer nouns than partitions"],
)
def test_a_noun_is_never_divided(place, reduced, counts, most, sizes):
    spec = ReduceSpec(prototypes=PROTOTYPES, partition_references=most)
    target, summary = reduced(place(make_references(counts)), spec)
    assert sorted(map(len, partitions(target))) == sorted(sizes) or most == 20
    assert sum(map(len, partitions(target))) == sum(counts.values())
    assert summary["largest_partition"] == max(sizes)


def test_several_steps_and_empty_shards(made, tmp_path):
    few = commit_step(tmp_path / "few", make_references({"elk": 2}, seed=3), shards=4, run=1)
    target = tmp_path / "collection"
    summary = reduce_into(target, [made[0], few], SPEC)
    assert summary["references"] == ALL + 2
    shards = {row[0]["shard"].partition("/")[0] for row in every_row(target).values()}
    assert shards == {made[0].fingerprint[:12], few.fingerprint[:12]}


def test_any_order_and_any_grouping_of_tasks_give_the_same_bytes(made, tmp_path, monkeypatch):
    step, _, partitioned, summary = made
    monkeypatch.setattr("ovref.reduce.scatter.GROUP_ROWS", 50)
    monkeypatch.setattr("ovref.reduce.partitioned.NOUNS_A_TASK", 5)
    tasks_of, phases = [], {}

    def counted(tasks):
        tasks_of.append(len(tasks))
        return in_any_order(tasks)

    def report(phase, done, total):
        phases.setdefault(phase, []).append((done, total))

    target = tmp_path / "collection"
    assert reduce_into(target, step, SPEC, run_tasks=counted, report=report) == summary
    assert content(target) == content(partitioned)
    parts = summary["partitions"]
    assert tasks_of == [3, 3, 1, 3, parts]
    assert list(phases) == ["counts", "nouns", "plan", "scattered", "partitions", "publish"]
    assert phases["partitions"] == [(n + 1, parts) for n in range(parts)]
    assert reduce_into(target, step, SPEC, run_tasks=lambda tasks: 1 / 0) == summary


KILLS = {
    "second count": ("ovref.reduce.scatter.TableFile.write", 1),
    "encoding": ("ovref.reduce.scatter.class_embeddings", 4),
    "marker of the plan": ("ovref.storage.steps.json_bytes", 7),
    "second group scattered": ("ovref.reduce.scatter._in_parts", 2),
    "third partition": ("ovref.reduce.run.build_prototypes", 2),
    "upload of a partition": ("ovref_inference.collection.store._put", 12),
    "manifest": ("ovref.reduce.partitioned.collections.publish_partitioned", 0),
    "cleaning": ("ovref.reduce.partitioned.remove_leftovers", 0),
    "deleting": ("ovref.storage.file_store.Store.delete_folder", 0),
}
"""Where a reduction dies: in this function, after so many calls of it."""


@pytest.mark.parametrize("where", KILLS)
def test_killed_anywhere_it_goes_on_and_ends_in_the_same_bytes(made, tmp_path, monkeypatch, where):
    step, _, partitioned, summary = made
    monkeypatch.setattr("ovref.reduce.scatter.GROUP_ROWS", 50)
    target = tmp_path / "collection"
    with monkeypatch.context() as patch:
        die_in(patch, *KILLS[where])
        with pytest.raises(KeyboardInterrupt):
            reduce_into(target, step, SPEC)
    started = []

    def watched(tasks):
        for task in tasks:
            started.append(task.func.__name__)
            yield task()

    assert reduce_into(target, step, SPEC, run_tasks=watched) == summary
    assert content(target) == content(partitioned)
    assert {path.suffix for path in (tmp_path / "collection_work").iterdir()} <= {".parquet"}
    if where == "third partition":  # what was committed is not made again
        assert set(started) == {"reduce_leaf"}


def test_damaged_and_changed_shards_are_said(place, tmp_path):
    step = place(make_references(COUNTS))
    name = step.required("00001").files["parquet"].name
    whole = step.store.read(name)
    step.store.write(name, whole[:-100])
    with pytest.raises(StorageError, match=r"is not what was committed.*Parquet"):
        reduce_into(tmp_path / "collection", step, SPEC)
    other = commit_step(tmp_path / "other", make_references({"elk": 30}))
    step.store.write(name, other.store.read(other.required("00001").files["parquet"].name))
    with pytest.raises(StorageError, match=r"is not what was committed.*SHA-256"):
        reduce_into(tmp_path / "collection", step, SPEC)


def test_no_references_and_filters_that_leave_none(place, tmp_path):
    with pytest.raises(InputError, match="expected references, found none"):
        reduce_into(tmp_path / "none", place([], run=1), SPEC)
    strict = ReduceSpec(partition_references=MOST, filter=FilterSpec(min_score=2.0))
    with pytest.raises(InputError, match=r"leave none .*'before': 230.*relax the thresholds"):
        reduce_into(tmp_path / "strict", place(make_references(COUNTS)), strict)
    assert not (tmp_path / "strict" / "collection.json").exists()


def with_low_scores(references, *nouns):
    for reference in references:
        if reference.noun.text in nouns:
            object.__setattr__(reference, "score", 0.0)
        else:
            object.__setattr__(reference, "score", 1.0)
    return references


def test_a_leaf_without_references_becomes_a_partition_when_some_come(place, reduced):
    spec = ReduceSpec(
        prototypes=PROTOTYPES, partition_references=1, filter=FilterSpec(min_score=0.5)
    )
    references = with_low_scores(make_references({"cat": 12, "dog": 9, "owl": 10}), "dog")
    target, summary = reduced(place(references), spec)
    assert (summary["partitions"], summary["references"]) == (2, 22)
    assert summary["filter"][-1] == {"filter": "score", "before": 31, "after": 22}
    lost = {"nouns": 1, "references": 9, "most_frequent": [["dog", 9]]}
    assert summary["lost_nouns"] == lost
    before = manifest_of(target).partitions
    new = with_low_scores(make_references({"dog": 8}, seed=1))
    _, summary = reduced(place(new, run=1), spec, base=Store.open(str(target)))
    assert (summary["added"], summary["partitions_made"]) == (8, 1)
    after = manifest_of(target).partitions
    assert after[:2] == before and (after[2].references, after[2].nouns) == (8, 1)


def test_growing_makes_only_partitions_again_that_got_references(made, place, reduced):
    step, _, _, _ = made
    target, _ = reduced(step, SPEC, "grown")
    before, rows = manifest_of(target), every_row(target)
    number = next(n for n, part in enumerate(partitions(target)) if "fox" in part.nouns)
    new = place(make_references({"fox": 5}, seed=1), run=1)
    started = []

    def watched(tasks):
        for task in tasks:
            started.append(task.func.__name__)
            yield task()

    grow = {"base": Store.open(str(target)), "run_tasks": watched}
    _, summary = reduced(new, SPEC, "grown", **grow)
    assert started.count("reduce_leaf") == 1 and "encode_nouns" not in started
    assert (summary["added"], summary["references"], summary["partitions_made"]) == (5, ALL + 5, 1)
    after = manifest_of(target)
    changed = [old != new for old, new in zip(before.partitions, after.partitions, strict=True)]
    assert changed == [at == number for at in range(len(changed))]
    grown = partitions(target)[number]
    assert len(grown) == before.partitions[number].references + 5
    found = every_row(target)
    assert {key: found[key] for key in rows} == rows
    assert not (target / before.partitions[number].path).exists()
    assert len(after.build["inputs"]) == 2 and after.build["base"] == before.fingerprint
    # Twice is once, and nothing new changes nothing.
    once = content(target)
    assert reduced(new, SPEC, "grown", **grow)[1]["added"] == 0
    assert content(target) == once
    # As the partition would have grown by itself.
    base = Store.open(str(made[2] / before.partitions[number].path))
    alone, _ = reduced(new, UNDIVIDED, "alone", base=base)
    left, right = (content(folder) for folder in (alone, target / after.partitions[number].path))
    for files in (left, right):
        files.pop("collection.json")
    assert left == right


def test_new_nouns_go_where_their_neighbours_are(made, place, reduced):
    target, _ = reduced(made[0], SPEC, "grown")
    manifest = manifest_of(target)
    path = target / manifest.files["partition_tree"].path
    tree = read_tree(path, "tree")
    texts = FakeTexts()
    new = ["elk", "kite", "pear", "zebra"]
    reduced(place(make_references(dict.fromkeys(new, 4), seed=2), run=1), SPEC, "grown",
            base=Store.open(str(target)))  # fmt: skip
    parts = partitions(target)
    for noun in new:
        mean = sum(texts.encode([t.format(noun)])[0] for t in manifest.templates)
        number = tree.partitions[tree.leaf_of((mean / np.linalg.norm(mean)).astype(np.float32))]
        assert noun in parts[number].nouns


def test_deletions_stay_and_are_applied_where_they_are(made, place, reduced):
    target, _ = reduced(made[0], SPEC, "grown")
    before = manifest_of(target)
    number = next(n for n, part in enumerate(partitions(target)) if "van" in part.nouns)
    part = target / before.partitions[number].path
    with ReferenceCollection.open(part) as opened:
        ids = opened.ids_of(nouns=["van"])[:5].tolist()
    collections.tombstone(str(part), ids, "opt-out")
    with pytest.raises(MismatchError, match="5 deleted references, which a new collection would"):
        reduced(place(make_references({"elk": 3}), run=2), SPEC, "grown", replace=True)
    _, summary = reduced([], SPEC, "grown", base=Store.open(str(target)))
    assert (summary["added"], summary["partitions_made"]) == (0, 1)
    after = manifest_of(target)
    assert after.counts["tombstones"] == 5
    assert [p for p in before.partitions if p not in after.partitions] == [
        before.partitions[number]
    ]
    with ReferenceCollection.open(target / after.partitions[number].path) as opened:
        assert len(opened) == before.partitions[number].references - 5
        assert opened.manifest.settled_tombstones == 5


def test_deleted_while_it_grows_is_noticed(made, place, reduced, monkeypatch):
    target, _ = reduced(made[0], SPEC, "grown")
    part = str(target / manifest_of(target).partitions[0].path)
    new = place(make_references({"fox": 5}, seed=1), run=1)

    def meanwhile(tasks):
        for task in tasks:
            yield task()
            if task.func.__name__ == "reduce_leaf":
                collections.tombstone(part, [0], "opt-out")

    grow = {"base": Store.open(str(target))}
    with pytest.raises(MismatchError, match="was changed while this collection was made"):
        reduced(new, SPEC, "grown", run_tasks=meanwhile, **grow)
    assert reduced(new, SPEC, "grown", **grow)[1]["added"] == 5
    assert manifest_of(target).counts["tombstones"] == 1


def test_growing_elsewhere_copies_what_does_not_change(made, place, reduced):
    _, _, partitioned, _ = made
    before = content(partitioned)
    new = place(make_references({"fox": 5}, seed=1), run=1)
    started = []

    def watched(tasks):
        started.extend(task.func.__name__ for task in tasks)
        return in_any_order(tasks)

    base = Store.open(str(partitioned))
    target, summary = reduced(new, SPEC, "elsewhere", base=base, run_tasks=watched)
    assert content(partitioned) == before
    assert started.count("copy_partition") == summary["partitions"] - 1
    same = [p for p in manifest_of(target).partitions if p in manifest_of(partitioned).partitions]
    assert len(same) == summary["partitions"] - 1
    for part in same:
        assert content(target / part.path) == content(partitioned / part.path)
    assert len(every_row(target)) == ALL + 5
    in_place, _ = reduced(made[0], SPEC, "in_place")
    reduced(new, SPEC, "in_place", base=Store.open(str(in_place)))
    assert content(in_place) == content(target)


def test_other_settings_make_all_partitions_again(made, reduced):
    target, summary = reduced(made[0], SPEC, "grown")
    other = ReduceSpec(
        prototypes=PrototypeConfig(k=2, min_references=8, neighbours=2), partition_references=MOST
    )
    _, again = reduced([], other, "grown", base=Store.open(str(target)))
    assert again["partitions_made"] == summary["partitions"]
    assert all(part.prototype_config.k == 2 for part in partitions(target))


def test_undivided_and_partitioned_do_not_replace_each_other_unasked(made, reduced):
    step, undivided, partitioned, _ = made
    target, _ = reduced(step, UNDIVIDED, "changing")
    with pytest.raises(MismatchError, match=r"holds one undivided .* would be a partitioned.*set"):
        reduced(step, SPEC, "changing")
    reduced(step, SPEC, "changing", replace=True)
    assert content(target) == content(partitioned)
    with pytest.raises(MismatchError, match=r"holds a partitioned .* would be one undivided"):
        reduced(step, UNDIVIDED, "changing")
    reduced(step, UNDIVIDED, "changing", replace=True)
    assert content(target) == content(undivided)


def test_growing_does_not_change_the_kind(made, place, reduced):
    new = place(make_references({"fox": 5}, seed=1), run=1)
    _, undivided, partitioned, _ = made
    with pytest.raises(MismatchError, match=r"one undivided .* convert .*references 90"):
        reduced(new, SPEC, "a", base=Store.open(str(undivided)))
    for spec in (UNDIVIDED, ReduceSpec(partition_references=MOST + 1)):
        with pytest.raises(MismatchError, match=r"set reduce.partition_references=90 .*found"):
            reduced(new, spec, "b", base=Store.open(str(partitioned)))


def test_embeddings_in_int8(made, reduced):
    spec = ReduceSpec(prototypes=PROTOTYPES, partition_references=MOST, embeddings="int8")
    target, _ = reduced(made[0], spec, "int8")
    assert json.loads((target / "collection.json").read_bytes())["embeddings"] == "int8"
    assert {part.manifest.embeddings for part in partitions(target)} == {"int8"}


def test_a_size_out_of_range_names_the_field():
    with pytest.raises(ValueError, match="partition_references"):
        ReduceSpec(partition_references=0)


def test_made_and_grown_on_s3_without_a_shared_folder(made, tmp_path, s3_endpoint, monkeypatch):
    step, _, partitioned, summary = made
    monkeypatch.setenv("OVREF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("ovref.reduce.scatter.GROUP_ROWS", 100)
    options = {"endpoint_url": s3_endpoint, "key": "testing", "secret": "testing"}
    output = Store.open(f"s3://bucket/{secrets.token_hex(4)}", **options)

    def run(steps, **more):
        work = tmp_path / secrets.token_hex(4)
        return reduce_collection(
            steps, SPEC, embed=EMBED, texts=FakeTexts(), output=output, work=work,
            licences=("CC-BY-4.0",), run_tasks=in_any_order, **more,
        )  # fmt: skip

    with monkeypatch.context() as patch:
        die_in(patch, "ovref_inference.collection.store._put", 12)
        with pytest.raises(KeyboardInterrupt):
            run(step)
    assert not output.exists("collection.json")
    assert run(step) == summary
    assert {path: output.read(path) for path in output.list()} == content(partitioned)
    new = commit_step(tmp_path / "new", make_references({"fox": 5}, seed=1), run=1)
    assert run(new, base=output)["added"] == 5
    assert not (tmp_path / "cache").exists()  # nothing of a partition stays on a worker
