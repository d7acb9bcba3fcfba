"""Phases 3 and 5: an index of each kind of embedding, and its recall."""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ovref.reduce import ivf
from ovref.reduce.phases import Report, RunTasks, Task
from ovref.reduce.rows import Rows
from ovref_inference.collection.format import (
    FILES,
    IndexInfo,
    SearchPoint,
)
from ovref_inference.collection.index import (
    RECALL_QUERIES,
    RecallQueries,
    build_index,
    choose_index,
    list_count,
    one_thread,
    read_index,
    sample,
    training_rows,
    tune,
    write_index,
)
from ovref_inference.collection.nouns import read_noun_embeddings

ROLES = ("visual", "textual")
QUERIES = {"visual": "held-out rows", "textual": "class names"}
"""What each index is queried with, in use and when measured: regions, for which stored rows stand
in, and class names, for which the collection's nouns stand in."""
PART_ROWS = 4 * ivf.BLOCK
"""Rows per task: 200 MB of codes at a width of 768."""


@dataclass(frozen=True, kw_only=True)
class GrownIndex:
    """The existing index of a collection that is being grown."""

    path: Path
    info: IndexInfo
    rows: int


def build_indexes(
    filtered: Path,
    out: Path,
    *,
    seed: int,
    grown: dict[str, GrownIndex],
    run_tasks: RunTasks,
    report: Report,
) -> dict[str, Any]:
    """Writes visual.faiss and textual.faiss into `out`; the summary holds an IndexInfo for each,
    without a curve, which `tune_indexes` measures.

    An inverted file is trained, filled in parts and merged on disk (`ivf`); each task holds the
    training sample or one part in memory. When a collection grows, its index keeps its centroids
    and entries as long as the number of lists stays the same. This gives the same bytes as building
    at once, since centroids are trained on the first rows only (`training_rows`).

    Args:
        seed: seed of the training samples, the same that `grown` was built with.
        grown: existing indexes by role; empty for a new collection.
    """
    plans = [
        _plan(filtered / FILES[role], out / FILES[f"{role}_index"], seed, grown.get(role))
        for role in ROLES
    ]
    done, total = 0, sum(map(len, _stages(plans)))
    for stage in _stages(plans):
        for _ in run_tasks(stage):
            done += 1
            report("index", done, total)
    _remove_scratch(plans)
    return {
        role: asdict(IndexInfo(factory=plan.factory, train_rows=plan.train_rows))
        for role, plan in zip(ROLES, plans, strict=True)
    }


def tune_indexes(
    filtered: Path,
    built: Path,
    nouns: Path,
    indexes: dict[str, Any],
    *,
    recall: float,
    seed: int,
    deleted: np.ndarray,
    run_tasks: RunTasks,
    report: Report,
) -> dict[str, Any]:
    """Measures recall for queries like those in use, and chooses `nprobe` for each k.

    Args:
        filtered, built: the folders of the phases `filter` and `index`.
        nouns: nouns.parquet, whose text embeddings are the class-name queries.
        indexes: by role, what `build_indexes` returned.
        recall: mean recall against exact search to reach at each k.
        seed: seed of the query samples.
        deleted: sorted ids of deleted references, which no search returns.

    Returns:
        By role, the IndexInfo as plain values.
    """
    tasks = [
        partial(
            _tuned,
            filtered / FILES[role],
            built / FILES[f"{role}_index"],
            nouns if role == "textual" else None,
            deleted,
            seed,
            recall,
        )
        for role in ROLES
    ]
    found: dict[str, Any] = {}
    for role, curve in zip(ROLES, run_tasks(tasks), strict=True):
        queries = QUERIES[role] if curve else ""
        found[role] = indexes[role] | {"curve": [asdict(at) for at in curve], "queries": queries}
        report("tune", len(found), len(ROLES))
    return found


def build_index_on_disk(vectors: Path, path: Path, *, seed: int) -> None:
    """Writes the index of one matrix in this process, in as much memory as `build_indexes`."""
    plans = [_plan(vectors, path, seed, None)]
    for stage in _stages(plans):
        for task in stage:
            task()
    _remove_scratch(plans)


@dataclass(frozen=True, kw_only=True)
class _Plan:
    vectors: Path
    path: Path
    factory: str
    train_rows: int = 0
    train: Task | None = None
    parts: tuple[Task, ...] = ()
    finish: Task


def _plan(vectors: Path, path: Path, seed: int, grown: GrownIndex | None) -> _Plan:
    n, dim = Rows(vectors).shape
    factory = choose_index(n, dim)
    if not factory.startswith("IVF"):
        finish = partial(_whole, vectors, factory, path)
        return _Plan(vectors=vectors, path=path, factory=factory, finish=finish)
    trained, part = _scratch(path)
    count, of = training_rows(n, factory)
    kept = 0
    if grown and grown.info.factory == factory and grown.info.train_rows == count:
        # The last block of the old rows was not full; its rows are assigned again in a full block.
        kept = grown.rows // ivf.BLOCK * ivf.BLOCK
    old = grown.path if grown and kept else None
    parts: list[Task] = []
    names: list[Path] = []
    if old:
        names.append(Path(f"{part}old"))
        parts.append(partial(_old_part, old, kept, names[-1]))
    for start in range(kept, n, PART_ROWS):
        names.append(Path(f"{part}{start:012d}"))
        stop = min(start + PART_ROWS, n)
        parts.append(partial(_part, vectors, trained, start, stop, names[-1]))
    return _Plan(
        vectors=vectors,
        path=path,
        factory=factory,
        train_rows=count,
        train=partial(_train, vectors, factory, count, of, seed, old, trained),
        parts=tuple(parts),
        finish=partial(_merge, trained, names, path),
    )


def _stages(plans: list[_Plan]) -> list[list[Task]]:
    """Lists of tasks; each list must finish before the next begins."""
    return [
        [plan.train for plan in plans if plan.train],
        [part for plan in plans for part in plan.parts],
        [plan.finish for plan in plans],
    ]


def _whole(vectors: Path, factory: str, path: Path) -> None:
    """Builds a small index in memory."""
    write_index(build_index(Rows(vectors), factory), path)


def _train(
    vectors: Path, factory: str, count: int, of: int, seed: int, old: Path | None, trained: Path
) -> None:
    with one_thread():
        if old is not None:
            shape = Rows(vectors).shape
            centroids = ivf.centroids_of(read_index(old, dim=shape[1]))
        else:
            rows = sample(Rows(vectors), count, seed, of=of)
            centroids = ivf.train(rows, list_count(factory), seed=seed)
        write_index(ivf.empty_index(factory, centroids), trained)


def _part(vectors: Path, trained: Path, start: int, stop: int, name: Path) -> None:
    with one_thread():
        cells = ivf.cells_of(ivf.centroids_of(read_index(trained)))
        ivf.write_part(vectors, cells, start, stop, name)


def _old_part(index: Path, rows: int, name: Path) -> None:
    ivf.part_of_index(index, rows, name)


def _merge(trained: Path, parts: list[Path], path: Path) -> None:
    index = read_index(trained)
    ivf.merge(index, [ivf.read_part(part) for part in parts], path)


def _tuned(
    vectors: Path, path: Path, nouns: Path | None, deleted: np.ndarray, seed: int, recall: float
) -> tuple[SearchPoint, ...]:
    rows = Rows(vectors)
    with one_thread():
        index = read_index(path, rows=len(rows), dim=rows.shape[1])
        if not hasattr(index, "nlist") or len(deleted) == len(rows):
            return ()
        if nouns is None:
            questions = RecallQueries.of_rows(rows, seed=seed, excluded=deleted)
        else:
            names = sample(read_noun_embeddings(nouns), RECALL_QUERIES, seed)
            questions = RecallQueries(rows, names, excluded=deleted)
        return tune(index, questions, target=recall)


def _scratch(path: Path) -> tuple[Path, str]:
    """The trained-centroids file and the parts' name prefix, beside an index being built."""
    return path.with_name(f"{path.stem}_trained"), f"{path.with_name(path.stem)}_part_"


def _remove_scratch(plans: list[_Plan]) -> None:
    for plan in plans:
        trained, part = _scratch(plan.path)
        for leftover in (trained, *trained.parent.glob(f"{Path(part).name}*")):
            leftover.unlink(missing_ok=True)
