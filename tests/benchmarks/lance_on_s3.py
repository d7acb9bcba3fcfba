"""A published collection and Lance, about a million references each, read on an S3 server.

    npm install s3rver          (in any folder; its node_modules/.bin/s3rver is --server)
    python -m venv LANCE && LANCE/bin/pip install pylance numpy
    python tests/benchmarks/lance_on_s3.py --server .../s3rver --lance LANCE/bin/python \
        --collection FOLDER --queries visual_queries.npy --scratch SCRATCH [--partitions 3]

FOLDER is a partitioned collection such as reduce_partitioned.py leaves; its first --partitions make
one of their own, through hard links. Lance gets their visual embeddings and one index for each
--index (`IVF_PQ:48` is an index type and its sub-vectors), all of the same rows / 4096 centroids,
which the first trains. The cheapest `nprobes` and `refine_factor` of a grid that reach recall 0.95
of 150 neighbours, or ovref's own recall where that is lower, are found on the local folder. Then
either side is read where it lies, on s3rver behind a proxy that holds each request back for --delay
milliseconds: opening and ten regions, one at a time. At last 1% of the rows are deleted and 5%
appended, on the folder. Each step is a process of its own; CPU seconds are of all its threads.
Writes results/lance_on_s3.json after each step.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from lance_store import peak_mb, recall, size_mb, timed

HERE = Path(__file__).parent
K, TARGET, ASKED = 150, 0.95, 10
ROWS_A_CENTROID, ROWS_A_BATCH = 4096, 16_384
OPTIONS = {
    "aws_access_key_id": "S3RVER", "aws_secret_access_key": "S3RVER", "region": "us-east-1",
    "allow_http": "true", "aws_virtual_hosted_style_request": "false",
}  # fmt: skip


def matrices(scratch: Path) -> list[np.ndarray]:
    paths = sorted((scratch / "ours" / "partitions").glob("*/visual.f16.npy"))
    return [np.load(path, mmap_mode="r") for path in paths]


def batches(scratch: Path, first_id: int, limit: int | None = None) -> Any:
    """A reader of ids from `first_id` on and of the embeddings, at most `limit` of them."""
    import pyarrow as pa

    vectors = matrices(scratch)
    kind = pa.list_(pa.float16(), vectors[0].shape[1])
    schema = pa.schema([("id", pa.int64()), ("vector", kind)])
    left = sum(map(len, vectors)) if limit is None else limit

    def parts() -> Iterator[pa.RecordBatch]:
        taken = 0
        for matrix in vectors:
            for start in range(0, len(matrix), ROWS_A_BATCH):
                part = np.asarray(matrix[start : start + ROWS_A_BATCH])[: left - taken]
                flat = pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), type=kind)
                ids = pa.array(range(first_id + taken, first_id + taken + len(part)), pa.int64())
                taken += len(part)
                yield pa.record_batch([ids, flat], schema=schema)
                if taken == left:
                    return

    return pa.RecordBatchReader.from_batches(schema, parts())


def folder_of(scratch: Path, index: str) -> Path:
    return scratch / f"{index.replace(':', '_')}.lance"


def write(scratch: Path) -> dict[str, Any]:
    import lance

    found: dict[str, Any] = {"pylance": lance.__version__}
    with timed(found, "write"):
        lance.write_dataset(batches(scratch, 0), str(scratch / "vectors.lance"))
    return found | {"mb": size_mb(scratch / "vectors.lance"), "peak_mb": peak_mb()}


def build(scratch: Path, index: str) -> dict[str, Any]:
    import lance

    kind, _, subvectors = index.partition(":")
    folder, trained = folder_of(scratch, index), scratch / "centroids.npy"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(scratch / "vectors.lance", folder, copy_function=os.link)
    data = lance.dataset(str(folder))
    arguments: dict[str, Any] = {"num_partitions": data.count_rows() // ROWS_A_CENTROID}
    if trained.exists():
        arguments["ivf_centroids"] = np.load(trained)
    if subvectors:
        arguments["num_sub_vectors"] = int(subvectors)
    found: dict[str, Any] = {"given_centroids": trained.exists()} | {
        key: value for key, value in arguments.items() if key != "ivf_centroids"
    }
    with timed(found, "build"):
        data.create_index("vector", kind, metric="dot", name="nearest", **arguments)
    found |= {"peak_mb": peak_mb(), "mb": size_mb(folder)}
    if not trained.exists():
        statistics = data.stats.index_stats("nearest")
        np.save(trained, np.array(statistics["indices"][0]["centroids"], np.float16))
    return found


def nearest(data: Any, query: np.ndarray, nprobes: int, refine: int | None) -> np.ndarray:
    asked = {"column": "vector", "q": query.astype(np.float16), "k": K, "nprobes": nprobes}
    asked |= {"refine_factor": refine} if refine else {}
    return data.to_table(columns=["id", "_distance"], nearest=asked)["id"].to_numpy()


def tune(scratch: Path, index: str) -> dict[str, Any]:
    import lance

    data = lance.dataset(str(folder_of(scratch, index)))
    vectors = np.concatenate(matrices(scratch))
    queries, lowest = np.load(scratch / "queries.npy"), np.load(scratch / "lowest.npy")
    partitions = data.count_rows() // ROWS_A_CENTROID
    tried: list[dict[str, Any]] = []
    for refine in (None, 2, 8):
        before = -1.0
        for nprobes in sorted({min(4**i, partitions) for i in range(5)}):
            one: dict[str, Any] = {"nprobes": nprobes, "refine_factor": refine}
            with timed(one, "ask"):
                ids = [nearest(data, query, nprobes, refine) for query in queries]
            one["recall"] = round(recall(vectors, queries, ids, lowest), 4)
            tried.append(one)
            print(one, file=sys.stderr, flush=True)
            # More partitions at the same refinement cost more, and help no longer.
            if one["recall"] >= TARGET or one["recall"] < before + 0.002:
                break
            before = one["recall"]
    return {"tried": tried}


def asked(scratch: Path, opened: Callable[[], Any], ask: Callable[..., np.ndarray]) -> None:
    """Opens, and asks each query, printing a line of figures after each."""

    def say(name: str, work: Callable[[], Any]) -> Any:
        one: dict[str, Any] = {"step": name}
        with timed(one, "took"):
            result = work()
        if isinstance(result, np.ndarray):
            one["ids"] = result.tolist()
        print(json.dumps(one), flush=True)
        return result

    store = say("open", opened)
    for query in np.load(scratch / "queries.npy"):
        say("query", lambda query=query: ask(store, query))
    print(json.dumps({"step": "end", "peak_mb": peak_mb()}), flush=True)


def ask_lance(scratch: Path, endpoint: str, nprobes: int, refine: int | None) -> None:
    import lance

    options = OPTIONS | {"aws_endpoint": endpoint}
    asked(
        scratch,
        lambda: lance.dataset("s3://bucket/large", storage_options=options),
        lambda data, query: nearest(data, query, nprobes, refine),
    )


def ask_ours(scratch: Path, endpoint: str) -> None:
    import faiss  # noqa: F401 - loaded before the clock starts
    import s3fs  # noqa: F401

    from ovref_inference import ReferenceCollection

    cache = str(scratch / "cache")
    vectors = matrices(scratch)
    options = {"key": "S3RVER", "secret": "S3RVER", "endpoint_url": endpoint}
    asked(
        scratch,
        lambda: ReferenceCollection.open("s3://bucket/large", cache=cache, storage_options=options),
        lambda collection, query: rows_of(
            collection.search_regions(query[None], K).ids[0], vectors
        ),
    )


def change_lance(scratch: Path, index: str, nprobes: int, refine: int | None) -> dict[str, Any]:
    import lance

    folder = folder_of(scratch, index)
    data, found = lance.dataset(str(folder)), {}
    n, before = data.count_rows(), size_mb(folder)
    with timed(found, "delete"):
        data.delete(f"id < {n // 100}")
    found["delete_mb"] = round(size_mb(folder) - before, 3)
    with timed(found, "append"):
        data = lance.write_dataset(batches(scratch, n, n // 20), str(folder), mode="append")
    with timed(found, "index_appended"):
        data.optimize.optimize_indices()
    found["grown_mb"] = round(size_mb(folder) - before, 1)
    data = lance.dataset(str(folder))
    with timed(found, "ask"):
        ids = [nearest(data, q, nprobes, refine) for q in np.load(scratch / "queries.npy")]
    found["deleted_returned"] = int(sum((one < n // 100).sum() for one in ids))
    return found


def rows_of(ids: np.ndarray, matrices: list[np.ndarray]) -> np.ndarray:
    """Rows in all partitions' embeddings, one after the other, of references' ids."""
    from ovref_inference.collection.manifest import PARTITION_IDS

    firsts = np.cumsum([0, *map(len, matrices)])
    return firsts[ids // PARTITION_IDS] + ids % PARTITION_IDS


def search_ours(scratch: Path) -> dict[str, Any]:
    """Recall and CPU on the folder, by the collection's own curve."""
    from ovref_inference import ReferenceCollection

    collection, vectors = ReferenceCollection.open(str(scratch / "ours")), matrices(scratch)
    queries, lowest = np.load(scratch / "queries.npy"), np.load(scratch / "lowest.npy")
    found: dict[str, Any] = {}
    for _ in range(2):
        with timed(found, "ask"):
            ids = [collection.search_regions(query[None], K).ids[0] for query in queries]
    rows = [rows_of(one, vectors) for one in ids]
    return found | {"recall": round(recall(np.concatenate(vectors), queries, rows, lowest), 4)}


def change_ours(scratch: Path) -> dict[str, Any]:
    """Deletes on the folder; growing is measured by grow.py."""
    from ovref_inference import ReferenceCollection
    from ovref_inference.collection import store

    folder, found = scratch / "ours", {}
    n = store.read_manifest(str(folder)).counts["references"]
    with timed(found, "delete"):
        store.tombstone(str(folder), list(range(n // 100)), "measured")
    collection = ReferenceCollection.open(str(folder))
    with timed(found, "ask"):
        support = collection.search_regions(np.load(scratch / "queries.npy"), K)
    found["deleted_returned"] = int(((support.ids >= 0) & (support.ids < n // 100)).sum())
    return found


def take_partitions(collection: Path, folder: Path, count: int) -> None:
    """A partitioned collection of the first `count` partitions of `collection`."""
    from dataclasses import replace

    from ovref_inference.collection import store

    whole = store.read_manifest(str(collection))
    kept = whole.partitions[:count]
    for part in kept:
        (folder / part.path).mkdir(parents=True)
        for path in (collection / part.path).iterdir():
            # Deleting rewrites these two, which must not reach the collection they came from.
            changed = path.name in ("collection.json", "tombstones.parquet")
            (shutil.copy if changed else os.link)(path, folder / part.path / path.name)
    taken = replace(whole, partitions=kept, files={}, counts={})
    store.publish_partitioned(str(folder), taken, files={})


def on_s3(server: str, folder: Path, root: Path, delay_s: float, command: list[str]) -> list:
    """What `command`, given the server's address, said of each step; and requests and bytes."""
    from open_in_place import DelayingProxy, as_objects, served

    as_objects(folder, root)
    steps = []
    with served(server, root, 4577):
        proxy = DelayingProxy(4577, delay_s)
        command = [*command, f"http://127.0.0.1:{proxy.port}"]
        requests = sent = 0
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout or ():
                step = json.loads(line)
                step["requests"] = proxy.requests - requests
                step["megabytes"] = round((proxy.sent - sent) / 1e6, 3)
                requests, sent = proxy.requests, proxy.sent
                steps.append(step)
        if process.returncode:
            raise SystemExit("asking failed")
    shutil.rmtree(root)
    return steps


def summary(scratch: Path, steps: list[dict[str, Any]]) -> dict[str, Any]:
    vectors = np.concatenate(matrices(scratch))
    queries, lowest = np.load(scratch / "queries.npy"), np.load(scratch / "lowest.npy")
    ids = [np.array(step.pop("ids")) for step in steps if "ids" in step]
    keys = "took_s", "took_cpu_s", "requests", "megabytes"
    later = [step for step in steps if step["step"] == "query"][1:]
    return {
        "open": {key: steps[0][key] for key in keys},
        "first_query": {key: steps[1][key] for key in keys},
        "later_queries": {
            key: round(float(np.mean([step[key] for step in later])), 4) for key in keys
        },
        "peak_mb": steps[-1]["peak_mb"],
        "recall": round(recall(vectors, queries, ids, lowest), 4),
    }


def one_step(arguments: argparse.Namespace) -> None:
    scratch, (name, *given) = arguments.scratch, arguments.only
    numbers = lambda texts: [int(text) or None for text in texts]  # noqa: E731
    if name == "ask_lance":
        ask_lance(scratch, given[2], *numbers(given[:2]))
    elif name == "ask_ours":
        ask_ours(scratch, given[0])
    else:
        found = {
            "write": lambda: write(scratch),
            "build": lambda: build(scratch, given[0]),
            "tune": lambda: tune(scratch, given[0]),
            "change_lance": lambda: change_lance(scratch, given[0], *numbers(given[1:])),
            "search_ours": lambda: search_ours(scratch),
            "change_ours": lambda: change_ours(scratch),
        }[name]()
        print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--server", help="s3rver's program")
    parser.add_argument("--lance", help="Python of an environment with pylance")
    parser.add_argument("--collection", type=Path, help="a published, partitioned one")
    parser.add_argument("--queries", type=Path, help="regions that are not stored, (n, width)")
    parser.add_argument("--scratch", type=Path, required=True, help="on the collection's disk")
    parser.add_argument("--partitions", type=int, default=3)
    parser.add_argument("--index", nargs="+", default=["IVF_SQ", "IVF_PQ:48"])
    parser.add_argument("--delay", type=float, default=30.0, help="milliseconds a request")
    parser.add_argument("--only", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        one_step(arguments)
        return
    from machine import commit
    from ovref_inference.collection.index import exact_search

    scratch, results = arguments.scratch, HERE / "results" / "lance_on_s3.json"
    scratch.mkdir(parents=True, exist_ok=True)
    ours = scratch / "ours"
    if not ours.exists():
        take_partitions(arguments.collection, ours, arguments.partitions)
    vectors = matrices(scratch)
    if not (scratch / "lowest.npy").exists():
        queries = np.load(arguments.queries)[:ASKED].astype(np.float32)
        scores = [exact_search(matrix, queries, K)[0] for matrix in vectors]
        merged = -np.sort(-np.concatenate(scores, axis=1), axis=1)
        np.save(scratch / "queries.npy", queries)
        np.save(scratch / "lowest.npy", merged[:, K - 1])
    report: dict[str, Any] = {
        "date": date.today().isoformat(), "commit": commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores", "delay_ms": arguments.delay,
        "references": sum(map(len, vectors)), "width": vectors[0].shape[1], "k": K,
        "target": TARGET, "queries": ASKED,
        "visual_mb": round(sum(
            path.stat().st_size for name in ("visual.f16.npy", "visual.faiss")
            for path in (ours / "partitions").glob(f"*/{name}")) / 1e6, 1),
    }  # fmt: skip

    def command(python: str, name: str, *given: object) -> list[str]:
        return [python, __file__, "--scratch", str(scratch), "--only", name, *map(str, given)]

    def kept(name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What a step found, kept in the scratch folder: a run cut off goes on there."""
        path = scratch / f"{name.replace(':', '_')}.json"
        if not path.exists():
            path.write_text(json.dumps(work()))
        return json.loads(path.read_text())

    def step(python: str, name: str, *given: object) -> dict[str, Any]:
        arguments = command(python, name, *given)
        return kept("_".join(map(str, (name, *given))), lambda: json.loads(
            subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=True).stdout
        ))  # fmt: skip

    def on_server(folder: Path, asking: list[str]) -> dict[str, Any]:
        delay_s, root = arguments.delay / 1000, scratch / "s3"
        return kept(f"{folder.name}_on_s3", lambda: summary(
            scratch, on_s3(arguments.server, folder, root, delay_s, asking)
        ))  # fmt: skip

    def save() -> None:
        results.write_text(json.dumps(report, indent=1) + "\n")

    report["ours"] = {"s3": on_server(ours, command(sys.executable, "ask_ours"))}
    report["ours"]["folder"] = step(sys.executable, "search_ours")
    report["ours"]["changed"] = step(sys.executable, "change_ours")
    save()
    report["write"] = step(arguments.lance, "write")
    for index in arguments.index:
        found = report[index] = {"build": step(arguments.lance, "build", index)}
        save()
        found |= step(arguments.lance, "tune", index)
        save()
        target = min(TARGET, report["ours"]["folder"]["recall"])
        reached = [one for one in found["tried"] if one["recall"] >= target]
        best = min(reached, key=lambda one: one["ask_cpu_s"]) if reached else found["tried"][-1]
        found |= {"reached": bool(reached), "settings": best}
        settings = best["nprobes"], best["refine_factor"] or 0
        asking = command(arguments.lance, "ask_lance", *settings)
        found["s3"] = on_server(folder_of(scratch, index), asking)
        save()
        found["changed"] = step(arguments.lance, "change_lance", index, *settings)
        save()
    print(results.read_text())


if __name__ == "__main__":
    main()
