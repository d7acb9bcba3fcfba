"""The recipe of a build: from a caption corpus to a reference collection.

    captions -> prompts (-> selected) -> images -> references -> collection

Every step but the last has a folder of shards in the output and resumes where it was stopped. The
folders are fingerprinted over all settings that affect their bytes, chained from step to step; a
folder with other settings is refused before anything runs.
"""

import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ovref.ahead import map_ahead
from ovref.config import dump
from ovref.contract import Dropped, Spec
from ovref.corpora.mixture import licences_of_corpus
from ovref.ingest import IngestSummary, ingest
from ovref.labelled_corpora import read_corpus
from ovref.ops.vocabulary import vocabulary_report
from ovref.records import Noun, Prompt
from ovref.reduce.collection import reduce_collection
from ovref.reduce.published import SCATTER
from ovref.select_prompts import SelectPrompts, select_prompts
from ovref.stages.extract_nouns import ExtractNouns, language_warning
from ovref.storage.file_store import Store, check_conditional_create
from ovref.storage.steps import StepFolder
from ovref_inference.collection.retrieve import Texts
from ovref_inference.encoders.config import TextEncoderConfig
from ovref_pipelines import preflight, provenance
from ovref_pipelines.build_config import BuildConfig, output_of, with_absolute_places
from ovref_pipelines.engine import reduce_tasks
from ovref_pipelines.engine.bill import Bill
from ovref_pipelines.engine.ledger import QUARANTINE
from ovref_pipelines.engine.progress import Throttle, duration
from ovref_pipelines.engine.run_steps import (
    StepRun,
    progress_of,
    ray_left_as_found,
    run_steps,
)
from ovref_pipelines.engine.summary import StepSummary, filter_warnings, step_line, summarise
from ovref_pipelines.errors import JobError
from ovref_pipelines.folders import Folders, create_steps, open_steps, unfinished
from ovref_pipelines.live import Live
from ovref_pipelines.output import BUILD, FOLDER, REPORT, REPORTS, VOCABULARY, WORK

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class BuildSummary:
    """The result of a build, which is also the content of `report.json`."""

    output: str
    ingested: IngestSummary
    steps: tuple[StepSummary, ...]
    collection: dict[str, Any] | None
    """Summary of `reduce_collection`; None if nothing was published because shards failed."""
    collection_url: str
    seconds: float
    """Wall clock of this run."""

    @property
    def quarantined(self) -> int:
        """Shards that failed permanently in this run, over all steps."""
        return sum(len(step.quarantined) for step in self.steps)


def build(config: BuildConfig, say: Say = lambda message: None) -> BuildSummary:
    """Builds a collection, or resumes building it.

    Args:
        say: called with a line for people when a step begins or ends.

    Raises:
        OvrefError, CollectionError: see `ovref.errors`; the message says what to do.
        StoppedError: SIGTERM or SIGINT was received. The same call resumes the build.
    """
    config = with_absolute_places(config)
    output = Store.open(config.output)
    folders = open_steps(config)
    preflight.check_base(config.base, config.reduce, config.embed)
    check_conditional_create(output)
    live = Live(output)

    def say_and_record(message: str) -> None:
        say(message)
        live.message(message)

    say_and_record(f"build: {config.corpus.path} to {config.output}")
    with live.during():
        return _build(config, output, folders, say_and_record, live)


def _build(
    config: BuildConfig, output: Store, folders: Folders, say: Say, live: Live
) -> BuildSummary:
    started = time.monotonic()
    bill = Bill(config.engine.price_per_hour, of_gpus=config.engine.has_gpus)
    with ray_left_as_found():
        _check_models(config, folders, say)
        create_steps(config, folders)
        output.write(BUILD, _json(dump(config) | {FOLDER: os.getcwd()}))
        ingested = _ingest(config, folders.captions, say)

        def run(*chain: tuple[Spec, StepFolder, StepFolder]) -> list[StepSummary]:
            return _run(config, say, bill, live, *chain)

        steps = run((config.extract_nouns, folders.captions, folders.prompts))
        if folders.selected is not None and config.select_prompts is not None:
            steps.append(_select(config.select_prompts, folders.prompts, folders.selected, say))
        images = (config.make_images, folders.selected or folders.prompts, folders.images)
        embed = (config.embed, folders.images, folders.references)
        if config.engine.placement == "steps":
            steps += run(images) + run(embed)
        else:
            steps += run(images, embed)

    failed = sum(len(step.quarantined) for step in steps)
    collection = None
    if failed and not config.allow_incomplete:
        say(f"no collection yet: {failed} shards failed permanently; see _quarantine in the steps")
    else:
        collection = reduce(config, folders, say)
    summary = BuildSummary(
        output=config.output,
        ingested=ingested,
        steps=tuple(steps),
        collection=collection,
        collection_url=output_of(config).collection.url,
        seconds=round(time.monotonic() - started, 3),
    )
    output.write(REPORT, _json(dataclasses.asdict(summary)))
    output.write(VOCABULARY, _json(vocabulary_report(_answers(folders.prompts))))
    return summary


def _check_models(config: BuildConfig, folders: Folders, say: Say) -> None:
    """Builds and tries every model of the unfinished steps, and records their weights."""
    stages = unfinished(config, folders)
    if not stages:
        return
    say("models: loading each once, with a blank input")
    found = preflight.check([(spec, pool) for spec, pool, _ in stages], config.engine)
    output = output_of(config)
    for store in [output.store] + [output.upstream] * (output.upstream != output.store):
        names = {spec.name for spec, _, step in stages if output.place(step.name) == store}
        preflight.remember(store, [model for model in found if model.step in names])


def _answers(prompts: StepFolder) -> Iterator[Any]:
    """The prompts of a step; after those of each shard, its drops."""
    columns = ["key", "caption", "nouns", "source"]

    def read(shard: str) -> tuple[list[dict[str, Any]], list[Dropped]]:
        # From the sidecars, because the samples may hold images.
        return prompts.table(shard, columns).to_pylist(), prompts.drops(shard)

    for rows, drops in map_ahead(read, prompts.committed()):
        for row in rows:
            yield Prompt(**row | {"nouns": tuple(Noun(**noun) for noun in row["nouns"])})
        yield from drops


def reduce(config: BuildConfig, folders: Folders, say: Say) -> dict[str, Any]:
    """Makes and publishes the collection from finished reference shards."""
    target, references = output_of(config).collection, folders.references
    made_from = provenance.provenance(config, folders)
    if unknown := provenance.unknown(made_from):
        say(
            f"collection: WARNING: the licence of {', '.join(unknown)} is unknown; state it by "
            "corpus.licence, or by licences=['<name>: <licence>']"
        )
    say(f"collection: reducing {references.store.url} to {target.url}")
    started = time.monotonic()
    throttled = Throttle(say, config.engine.progress_seconds)
    work = work_folder(Store.open(config.output), config.work)
    if config.reduce.partition_references is None:
        place, shared = Store.open(str(work)), config.work is not None
    else:
        place, shared = target.child(SCATTER), True
    with ray_left_as_found():
        result = reduce_collection(
            references,
            config.reduce,
            embed=config.embed,
            texts=texts_of(config),
            output=target,
            work=work,
            licences=[*config.licences, *licences_of_corpus(config.corpus)],
            provenance=made_from | {"licences": provenance.licences(made_from)},
            base=None if config.base is None else Store.open(config.base),
            replace=config.replace,
            allow_incomplete=config.allow_incomplete,
            run_tasks=reduce_tasks.spread(config.engine, place, shared=shared),
            report=lambda phase, done, total: throttled(f"collection: {phase}, {done}/{total}"),
        )
    for warning in filter_warnings(result):
        say(f"collection: WARNING: {warning}")
    say(f"collection: done in {duration(time.monotonic() - started)}")
    return result


def texts_of(config: BuildConfig) -> Texts:
    """Text encoder of the vocabulary, loaded at its first use."""
    return _LazyTexts(config.embed.text)


def _ingest(config: BuildConfig, target: StepFolder, say: Say) -> IngestSummary:
    say(f"captions: reading {config.corpus.path}")
    throttled = Throttle(say, config.engine.progress_seconds)
    summary = ingest(
        read_corpus(config.corpus, images=config.uses_images),
        target,
        config.shard_size,
        lambda so_far: throttled(f"captions: {so_far.captions} in {so_far.shards} shards so far"),
    )
    dropped = f", dropped {summary.dropped}" if summary.dropped else ""
    say(f"captions: {summary.captions} in {summary.shards} shards{dropped}")
    return summary


def _run(
    config: BuildConfig,
    say: Say,
    bill: Bill,
    live: Live,
    *chain: tuple[Spec, StepFolder, StepFolder],
) -> list[StepSummary]:
    """Runs one step, or several concurrently: (stage, source, target) each."""
    engine = config.engine
    if chain[0][0].name == ExtractNouns.name:
        # Tagging needs no GPU; requesting one would start machines that then idle.
        engine = dataclasses.replace(engine, gpus_per_worker=0.0)
    pools = [engine.pool, engine.embedders if engine.placement == "pools" else engine.pool]
    runs = [
        StepRun(
            specs=[spec], source=source, target=target, pool=pool,
            progress=progress_of(target, engine, bill, live.watch),
        )
        for (spec, source, target), pool in zip(chain, pools, strict=False)
    ]  # fmt: skip
    steps = run_steps(runs, engine)
    for step in steps:
        Store.open(config.output).write(f"{REPORTS}/{step.step}.json", _json(step_report(step)))
        say(step_line(step))
        if warning := language_warning(step.outputs + sum(step.dropped.values()), step.dropped):
            say(warning)
    return steps


def _select(spec: SelectPrompts, source: StepFolder, target: StepFolder, say: Say) -> StepSummary:
    shards = source.complete()
    if shards is None:
        raise JobError(
            f"shards of {source.store.url} failed permanently, but selecting prompts needs all "
            f"shards; see {QUARANTINE} in it, and run the same command to retry them"
        )
    there, started = len(target.committed()), time.monotonic()
    select_prompts(spec, source, target)
    now, seconds = len(shards) - there, time.monotonic() - started
    step = summarise(target, len(shards), committed_now=now, seconds=seconds)
    say(step_line(step))
    return step


def step_report(step: StepSummary) -> dict[str, Any]:
    """Content of `reports/<step>.json`: the summary and values derived from it."""
    wall = step.seconds if step.committed_now else None
    return dataclasses.asdict(step) | {
        "answered": step.outputs + sum(step.dropped.values()),
        "outputs_per_work_second": (
            round(step.outputs / step.work_seconds, 4) if step.work_seconds else None
        ),
        "shards_per_second": round(step.committed_now / wall, 4) if wall else None,
    }


class _LazyTexts:
    """The text encoder, loaded when the first text is encoded, which may never happen."""

    def __init__(self, encoder: TextEncoderConfig) -> None:
        self._config = encoder
        self._encoder: Any = None

    def encode(self, texts: list[str]) -> Any:
        if self._encoder is None:
            from ovref_inference.encoders import load_text_encoder

            self._encoder = load_text_encoder(self._config)
        return self._encoder.encode(texts)

    def __getstate__(self) -> dict[str, Any]:
        return {"_config": self._config, "_encoder": None}  # workers load their own


def work_folder(output: Store, work: str | None) -> Path:
    """Where a reduction works: the given folder, or one in a local output, or else in the machine's
    temporary folder."""
    if work is not None:
        return Path(work).expanduser()
    if output.is_local:
        return Path(output.url.removeprefix("file://")) / WORK
    # A folder that one user created may not be writable for another.
    return Path(tempfile.gettempdir()) / f"ovref_reduce_{os.getuid()}"


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
