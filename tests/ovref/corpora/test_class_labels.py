"""Labels in place of captions: every format that may hold them."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ovref.config import dump, parse
from ovref.contract import Dropped
from ovref.corpora import CorpusSpec, identify, read_captions
from ovref.corpora.class_labels import text_of_labels
from ovref.corpora.spec import LabelSpec
from ovref.errors import InputError


def read(path, labels=None, **settings):
    spec = CorpusSpec(path=str(path), labels=labels or LabelSpec(), **settings)
    assert parse(CorpusSpec, dump(spec)) == spec
    with_images = spec.images is not None or spec.format == "class_folders"
    return list(read_captions(spec, images=with_images))


def nouns(record):
    for noun in record.labels:
        assert record.text[noun.start : noun.end].lower() == noun.text
    return [noun.text for noun in record.labels]


def reasons(records):
    return [record.reason for record in records if isinstance(record, Dropped)]


def test_a_text_names_every_label_once():
    text, found, owners = text_of_labels([("Sofa", "Couch"), ("brick wall",), ("couch",)])
    assert text == "Sofa, Couch, brick wall"
    assert [noun.text for noun in found] == ["sofa", "couch", "brick wall"]
    assert owners == [[0, 1], [2], [1]]
    assert [text[noun.start : noun.end] for noun in found] == ["Sofa", "Couch", "brick wall"]


def test_json_lines_hold_lists_of_labels(tmp_path):
    path = tmp_path / "set.jsonl"
    lines = [
        {"tags": ["Brick  Wall", "sofa; couch", "brick wall"]},
        {"tags": []},
        {"tags": [3]},
        {"tags": "sky, tree"},
        {"other": 1},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    found = read(path, caption_column="tags")
    assert [nouns(one) for one in found if not isinstance(one, Dropped)] == [
        ["brick wall", "sofa"],
        ["sky", "tree"],
    ]
    assert reasons(found) == ["no_labels", "malformed_record", "malformed_record"]
    first = read(path, LabelSpec(synonyms=True), caption_column="tags")[0]
    assert nouns(first) == ["brick wall", "sofa", "couch"]


def test_a_table_separates_labels(tmp_path):
    path = tmp_path / "set.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([["id", "tags"], ["1", "sky|traffic light"], ["2", " | "]])
    found = read(path, LabelSpec(separator="|"), caption_column="tags")
    assert nouns(found[0]) == ["sky", "traffic light"] and reasons(found) == ["no_labels"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary()])
def test_parquet_holds_lists_of_text(tmp_path, kind):
    values = [["sky", "red panda"], None, ["tree"]]
    column = pa.array(values, type=pa.list_(pa.string())).cast(pa.list_(kind))
    pq.write_table(pa.table({"tags": column}), tmp_path / "set.parquet")
    found = read(tmp_path / "set.parquet", caption_column="tags")
    assert nouns(found[0]) == ["sky", "red panda"] and nouns(found[2]) == ["tree"]
    assert reasons(found) == ["malformed_record"]


def test_parquet_of_numbers_is_refused(tmp_path):
    pq.write_table(pa.table({"tags": [[1, 2]]}), tmp_path / "set.parquet")
    with pytest.raises(InputError, match="lists of text"):
        read(tmp_path / "set.parquet", caption_column="tags")


def test_a_folder_a_class(tmp_path):
    for name in ("red_panda/a.jpg", "red_panda/b.png", "tree/deep/c.jpg", "stray.jpg"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    found = read(tmp_path, format="class_folders")
    assert [nouns(one) for one in found if not isinstance(one, Dropped)] == [
        ["red panda"],
        ["red panda"],
        ["tree"],
    ]
    assert reasons(found) == ["malformed_record"]
    assert {one.image for one in found if not isinstance(one, Dropped)} == {
        b"red_panda/a.jpg",
        b"red_panda/b.png",
        b"tree/deep/c.jpg",
    }
    before = identify(CorpusSpec(path=str(tmp_path), format="class_folders", labels=LabelSpec()))
    (tmp_path / "tree/new.jpg").write_bytes(b"1")
    after = identify(CorpusSpec(path=str(tmp_path), format="class_folders", labels=LabelSpec()))
    assert before != after


@pytest.fixture
def open_images(tmp_path):
    """Writes Open Images' two files: labels found by people and by a machine."""

    def write(rows, descriptions=(("/m/1", "Tree"), ("/m/2", "Red panda"))):
        names = tmp_path / "class-descriptions.csv"
        with open(names, "w", newline="") as file:
            csv.writer(file).writerows(descriptions)
        path = tmp_path / "train-annotations-human-imagelabels.csv"
        with open(path, "w", newline="") as file:
            columns = ["ImageID", "Source", "LabelName", "Confidence"]
            csv.writer(file).writerows([columns, *rows])
        images = tmp_path / "images"
        images.mkdir(exist_ok=True)
        for image in {row[0] for row in rows}:
            (images / f"{image}.jpg").write_bytes(image.encode())
        return path, LabelSpec(names=str(names)), images

    return write


ROWS = [
    ("a", "verification", "/m/1", "1"),
    ("a", "machine", "/m/2", "0.8"),
    ("b", "verification", "/m/1", "0"),
    ("c", "machine", "/m/1", "0.9"),
    ("c", "crowdsource-verification", "/m/1", "0"),
    ("c", "verification", "/m/2", "1"),
]


@pytest.mark.parametrize(
    ("least", "expected"),
    [(1.0, [["tree"], ["red panda"]]), (0.7, [["tree", "red panda"], ["red panda"]])],
)
def test_open_images_are_labelled_by_what_is_verified(open_images, least, expected):
    path, labels, images = open_images(ROWS)
    labels = LabelSpec(names=labels.names, min_confidence=least)
    found = read(path, labels, format="open_images", images=str(images))
    kept = [one for one in found if not isinstance(one, Dropped)]
    assert [nouns(one) for one in kept] == expected
    assert [one.image for one in kept] == [b"a", b"c"] and reasons(found) == ["no_labels"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*ROWS, ("a", "verification", "/m/2", "1")], "not adjacent"),
        ([("a", "verification", "/m/9", "1")], "does not describe the label /m/9"),
        ([("a", "verification", "/m/1", "yes")], "number as Confidence"),
    ],
)
def test_bad_rows_of_open_images_are_refused(open_images, rows, message):
    path, labels, _ = open_images(rows)
    with pytest.raises(InputError, match=message):
        read(path, labels, format="open_images")


def test_another_table_is_not_open_images(tmp_path, open_images):
    _, labels, _ = open_images(ROWS)
    (tmp_path / "other.csv").write_text("url,caption\nx,y\n")
    with pytest.raises(InputError, match="lacks the columns ImageID, LabelName, Confidence"):
        read(tmp_path / "other.csv", labels, format="open_images")


def test_new_descriptions_are_another_corpus(open_images):
    path, labels, _ = open_images(ROWS)
    spec = CorpusSpec(path=str(path), labels=labels, format="open_images")
    before = identify(spec)
    open_images(ROWS, [("/m/1", "Oak"), ("/m/2", "Bear")])
    assert identify(spec) != before


def test_captions_have_the_identity_that_they_had(tmp_path):
    (tmp_path / "a.txt").write_text("a cat\n")
    assert "labels" not in identify(CorpusSpec(path=str(tmp_path / "a.txt")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "class_folders"}, "set labels"),
        ({"format": "text", "labels": LabelSpec()}, "has no labels"),
        ({"format": "open_images", "labels": LabelSpec()}, "names"),
        ({"labels": LabelSpec(names="x.csv")}, "names"),
        ({"labels": LabelSpec(dataset="ade150"), "images": "x"}, "leave out"),
        ({"format": "class_folders", "labels": LabelSpec(), "images": "x"}, "its own"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CorpusSpec(path="x", **settings)


def test_the_column_of_labels_must_be_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"caption": "a cat"}\n')
    with pytest.raises(InputError, match="column of labels"):
        read(tmp_path / "a.jsonl")
