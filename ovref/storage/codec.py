"""Records as WebDataset samples, and as rows of the Parquet sidecar.

A caption, prompt or image record is one sample of a tar, members named `<key>.<extension>`:

    json            the record's metadata, keys sorted, with `kind`
    jpg|png|...     the encoded image as read, if there is one (`bin` for an unknown format)
    heatmaps.npy    image records with heatmaps: (regions, h, w) float16
    masks.png       image records with regions: 8-bit grey, the tri-state masks stacked vertically
    segments.png    captions and prompts of a labelled set with masks: `records.Segments.map_png`
    <table>.npy     images of an evaluation: one of `ScoredImage.tables`
    map<row>.png    images of an evaluation: one of `ScoredImage.maps`

and one row of the sidecar, which has the metadata without the arrays. A reference is only a row:
its sidecar holds the two embeddings as fixed-size lists of float16, so that the reducer reads
columns, and no tar needs millions of members of a few bytes each.
"""

import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, PngImagePlugin

from ovref.records import (
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

Record = Caption | Prompt | ImageRecord | Reference | LabelledImage | ScoredImage
Sample = Caption | Prompt | ImageRecord | LabelledImage | ScoredImage
"""Records that have samples."""

KINDS: dict[type, str] = {
    Caption: "caption",
    Prompt: "prompt",
    ImageRecord: "image",
    Reference: "reference",
    LabelledImage: "labelled_image",
    ScoredImage: "scored_image",
}

KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}(#[0-9]{1,9})?")
"""Keys are names in a tar: no slashes, and no dots (WebDataset's extension starts at the first)."""

MAGIC = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"GIF8": "gif", b"BM": "bmp"}
IMAGE_EXTENSIONS = (*MAGIC.values(), "webp", "bin")

NOUN = pa.struct([("text", pa.string()), ("start", pa.int32()), ("end", pa.int32())])
REGION = pa.struct([("noun", NOUN), ("score", pa.float64()), ("source", pa.string())])

COLUMNS: dict[str, dict[str, pa.DataType]] = {
    "caption": {
        "key": pa.string(),
        "text": pa.string(),
        "source": pa.string(),
        "draw": pa.int32(),
    },
    "prompt": {
        "key": pa.string(),
        "caption": pa.string(),
        "nouns": pa.list_(NOUN),
        "source": pa.string(),
        "draw": pa.int32(),
    },
    "image": {
        "key": pa.string(),
        "caption": pa.string(),
        "source": pa.string(),
        "seed": pa.int64(),
        "regions": pa.list_(REGION),
        "provenance": pa.string(),  # JSON
    },
    "reference": {
        "key": pa.string(),
        "noun": NOUN,
        "caption": pa.string(),
        "box_xyxy": pa.list_(pa.int32(), 4),
        "area": pa.float64(),
        "score": pa.float64(),
        "source": pa.string(),
        "seed": pa.int64(),
    },
    "labelled_image": {"key": pa.string(), "name": pa.string()},
    "scored_image": {"key": pa.string(), "name": pa.string()},
}
"""Columns of the sidecar by kind; references also have `visual`, `textual` and, where something was
measured of them, `measures`."""


def kind_of(record: Any) -> str:
    """One of the values of KINDS. Raises TypeError for anything that is no record."""
    try:
        return KINDS[type(record)]
    except KeyError:
        raise TypeError(
            f"a shard holds {', '.join(kind.__name__ for kind in KINDS)}, found {type(record)}"
        ) from None


def check_key(key: str) -> None:
    """Raises ValueError for a key that is not a safe name."""
    if not KEY.fullmatch(key):
        raise ValueError(
            f"a record's key must be 1 to 64 letters, digits, '-' or '_', for a region followed "
            f"by '#' and its number, found {key!r}"
        )


def is_part(key: str) -> bool:
    """Whether `key` is that of a region (keys of a corpus's bad records may contain a `#` too)."""
    match = KEY.fullmatch(key)
    return match is not None and match[1] is not None


def encode(record: Sample) -> dict[str, bytes]:
    """The sample of a record: file extension -> bytes, `json` first.

    Raises:
        ValueError: the key is not a safe name, a score is not finite, or the numbers of regions
            and heatmaps differ.
    """
    check_key(record.key)
    meta, sample = _metadata(record), {}
    if isinstance(record, ScoredImage):
        for name, table_nc in record.tables.items():
            sample[f"{name}.npy"] = _npy(table_nc)
        sample |= {f"map{row}.png": png for row, png in record.maps.items()}
    if isinstance(record, ImageRecord):
        if record.heatmaps_nhw is not None:
            sample["heatmaps.npy"] = _encode_heatmaps(record, record.heatmaps_nhw)
            meta["heatmaps_nhw"] = list(record.heatmaps_nhw.shape)
        if record.regions:
            sample["masks.png"] = _encode_masks(record)
            meta["mask_hw"] = list(record.regions[0].mask_hw.shape)
    if isinstance(record, Caption | Prompt) and record.segments is not None:
        meta["segments"] = [list(nouns) for nouns in record.segments.nouns]
        sample["segments.png"] = record.segments.map_png
    if isinstance(record, Caption | Prompt | ImageRecord) and record.image is not None:
        sample[_image_extension(record.image)] = record.image
    return {"json": _json(meta), **dict(sorted(sample.items()))}


def decode(key: str, sample: dict[str, bytes]) -> Sample:
    """The record of a sample, equal to the one encoded.

    Raises:
        ValueError: the sample is not one of ours.
    """
    try:
        meta = json.loads(sample["json"])
        kind = meta.pop("kind")
        if kind == "labelled_image":
            return LabelledImage(key=key, **meta)
        if kind == "scored_image":
            return ScoredImage(key=key, **meta, **_decode_scored(sample))
        image = next((sample[name] for name in IMAGE_EXTENSIONS if name in sample), None)
        if kind in ("caption", "prompt"):
            segments = _decode_segments(sample, meta.pop("segments", None))
        if kind == "caption":
            labels = tuple(Noun(**noun) for noun in meta.pop("labels", ()))
            return Caption(key=key, image=image, labels=labels, segments=segments, **meta)
        nouns = tuple(Noun(**noun) for noun in meta.pop("nouns"))
        if kind == "prompt":
            return Prompt(key=key, nouns=nouns, image=image, segments=segments, **meta)
        if kind == "image":
            if image is None:
                raise ValueError("it has no image")
            masks = _decode_masks(sample, len(nouns), meta.pop("mask_hw", None))
            return ImageRecord(
                key=key,
                image=image,
                heatmaps_nhw=_decode_heatmaps(sample, meta.pop("heatmaps_nhw", None)),
                regions=tuple(
                    Region(noun=noun, mask_hw=mask_hw, score=score, source=source)
                    for noun, mask_hw, score, source in zip(
                        nouns, masks, meta.pop("scores"), meta.pop("sources"), strict=True
                    )
                ),
                **meta,
            )
    except (KeyError, TypeError, AttributeError, ValueError, OSError, EOFError) as error:
        raise ValueError(f"sample {key!r} is not one of ovref's: {error!r}") from error
    raise ValueError(f"sample {key!r} is of an unknown kind {kind!r}")


def schema(record: Record) -> pa.Schema:
    """The schema of a sidecar for records like `record`; a reference sets the vectors' widths."""
    kind = kind_of(record)
    columns = dict(COLUMNS[kind])
    if isinstance(record, Reference):
        columns["visual"] = pa.list_(pa.float16(), len(record.visual))
        columns["textual"] = pa.list_(pa.float16(), len(record.textual))
        if record.measures:
            columns["measures"] = pa.struct([(name, pa.float32()) for name in record.measures])
    return pa.schema(list(columns.items()), metadata={"kind": kind})


def row(record: Record) -> dict[str, Any]:
    """A record's row of the sidecar: values by column, embeddings still as arrays.

    Raises:
        ValueError: the key is not a safe name.
    """
    check_key(record.key)
    if isinstance(record, LabelledImage | ScoredImage):
        return {"key": record.key, "name": record.name}
    values: dict[str, Any] = {"key": record.key, "source": record.source}
    if isinstance(record, Caption):
        return {**values, "text": record.text, "draw": record.draw}
    values["caption"] = record.caption
    if isinstance(record, Prompt):
        return {**values, "nouns": [asdict(noun) for noun in record.nouns], "draw": record.draw}
    values["seed"] = record.seed
    if isinstance(record, ImageRecord):
        regions = [
            {"noun": asdict(region.noun), "score": float(region.score), "source": region.source}
            for region in record.regions
        ]
        return {**values, "regions": regions, "provenance": _json(record.provenance).decode()}
    return {
        **values,
        "noun": asdict(record.noun),
        "box_xyxy": list(record.box_xyxy),
        "area": float(record.area),
        "score": float(record.score),
        "visual": record.visual,
        "textual": record.textual,
        **({"measures": dict(record.measures)} if record.measures else {}),
    }


def table(rows: list[dict[str, Any]], of: pa.Schema) -> pa.Table:
    """Rows from `row` as a table with the schema `of`.

    Raises:
        ValueError: an embedding is not finite or of another length.
    """
    arrays = [
        _vectors(rows, column)
        if column.name in ("visual", "textual")
        else pa.array([values[column.name] for values in rows], type=column.type)
        for column in of
    ]
    return pa.Table.from_arrays(arrays, schema=of)


def references(of: pa.Table) -> Iterator[Reference]:
    """The references in the rows of a sidecar, in order."""
    visual_nd, textual_nd = matrix(of, "visual"), matrix(of, "textual")
    rows = of.drop_columns(["visual", "textual"]).to_pylist()
    for row, visual, textual in zip(rows, visual_nd, textual_nd, strict=True):
        noun, box_xyxy = Noun(**row.pop("noun")), tuple(row.pop("box_xyxy"))
        yield Reference(**row, noun=noun, box_xyxy=box_xyxy, visual=visual, textual=textual)


def matrix(of: pa.Table, name: str) -> np.ndarray:
    """The embeddings in column `name`, `visual` or `textual`: (rows, d) float16."""
    column = of.column(name).combine_chunks()
    return column.flatten().to_numpy().reshape(len(column), column.type.list_size)


def _metadata(record: Sample) -> dict[str, Any]:
    if isinstance(record, LabelledImage | ScoredImage):
        return {"kind": kind_of(record), "name": record.name}
    if isinstance(record, Caption):
        meta = {"text": record.text, "source": record.source, "draw": record.draw}
        if record.labels:
            meta["labels"] = [asdict(label) for label in record.labels]
    elif isinstance(record, Prompt):
        meta = {"caption": record.caption, "source": record.source, "draw": record.draw}
        meta["nouns"] = [asdict(noun) for noun in record.nouns]
    else:
        meta = {"caption": record.caption, "source": record.source, "seed": record.seed}
        meta["nouns"] = [asdict(region.noun) for region in record.regions]
        meta["scores"] = [float(region.score) for region in record.regions]
        meta["sources"] = [region.source for region in record.regions]
        meta["provenance"] = record.provenance
    return {"kind": kind_of(record), **meta}


def _vectors(rows: list[dict[str, Any]], column: pa.Field) -> pa.Array:
    size = column.type.list_size
    for values in rows:
        vector = values[column.name]
        if len(vector) != size or not np.isfinite(vector).all():
            raise ValueError(
                f"{values['key']}: {column.name} must have {size} finite values, found "
                f"{len(vector)}, {int(np.isfinite(vector).sum())} of them finite"
            )
    flat_nd = np.concatenate([values[column.name] for values in rows])
    return pa.FixedSizeListArray.from_arrays(pa.array(flat_nd), size)


def _encode_heatmaps(record: ImageRecord, heatmaps_nhw: np.ndarray) -> bytes:
    regions = len(record.regions)
    if (
        heatmaps_nhw.ndim != 3
        or heatmaps_nhw.dtype != np.float16
        or heatmaps_nhw.shape[0] != regions
    ):
        raise ValueError(
            f"{record.key}: heatmaps_nhw must be ({regions}, h, w) float16, one for each region, "
            f"found {heatmaps_nhw.shape} {heatmaps_nhw.dtype}"
        )
    return _npy(heatmaps_nhw)


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(array), allow_pickle=False)
    return file.getvalue()


def _decode_scored(sample: dict[str, bytes]) -> dict[str, Any]:
    tables = {
        name.removesuffix(".npy"): np.load(io.BytesIO(data), allow_pickle=False)
        for name, data in sample.items()
        if name.endswith(".npy")
    }
    maps = {
        int(name.removeprefix("map").removesuffix(".png")): data
        for name, data in sample.items()
        if name.startswith("map")
    }
    return {"tables": tables, "maps": maps}


def _decode_segments(sample: dict[str, bytes], nouns: list[list[int]] | None) -> Segments | None:
    if nouns is None:
        return None
    return Segments(nouns=tuple(map(tuple, nouns)), map_png=sample["segments.png"])


def _decode_heatmaps(sample: dict[str, bytes], shape_nhw: list[int] | None) -> np.ndarray | None:
    if shape_nhw is None:
        return None
    heatmaps_nhw = np.load(io.BytesIO(sample["heatmaps.npy"]), allow_pickle=False)
    if list(heatmaps_nhw.shape) != shape_nhw or heatmaps_nhw.dtype != np.float16:
        raise ValueError(f"heatmaps.npy is {heatmaps_nhw.shape}, json says {shape_nhw}")
    return heatmaps_nhw


def _encode_masks(record: ImageRecord) -> bytes:
    shapes = {region.mask_hw.shape for region in record.regions}
    if len(shapes) != 1 or 0 in next(iter(shapes)):
        raise ValueError(f"{record.key}: masks of one image must be of one size, found {shapes}")
    file = io.BytesIO()
    stacked = np.concatenate([region.mask_hw for region in record.regions])
    # Such masks consist of runs: run-length encoding gives smaller files in half the time.
    Image.fromarray(stacked).save(file, format="png", compress_type=zlib.Z_RLE)
    return file.getvalue()


def _decode_masks(
    sample: dict[str, bytes], regions: int, mask_hw: list[int] | None
) -> list[np.ndarray]:
    if not regions:
        return []
    if mask_hw is None:
        raise ValueError(f"json has {regions} regions and no mask_hw")
    height, width = mask_hw
    # The plug-in instead of Image.open, whose pixel limit is meant for images of unknown origin:
    # many stacked masks exceed it, and this file's checksum and size are known.
    try:
        with PngImagePlugin.PngImageFile(io.BytesIO(sample["masks.png"])) as png:
            if png.size != (width, regions * height) or png.mode != "L":
                raise ValueError(f"masks.png is {png.size} for {regions} masks of {mask_hw}")
            stacked = np.asarray(png)
    except SyntaxError as error:  # raised by Pillow for a file that is not a PNG
        raise ValueError(f"masks.png: {error}") from error
    return list(stacked.reshape(regions, height, width))


def _image_extension(image: bytes) -> str:
    for magic, extension in MAGIC.items():
        if image.startswith(magic):
            return extension
    return "webp" if image[:4] == b"RIFF" and image[8:12] == b"WEBP" else "bin"


def _json(value: Any) -> bytes:
    """The canonical JSON text of `value`. Raises ValueError for numbers that are not finite."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()
