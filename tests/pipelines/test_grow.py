"""`ovref grow` from the shell: a tiny real build, grown, resumed, and what is refused."""

import json
import re
import shutil

import pytest

import ovref_inference
from ovref.config import parse
from ovref.reduce import ReduceSpec
from ovref.reduce.convert import convert_collection
from ovref.reduce.published import check_kind_of_base, read_published
from ovref.storage.file_store import Store
from ovref_pipelines import cli
from ovref_pipelines.verbs import grow

SMALL = (
    "synthesize.steps=1", "synthesize.batch_size=4", "shard_size=4", "engine.engine=local",
    "engine.workers=1",
)  # fmt: skip
NAME = re.compile("Castle|fortress").search


def run(capsys, *arguments):
    """The exit code, stdout and stderr of a command."""
    code = cli.main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def collection(tiny_build, tmp_path_factory):
    """The collection alone, away from its build."""
    place = tmp_path_factory.mktemp("alone") / "collection"
    shutil.copytree(tiny_build / "collection", place)
    return place


@pytest.fixture
def classes(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("Castle; fortress\nsky\n")
    return path


def test_a_weak_class_gets_references(collection, classes, tmp_path, capsys):
    output = tmp_path / "grown"
    with ovref_inference.open(collection) as opened:
        before, sky = len(opened), len(opened.references_of("sky"))
    assert sky >= 3
    command = ["grow", collection, "--classes", classes, "--target", 3, "--output", output, *SMALL]
    code, out, _ = run(capsys, *command, "--dry-run", "--probe", 0)
    assert code == 0 and "1 of 2 classes have fewer than 3 references" in out
    assert "Castle: has 0, 4 captions" in out
    assert not output.exists()

    code, out, _ = run(capsys, *command)
    captions = (output / "grow_captions.txt").read_text().splitlines()
    assert code == 0 and len(captions) == 4 and all(NAME(text) for text in captions)
    plan = json.loads((output / "grow.json").read_text())
    after = {row["name"]: row for row in plan["after"]}
    assert after["Castle"]["by_name"] >= 3 and "1 of 1 weak classes have 3 references" in out
    with ovref_inference.open(output / "collection") as opened:
        ids = opened.references_of("castle")
        assert len(ids) == after["Castle"]["by_name"] and ids.min() >= before
        assert {row["caption"] for row in opened.rows(ids)} <= set(captions)
        assert opened.manifest.build["base"]
        (new,) = [one for one in opened.manifest.licences if one.startswith("grow_")]
        assert new.endswith(": Apache-2.0")  # as the captions that it was grown from
        fingerprint = opened.manifest.fingerprint

    code, out, _ = run(capsys, *command)  # nothing is left to do
    assert code == 0 and "Castle: has 0, 4 captions" in out
    with ovref_inference.open(output / "collection") as opened:
        assert opened.manifest.fingerprint == fingerprint
    other = [*command[:5], 4, *command[6:]]
    code, _, err = run(capsys, *other)
    assert code == 2 and "of another growth: target was 3 and is now 4" in err
    code, out, _ = run(
        capsys, "grow", output, "--classes", classes, "--target", 2, "--output", tmp_path / "more"
    )
    assert code == 0 and "each of the 2 classes has 2 references or more" in out
    assert not (tmp_path / "more").exists()


def test_what_is_refused(tiny_build, collection, classes, tmp_path, capsys):
    words = tmp_path / "words.txt"
    words.write_text("no braces\n")
    command = [
        "grow",
        collection,
        "--classes",
        classes,
        "--target",
        3,
        "--output",
        tmp_path / "out",
    ]
    for arguments, message in (
        (["--templates", words], "each with one {}"),
        (["corpus.path=x.txt"], "corpus.path is given by --captions"),
        (["base=x"], "base is given by COLLECTION"),
        (["nothing=1"], "unknown key nothing"),
        (["--captions", tmp_path / "none.txt"], "no caption corpus at"),
        (["--config", "miniature_vocseg"], "not built from generated images"),
    ):
        code, _, err = run(capsys, *command, *arguments)
        assert code == 2 and message in err, err
    for place, message in ((tmp_path, "is no output of `ovref build`"),):
        code, _, err = run(capsys, "grow", place, *command[2:])
        assert code == 2 and message in err, err
    code, _, err = run(capsys, *command[:6], "--output", tiny_build)
    assert code == 2 and "is of another build" in err
    with pytest.raises(SystemExit):
        run(capsys, *command[:4], "--target", 0, "--output", tmp_path / "out")


def test_a_converted_collection_grows_in_its_partitions(tiny_build, tmp_path):
    """Whether it lies beside the build of the undivided one or not."""
    shutil.copy(tiny_build / "build.json", tmp_path / "build.json")
    old = str(tiny_build / "collection")
    for folder in (tmp_path, tmp_path / "alone"):
        target = Store.open(str(folder / "divided"))
        convert_collection(old, 5, output=target, work=tmp_path / "work")
        place, settings = grow._opened(
            grow.Grow(place=target.url, classes="x", target=3, output=str(tmp_path / "out"))
        )
        assert place == target.url and settings["synthesize"]
        spec = parse(ReduceSpec, settings["reduce"], "reduce")
        check_kind_of_base(read_published(target), place, spec)
        assert spec.partition_references == 5


def test_a_collection_that_cannot_take_the_references_is_refused_before_anything_is_made(
    collection, classes, tmp_path, capsys
):
    divided, out = tmp_path / "divided", tmp_path / "out"
    target = Store.open(str(divided))
    convert_collection(str(collection), 5, output=target, work=tmp_path / "work")
    build = ["build", "--config", "miniature", f"output={out}", *SMALL]
    grown = ["grow", divided, "--classes", classes, "--target", 3, "--output", out]
    for command, message in (
        ([*build, f"base={divided}"], "which growing does not divide anew: set"),
        ([*build, f"base={collection}", "reduce.partition_references=5"], "divide it first by"),
        ([*build, f"base={collection}", "embed.templates=['one {}.']"], "its templates is"),
        ([*build, f"base={tmp_path / 'none'}"], "no reference collection at"),
        ([*grown, *SMALL, "reduce.partition_references=7"], "set reduce.partition_references=5"),
    ):
        for more in ([], ["--dry-run", "--probe", 0]):
            code, _, err = run(capsys, *command, *more)
            assert code == 2 and message in err, err
            assert not out.exists() and "models: loading" not in err
