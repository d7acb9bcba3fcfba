"""A whole build without models, from captions to a collection, in processes that can be killed.

Stages take a moment for each record, so that a kill can fall anywhere: into a stage, a write, an
upload, the reduction. Children are forked from a server that has imported everything.
"""

import contextlib
import hashlib
import io
import multiprocessing
import os
import resource
import signal
import sys
import time
from pathlib import Path

import fsspec
import numpy as np
import psutil
from PIL import Image

from ovref.config import load
from ovref.corpora import CorpusSpec
from ovref.errors import ModelError, OvrefError
from ovref.identity import record_seed
from ovref.records import YES, ImageRecord, Noun, Prompt, Reference, Region
from ovref.reduce import scatter
from ovref.stages.embed import Embed
from ovref.stages.extract_nouns import ExtractNouns
from ovref.stages.synthesize import Synthesize
from ovref.storage.file_store import Store
from ovref.storage.steps import existing_step
from ovref_inference.encoders.config import TextEncoderConfig, VisualEncoderConfig
from ovref_inference.vectors import l2_normalised
from ovref_pipelines import recipe
from ovref_pipelines.engine.config import EngineConfig
from ovref_pipelines.recipe import BuildConfig
from ovref_pipelines.verbs.garbage import is_scratch

ROOT = Path(__file__).parents[2]
MOMENT = float(os.environ.get("OVREF_FAKE_MOMENT", "0.002"))
"""Seconds that a stage takes for a record."""
GROUP_ROWS = int(os.environ.get("OVREF_FAKE_GROUP_ROWS", "0"))
"""References that a task of a partitioned reduction reads; 0 for as many as in real use."""
PRELOADED = ["recipe_fakes", "ovref.reduce.collection"]
"""Modules of the server that processes are forked from."""
STEPS = ("captions", "prompts", "images", "references")
THINGS = ("cup", "boat", "tree", "house", "fish", "star", "bird")


class FakeNouns(ExtractNouns):
    """The last word of a caption is its noun."""

    def check(self):
        self.build()
        return []

    def build(self):
        def stage(captions):
            for caption in captions:
                time.sleep(MOMENT)
                text = caption.text.split()[-1]
                start = caption.text.rindex(text)
                yield Prompt(
                    key=caption.key, caption=caption.text, source=caption.source,
                    nouns=(Noun(text=text, start=start, end=start + len(text)),),
                )  # fmt: skip

        return stage


class FakeSynthesize(Synthesize):
    """An image of one colour, which comes from the seed."""

    def check(self):
        self.build()
        return []

    def build(self):
        if self.model == "missing":
            raise ModelError("the model missing is not here; give another id")

        def stage(prompts):
            for prompt in prompts:
                time.sleep(MOMENT)
                seed = record_seed(self.run_seed, prompt.key)
                buffer = io.BytesIO()
                Image.new("RGB", (8, 8), (seed % 251, seed % 241, seed % 239)).save(buffer, "PNG")
                mask_hw = np.full((8, 8), YES, np.uint8)
                region = Region(noun=prompt.nouns[0], mask_hw=mask_hw, score=1.0, source="daam")
                yield ImageRecord(
                    key=prompt.key, caption=prompt.caption, source=prompt.source,
                    image=buffer.getvalue(), regions=(region,), seed=seed,
                )  # fmt: skip

        return stage


class FakeTexts:
    """Unit vectors that come from the text."""

    def __init__(self, config=None):
        pass

    def encode(self, texts):
        seeds = [hashlib.sha256(text.encode()).digest()[:8] for text in texts]
        rows = [np.random.default_rng(list(seed)).normal(size=6) for seed in seeds]
        return l2_normalised(np.array(rows, np.float32))


class FakeEmbedding(Embed):
    """One reference an image."""

    def check(self):
        self.build()
        return []

    def build(self):
        texts = FakeTexts()

        def stage(images):
            for image in images:
                time.sleep(MOMENT)
                vectors = texts.encode([image.regions[0].noun.text, image.caption])
                yield Reference(
                    key=f"{image.key}#0", noun=image.regions[0].noun, caption=image.caption,
                    box_xyxy=(0, 0, 8, 8), area=1.0, score=1.0, source="daam", seed=image.seed,
                    visual=vectors[1].astype(np.float16), textual=vectors[0].astype(np.float16),
                )  # fmt: skip

        return stage


def fake_build(folder: Path, captions: int, shard_size: int, **fields) -> BuildConfig:
    """A build in `folder/out` of so many captions, all different."""
    corpus = folder / "captions.txt"
    if not corpus.exists():
        texts = [f"number {n} is a {THINGS[n % len(THINGS)]}" for n in range(captions)]
        corpus.write_text("\n".join(texts) + "\n")
    model = fields.pop("model", "fake")
    return BuildConfig(
        output=fields.pop("output", str(folder / "out")),
        corpus=CorpusSpec(path=str(corpus)),
        extract_nouns=FakeNouns(),
        synthesize=FakeSynthesize(model=model),
        embed=FakeEmbedding(
            visual=VisualEncoderConfig(model="fake"), text=TextEncoderConfig(model="fake")
        ),
        shard_size=shard_size,
        engine=EngineConfig(engine="local"),
        work=str(folder / "work"),
        **fields,
    )


def run_fake_build(config: BuildConfig, limit_bytes: int | None = None) -> recipe.BuildSummary:
    """What a child process does. Its exit code is 2 where something has to be mended first.

    Args:
        limit_bytes: no file can grow beyond, as on a disk that is full.
    """
    sys.stderr = io.StringIO()
    recipe._LazyTexts = FakeTexts
    scatter.GROUP_ROWS = GROUP_ROWS or scatter.GROUP_ROWS
    if limit_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    try:
        return recipe.build(config)
    except OvrefError as error:
        (Path(config.work).parent / "error.txt").write_text(f"{type(error).__name__}: {error}")
        raise SystemExit(2) from error


S3_OPTIONS = {"connect_timeout": 1, "read_timeout": 1}
"""For botocore, as it would wait a minute for every late answer. Its retries are what they are."""
S3_KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}


def build_through(config: BuildConfig, url: str, most: int = 20) -> int:
    """Builds on the S3 server at `url` as `ovref build` would, until the collection is there; how
    often it had to be started. Fails if the advice was to fix something first."""
    for times in range(1, most + 1):
        child = processes().Process(target=_build_on_s3, args=[config, url])
        child.start()
        child.join()
        # 1 is an error that may pass, 0 without a collection a shard in quarantine: again.
        assert child.exitcode in (0, 1), (Path(config.work).parent / "error.txt").read_text()
        if child.exitcode == 0 and (Path(config.work).parent / "published").exists():
            return times
    raise AssertionError(f"no collection after {most} builds")


def _build_on_s3(config: BuildConfig, url: str) -> None:
    os.environ.update(S3_KEYS, AWS_ENDPOINT_URL=url)
    fsspec.config.conf["s3"] = {"config_kwargs": S3_OPTIONS}
    summary = run_fake_build(config)
    if summary.collection is not None:
        (Path(config.work).parent / "published").touch()


def small_miniature_build(folder: Path) -> BuildConfig:
    """The miniature's models, few captions, few steps."""
    settings = [
        f"output={folder}/out", f"work={folder}/work", "engine.engine=local", "engine.workers=1",
        f"corpus.path={ROOT}/configs/miniature_captions.txt", "corpus.limit=12", "shard_size=4",
        "synthesize.steps=2",
    ]  # fmt: skip
    return load(BuildConfig, ROOT / "configs" / "miniature.yaml", settings)


def run_miniature_build(config: BuildConfig) -> None:
    """What a child process does."""
    sys.stderr = io.StringIO()
    recipe.build(config)


def processes():
    """Where child processes come from: each is forked from a server that has all modules."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def content_of(config: BuildConfig) -> dict[str, bytes]:
    """Every data file of a finished build and of its collection, by name; not what `ovref gc` would
    remove."""
    found = {}
    for name in STEPS:
        step = existing_step(Store.open(config.output), name)
        assert step.complete() == step.committed()
        files = [file.name for c in step.commits().values() for file in c.files.values()]
        found |= {f"{name}/{path}": data for path, data in step.store.read_many(files).items()}
    collection = Store.open(config.output).child("collection")
    paths = [path for path in collection.list() if not is_scratch(path)]
    return found | {f"collection/{path}": collection.read(path) for path in paths}


def answered_once(config: BuildConfig) -> bool:
    """Whether each input of each step has one answer: an output or a drop."""
    inputs = None
    for name in STEPS:
        step = existing_step(Store.open(config.output), name)
        keys = [record.key for shard in step.committed() for record in step.read(shard)]
        keys += [drop.key for shard in step.committed() for drop in step.drops(shard)]
        bases = [key.partition("#")[0] for key in keys]
        if len(set(keys)) != len(keys) or (inputs is not None and set(bases) != inputs):
            return False
        inputs = set(bases)
    return True


def where(config: BuildConfig) -> str:
    """The step that a build has not finished, or `collection`."""
    for name in STEPS:
        if not Store.open(config.output).exists(f"{name}/complete.json"):
            return name
    return "collection"


def kill_at_random(config: BuildConfig, rng, longest_s: float, kills: int, job=run_fake_build):
    """Starts the build again and again and kills it after up to `longest_s` seconds of its CPU
    time, which unlike the clock does not depend on what else the machine does; then lets it
    finish, if it has not in spite of all.

    Returns:
        The step that each kill has interrupted.
    """
    killed = []
    for _ in range(kills):
        child = processes().Process(target=job, args=[config])
        child.start()
        _watch(child, rng.uniform(0, longest_s))
        child.kill()
        child.join()
        if child.exitcode == 0:
            return killed
        assert child.exitcode == -signal.SIGKILL, child.exitcode
        killed.append(where(config))
    finish(config, job)
    return killed


def finish(config: BuildConfig, job=run_fake_build) -> float:
    """Runs a build to its end in a process of its own; its CPU time, seconds."""
    child = processes().Process(target=job, args=[config])
    child.start()
    seconds = _watch(child, float("inf"))
    child.join()
    assert child.exitcode == 0, child.exitcode
    return seconds


def _watch(child, limit_s: float) -> float:
    """Waits until a process has used so much CPU time, or has ended; what it has used."""
    used = 0.0
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(child.pid)
        while used < limit_s and child.exitcode is None:
            used = sum(process.cpu_times()[:2])
            child.join(0.005)
    return used
