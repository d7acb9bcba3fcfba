"""A stage that does as its captions say, and small caption steps. Importable by Ray's workers.

As a program it runs a small job, and sends itself a signal after some commits and seconds:
python -m pipeline_fakes FOLDER SHARDS ENGINE SIGNAL COMMITS SECONDS
"""

import dataclasses
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ovref.contract import Dropped
from ovref.errors import ModelError, StorageError
from ovref.identity import record_key, record_seed, spec_identity
from ovref.records import Caption, Noun, Prompt
from ovref.storage.file_store import Store
from ovref.storage.steps import StepFolder, open_step
from ovref_pipelines.engine.config import EngineConfig
from ovref_pipelines.engine.ledger import CRASHED_WORKER
from ovref_pipelines.engine.run_steps import run_step
from ovref_pipelines.engine.stopping import StoppedError

DIE, RAISE, HANG, DROP, SLOW, DISK = "die", "raise", "hang", "drop", "slow", "disk"


@dataclass(frozen=True, kw_only=True)
class ObedientSpec:
    """Captions whose first word is an order; `<order> once` is obeyed a single time."""

    name: ClassVar[str] = "obedient"
    version: ClassVar[int] = 1

    scratch: str
    """Folder where it remembers what it has obeyed."""
    load: str = "fine"
    """`fine`, `missing` (ModelError), `bug` (another error), `die`, `die once`, `tell gpus` (which
    it sees, in a file of scratch)."""
    mended: str = "no"
    """Reaction to the order to die: `no`, dies; `drop`, drops as the engine would; `yes`, ignores
    it."""

    def build(self) -> "Obedient":
        if self.load == "missing":
            raise ModelError("the model fake:none is not here; give another id")
        if self.load == "bug":
            raise KeyError("weights")
        if self.load == "tell gpus":
            Path(self.scratch, "gpus").write_text(repr(os.environ.get("CUDA_VISIBLE_DEVICES")))
        if self.load == "die" or (self.load == "die once" and first_time(self.scratch, "load")):
            os._exit(3)
        return Obedient(self.scratch, self.mended)


class Obedient:
    def __init__(self, scratch: str, mended: str) -> None:
        self._scratch, self._mended = scratch, mended

    def __call__(self, records: Iterator[Caption]) -> Iterator[Prompt | Dropped]:
        for caption in records:
            order, *rest = caption.text.split()
            if rest[:1] != ["once"] or first_time(self._scratch, caption.key):
                if order == DIE and self._mended == "drop":
                    yield Dropped(caption.key, CRASHED_WORKER)
                    continue
                if order == DIE and self._mended == "no":
                    os._exit(3)
                if order == RAISE:
                    raise ValueError(f"asked to raise by {caption.text!r}")
                if order == HANG:
                    time.sleep(600)
                if order == DISK:
                    raise StorageError("the disk is full: free space and start again")
            if order == SLOW:
                time.sleep(0.01)
            if order == DROP:
                yield Dropped(caption.key, "asked_to_drop")
                continue
            seed = record_seed(7, caption.key)
            yield Prompt(
                key=caption.key,
                caption=f"{caption.text} {seed}",
                source=caption.source,
                nouns=(Noun(text=order, start=0, end=len(order)),),
            )


@dataclass(frozen=True, kw_only=True)
class EchoSpec:
    """Prompts, said once more."""

    name: ClassVar[str] = "echo"
    version: ClassVar[int] = 1

    def build(self) -> Callable[[Iterator[Prompt]], Iterator[Prompt]]:
        def stage(prompts: Iterator[Prompt]) -> Iterator[Prompt]:
            for prompt in prompts:
                yield dataclasses.replace(prompt, caption=f"{prompt.caption} {prompt.caption}")

        return stage


def first_time(folder: str, name: str) -> bool:
    """Whether nobody has asked this before, over all processes."""
    try:
        with open(Path(folder) / f"obeyed-{name}", "xb"):
            return True
    except FileExistsError:
        return False


def caption_step(url: str, shards: list[list[str]]) -> StepFolder:
    """A complete step of captions, one shard for each list of texts."""
    step = open_step(Store.open(url), "captions", {"shards": shards})
    for number, texts in enumerate(shards):
        captions = [
            Caption(key=record_key("fake", f"{number} {text}"), text=text, source=str(number))
            for text in texts
        ]
        step.commit(f"{number:06d}", captions, inputs=len(captions))
    step.finish([f"{number:06d}" for number in range(len(shards))])
    return step


def prompt_step(url: str, source: StepFolder, spec: ObedientSpec) -> StepFolder:
    """The step that `spec` makes of `source`; its scratch folder is no part of its identity."""
    identity = {"stages": [spec_identity(spec) | {"fields": {}}]}
    return open_step(Store.open(url), "prompts", identity, [source.fingerprint])


def echo_step(url: str, source: StepFolder) -> StepFolder:
    """The step that `EchoSpec` makes of `source`."""
    identity = {"stages": [spec_identity(EchoSpec())]}
    return open_step(Store.open(url), "echoes", identity, [source.fingerprint])


def files_of(step: StepFolder) -> dict[str, bytes]:
    """All data files that the step's markers name, with their bytes."""
    commits = step.commits().values()
    return step.store.read_many([file.name for c in commits for file in c.files.values()])


def slow_job(folder: str, shards: int) -> tuple[ObedientSpec, StepFolder, StepFolder]:
    """Shards of five records, 10 ms each."""
    texts = [[f"slow {number} {n}" for n in range(5)] for number in range(shards)]
    spec = ObedientSpec(scratch=folder)
    source = caption_step(folder, texts)
    return spec, source, prompt_step(folder, source, spec)


def main() -> int:
    folder, shards, engine, number, commits, seconds = sys.argv[1:]
    config = EngineConfig(engine=engine, workers=2 if engine == "ray" else 1)
    spec, source, target = slow_job(folder, int(shards))

    def signal_myself() -> None:
        while len(target.committed()) < int(commits):
            time.sleep(0.005)
        time.sleep(float(seconds))
        os.kill(os.getpid(), int(number))

    threading.Thread(target=signal_myself, daemon=True).start()
    try:
        run_step([spec], source, target, config)
    except StoppedError as error:
        print(error, file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
