"""A local folder or an object store, addressed by relative paths, through fsspec.

Readers see a write completely or not at all. Permanent errors (no such bucket, no permission, full
disk) become `StorageError` with a remedy; transient network errors stay `ConnectionError` or
another `OSError`, which the engine retries.
"""

import contextlib
import datetime
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ovref.errors import StorageError
from ovref.storage.scratch import scratch_folder
from ovref_inference.places import (
    is_local,
    lasting_remedy,
    open_place,
    service_code,
    store_errors,
)

TEMPORARY = ".partial-"
"""Prefix of the names of unfinished local files."""

CREATE_ATTEMPTS = 5


@dataclass(frozen=True, kw_only=True)
class Details:
    """Size and age of one object."""

    size: int
    """Bytes."""
    age_s: float
    """Seconds since it was written."""


@dataclass(frozen=True)
class Store:
    """A root URL and relative paths under it. Cheap to create, picklable, thread-safe."""

    url: str
    """`/data/run7`, `s3://bucket/prefix`, ... without a trailing slash."""
    storage_options: dict[str, Any] = field(default_factory=dict, repr=False)
    """For fsspec: `endpoint_url`, `key`, `secret`, `profile`, ... Never printed or stored."""

    @classmethod
    def open(cls, url: str, **storage_options: Any) -> "Store":
        """A store at `url`; nothing is read or written yet.

        Raises:
            StorageError: the URL's protocol is unknown.
            MissingPackageError: its package is not installed.
        """
        store = cls(url.rstrip("/") or "/", storage_options)
        # Absolute, because a worker may run in another folder.
        return cls(store._root, storage_options) if store.is_local else store

    def child(self, prefix: str) -> "Store":
        """The store whose root is `prefix` in this one."""
        return Store(f"{self.url.rstrip('/')}/{_relative(prefix)}", self.storage_options)

    @property
    def is_local(self) -> bool:
        """Whether paths are files of this machine (or of a file system mounted on it)."""
        return is_local(self._fs)

    def read(self, path: str) -> bytes:
        """The whole object. Raises StorageError if it does not exist."""
        full = self._full(path)
        with self._explained("read", path):
            return self._fs.cat_file(full)

    def read_if_there(self, path: str) -> bytes | None:
        """The whole object, or None. One request, where looking it up first takes two."""
        full = self._full(path)
        with self._explained("read", path):
            try:
                content: bytes = self._fs.cat_file(full)
            except (FileNotFoundError, NotADirectoryError):
                return None
        return content

    def read_many(self, paths: list[str]) -> dict[str, bytes]:
        """Many small objects, concurrently if possible. Raises StorageError if one is absent."""
        full = [self._full(path) for path in paths]
        with self._explained("read", f"{len(paths)} objects"):
            # Not `cat`, which interprets brackets in a path as a pattern.
            found = self._fs.cat_ranges(full, None, None, on_error="return")
        for path, data in zip(paths, found, strict=True):
            if isinstance(data, Exception):
                with self._explained("read", path):
                    raise data
        return dict(zip(paths, found, strict=True))

    def write(self, path: str, data: bytes) -> None:
        """Writes or replaces one object; readers see the old or the new one."""
        full = self._full(path)
        with self._explained("write", path):
            if self.is_local:
                with _partial(full) as partial:
                    _write_synced(partial, data)
                    os.replace(partial, full)
                    _sync_folder(full)
            else:
                self._fs.pipe_file(full, data)

    def upload(self, local_path: str | Path, path: str) -> None:
        """Writes or replaces one object from a local file, without holding it in memory."""
        full = self._full(path)
        with self._explained("write", path):
            if self.is_local:
                with _partial(full) as partial:
                    with open(local_path, "rb") as source, open(partial, "xb") as target:
                        shutil.copyfileobj(source, target, 1 << 20)
                        _sync(target)
                    os.replace(partial, full)
                    _sync_folder(full)
            else:
                self._fs.put_file(str(local_path), full)

    def create(self, path: str, data: bytes) -> bool:
        """Writes one object unless it exists: exactly one of any number of callers gets True.

        Locally a hard link, on S3 a conditional PUT; never partially visible.
        """
        full = self._full(path)
        with self._explained("create", path):
            if self.is_local:
                return _create_local(full, data)
            return self._create_remote(full, data)

    def exists(self, path: str) -> bool:
        """Whether there is an object at `path` (a permission problem is an error, not False)."""
        full = self._full(path)
        with self._explained("look up", path):
            try:
                self._fs.info(full)
            except FileNotFoundError:
                return False
        return True

    def list(self, prefix: str = "", unfinished: bool = False) -> list[str]:
        """Paths of all objects under the folder `prefix`, at any depth, sorted.

        Args:
            unfinished: include local files of running or killed writes.
        """
        full = self._full(prefix) if prefix else self._root
        start = len(self._root.rstrip("/")) + 1
        with self._explained("list", prefix):
            try:
                names = [name[start:] for name in self._fs.find(full)]
            except FileNotFoundError:
                return []
        return sorted(name for name in names if unfinished or not is_unfinished(name))

    def details(self, prefix: str = "", unfinished: bool = False) -> dict[str, "Details"]:
        """Size and age of all objects that `list` names, by path, from one listing."""
        full = self._full(prefix) if prefix else self._root
        start, now = len(self._root.rstrip("/")) + 1, datetime.datetime.now(datetime.UTC)
        with self._explained("list", prefix):
            try:
                found = self._fs.find(full, detail=True)
            except FileNotFoundError:
                return {}
        details = {}
        for name, info in sorted(found.items()):
            # Local file systems give seconds, S3 a date under another key.
            modified = info.get("LastModified", info.get("mtime"))
            if isinstance(modified, float | int):
                modified = datetime.datetime.fromtimestamp(modified, datetime.UTC)
            if modified is None:
                modified = self._fs.modified(name)
            if unfinished or not is_unfinished(name):
                age_s = (now - modified).total_seconds()
                details[name[start:]] = Details(size=info["size"], age_s=age_s)
        return details

    def age_s(self, path: str) -> float | None:
        """Seconds since the object was written; None if there is none."""
        full = self._full(path)
        with self._explained("look up", path):
            try:
                modified = self._fs.modified(full)
            except FileNotFoundError:
                return None
        if modified.tzinfo is None:
            modified = modified.replace(tzinfo=datetime.UTC)
        return (datetime.datetime.now(datetime.UTC) - modified).total_seconds()

    def delete(self, path: str) -> None:
        """Removes one object. Idempotent."""
        full = self._full(path)
        with self._explained("delete", path), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(full)

    def delete_folder(self, prefix: str) -> None:
        """Removes all objects under the folder `prefix`. Idempotent."""
        full = self._full(prefix)
        with self._explained("delete", prefix), contextlib.suppress(FileNotFoundError):
            self._fs.rm(full, recursive=True)

    @contextlib.contextmanager
    def by_ranges(self, path: str, size: int) -> Iterator[BinaryIO]:
        """The object, of `size` bytes, as a file of which only what is asked for is read.

        Of an object store, each `read` is a request.
        """
        full = self._full(path)
        options = {} if self.is_local else {"cache_type": "none", "size": size}
        with self._explained("read", path), self._fs.open(full, "rb", **options) as file:
            yield file

    @contextlib.contextmanager
    def local_copy(self, path: str) -> Iterator[Path]:
        """The object as a local file inside the block: itself, or a temporary copy."""
        full = self._full(path)
        if self.is_local:
            if not os.path.isfile(full):
                raise StorageError(f"{self.url}/{path} is missing: it was deleted or never written")
            yield Path(full)
            return
        with scratch_folder() as folder:
            local = Path(folder) / "object"
            with self._explained("read", path):
                self._fs.get_file(full, str(local))
            yield local

    @property
    def _fs_and_root(self) -> tuple[Any, str]:
        # fsspec caches its instances, so this is cheap, and a Store pickles as plain data.
        options = dict(self.storage_options)
        if not self.url.startswith("/") and "://" in self.url:
            # Other workers write at the same time: a cached listing would hide their commits.
            options.setdefault("use_listings_cache", False)
        try:
            return open_place(self.url, **options)
        except ValueError as error:
            raise StorageError(
                f"cannot open the store {self.url}: {error}; give a local path or s3://bucket/prefix"
            ) from error

    @property
    def _fs(self) -> Any:
        return self._fs_and_root[0]

    @property
    def _root(self) -> str:
        return self._fs_and_root[1]

    def _full(self, path: str) -> str:
        return f"{self._root.rstrip('/')}/{_relative(path)}"

    def _create_remote(self, full: str, data: bytes) -> bool:
        for _ in range(CREATE_ATTEMPTS):
            try:
                self._fs.pipe_file(full, data, mode="create")
            except FileExistsError:
                return False
            except OSError as error:
                code = service_code(error)
                if code == "PreconditionFailed":  # stores that leave out the Condition element
                    return False
                if code == "ConditionalRequestConflict":  # a concurrent write: retry
                    continue
                raise
            return True
        raise TimeoutError(f"{full}: the store kept answering ConditionalRequestConflict")

    @contextlib.contextmanager
    def _explained(self, action: str, path: str) -> Iterator[None]:
        try:
            yield
        except store_errors() as error:
            place = f"{self.url}/{path}" if path else self.url
            raise _explain(error, f"cannot {action} {place}") from error


def is_unfinished(path: str) -> bool:
    """Whether `path` is an unfinished local file."""
    return path.rpartition("/")[2].startswith(TEMPORARY)


def check_conditional_create(store: Store) -> None:
    """Checks that `create` is exclusive in this store; call it once before a job.

    Raises:
        StorageError: the store ignores conditional writes (some S3 look-alikes do), so that two
            workers could commit the same shard; or nothing can be written at all.
    """
    path = f"_probe/{secrets.token_hex(8)}"
    try:
        store.create(path, b"first")
        second = store.create(path, b"second")
        kept = store.read(path)
    except StorageError:
        with contextlib.suppress(StorageError):  # the first one says what is wrong
            store.delete(path)
        raise
    store.delete(path)
    # Not the first result: if its answer is lost, the client's retry finds the object present.
    if second or kept != b"first":
        raise StorageError(
            f"{store.url} ignores conditional writes (If-None-Match): a second create of an object "
            "replaced the first, so two workers could commit the same shard; use AWS S3, a store "
            "that supports them, or a folder"
        )


def _relative(path: str) -> str:
    parts = path.split("/")
    if not path or "\\" in path or "\0" in path or any(part in ("", ".", "..") for part in parts):
        raise StorageError(f"a path in a store must be relative, without '..', found {path!r}")
    return path


@contextlib.contextmanager
def _partial(full: str) -> Iterator[str]:
    """A free name beside `full` for the unfinished file, which is always removed afterwards."""
    folder, name = os.path.split(full)
    os.makedirs(folder, exist_ok=True)
    partial = os.path.join(folder, f"{TEMPORARY}{secrets.token_hex(6)}-{name}")
    try:
        yield partial
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)


def _create_local(full: str, data: bytes) -> bool:
    with _partial(full) as partial:
        _write_synced(partial, data)
        try:
            os.link(partial, full)  # atomic; fails if `full` exists
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP):
                raise StorageError(
                    f"{full}: this file system has no hard links, which exclusive creation needs; "
                    "choose a folder on another file system or an object store"
                ) from error
            raise
        _sync_folder(full)
        return True


def _write_synced(path: str, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        _sync(file)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(full: str) -> None:
    descriptor = os.open(os.path.dirname(full), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explain(error: Exception, what: str) -> Exception:
    found = f"{what}: {error or type(error).__name__}"
    if remedy := lasting_remedy(error):
        return StorageError(f"{found}; {remedy}")
    if isinstance(error, OSError):
        return error
    return ConnectionError(f"{found}; check the endpoint and the network")
