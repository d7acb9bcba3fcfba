"""The comparison of two builds: equal ones, and ones with a difference in each kind of file."""

import io
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "pipelines")]

import small_build  # noqa: E402

import compare_builds  # noqa: E402
from ovref.storage.file_store import Store  # noqa: E402


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The same small build, made twice in two places."""
    outputs = []
    for name in ("old", "new"):
        output = tmp_path_factory.mktemp(name)
        small_build.build(Store.open(str(output)), tmp_path_factory.mktemp("work"))
        outputs.append(output)
    return outputs


@pytest.fixture
def pair(built, tmp_path):
    """The first build, and a copy of the second that a test may change."""
    shutil.copytree(built[1], tmp_path / "new")
    return built[0], tmp_path / "new"


def rewritten(path, change):
    """Writes the tar again, each member's content as `change(name, content)` gives it."""
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(path, "w") as tar:
        for member, content in members:
            content = change(member.name, content)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_a_build_made_twice_has_the_same_bytes(built, capsys):
    assert compare_builds.main([str(output) for output in built]) == 0
    files = [path for path in built[0].rglob("*") if path.is_file()]
    # All of them but build.json, which holds the output's own path.
    assert capsys.readouterr().out == f"{len(files) - 1} files compared: no byte differs\n"


def test_times_of_a_marker_are_not_compared_but_its_hashes_are(pair):
    path = pair[1] / "images/_commits/000001.json"
    marker = json.loads(path.read_text())
    path.write_text(json.dumps({**marker, "seconds": 7.5, "attempt": 1}))
    assert compare_builds.differences(*pair) == []
    path.write_text(json.dumps({**marker, "outputs": 2}))
    assert compare_builds.differences(*pair) == ["differs: images/_commits/000001.json"]


def test_a_sample_that_differs_is_named_by_its_member(pair):
    (tar,) = (pair[1] / "images").glob("000002-*.tar")
    with tarfile.open(tar) as found:
        changed = found.getnames()[0]
    rewritten(tar, lambda name, content: content + b"x" if name == changed else content)
    # As of another build: the hash in the name is another one too.
    tar.rename(tar.with_name(f"000002-{'0' * 16}.tar"))
    assert compare_builds.differences(*pair) == [f"differs: images/000002.tar ({changed})"]


def test_files_of_the_collection_and_missing_ones_are_named(pair, capsys):
    old, new = pair
    (new / "collection/visual.faiss").write_bytes(b"another index")
    (new / "vocabulary.json").write_text("{}")
    (new / "references/complete.json").unlink()
    assert compare_builds.main([str(old), str(new)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"only in {old}: references/complete.json",
        f"only in {new}: vocabulary.json",
        "differs: collection/visual.faiss",
    ]


def test_a_folder_without_a_build_is_refused(built, tmp_path):
    with pytest.raises(SystemExit, match="is not the output of a build"):
        compare_builds.main([str(built[0]), str(tmp_path)])


@pytest.mark.slow
def test_the_working_tree_builds_the_bytes_of_its_last_commit(capsys):
    git = ["git", "-C", str(compare_builds.ROOT), "rev-parse", "--verify", "--quiet", "HEAD"]
    if shutil.which("git") is None or subprocess.run(git, capture_output=True).returncode:
        pytest.skip("this is no git checkout")
    assert compare_builds.main(["--before", "HEAD", "--captions", "6"]) == 0
    assert "no byte differs" in capsys.readouterr().out
