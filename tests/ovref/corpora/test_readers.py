import gzip
import io
import json
import random
import tarfile
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ovref.contract import Dropped, base_key
from ovref.corpora import CorpusSpec, formats, identify, read_captions
from ovref.corpora.readers import DROP_REASONS
from ovref.errors import InputError
from ovref.identity import record_key
from ovref.ingest import first_of_each_key
from ovref.records import Caption

CAPTIONS = ["a cat on a mat", "two dogs in the snow", 'a "red" car, parked']


def tar_bytes(members: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def coco_bytes(captions: list[str]) -> bytes:
    images = [{"id": 100 + i, "file_name": f"{i:012d}.jpg"} for i in range(len(captions))]
    annotations = [
        {"image_id": 100 + i, "id": i, "caption": text} for i, text in enumerate(captions)
    ]
    tree = {"info": {"year": 2017}, "images": images, "annotations": annotations}
    return json.dumps(tree).encode()


def parquet_bytes(captions: list[str]) -> bytes:
    table = pa.table({"url": ["u"] * len(captions), "TEXT": captions})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def corpus_bytes(captions: list[str]) -> dict[str, bytes]:
    """File name -> contents: the same captions in every format."""
    quoted = "\n".join('"' + text.replace('"', '""') + '",x' for text in captions)
    lines = "\n".join(captions)
    files = {
        "coco.json": coco_bytes(captions),
        "table.csv": f"caption,other\n{quoted}\n".encode(),
        "table.tsv": "\n".join(f"http://x/{i}\t{t}" for i, t in enumerate(captions)).encode(),
        "lines.jsonl": "\n".join(json.dumps({"caption": text}) for text in captions).encode(),
        "table.parquet": parquet_bytes(captions),
        "plain.txt": lines.encode(),
        "plain_zipped.txt.gz": gzip.compress(lines.encode()),
        "samples.tar": tar_bytes(
            [(f"{i:04d}.txt", text.encode()) for i, text in enumerate(captions)]
        ),
    }
    return files


@pytest.fixture
def corpora(tmp_path):
    """Folder with the file of every format."""
    for name, data in corpus_bytes(CAPTIONS).items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


COLUMNS = {"table.tsv": 1}


def read(path, *, with_images=False, **options) -> list:
    return list(read_captions(CorpusSpec(path=str(path), **options), images=with_images))


def texts(path, **options) -> list[str]:
    return [record.text for record in read(path, **options)]


def reasons(path, **options) -> list[str]:
    """The text of each caption, the reason of each drop."""
    return [
        f"<{record.reason}>" if isinstance(record, Dropped) else record.text
        for record in read(path, **options)
    ]


@pytest.mark.parametrize(
    "name",
    [
        "coco.json",
        "table.csv",
        "table.tsv",
        "lines.jsonl",
        "table.parquet",
        "plain.txt",
        "plain_zipped.txt.gz",
        "samples.tar",
    ],
)
def test_every_format_gives_the_same_captions(corpora, name):
    records = read(corpora / name, corpus_id="c", caption_column=COLUMNS.get(name))
    assert [record.text for record in records] == CAPTIONS
    assert [record.key for record in records] == [record_key("c", text) for text in CAPTIONS]
    assert all(record.source.startswith(f"{name}:") for record in records)
    assert all(record.image is None and record.draw == 0 for record in records)
    assert len({record.source for record in records}) == len(records)


@pytest.mark.parametrize("name", ["coco.json", "table.csv", "plain.txt", "lines.jsonl", "t.tsv"])
def test_gzipped_files_read_alike(corpora, name):
    source = "table.tsv" if name == "t.tsv" else name
    (corpora / f"{name}.gz").write_bytes(gzip.compress((corpora / source).read_bytes()))
    assert texts(corpora / f"{name}.gz", caption_column=1 if name == "t.tsv" else None) == CAPTIONS


def test_the_id_of_the_corpus_goes_into_the_keys(corpora):
    first, second = (read(corpora / name) for name in ("plain.txt", "lines.jsonl"))
    assert [record.key for record in first] == [record_key("plain", text) for text in CAPTIONS]
    assert not {record.key for record in first} & {record.key for record in second}


def test_draws_follow_each_other_and_differ_by_key(corpora):
    records = read(corpora / "plain.txt", draws=3, limit=2)
    assert [(record.text, record.draw) for record in records] == [
        (text, draw) for text in CAPTIONS[:2] for draw in range(3)
    ]
    assert len({record.key for record in records}) == 6


def test_the_limit_counts_good_captions_only(tmp_path):
    (tmp_path / "c.txt").write_text("\n a cat \n\n a dog \n a bird\n")
    assert reasons(tmp_path / "c.txt", limit=2) == [
        "<empty_caption>",
        "a cat",
        "<empty_caption>",
        "a dog",
    ]


def test_files_of_a_folder_are_read_one_after_the_other(tmp_path):
    (tmp_path / "2.txt").write_text("second\n")
    (tmp_path / "1.txt").write_text("first\n")
    assert texts(tmp_path) == ["first", "second"]
    assert texts(f"{tmp_path}/*.txt", limit=1) == ["first"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "caption,x\na cat,1\n"),
        ("a.tsv", "caption\tx\na cat\t1\n"),
        ("a.txt", "a cat\n"),
        ("a.jsonl", '{"caption": "a cat"}\n'),
    ],
)
def test_a_byte_order_mark_belongs_to_no_caption(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode("utf-8-sig"))
    assert [found.text for found in read_captions(CorpusSpec(path=str(tmp_path / name)))] == [
        "a cat"
    ]


def test_texts_are_normalised(tmp_path):
    (tmp_path / "c.txt").write_text("  a\tcafe\u0301 \u00a0 table  \n")
    (record,) = read(tmp_path / "c.txt", corpus_id="c")
    assert record.text == "a caf\u00e9 table"
    assert record.key == record_key("c", "a caf\u00e9 table")


def test_reading_is_lazy(tmp_path):
    """One record is there before the file's broken end is reached."""
    whole = coco_bytes([f"caption number {i}" for i in range(5000)])
    (tmp_path / "c.json").write_bytes(whole[:-100])
    records = read_captions(CorpusSpec(path=str(tmp_path / "c.json")))
    assert next(records).text == "caption number 0"
    with pytest.raises(InputError, match="not COCO JSON"):
        list(records)


# -- bad records --------------------------------------------------------------------------------


def test_a_bad_record_is_one_counted_drop(tmp_path):
    lines = [
        b"a cat",
        b"caf\xe9 in latin-1",
        b"",
        b"x" * 1001,
        b"y" * 1000,
        b"nul \x00 byte",
        "broken \ufffd before".encode(),
        b"a dog",
    ]
    (tmp_path / "c.txt").write_bytes(b"\n".join(lines))
    records = read(tmp_path / "c.txt")
    drops = {r.key: r.reason for r in records if isinstance(r, Dropped)}
    assert drops == {
        "line:c.txt:2": "undecodable_text",
        "line:c.txt:3": "empty_caption",
        "line:c.txt:4": "caption_too_long",
        "line:c.txt:6": "undecodable_text",
        "line:c.txt:7": "undecodable_text",
    }
    assert [r.text for r in records if not isinstance(r, Dropped)] == [
        "a cat",
        "y" * 1000,
        "a dog",
    ]
    assert set(drops.values()) <= set(DROP_REASONS)


def test_length_counts_characters_after_normalising(tmp_path):
    (tmp_path / "c.txt").write_text("é" * 10 + "\n" + "a" + " " * 50 + "b\n" + "é" * 11 + "\n")
    assert reasons(tmp_path / "c.txt", max_characters=10) == [
        "é" * 10,
        "a b",
        "<caption_too_long>",
    ]


def test_the_key_of_a_drop_names_no_part_of_a_record(tmp_path):
    (tmp_path / "odd#name.txt").write_text("\n")
    (drop,) = read(tmp_path / "odd#name.txt")
    assert drop.key == base_key(drop.key) == "line:odd%23name.txt:1"


def test_bad_json_lines(tmp_path):
    lines = [
        b'{"caption": "a cat"}',
        b"{broken",
        b"[1, 2]",
        b'{"caption": 7}',
        b'{"other": "x"}',
        b'{"caption": null}',
        b'{"caption": "lone \\ud800 surrogate"}',
        b'{"caption": "bad \xff byte"}',
        b"",
        b"[" * 100_000,
        b'{"caption": ""}',
    ]
    (tmp_path / "c.jsonl").write_bytes(b"\n".join(lines))
    assert reasons(tmp_path / "c.jsonl") == [
        "a cat",
        *["<malformed_record>"] * 5,
        "<undecodable_text>",
        "<undecodable_text>",
        "<malformed_record>",
        "<empty_caption>",
    ]


def test_bad_coco_annotations(tmp_path):
    annotations = [
        {"image_id": 1, "id": 1, "caption": "a cat\n"},
        {"image_id": 1, "id": 2},
        "text",
        {"image_id": [1], "id": 3, "caption": ["a dog"]},
        {"image_id": 1, "id": 4, "caption": " "},
    ]
    (tmp_path / "c.json").write_text(json.dumps({"annotations": annotations}))
    assert reasons(tmp_path / "c.json") == [
        "a cat",
        *["<malformed_record>"] * 3,
        "<empty_caption>",
    ]


def test_bad_rows_of_tables(tmp_path):
    (tmp_path / "c.csv").write_bytes(
        b'id,caption\n1,"a cat,\nsitting"\n2\n3,b\xe4d\n4,""\n5,a dog\n'
    )
    assert reasons(tmp_path / "c.csv") == [
        "a cat, sitting",
        "<malformed_record>",
        "<undecodable_text>",
        "<empty_caption>",
        "a dog",
    ]


@pytest.mark.parametrize("broken", ['2,"a dog', '2,"a ""dog""', '"2,a dog'])
@pytest.mark.parametrize("after", [3, 5000])
def test_a_quotation_that_is_not_closed_costs_its_own_line_alone(tmp_path, broken, after):
    rows = [f"{i},a boat {i}" for i in range(after)]
    table = ["id,caption", '1,"a ""cat"",\nsitting"', broken, *rows, '3,"a car, parked"', *rows]
    (tmp_path / "c.csv").write_text("\n".join(table))
    boats = [f"a boat {i}" for i in range(after)]
    found = list(read_captions(CorpusSpec(path=str(tmp_path / "c.csv"))))
    assert found[1] == Dropped("line:c.csv:4", "malformed_record")
    del found[1]
    assert [caption.text for caption in found] == [
        'a "cat", sitting', *boats, "a car, parked", *boats
    ]  # fmt: skip
    assert found[1].source == "c.csv:5"


def test_a_field_beyond_the_limit_of_csv_is_one_malformed_record(tmp_path):
    (tmp_path / "c.csv").write_text("caption\n" + "x" * 200_000 + "\na dog\n")
    assert reasons(tmp_path / "c.csv") == ["<malformed_record>", "a dog"]


def test_a_quotation_mark_in_a_tsv_is_a_quotation_mark(tmp_path):
    (tmp_path / "c.tsv").write_text('a "quoted\thttp://x/1\n" alone\thttp://x/2\n')
    assert texts(tmp_path / "c.tsv", caption_column=0) == ['a "quoted', '" alone']


def test_bad_parquet_values(tmp_path):
    column = pa.array([b"a cat", None, b"b\xe4d", b"", b"a dog"], pa.binary())
    pq.write_table(pa.table({"caption": column}), tmp_path / "c.parquet")
    answers = ["a cat", "<malformed_record>", "<undecodable_text>", "<empty_caption>", "a dog"]
    assert reasons(tmp_path / "c.parquet") == answers
    unchecked = pa.Array.from_buffers(pa.string(), 5, column.buffers())
    pq.write_table(pa.table({"caption": unchecked}), tmp_path / "c.parquet")
    assert reasons(tmp_path / "c.parquet") == answers


def test_parquet_goes_by_blocks(tmp_path):
    captions = [f"caption {i}" for i in range(3 * formats.PARQUET_ROWS + 5)]
    pq.write_table(pa.table({"text": captions}), tmp_path / "c.parquet", row_group_size=700)
    assert texts(tmp_path / "c.parquet") == captions


def test_webdataset_samples(tmp_path):
    members = [
        ("a/1.jpg", b"image 1"),
        ("a/1.txt", b"a cat"),
        ("a/1.json", b'{"caption": "other"}'),
        ("a/2.json", b'{"caption": "a dog"}'),
        ("a/2.PNG", b"image 2"),
        ("a/3.jpg", b"no caption"),
        ("a/4.json", b"{broken"),
        ("a/5.txt", b"b\xe4d"),
        ("b/5.txt", b"same name, other folder"),
        ("b/.hidden", b"x"),
        ("b/6.seg.png", b"not the image"),
        ("b/6.txt", b"a bird"),
    ]
    (tmp_path / "c.tar").write_bytes(tar_bytes(members))
    records = read(tmp_path / "c.tar", with_images=True)
    assert [getattr(r, "reason", None) or (r.text, r.image) for r in records] == [
        ("a cat", b"image 1"),
        ("a dog", b"image 2"),
        "malformed_record",
        "malformed_record",
        "undecodable_text",
        "missing_image",
        "missing_image",
    ]
    assert records[2].key == "line:c.tar:a/3"
    assert [record.image for record in read(tmp_path / "c.tar") if isinstance(record, Caption)] == [
        None
    ] * 4
    assert reasons(tmp_path / "c.tar", caption_column="caption")[0] == "other"


def test_a_huge_member_of_a_tar_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "LONGEST_MEMBER_BYTES", 10)
    (tmp_path / "c.tar").write_bytes(tar_bytes([("1.txt", b"x" * 11), ("2.txt", b"x" * 10)]))
    assert reasons(tmp_path / "c.tar") == ["<malformed_record>", "x" * 10]


def test_garbage_never_escapes_as_another_error(tmp_path):
    """Whatever the bytes: captions, drops with known reasons, or InputError."""
    rng = random.Random(0)
    sample = {
        "json": coco_bytes(["a cat", "a dog"]),
        "jsonl": b'{"caption": "a cat"}\n' * 5,
        "csv": b"caption,x\na cat,1\n" * 5,
        "tsv": b"caption\tx\na cat\t1\n" * 5,
        "txt": b"a cat\n" * 5,
        "tar": tar_bytes([("1.txt", b"a cat"), ("1.jpg", b"x")]),
    }
    pq.write_table(pa.table({"caption": ["a cat"] * 5}), tmp_path / "c.parquet")
    sample["parquet"] = (tmp_path / "c.parquet").read_bytes()
    for kind, data in sample.items():
        for _ in range(40):
            broken = bytearray(data)
            for _ in range(rng.randrange(1, 6)):
                broken[rng.randrange(len(broken))] = rng.randrange(256)
            del broken[rng.randrange(len(broken)) :]
            (tmp_path / f"c.{kind}").write_bytes(broken)
            try:
                records = read(tmp_path / f"c.{kind}")
            except InputError:
                continue
            for record in records:
                if isinstance(record, Dropped):
                    assert record.reason in DROP_REASONS
                else:
                    assert record.text.encode() and len(record.key) == 24


# -- images -------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / f"{0:012d}.jpg").write_bytes(b"image 0")
    (folder / f"{2:012d}.jpg").write_bytes(b"")
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    return folder


def test_coco_images_come_from_their_folder(corpora, images):
    first, second, third = read(corpora / "coco.json", images=str(images), with_images=True)
    assert first.image == b"image 0"
    assert (second.reason, third.reason) == ("missing_image", "missing_image")


def test_an_image_column_names_files_or_holds_bytes(tmp_path, images):
    rows = ["caption,file", "a cat,000000000000.jpg", "a dog,../secret.jpg", "a bird,"]
    (tmp_path / "c.csv").write_text("\n".join([*rows, f"a car,{tmp_path}/secret.jpg", "a bus,."]))
    answers = read(tmp_path / "c.csv", image_column="file", images=str(images), with_images=True)
    assert answers[0].image == b"image 0"
    assert [drop.reason for drop in answers[1:]] == ["missing_image"] * 4

    struct = [{"bytes": b"jpeg", "path": None}, {"bytes": None, "path": f"{0:012d}.jpg"}, None]
    table = pa.table({"caption": ["a", "b", "c"], "image": struct})
    pq.write_table(table, tmp_path / "c.parquet")
    answers = read(
        tmp_path / "c.parquet", image_column="image", images=str(images), with_images=True
    )
    assert [getattr(r, "image", None) for r in answers] == [b"jpeg", b"image 0", None]
    assert answers[2].reason == "missing_image"


def test_addresses_are_not_fetched(tmp_path):
    (tmp_path / "c.tsv").write_text("a cat\thttps://example.org/1.jpg\n")
    with pytest.raises(InputError, match="ovref downloads nothing"):
        read(tmp_path / "c.tsv", caption_column=0, image_column=1, with_images=True)
    assert texts(tmp_path / "c.tsv", caption_column=0) == ["a cat"]


def test_named_images_need_their_folder(tmp_path):
    (tmp_path / "c.csv").write_text("caption,file\na cat,1.jpg\n")
    with pytest.raises(InputError, match="set `images` to their folder"):
        read(tmp_path / "c.csv", image_column="file", with_images=True)


# -- bad corpora --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "options", "message"),
    [
        ("c.json", b"", {}, "not COCO JSON"),
        ("c.json", b"[]", {}, "expected a JSON object.* JSON Lines"),
        ("c.json", b'{"images": []}', {}, "expected the member `annotations`, found images"),
        ("c.json", b'{"annotations": []}', {}, "holds no record"),
        ("c.json", b'{"annotations": 3}', {}, "expected annotations to be an array"),
        ("c.json", coco_bytes(["a", "b"])[:-5], {}, "not COCO JSON"),
        ("c.json", b'{"annotations": [{"bbox": 1}]}', {}, "has a field 'caption'.* have 'bbox'"),
        ("c.json", coco_bytes(["a"]), {"caption_column": "x"}, "has a field 'x'; they have"),
        ("c.csv", b"", {}, "no caption column .* found no columns"),
        ("c.csv", b"id,words\n1,a cat\n", {}, "no caption column .* found 'id', 'words'"),
        ("c.csv", b"id,words\n1,a\n", {"caption_column": "x"}, "no column 'x' .* 'id', 'words'"),
        ("c.csv", b"caption\n", {}, "holds no record"),
        ("c.csv", b"x" * 200_000, {}, "cannot read .* as csv"),
        ("c.csv", b"caption\na\n", {"image_column": "x"}, "no column 'x'"),
        ("c.csv", b"a,b\n", {"caption_column": 0, "image_column": "x"}, "as a number too"),
        ("c.tsv", b"a cat\na dog\n", {"caption_column": 1}, "no line .* has a column 1"),
        ("c.jsonl", b"a cat\na dog\n", {}, "not JSON Lines: none of its 2 lines"),
        ("c.jsonl", b'{"words": "a"}\n', {}, "has a field .*'caption'.*they have 'words'"),
        ("c.jsonl", b'{"caption": "a"}\n', {"caption_column": "x"}, "has a field 'x'"),
        ("c.txt", b"", {}, "holds no record"),
        ("c.txt", "a cat".encode("utf-16"), {}, "expected UTF-8 text .* found UTF-16"),
        ("c.txt", gzip.compress(b"a cat", mtime=0), {}, "found gzip"),
        ("c.txt.gz", b"a cat", {}, "cannot read"),
        ("c.txt.gz", gzip.compress(b"a cat" * 1000, mtime=0)[:-20], {}, "cannot read"),
        ("c.parquet", b"a cat", {}, "cannot read .* as parquet"),
        ("c.tar", b"a cat" * 1000, {}, "cannot read .* as webdataset"),
        ("c.tar", b"", {}, "cannot read .* as webdataset"),
        ("c.txt", b"a cat\n", {"image_column": "x"}, "has captions only"),
    ],
)
def test_a_bad_corpus_says_what_is_wrong(tmp_path, name, data, options, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message):
        read(tmp_path / name, with_images="image_column" in options, **options)


def test_bad_parquet_columns(tmp_path):
    pq.write_table(pa.table({"caption": [1, 2], "url": ["a", "b"]}), tmp_path / "c.parquet")
    with pytest.raises(InputError, match="holds int64, expected text"):
        read(tmp_path / "c.parquet")
    with pytest.raises(InputError, match=r"no column 'x' .* 'caption', 'url'"):
        read(tmp_path / "c.parquet", caption_column="x")
    with pytest.raises(InputError, match="no column 'x'"):
        read(tmp_path / "c.parquet", caption_column="url", image_column="x", with_images=True)


def test_a_wrong_json_field_is_noticed_early(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"words": "a"}\n' * 5000)
    records = read_captions(CorpusSpec(path=str(tmp_path / "c.jsonl")))
    seen = 0
    with pytest.raises(InputError, match="they have 'words'"):
        for _ in records:
            seen += 1
    assert seen < 1000


def test_a_cut_off_tar_is_refused(tmp_path):
    whole = tar_bytes([("1.txt", b"a cat"), ("2.txt", b"x" * 5000)])
    (tmp_path / "c.tar").write_bytes(whole[: 512 * 5])
    with pytest.raises(InputError, match="cannot read"):
        read(tmp_path / "c.tar")


# -- S3 -----------------------------------------------------------------------------------------


def test_a_corpus_on_s3_reads_like_one_on_disk(corpora, bucket):
    for name in corpus_bytes(CAPTIONS):
        bucket.pipe_file(f"corpora/all/{name}", (corpora / name).read_bytes())
        column = COLUMNS.get(name)
        remote = read(f"s3://corpora/all/{name}", caption_column=column)
        assert remote == read(corpora / name, caption_column=column)


def test_folders_and_patterns_on_s3(bucket):
    for number in (2, 1, 3):
        bucket.pipe_file(f"corpora/parts/{number}.txt", f"caption {number}".encode())
    expected = ["caption 1", "caption 2", "caption 3"]
    assert texts("s3://corpora/parts") == texts("s3://corpora/parts/*.txt") == expected


def test_images_on_s3(corpora, bucket):
    bucket.pipe_file(f"corpora/images/{0:012d}.jpg", b"image 0")
    first, second, third = read(
        corpora / "coco.json", images="s3://corpora/images", with_images=True
    )
    assert first.image == b"image 0"
    assert (second.reason, third.reason) == ("missing_image", "missing_image")
    spec = CorpusSpec(path=str(corpora / "coco.json"), images="s3://corpora/images")
    assert identify(spec)["images"]["count"] == 1


def test_the_identity_of_a_corpus_on_s3_follows_its_contents(bucket):
    spec = CorpusSpec(path="s3://corpora/identity/c.txt")
    seen = []
    for data in (b"a cat", b"a dog", b"a dog"):
        bucket.pipe_file("corpora/identity/c.txt", data)
        seen.append(identify(spec))
    assert seen[0] != seen[1] == seen[2]
    assert seen[0]["files"][0].keys() == {"name", "size", "checksum"}


@pytest.mark.parametrize("path", ["s3://corpora/none.txt", "s3://corpora/x*.txt", "s3://no/c.txt"])
def test_a_missing_corpus_on_s3_is_an_input_error(bucket, path):
    with pytest.raises(InputError, match="s3://"):
        read(path)


# -- line ends, column types, order of members, sizes --------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("c.txt", ["a cat", "a dog", "a bird"]),
        ("c.csv", ["caption,x", "a cat,1", '"a dog",2', "a bird,3"]),
        ("c.tsv", ["caption\tx", "a cat\t1", "a dog\t2", "a bird\t3"]),
        ("c.jsonl", [f'{{"caption": "{text}"}}' for text in ("a cat", "a dog", "a bird")]),
        ("c.txt.gz", ["a cat", "a dog", "a bird"]),
    ],
)
@pytest.mark.parametrize("last", [True, False])
def test_lines_end_as_on_any_system(tmp_path, end, name, lines, last):
    data = (end.join(lines) + (end if last else "")).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert texts(tmp_path / name, corpus_id="c") == ["a cat", "a dog", "a bird"]


def test_a_carriage_return_inside_a_line_ends_no_line(tmp_path):
    (tmp_path / "c.txt").write_bytes(b"a cat\ron a mat\na dog\n")
    assert texts(tmp_path / "c.txt") == ["a cat on a mat", "a dog"]


TEXTS = ["a cat", None, "a dog", "a cat"]


@pytest.mark.parametrize(
    "array",
    [
        pa.array(TEXTS, pa.string_view()),
        pa.array([text and text.encode() for text in TEXTS], pa.binary_view()),
        pa.array(TEXTS).dictionary_encode(),
        pa.array(TEXTS, pa.large_string()).dictionary_encode(),
        pa.array([text and text.encode() for text in TEXTS]).dictionary_encode(),
    ],
    ids=lambda array: str(array.type),
)
def test_every_parquet_type_of_text_is_read(tmp_path, images, array):
    pq.write_table(pa.table({"caption": array}), tmp_path / "c.parquet")
    assert reasons(tmp_path / "c.parquet") == ["a cat", "<malformed_record>", "a dog", "a cat"]
    names = pa.array([f"{0:012d}.jpg", None]).cast(pa.string())
    if pa.types.is_dictionary(array.type):
        names = names.dictionary_encode()
    elif array.type == pa.string_view():
        names = names.cast(array.type)
    pq.write_table(pa.table({"caption": ["a", "b"], "image": names}), tmp_path / "i.parquet")
    options = {"image_column": "image", "images": str(images), "with_images": True}
    first, second = read(tmp_path / "i.parquet", **options)
    assert (first.image, second.reason) == (b"image 0", "missing_image")


@pytest.mark.parametrize(
    "names",
    [
        ["1.jpg", "2.jpg", "1.txt", "2.txt"],
        ["1.txt", "2.txt", "1.jpg", "2.jpg"],
        ["1.jpg", "1.txt", "2.txt", "1.json"],
    ],
)
def test_members_of_a_sample_that_are_apart_are_an_error_about_their_order(tmp_path, names):
    (tmp_path / "c.tar").write_bytes(tar_bytes([(name, b"a cat") for name in names]))
    message = r"members of the sample 1 .*are not adjacent.*--sort=name"
    with pytest.raises(InputError, match=message):
        read(tmp_path / "c.tar", with_images=True)


def test_whole_samples_of_one_name_are_different_samples(tmp_path):
    members = [("1.txt", b"a cat"), ("1.jpg", b"1"), ("2.txt", b"a dog"), ("2.jpg", b"2")]
    (tmp_path / "c.tar").write_bytes(tar_bytes([*members, ("1.txt", b"a bird"), ("1.jpg", b"3")]))
    assert [(r.text, r.image) for r in read(tmp_path / "c.tar", with_images=True)] == [
        ("a cat", b"1"),
        ("a dog", b"2"),
        ("a bird", b"3"),
    ]
    (tmp_path / "t.tar").write_bytes(tar_bytes([("1.txt", b"a"), ("2.txt", b"b"), ("1.txt", b"c")]))
    assert texts(tmp_path / "t.tar") == ["a", "b", "c"]


def test_ids_beyond_64_bits_are_read(tmp_path):
    annotations = [{"image_id": 2**70, "id": 2**80, "caption": "a cat"}]
    tree = {"images": [{"id": 2**70, "file_name": "x.jpg"}], "annotations": annotations}
    (tmp_path / "c.json").write_text(json.dumps(tree))
    (record,) = read(tmp_path / "c.json")
    assert record.source == f"c.json:image {2**70}:caption {2**80}"
    (tmp_path / "c.jsonl").write_text(f'{{"caption": "a cat", "id": {2**70}}}\n')
    assert texts(tmp_path / "c.jsonl") == ["a cat"]
    (tmp_path / "d.jsonl").write_text('{"caption": "a cat"}\n{"id": ' + "9" * 5000 + "}\n")
    assert reasons(tmp_path / "d.jsonl") == ["a cat", "<malformed_record>"]


def test_huge_counts_are_taken_one_by_one(tmp_path):
    (tmp_path / "c.txt").write_text("a cat\n")
    spec = CorpusSpec(path=str(tmp_path / "c.txt"), draws=10**12, limit=10**30)
    records = read_captions(spec)
    assert [next(records).draw for _ in range(3)] == [0, 1, 2]
    with pytest.raises(InputError, match="has a column"):
        (tmp_path / "c.tsv").write_text("a cat\n")
        read(tmp_path / "c.tsv", caption_column=10**30)


def test_a_caption_may_be_drawn_once_for_each_of_its_images(tmp_path):
    annotations = [
        {"image_id": image, "id": i, "caption": text}
        for i, (image, text) in enumerate([(7, "a cat"), (8, "A  cat"), (8, "a cat"), (7, "a cat")])
    ]
    (tmp_path / "c.json").write_text(json.dumps({"images": [], "annotations": annotations}))
    once = read(tmp_path / "c.json", corpus_id="c")
    assert {one.key for one in once} == {record_key("c", "a cat"), record_key("c", "A cat")}
    each = read(tmp_path / "c.json", corpus_id="c", repeats=True)
    keys = [one.key for one in each]
    assert keys[2] == record_key("c", "a cat", image="image 8") and keys[0] == keys[3]
    kept = [one for one in first_of_each_key(each) if not isinstance(one, Dropped)]
    wanted = ("7:caption 0", "8:caption 1", "8:caption 2")
    assert [one.source for one in kept] == [f"c.json:image {n}" for n in wanted]
    plain = CorpusSpec(path=str(tmp_path / "c.json"))
    assert "repeats" not in identify(plain)
    assert identify(replace(plain, repeats=True)) == identify(plain) | {"repeats": True}
    (tmp_path / "c.txt").write_text("a cat\n")
    with pytest.raises(InputError, match="which name their images"):
        read(tmp_path / "c.txt", repeats=True)
    with pytest.raises(ValueError, match="which name their images"):
        CorpusSpec(path="x", format="text", repeats=True)
