"""`ovref convert collection`: an undivided collection becomes a partitioned one."""

import contextlib
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ovref.config import STRICT
from ovref.errors import InputError
from ovref.locations import absolute_local
from ovref.reduce.convert import conversion
from ovref.reduce.partitioned import make_partitions
from ovref.reduce.published import SCATTER
from ovref.storage.file_store import Store
from ovref_inference.collection import format as fmt
from ovref_inference.collection import hub
from ovref_pipelines.engine import reduce_tasks
from ovref_pipelines.engine.config import EngineConfig
from ovref_pipelines.engine.progress import Throttle, duration
from ovref_pipelines.engine.run_steps import ray_left_as_found
from ovref_pipelines.recipe import Say, work_folder


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Where a collection is converted; not what it becomes."""

    __pydantic_config__ = STRICT

    engine: EngineConfig = field(default_factory=EngineConfig)
    work: str | None = None
    """Local folder of each machine, with space for five times the embeddings of the partitions that
    it makes at a time. None takes `_reduce` in a local output, otherwise the machine's temporary
    folder."""


def convert(
    source: str, output: str, partition_references: int, config: ConvertConfig, say: Say
) -> dict[str, Any]:
    """See `ovref.reduce.convert.convert_collection`. The same call resumes one that was killed.

    Raises:
        InputError: `output` is on the Hub, or in the collection at `source`, or it or `work`
            cannot be written.
        ConfigError: `work` is not on this machine.
    """
    if output.startswith(hub.PREFIX):
        raise InputError(
            f"{output}: a collection is converted into a folder or an object store; from there "
            "`ovref publish` takes it to the Hub"
        )
    if output.startswith(f"{source.rstrip('/')}/"):
        raise InputError(
            f"{output} is in the collection {source}, which stays as it is: convert into a folder "
            "outside of it"
        )
    target = Store.open(output)
    given = None if config.work is None else absolute_local(config.work, "work")
    work = work_folder(target, given)
    throttled = Throttle(say, config.engine.progress_seconds)
    job = conversion(
        source,
        partition_references,
        output=target,
        work=work,
        run_tasks=reduce_tasks.spread(config.engine, target.child(SCATTER), shared=True),
        report=lambda phase, done, total: throttled(f"collection: {phase}, {done}/{total}"),
    )
    if target.is_local:
        _check_writable(Path(target.url), "NEW")
    _check_writable(work, "work")
    say(f"collection: converting {source} to {output}")
    started = time.monotonic()
    with ray_left_as_found():
        result = make_partitions(job)
    if given is None:
        if target.is_local:  # the folder is this collection's own
            _remove_leftovers(work, job.wanted)
        with contextlib.suppress(OSError):  # others may work there too
            work.rmdir()
    say(f"collection: {_made(result, target)}")
    say(f"collection: done in {duration(time.monotonic() - started)}")
    return result


def _check_writable(folder: Path, name: str) -> None:
    """Raises InputError unless files can be made in a folder, which is created."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"{name}: no files can be written in {folder} ({error.strerror}); choose another folder"
        ) from error


def _remove_leftovers(work: Path, wanted: str) -> None:
    """Removes the folders and locks of conversions that were killed and differ from this one, which
    somebody else may still be making."""
    for path in work.glob("*"):
        if wanted[:12] in path.name:
            continue
        with contextlib.suppress(OSError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _made(result: dict[str, Any], target: Store) -> str:
    """What the conversion has made, in words; `result` is from `make_partitions`."""
    parts, most = result["partitions"], result["largest_partition"]
    text = f"{parts} partition{'s' * (parts != 1)}, of at most {most} references"
    manifest = fmt.parse_manifest(target.read(fmt.MANIFEST), target.url)
    deleted = manifest.build["converted"]["deleted"]
    return f"{text}; {deleted} deleted ones left out" if deleted else text
