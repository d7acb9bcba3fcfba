"""Measures how fast this machine makes images and references with a configuration's models.

Full-size architectures without their weights, parts of the UNet and the machine's limits are
measured by `tests/benchmarks/run_bench.py` in a checkout.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ovref.contract import Dropped
from ovref.devices import cuda, peak_gb
from ovref.errors import InputError
from ovref.labelled_corpora import read_corpus
from ovref.records import Prompt
from ovref.storage.shards import ShardFiles
from ovref_pipelines.build_config import BuildConfig
from ovref_pipelines.engine.run_steps import limit_threads


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Measurements of one batch size."""

    batch_size: int | str
    images: int
    references: int
    dropped: int
    """Images and regions dropped."""
    seconds: dict[str, float]
    """Wall clock per image: `images` (generated, grounded), `references` (embedded), `writing`."""
    peak_memory_gb: float
    """Peak GPU memory for this batch size; without a GPU, peak memory of the process so far."""

    @property
    def images_per_second(self) -> float:
        return 1 / sum(self.seconds.values())


def bench(
    config: BuildConfig,
    images: int = 32,
    batch_sizes: Sequence[int] = (),
    say: Callable[[str], None] = lambda message: None,
) -> list[Speed]:
    """Sends the first captions of the corpus through the stages of a build, and stores nothing.

    Args:
        images: number of images; a first batch for warm-up is not counted.
        batch_sizes: batch sizes of the image stage to measure; none uses the configuration's.

    Raises:
        OvrefError: as a build; InputError if the corpus yields no prompt.
    """
    limit_threads(config.engine.threads)
    found = islice(read_corpus(config.corpus, images=config.uses_images), images)
    captions = [caption for caption in found if not isinstance(caption, Dropped)]
    made = list(config.extract_nouns.build()(iter(captions)))
    prompts = [prompt for prompt in made if isinstance(prompt, Prompt)]
    if not prompts:
        raise InputError(f"{config.corpus.path} gives no prompt in its first {images} captions")
    say(f"{len(prompts)} prompts; loading models")
    embed = config.embed.build()
    rows = []
    for size in batch_sizes or (config.make_images.batch_size,):
        say(f"batches of {size}")
        spec = dataclasses.replace(config.make_images, batch_size=size)
        rows.append(_speed(spec.build(), embed, prompts, size))
    return rows


def _speed(generate: Any, embed: Any, prompts: list[Prompt], size: int | str) -> Speed:
    _run(generate, embed, prompts[: size if isinstance(size, int) else 1])
    if (gpu := cuda()) is not None:
        gpu.reset_peak_memory_stats()
    images, references, dropped, seconds = _run(generate, embed, prompts)
    return Speed(
        batch_size=size,
        images=images,
        references=references,
        dropped=dropped,
        seconds={name: round(total / len(prompts), 6) for name, total in seconds.items()},
        peak_memory_gb=round(peak_gb(), 3),
    )


def _run(
    generate: Any, embed: Any, prompts: list[Prompt]
) -> tuple[int, int, int, dict[str, float]]:
    """Numbers of images, references and drops, and the seconds of each part."""
    times = [time.perf_counter()]
    made = list(generate(iter(prompts)))
    times.append(time.perf_counter())
    images = [record for record in made if not isinstance(record, Dropped)]
    embedded = list(embed(iter(images)))
    times.append(time.perf_counter())
    references = [record for record in embedded if not isinstance(record, Dropped)]
    for records in (images, references):
        with ShardFiles() as files:
            for record in records:
                files.add(record)
            files.finish([])
    times.append(time.perf_counter())
    dropped = len(made) + len(embedded) - len(images) - len(references)
    parts = zip(("images", "references", "writing"), times, times[1:], strict=False)
    return len(images), len(references), dropped, {name: b - a for name, a, b in parts}


def text(rows: Sequence[Speed]) -> str:
    """One line per batch size, for people."""
    lines = []
    for row in rows:
        parts = ", ".join(f"{name} {1000 * each:.1f} ms" for name, each in row.seconds.items())
        lines.append(
            f"batches of {row.batch_size}: {row.images_per_second:.3g} images/s ({parts} an image; "
            f"peak {row.peak_memory_gb:.2f} GB; {row.images} images, {row.references} references, "
            f"{row.dropped} dropped)"
        )
    best = max(rows, key=lambda row: row.images_per_second)
    return "\n".join([*lines, f"fastest: batches of {best.batch_size}"])
