"""Temporary folders, and the removal of those whose process was killed.

A worker that is killed cannot tidy up: over days, what each had fetched would fill the disk. So a
process holds a lock on each of its folders, which ends with it, and whoever begins to work on the
machine removes the folders that nobody holds.
"""

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
import time
import weakref

PREFIX = "ovref-scratch-"
NAME = re.compile(re.escape(PREFIX) + "[a-z0-9_]{8}")
FRESH_SECONDS = 60.0
"""A folder in which something was just made is left alone: it may not be locked yet."""


def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """A new temporary folder, for the time of a `with` block or until `cleanup`."""
    folder = tempfile.TemporaryDirectory(prefix=PREFIX)
    descriptor = os.open(folder.name, os.O_RDONLY)
    weakref.finalize(folder, os.close, descriptor)
    # Where there are no locks nobody gets the one that removing asks for either.
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    return folder


def remove_abandoned() -> None:
    """Removes the temporary folders of processes of this machine that are gone."""
    for entry in os.scandir(tempfile.gettempdir()):
        if NAME.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
            with contextlib.suppress(OSError):  # in use, gone, or somebody else's
                _remove_unless_held(entry.path)


def _remove_unless_held(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if time.time() - os.fstat(descriptor).st_mtime >= FRESH_SECONDS:
            shutil.rmtree(folder)
    finally:
        os.close(descriptor)
