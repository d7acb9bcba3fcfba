"""Makes a collection from the user's own vectors, with everything that a built one has."""

import dataclasses
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ovref.errors import InputError
from ovref.exchange.own_pictures import Images, add_pictures
from ovref.identity import record_key, spec_identity
from ovref.locations import absolute
from ovref.records import Noun, Reference
from ovref.reduce.collection import reduce_collection
from ovref.reduce.spec import ReduceSpec
from ovref.stages.embed import Embed
from ovref.storage.codec import check_key
from ovref.storage.file_store import Store
from ovref.storage.steps import open_step
from ovref_inference.collection.retrieve import Texts, class_embeddings, retrieval_embedding
from ovref_inference.vectors import l2_normalised

ROWS = 4096
"""References per shard, which are in memory at once."""
COLUMNS = ("noun", "caption", "key", "score", "source", "x0", "y0", "x1", "y1", "area", "image")
"""Columns read from a table of references; all except `noun` are optional."""


@dataclass(frozen=True, kw_only=True)
class OwnArrays:
    """References as arrays; row i of each array is reference i."""

    visual: np.ndarray
    """(n, d_visual) of any real dtype, finite, without zero rows; may be memory-mapped."""
    nouns: Sequence[str]
    """(n,) noun of each reference; compared in lower case."""
    captions: Sequence[str | None] | None = None
    """(n,) captions; None, for all or for one, takes the noun."""
    textual: np.ndarray | None = None
    """(n, d_textual) embeddings of the text encoder to search by; None encodes noun and caption as
    in a build."""
    more: dict[str, Sequence[Any]] = field(default_factory=dict)
    """Other columns of COLUMNS; None for a missing value."""

    def __post_init__(self) -> None:
        n = len(self.visual)
        if self.visual.ndim != 2 or n == 0:
            raise ValueError(f"visual must be (n, d) with a row, found {self.visual.shape}")
        if self.textual is not None and self.textual.ndim != 2:
            raise ValueError(f"textual must be (n, d), found {self.textual.shape}")
        columns = {"nouns": self.nouns, "captions": self.captions, "textual": self.textual}
        for name, column in (columns | self.more).items():
            if column is not None and len(column) != n:
                raise ValueError(f"visual has {n} rows, {name} {len(column)}")
        unknown = sorted(set(self.more) - set(COLUMNS[2:]))
        if unknown:
            raise ValueError(f"columns are {', '.join(COLUMNS)}, found {', '.join(unknown)}")


def collection_from_arrays(
    output: str,
    arrays: OwnArrays,
    embed: Embed,
    *,
    texts: Texts | None = None,
    name: str = "own",
    spec: ReduceSpec = ReduceSpec(),  # noqa: B008 (frozen)
    licences: Sequence[str] = (),
    replace: bool = False,
    images: str | None = None,
) -> dict[str, Any]:
    """Publishes a collection of arrays, with indexes, vocabulary and prototypes as in a build.

    Args:
        output: folder or URL of the collection.
        arrays: the references.
        embed: the encoders that made the vectors, for later segmentation: `visual` (your own
            backbone is `own:<name>`) and `text`, whose templates and weights are used here.
        texts: the text encoder if already loaded; None loads `embed.text`. `arrays.textual` must be
            in its space.
        name: default of the column `source`; part of the references' keys.
        spec: filters, prototypes, indexes.
        licences: licences of the data that the vectors were made from, as `<name>: <licence>`.
        replace: whether an existing collection may be replaced.
        images: folder or URL of the image files that the column `image` names; they are published
            beside the collection, where whatever shows references finds them. Without the column
            `key`, references of one file become those of one image. None publishes no images.

    Returns:
        The summary of `reduce_collection`; `filter` says what was dropped and why.

    Raises:
        InputError: a vector is zero or not finite, a noun is empty; or see `reduce_collection`.
        MismatchError: `output` holds another collection.
        ModelError: the text encoder cannot be loaded.
    """
    target = absolute(output, "output")
    found, names = None, {}
    if images is not None:
        if "image" not in arrays.more:
            raise InputError("images need the column `image`, the file of each reference")
        arrays = _with_keys(arrays, name)
        keys, files = arrays.more["key"], arrays.more["image"]
        names = {key: str(file) for key, file in zip(keys, files, strict=True) if file is not None}
        found = Images(images)
        found.check(list(dict.fromkeys(names.values())))
    if texts is None:
        from ovref_inference.encoders import load_text_encoder

        texts = load_text_encoder(embed.text)
    with tempfile.TemporaryDirectory() as scratch:
        identity = {"stages": [spec_identity(embed)], "own_arrays": name}
        step = open_step(Store.open(scratch), "references", identity, [])
        shards = []
        for start in range(0, len(arrays.visual), ROWS):
            shards.append(f"{start // ROWS:06d}")
            part = slice(start, min(start + ROWS, len(arrays.visual)))
            references = list(_references(arrays, part, embed, texts, name))
            step.commit(shards[-1], references, inputs=len(references))
        step.finish(shards)
        summary = reduce_collection(
            step,
            spec,
            embed=embed,
            texts=texts,
            output=Store.open(target),
            work=Path(scratch) / "work",
            licences=licences,
            provenance={"own_arrays": name, "references": len(arrays.visual)},
            replace=replace,
        )
    if found is not None:
        add_pictures(target, found, names)
    return summary


def _with_keys(arrays: OwnArrays, name: str) -> OwnArrays:
    """The arrays with a key for each reference; those of one image file share what is before #."""
    if "key" in arrays.more:
        return arrays
    seen: Counter[str] = Counter()
    keys = []
    for number, file in enumerate(arrays.more["image"]):
        image = f"{number}" if file is None else f"image {file}"
        keys.append(f"{record_key(name, image)}#{seen[image]}")
        seen[image] += 1
    return dataclasses.replace(arrays, more=arrays.more | {"key": keys})


def read_arrays(visual: str, table: str, textual: str | None = None) -> OwnArrays:
    """Reads arrays from files: vectors from `.npy`, memory-mapped, and a Parquet table with the
    column `noun` and optionally the others of COLUMNS.

    Raises:
        InputError: a file cannot be read or is of the wrong type, or lengths differ.
    """
    vectors, texts = _vectors(visual), None if textual is None else _vectors(textual)
    try:
        found = pq.read_table(table)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"cannot read the table {table}: {error}") from error
    if "noun" not in found.column_names:
        raise InputError(f"{table} needs a column noun, found {', '.join(found.column_names)}")
    columns = {
        name: found.column(name).to_pylist() for name in COLUMNS if name in found.column_names
    }
    try:
        return OwnArrays(
            visual=vectors,
            textual=texts,
            nouns=columns.pop("noun"),
            captions=columns.pop("caption", None),
            more=columns,
        )
    except ValueError as error:
        raise InputError(f"{visual} and {table} do not match: {error}") from error


def _vectors(path: str) -> np.ndarray:
    try:
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"cannot read the vectors {path}: {error}") from error
    if not isinstance(vectors, np.ndarray) or vectors.ndim != 2 or vectors.dtype.kind != "f":
        raise InputError(f"{path} must hold a matrix (n, d) of floats")
    return vectors


def _references(
    arrays: OwnArrays, part: slice, embed: Embed, texts: Texts, name: str
) -> Iterator[Reference]:
    numbers = range(part.start, part.stop)
    nouns = ["" if noun is None else str(noun).strip().lower() for noun in arrays.nouns[part]]
    if not all(nouns):
        row = part.start + nouns.index("")
        raise InputError(f"reference {row} has an empty noun")
    given = nouns if arrays.captions is None else arrays.captions[part]
    captions = [n if c is None else str(c) for n, c in zip(nouns, given, strict=True)]
    visual = _unit(arrays.visual[part], part.start, "visual")
    if arrays.textual is not None:
        textual = _unit(arrays.textual[part], part.start, "textual")
    else:
        unique = sorted(set(nouns))
        place = {noun: row for row, noun in enumerate(unique)}
        embedded = class_embeddings(texts, unique, embed.templates)
        of_nouns = embedded[[place[noun] for noun in nouns]]
        textual = retrieval_embedding(of_nouns, texts.encode(list(captions)), embed.weights)

    def column(key: str, default: Any, kind: Callable[[Any], Any]) -> list[Any]:
        given = list(arrays.more[key][part]) if key in arrays.more else [None] * len(nouns)
        return [
            default if value is None else _value(kind, value, key, number)
            for number, value in zip(numbers, given, strict=True)
        ]

    keys, scores = column("key", None, str), column("score", 1.0, float)
    sources, areas = column("source", name, str), column("area", 1.0, float)
    sides = (column(side, 0, _whole) for side in ("x0", "y0", "x1", "y1"))
    boxes = list(zip(*sides, strict=True))
    for row, number in enumerate(numbers):
        key = keys[row] or f"{record_key(name, captions[row], number)}#0"
        try:
            check_key(key)
        except ValueError as error:
            raise InputError(f"reference {number}: {error}") from error
        start = captions[row].lower().find(nouns[row])
        # The span is empty if the caption does not contain the noun.
        start, end = (start, start + len(nouns[row])) if start >= 0 else (0, 0)
        yield Reference(
            key=key,
            noun=Noun(text=nouns[row], start=start, end=end),
            caption=captions[row],
            box_xyxy=boxes[row],
            area=areas[row],
            score=scores[row],
            source=sources[row],
            seed=None,
            visual=visual[row],
            textual=textual[row].astype(np.float16),
        )


def _whole(value: Any) -> int:
    if int(value) != value:
        raise ValueError("not whole")
    return int(value)


def _value(kind: Callable[[Any], Any], value: Any, column: str, row: int) -> Any:
    try:
        return kind(value)
    except (TypeError, ValueError, OverflowError) as error:
        wanted = "a whole number" if kind is _whole else "a number"
        raise InputError(
            f"row {row} of the column {column} must be {wanted} or empty, found {value!r}"
        ) from error


def _unit(vectors: np.ndarray, first: int, name: str) -> np.ndarray:
    """L2-normalises rows, as float16. Raises InputError for a zero or non-finite row."""
    vectors = np.asarray(vectors, dtype=np.float32)
    bad = np.flatnonzero(~np.isfinite(vectors).all(1) | ~vectors.any(1))
    if len(bad):
        raise InputError(f"row {first + int(bad[0])} of the {name} vectors is zero or not finite")
    return l2_normalised(vectors).astype(np.float16)
