"""What opening a collection of a million references costs, and prototypes of 171 classes.

    python tests/benchmarks/open_million.py --collection SCRATCH/collection
    python tests/benchmarks/open_million.py [--references 1000000] [--nouns 50000]

The first asks a published collection, such as reduce_million.py leaves. The second makes one with
the sizes of a real one: matrices, lists of the indexes and prototypes are files of holes, which
read as zeros, since opening looks at none of their numbers; tables, vocabulary and centroids are
full. Each is asked in a process of its own, where the system lets its page cache be dropped first
(as root) in one whose files come from the disk, then in one whose files are in the cache.
Writes results/open_<references>x<width>.json.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import date
from pathlib import Path

from machine import commit, resident_mb

os.environ |= {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}

import numpy as np

from ovref_inference.collection import format as fmt
from ovref_inference.collection import index as indexes
from ovref_inference.collection.prototypes import PrototypeConfig
from ovref_inference.places import sha256_of
from ovref_inference.vectors import l2_normalised

HERE = Path(__file__).parent
CLASSES, REPEATS = 171, 5


def make(
    folder: Path, references: int, nouns: int, width: int, noun_of: np.ndarray | None = None,
    *, first: int = 0, step: int = 1,
) -> None:  # fmt: skip
    """The collection, its manifest last.

    Args:
        first, step: number of the first noun and from one to the next, for a collection that shares
            none with others.
        noun_of: (references,) number of each reference's noun; None gives all nouns equally many,
            one noun after the other.
    """
    from ovref.reduce import ivf

    config = PrototypeConfig()
    rng = np.random.default_rng(first)
    names = [f"noun {number:06d}" for number in range(first, first + nouns * step, step)]
    if noun_of is None:
        noun_of = np.repeat(np.arange(nouns), references // nouns)
        noun_of = np.concatenate([np.zeros(references - len(noun_of), int), noun_of])
    counts = np.bincount(noun_of, minlength=nouns)
    for role, rows in (
        ("visual", references), ("textual", references), ("prototypes", nouns * config.k)
    ):  # fmt: skip
        with open(folder / fmt.FILES[role], "wb") as file:
            header = {"descr": "<f2", "fortran_order": False, "shape": (rows, width)}
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + rows * width * 2)
    factory = indexes.choose_index(references, width)
    if factory == "Flat":
        raise SystemExit("so few references have an exact index, which is full of numbers")
    lists = int(factory.removeprefix("IVF").partition(",")[0])
    centroids = l2_normalised(rng.standard_normal((lists, width), dtype=np.float32))
    sizes = np.full(lists, references // lists)
    sizes[0] += references - sizes.sum()
    for role in ("visual", "textual"):
        empty = folder / f"{role}.entries"
        for suffix, each in ((".codes", 2 * width), (".ids", 8)):
            with open(empty.with_suffix(suffix), "wb") as file:
                file.truncate(references * each)
        part = ivf.Part(empty.with_suffix(".codes"), empty.with_suffix(".ids"), sizes)
        ivf.merge(ivf.empty_index(factory, centroids), [part], folder / f"{role}.faiss")
        part.codes.unlink()
        part.ids.unlink()
        if shutil.which("fallocate"):  # what was copied from holes are zeros on the disk
            subprocess.run(["fallocate", "--dig-holes", folder / f"{role}.faiss"], check=True)
    with fmt.TableWriter(folder / fmt.FILES["references"], fmt.REFERENCE_SCHEMA) as table:
        for start in range(0, references, 65_536):
            own = noun_of[start : start + 65_536]
            n = len(own)
            zeros = {name: np.zeros(n, np.int32) for name in (
                "span_start", "span_end", "x0", "y0", "x1", "y1")}  # fmt: skip
            table.append({
                "id": range(start, start + n), "key": [f"{i:024x}#0" for i in range(n)],
                "noun": [names[i] for i in own], "caption": ["a caption"] * n, **zeros,
                "area": np.ones(n),
                "score": np.ones(n), "source": ["daam"] * n, "shard": ["0/0"] * n,
                "seed": [None] * n,
            })  # fmt: skip
    starts = np.arange(nouns) * config.k
    near = rng.integers(nouns, size=(nouns, 9))
    fmt.write_table(folder / fmt.FILES["nouns"], fmt.NOUN_SCHEMA, {
        "noun": names, "count": counts,
        "embedding": list(l2_normalised(rng.standard_normal((nouns, width), dtype=np.float32))),
        "prototype_start": starts, "prototype_stop": starts + config.k,
        # Two thirds are rare and lean on nine others.
        "neighbours": [[names[i] for i in row] if n % 3 else [] for n, row in enumerate(near)],
    })  # fmt: skip
    fmt.write_table(
        folder / fmt.FILES["tombstones"], fmt.TOMBSTONE_SCHEMA, fmt.tombstone_columns([], "")
    )
    encoder = fmt.EncoderInfo(model="synthetic", revision="", dim=width)
    curve = (fmt.SearchPoint(k=10, nprobe=8, recall=1.0, worst_tenth=1.0),)
    info = fmt.IndexInfo(factory=factory, curve=curve)
    files = {}
    for role, name in fmt.FILES.items():
        size = (folder / name).stat().st_size
        # Nobody checks those of large files, but caches go by them.
        digest = sha256_of(folder / name) if size < 1 << 26 else f"{first:032x}{len(files):032x}"
        files[role] = fmt.FileInfo(path=name, bytes=size, sha256=digest)
    (folder / fmt.MANIFEST).write_bytes(fmt.manifest_bytes(fmt.Manifest(
        fingerprint=f"{first:064x}", visual=encoder, textual=encoder, templates=("a {}.",),
        weights=(0.9, 0.1), visual_index=info, textual_index=info, prototypes=asdict(config),
        counts={"references": references, "nouns": nouns, "prototypes": nouns * config.k,
                "tombstones": 0},
        files=files,
    )))  # fmt: skip


def ask(folder: Path) -> dict[str, float]:
    """Seconds and megabytes of this process."""
    import faiss  # noqa: F401 - loaded before the clock starts, as by anyone who has opened before

    from ovref_inference import ReferenceCollection

    found = {"imports_mb": resident_mb()}
    walls, cpus = [], []
    for _ in range(REPEATS):
        began, began_cpu = time.perf_counter(), time.process_time()
        collection = ReferenceCollection.open(folder)
        walls.append(time.perf_counter() - began)
        cpus.append(time.process_time() - began_cpu)
        found.setdefault("resident_mb", resident_mb())
    found |= {
        "open_first_cpu_s": cpus[0], "open_first_wall_s": walls[0], "open_cpu_s": min(cpus),
        "open_wall_s": min(walls),
    }  # fmt: skip
    rng = np.random.default_rng(0)
    walls, cpus = [], []
    for _ in range(REPEATS):
        names = [collection.nouns[i] for i in rng.permutation(len(collection.nouns))[:CLASSES]]
        began, began_cpu = time.perf_counter(), time.process_time()
        collection.prototypes(names)
        walls.append(time.perf_counter() - began)
        cpus.append(time.process_time() - began_cpu)
    return found | {
        f"prototypes_of_{CLASSES}_first_cpu_s": cpus[0],
        f"prototypes_of_{CLASSES}_first_wall_s": walls[0],
        f"prototypes_of_{CLASSES}_cpu_s": min(cpus),
        f"prototypes_of_{CLASSES}_wall_s": min(walls),
        "resident_after_mb": resident_mb(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--references", type=int, default=1_000_000)
    parser.add_argument("--nouns", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--only", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--collection", type=Path, help="asked instead of one of holes")
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(ask(arguments.only)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.collection or Path(scratch)
        if arguments.collection is None:
            make(folder, arguments.references, arguments.nouns, arguments.width)
        times = {}
        if _cache_dropped():
            times["cold"] = _asked(folder)
        _asked(folder)  # warms the page cache
        times["warm"] = _asked(folder)
        manifest = json.loads((folder / fmt.MANIFEST).read_text())
    counts, width = manifest["counts"], manifest["visual"]["dim"]
    report = {
        "date": date.today().isoformat(), "commit": commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "files": "of holes" if arguments.collection is None else "of a finished collection",
        "references": counts["references"], "nouns": counts["nouns"], "width": width,
        "gigabytes": sum(info["bytes"] for info in manifest["files"].values()) / 1e9,
    }  # fmt: skip
    report = {
        key: round(value, 4) if isinstance(value, float) else value for key, value in report.items()
    }
    path = HERE / "results" / f"open_{counts['references']}x{width}.json"
    path.write_text(json.dumps(report | times, indent=1) + "\n")
    print(path.read_text())


def _asked(folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--only", str(folder)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return {key: round(value, 4) for key, value in json.loads(output).items()}


def _cache_dropped() -> bool:
    """Whether files must be read from the disk from now on."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1")
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main()
