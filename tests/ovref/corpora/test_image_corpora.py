"""Captions with their images, in every layout, on disk and on S3.

Run: pytest tests/ovref/corpora/test_image_corpora.py
"""

import csv
import dataclasses
import hashlib
import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ovref.contract import Dropped
from ovref.corpora import CorpusSpec, formats, identify, read_captions, readers
from ovref.errors import InputError
from ovref.identity import record_key
from ovref.records import Caption
from ovref.stored_images import decode_image

PAIRS = [
    ("a.jpg", "a cat on a mat"),
    ("sub/b.png", "two dogs"),
    ("sub/c.webp", "a red car, parked"),
]
"""Image and caption; nothing here looks into an image."""


def image(name: str) -> bytes:
    return f"the bytes of {name}".encode()


def files_of(layout: str) -> dict[str, bytes]:
    """The same pairs in each layout: name -> contents."""
    captions = dict(PAIRS)
    images = {f"images/{name}": image(name) for name in captions}
    if layout == "sidecar":
        texts = {f"{name.rpartition('.')[0]}.txt": text.encode() for name, text in PAIRS}
        return {name: image(name) for name in captions} | texts
    rows = [{"file_name": name, "text": text} for name, text in PAIRS]
    if layout == "metadata.jsonl":
        lines = "\n".join(json.dumps(row) for row in rows)
        return {name: image(name) for name in captions} | {layout: lines.encode()}
    table = io.StringIO()
    writer = csv.DictWriter(table, ["file_name", "text"])
    writer.writeheader()
    writer.writerows(rows)
    if layout == "metadata.csv":
        return {name: image(name) for name in captions} | {layout: table.getvalue().encode()}
    if layout == "metadata.parquet":
        return {name: image(name) for name in captions} | {layout: parquet(rows)}
    if layout == "coco.json":
        tree = {
            "images": [{"id": i, "file_name": name} for i, (name, _) in enumerate(PAIRS)],
            "annotations": [
                {"id": 10 + i, "image_id": i, "caption": text} for i, (_, text) in enumerate(PAIRS)
            ],
        }
        return images | {layout: json.dumps(tree).encode()}
    if layout == "pairs.csv":
        return images | {layout: table.getvalue().encode()}
    if layout == "pairs.tsv":
        return images | {layout: "\n".join(f"{name}\t{text}" for name, text in PAIRS).encode()}
    if layout == "pairs.jsonl":
        return images | {layout: "\n".join(json.dumps(row) for row in rows).encode()}
    if layout == "paths.parquet":
        return images | {layout: parquet(rows)}
    if layout == "bytes.parquet":
        return {layout: parquet([row | {"file_name": image(row["file_name"])} for row in rows])}
    if layout == "structs.parquet":  # as Hugging Face's datasets writes its image feature
        return {
            layout: parquet(
                [
                    row | {"file_name": {"bytes": image(row["file_name"]), "path": None}}
                    for row in rows
                ]
            )
        }
    assert layout == "samples.tar"
    members = []
    for number, (name, text) in enumerate(PAIRS):
        members += [(f"{number}.{name.rpartition('.')[2]}", image(name)), (f"{number}.txt", text)]
    return {layout: tar(members)}


def parquet(rows: list[dict]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def tar(members: list[tuple[str, bytes | str]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name, data in members:
            data = data if isinstance(data, bytes) else data.encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


LAYOUTS = {
    "sidecar": {"format": "imagefolder"},
    "metadata.jsonl": {"format": "imagefolder"},
    "metadata.csv": {"format": "imagefolder"},
    "metadata.parquet": {"format": "imagefolder"},
    "coco.json": {},
    "pairs.csv": {"image_column": "file_name"},
    "pairs.tsv": {"image_column": 0, "caption_column": 1},
    "pairs.jsonl": {"image_column": "file_name"},
    "paths.parquet": {"image_column": "file_name"},
    "bytes.parquet": {"image_column": "file_name"},
    "structs.parquet": {"image_column": "file_name"},
    "samples.tar": {},
}


def spec_of(layout: str, place: str, **changes) -> CorpusSpec:
    """The corpus of `files_of(layout)` written below `place`."""
    options = dict(LAYOUTS[layout])
    path = place
    if options.get("format") != "imagefolder":
        path = f"{place}/{layout}"
        if any(name.startswith("images/") for name in files_of(layout)):
            options["images"] = f"{place}/images"
    return CorpusSpec(path=path, **{"corpus_id": "c", **options, **changes})


def write(folder, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def read(spec: CorpusSpec) -> list[Caption | Dropped]:
    return list(read_captions(spec, images=True))


def pairs(records) -> list[tuple[str, bytes] | str]:
    return [
        record.reason if isinstance(record, Dropped) else (record.text, record.image)
        for record in records
    ]


EXPECTED = [(text, image(name)) for name, text in PAIRS]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_captions_with_their_images(tmp_path, layout):
    write(tmp_path, files_of(layout))
    spec = spec_of(layout, str(tmp_path))
    records = read(spec)
    assert pairs(records) == EXPECTED
    assert [record.key for record in records] == [
        record_key("c", text, image=hashlib.sha256(data).hexdigest()) for text, data in EXPECTED
    ]
    assert len({record.source for record in records}) == 3
    # A build that draws its images takes the captions alone, under the keys of captions alone.
    alone = list(read_captions(spec))
    assert [(record.text, record.image) for record in alone] == [(t, None) for t, _ in EXPECTED]
    assert [record.key for record in alone] == [record_key("c", text) for text, _ in EXPECTED]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_from_s3(bucket, tmp_path, layout):
    for name, data in files_of(layout).items():
        bucket.pipe_file(f"corpora/pairs/{layout}/{name}", data)
    write(tmp_path / layout, files_of(layout))
    spec = spec_of(layout, f"s3://corpora/pairs/{layout}")
    assert read(spec) == read(spec_of(layout, str(tmp_path / layout)))
    before = identify(spec)
    assert identify(spec) == before
    if layout == "sidecar":  # another caption of the same length
        bucket.pipe_file(f"corpora/pairs/{layout}/a.txt", b"a dog on a mat")
        assert identify(spec) != before


def test_the_same_words_of_two_images_are_two_captions_and_of_one_image_one(tmp_path):
    rows = [{"file_name": data, "text": "a cat"} for data in (b"1", b"2", b"1")]
    write(tmp_path, {"c.parquet": parquet(rows)})
    spec = CorpusSpec(path=str(tmp_path / "c.parquet"), image_column="file_name")
    keys = [record.key for record in read(spec)]
    assert keys[0] == keys[2] != keys[1]


# -- image folders ------------------------------------------------------------------------------


def test_a_folder_of_images_with_texts_is_known_by_its_files(tmp_path):
    write(tmp_path, {"a.JPG": b"1", "a.txt": b"a cat"})
    assert pairs(read(CorpusSpec(path=str(tmp_path)))) == [("a cat", b"1")]
    write(tmp_path / "none", {"x/a.jpg": b"1", "x/a.txt": b"a cat"})
    with pytest.raises(InputError, match="name the format: imagefolder"):
        read(CorpusSpec(path=str(tmp_path / "none")))
    deep = CorpusSpec(path=str(tmp_path / "none"), format="imagefolder")
    assert pairs(read(deep)) == [("a cat", b"1")]


def test_what_is_odd_in_a_folder_of_images(tmp_path):
    files = {
        "a.jpg": b"1",
        "a.txt": b"\xef\xbb\xbfa cat\r\n\r\n  \nthe same cat\n",  # byte-order mark, blank lines
        "b.jpg": b"2",  # no text
        "c.txt": b"no image",
        "d.jpg": b"3",
        "d.txt": b" \n",
        "e.jpg": b"",
        "e.txt": b"an empty image",
        "f.jpg": b"4",
        "f.txt": b"b\xe4d",
        "g.v2.jpg": b"5",
        "g.v2.txt": b"two dots",
        "h.png": b"6",
        "h.jpg": b"7",
        "h.txt": b"two images",
        ".hidden/x.jpg": b"8",
        "notes.md": b"about",
    }
    write(tmp_path, files)
    records = read(CorpusSpec(path=str(tmp_path)))
    assert pairs(records) == [
        ("a cat", b"1"),
        ("the same cat", b"1"),
        "missing_image",
        "empty_caption",
        "missing_image",
        "undecodable_text",
        ("two dots", b"5"),
        ("two images", b"7"),
        "empty_caption",  # b.jpg: images without a text come last
    ]
    assert records[1].source.endswith(":a.txt:4")
    assert records[-1].key.endswith(":b.jpg")


def test_a_metadata_file_speaks_for_all_below_it_and_for_no_one_else(tmp_path):
    line = json.dumps({"file_name": "deep/1.jpg", "text": "a cat"})
    files = {
        "train/metadata.jsonl": line.encode(),
        "train/deep/1.jpg": b"1",
        "train/deep/2.jpg": b"not named",
        "val/3.jpg": b"3",
        "val/3.txt": b"a dog",
    }
    write(tmp_path, files)
    spec = CorpusSpec(path=str(tmp_path), format="imagefolder")
    assert pairs(read(spec)) == [("a cat", b"1"), ("a dog", b"3")]


def test_bad_rows_of_a_metadata_file(tmp_path):
    rows = [
        {"file_name": "1.jpg", "text": "a cat"},
        {"file_name": "none.jpg", "text": "a dog"},
        {"file_name": "../secret.jpg", "text": "a secret"},
        {"file_name": None, "text": "a bird"},
        {"text": "a bus"},
        {"file_name": "1.jpg"},
        {"file_name": ["1.jpg"], "text": "a list"},
    ]
    lines = "\n".join(json.dumps(row) for row in rows)
    write(tmp_path, {"secret.jpg": b"secret", "c/1.jpg": b"1", "c/metadata.jsonl": lines.encode()})
    records = read(CorpusSpec(path=str(tmp_path / "c"), format="imagefolder"))
    assert pairs(records) == [
        ("a cat", b"1"),
        *["missing_image"] * 4,
        "malformed_record",
        "missing_image",
    ]


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({"metadata.csv": b"name,text\n"}, {}, "no column 'file_name'"),
        ({"metadata.csv": b"file_name,words\n"}, {}, "no caption column"),
        ({"metadata.csv": b"file_name,text\n"}, {}, "holds no record"),
        (
            {"metadata.csv": b"file_name,text\n", "metadata.jsonl": b""},
            {},
            "metadata.jsonl and metadata.csv; expected only one",
        ),
        ({"readme.md": b""}, {}, "holds no record"),
        ({"a.jpg": b"1"}, {"path": "a.jpg"}, "the format imagefolder reads a folder"),
        ({}, {"path": "nowhere"}, "the format imagefolder reads a folder"),
    ],
)
def test_a_bad_image_folder_says_what_is_wrong(tmp_path, files, options, message):
    write(tmp_path, files)
    path = tmp_path / options.get("path", "")
    with pytest.raises(InputError, match=message):
        read(CorpusSpec(path=str(path), format="imagefolder"))


def test_the_identity_of_an_image_folder_follows_captions_and_names(tmp_path):
    write(tmp_path, files_of("sidecar"))
    spec = spec_of("sidecar", str(tmp_path))
    seen = [identify(spec)]
    for name, data in [("a.txt", b"a dog on a mat"), ("d.jpg", b"4"), ("sub/b.png", b"longer" * 9)]:
        write(tmp_path, {name: data})
        seen.append(identify(spec))
        assert seen[-1] not in seen[:-1]


# -- asked for images ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        ("coco.json", {"images": None}, "set `images` to the image folder"),
        ("pairs.csv", {"image_column": None}, "with `image_column`"),
        ("pairs.jsonl", {"image_column": None}, "with `image_column`"),
        ("paths.parquet", {"image_column": None}, "with `image_column`"),
        ("pairs.jsonl", {"images": None}, "set `images` to their folder"),
    ],
)
def test_a_corpus_without_images_is_refused_where_they_are_needed(
    tmp_path, layout, changes, message
):
    write(tmp_path, files_of(layout))
    with pytest.raises(InputError, match=message):
        read(spec_of(layout, str(tmp_path), **changes))


def test_a_plain_text_has_no_images(tmp_path):
    write(tmp_path, {"c.txt": b"a cat\n"})
    with pytest.raises(InputError, match="captions only"):
        read(CorpusSpec(path=str(tmp_path / "c.txt")))


def test_a_sample_of_a_tar_without_its_image_is_a_drop(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "LONGEST_MEMBER_BYTES", 10)
    members = [("1.txt", "a cat"), ("2.gif", b"x" * 10), ("2.txt", "a dog")]
    members += [("3.jpg", b"x" * 11), ("3.txt", "a bird"), ("4.jpg", b""), ("4.txt", "a bus")]
    write(tmp_path, {"c.tar": tar(members)})
    assert pairs(read(CorpusSpec(path=str(tmp_path / "c.tar")))) == [
        "missing_image",
        ("a dog", b"x" * 10),
        "missing_image",
        "missing_image",
    ]


@pytest.mark.parametrize("values", [[1, 2], [[1], [2]]])
def test_a_parquet_column_that_holds_no_images_is_refused(tmp_path, values):
    pq.write_table(pa.table({"text": ["a", "b"], "image": values}), tmp_path / "c.parquet")
    with pytest.raises(InputError, match="expected encoded images, or their file names"):
        read(CorpusSpec(path=str(tmp_path / "c.parquet"), image_column="image"))


@pytest.mark.parametrize("options", [{"format": "webdataset"}, {"format": "imagefolder"}])
def test_settings_without_meaning_are_refused(options):
    with pytest.raises(ValueError, match="images has no meaning"):
        CorpusSpec(path="x", images="y", **options)
    with pytest.raises(ValueError, match="image_column has no meaning"):
        CorpusSpec(path="x", image_column="y", **options)


# -- memory -------------------------------------------------------------------------------------


def test_a_row_group_of_many_images_is_not_read_at_once(tmp_path):
    random = np.random.default_rng(0)
    rows = [{"text": f"a cat {i}", "image": random.bytes(100_000)} for i in range(300)]
    # pyarrow ends a page after a batch of rows, which by default is larger than this row group.
    options = {"compression": "none", "write_batch_size": 8}
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet", **options)
    del rows
    before, most = pa.total_allocated_bytes(), 0
    for number, record in enumerate(
        read_captions(
            CorpusSpec(path=str(tmp_path / "c.parquet"), image_column="image"), images=True
        )
    ):
        assert len(record.image) == 100_000
        if number % 10 == 0:
            most = max(most, pa.total_allocated_bytes() - before)
    assert number == 299
    assert most < 10_000_000  # of 30,000,000


def test_image_files_are_read_a_few_rows_ahead_and_no_more(tmp_path, monkeypatch):
    asked = []

    def remember(self, name):
        asked.append(name)
        return b"x"

    monkeypatch.setattr(readers._ImageFolder, "read", remember)
    lines = "\n".join(json.dumps({"text": f"a cat {i}", "image": f"{i}.jpg"}) for i in range(100))
    write(tmp_path, {"c.jsonl": lines.encode()})
    spec = CorpusSpec(path=str(tmp_path / "c.jsonl"), image_column="image", images=str(tmp_path))
    records = read_captions(spec, images=True)
    for number in range(3):
        assert next(records).text == f"a cat {number}"
        assert len(asked) <= number + 1 + readers.IMAGES_AHEAD
    records.close()
    assert len(read(dataclasses.replace(spec, limit=100))) == 100


# -- the miniature's scenes ---------------------------------------------------------------------


def test_scenes_of_the_miniature_are_a_corpus():
    spec = CorpusSpec(path="miniature:test", limit=5)
    records = read(spec)
    assert len(records) == 5 == len({record.key for record in records})
    assert all(decode_image(record.image).shape == (64, 64, 3) for record in records)
    assert records == read(spec)
    assert records[:2] == read(CorpusSpec(path="miniature:test", limit=2))
    assert identify(spec) == identify(spec)
    assert identify(spec) != identify(CorpusSpec(path="miniature:train", limit=5))
    assert identify(spec)["corpus_id"] == "miniature_test"


@pytest.mark.parametrize(("path", "limit"), [("miniature:other", 5), ("miniature:train", None)])
def test_scenes_of_the_miniature_need_a_split_and_a_limit(path, limit):
    for ask in (identify, read):
        with pytest.raises(InputError, match=r"miniature:train .* with a limit, found"):
            ask(CorpusSpec(path=path, limit=limit))
