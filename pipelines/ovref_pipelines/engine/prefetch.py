"""Copies the next shard to the local disk while the current one is processed.

Unlike the items of `ovref.ahead`, the next shard is a guess: the driver may hand out another one,
and a failed copy is no error, since the shard is then read from its source.
"""

import contextlib
import dataclasses
import logging
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from ovref.storage.file_store import Store
from ovref.storage.scratch import scratch_folder
from ovref.storage.steps import StepFolder, copy_shard

logger = logging.getLogger(__name__)


@dataclass
class _Copy:
    source: StepFolder
    """Where the shard comes from."""
    shard: str
    folder: tempfile.TemporaryDirectory
    whole: bool = False

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._fetch, daemon=True)
        self.thread.start()

    def _fetch(self) -> None:
        try:
            copy_shard(self.source, self.shard, _at(self.source, self.folder.name))
            self.whole = True
        except Exception as error:
            logger.warning("shard %s could not be fetched ahead: %s", self.shard, error)


class Prefetch:
    """Prefetches at most one shard. Not thread-safe."""

    def __init__(self) -> None:
        self._copy: _Copy | None = None

    def begin(self, source: StepFolder, shard: str) -> None:
        """Starts to copy a shard; does nothing for a local store."""
        if source.store.is_local:
            return
        self.drop()
        self._copy = _Copy(source, shard, scratch_folder())

    @contextlib.contextmanager
    def place(self, source: StepFolder, shard: str) -> Iterator[StepFolder]:
        """Where to read a shard inside the block: its copy if there is one, otherwise `source`.

        If copying failed, reading from `source` raises the error.
        """
        copy = self._copy
        if copy is None or (copy.source, copy.shard) != (source, shard):
            yield source
            return
        self._copy = None
        with copy.folder as folder:
            copy.thread.join()
            yield _at(source, folder) if copy.whole else source

    def drop(self) -> None:
        """Discards the copy."""
        if self._copy is not None:
            self._copy.thread.join()
            self._copy.folder.cleanup()
            self._copy = None


def _at(source: StepFolder, folder: str) -> StepFolder:
    return dataclasses.replace(source, store=Store.open(folder))
