import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from ovref.contract import Dropped
from ovref.errors import MismatchError, StorageError
from ovref.records import YES, Caption, ImageRecord, Noun, Reference, Region
from ovref.storage import shards
from ovref.storage.commits import Commit
from ovref.storage.file_store import Store
from ovref.storage.shards import ShardFiles
from ovref.storage.steps import StepFolder, existing_step, open_step

IDENTITY = {"stages": [{"name": "embed", "fields": {"threshold": 0.45, "size_hw": (64, 64)}}]}


def captions(count: int, say: str = "caption") -> list[Caption]:
    return [Caption(key=f"k{n}", text=f"{say} {n}", source=f"c:{n}") for n in range(count)]


def references(count: int) -> list[Reference]:
    rng = np.random.default_rng(0)
    return [
        Reference(
            key=f"k{n}#0",
            noun=Noun(text="cat", start=0, end=3),
            caption="cat",
            box_xyxy=(0, 0, 1, 1),
            area=0.5,
            score=0.5,
            source="daam",
            seed=n,
            visual=rng.normal(size=4).astype(np.float16),
            textual=rng.normal(size=3).astype(np.float16),
        )
        for n in range(count)
    ]


@pytest.fixture
def step(store) -> StepFolder:
    return open_step(store, "captions", IDENTITY)


@pytest.fixture
def local_step(tmp_path) -> StepFolder:
    return open_step(Store.open(str(tmp_path)), "captions", IDENTITY)


# -- which folder it is ----------------------------------------------------------------------------


def test_a_step_is_found_again(store, step):
    assert open_step(store, "captions", IDENTITY) == step
    assert existing_step(store, "captions") == step
    assert store.list() == ["captions/step.json"]


def test_another_name_gives_the_same_fingerprint_and_another_parent_does_not(store, step):
    assert open_step(store, "texts", IDENTITY).fingerprint == step.fingerprint
    later = open_step(store, "prompts", IDENTITY, [step.fingerprint])
    assert later.fingerprint != step.fingerprint and later.parents == (step.fingerprint,)


def test_a_mismatch_says_which_values_differ(store):
    identity = {"stages": [{"threshold": 0.45, "same": 1}], "seed": 1}
    open_step(store, "references", identity, ["a"]).commit("000000", captions(1), inputs=1)
    with pytest.raises(MismatchError) as caught:
        changed = {"stages": [{"threshold": 0.5, "same": 1}], "draws": 2}
        open_step(store, "references", changed, ["b"])
    message = str(caught.value)
    assert "stages.0.threshold was 0.45 and is now 0.5" in message
    assert "seed was 1 and is now absent" in message
    assert "draws was absent and is now 2" in message
    assert "the step that it reads from has another fingerprint" in message
    assert "same" not in message.replace("same step", "")
    assert message.endswith("or set these values as they were to resume this one")


def test_a_step_without_a_shard_is_begun_anew(store):
    before = open_step(store, "references", {"stages": [{"threshold": 0.45}]}, ["a"])
    changed = {"stages": [{"threshold": 0.5}]}
    assert open_step(store, "references", changed, ["b"], create=False).parents == ("b",)
    assert open_step(store, "references", before.identity, ["a"]) == before  # nothing was written
    begun = open_step(store, "references", changed, ["b"])
    assert existing_step(store, "references") == begun
    with pytest.raises(MismatchError, match="started over with other settings by another build"):
        before.commit("000000", captions(1), inputs=1)
    assert begun.committed() == []


def test_a_mismatch_with_what_is_committed_asks_for_another_folder(store, step):
    step.commit("000000", captions(1), inputs=1)
    with pytest.raises(MismatchError, match="Choose another output folder"):
        open_step(store, "captions", {"stages": []})


def test_a_mismatch_tells_numbers_from_truths_and_lists_of_other_lengths(store):
    step = open_step(store, "a", {"flag": True, "models": ["x"]})
    step.commit("000000", captions(1), inputs=1)
    with pytest.raises(
        MismatchError, match=r"flag was true and is now 1; models was \[\"x\"\] and"
    ):
        open_step(store, "a", {"flag": 1, "models": ["x", "y"]})


def test_a_damaged_or_newer_step_is_refused(store, step):
    whole = json.loads(step.store.read("step.json"))
    for damaged in [b"{", b"[]", json.dumps({**whole, "identity": {}}).encode()]:
        step.store.write("step.json", damaged)
        with pytest.raises(StorageError, match=r"step\.json (is damaged|must hold)"):
            open_step(store, "captions", IDENTITY)
    step.store.write("step.json", json.dumps({**whole, "format_version": 99}).encode())
    with pytest.raises(MismatchError, match="of format version 99"):
        existing_step(store, "captions")


def test_a_step_that_is_not_there_is_named(store):
    with pytest.raises(StorageError, match=r"no step at .*/images: step\.json is missing"):
        existing_step(store, "images")


@pytest.mark.parametrize("name", ["", "..", "a/b", "A", "1a", "_commits"])
def test_a_step_needs_a_plain_name(tmp_path, name):
    with pytest.raises(StorageError, match="a step's name must be"):
        open_step(Store.open(str(tmp_path)), name, {})


@pytest.mark.parametrize("shard", ["", "..", "a/b", ".json", "a.b"])
def test_a_shard_needs_a_plain_name(local_step, shard):
    with pytest.raises(StorageError, match="a shard's name must be"):
        local_step.commit(shard, captions(1), inputs=1)


# -- what is committed -----------------------------------------------------------------------------


def test_what_is_committed_is_read(step):
    drops = [Dropped("k9#1", "empty_mask"), Dropped("x#y:3", "bad"), Dropped("k8", "no_nouns")]
    commit = step.commit("000000", captions(3), inputs=5, drops=drops)
    assert step.committed() == ["000000"]
    assert step.commits() == {"000000": commit} and step.commit_of("000000") == commit
    assert (commit.inputs, commit.outputs, commit.attempt) == (5, 3, 0)
    assert commit.dropped == {"bad": 1, "no_nouns": 1}
    assert commit.dropped_parts == {"empty_mask": 1}
    assert sorted(commit.files) == ["drops.jsonl", "parquet", "tar"]
    assert list(step.read("000000")) == captions(3)
    assert step.drops("000000") == sorted(drops, key=lambda drop: drop.key)
    assert step.table("000000").column_names == ["key", "text", "source", "draw"]
    texts = step.table("000000", columns=["text"])
    assert texts.to_pydict() == {"text": ["caption 0", "caption 1", "caption 2"]}
    assert step.orphans() == []


def test_references_are_rows_alone(step):
    commit = step.commit("000000", references(3), inputs=3)
    assert list(commit.files) == ["parquet"]
    for read, written in zip(step.read("000000"), references(3), strict=True):
        assert (read.key, read.box_xyxy, read.seed) == (written.key, written.box_xyxy, written.seed)
        np.testing.assert_array_equal(read.visual, written.visual, strict=True)
        np.testing.assert_array_equal(read.textual, written.textual, strict=True)


def test_a_shard_without_outputs_is_committed_too(step):
    commit = step.commit("000000", [], inputs=1, drops=[Dropped("k0", "no_nouns")])
    assert commit.outputs == 0 and sorted(commit.files) == ["drops.jsonl", "parquet"]
    assert list(step.read("000000")) == []
    assert step.table("000000", columns=["text"]).to_pydict() == {"key": []}


def test_a_shard_that_is_not_committed_is_named(step):
    assert step.commit_of("000007") is None and step.commits() == {}
    for call in (step.table, step.drops, lambda shard: list(step.read(shard))):
        with pytest.raises(StorageError, match=r"shard 000007 of .* is not committed"):
            call("000007")


def test_a_folder_named_like_a_hive_partition_adds_no_columns(tmp_path):
    step = open_step(Store.open(str(tmp_path / "lr=3")), "captions", {})
    step.commit("000000", captions(1), inputs=1)
    assert "lr" not in step.table("000000").column_names


def test_records_of_two_kinds_are_refused(local_step):
    with pytest.raises(TypeError, match="k0#0 is of kind reference in a shard of kind caption"):
        local_step.commit("000000", [*captions(1), *references(1)], inputs=2)
    assert local_step.store.list() == ["step.json"]


def test_more_rows_than_a_row_group_keep_their_order(local_step, monkeypatch):
    monkeypatch.setattr(shards, "ROW_GROUP", 4)
    local_step.commit("000000", captions(10), inputs=10)
    assert local_step.table("000000")["key"].to_pylist() == [f"k{n}" for n in range(10)]
    assert list(local_step.read("000000")) == captions(10)


def test_the_list_of_shards_is_declared_once_all_are_there(step):
    assert step.complete() is None
    step.commit("000000", captions(1), inputs=1)
    with pytest.raises(StorageError, match="1 of 2 shards are not committed, the first is 000001"):
        step.finish(["000000", "000001"])
    assert step.complete() is None
    step.finish(["000000"])
    step.finish(["000000"])
    assert step.complete() == ["000000"]
    step.commit("000001", captions(1), inputs=1)
    with pytest.raises(StorageError, match="declared complete with 1 shards, now with 2"):
        step.finish(["000000", "000001"])


# -- equal input, equal bytes ----------------------------------------------------------------------


def image_records(count: int) -> list[ImageRecord]:
    file = io.BytesIO()
    Image.new("RGB", (5, 4), (1, 2, 3)).save(file, format="jpeg")
    region = Region(
        noun=Noun(text="cat", start=0, end=3),
        mask_hw=np.full((4, 5), YES, np.uint8),
        score=0.5,
        source="daam",
    )
    return [
        ImageRecord(
            key=f"k{n}",
            caption="cat",
            source="",
            image=file.getvalue(),
            regions=(region, region),
            heatmaps_nhw=np.full((2, 2, 3), n / 7, np.float16),
            seed=n,
            provenance={"b": 1, "a": [1.5, None]},
        )
        for n in range(count)
    ]


@pytest.mark.parametrize("records", [captions(5), references(5), image_records(5)])
def test_equal_records_give_equal_bytes_whenever_and_wherever(tmp_path, s3_store, records):
    local = open_step(Store.open(str(tmp_path / "one")), "first", {"a": 1})
    remote = open_step(s3_store, "second", {"b": 2}, ["x"])
    drops = [Dropped("k6", "b"), Dropped("k7", "a")]
    one = local.commit("000000", records, inputs=7, drops=drops)
    other = remote.commit("000000", iter(records), inputs=7, drops=drops[::-1])
    assert one.files == other.files
    for file in one.files.values():
        assert local.store.read(file.name) == remote.store.read(file.name)


def test_a_tar_has_no_trace_of_when_and_by_whom(local_step):
    commit = local_step.commit("000000", image_records(2), inputs=2)
    with tarfile.open(f"{local_step.store.url}/{commit.files['tar'].name}") as tar:
        members = tar.getmembers()
    assert [member.name for member in members] == [
        f"k{n}.{extension}"
        for n in range(2)
        for extension in ("json", "heatmaps.npy", "jpg", "masks.png")
    ]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {
        (0, 0, 0, "", "", 0o644)
    }


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves closing to Python
def test_webdataset_reads_a_shard(local_step):
    import webdataset

    records = image_records(3)
    commit = local_step.commit("000000", records, inputs=3)
    path = f"{local_step.store.url}/{commit.files['tar'].name}"
    samples = list(webdataset.WebDataset(path, shardshuffle=False).decode("rgb8"))
    assert [sample["__key__"] for sample in samples] == ["k0", "k1", "k2"]
    for sample, record in zip(samples, records, strict=True):
        assert sample["json"]["caption"] == "cat" and sample["json"]["kind"] == "image"
        np.testing.assert_array_equal(sample["heatmaps.npy"], record.heatmaps_nhw)
        assert sample["masks.png"].shape[:2] == (8, 5) and (sample["masks.png"] == YES).all()
        np.testing.assert_array_equal(sample["jpg"], record.image_hwc())


# -- damage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [lambda d: d[:-1], lambda d: b"", lambda d: d[:-1] + b"\x01"])
@pytest.mark.parametrize("extension", ["tar", "parquet", "drops.jsonl"])
def test_a_cut_off_or_changed_file_is_refused(step, extension, damage):
    commit = step.commit("000000", captions(2), inputs=3, drops=[Dropped("k9", "no_nouns")])
    name = commit.files[extension].name
    step.store.write(name, damage(step.store.read(name)))
    call = {"tar": step.read, "parquet": step.table, "drops.jsonl": step.drops}[extension]
    with pytest.raises(StorageError, match=f"{name} is not what was committed: expected"):
        list(call("000000"))


def test_a_deleted_file_is_refused(step):
    commit = step.commit("000000", captions(2), inputs=2)
    step.store.delete(commit.files["tar"].name)
    with pytest.raises(StorageError, match=r"\.tar.* never written"):
        list(step.read("000000"))


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        (b"{", "is damaged"),
        (b"[]", "must hold a JSON object"),
        (b"{}", "is not a commit marker"),
        (b'{"files": [], "shard": "000000"}', "is not a commit marker"),
    ],
)
def test_a_damaged_marker_is_refused(step, marker, message):
    step.store.write("_commits/000000.json", marker)
    with pytest.raises(StorageError, match=rf"_commits/000000\.json {message}"):
        step.commits()
    with pytest.raises(StorageError, match=message):
        list(step.read("000000"))


def test_a_marker_of_another_step_or_shard_is_refused(store, step):
    other = open_step(store, "others", {"other": True})
    other.commit("000000", captions(2), inputs=2)
    marker = other.store.read("_commits/000000.json")
    step.store.write("_commits/000000.json", marker)
    with pytest.raises(StorageError, match="belongs to shard 000000 of a step with the fingerpr"):
        step.commits()
    other.store.write("_commits/000001.json", marker)
    with pytest.raises(StorageError, match=r"000001\.json belongs to shard 000000"):
        other.commit_of("000001")


def test_a_tar_of_something_else_is_refused(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(b"not a tar")
    with pytest.raises(StorageError, match="the tar is not a shard of ovref"):
        list(shards.read_tar(path, "the tar"))
    for name, kind in [("../a.json", tarfile.REGTYPE), ("a.json", tarfile.SYMTYPE)]:
        with tarfile.open(path, "w") as tar:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        with pytest.raises(StorageError, match="the tar is not a shard of ovref"):
            list(shards.read_tar(path, "the tar"))


# -- races, kills and full disks -------------------------------------------------------------------


def _commit_in_a_process(step, records, barrier, results):
    with ShardFiles() as files:
        for record in records:
            files.add(record)
        barrier.wait()
        results.put(step.publish("000000", files, inputs=len(records)))


@pytest.mark.parametrize("equal", [True, False], ids=["equal", "different"])
def test_of_two_processes_that_race_for_a_shard_one_commits(step, equal):
    spawn = multiprocessing.get_context("spawn")
    barrier, results = spawn.Barrier(2), spawn.Queue()
    offers = [captions(3), captions(3) if equal else captions(3, say="other")]
    processes = [
        spawn.Process(target=_commit_in_a_process, args=(step, records, barrier, results))
        for records in offers
    ]
    for process in processes:
        process.start()
    one, other = results.get(timeout=60), results.get(timeout=60)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert one == other == step.commit_of("000000")
    assert list(step.read("000000")) in offers
    named = {file.name for file in one.files.values()}
    assert not named & set(step.orphans())
    assert not (equal and step.orphans())


@pytest.mark.parametrize("equal", [True, False], ids=["equal", "different"])
def test_an_attempt_overtaken_while_it_uploads_gives_way(step, monkeypatch, equal):
    upload = Store.upload
    winner: list[Commit] = []

    def upload_and_be_overtaken(store, local_path, path):
        monkeypatch.setattr(Store, "upload", upload)
        winner.append(step.commit("000000", captions(3), inputs=3))
        upload(store, local_path, path)

    monkeypatch.setattr(Store, "upload", upload_and_be_overtaken)
    late = captions(3) if equal else captions(3, say="late")
    assert step.commit("000000", late, inputs=3) == winner[0] == step.commit_of("000000")
    assert list(step.read("000000")) == captions(3)
    assert len(step.orphans()) == (0 if equal else 2)
    assert len(step.collect_garbage(older_than_s=-60)) == (0 if equal else 2)
    assert list(step.read("000000")) == captions(3)


def test_garbage_is_what_no_marker_names_and_is_old(step):
    commit = step.commit("000000", captions(2), inputs=2)
    step.finish(["000000"])
    step.store.write("000001-0123456789abcdef.tar", b"of a killed attempt")
    step.store.write("_quarantine/000002.json", b"not garbage")
    assert step.orphans() == ["000001-0123456789abcdef.tar"]
    assert step.collect_garbage() == []
    assert step.collect_garbage(older_than_s=-60) == ["000001-0123456789abcdef.tar"]
    files = [file.name for file in commit.files.values()]
    kept = ["_commits/000000.json", "_quarantine/000002.json", "complete.json", "step.json"]
    assert step.store.list() == sorted([*files, *kept])


def test_an_orphan_that_is_uploaded_again_meanwhile_is_not_garbage(step, monkeypatch):
    """By a running build while garbage is collected: equal bytes have equal names."""
    files = step.commit("000001", captions(2), inputs=2).files
    step.take_back(["000001"])
    step.store.write("000000-0123456789abcdef.tar", b"of another killed attempt")
    age_s, delete = Store.age_s, Store.delete

    def old_until_then(store, path):
        return 1e6 if step.commit_of("000001") is None else age_s(store, path)

    def delete_while_work_goes_on(store, path):
        delete(store, path)
        step.commit("000001", captions(2), inputs=2)

    monkeypatch.setattr(Store, "age_s", old_until_then)
    monkeypatch.setattr(Store, "delete", delete_while_work_goes_on)
    assert step.collect_garbage() == ["000000-0123456789abcdef.tar"]
    assert step.commit_of("000001").files == files
    assert list(step.read("000001")) == captions(2)


def test_an_orphan_that_is_gone_meanwhile_is_no_error(step, monkeypatch):
    """What another process was writing has got its real name, or was deleted."""
    for name in ("000000-0.tar", "000001-1.tar"):
        step.store.write(name, b"of a killed attempt")
    found = step.orphans()
    monkeypatch.setattr(StepFolder, "orphans", lambda step: found)
    step.store.delete("000000-0.tar")
    assert step.collect_garbage(older_than_s=-60) == ["000001-1.tar"]


KILLED = """
import os, sys, time
from ovref.records import Caption
from ovref.storage.steps import existing_step
from ovref.storage.file_store import Store

step = existing_step(Store.open(sys.argv[1]), "captions")

def hang(*arguments):
    print("here", flush=True)
    time.sleep(600)

setattr({"os": os, "Store": Store}[sys.argv[2]], sys.argv[3], hang)
step.commit("000000", [Caption(key=f"k{n}", text=f"caption {n}", source=f"c:{n}")
                       for n in range(3)], inputs=3)
"""


@pytest.mark.parametrize(
    ("owner", "function"),
    [("os", "fsync"), ("os", "replace"), ("Store", "create"), ("os", "link")],
    ids=["in_the_first_file", "before_its_renaming", "before_the_marker", "in_the_marker"],
)
def test_a_kill_at_any_moment_leaves_no_commit_and_work_goes_on(local_step, owner, function):
    store = local_step.store
    arguments = [sys.executable, "-c", KILLED, os.path.dirname(store.url), owner, function]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "here\n"
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    assert local_step.committed() == [] and local_step.commits() == {}
    local_step.commit("000000", captions(3), inputs=3)
    assert list(local_step.read("000000")) == captions(3)
    left = local_step.orphans()
    assert len(left) == (0 if function == "create" else 1)
    assert local_step.collect_garbage() == []
    assert local_step.collect_garbage(older_than_s=-60) == left
    assert local_step.orphans() == []
    assert list(local_step.read("000000")) == captions(3)


def test_a_full_temporary_disk_is_explained(local_step, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    opened = open

    def small_disk(path, mode="r", *arguments, **options):
        # /dev/full takes no byte: whatever is written to a new temporary file fails.
        full = "scratch" in str(path) and mode == "wb"
        return opened("/dev/full" if full else path, mode, *arguments, **options)

    monkeypatch.setattr("builtins.open", small_disk)
    with pytest.raises(StorageError, match=r"temporary folder .* is full .*TMPDIR"):
        local_step.commit("000000", references(2000), inputs=2000)
    assert os.listdir(tmp_path / "scratch") == []
    assert local_step.store.list() == ["step.json"]


def test_a_full_small_disk_is_explained(local_step, monkeypatch, tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"may not mount a small file system here: {done.stderr.strip()}")
    try:
        with monkeypatch.context() as patched:
            patched.setattr("tempfile.tempdir", str(folder))
            with pytest.raises(StorageError, match=r"temporary folder .* is full .*TMPDIR"):
                local_step.commit("000000", captions(200), inputs=200)
            assert os.listdir(folder) == []
        target = open_step(Store.open(str(folder)), "captions", IDENTITY)
        with pytest.raises(StorageError, match="the disk or quota is full"):
            target.commit("000000", captions(200), inputs=200)
        assert target.committed() == []
    finally:
        subprocess.run(["umount", str(folder)], check=True)
    assert local_step.store.list() == ["step.json"]
