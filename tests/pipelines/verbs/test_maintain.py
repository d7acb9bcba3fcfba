"""Maintenance of an output: status, garbage, verification; local and on S3."""

import json
import os
import shutil

import pyarrow.parquet as pq
import pytest
import small_build
from small_build import SHARDS

from ovref.errors import InputError, StorageError
from ovref.storage.file_store import Store
from ovref.storage.steps import existing_step
from ovref_pipelines import cli
from ovref_pipelines.output import STEPS, open_build
from ovref_pipelines.verbs.garbage import collect_garbage, garbage_text
from ovref_pipelines.verbs.status import place_json, place_text, status
from ovref_pipelines.verbs.verify import verify

DAY = 86400.0


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Folder of a finished build, to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    small_build.build(Store.open(str(folder / "out")), folder / "work")
    return folder / "out"


@pytest.fixture
def whole(finished, tmp_path):
    """A finished build in a folder."""
    shutil.copytree(finished, tmp_path / "out")
    return Store.open(str(tmp_path / "out"))


@pytest.fixture(params=["local", "s3"])
def output(request, finished, tmp_path):
    """A finished build in a folder, then the same on S3."""
    if request.param == "local":
        return request.getfixturevalue("whole")
    request.getfixturevalue("s3_environment")
    store = Store.open(f"s3://bucket/{tmp_path.name}")
    store._fs.put(f"{finished}/", store._root, recursive=True)
    return store


def file_of(store, name, shard, extension):
    """Path in the store of one committed file."""
    return f"{name}/{existing_step(store, name).commit_of(shard).files[extension].name}"


def edit_marker(store, name, shard, **values):
    path = f"{name}/_commits/{shard}.json"
    store.write(path, json.dumps(json.loads(store.read(path)) | values).encode())


def flip_last(store, path):
    data = store.read(path)
    store.write(path, data[:-1] + bytes([data[-1] ^ 1]))


# -- status ------------------------------------------------------------------------------------


def test_status_of_a_finished_build(output):
    build = open_build(output.url)
    steps = status(build)
    assert [step.step for step in steps] == ["captions", "prompts", "images", "references"]
    assert all(step.complete and step.missing == 0 and step.shards == 3 for step in steps)
    assert [(step.inputs, step.outputs) for step in steps] == [(15, 12), (12, 9), (9, 9), (9, 6)]
    assert steps[1].dropped == {"no_nouns": 3} and steps[3].dropped_parts == {"empty_mask": 3}
    assert all(0 <= step.last_commit_age_s < 3600 for step in steps)
    tree = json.loads(place_json(output.url))
    assert tree["collection"] == f"{output.url}/collection"
    assert [step["committed"] for step in tree["steps"]] == [3, 3, 3, 3]


def test_status_of_a_build_half_done(tmp_path):
    store = Store.open(str(tmp_path / "out"))
    steps = small_build.open_steps(store)
    (tmp_path / "out/references/step.json").unlink()
    for shard in SHARDS:
        small_build.commit_shard(steps, "captions", shard)
    build = open_build(store.url)
    assert [step.shards for step in status(build)] == [None] * 4  # the corpus is still being read
    steps["captions"].finish(SHARDS)
    for shard in SHARDS[:2]:
        small_build.commit_shard(steps, "prompts", shard)
    # An entry of an earlier run whose shard was made since, and one of a shard that was not.
    for shard in SHARDS[1:]:
        store.write(f"prompts/_quarantine/{shard}.json", b"{}")
    os.utime(tmp_path / "out/prompts/_commits/000000.json", (1, 1))

    captions, prompts, images, references = status(build)
    assert (captions.complete, captions.missing) == (True, 0)
    assert (prompts.complete, prompts.committed, prompts.missing) == (False, 2, 1)
    assert prompts.quarantined == ("000002",) and prompts.last_commit_age_s < 3600
    assert (images.begun, images.committed, images.missing) == (True, 0, 3)
    assert images.last_commit_age_s is None
    assert (references.begun, references.missing) == (False, 3)
    text = place_text(store.url)
    assert "prompts: 2 of 3 shards committed, 1 missing, 1 quarantined, 8 records in, 6 out" in text
    assert "  dropped: 2 no_nouns" in text
    assert "  quarantined: 000002; tracebacks are in" in text
    assert "references: not begun" in text
    assert f"collection: none yet at {store.url}/collection" in text
    assert json.loads(place_json(store.url))["collection"] is None


def test_status_of_a_build_that_uses_another_one_s_images(whole, tmp_path):
    other = Store.open(str(tmp_path / "other"))
    other.write("build.json", json.dumps({"images_from": whole.url, "collection": None}).encode())
    build = open_build(other.url)
    steps = status(build)
    assert [step.begun for step in steps] == [True, True, True, False]
    assert steps[2].output == f"{whole.url}/images"
    assert build.collection.url == f"{other.url}/collection"
    whole.write("images/000000-0123.tar", b"left by a killed attempt")
    assert collect_garbage(build, 0, dry_run=False) == []  # it is not this build's to delete
    assert verify(other.url)[0] == f"references: there is no such step at {other.url}"


def test_selected_prompts_are_a_step_of_a_build_that_selects(whole):
    whole.write("build.json", json.dumps({"select_prompts": {"max_per_noun": 3}}).encode())
    assert [step.step for step in status(open_build(whole.url))] == list(STEPS)
    assert verify(whole.url) == [f"selected: there is no such step at {whole.url}"]
    whole.write("build.json", json.dumps({"select_prompts": None}).encode())
    assert verify(whole.url) == []


@pytest.mark.parametrize("ask", [lambda url: open_build(url), verify])
def test_what_is_no_build_is_said(tmp_path, ask):
    with pytest.raises(InputError, match="no output of `ovref build`"):
        ask(str(tmp_path / "nothing"))


def test_a_damaged_build_json_is_named(whole):
    whole.write("build.json", b"{cut o")
    with pytest.raises(StorageError, match=r"build\.json is damaged"):
        open_build(whole.url)


# -- garbage -----------------------------------------------------------------------------------


def test_garbage_is_named_and_deleted_and_nothing_else(output):
    before = set(output.list())
    planted = {
        "images/000001-0123456789abcdef.tar": b"of an attempt that was killed",
        "references/000000-fedcba9876543210.parquet": b"of a lost race",
    }
    for path, data in planted.items():
        output.write(path, data)
    build = open_build(output.url)
    assert collect_garbage(build, DAY, dry_run=False) == []  # a running attempt's, perhaps
    found = collect_garbage(build, 0, dry_run=True)
    assert {item.url: item.size for item in found} == {
        f"{output.url}/{path}": len(data) for path, data in planted.items()
    }
    assert set(output.list()) == before | set(planted)
    assert [item.url for item in collect_garbage(build, 0, dry_run=False)] == [
        item.url for item in found
    ]
    assert set(output.list()) == before
    assert verify(output.url) == []


def test_unfinished_files_of_a_killed_writer_are_garbage(whole, tmp_path):
    partial = tmp_path / "out/prompts/.partial-0a1b2c-000000.tar"
    partial.write_bytes(b"half")
    os.utime(partial, (1, 1))
    found = collect_garbage(open_build(whole.url), DAY, dry_run=False)
    assert [(item.url, item.size) for item in found] == [(str(partial), 4)]
    assert not partial.exists()
    text = garbage_text(found, dry_run=False)
    assert text.splitlines()[0].startswith(f"{partial}  4 bytes, ")
    assert text.splitlines()[1] == "1 files of 4 bytes deleted"
    assert garbage_text([], dry_run=True) == "0 files of 0 bytes would be deleted"


def test_files_of_a_killed_publishing_are_garbage_and_the_collection_is_not(whole, tmp_path):
    folder = tmp_path / "out/collection"
    before = sorted(folder.iterdir())
    scratch = folder / "visual.f16.npy.4a71b1c0.tmp"
    scratch.write_bytes(b"half")
    assert collect_garbage(open_build(whole.url), DAY, dry_run=False) == []
    found = collect_garbage(open_build(whole.url), 0, dry_run=True)
    assert [item.url for item in found] == [str(scratch)] and scratch.exists()
    collect_garbage(open_build(whole.url), 0, dry_run=False)
    assert sorted(folder.iterdir()) == before and verify(whole.url) == []


# -- verify ------------------------------------------------------------------------------------


def test_a_whole_build_and_its_collection_verify(whole):
    assert verify(whole.url) == []
    assert verify(f"{whole.url}/collection") == []


FILES = [
    ("captions", "tar"), ("captions", "parquet"), ("captions", "drops.jsonl"),
    ("images", "tar"), ("references", "parquet"), ("references", "drops.jsonl"),
]  # fmt: skip


@pytest.mark.parametrize(("step", "extension"), FILES)
@pytest.mark.parametrize("damage", ["gone", "cut", "flipped"])
def test_a_damaged_file_is_named(whole, step, extension, damage):
    path = file_of(whole, step, "000001", extension)
    data = whole.read(path)
    if damage == "gone":
        whole.delete(path)
    elif damage == "cut":
        whole.write(path, data[:-1])
    else:
        whole.write(path, data[:20] + bytes([data[20] ^ 1]) + data[21:])
    (problem,) = verify(whole.url)
    assert problem.startswith(f"{step}: shard 000001: ") and path in problem
    said = {
        "gone": "it was deleted or never written",
        "cut": f"has {len(data) - 1} bytes, {len(data)} were committed",
        "flipped": "has other content than was committed",
    }
    assert said[damage] in problem or (damage == "gone" and "is missing" in problem)


def test_all_damage_is_named_at_once(output):
    first, second, third = [
        file_of(output, *which)
        for which in (
            ("captions", "000000", "tar"),
            ("prompts", "000001", "parquet"),
            ("images", "000002", "tar"),
        )
    ]
    data = output.read(second)
    output.delete(first)
    output.write(second, data[:-1])
    output.write(third, data)
    flip_last(output, "collection/visual.f16.npy")
    problems = verify(output.url)
    assert len(problems) == 4
    for path, problem in zip([first, second, third, "visual.f16.npy"], problems, strict=True):
        assert path in problem


@pytest.mark.parametrize("data", [b"", b"{cut o", b"[]", b"{}", b'{"files": {}, "shard": "a"}'])
def test_a_damaged_marker_is_named(whole, data):
    whole.write("prompts/_commits/000002.json", data)
    (problem,) = verify(whole.url)
    assert problem.startswith("prompts: shard 000002: ")
    assert "_commits/000002.json" in problem


def test_a_marker_of_another_shard_or_step_is_named(whole):
    whole.write("prompts/_commits/000002.json", whole.read("prompts/_commits/000001.json"))
    whole.write("images/_commits/000002.json", whole.read("captions/_commits/000002.json"))
    first, second = verify(whole.url)
    assert first.startswith("prompts: shard 000002: ") and "was it copied" in first
    assert second.startswith("images: shard 000002: ") and "was it copied" in second


def test_a_deleted_marker_is_a_lost_shard(whole):
    whole.delete("images/_commits/000001.json")
    assert verify(whole.url) == ["images: 1 shards of its complete list have no marker: 000001"]


@pytest.mark.parametrize("data", [b"{cut o", b"[]", b"{}"])
def test_a_damaged_list_of_shards_is_said(whole, data):
    whole.write("captions/complete.json", data)
    (problem,) = verify(whole.url)
    assert problem.startswith("captions: ")


@pytest.mark.parametrize("data", [b"{cut o", b"[]", b'{"format_version": 99}'])
def test_a_damaged_step_json_is_named(whole, data):
    whole.write("prompts/step.json", data)
    (problem,) = verify(whole.url)
    assert problem.startswith("prompts: ") and "prompts/step.json" in problem


def test_what_is_not_finished_is_wrong(tmp_path):
    store = Store.open(str(tmp_path / "out"))
    steps = small_build.open_steps(store)
    for shard in SHARDS:
        small_build.commit_shard(steps, "captions", shard)
    steps["captions"].finish(SHARDS)
    small_build.commit_shard(steps, "prompts", "000000")
    store.write("prompts/_quarantine/000001.json", b"{}")
    problems = verify(store.url)
    assert problems[:3] == [
        "prompts: not complete: 1 of 3 shards are committed",
        "prompts: 1 shards failed permanently: 000001",
        "prompts: 2 shards of captions are missing: 000001, 000002",
    ]
    assert problems[-1] == f"collection: there is none at {store.url}/collection"


def test_steps_that_do_not_belong_together_are_reported(whole, tmp_path):
    for path in whole.list("captions"):
        whole.delete(path)
    captions = small_build.open_step(whole, "captions", {"another": "corpus"})
    for shard in ["000000", "000009"]:
        small_build.commit_shard({"captions": captions}, "captions", shard)
    captions.finish(["000000", "000009"])
    assert verify(whole.url) == [
        f"prompts: it was made from other shards than those of {whole.url}/captions",
        "prompts: 2 shards are not in captions: 000001, 000002",
        "prompts: 1 shards of captions are missing: 000009",
    ]


def test_counts_of_a_marker_are_compared_with_the_files(whole):
    edit_marker(whole, "prompts", "000000", inputs=5)
    edit_marker(whole, "images", "000001", outputs=4)
    edit_marker(whole, "references", "000002", dropped_parts={})
    edit_marker(whole, "captions", "000002", inputs=9)
    assert verify(whole.url) == [
        "captions: shard 000002: 9 inputs gave 4 records and 1 drops",
        "prompts: shard 000000: its marker counts 5 inputs, captions gave 4",
        "images: shard 000001: its marker counts 4 records, the sidecar holds 3",
        "references: shard 000002: its marker counts 0 drops, the list holds 1",
    ]


def test_every_input_must_be_answered(tmp_path):
    store = Store.open(str(tmp_path / "out"))
    steps = small_build.open_steps(store)
    for shard in SHARDS[:2]:
        small_build.commit_shard(steps, "captions", shard)
    one, two = (small_build.captions_of(shard) for shard in SHARDS[:2])
    # As many answers as inputs, but one input is forgotten and another's answer stands there.
    wrong = [small_build.prompt_of(caption) for caption in [*one[:3], two[0]]]
    steps["prompts"].commit("000000", wrong, inputs=4)
    problems = [line for line in verify(store.url) if "shard 000000" in line]
    assert problems == [
        f"prompts: shard 000000: 1 inputs were not answered: {one[3].key}",
        f"prompts: shard 000000: 1 answers are to inputs it was not given: {two[0].key}",
    ]


def test_a_damaged_collection_is_named(whole):
    path = "collection/visual.f16.npy"
    flip_last(whole, path)
    (problem,) = verify(whole.url)
    assert problem.startswith("collection: ") and path in problem
    assert verify(f"{whole.url}/collection") == [problem]
    whole.delete(path)
    (problem,) = verify(whole.url)
    assert problem.startswith("collection: ") and path in problem


def test_a_sidecar_is_one_row_a_record(whole):
    """What `verify` counts on: the keys of the sidecar are those of the tar."""
    step = existing_step(whole, "images")
    keys = [record.key for record in step.read("000000")]
    with whole.local_copy(file_of(whole, "images", "000000", "parquet")) as path:
        assert pq.read_table(path, columns=["key"])["key"].to_pylist() == keys


# -- the verbs ---------------------------------------------------------------------------------


def test_the_verbs_and_their_exit_codes(whole, capsys):
    def ovref(*arguments):
        return cli.main([*arguments]), capsys.readouterr().out

    code, printed = ovref("status", whole.url)
    assert code == 0 and printed.startswith("captions: 3 of 3 shards committed, complete, ")
    code, printed = ovref("status", whole.url, "--json")
    assert code == 0 and len(json.loads(printed)["steps"]) == 4
    assert ovref("verify", whole.url) == (0, f"{whole.url} is whole\n")
    whole.write("images/000000-0123456789abcdef.tar", b"left")
    code, printed = ovref("gc", whole.url)
    assert (code, printed) == (0, "0 files of 0 bytes deleted\n")
    code, printed = ovref("gc", whole.url, "--older-than", "0", "--dry-run")
    assert code == 0 and printed.endswith("1 files of 4 bytes would be deleted\n")
    code, printed = ovref("gc", whole.url, "--older-than", "0")
    assert code == 0 and printed.endswith("1 files of 4 bytes deleted\n")
    path = file_of(whole, "images", "000000", "tar")
    whole.delete(path)
    code, printed = ovref("verify", whole.url)
    assert code == 1 and path in printed
    assert ovref("verify", f"{whole.url}/nothing")[0] == 2


@pytest.mark.parametrize("hours", ["-1", "inf", "nan", "soon"])
def test_an_age_that_is_none_is_refused(hours, capsys):
    with pytest.raises(SystemExit):
        cli.main(["gc", "out", f"--older-than={hours}"])
    assert "--older-than" in capsys.readouterr().err
