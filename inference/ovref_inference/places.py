"""Opens places with fsspec (local folders, object stores) and words their errors.

The callers (a collection, a build's store, a corpus) wrap these messages in their own error types.
"""

import errno
import hashlib
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from ovref_inference.errors import MissingPackageError
from ovref_inference.lazy import missing_package

LOCAL_PROTOCOLS = ("file", "local")
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
S3_CONNECTIONS = 48
"""At a time, unless the options of an S3 file system say another number; botocore's is 10."""
NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound")


def open_place(place: str, **options: Any) -> tuple[Any, str]:
    """fsspec's file system of a path or URL, and the path on it.

    Raises:
        MissingPackageError: the package for the protocol is not installed; the message says how to
            get it.
        ValueError: the protocol is unknown, or an option is wrong.
    """
    if place.startswith(("s3://", "s3a://")):
        more = {"max_pool_connections": S3_CONNECTIONS} | (options.get("config_kwargs") or {})
        options = options | {"config_kwargs": more}
    try:
        return fsspec.core.url_to_fs(place, **options)
    except ImportError as error:
        # fsspec's own message does not name the missing package.
        cause = error if isinstance(error, ModuleNotFoundError) else error.__cause__
        if not isinstance(cause, ModuleNotFoundError):
            raise MissingPackageError(f"{place} cannot be opened: {error}") from error
        known = missing_package(cause, place)
        if isinstance(known, MissingPackageError):
            raise known from error
        name = (cause.name or "").partition(".")[0]
        raise MissingPackageError(
            f"{place} needs {name}, which is not installed: pip install {name}"
        ) from error


def is_local(fs: Any) -> bool:
    """Whether a file system is on local or mounted disks."""
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    return any(protocol in LOCAL_PROTOCOLS for protocol in protocols)


def store_errors(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """The exceptions that reading and writing may raise, and `more`.

    Errors of botocore and of HTTP clients are not OSErrors; they are added if those are loaded.
    """
    found: list[type[Exception]] = [OSError, *more]
    for module, names in (
        ("botocore.exceptions", ("BotoCoreError", "ClientError")),
        ("aiohttp", ("ClientError",)),
        ("httpx", ("HTTPError",)),
        ("httpx2", ("HTTPError",)),
    ):
        if (loaded := sys.modules.get(module)) is not None:
            found += [getattr(loaded, name) for name in names]
    return tuple(found)


def service_code(error: BaseException) -> str:
    """The S3 error code behind an error of s3fs, or an empty string."""
    response = getattr(error.__cause__, "response", None) or getattr(error, "response", None) or {}
    return response.get("Error", {}).get("Code", "")


def lasting_remedy(error: Exception) -> str:
    """What to do about an error that a retry cannot fix; empty if a retry may help."""
    if service_code(error) == "NoSuchBucket":
        return "there is no such bucket: create it or correct the URL"
    if type(error).__name__ in NO_CREDENTIALS:
        return "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or a role"
    if isinstance(error, PermissionError):
        return "check the permissions of the folder or the credentials"
    if isinstance(error, FileNotFoundError):
        return "it was deleted or never written"
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        return "the disk or quota is full: free space and start again"
    if isinstance(error, OSError) and error.errno == errno.EROFS:
        return "the file system is mounted read-only"
    if isinstance(error, NotADirectoryError | IsADirectoryError | FileExistsError):
        return "a file stands where a folder is needed, or the reverse"
    return ""


def describe(error: Exception) -> str:
    """The message of a store's error, with a remedy if one is known."""
    remedy = lasting_remedy(error)
    if not remedy and (isinstance(error, ConnectionError) or not isinstance(error, OSError)):
        remedy = "check the network, the address and the credentials"
    return (str(error) or type(error).__name__) + (f"; {remedy}" if remedy else "")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name beside `path` for a new file, which takes its place at the end of the block; one that
    fails leaves nothing. Raises OSError."""
    scratch = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield scratch
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's bytes, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
