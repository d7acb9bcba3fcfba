"""Reading rows of a memory-mapped file that is not in the page cache, announced before or not.

    python tests/benchmarks/cold_rows.py --scratch FOLDER [--turns 7]

With the sizes of a million references over 50,000 nouns: the stored prototypes of 171 nouns (171
slices of 10 rows out of 500,000 x 768 float16), and what FOSSIL clusters for 171 classes (150 rows
each, anywhere in 1,000,000 x 768). Files are full of random numbers, written once, and thrown out
of the page cache before each reading; with and without `prefetch_rows` take turns. Then the same
from the cache. Needs Linux. Writes results/cold_rows.json.
"""

import argparse
import json
import mmap
import os
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median

import numpy as np

from machine import commit
from ovref_inference.collection.format import VectorWriter, open_vectors
from ovref_inference.vectors import prefetch_rows

HERE = Path(__file__).parent
WIDTH, CLASSES, K, N = 768, 171, 10, 150


def write(path: Path, rows: int) -> None:
    rng = np.random.default_rng(rows)
    with VectorWriter(path, rows, WIDTH) as writer:
        for start in range(0, rows, 10_000):
            count = min(10_000, rows - start)
            bits = np.frombuffer(rng.bytes(2 * count * WIDTH), np.uint16)
            # Without its highest bit no exponent is that of infinity.
            writer.append((bits & 0xBFFF).view(np.float16).reshape(count, WIDTH))


def throw_out(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measured(path: Path, rows_of: Callable, announced: bool, cold: bool, turn: int) -> tuple:
    """Seconds, and megabytes read from the disk."""
    if cold:
        throw_out(path)
    matrix = open_vectors(path)
    parts = rows_of(np.random.default_rng(turn), len(matrix))
    before, began = _read_mb(), time.perf_counter()
    if announced:
        prefetch_rows(matrix, np.concatenate(parts))
    for rows in parts:
        np.asarray(matrix[rows], dtype=np.float32)
    return time.perf_counter() - began, _read_mb() - before


def stored_prototypes(rng: np.random.Generator, rows: int) -> list[np.ndarray]:
    nouns = rng.permutation(rows // K)[:CLASSES]
    return [np.arange(noun * K, (noun + 1) * K) for noun in nouns]


def retrieved(rng: np.random.Generator, rows: int) -> list[np.ndarray]:
    return list(rng.integers(rows, size=(CLASSES, N)))


def _read_mb() -> float:
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"]) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", type=Path, required=True, help="2.3 GB are written to it")
    parser.add_argument("--turns", type=int, default=7)
    arguments = parser.parse_args()
    cases = {
        "stored_prototypes": (500_000, stored_prototypes),
        "fossil_rows": (1_000_000, retrieved),
    }
    report = {
        "date": date.today().isoformat(),
        "commit": commit(),
        "method": "medians of alternating turns; wall time; page cache emptied of the file by "
        "posix_fadvise",
        "page_bytes": mmap.PAGESIZE,
        "turns": arguments.turns,
    }
    for name, (rows, rows_of) in cases.items():
        path = arguments.scratch / f"{name}.npy"
        write(path, rows)
        found: dict[str, list] = {}
        for cold in (True, False):
            if not cold:
                path.read_bytes()
            # From the cache it takes milliseconds, which scatter.
            for turn in range(arguments.turns if cold else 5 * arguments.turns):
                for announced in (False, True):
                    key = f"{'cold' if cold else 'warm'}_{'announced' if announced else 'plain'}"
                    found.setdefault(key, []).append(measured(path, rows_of, announced, cold, turn))
        path.unlink()
        report[name] = {
            f"{key}_{what}": round(median(values), 5)
            for key, all_of in found.items()
            for what, values in zip(("s", "mb_read"), zip(*all_of, strict=True), strict=True)
        }
    (HERE / "results" / "cold_rows.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
