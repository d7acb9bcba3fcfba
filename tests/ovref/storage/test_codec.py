import dataclasses
import io
import pickle

import numpy as np
import pytest
from PIL import Image

from ovref.records import (
    NO,
    UNSURE,
    YES,
    Caption,
    ImageRecord,
    LabelledImage,
    Noun,
    Prompt,
    Reference,
    Region,
    ScoredImage,
    Segments,
)
from ovref.storage import codec

CAT = Noun(text="cat", start=2, end=5)
MAT = Noun(text="mat", start=11, end=14)


def encoded(file_format: str, size_hw=(6, 5)) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (*size_hw, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=file_format)
    return file.getvalue()


def mask(size_hw=(6, 5), seed=0) -> np.ndarray:
    return np.random.default_rng(seed).choice([NO, UNSURE, YES], size_hw).astype(np.uint8)


def image_record(regions=2, heatmaps=True, **changes) -> ImageRecord:
    rng = np.random.default_rng(1)
    nouns = [CAT, MAT] * regions
    values = {
        "key": "0a1b",
        "caption": "a cat on a mat",
        "source": "captions.json:1",
        "image": encoded("jpeg"),
        "regions": tuple(
            Region(noun=nouns[n], mask_hw=mask(seed=n), score=0.1 + n / 3, source="daam")
            for n in range(regions)
        ),
        "heatmaps_nhw": rng.random((regions, 3, 4)).astype(np.float16) if heatmaps else None,
        "seed": 2**62 + 1,
        "provenance": {"model": "miniature:stable_diffusion", "steps": 25, "guidance": 7.5},
    }
    return ImageRecord(**{**values, **changes})


def reference(number=0, **changes) -> Reference:
    rng = np.random.default_rng(number)
    values = {
        "key": f"0a1b#{number}",
        "noun": CAT,
        "caption": "a cat on a mat",
        "box_xyxy": (0, 1, 4, 6),
        "area": 1 / 3,
        "score": 0.1 + number,
        "source": "daam",
        "seed": None if number else 2**62 + 1,
        "visual": rng.normal(size=4).astype(np.float16),
        "textual": rng.normal(size=3).astype(np.float16),
    }
    return Reference(**{**values, **changes})


def assert_same(left, right):
    """Equal in every field, arrays in dtype and every bit."""
    assert type(left) is type(right)
    if isinstance(left, np.ndarray):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right, strict=True)
    elif dataclasses.is_dataclass(left):
        for field in dataclasses.fields(left):
            assert_same(getattr(left, field.name), getattr(right, field.name))
    elif isinstance(left, tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    else:
        assert left == right


SAMPLES = {
    "caption": Caption(key="0a", text="ein Käse 🧀\n", source="a:1"),
    "caption_with_image": Caption(
        key="0a", text="", source="", draw=3, image=encoded("png")
    ),
    "caption_with_broken_image": Caption(key="0a", text="x", source="", image=b"not an image"),
    "labels_with_masks": Caption(
        key="0a", text="cat, mat", source="a:1", image=encoded("png"), labels=(CAT, MAT),
        segments=Segments(nouns=((1,), (0, 1)), map_png=encoded("png")),
    ),
    "labels": Caption(key="0a", text="cat, mat", source="a:1", labels=(CAT,)),
    "prompt_with_masks": Prompt(
        key="0a", caption="cat", nouns=(CAT,), source="", image=encoded("jpeg"),
        segments=Segments(nouns=((0,),), map_png=encoded("png")),
    ),
    "prompt": Prompt(key="0a", caption="a cat on a mat", nouns=(CAT, MAT), source="a:1"),
    "prompt_without_nouns": Prompt(key="0a", caption="", nouns=(), source="", image=b""),
    "image": image_record(),
    "image_without_regions": image_record(regions=0, heatmaps=False, seed=None, provenance={}),
    "image_with_heatmaps_of_no_region": image_record(regions=0),
    "real_image": image_record(regions=1, heatmaps=False, image=encoded("webp"), seed=None),
}  # fmt: skip


@pytest.mark.parametrize("record", SAMPLES.values(), ids=SAMPLES)
def test_a_record_comes_back_from_its_sample(record):
    sample = codec.encode(record)
    assert next(iter(sample)) == "json"
    assert_same(codec.decode(record.key, sample), record)
    assert codec.encode(record) == sample


def test_a_sample_has_the_names_and_bytes_that_the_module_says():
    record = image_record()
    sample = codec.encode(record)
    assert list(sample) == ["json", "heatmaps.npy", "jpg", "masks.png"]
    assert sample["jpg"] == record.image
    heatmaps_nhw = np.load(io.BytesIO(sample["heatmaps.npy"]), allow_pickle=False)
    assert heatmaps_nhw.dtype == np.float16
    with Image.open(io.BytesIO(sample["masks.png"])) as png:
        assert png.mode == "L" and png.size == (5, 12)
        np.testing.assert_array_equal(np.asarray(png)[6:], record.regions[1].mask_hw)


@pytest.mark.parametrize(
    ("image", "extension"),
    [
        (encoded("jpeg"), "jpg"),
        (encoded("png"), "png"),
        (encoded("gif"), "gif"),
        (encoded("bmp"), "bmp"),
        (encoded("webp"), "webp"),
        (b"RIFF", "bin"),
        (b"", "bin"),
    ],
)
def test_the_extension_is_that_of_the_image(image, extension):
    sample = codec.encode(Caption(key="0a", text="", source="", image=image))
    assert sample[extension] == image


@pytest.mark.parametrize(
    "key", ["", "a.b", "../a", "a/b", "__a", "a#", "a#b", "a b", "ä", "a" * 65]
)
def test_a_key_that_is_no_safe_name_is_refused(key):
    with pytest.raises(ValueError, match="a record's key must be"):
        codec.encode(Caption(key=key, text="", source=""))
    with pytest.raises(ValueError, match="a record's key must be"):
        codec.row(reference(key=key))


def test_drops_of_regions_are_distinguished_from_odd_names():
    assert codec.is_part("0a1b#12")
    assert not codec.is_part("0a1b")
    assert not codec.is_part("folder/a#b.csv:12")


def test_many_masks_are_no_decompression_bomb(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    record = image_record(regions=9, heatmaps=False)
    assert_same(codec.decode("0a1b", codec.encode(record)), record)


def test_masks_of_two_sizes_or_of_none_are_refused():
    record = image_record(heatmaps=False)
    first, second = record.regions
    for shape in [(3, 3), (0, 5)]:
        other = dataclasses.replace(second, mask_hw=mask(shape))
        with pytest.raises(ValueError, match="0a1b: masks of one image must be of one size"):
            codec.encode(dataclasses.replace(record, regions=(first, other)))


@pytest.mark.parametrize(
    "heatmaps_nhw", [np.zeros((1, 3, 4), np.float16), np.zeros((2, 3, 4)), np.zeros((2, 3))]
)
def test_heatmaps_that_do_not_fit_the_regions_are_refused(heatmaps_nhw):
    with pytest.raises(ValueError, match=r"0a1b: heatmaps_nhw must be \(2, h, w\) float16"):
        codec.encode(image_record(heatmaps_nhw=heatmaps_nhw))


def test_numbers_that_are_not_finite_are_refused():
    region = dataclasses.replace(image_record().regions[0], score=float("nan"))
    with pytest.raises(ValueError, match="not JSON compliant"):
        codec.encode(dataclasses.replace(image_record(heatmaps=False), regions=(region,) * 2))
    with pytest.raises(ValueError, match="not JSON compliant"):
        codec.encode(image_record(provenance={"guidance": float("inf")}))


@pytest.mark.parametrize(
    "changes",
    [
        {"json": b"{"},
        {"json": b"[]"},
        {"json": b"{}"},
        {"json": b'{"kind": "film", "nouns": []}'},
        {"json": b'{"kind": "caption", "text": "x"}'},
        {"json": b'{"kind": "caption", "text": "x", "source": "", "draw": 0, "more": 1}'},
        {"masks.png": b"\x89PNG"},
        {"masks.png": encoded("png")},
        {"masks.png": encoded("png")[:60]},
        {"heatmaps.npy": b""},
        {"heatmaps.npy": b"\x80\x04N."},
    ],
    ids=lambda changes: str(changes)[:60],
)
def test_a_sample_of_something_else_is_refused(changes):
    sample = codec.encode(image_record())
    with pytest.raises(ValueError, match="sample '0a1b' is"):
        codec.decode("0a1b", {**sample, **changes})
    with pytest.raises(ValueError, match="sample '0a1b' is"):
        codec.decode("0a1b", {name: data for name, data in sample.items() if name not in changes})


def test_an_image_record_without_its_image_is_refused():
    sample = codec.encode(image_record())
    images = [name for name in sample if name in codec.IMAGE_EXTENSIONS]
    with pytest.raises(ValueError, match=r"sample '0a1b' is .*no image"):
        codec.decode("0a1b", {name: data for name, data in sample.items() if name not in images})


class _Bomb:
    def __reduce__(self):
        return (pytest.fail, ("something was unpickled",))


def test_nothing_is_unpickled():
    file = io.BytesIO()
    np.save(file, np.array([_Bomb()], dtype=object), allow_pickle=True)
    for data in (file.getvalue(), pickle.dumps(_Bomb())):
        sample = {**codec.encode(image_record()), "heatmaps.npy": data}
        with pytest.raises(ValueError, match="sample '0a1b' is"):
            codec.decode("0a1b", sample)


def test_rows_hold_the_metadata():
    records = [image_record(), image_record(regions=0, seed=None)]
    table = codec.table([codec.row(record) for record in records], codec.schema(records[0]))
    rows = table.to_pylist()
    assert list(rows[0]) == list(codec.COLUMNS["image"])
    assert rows[0]["seed"] == 2**62 + 1 and rows[1]["seed"] is None
    assert rows[0]["regions"][1] == {
        "noun": {"text": "mat", "start": 11, "end": 14},
        "score": 0.1 + 1 / 3,
        "source": "daam",
    }
    assert rows[1]["regions"] == []
    assert rows[0]["provenance"] == (
        '{"guidance": 7.5, "model": "miniature:stable_diffusion", "steps": 25}'
    )


@pytest.mark.parametrize("name", ["caption", "prompt"])
def test_rows_of_texts_hold_the_record(name):
    record = SAMPLES[name]
    table = codec.table([codec.row(record)], codec.schema(record))
    row = table.to_pylist()[0]
    if name == "prompt":
        row["nouns"] = tuple(Noun(**noun) for noun in row["nouns"])
    assert type(record)(**row) == record


@pytest.mark.parametrize("count", [1, 3])
def test_references_come_back_from_their_rows(count):
    records = [reference(number) for number in range(count)]
    table = codec.table([codec.row(record) for record in records], codec.schema(records[0]))
    assert_same(tuple(codec.references(table)), tuple(records))
    visual_nd = codec.matrix(table, "visual")
    assert visual_nd.shape == (count, 4) and visual_nd.dtype == np.float16
    # A slice keeps its rows: Arrow arrays know an offset that flattened values must respect.
    assert_same(tuple(codec.references(table.slice(count - 1))), tuple(records[-1:]))
    assert codec.matrix(table.slice(0, 0), "textual").shape == (0, 3)


def test_what_was_measured_comes_back():
    records = [reference(n, measures={"clip": 0.25 * n, "entropy": 0.5}) for n in range(3)]
    table = codec.table([codec.row(record) for record in records], codec.schema(records[0]))
    assert [one.measures for one in codec.references(table)] == [one.measures for one in records]
    assert "measures" not in codec.schema(reference()).names


@pytest.mark.parametrize(
    "visual", [np.ones(5, np.float16), np.array([1, np.nan, 0, np.inf], np.float16)]
)
def test_embeddings_of_another_length_or_not_finite_are_refused(visual):
    records = [reference(0), reference(1, visual=visual)]
    with pytest.raises(ValueError, match="0a1b#1: visual must have 4 finite values"):
        codec.table([codec.row(record) for record in records], codec.schema(records[0]))


@pytest.mark.parametrize("record", ["text", None, {"key": "a"}])
def test_what_is_no_record_has_no_kind(record):
    with pytest.raises(TypeError, match="a shard holds Caption"):
        codec.kind_of(record)


def test_records_of_an_evaluation_come_back_as_they_were():
    named = LabelledImage(key="0a1b", name="validation/a b.jpg")
    assert codec.decode("0a1b", codec.encode(named)) == named
    scored = ScoredImage(
        key="0a1b",
        name="a",
        tables={
            "confusion": np.array([[0, 1, 2, 2**40]]),
            "segments": np.array([[0.0, 1.0, 1 / 3]]),
            "detections": np.zeros((0, 5)),
        },
        maps={0: b"\x89PNG first", 12: b"\x89PNG second"},
    )
    sample = codec.encode(scored)
    assert sorted(sample) == [
        "confusion.npy", "detections.npy", "json", "map0.png", "map12.png", "segments.npy",
    ]  # fmt: skip
    assert sample == codec.encode(scored)
    found = codec.decode("0a1b", sample)
    assert (found.key, found.name, found.maps) == ("0a1b", "a", scored.maps)
    for name, table_nc in scored.tables.items():
        np.testing.assert_array_equal(found.tables[name], table_nc)
        assert found.tables[name].dtype == table_nc.dtype
    for record in (named, scored):
        rows = codec.table([codec.row(record)], codec.schema(record))
        assert rows.to_pylist() == [{"key": "0a1b", "name": record.name}]
