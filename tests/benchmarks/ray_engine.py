"""What the engine on Ray costs: against the engine in one process, and with 64 workers.

    python tests/benchmarks/ray_engine.py overhead --captions annotations/captions_val2017.json
    python tests/benchmarks/ray_engine.py workers [--workers 64] [--rounds 8]

`overhead`: the same step over the same shards, by turns with `engine=local` and with `engine=ray
workers=1`, each time in fresh processes and an empty folder. Steps are the miniature's: `prompts`
(nouns of COCO's captions), `images`, `references`. Three times are separated: until the first
worker has its models (starting Ray and the actor, imports, weights), over the shards (from then to
the last commit), and the whole call. The goal is about the second, since real jobs run for days.

`workers`: as many actors as on a cluster with a GPU each, on this machine, with a stage that sleeps
where a GPU would draw and then hands over small images and heatmaps to be encoded, written and
committed. What is simulated is known exactly: the sum of all sleeps. Efficiency is the part of it
that falls into a span of time, over workers x span. The *steady* span begins when all workers are
ready and ends when the last shard is handed out; what comes after is the tail, in which workers run
out of shards, which is reported separately. Every shard's work, and so its end, follows from its
keys.

Each run is added to a list in the file given by `--output`.
"""

import argparse
import hashlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from machine import commit
from ovref.config import load
from ovref.corpora import CorpusSpec, read_captions
from ovref.identity import record_key, spec_identity
from ovref.ingest import ingest
from ovref.records import YES, ImageRecord, Noun, Prompt, Region
from ovref.storage.file_store import Store
from ovref.storage.steps import StepFolder, existing_step, open_step
from ovref_pipelines.engine.config import EngineConfig
from ovref_pipelines.engine.progress import Progress
from ovref_pipelines.engine.run_steps import ray_left_as_found, run_step
from ovref_pipelines.recipe import BuildConfig

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
STEPS = ("prompts", "images", "references")
BATCH, BATCH_SECONDS = 8, (1.0, 3.0)
"""Images that the simulated GPU draws at once, and between how many seconds that takes: about 0.25
s an image, which is faster than Stable Diffusion on any GPU, and so harder for the engine."""
SIZE, MAP = 64, 16
"""Pixels of a simulated image and of its heatmaps: small, for the cores of this one machine have to
encode for all workers (131 ms of CPU a shard with 512 pixels, 23 ms with these)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    overhead = commands.add_parser("overhead")
    overhead.add_argument("--captions", required=True, help="COCO's captions, for `prompts`")
    overhead.add_argument("--turns", type=int, default=3)
    overhead.add_argument("--steps", nargs="*", choices=STEPS, default=STEPS)
    overhead.add_argument("--limits", type=int, nargs=2, default=(16000, 384), metavar="N",
                          help="captions for `prompts`, and for the other two")  # fmt: skip
    overhead.add_argument("--shard-size", type=int, nargs=2, default=(64, 32))
    overhead.add_argument("--generation-steps", type=int, default=6)
    workers = commands.add_parser("workers")
    workers.add_argument("--workers", type=int, default=64)
    workers.add_argument("--rounds", type=int, default=8, help="shards for each worker")
    workers.add_argument("--shard-size", type=int, default=64)
    for command in (overhead, workers):
        command.add_argument("--output", type=Path)
    arm = commands.add_parser("arm")
    arm.add_argument("folder")
    arm.add_argument("step", choices=STEPS)
    arm.add_argument("engine", choices=("local", "ray"))
    arm.add_argument("generation_steps", type=int)
    arm.add_argument("--name", help="of the output; without, the next step can read it")
    options = parser.parse_args()
    # Before a library of numbers starts its threads; workers inherit both.
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    found = [str(HERE), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, found))
    if options.command == "arm":
        print(json.dumps(run_arm(options)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        result = {"overhead": measure_overhead, "workers": measure_workers}[options.command](
            options, Path(scratch)
        )
    result["commit"] = commit()
    print(json.dumps(result, indent=1))
    if options.output:
        runs = json.loads(options.output.read_text()) if options.output.exists() else {}
        runs.setdefault(options.command, []).append(result)
        options.output.write_text(json.dumps(runs, indent=1) + "\n")


class Clock(Progress):
    """Prints nothing and notes when the engine says that something happened."""

    def __init__(self, step: str) -> None:
        super().__init__(step, stream=io.StringIO(), every_seconds=1e9)
        self.began = time.monotonic()
        self.ready_at: list[tuple[int, float]] = []
        """How many workers had their models for the first time, and when."""
        self.finished_at: list[float] = []
        self.handed_out_at: float | None = None
        self._working_calls = 0

    def working(self, workers: int) -> None:
        super().working(workers)
        self._working_calls += 1
        if self._working_calls == 1:
            self.first_ready = time.monotonic()

    def finished(self, shard: str, inputs: int, dropped: dict[str, int], outputs: int = 0) -> None:
        super().finished(shard, inputs, dropped, outputs)
        self.finished_at.append(time.monotonic())

    def update_state(self, shards_waiting: int, workers: int) -> None:
        super().update_state(shards_waiting, workers)
        now = time.monotonic()
        if workers > (self.ready_at[-1][0] if self.ready_at else 0):
            self.ready_at.append((workers, now))
        if shards_waiting == 0 and self.handed_out_at is None:
            self.handed_out_at = now


# -- overhead ----------------------------------------------------------------------------------


def measure_overhead(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    nouns, generated = options.limits
    sizes = dict(zip(("nouns", "generated"), options.shard_size, strict=True))
    coco = CorpusSpec(path=options.captions, limit=nouns)
    make_captions(Store.open(str(scratch)), "captions", coco, sizes["nouns"])
    own = CorpusSpec(path=str(ROOT / "configs" / "miniature_captions.txt"), limit=generated)
    make_captions(Store.open(str(scratch / "generated")), "captions", own, sizes["generated"])
    steps = options.generation_steps
    # What the measured steps read, made once.
    for step in STEPS[: STEPS.index(max(options.steps, key=STEPS.index))]:
        call_arm(scratch / "generated", step, "local", steps)
    result = {
        "generation_steps": steps,
        "captions": {"prompts": nouns, "images and references": generated},
        "shard_size": {"prompts": sizes["nouns"], "images and references": sizes["generated"]},
        "steps": {},
    }
    for step in options.steps:
        runs: dict[str, list[dict[str, Any]]] = {"local": [], "ray": []}
        for turn in range(options.turns):
            for engine in ("local", "ray") if turn % 2 == 0 else ("ray", "local"):
                folder = scratch if step == "prompts" else scratch / "generated"
                runs[engine].append(call_arm(folder, step, engine, steps, f"{engine}{turn}"))
                print(step, engine, runs[engine][-1], flush=True)
        over = {name: [run["shards_s"] for run in runs[name]] for name in runs}
        result["steps"][step] = {
            "shards": runs["local"][0]["shards"],
            "ratios": [round(b / a, 4) for a, b in zip(over["local"], over["ray"], strict=True)],
            "ratio_of_medians": round(
                statistics.median(over["ray"]) / statistics.median(over["local"]), 4
            ),
            **runs,
        }
    return result


def call_arm(
    folder: Path, step: str, engine: str, generation_steps: int, name: str | None = None
) -> dict[str, Any]:
    """One run in a process of its own."""
    call = [sys.executable, __file__, "arm", str(folder), step, engine, str(generation_steps)]
    if name is not None:
        call += ["--name", name]
    done = subprocess.run(call, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def run_arm(options: argparse.Namespace) -> dict[str, Any]:
    step, engine, name = options.step, options.engine, options.name
    overrides = [
        f"output={options.folder}", f"synthesize.steps={options.generation_steps}",
        f"corpus.path={ROOT}/configs/miniature_captions.txt",
    ]  # fmt: skip
    config = load(BuildConfig, ROOT / "configs" / "miniature.yaml", overrides)
    spec = {
        "prompts": config.extract_nouns, "images": config.synthesize, "references": config.embed
    }[step]  # fmt: skip
    store = Store.open(options.folder)
    before = ("captions", *STEPS)[STEPS.index(step)]
    source = existing_step(store, before)
    where = store.child(f"{step}_{name}") if name else store
    identity = {"stages": [spec_identity(spec)]}
    target = open_step(where, step, identity, [source.fingerprint])
    clock = Clock(step)
    with ray_left_as_found():
        summary = run_step([spec], source, target, EngineConfig(engine=engine), clock)
        ended = time.monotonic()
    return {
        "shards": summary.committed_now,
        "records": summary.inputs,
        "start_s": round(clock.first_ready - clock.began, 3),
        "shards_s": round(clock.finished_at[-1] - clock.first_ready, 3),
        "whole_s": round(ended - clock.began, 3),
        "in_shards_s": summary.work_seconds,
        "ends_s": [round(at - clock.first_ready, 2) for at in clock.finished_at],
    }


def make_captions(store: Store, name: str, corpus: CorpusSpec, shard_size: int) -> StepFolder:
    """A complete step of captions."""
    step = open_step(store, name, {"corpus": Path(corpus.path).name, "shard_size": shard_size})
    ingest(read_captions(corpus), step, shard_size)
    return step


# -- many workers ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sleeping:
    """Prompts in batches; each takes as long as its first key says."""

    name: ClassVar[str] = "sleeping"
    version: ClassVar[int] = 1

    def build(self) -> "SleepingStage":
        return SleepingStage()


class SleepingStage:
    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        small = Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8))
        buffer = io.BytesIO()
        small.resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        self._image = buffer.getvalue()
        self._mask_hw = np.zeros((SIZE, SIZE), np.uint8)
        self._mask_hw[100:300, 200:400] = YES
        self._heatmaps_nhw = rng.random((1, MAP, MAP)).astype(np.float16)

    def __call__(self, prompts: Iterator[Prompt]) -> Iterator[ImageRecord]:
        batch: list[Prompt] = []
        for prompt in prompts:
            batch.append(prompt)
            if len(batch) == BATCH:
                yield from self._draw(batch)
                batch = []
        if batch:
            yield from self._draw(batch)

    def _draw(self, batch: list[Prompt]) -> Iterator[ImageRecord]:
        time.sleep(batch_seconds(batch[0].key))
        for prompt in batch:
            region = Region(
                noun=prompt.nouns[0], mask_hw=self._mask_hw, score=1.0, source="simulated"
            )
            yield ImageRecord(
                key=prompt.key, caption=prompt.caption, source=prompt.source, seed=0,
                image=self._image, regions=(region,), heatmaps_nhw=self._heatmaps_nhw,
            )  # fmt: skip


def batch_seconds(key: str) -> float:
    """Uniform over `BATCH_SECONDS`, by the key."""
    part = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") / 2**32
    return BATCH_SECONDS[0] + part * (BATCH_SECONDS[1] - BATCH_SECONDS[0])


def measure_workers(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    # By its name in the workers' path, for they cannot import what is `__main__` here.
    from ray_engine import Sleeping as ImportedSleeping

    store, workers = Store.open(str(scratch)), options.workers
    source = open_step(store, "prompts", {"simulated": options.shard_size})
    names = [f"{n:06d}" for n in range(workers * options.rounds)]
    work: dict[str, float] = {}
    for name in names:
        prompts = [simulated_prompt(f"{name} {n}") for n in range(options.shard_size)]
        source.commit(name, prompts, inputs=len(prompts))
        work[name] = sum(batch_seconds(prompt.key) for prompt in prompts[::BATCH])
    source.finish(names)
    spec = ImportedSleeping()
    identity = {"stages": [spec_identity(spec)]}
    target = open_step(store, "images", identity, [source.fingerprint])
    clock, config = Clock("images"), EngineConfig(workers=workers)
    with ray_left_as_found():
        cpu_before = time.process_time()
        summary = run_step([spec], source, target, config, clock)
        driver_cpu_s = time.process_time() - cpu_before
    commits = target.commits()
    ended = when_ended(target, clock)
    all_ready = next(at for count, at in clock.ready_at if count == workers)
    spans = {
        "steady": (all_ready, clock.handed_out_at),
        "from_all_ready_to_the_end": (all_ready, clock.finished_at[-1]),
    }
    efficiency = {}
    for name, (begin, end) in spans.items():
        done = 0.0
        for shard, seconds in work.items():
            last, whole = ended[shard], commits[shard].seconds
            inside = max(0.0, min(last, end) - max(last - whole, begin))
            done += seconds * inside / whole
        efficiency[name] = {
            "seconds": round(end - begin, 2),
            "simulated_seconds": round(done, 1),
            "efficiency": round(done / (workers * (end - begin)), 4),
        }
    size_bytes = sum(file.size for commit in commits.values() for file in commit.files.values())
    in_shards = sum(commit.seconds for commit in commits.values())
    return {
        "workers": workers,
        "shards": len(names),
        "records": summary.inputs,
        "records_a_shard": options.shard_size,
        "megabytes_written": round(size_bytes / 1e6),
        "simulated_seconds_a_shard": round(statistics.mean(work.values()), 2),
        **efficiency,
        "whole_seconds": round(clock.finished_at[-1] - clock.began, 2),
        "first_worker_ready_s": round(clock.first_ready - clock.began, 2),
        "all_workers_ready_s": round(all_ready - clock.began, 2),
        "work_over_time_in_shards": round(sum(work.values()) / in_shards, 4),
        "driver_cpu_ms_a_shard": round(1000 * driver_cpu_s / len(names), 2),
        "trouble": summary.trouble,
    }  # fmt: skip


def when_ended(target: StepFolder, clock: Clock) -> dict[str, float]:
    """When each shard was committed, on the clock of `time.monotonic`: by its marker's file."""
    folder = Path(target.store.url.removeprefix("file://"))
    shift = time.monotonic() - time.time()
    markers = (folder / "_commits").glob("*.json")
    return {marker.stem: marker.stat().st_mtime + shift for marker in markers}


def simulated_prompt(text: str) -> Prompt:
    key = record_key("simulated", text)
    noun = Noun(text="cup", start=2, end=5)
    return Prompt(key=key, caption=f"a cup {text}", source="simulated", nouns=(noun,))


if __name__ == "__main__":
    main()
