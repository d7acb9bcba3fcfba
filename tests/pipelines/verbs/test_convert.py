"""`ovref convert collection`: the command, where it runs, and what it says."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from array_fakes import EMBED, FakeTexts
from ovref.exchange.own_arrays import OwnArrays, collection_from_arrays
from ovref.storage.file_store import Store
from ovref_inference import ReferenceCollection
from ovref_inference.collection import store
from ovref_pipelines import cli

NOUNS = ["cat", "dog", "elk", "fox", "owl"]


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """An undivided collection of 100 references."""
    folder = tmp_path_factory.mktemp("old")
    rng = np.random.default_rng(0)
    captions = [f"{noun} number {number}" for number, noun in enumerate(NOUNS * 20)]
    arrays = OwnArrays(visual=rng.standard_normal((100, 8)), nouns=NOUNS * 20, captions=captions)
    collection_from_arrays(str(folder / "whole"), arrays, EMBED, texts=FakeTexts())
    return folder / "whole"


def convert(capsys, old, new, *more, most=40):
    """The exit code, stdout and stderr of the command."""
    arguments = ["convert", "collection", old, new, "--partition-references", most, *more]
    try:
        code = cli.main([str(one) for one in arguments])
    except SystemExit as error:  # how argparse ends
        code = error.code
    return code, *capsys.readouterr()


def content(folder):
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture
def new(old, tmp_path, capsys):
    """The collection, converted in this process."""
    assert convert(capsys, old, tmp_path / "local", "engine.engine=local")[0] == 0
    return tmp_path / "local"


def test_it_says_where_it_stands_and_what_there_is(old, tmp_path, capsys):
    settings = ("engine.engine=local", "engine.progress_seconds=0.000001")
    code, out, err = convert(capsys, old, tmp_path / "new", *settings)
    assert code == 0 and out.startswith(f"collection: {tmp_path / 'new'}, ")
    assert "100 references" in out and "5 nouns" in out
    lines = err.splitlines()
    assert lines[0] == f"collection: converting {old} to {tmp_path / 'new'}"
    assert {"collection: counts, 1/1", "collection: plan, 1/1"} <= {*lines}
    assert lines[-1].startswith("collection: done in")
    assert lines[-2] == "collection: 3 partitions, of at most 40 references"
    assert not (tmp_path / "new" / "_reduce").exists()
    with ReferenceCollection.open(tmp_path / "new") as a, ReferenceCollection.open(old) as b:
        assert len(a) == len(b) and a.nouns == b.nouns
        sizes = [one.references for one in a.manifest.partitions]
    assert max(sizes) <= 40 < sum(sizes)
    assert f"collection: partitions, {len(sizes)}/{len(sizes)}" in lines
    assert cli.main(["verify", str(tmp_path / "new")]) == 0
    before = content(tmp_path / "new")
    assert convert(capsys, old, tmp_path / "new", *settings)[0] == 0  # it is there
    assert content(tmp_path / "new") == before


def test_it_says_how_many_deleted_references_it_leaves_out(old, tmp_path, capsys):
    shutil.copytree(old, tmp_path / "fewer")
    store.tombstone(str(tmp_path / "fewer"), range(7), "blurred")
    code, out, err = convert(capsys, tmp_path / "fewer", tmp_path / "new", "engine.engine=local")
    assert code == 0 and "93 references" in out
    assert "; 7 deleted ones left out" in err


def test_one_that_is_not_finished_is_named_as_such(tmp_path, capsys):
    (tmp_path / "new" / "_scatter" / "0123" / "counts").mkdir(parents=True)
    (tmp_path / "new" / "_scatter" / "0123" / "counts" / "step.json").write_text("{}")
    for verb in ("status", "verify", "gc"):
        assert cli.main([verb, str(tmp_path / "new")]) == 2
        assert "has an unfinished collection, in partitions" in capsys.readouterr().err


def test_garbage_of_a_killed_conversion_is_deleted_from_the_collection(new, capsys):
    before = content(new)
    left = next((new / "partitions").iterdir()) / "visual.f16.npy.4a71b1c0.tmp"
    left.write_bytes(b"half")
    assert cli.main(["gc", str(new)]) == 0 and left.exists()  # perhaps somebody writes it
    assert cli.main(["gc", str(new), "--older-than", "0", "--dry-run"]) == 0 and left.exists()
    assert str(left) in capsys.readouterr().out
    assert cli.main(["gc", str(new), "--older-than", "0"]) == 0
    assert content(new) == before


@pytest.mark.slow
def test_two_workers_make_the_same_bytes(old, new, tmp_path, capsys, local_ray):
    code, *_ = convert(capsys, old, tmp_path / "ray", "engine.workers=2")
    assert code == 0 and content(tmp_path / "ray") == content(new)


def test_from_s3_to_s3(old, new, tmp_path, capsys, s3_environment):
    there = Store.open("s3://bucket/convert")
    for path, data in content(old).items():
        there.write(f"old/{path}", data)
    settings = ("engine.engine=local", f"work={tmp_path / 'work'}")
    code, out, _ = convert(capsys, f"{there.url}/old", f"{there.url}/new", *settings)
    assert code == 0 and out.startswith("collection: s3://bucket/convert/new, ")
    made = there.child("new")
    assert {path: made.read(path) for path in made.list()} == content(new)


@pytest.mark.parametrize(
    ("source", "target", "more", "says"),
    [
        ("gone", "new", {}, "no reference collection at"),
        ("old", "hf://me/them", {}, "`ovref publish` takes it to the Hub"),
        ("old", "old", {}, "convert into a new folder"),
        ("old", "in old", {}, "is in the collection"),
        ("old", "taken", {}, "is not empty (it has file.txt): convert into a new folder"),
        ("old", "new", {"most": 0}, "must be 1 or more, found 0"),
        ("old", "new", {"most": "many"}, "invalid int value: 'many'"),
        ("old", "new", {"more": ["reduce.seed=1"]}, "keeps the settings that OLD was reduced with"),
        ("old", "/proc/none", {}, "NEW: no files can be written in /proc"),
        ("old", "new", {"more": ["work=/proc/none"]}, "work: no files can be written in /proc"),
        ("old", "new", {"more": ["work=s3://bucket/x"]}, "work must be on this machine"),
        ("new", "newer", {"first": True}, "is partitioned already"),
    ],
)
def test_what_is_refused(old, tmp_path, capsys, source, target, more, says):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file.txt").write_text("mine")
    places = {"old": old, "in old": old / "new", "hf://me/them": "hf://me/them"}
    local = "engine.engine=local"
    if more.get("first"):
        assert convert(capsys, old, tmp_path / "new", local)[0] == 0
    source, target = (places.get(name, tmp_path / name) for name in (source, target))
    code, out, err = convert(
        capsys, source, target, local, *more.get("more", ()), most=more.get("most", 40)
    )
    assert code == 2 and out == "" and says in err and "Traceback" not in err
    assert "converting" not in err.replace(says, "") or more.get("first")
    assert not (old / "new").exists()
    assert target == old or not (tmp_path / "new" / "_scatter").exists()


def test_a_killed_one_with_another_number_leaves_nothing(old, tmp_path, capsys):
    left = tmp_path / "new" / "_reduce" / "00000-0123456789ab"
    left.mkdir(parents=True)
    (left / "visual.npy").write_bytes(b"half")
    for name in ("00000-0123456789ab", "0123456789abcdef"):
        left.with_name(f"{name}.lock").touch()  # a killed process removes none
    assert convert(capsys, old, tmp_path / "new", "engine.engine=local")[0] == 0
    assert not left.parent.exists()


def test_another_conversion_of_the_same_collection_says_what_differs(old, tmp_path, capsys):
    shutil.copytree(old, tmp_path / "fewer")
    local = "engine.engine=local"
    assert convert(capsys, tmp_path / "fewer", tmp_path / "new", local)[0] == 0
    code, _, err = convert(capsys, tmp_path / "fewer", tmp_path / "new", local, most=50)
    assert code == 2 and "with --partition-references 40, now it is 50" in err
    store.tombstone(str(tmp_path / "fewer"), range(7), "blurred")
    code, _, err = convert(capsys, tmp_path / "fewer", tmp_path / "new", local)
    assert code == 2 and "when other references were deleted there (0, now 7)" in err
    assert "ovref tombstone" in err


def test_models_need_their_classes(capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["convert", "ovseg", "model.pth", "folder"])
    assert error.value.code == 2 and "--classes" in capsys.readouterr().err
