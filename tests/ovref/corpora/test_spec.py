import dataclasses
import os

import pytest

from ovref import config
from ovref.corpora import CorpusSpec, corpus_identity, identify
from ovref.corpora.spec import corpus_files, corpus_id
from ovref.errors import ConfigError, InputError
from ovref.identity import fingerprint


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/data/captions_val2017.json", "captions_val2017"),
        ("captions.tsv.gz", "captions"),
        ("s3://bucket/cc12m/*.tar", "cc12m"),
        ("s3://bucket/laion/part-*/x-*.parquet", "laion"),
        ("/data/cc3m/", "cc3m"),
        ("*.txt", "corpus"),
    ],
)
def test_the_default_id_is_the_name_of_the_file_or_folder(path, name):
    assert corpus_id(CorpusSpec(path=path)) == name
    assert corpus_id(CorpusSpec(path=path, corpus_id="mine")) == "mine"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("path", ""),
        ("corpus_id", ""),
        ("limit", 0),
        ("draws", 0),
        ("max_characters", 0),
        ("caption_column", -1),
        ("image_column", -2),
    ],
)
def test_values_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        CorpusSpec(**{"path": "x.txt", field: value})


def test_an_image_column_needs_a_format_with_columns():
    with pytest.raises(ValueError, match="image_column has no meaning in the format text"):
        CorpusSpec(path="x.txt", format="text", image_column="image")


def test_reads_from_plain_values_and_refuses_what_it_does_not_know():
    spec = config.parse(CorpusSpec, {"path": "x.csv", "caption_column": 1, "limit": 5})
    assert spec == CorpusSpec(path="x.csv", caption_column=1, limit=5)
    assert config.parse(CorpusSpec, config.dump(spec)) == spec
    with pytest.raises(ConfigError, match="format"):
        config.parse(CorpusSpec, {"path": "x.csv", "format": "excel"})
    with pytest.raises(ConfigError, match="unknown key captions"):
        config.parse(CorpusSpec, {"path": "x.csv", "captions": 1})


def test_files_of_a_folder_are_sorted_and_others_left_out(tmp_path):
    for name in ["b.txt", "a.txt.gz", "c.TXT", "_SUCCESS", "notes.md", "deep/d.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    _, files = corpus_files(CorpusSpec(path=str(tmp_path)))
    assert [(os.path.basename(name), kind) for name, kind in files] == [
        ("a.txt.gz", "text"),
        ("b.txt", "text"),
        ("c.TXT", "text"),
    ]


def test_a_pattern_takes_what_it_matches(tmp_path):
    for name in ["x-1.txt", "x-2.txt", "y-1.txt"]:
        (tmp_path / name).write_bytes(b"x")
    _, files = corpus_files(CorpusSpec(path=f"{tmp_path}/x-*"))
    assert [os.path.basename(name) for name, _ in files] == ["x-1.txt", "x-2.txt"]


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ([], {}, "no caption corpus at"),
        (["a.md"], {}, "holds no file of a known format"),
        (["a.txt"], {"format": "parquet"}, "holds no file of a parquet format"),
        (["a.txt", "b.csv"], {}, "mixes the formats csv, text"),
    ],
)
def test_a_folder_without_a_corpus_is_refused(tmp_path, names, options, message):
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError, match=message):
        corpus_files(CorpusSpec(path=str(tmp_path), **options))


def test_a_named_format_reads_a_file_of_any_name(tmp_path):
    (tmp_path / "captions").write_text("a cat")
    _, files = corpus_files(CorpusSpec(path=str(tmp_path / "captions"), format="text"))
    assert files == [(str(tmp_path / "captions"), "text")]
    with pytest.raises(InputError, match="name the format with `format`"):
        corpus_files(CorpusSpec(path=str(tmp_path / "captions")))


@pytest.mark.parametrize("path", ["/no/such/file.json", "/no/such/*.tar", "gopher://x/y.txt"])
def test_a_missing_corpus_is_an_input_error_that_names_it(path):
    with pytest.raises(InputError, match=r"file\.json|\*\.tar|gopher"):
        corpus_files(CorpusSpec(path=path))


def test_identity_is_of_the_contents_and_not_of_the_place(tmp_path):
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "c.txt").write_text("a cat\n")
    here = CorpusSpec(path=str(tmp_path / "here" / "c.txt"))
    there = CorpusSpec(path=str(tmp_path / "there" / "c.txt"))
    assert identify(here) == identify(there)
    fingerprint(identify(here))  # has a canonical form

    (tmp_path / "there" / "c.txt").write_text("a dog\n")  # same size
    assert identify(here) != identify(there)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("corpus_id", "other"),
        ("caption_column", "text"),
        ("limit", 3),
        ("draws", 2),
        ("max_characters", 10),
        ("images", "images"),
    ],
)
def test_identity_tells_apart_whatever_changes_the_captions(tmp_path, field, value):
    (tmp_path / "c.txt").write_text("a cat\n")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.jpg").write_bytes(b"x")
    spec = CorpusSpec(path=str(tmp_path / "c.txt"))
    if field == "images":
        value = str(tmp_path / value)
    assert identify(dataclasses.replace(spec, **{field: value})) != identify(spec)


def test_identity_notices_added_and_changed_images(tmp_path):
    (tmp_path / "c.json").write_text("{}")
    images = tmp_path / "images"
    images.mkdir()
    spec = CorpusSpec(path=str(tmp_path / "c.json"), images=str(images))
    with pytest.raises(InputError, match="there are no images"):
        identify(spec)
    seen = []
    for name, data in [("a.jpg", b"1"), ("b.jpg", b"1"), ("b.jpg", b"22")]:
        (images / name).write_bytes(data)
        seen.append(fingerprint(identify(spec)))
    assert len(set(seen)) == 3


def test_an_unreadable_file_is_an_input_error(tmp_path, monkeypatch):
    (tmp_path / "c.txt").write_text("a cat\n")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(corpus_identity, "sha256_of", refuse)
    with pytest.raises(InputError, match=r"cannot read .*c\.txt.*Permission denied"):
        identify(CorpusSpec(path=str(tmp_path / "c.txt")))
