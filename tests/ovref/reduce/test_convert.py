"""A converted collection is what a partitioned reduction of its shards is, whoever makes it and
however often they are killed."""

import dataclasses
import json
import secrets
import shutil

import numpy as np
import pytest
from reduce_fakes import EMBED, commit_step, make_references, reduce_into
from test_norms import KEPT, norms_of, with_norms
from test_partitioned import (
    ALL,
    COUNTS,
    MOST,
    PROTOTYPES,
    SPEC,
    UNDIVIDED,
    content,
    every_row,
    in_any_order,
    make_both,
    manifest_of,
    partitions,
    rows_of,
)
from test_run import die_in

from hub_server import Hub
from ovref.errors import CollectionError, ConfigError, InputError, MismatchError
from ovref.reduce import FilterSpec, ReduceSpec
from ovref.reduce.compact import compact
from ovref.reduce.convert import convert_collection
from ovref.reduce.grow import check_same_encoders
from ovref.reduce.made_from import made_by
from ovref.reduce.published import read_published
from ovref.storage.file_store import Store
from ovref_inference.collection import format as fmt
from ovref_inference.collection import store as collections
from ovref_inference.collection.reference_collection import ReferenceCollection

OWN = {"fingerprint", "partitions"}
"""What of a manifest is another one; and of `build` also:"""
OF_BUILD = {"converted", "inputs"}


def convert(source, target, most=MOST, **options):
    """Converts into a folder; returns the summary."""
    work = target.with_name(f"{target.name}_work")
    return convert_collection(
        str(source), most, output=Store.open(str(target)), work=work, **options
    )


def data_of(folder):
    """Files of each partition in their order, and the tree: all but manifests."""
    found = [content(folder / part.path) for part in manifest_of(folder).partitions]
    for files in found:
        del files[fmt.MANIFEST]
    return found, (folder / manifest_of(folder).files["partition_tree"].path).read_bytes()


def comparable(manifest):
    """A manifest without what names the collection and its inputs."""
    tree = dataclasses.asdict(manifest)
    build = {name: value for name, value in tree["build"].items() if name not in OF_BUILD}
    return {name: value for name, value in tree.items() if name not in OWN} | {"build": build}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_both(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def converted(made, tmp_path_factory):
    """The converted collection, and its summary."""
    target = tmp_path_factory.mktemp("converted") / "collection"
    return target, convert(made[1], target)


def test_it_is_what_reducing_the_shards_gives(made, converted):
    _, undivided, partitioned, reduced = made
    target, summary = converted
    assert data_of(target) == data_of(partitioned)
    before, whole, wanted = map(manifest_of, (undivided, target, partitioned))
    assert comparable(whole) == comparable(wanted)
    assert whole.build["inputs"] == wanted.build["inputs"]
    assert whole.build["converted"] == {
        "from": before.fingerprint, "to": "partitions", "deleted": 0,
    }  # fmt: skip
    assert whole.fingerprint not in (wanted.fingerprint, before.fingerprint)
    for part, other in zip(whole.partitions, wanted.partitions, strict=True):
        found, expected = manifest_of(target / part.path), manifest_of(partitioned / other.path)
        assert comparable(found) == comparable(expected)
        assert (part.references, part.nouns) == (other.references, other.nouns)
    assert summary == {**reduced, "fingerprint": whole.fingerprint}
    assert summary["dropped_before"] == {"corrupt_image": 3, "empty_mask": 3}
    assert not (target / "_scatter").exists()
    assert not list(target.with_name("collection_work").iterdir())
    with ReferenceCollection.open(target, verify="full") as opened:
        assert len(opened) == ALL and opened.nouns == sorted(COUNTS)


def test_any_order_and_grouping_of_tasks_give_the_same_bytes(
    made, converted, tmp_path, monkeypatch
):
    monkeypatch.setattr("ovref.reduce.scatter.GROUP_ROWS", 47)
    monkeypatch.setattr("ovref.reduce.partitioned.NOUNS_A_TASK", 5)
    tasks_of, phases = [], {}

    def counted(tasks):
        tasks_of.append(len(tasks))
        return in_any_order(tasks)

    def report(phase, done, total):
        phases[phase] = (done, total)

    target, summary = tmp_path / "collection", converted[1]
    assert convert(made[1], target, run_tasks=counted, report=report) == summary
    assert content(target) == content(converted[0])
    parts = summary["partitions"]
    assert tasks_of == [5, 3, 1, 5, parts]  # 230 references, 12 nouns
    assert phases == {
        "counts": (5, 5), "nouns": (3, 3), "plan": (1, 1), "scattered": (5, 5),
        "partitions": (parts, parts), "publish": (1, 1),
    }  # fmt: skip
    assert convert(made[1], target, run_tasks=lambda tasks: 1 / 0) == summary


KILLS = {
    "counting": ("ovref.reduce.scatter.TableFile.write", 1),
    "nouns": ("ovref.reduce.collection_rows.CollectionRows.embeddings_of", 0),
    "marker of the plan": ("ovref.storage.steps.json_bytes", 7),
    "second group": ("ovref.reduce.collection_rows._sidecar", 1),
    "third partition": ("ovref.reduce.run.build_prototypes", 2),
    "upload of a partition": ("ovref_inference.collection.store._put", 12),
    "cleaning": ("ovref.reduce.partitioned.remove_leftovers", 0),
}
"""Where a conversion dies: the function, and the number of calls that it survives."""


@pytest.mark.parametrize("where", KILLS)
def test_killed_anywhere_it_goes_on_and_ends_in_the_same_bytes(
    made, converted, tmp_path, monkeypatch, where
):
    monkeypatch.setattr("ovref.reduce.scatter.GROUP_ROWS", 100)
    target, started = tmp_path / "collection", []
    with monkeypatch.context() as patch:
        die_in(patch, *KILLS[where])
        with pytest.raises(KeyboardInterrupt):
            convert(made[1], target)

    def watched(tasks):
        for task in tasks:
            started.append(task.func.__name__)
            yield task()

    assert convert(made[1], target, run_tasks=watched) == converted[1]
    assert content(target) == content(converted[0])
    if where == "second group":  # the first one, and all before it, is not made again
        assert started == ["scatter"] * 2 + ["reduce_leaf"] * converted[1]["partitions"]


@pytest.fixture
def old(made, tmp_path):
    """A copy of the undivided collection."""
    return shutil.copytree(made[1], tmp_path / "old")


def test_deleted_references_are_left_out(old, tmp_path, monkeypatch):
    monkeypatch.setattr("ovref.reduce.scatter.GROUP_ROWS", 10)
    with ReferenceCollection.open(old) as opened:
        gone = [*range(20), 25, *opened.ids_of(nouns=["owl"]).tolist()]
        keys = {row["key"] for row in opened.rows(gone)}
        rows = {key: row for key, row in rows_of(opened).items() if key not in keys}
    collections.tombstone(str(old), gone, "opt-out")
    tasks_of = []

    def counted(tasks):
        tasks_of.append(len(tasks))
        return in_any_order(tasks)

    summary = convert(old, tmp_path / "new", run_tasks=counted)
    assert tasks_of[0] == ALL / 10 - 2  # nothing is left of the first two groups
    assert every_row(tmp_path / "new") == rows
    with ReferenceCollection.open(tmp_path / "new") as opened:
        assert "owl" not in opened.nouns and not len(opened._deleted)
    assert summary["references"] == len(rows) == ALL - len(set(gone))
    assert summary["filter"][-1] == {"filter": "deleted", "before": ALL, "after": len(rows)}
    assert manifest_of(tmp_path / "new").build["converted"]["deleted"] == len(set(gone))
    # As if they had been removed before.
    _, paths = compact(*collections.fetch(str(old)), tmp_path / "work")
    convert(paths["references"].parent, tmp_path / "of_compacted")
    assert data_of(tmp_path / "new") == data_of(tmp_path / "of_compacted")


def test_it_grows_as_if_it_had_been_reduced(made, converted, place, tmp_path):
    step, _, partitioned, _ = made
    new = place(make_references({"fox": 5, "elk": 9}, seed=1), run=1)
    for name, source in (("left", converted[0]), ("right", partitioned)):
        target = shutil.copytree(source, tmp_path / name)
        summary = reduce_into(target, [step, new], SPEC, base=Store.open(str(target)))
        assert (summary["added"], summary["references"]) == (14, ALL + 14)
    assert data_of(tmp_path / "left") == data_of(tmp_path / "right")
    left, right = (manifest_of(tmp_path / name).build for name in ("left", "right"))
    assert left["inputs"] == right["inputs"] and len(left["inputs"]) == 2


def test_of_a_grown_collection(made, place, tmp_path):
    new = place(make_references({"fox": 5, "elk": 9}, seed=1), run=1)
    old, base = tmp_path / "old", {"licences": ("MIT",), "provenance": {"corpus": "second"}}
    reduce_into(old, made[0], UNDIVIDED, provenance={"corpus": "first", "licences": ["BSD"]})
    reduce_into(old, new, UNDIVIDED, base=Store.open(str(old)), **base)
    convert(old, tmp_path / "new")
    reduce_into(tmp_path / "at_once", [made[0], new], SPEC)
    assert data_of(tmp_path / "new") == data_of(tmp_path / "at_once")
    before, after = manifest_of(old), manifest_of(tmp_path / "new")
    assert after.licences == before.licences == ("CC-BY-4.0", "BSD", "MIT")
    for name in ("provenance", "inputs", "base", "embed"):
        assert after.build[name] == before.build[name], name
    assert [one["corpus"] for one in after.build["provenance"]] == ["first", "second"]
    part = manifest_of(tmp_path / "new" / after.partitions[0].path)
    assert part.licences == after.licences
    assert part.build["provenance"] == after.build["provenance"]


@pytest.mark.parametrize("factory", ["SQfp16", "IVF4,SQfp16"])
@pytest.mark.parametrize("form", ["in_index", "int8"])
def test_collections_of_other_forms(place, tmp_path, monkeypatch, form, factory):
    monkeypatch.setattr("ovref.reduce.indexing.choose_index", lambda n, dim: factory)
    chosen = {"textual_embeddings": form} if form == "in_index" else {"embeddings": form}
    old = dataclasses.replace(UNDIVIDED, **chosen)
    wanted = dataclasses.replace(SPEC, **chosen)
    step = place(make_references(COUNTS))
    reduce_into(tmp_path / "old", step, old)
    convert(tmp_path / "old", tmp_path / "new")
    reduce_into(tmp_path / "reduced", step, wanted)
    found, expected = data_of(tmp_path / "new"), data_of(tmp_path / "reduced")
    assert comparable(manifest_of(tmp_path / "new"))["embeddings"] == old.embeddings
    if form == "in_index":
        assert found == expected
        return
    # The 8-bit numbers are the same; indexes and prototypes were made of 16 bits there.
    assert found[1] == expected[1]
    for files, others in zip(found[0], expected[0], strict=True):
        assert files.keys() == others.keys()
        for name in ("references.parquet", "visual.int8.npy", "textual.int8.npy"):
            assert files[name] == others[name]
    for part, other in zip(
        partitions(tmp_path / "new"), partitions(tmp_path / "reduced"), strict=True
    ):
        near = (part._prototypes[:] * other._prototypes[:]).sum(1)
        assert np.median(near) > 0.999


def test_norms_are_kept(tmp_path, s3_endpoint):
    step = commit_step(tmp_path / "run", with_norms(make_references()), embed=KEPT)
    for name, spec in (("old", UNDIVIDED), ("reduced", SPEC)):
        reduce_into(tmp_path / name, step, spec, embed=KEPT)
    convert(tmp_path / "old", tmp_path / "new")
    assert data_of(tmp_path / "new") == data_of(tmp_path / "reduced")
    options = {"endpoint_url": s3_endpoint, "key": "testing", "secret": "testing"}
    remote = Store.open(f"s3://bucket/{secrets.token_hex(4)}", **options)
    for path, data in content(tmp_path / "old").items():
        remote.write(path, data)
    convert(remote.url, tmp_path / "of_remote", storage_options=options)
    assert content(tmp_path / "of_remote") == content(tmp_path / "new")
    found = {}
    for part in partitions(tmp_path / "new"):
        found |= norms_of(part)
    with ReferenceCollection.open(tmp_path / "old") as opened:
        assert found == norms_of(opened)


def test_what_passed_filters_once_is_not_filtered_again(place, tmp_path):
    """Outliers of what is left after dropping outliers would be others."""
    spec = dataclasses.replace(
        UNDIVIDED, filter=FilterSpec(outlier_deviations=2.0, min_clip_agreement=0.2)
    )
    references = [
        dataclasses.replace(one, measures={"clip": one.score}) for one in make_references(COUNTS)
    ]
    reduce_into(tmp_path / "old", place(references), spec)
    summary = convert(tmp_path / "old", tmp_path / "new")
    with ReferenceCollection.open(tmp_path / "old") as opened:
        assert every_row(tmp_path / "new") == rows_of(opened)
        before = opened.manifest.build
    assert 0 < summary["references"] < ALL
    assert summary["filter"] == before["summary"]["filter"]
    build = manifest_of(tmp_path / "new").build
    wanted = before["reduce"]["fields"] | {"partition_references": MOST}
    assert build["reduce"]["fields"] == wanted


def test_of_format_version_1(made, old, tmp_path):
    path = old / fmt.MANIFEST
    tree = json.loads(path.read_text())
    flat = {"factory": "Flat", "search": {}, "recall": 1.0, "recall_k": 0, "train_rows": 0}
    tree |= {"format_version": 1, "visual_index": flat, "textual_index": flat}
    tree["build"]["reduce"]["version"] = 1
    tree["build"]["embed"]["version"] = 1
    del tree["build"]["provenance"]
    path.write_text(json.dumps(tree))
    convert(old, tmp_path / "new")
    assert data_of(tmp_path / "new") == data_of(made[2])
    build = manifest_of(tmp_path / "new").build
    assert build["provenance"] == [{"unknown": tree["fingerprint"]}]
    assert build["embed"]["version"] == 1  # as they were made
    assert build["reduce"]["version"] == ReduceSpec.version  # as they are now reduced


def test_from_s3_to_s3(made, converted, tmp_path, s3_endpoint, monkeypatch):
    monkeypatch.setenv("OVREF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("ovref.reduce.scatter.GROUP_ROWS", 100)
    options = {"endpoint_url": s3_endpoint, "key": "testing", "secret": "testing"}
    old, new = (
        Store.open(f"s3://bucket/{secrets.token_hex(4)}", **options) for _ in range(2)
    )
    for path, data in content(made[1]).items():
        old.write(path, data)

    def run():
        return convert_collection(
            old.url, MOST, output=new, work=tmp_path / secrets.token_hex(4),
            storage_options=options, run_tasks=in_any_order,
        )  # fmt: skip

    with monkeypatch.context() as patch:
        die_in(patch, "ovref_inference.collection.store._put", 12)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert not new.exists(fmt.MANIFEST)
    assert run() == run() == converted[1]
    assert {path: new.read(path) for path in new.list()} == content(converted[0])
    assert not (tmp_path / "cache").exists()  # nothing stays on a worker


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_from_the_hub(made, converted, tmp_path, monkeypatch):
    hub = Hub()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    tree = {f"x/{path}": data for path, data in content(made[1]).items()}
    hub.repositories["me/them"] = [("a" * 40, tree)]
    target = tmp_path / "collection"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert convert("hf://me/them/x", target) == converted[1]
    assert content(target) == content(converted[0])
    hub.close()


def test_one_that_does_not_say_how_it_was_embedded_is_not_grown(made, old, tmp_path):
    manifest = json.loads((old / fmt.MANIFEST).read_text())
    del manifest["build"]["embed"]
    (old / fmt.MANIFEST).write_text(json.dumps(manifest))
    convert(old, tmp_path / "new")
    base = Store.open(str(tmp_path / "new"))
    with pytest.raises(CollectionError, match="cannot be grown: its manifest lacks `embed`"):
        check_same_encoders(
            base.url, read_published(base).manifest, made_by(EMBED, (), None)
        )


def test_what_cannot_be_converted(made, old, tmp_path):
    partitioned, new = made[2], tmp_path / "new"
    with pytest.raises(InputError, match="is partitioned already"):
        convert(partitioned, new)
    with pytest.raises(CollectionError, match=r"no reference collection at .*gone"):
        convert(tmp_path / "gone", new)
    for most in (0, -3):
        with pytest.raises(ConfigError, match="partition_references must be at least 1"):
            convert(old, new, most)
    for target in (old, partitioned):
        with pytest.raises(MismatchError, match=r"holds another collection.*convert into a new"):
            convert(old, target)
    collections.tombstone(str(old), list(range(ALL)), "all")
    with pytest.raises(InputError, match=r"all references of .* are deleted"):
        convert(old, new)
    assert not new.exists()
    new.mkdir()
    (new / "notes.txt").write_text("mine")
    with pytest.raises(MismatchError, match=r"is not empty \(it has notes.txt\)"):
        convert(made[1], new)
    assert [path.name for path in new.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        ("visual.f16.npy", lambda data: data[:-24], "bytes, the manifest says"),
        ("references.parquet", lambda data: data[:500], "bytes, the manifest says"),
        ("references.parquet", lambda data: data[:400] + b"x" * 40 + data[440:], "checksum"),
        (fmt.MANIFEST, lambda data: data[:90], "truncated or not JSON"),
    ],
)
def test_a_damaged_file_is_named(old, tmp_path, name, damage, says):
    (old / name).write_bytes(damage((old / name).read_bytes()))
    with pytest.raises(CollectionError, match=rf"{name}.*{says}"):
        convert(old, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_damage_that_only_shows_when_it_is_read(old, tmp_path, monkeypatch):
    """Checksums of large files are not compared."""
    monkeypatch.setattr("ovref_inference.collection.file_cache.SMALL_BYTES", 0)
    data = bytearray((old / "textual.f16.npy").read_bytes())
    data[-8:] = np.array([3, 1, 4, 1], "<f2").tobytes()
    (old / "textual.f16.npy").write_bytes(data)
    with pytest.raises(CollectionError, match=rf"textual embedding of reference {ALL - 1} of"):
        convert(old, tmp_path / "new")


def test_changed_meanwhile_is_noticed(old, tmp_path):
    def meanwhile(tasks):
        for task in tasks:
            yield task()
            if task.func.__name__ == "reduce_leaf":
                collections.tombstone(str(old), [0], "opt-out")

    with pytest.raises(MismatchError, match=r"old was changed while this collection was made"):
        convert(old, tmp_path / "new", run_tasks=meanwhile)
    assert convert(old, tmp_path / "new")["references"] == ALL - 1
    assert len({path.parts[-2] for path in (tmp_path / "new").rglob(fmt.MANIFEST)}) == 1 + len(
        manifest_of(tmp_path / "new").partitions
    )


def test_the_stage_is_named_as_it_was(converted):
    manifest = manifest_of(converted[0])
    assert manifest.textual.settings == {"model": "fake-text", "revision": ""}
    assert (manifest.templates, manifest.weights) == (EMBED.templates, EMBED.weights)
    assert manifest.prototypes == dataclasses.asdict(PROTOTYPES)
