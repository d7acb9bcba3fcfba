"""Phase 2: drops unusable and unwanted references and renumbers the rest.

Each filter sees what the previous one kept; its counts before and after go into the manifest.
When a collection grows, its existing references are kept, with their ids. New references are
compared with them, and their keys with those of deleted ones, so that these do not come back.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ovref.errors import InputError
from ovref.ops.quality import (
    agreement_with_others,
    count_on_other_images,
    first_of_near_duplicates,
    noun_agreement,
)
from ovref.reduce.gather import MEASURES, USABLE
from ovref.reduce.indexing import build_index_on_disk
from ovref.reduce.phases import Report
from ovref.reduce.rows import Rows
from ovref.reduce.spec import FilterSpec
from ovref_inference.collection.format import (
    FILES,
    OPTIONAL_FILES,
    REFERENCE_SCHEMA,
    TableWriter,
    VectorWriter,
    open_table,
    open_vectors,
)
from ovref_inference.collection.index import RecallQueries, read_index, search, tune

MEASURED = {
    "min_clip_agreement": "clip",
    "max_entropy": "entropy",
    "max_components": "components",
    "max_unsafe": "unsafe",
}
"""Setting of a limit -> what was measured (`Reference.measures`)."""
DROPPED = "dropped.parquet"
"""Dropped references and the reason, for tuning thresholds; not published."""
DROPPED_COLUMNS = ["key", "noun", "caption", "score", "area", "shard"]

FLAGGED = 0.5
"""Probability above which an image is flagged as unsafe."""
NAMED_LOST = 20
"""Maximum number of nouns named of those whose references were all dropped."""

_CHUNK = 65_536


class NothingKeptError(InputError):
    """The filters leave no reference."""

    steps: list[dict[str, Any]]
    """Counts before and after each filter."""
    lost_nouns: dict[str, Any]
    """As in the result of `filter_references`."""


def filter_references(
    gathered: Path,
    out: Path,
    spec: FilterSpec,
    *,
    existing: int,
    deleted: np.ndarray,
    seed: int,
    report: Report,
) -> dict[str, Any]:
    """Writes the kept references of `gathered` into `out`, numbered without gaps.

    Memory: the columns key, noun, area and score; one noun's visual embeddings at a time; and for
    the noun agreement, as much as building an index on disk (`indexing.build_indexes`).

    Args:
        existing: number of leading rows that are always kept.
        deleted: sorted ids of the deleted ones among them.
        seed: seed of the index that is searched for the noun agreement.

    Raises:
        NothingKeptError: nothing is left (the message counts what each filter dropped).
        InputError: a filter needs what was not measured.
    """
    measures = _measures(gathered)
    _check_measured(spec, measures)
    visual = open_vectors(gathered / FILES["visual"])
    with open_table(gathered / FILES["references"], REFERENCE_SCHEMA) as file:
        table = file.read(columns=["key", "noun", "area", "score"])
    nouns = _codes(table.column("noun"))
    images = _codes(pc.list_element(pc.split_pattern(table.column("key"), "#"), 0))
    area, score = table.column("area").to_numpy(), table.column("score").to_numpy()

    rows = np.arange(len(visual))
    alive = ~np.isin(rows, deleted)
    reasons = np.full(len(visual), "", dtype=object)
    steps: list[dict[str, Any]] = []

    def apply(reason: str, keep_of: Callable[[np.ndarray], np.ndarray]) -> None:
        nonlocal rows
        keep = keep_of(rows) | (rows < existing)
        reasons[rows[~keep]] = reason
        steps.append({"filter": reason, "before": len(rows), "after": int(keep.sum())})
        rows = rows[keep]
        report("filter", len(steps), spec.filters)

    usable = np.load(gathered / USABLE, allow_pickle=False)
    apply("unusable_vectors", lambda rows: usable[rows])
    apply("repeated_key", lambda rows: _first_of_each(_codes(table.column("key"))[rows]))
    if spec.limits_area:
        apply("area", lambda rows: (area[rows] >= spec.min_area) & (area[rows] <= spec.max_area))
    if spec.min_score is not None:
        apply("score", lambda rows: score[rows] >= spec.min_score)
    if spec.blocked_captions:
        blocked = _blocked(gathered, spec.blocked_captions)
        apply("blocked_caption", lambda rows: ~blocked[rows])
    for setting, name in MEASURED.items():
        if (limit := getattr(spec, setting)) is not None:
            kind, _, reason = setting.partition("_")
            bad = measures[name] < limit if kind == "min" else measures[name] > limit  # not NaN
            apply(reason, (~bad).__getitem__)
    if (cosine := spec.duplicate_cosine) is not None:
        apply(
            "near_duplicate",
            lambda rows: _without_near_duplicates(
                visual, rows, nouns[rows], alive[rows], cosine, existing
            ),
        )
    if (deviations := spec.outlier_deviations) is not None:
        apply(
            "outlier",
            lambda rows: _without_outliers(visual, rows, nouns[rows], alive[rows], deviations),
        )
    agreement: dict[str, Any] = {}
    live_rows = rows[alive[rows]]
    if spec.min_noun_agreement is not None and len(live_rows):
        agreement_n = np.full(len(rows), np.nan)
        agreement_n[alive[rows]] = _agreement(
            visual, live_rows, nouns[live_rows], images[live_rows], spec, seed, out
        )
        measured = ~np.isnan(agreement_n)
        fine = ~measured | (agreement_n >= spec.min_noun_agreement)
        apply("noun_agreement", lambda rows: fine)
        agreement = {
            "judged": int(measured.sum()),
            "mean_before": _mean(agreement_n[measured]),
            "mean_of_kept": _mean(agreement_n[measured & fine]),
        }
    if len(rows) == 0:
        dropped_by = ", ".join(f"{one['filter']} {one['before'] - one['after']}" for one in steps)
        error = NothingKeptError(
            f"the filters leave none of {len(visual)} references (dropped: {dropped_by}); "
            "relax the thresholds in `filter`"
        )
        error.steps = steps
        error.lost_nouns = _lost_nouns(table["noun"], nouns, alive, rows)
        raise error
    dropped = np.flatnonzero(reasons != "")
    why = pa.array(reasons[dropped], pa.string())
    pq.write_table(_rows_of(gathered, dropped).append_column("reason", why), out / DROPPED)
    write_rows(gathered, out, rows)
    found = {"steps": steps, "noun_agreement": agreement, "references": len(rows)}
    if "unsafe" in measures:
        found["flagged"] = {"unsafe": int((measures["unsafe"][rows] > FLAGGED).sum())}
    # A key that occurs twice and a deleted one that does not come back are no loss.
    lost = _lost_nouns(table["noun"], nouns, alive & (reasons != "repeated_key"), rows[alive[rows]])
    return found | ({"lost_nouns": lost} if lost else {})


def _lost_nouns(
    column: pa.ChunkedArray, nouns: np.ndarray, before: np.ndarray, kept: np.ndarray
) -> dict[str, Any]:
    """The nouns of the rows `before` that none of the rows `kept` has; empty if there are none."""
    counts, firsts = np.bincount(nouns[before]), np.unique(nouns, return_index=True)[1]
    (codes,) = np.nonzero(counts)
    codes = codes[~np.isin(codes, nouns[kept])]
    if not len(codes):
        return {}
    names = column.take(pa.array(firsts[codes])).to_pylist()
    pairs = zip(names, counts[codes].tolist(), strict=True)
    lost = sorted(pairs, key=lambda pair: (-pair[1], pair[0]))
    return {
        "nouns": len(lost),
        "references": sum(count for _, count in lost),
        "most_frequent": [list(pair) for pair in lost[:NAMED_LOST]],
    }


def join_lost_nouns(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The lost nouns of partitions, which have no noun in common; empty if there are none."""
    if not parts:
        return {}
    named = [pair for part in parts for pair in part["most_frequent"]]
    return {
        **{name: sum(part[name] for part in parts) for name in ("nouns", "references")},
        "most_frequent": sorted(named, key=lambda pair: (-pair[1], pair[0]))[:NAMED_LOST],
    }


def _measures(gathered: Path) -> dict[str, np.ndarray]:
    """(n,) float32 by name."""
    if not (gathered / MEASURES).exists():  # gathered by an older ovref, which measured nothing
        return {}
    with np.load(gathered / MEASURES, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _check_measured(spec: FilterSpec, measures: dict[str, np.ndarray]) -> None:
    """Raises InputError if a filter that is on needs what no reference has."""
    for setting, name in MEASURED.items():
        if getattr(spec, setting) is not None and name not in measures:
            how = "embed.measures.safety.model=MODEL" if name == "unsafe" else "embed.measures={}"
            raise InputError(
                f"reduce.filter.{setting} needs {name!r} of each reference, which was not measured:"
                f" embed the images again, into another output with images_from, with {how}"
            )


def _blocked(gathered: Path, words: tuple[str, ...]) -> np.ndarray:
    """(n,) bool: whose caption has one of the words."""
    pattern = re.compile(r"(?<!\w)(" + "|".join(map(re.escape, words)) + r")(?!\w)", re.IGNORECASE)
    found: list[bool] = []
    with open_table(gathered / FILES["references"], REFERENCE_SCHEMA) as file:
        for group in range(file.num_row_groups):
            captions = file.read_row_group(group, columns=["caption"]).column("caption")
            found += [pattern.search(text) is not None for text in captions.to_pylist()]
    return np.array(found, dtype=bool)


def _without_outliers(
    visual: np.ndarray, rows: np.ndarray, nouns: np.ndarray, alive: np.ndarray, deviations: float
) -> np.ndarray:
    keep = np.ones(len(rows), dtype=bool)
    for of_noun in _by_noun(nouns, np.flatnonzero(alive)):
        vectors_nd = np.asarray(visual[rows[of_noun]], np.float32)
        keep[of_noun] = ~agreement_with_others(vectors_nd, deviations)[1]
    return keep


def _by_noun(nouns: np.ndarray, chosen: np.ndarray) -> list[np.ndarray]:
    """The chosen rows of each noun, ascending."""
    order = chosen[np.argsort(nouns[chosen], kind="stable")]
    return np.split(order, np.flatnonzero(np.diff(nouns[order])) + 1)


def _codes(column: pa.ChunkedArray) -> np.ndarray:
    """(n,) int64: equal texts have equal codes."""
    encoded = column.combine_chunks().dictionary_encode()
    return encoded.indices.to_numpy().astype(np.int64)


def _first_of_each(codes: np.ndarray) -> np.ndarray:
    keep = np.zeros(len(codes), dtype=bool)
    keep[np.unique(codes, return_index=True)[1]] = True
    return keep


def _without_near_duplicates(
    visual: np.ndarray,
    rows: np.ndarray,
    nouns: np.ndarray,
    alive: np.ndarray,
    min_cosine: float,
    existing: int,
) -> np.ndarray:
    keep = ~alive
    for of_noun in _by_noun(nouns, np.flatnonzero(alive)):
        ids = rows[of_noun]
        before = int((ids < existing).sum())
        keep[of_noun] = first_of_near_duplicates(visual[ids], min_cosine, existing=before)
    return keep


def _agreement(
    visual: np.ndarray,
    rows: np.ndarray,
    nouns: np.ndarray,
    images: np.ndarray,
    spec: FilterSpec,
    seed: int,
    out: Path,
) -> np.ndarray:
    """`noun_agreement` among these rows; NaN for nouns that are too rare to measure."""
    path, index_path = out / "judged.npy", out / "judged.faiss"
    _write_vectors(visual, rows, path)
    build_index_on_disk(path, index_path, seed=seed)
    vectors, index = Rows(path), read_index(index_path)
    available = count_on_other_images(nouns, images)
    wanted = min(spec.agreement_neighbours + int(np.bincount(images).max()), len(rows))
    nprobe = None
    if hasattr(index, "nlist"):
        # Tuned for the number of neighbours searched below, without the row itself.
        questions = RecallQueries.of_rows(vectors, seed=seed, ks=[wanted - 1])
        nprobe = tune(index, questions)[0].nprobe
    found = np.empty(len(rows))
    for start in range(0, len(rows), 4096):
        queries = np.arange(start, min(start + 4096, len(rows)))
        _, neighbours = search(index, vectors[queries], wanted, nprobe=nprobe)
        found[queries] = noun_agreement(
            neighbours, queries, nouns, images, available, spec.agreement_neighbours
        )
    path.unlink()
    index_path.unlink()
    found[available < spec.agreement_min_elsewhere] = np.nan
    return found


def _mean(values: np.ndarray) -> float | None:
    return round(float(values.mean()), 6) if len(values) else None


def _rows_of(gathered: Path, rows: np.ndarray) -> pa.Table:
    """`DROPPED_COLUMNS` of some rows, read one row group at a time."""
    found: list[pa.Table] = []
    with open_table(gathered / FILES["references"], REFERENCE_SCHEMA) as file:
        first = 0
        for group in range(file.num_row_groups):
            total = file.metadata.row_group(group).num_rows
            here = rows[np.searchsorted(rows, first) : np.searchsorted(rows, first + total)]
            if len(here) or not found:
                table = file.read_row_group(group, columns=DROPPED_COLUMNS)
                found.append(table.take(pa.array(here - first, pa.int64())))
            first += total
    return pa.concat_tables(found)


def write_rows(gathered: Path, out: Path, rows: np.ndarray) -> None:
    """Writes these rows of the table and the matrices in a folder into another, numbered anew.

    Args:
        rows: (n,) int64, ascending.
    """
    names = [FILES["visual"], FILES["textual"], *OPTIONAL_FILES.values()]
    for name in names:
        if (gathered / name).exists():
            _write_vectors(open_vectors(gathered / name), rows, out / name)
    with (
        open_table(gathered / FILES["references"], REFERENCE_SCHEMA) as file,
        TableWriter(out / FILES["references"], REFERENCE_SCHEMA) as writer,
    ):
        first, written = 0, 0
        for group in range(file.num_row_groups):
            table = file.read_row_group(group)
            here = rows[np.searchsorted(rows, first) : np.searchsorted(rows, first + len(table))]
            kept = table.take(pa.array(here - first))
            columns = {name: kept.column(name) for name in kept.column_names}
            writer.append({**columns, "id": np.arange(written, written + len(here))})
            first, written = first + len(table), written + len(here)


def _write_vectors(vectors: np.ndarray, rows: np.ndarray, path: Path) -> None:
    with VectorWriter(path, len(rows), vectors.shape[1]) as writer:
        for start in range(0, len(rows), _CHUNK):
            writer.append(vectors[rows[start : start + _CHUNK]])
