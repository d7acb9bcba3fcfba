"""Files of a store for random access; of an object store, the newest few have copies here."""

import threading
from collections import OrderedDict
from io import BufferedReader
from pathlib import Path
from tempfile import TemporaryDirectory

from ovref.storage.file_store import Store
from ovref.storage.scratch import scratch_folder


class Copies:
    """Safe for use by several threads. A copy goes with this object, at the latest."""

    def __init__(self, store: Store, most: int) -> None:
        """`most`: copies that are kept."""
        self._store, self._most = store, most
        self._kept: OrderedDict[str, TemporaryDirectory[str]] = OrderedDict()
        self._lock = threading.Lock()

    def open(self, name: str) -> BufferedReader:
        """A file of its own position, which may be read even after its copy was removed.

        Raises:
            StorageError: it cannot be read.
        """
        if self._store.is_local:
            with self._store.local_copy(name) as path:
                return open(path, "rb")
        with self._lock:
            if name not in self._kept:
                folder = scratch_folder()
                with self._store.local_copy(name) as path:
                    path.replace(Path(folder.name, "copy"))
                self._kept[name] = folder
            self._kept.move_to_end(name)
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)[1].cleanup()
            return open(Path(self._kept[name].name, "copy"), "rb")

    def close(self) -> None:
        """Removes the copies."""
        with self._lock:
            for folder in self._kept.values():
                folder.cleanup()
            self._kept.clear()
