"""Records as WebDataset samples, and as rows of the Parquet sidecar.

A caption, prompt or image record is one sample of a tar, members named `<key>.<extension>`:

    json            the record's metadata, keys sorted, with `kind`
    jpg|png|...     the encoded image as it came, where there is one (`bin` if of no known format)
    heatmaps.npy    image records with heatmaps: (regions, h, w) float16
    masks.png       image records with regions: 8-bit grey, the tri-state masks below one another

and one row of the sidecar, which has the metadata without the arrays. A reference is a row and
nothing else: its sidecar holds the two embeddings as fixed-size lists of float16, so that the
reducer reads columns, and there is no tar of millions of members of a few bytes each.
"""

import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, PngImagePlugin

from ovref.records import Caption, ImageRecord, Noun, Prompt, Reference, Region

Record = Caption | Prompt | ImageRecord | Reference

KINDS: dict[type, str] = {
    Caption: "caption", Prompt: "prompt", ImageRecord: "image", Reference: "reference"
}

KEY = re.compile(r"[A-Za-z0-9_-]{1,64}(#[0-9]{1,9})?")
"""Keys become names in a tar: no dots (WebDataset's extension begins at the first), no slashes."""

NOUN = pa.struct([("text", pa.string()), ("start", pa.int32()), ("end", pa.int32())])
REGION = pa.struct([("noun", NOUN), ("score", pa.float64()), ("source", pa.string())])

COLUMNS: dict[str, list[tuple[str, pa.DataType]]] = {
    "caption": [
        ("key", pa.string()), ("text", pa.string()), ("source", pa.string()), ("draw", pa.int32()),
    ],
    "prompt": [
        ("key", pa.string()), ("caption", pa.string()), ("nouns", pa.list_(NOUN)),
        ("source", pa.string()), ("draw", pa.int32()),
    ],
    "image": [
        ("key", pa.string()), ("caption", pa.string()), ("source", pa.string()),
        ("seed", pa.int64()), ("regions", pa.list_(REGION)), ("provenance", pa.string()),
    ],
    "reference": [
        ("key", pa.string()), ("noun", NOUN), ("caption", pa.string()),
        ("box_xyxy", pa.list_(pa.int32(), 4)), ("area", pa.float64()), ("score", pa.float64()),
        ("source", pa.string()), ("seed", pa.int64()),
    ],
}
"""Columns of the sidecar by kind; references have `visual` and `textual` besides."""


def kind_of(record: Record) -> str:
    """`caption`, `prompt`, `image` or `reference`. Raises TypeError for anything else."""
    raise NotImplementedError


def encode(record: Record) -> dict[str, bytes]:
    """The sample of a caption, prompt or image record: file extension -> bytes, `json` first.

    Raises:
        ValueError: the key is no safe name, or regions and heatmaps do not fit each other.
    """
    raise NotImplementedError


def decode(key: str, sample: dict[str, bytes]) -> Record:
    """The record of a sample, equal to the one encoded.

    Raises:
        ValueError: the sample is not one of ours.
    """
    raise NotImplementedError


def schema(record: Record) -> pa.Schema:
    """Of the sidecar that can hold `record`; a reference fixes the lengths of the embeddings."""
    raise NotImplementedError


def table(records: list[Record], of: pa.Schema) -> pa.Table:
    """The rows of some records of one kind."""
    raise NotImplementedError


def references(of: pa.Table) -> Iterator[Reference]:
    """The references that the rows of a sidecar hold."""
    raise NotImplementedError
