"""Where corpora lie: symbolic links, patterns, protocols, and what messages say of a place."""

import os
import sys
from pathlib import Path

import pytest
from fsspec.registry import _registry

from ovref.corpora import CorpusSpec, identify, read_captions
from ovref.corpora.spec import corpus_files
from ovref.errors import InputError
from ovref.identity import fingerprint
from ovref_inference.errors import MissingPackageError


def texts(path, **options) -> list[str]:
    return [record.text for record in read_captions(CorpusSpec(path=str(path), **options))]


@pytest.fixture
def cache(tmp_path) -> Path:
    """A folder in the manner of Hugging Face's cache: names that are links to blobs elsewhere."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    (snapshot / "more").mkdir(parents=True)
    for name, text in [("a.txt", "a cat\n"), ("more/b.txt", "a dog\n")]:
        blob = blobs / f"{name.replace('/', '-')}.blob"
        blob.write_text(text)
        (snapshot / name).symlink_to(blob)
    (snapshot / "c.txt").write_text("a bird\n")
    (tmp_path / "linked").symlink_to(snapshot)
    return tmp_path


# -- links --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("snapshot", ["a cat", "a bird"]),
        ("linked", ["a cat", "a bird"]),
        ("snapshot/*.txt", ["a cat", "a bird"]),
        ("*/*.txt", ["a cat", "a bird", "a cat", "a bird"]),
        ("snapshot/a.txt", ["a cat"]),
        ("linked/*/*.txt", ["a dog"]),
        ("snapshot/**/*.txt", ["a cat", "a bird", "a dog"]),
    ],
)
def test_linked_files_and_folders_are_read(cache, path, expected):
    assert texts(cache / path, corpus_id="c") == expected


def test_linked_folders_of_images_are_read_and_fingerprinted(cache):
    images, deep = cache / "images", cache / "deep"
    images.mkdir()
    deep.mkdir()
    (deep / "1.jpg").write_bytes(b"1")
    (deep / "1.txt").write_text("a boat")
    (images / "sub").symlink_to(deep)
    spec = CorpusSpec(path=str(images), format="imagefolder")
    records = list(read_captions(spec, images=True))
    assert [(record.text, record.image) for record in records] == [("a boat", b"1")]
    seen = [fingerprint(identify(spec))]
    (deep / "1.txt").write_text("a ship")
    seen.append(fingerprint(identify(spec)))
    (deep / "2.jpg").write_bytes(b"22")
    seen.append(fingerprint(identify(spec)))
    assert len(set(seen)) == 3


def test_the_fingerprint_of_a_link_is_that_of_the_file_behind_it(cache):
    (cache / "plain").mkdir()
    (cache / "plain" / "a.txt").write_text("a cat\n")
    linked = CorpusSpec(path=str(cache / "snapshot" / "a.txt"), images=str(cache / "snapshot"))
    copied = CorpusSpec(path=str(cache / "plain" / "a.txt"))
    assert identify(linked)["files"] == identify(copied)["files"]
    assert identify(linked)["images"]["count"] == 3
    before = identify(linked)
    (cache / "blobs" / "more-b.txt.blob").write_text("a longer dog\n")
    assert identify(linked)["images"] != before["images"]


def test_links_that_lead_in_circles_end(cache):
    (cache / "snapshot" / "more" / "up").symlink_to(cache / "snapshot")
    (cache / "snapshot" / "self").symlink_to(cache / "snapshot" / "self")
    assert texts(cache / "snapshot" / "**" / "*.txt") == ["a cat", "a bird", "a dog"]
    for spec in [
        CorpusSpec(path=str(cache / "snapshot"), format="imagefolder"),
        CorpusSpec(path=str(cache / "snapshot" / "a.txt"), images=str(cache / "snapshot")),
    ]:
        identify(spec)
        assert {record.text for record in read_captions(spec)} <= {"a cat", "a dog", "a bird"}


def test_a_link_that_leads_nowhere_is_an_error_for_captions_and_a_drop_for_an_image(tmp_path):
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"cannot read .*gone\.txt.*No such file"):
        texts(tmp_path)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "1.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "c" / "1.txt").write_text("a cat")
    (drop,) = read_captions(CorpusSpec(path=str(tmp_path / "c")), images=True)
    assert drop.reason == "missing_image"


def test_hidden_files_are_no_part_of_a_corpus(tmp_path):
    (tmp_path / "a.txt").write_text("a cat\n")
    spec = CorpusSpec(path=str(tmp_path / "a.txt"), images=str(tmp_path))
    before = identify(spec)
    (tmp_path / "._a.txt").write_bytes(b"\x00\x05\x16\x07")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / ".ipynb_checkpoints" / "a.txt").write_text("an old cat\n")
    assert texts(tmp_path) == texts(f"{tmp_path}/*.txt") == texts(f"{tmp_path}/**") == ["a cat"]
    assert identify(spec) == before


# -- patterns -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("part-[0-1].txt", ["part-0", "part-1"]),
        ("part-[!0].txt", ["part-1", "part-2"]),
        ("part-?.txt", ["part-0", "part-1", "part-2"]),
        ("old [2019]/*.txt", ["2019"]),
        ("old [[]2019]/*.txt", ["2019"]),
        ("odd[1].txt", ["odd"]),
        ("odd[1]*", ["odd"]),
    ],
)
def test_brackets_and_question_marks_are_patterns_unless_a_name_has_them(
    tmp_path, pattern, expected
):
    for number in range(3):
        (tmp_path / f"part-{number}.txt").write_text(f"part-{number}")
    (tmp_path / "old [2019]").mkdir()
    (tmp_path / "old [2019]" / "x.txt").write_text("2019")
    (tmp_path / "odd[1].txt").write_text("odd")
    if pattern == "odd[1]*":
        with pytest.raises(InputError, match="no such file"):
            texts(tmp_path / pattern)
        pattern = "odd[[]1]*"
    assert texts(tmp_path / pattern) == expected


def test_patterns_with_brackets_on_s3(bucket):
    for number in range(3):
        bucket.pipe_file(f"corpora/odd [x]/{number}.txt", f"caption {number}".encode())
    assert texts("s3://corpora/odd [x]/[01].txt") == ["caption 0", "caption 1"]
    assert texts("s3://corpora/**/[12].txt")[-2:] == ["caption 1", "caption 2"]


# -- what messages say --------------------------------------------------------------------------


def test_a_relative_path_is_named_with_the_folder_that_it_is_relative_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.txt").write_text("a cat\n")
    assert texts("c.txt") == ["a cat"]
    here = f"relative to the current folder: {os.path.realpath(tmp_path)}/none"
    with pytest.raises(InputError, match=here):
        texts("none.txt")
    with pytest.raises(InputError, match=here):
        texts("none/*.txt")
    with pytest.raises(InputError, match=here):
        texts("none", format="imagefolder")
    with pytest.raises(InputError, match=here):
        identify(CorpusSpec(path="c.txt", images="none"))
    with pytest.raises(InputError) as caught:
        texts(tmp_path / "none.txt")
    assert "relative to" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("foo://b/x.txt", "unknown protocol foo://.*expected a local path, or a URL"),
        ("gs://b/x.txt", "gs://.* needs gcsfs, which is not installed: pip install gcsfs"),
        ("abfs://b/x.txt", "needs adlfs, which is not installed: pip install adlfs"),
        ("s3://b/x.txt", r"needs s3fs, which is not installed: pip install 'ovref\[s3\]'"),
        ("https://b/x.txt", r"needs aiohttp, .*: pip install 'ovref\[http\]'"),
        ("hf://datasets/b/x.txt", r"needs huggingface_hub, .*: pip install 'ovref\[hf\]'"),
    ],
)
def test_unknown_and_uninstalled_protocols_say_what_to_do(tmp_path, monkeypatch, url, message):
    error = InputError if url.startswith("foo") else MissingPackageError
    for module in ("gcsfs", "adlfs", "s3fs", "aiohttp", "huggingface_hub"):
        monkeypatch.setitem(sys.modules, module, None)
    # fsspec remembers the classes of protocols that other tests have used, Python the module.
    monkeypatch.delitem(_registry, url.partition(":")[0], raising=False)
    monkeypatch.delitem(sys.modules, "fsspec.implementations.http", raising=False)
    (tmp_path / "c.json").write_text('{"images": [], "annotations": [{"caption": "a cat"}]}')
    with pytest.raises(error, match=message):
        texts(url)
    spec = CorpusSpec(path=str(tmp_path / "c.json"), images=url)
    with pytest.raises(error, match=message):
        identify(spec)
    with pytest.raises(error, match=message):
        next(read_captions(spec, images=True))


def test_a_hub_out_of_reach_is_an_input_error(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    import httpx2

    def refuse(*_, **__):
        raise httpx2.ConnectError("Name or service not known")

    monkeypatch.setattr(hub.HfFileSystem, "info", refuse)
    monkeypatch.setattr(hub.HfFileSystem, "isdir", refuse)
    with pytest.raises(InputError, match=r"hf://.*Name or service not known; check the network"):
        corpus_files(CorpusSpec(path="hf://datasets/a/b/x.txt"))


def test_two_colons_in_a_local_name_are_no_chain_of_places(tmp_path):
    (tmp_path / "a").write_text("another file\n")
    (tmp_path / "a::b.txt").write_text("a cat\n")
    assert texts(tmp_path / "a::b.txt") == ["a cat"]
