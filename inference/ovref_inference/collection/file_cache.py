"""Local copies of a remote collection's files, each named by its content."""

import os
import sys
from pathlib import Path
from typing import Any

from ovref_inference.collection import format as fmt
from ovref_inference.errors import CollectionError
from ovref_inference.places import describe, sha256_of, store_errors, whole_file

SMALL_BYTES = 8 << 20
"""Size up to which checksums are always compared."""


def cache_folder() -> Path:
    """$OVREF_CACHE, or ovref's folder in the platform's cache folder."""
    if os.environ.get("OVREF_CACHE"):
        return Path(os.environ["OVREF_CACHE"])
    if sys.platform == "win32" and os.environ.get("LOCALAPPDATA"):
        return Path(os.environ["LOCALAPPDATA"], "ovref", "cache")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "ovref"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "ovref")


def cached(fs: Any, source: str, info: fmt.FileInfo, cache: str | Path | None, full: bool) -> Path:
    """The copy of a remote file, made if it is missing or damaged.

    Raises:
        CollectionError: the file is missing, or not the one that the manifest names.
    """
    folder = Path(cache) if cache is not None else cache_folder()
    path = folder / f"{info.sha256}-{info.path}"
    if path.exists() and problem_of(path, info, full=full) is None:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    advice = "open the collection again if it is being published just now, or else publish it again"
    try:
        with whole_file(path) as scratch:
            fs.get_file(source, str(scratch))
            if problem := problem_of(scratch, info, full=True):
                raise CollectionError(f"{source} {problem}; {advice}")
    except FileNotFoundError as error:
        raise CollectionError(f"{source} is missing; {advice}") from error
    except store_errors() as error:
        raise CollectionError(f"cannot copy {source} to {folder}: {describe(error)}") from error
    return path


def problem_of(path: Path, info: fmt.FileInfo, full: bool) -> str | None:
    """What is wrong with a local file, or None."""
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != info.bytes:
        return f"has {size} bytes, the manifest says {info.bytes}: it is truncated or another file"
    if (full or size <= SMALL_BYTES) and sha256_of(path) != info.sha256:
        return "does not have the checksum that the manifest says: it was changed or damaged"
    return None
