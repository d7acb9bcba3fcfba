"""Estimates the rest of a build by sending a few records through the real stages.

For a step that has started, its committed shards replace the probe. Nothing is written to the
output.
"""

import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from math import ceil
from typing import Any

from ovref.contract import Dropped, Spec
from ovref.devices import cuda
from ovref.ingest import first_of_each_key, no_usable_caption
from ovref.labelled_corpora import read_corpus
from ovref.records import Caption, Reference
from ovref.reduce.cost import work_of
from ovref.storage.shards import ShardFiles
from ovref.storage.steps import StepFolder
from ovref_inference.collection.index import EXACT_BELOW
from ovref_inference.collection.retrieve import class_embeddings
from ovref_pipelines.build_config import BuildConfig, output_of
from ovref_pipelines.engine.progress import duration
from ovref_pipelines.engine.run_steps import limit_threads
from ovref_pipelines.folders import open_steps
from ovref_pipelines.output import COLLECTION
from ovref_pipelines.recipe import texts_of

CPU = "this machine's CPU"
ROW_BYTES = 150
"""Approximate size of a reference in references.parquet."""
MANIFEST_BYTES = 14_000
"""Approximate size of collection.json."""
NOUNS_PROBED = 8
VOCABULARY_GROWTH = 0.6
"""Exponent of Heaps' law: a sample of references r times as large has r to this power times as many
nouns; measured on COCO's captions from 865 references (388 nouns) to 55,240 (4,840)."""


@dataclass(frozen=True, kw_only=True)
class StepEstimate:
    """Estimate of one step."""

    step: str
    records: float
    """Records that it reads in total."""
    done: int = 0
    """Records in committed shards."""
    seconds: float = 0.0
    """Seconds of one worker for the missing records, without loading models."""
    alone_seconds: float = 0.0
    """Seconds of the driver on top of that, while workers wait."""
    load_seconds: float = 0.0
    """Seconds that each worker takes to load its models; 0 if not probed."""
    stored: float = 0.0
    """Bytes of the missing files."""
    source: str
    """Source of the figures: `probe`, `shards`, `corpus` (read once), or for the collection
    `published` (it exists) or `arithmetic`."""
    gpus: float = 0.0
    """GPUs of each worker."""
    requests: float = 0.0
    """To the object store, of a reduction in partitions."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Estimate of a build."""

    steps: tuple[StepEstimate, ...]
    """The last one is the collection, its records references."""
    workers: int
    probed: int
    """Captions sampled for the probe."""
    device: str
    """Where it ran."""
    price: float | None
    """Price of a GPU-hour, or of a worker-hour if workers have no GPU."""

    def hours(self, step: StepEstimate) -> float:
        """GPU-hours, or worker-hours if workers have no GPU."""
        loads = self.workers * step.load_seconds if step.seconds else 0.0
        return (step.seconds + step.alone_seconds + loads) * (step.gpus or 1.0) / 3600

    def elapsed(self, step: StepEstimate) -> float:
        """Seconds on all workers together."""
        loads = step.load_seconds if step.seconds else 0.0
        return loads + step.alone_seconds + step.seconds / self.workers


def estimate(config: BuildConfig, probe: int, price: float | None = None) -> Estimate:
    """Probes `probe` random captions with the models of the build, in this process.

    Reads the whole corpus once, to count it. The first batch of a stage is not counted if there is
    another, because it loads libraries and allocates memory. The step that selects prompts is not
    probed: without its shards, all prompts are assumed to be kept.

    Args:
        probe: at least 1; reliable from two batches on.
        price: see `Estimate.price`.

    Raises:
        OvrefError: as a build.
    """
    if probe < 1:
        raise ValueError(f"probe must be at least 1, found {probe}")
    limit_threads(config.engine.threads)
    folders = open_steps(config)
    first, sample = _captions(config, folders.captions, probe)
    records: list[Any] = list(sample)
    steps, flow = [first], first.records
    for folder, spec, batch, gpus in (
        (folders.prompts, config.extract_nouns, probe, 0.0),
        (folders.selected, None, 0, 0.0),
        (folders.images, config.make_images, None, config.engine.gpus_per_worker),
        (folders.references, config.embed, config.embed.batch_size, config.engine.gpus_per_worker),
    ):
        if folder is None:
            continue
        if batch is None:
            batch = getattr(spec, "batch_size", 1)
        step, records, ratio = _step(folder, spec, records, flow, probe, batch, gpus)
        steps.append(step)
        flow *= ratio
    ready = all(step.done >= step.records for step in steps)
    shards = ceil(first.records / config.shard_size)
    steps.append(_collection(config, records, flow, shards, ready))
    return Estimate(
        steps=tuple(steps),
        workers=config.engine.workers,
        probed=len(sample),
        device=_device(),
        price=price,
    )


def text(found: Estimate) -> str:
    """One line per step, and totals, for people."""
    priced = "GPU-hours" if any(step.gpus for step in found.steps) else "worker-hours"
    lines = [
        f"estimate from {found.probed} captions on {found.device}, "
        f"for {found.workers} worker{'s' * (found.workers > 1)}:"
    ]
    if found.device == CPU and any(step.gpus for step in found.steps):
        lines.append(
            "  workers have GPUs but this machine has none: the probe ran on its CPU, so times are "
            "far too long; repeat the dry run on a machine with the same GPU"
        )
    for step in found.steps:
        left = f"{step.records - step.done:.0f} of {step.records:.0f} records missing"
        lines.append(
            f"  {step.step}: {left}, {duration(found.elapsed(step))}, "
            f"{found.hours(step):.3g} {'GPU' if step.gpus else 'worker'}-hours, "
            f"{_size(step.stored)} ({step.source}){_requests(step)}{_cost(found, [step])}"
        )
    if (last := found.steps[-2]).records == 0:
        lines.append(
            f"  NOTHING came out of the step before {last.step} for the captions of this probe: "
            "look at them, or probe more"
        )
    total = sum(found.elapsed(step) for step in found.steps)
    hours = sum(found.hours(step) for step in found.steps if bool(step.gpus) == ("GPU" in priced))
    stored = sum(step.stored for step in found.steps)
    lines.append(
        f"  total {duration(total)}, {hours:.3g} {priced}, {_size(stored)}"
        f"{_cost(found, found.steps)}"
    )
    return "\n".join(lines)


def _captions(
    config: BuildConfig, folder: StepFolder, probe: int
) -> tuple[StepEstimate, list[Caption]]:
    """The step `captions`, and the captions to probe."""
    images = config.uses_images
    rng = random.Random(0)
    sample: list[Caption] = []
    dropped: Counter[str] = Counter()
    count, started = 0, time.monotonic()
    shards = folder.complete()
    if shards is None:
        found: Iterator[Any] = first_of_each_key(read_corpus(config.corpus, images=images))
    else:
        found = chain.from_iterable(folder.read(shard) for shard in shards)
    for caption in found:
        if isinstance(caption, Dropped):
            dropped[caption.reason] += 1
            continue
        count += 1
        place = len(sample) if len(sample) < probe else rng.randrange(count)
        if len(sample) < probe:
            sample.append(caption)
        elif place < probe:
            sample[place] = caption
    if not count:
        raise no_usable_caption(dict(dropped))
    step = StepEstimate(step=folder.name, records=count, done=count, source="corpus")
    if shards is None:
        seconds, stored = time.monotonic() - started, _stored(sample) / len(sample) * count
        step = replace(step, done=0, alone_seconds=seconds, stored=stored)
    return step, sample


def _step(
    folder: StepFolder,
    spec: Spec | None,
    records: list[Any],
    flow: float,
    probe: int,
    batch: int,
    gpus: float,
) -> tuple[StepEstimate, list[Any], float]:
    """The estimate of a step, some of its records, and the records it makes from one.

    Args:
        spec: of its stage; None where it is not probed.
        flow: the records that it will read in all.
        batch: of the stage.
    """
    commits = list(folder.commits().values())
    done = sum(commit.inputs for commit in commits)
    load_seconds = 0.0
    if commits:
        source, taken = "shards", max(1, done)
        made = sum(commit.outputs for commit in commits)
        seconds = sum(commit.seconds for commit in commits) / taken
        stored = sum(f.size for commit in commits for f in commit.files.values()) / taken
        some = chain.from_iterable(folder.read(commit.shard) for commit in commits)
        outputs = list(islice(some, probe))
        ratio = made / taken
    elif spec is None:
        step = StepEstimate(step=folder.name, records=flow, source="not probed")
        return step, records, 1.0
    else:
        source, taken = "probe", max(1, len(records))
        started = time.monotonic()
        stage = spec.build()
        load_seconds = time.monotonic() - started
        # The setting may have been `auto`; the stage has the resolved value.
        outputs, seconds = _timed(stage, records, getattr(stage, "batch_size", batch))
        stored = _stored(outputs) / taken
        ratio = len(outputs) / taken
    missing = max(0.0, flow - done)
    step = StepEstimate(
        step=folder.name,
        records=flow,
        done=done,
        seconds=seconds * missing,
        load_seconds=load_seconds,
        stored=stored * missing,
        source=source,
        gpus=gpus,
    )
    return step, outputs, ratio


def _collection(
    config: BuildConfig, references: list[Reference], flow: float, shards: float, ready: bool
) -> StepEstimate:
    """The estimate of the reduction; only the encoding of nouns is probed.

    Args:
        references: some of them; flow: their number in all.
        shards: of all of them.
        ready: whether all of them are there.
    """
    there = ready and output_of(config).is_published
    seconds = alone = stored = requests = 0.0
    if references and not there:
        visual, textual = len(references[0].visual), len(references[0].textual)
        numbers = visual + textual
        names = sorted({reference.noun.text for reference in references})
        nouns = len(names) * max(1.0, flow / len(references)) ** VOCABULARY_GROWTH
        most = config.reduce.partition_references
        work = work_of(
            references=flow, nouns=nouns, shards=shards, visual=visual, textual=textual,
            noun_seconds=_seconds_a_noun(config, names), most=most,
        )  # fmt: skip
        seconds, alone, requests = work.worker_seconds, work.driver_seconds, work.requests
        together = flow if most is None else min(flow, most)  # references of an index
        saved = 0
        if config.reduce.embeddings == "int8":  # matrices, and inverted lists of the visual index
            saved = numbers + (visual if together >= EXACT_BELOW else 0)
        if config.reduce.textual_embeddings == "in_index":
            saved += textual if config.reduce.embeddings == "int8" else 2 * textual
        stored = MANIFEST_BYTES + flow * (4 * numbers - saved + ROW_BYTES)
        # Prototypes in float16, a noun's embedding in float32.
        stored += nouns * (2 * config.reduce.prototypes.k * visual + 4 * textual)
        stored += work.list_index_bytes
    return StepEstimate(
        step=COLLECTION, records=flow, done=round(flow) if there else 0, seconds=seconds,
        alone_seconds=alone, stored=stored, requests=requests,
        source="published" if there else "arithmetic",
    )  # fmt: skip


def _seconds_a_noun(config: BuildConfig, names: list[str]) -> float:
    """Seconds to encode a noun as the reduction does; the first noun loads the model."""
    texts = texts_of(config)
    class_embeddings(texts, names[:1], config.embed.templates)
    again = (names * NOUNS_PROBED)[:NOUNS_PROBED]
    started = time.monotonic()
    for name in again:
        class_embeddings(texts, [name], config.embed.templates)
    return (time.monotonic() - started) / len(again)


def _timed(stage: Any, records: list[Any], batch: int) -> tuple[list[Any], float]:
    """The outputs, and seconds for a record: of all batches but the first, if there are more."""
    given, outputs = iter(records), []
    warm = batch if len(records) > batch else 0
    outputs += _without_drops(stage(islice(given, warm)))
    started = time.monotonic()
    outputs += _without_drops(stage(given))
    return outputs, (time.monotonic() - started) / max(1, len(records) - warm)


def _without_drops(items: Iterator[Any]) -> list[Any]:
    return [item for item in items if not isinstance(item, Dropped)]


def _stored(records: list[Any]) -> int:
    """Bytes of these records as the files of a shard."""
    with ShardFiles() as files:
        for record in records:
            files.add(record)
        return sum(path.stat().st_size for path in files.finish([]).values())


def _device() -> str:
    return CPU if (gpu := cuda()) is None else gpu.get_device_name()


def _cost(found: Estimate, steps: Any) -> str:
    if found.price is None:
        return ""
    # If some workers have GPUs, the price is per GPU, and steps without one cost nothing extra.
    paid = [step for step in steps if step.gpus] if any(s.gpus for s in found.steps) else steps
    cost = sum(found.hours(step) for step in paid) * found.price
    return f", costs {cost:.2f} at {found.price:g} an hour"


def _requests(step: StepEstimate) -> str:
    if not step.requests:
        return ""
    return f", {step.requests:.2g} requests to the object store, if the output is on one"


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
