"""What opening a large collection on an S3 server costs where nothing is copied.

    npm install s3rver          (in any folder; its node_modules/.bin/s3rver is --server)
    python tests/benchmarks/open_in_place.py --server .../s3rver [--references 1000000] \
        [--partitions 8]
    python tests/benchmarks/open_in_place.py --server .../s3rver --collection FOLDER

The first makes a collection of the sizes of a real one as open_million.py does (matrices and
inverted lists are holes); the second takes a published one, such as reduce_partitioned.py leaves.
Serves it by s3rver, an S3 server that serves ranges from disk, behind a proxy that holds each
request back for --delay milliseconds, and asks it in a process of its own: opening, prototypes of
171 nouns that have references enough from an empty cache and from a full one, the nearest
references of eight regions, and prototypes of 171 nouns of any kind, some of them rare. Writes
results/open_in_place_<references>x<width>.json, `_<n>_partitions` where the references are divided,
`_real` of a published collection.
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from machine import commit, resident_mb

os.environ |= {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}

import numpy as np

from open_million import make

HERE = Path(__file__).parent
CLASSES, REPEATS = 171, 5
OPTIONS = {"key": "S3RVER", "secret": "S3RVER"}


class DelayingProxy:
    """Passes connections on, holding each request back; counts the server's bytes."""

    def __init__(self, port: int, delay_s: float) -> None:
        self.target, self.delay_s, self.sent, self.requests = port, delay_s, 0, 0
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()
        self._ready.wait()

    def _run(self) -> None:
        async def serve() -> None:
            server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
            self.port = server.sockets[0].getsockname()[1]
            self._ready.set()

        self._loop.run_until_complete(serve())
        self._loop.run_forever()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.target)

            async def requests() -> None:
                while data := await reader.read(1 << 16):
                    if data.startswith((b"GET ", b"HEAD ", b"PUT ", b"POST ", b"DELETE ")):
                        self.requests += 1
                        await asyncio.sleep(self.delay_s)
                    up_writer.write(data)
                up_writer.close()

            async def answers() -> None:
                while data := await up_reader.read(1 << 18):
                    self.sent += len(data)
                    writer.write(data)
                    await writer.drain()
                writer.close()

            await asyncio.gather(requests(), answers())


@contextlib.contextmanager
def served(server: str, root: Path, port: int) -> Iterator[None]:
    """s3rver over `root`, in which each object is a file `<key>._S3rver_object`."""
    process = subprocess.Popen(
        [
            server,
            "--directory",
            str(root),
            "--address",
            "127.0.0.1",
            "--port",
            str(port),
            "--no-vhost-buckets",
            "--configure-bucket",
            "bucket",
        ],
        stdout=subprocess.DEVNULL,
    )
    try:
        time.sleep(3)
        yield
    finally:
        process.terminate()
        process.wait()


def as_objects(folder: Path, root: Path) -> None:
    """Links the files of `folder` to where s3rver looks for s3://bucket/large/."""
    for path in filter(Path.is_file, list(folder.rglob("*"))):
        target = root / "bucket" / "large" / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(path, target.with_name(f"{path.name}._S3rver_object"))
        metadata = {"content-type": "binary/octet-stream"}
        target.with_name(f"{path.name}._S3rver_metadata.json").write_text(json.dumps(metadata))
        target.with_name(f"{path.name}._S3rver_object.md5").write_text("0" * 32)


def make_partitioned(folder: Path, count: int, references: int, nouns: int, width: int) -> None:
    """A collection of `count` partitions, with equally many references and nouns each; nouns that
    follow one another are in different partitions."""
    from ovref_inference.collection import format as fmt
    from ovref_inference.collection import store

    infos = []
    for number in range(count):
        path = f"partitions/{number:05d}"
        (folder / path).mkdir(parents=True)
        make(folder / path, references // count, nouns // count, width,
             first=number, step=count)  # fmt: skip
        part = store.read_manifest(str(folder / path))
        infos.append(fmt.PartitionInfo(
            path=path, fingerprint=part.fingerprint, references=references // count,
            nouns=nouns // count,
        ))  # fmt: skip
    heading = {name: getattr(part, name) for name in fmt.Heading.__dataclass_fields__}
    whole = fmt.PartitionedManifest(**heading | {"partitions": tuple(infos)})
    store.publish_partitioned(str(folder), whole, files={})


def ask(endpoint: str, cache: str) -> None:
    """Prints seconds, and the megabytes of this process beside its imports, a line each."""
    import faiss  # noqa: F401 - loaded before the clock starts
    import s3fs  # noqa: F401

    from ovref_inference import ReferenceCollection

    def say(name: str, value: float) -> None:
        print(json.dumps([name, value]), flush=True)

    def opened() -> ReferenceCollection:
        options = OPTIONS | {"endpoint_url": endpoint}
        return ReferenceCollection.open("s3://bucket/large", cache=cache, storage_options=options)

    def cold(name: str, work: Callable[[], Any]) -> Any:
        began, began_cpu = time.perf_counter(), time.process_time()
        result = work()
        spent, spent_cpu = time.perf_counter() - began, time.process_time() - began_cpu
        say(f"{name}_cold_s", spent)
        say(f"{name}_cold_cpu_s", spent_cpu)
        return result

    def warm(name: str, work: Callable[[], Any]) -> None:
        times = []
        for _ in range(REPEATS):
            began, began_cpu = time.perf_counter(), time.process_time()
            work()
            times.append((time.perf_counter() - began, time.process_time() - began_cpu))
        for kind, values in zip(("s", "cpu_s"), zip(*times, strict=True), strict=True):
            say(f"{name}_warm_{kind}", min(values))

    say("imports_mb", resident_mb())
    collection = cold("open", opened)
    say("resident_open_mb", resident_mb())
    rng = np.random.default_rng(0)
    rows = rng.permutation(len(collection.nouns))
    enough = collection.noun_counts[rows] >= collection.prototype_config.needed
    names = [[collection.nouns[i] for i in some[:CLASSES]] for some in (rows[enough], rows)]
    for step in (cold, warm):
        step(f"prototypes_of_{CLASSES}", lambda: collection.prototypes(names[0]))
    say("resident_prototypes_mb", resident_mb())
    warm("open", lambda: opened().close())
    queries = rng.standard_normal((8, collection.manifest.visual.dim)).astype(np.float32)
    for k in (10, 150):
        search = partial(collection.search_regions, queries, k)
        cold(f"search_8_k{k}", search)
        warm(f"search_8_k{k}", search)
    say("resident_search_mb", resident_mb())
    if not enough.all():
        for step in (cold, warm):
            step(f"any_{CLASSES}", lambda: collection.prototypes(names[1]))
        say("rare_of_these", int((~enough[:CLASSES]).sum()))
        say("resident_rare_mb", resident_mb())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--server", required=True, help="s3rver's program")
    parser.add_argument("--references", type=int, default=1_000_000)
    parser.add_argument("--nouns", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--partitions", type=int, default=1)
    parser.add_argument("--delay", type=float, default=30.0, help="milliseconds a request")
    parser.add_argument("--scratch", type=Path, help="folder for the files of holes")
    parser.add_argument("--collection", type=Path, help="a published one, on the same disk")
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        ask(*arguments.only)
        return
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        folder, root = arguments.collection or Path(scratch, "collection"), Path(scratch, "s3")
        if arguments.collection is None:
            folder.mkdir()
            sizes = arguments.references, arguments.nouns, arguments.width
            if arguments.partitions > 1:
                make_partitioned(folder, arguments.partitions, *sizes)
            else:
                make(folder, *sizes)
        manifest = json.loads((folder / "collection.json").read_text())
        held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        as_objects(folder, root)
        found: dict[str, float] = {}
        with served(arguments.server, root, 4571):
            proxy = DelayingProxy(4571, arguments.delay / 1000)
            command = [
                sys.executable, __file__, "--server", "", "--only",
                f"http://127.0.0.1:{proxy.port}", str(Path(scratch, "cache")),
            ]  # fmt: skip
            sent = requests = 0
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                for line in process.stdout:
                    name, value = json.loads(line)
                    found[name] = value
                    if name.endswith("cold_s"):
                        found[f"{name[:-2]}_requests"] = proxy.requests - requests
                        found[f"{name[:-2]}_megabytes"] = (proxy.sent - sent) / 1e6
                    sent, requests = proxy.sent, proxy.requests
            if process.returncode:
                raise SystemExit("asking failed")
    references, partitions = manifest["counts"]["references"], len(manifest.get("partitions", [0]))
    report = {
        "date": date.today().isoformat(), "commit": commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "references": references, "nouns": manifest["counts"]["nouns"],
        "width": manifest["visual"]["dim"], "partitions": partitions,
        "delay_ms": arguments.delay, "gigabytes": held / 1e9, **found,
        "megabytes_sent": proxy.sent / 1e6, "requests": proxy.requests,
    }  # fmt: skip
    report = {
        key: round(value, 4) if isinstance(value, float) else value for key, value in report.items()
    }
    name = f"open_in_place_{references}x{report['width']}"
    name += f"_{partitions}_partitions" if partitions > 1 else ""
    name += "_real" if arguments.collection else ""
    path = HERE / "results" / f"{name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
