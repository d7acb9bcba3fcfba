"""A collection's embeddings, and the codes of its visual index, in 8 bits instead of 16.

Matrices keep a scale per row (`ovref_inference.collection.int8`). The inverted lists of the visual
index get the 8-bit codes of faiss, which have a scale per dimension, from the lowest to the highest
number of all rows; centroids and lists stay. Those of the textual index stay float16: the captions
of one noun differ by cosines of a thousandth, which 8 bits confuse, so that 12% of ten neighbours
were lost (`tests/benchmarks/results/int8.md`). Indexes of small collections, which have no lists,
stay as they are.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from ovref.reduce import ivf
from ovref.reduce.indexing import ROLES
from ovref.reduce.rows import Rows
from ovref.reduce.spec import ReduceSpec
from ovref_inference.collection import format as fmt
from ovref_inference.collection import store as collections
from ovref_inference.collection.index import (
    RecallQueries,
    faiss_module,
    mean_and_worst_tenth,
    one_thread,
    read_index,
)
from ovref_inference.collection.int8 import write_int8

_FLOAT16, _INT8 = ",SQfp16", ",SQ8"


def write_in_int8(
    vectors: Path,
    folder: Path,
    indexes: dict[str, Any],
    *,
    seed: int,
    deleted: np.ndarray,
    textual: bool,
) -> dict[str, Any]:
    """Writes the matrices in int8, and the inverted lists of the visual index with 8-bit codes.

    The number of lists that a search probes stays what it was tuned to with float16 codes; only
    its recall is measured again, since what 8 bits lose, no further list would bring back.

    Args:
        vectors: folder of the float16 matrices.
        folder: has the float16 indexes; their files must be links, or of no further use.
        indexes: IndexInfo as plain values by role, tuned.
        seed: of the queries, as in `indexing.tune_indexes`.
        deleted: sorted ids of deleted references.
        textual: whether the collection has a matrix of textual embeddings.

    Returns:
        `indexes` of the new collection.
    """
    for role in ROLES if textual else ("visual",):
        write_int8(folder / fmt.INT8_FILES[role], Rows(vectors / fmt.FILES[role]))
    info = indexes["visual"]
    if not info["factory"].endswith(_FLOAT16):
        return indexes
    rows, path = Rows(vectors / fmt.FILES["visual"]), folder / fmt.FILES["visual_index"]
    factory = info["factory"].removesuffix(_FLOAT16) + _INT8
    scratch = path.with_suffix(".int8")
    with one_thread():
        int8_index(path, rows, factory, scratch)
        scratch.replace(path)
        curve = info["curve"] and _measured(path, rows, info["curve"], seed, deleted)
    return indexes | {"visual": info | {"factory": factory, "curve": curve}}


def _measured(
    path: Path, rows: Rows, curve: list[dict[str, Any]], seed: int, deleted: np.ndarray
) -> list[dict[str, Any]]:
    """The points of a curve with the recall that this index has."""
    index = read_index(path, rows=len(rows), dim=rows.shape[1])
    ks = [point["k"] for point in curve]
    questions = RecallQueries.of_rows(rows, seed=seed, ks=ks, excluded=deleted)
    # Mapped, because single rows in no order are read faster so than by `Rows`.
    vectors = fmt.open_vectors(rows.path)
    probed = {point["nprobe"] for point in curve}
    recalls = {nprobe: questions.recalls(index, nprobe, vectors) for nprobe in probed}
    found = []
    for point in curve:
        mean, tenth = mean_and_worst_tenth(recalls[point["nprobe"]][point["k"]])
        found.append(point | {"recall": mean, "worst_tenth": tenth})
    return found


def in_int8(
    manifest: fmt.Manifest, paths: dict[str, Path], work: Path, fingerprint: str
) -> tuple[fmt.Manifest, dict[str, Path]]:
    """Converts a finished float16 collection without deleted references.

    Args:
        manifest, paths: of the collection, as `collection.store.fetch` gives them.
        work: a local folder; it needs about the size of the embeddings.
        fingerprint: of the new collection.

    Returns:
        The same of the new collection, whose files are in `work`.
    """
    source, files = work / "float16", work / "int8"
    for folder in (source, files):
        folder.mkdir(parents=True)
    for role, path in paths.items():
        if role in ROLES:
            (source / fmt.FILES[role]).symlink_to(path.resolve())
        else:
            name = (fmt.INT8_FILES | fmt.OPTIONAL_FILES)[role]
            (files / name).symlink_to(path.resolve())
    indexes = {role: asdict(getattr(manifest, f"{role}_index")) for role in ROLES}
    seed = manifest.build.get("reduce", {}).get("fields", {}).get("seed", ReduceSpec().seed)
    found = write_in_int8(
        source, files, indexes, seed=seed, deleted=np.zeros(0, np.int64), textual="textual" in paths
    )
    made = collections.publish(
        files,
        str(files),
        replace(
            manifest,
            fingerprint=fingerprint,
            embeddings="int8",
            visual_index=fmt.index_info(found["visual"]),
            textual_index=fmt.index_info(found["textual"]),
            build=manifest.build | {"converted": {"from": manifest.fingerprint, "to": "int8"}},
        ),
    )
    return made, {role: (files / made.files[role].path).resolve() for role in made.files}


def int8_index(source: Path, rows: Rows, factory: str, out: Path) -> None:
    """Writes the entries of an index made by `ivf.merge` as an index of another factory."""
    faiss = faiss_module()
    index = faiss.read_index(str(source), faiss.IO_FLAG_MMAP)
    empty = ivf.empty_index(factory, ivf.centroids_of(index), ranges=_ranges(rows))
    lists = index.invlists
    sizes = np.array([lists.list_size(number) for number in range(index.nlist)], np.int64)
    part = ivf.Part(out.with_suffix(".codes"), out.with_suffix(".ids"), sizes)
    with open(part.codes, "wb") as codes, open(part.ids, "wb") as ids:
        for number in np.flatnonzero(sizes).tolist():
            size = int(sizes[number])
            raw: np.ndarray = faiss.rev_swig_ptr(lists.get_codes(number), size * index.code_size)
            vectors = raw.view("<f2").reshape(size, index.d).astype(np.float32)
            codes.write(empty.sq.compute_codes(vectors).tobytes())
            ids.write(faiss.rev_swig_ptr(lists.get_ids(number), size).tobytes())
    ivf.merge(empty, [part], out)
    part.codes.unlink()
    part.ids.unlink()


def _ranges(rows: Rows) -> np.ndarray:
    """(2, d) float32: the lowest and the highest number of each dimension."""
    found = np.array([[np.inf], [-np.inf]]) * np.ones(rows.shape[1])
    for start in range(0, len(rows), ivf.BLOCK):
        block = rows[start : start + ivf.BLOCK]
        found = np.stack([np.minimum(found[0], block.min(0)), np.maximum(found[1], block.max(0))])
    return found.astype(np.float32)
