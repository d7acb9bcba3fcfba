"""Temporary folders, and the removal of those whose process was killed.

A killed worker cannot clean up, and over days its downloads would fill the disk. So a process holds
a lock on each of its folders, which is released when it ends, and a process that starts on the
machine removes the unlocked folders.
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
"""Age below which an unlocked folder is kept, because it may not be locked yet."""


def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """A new temporary folder, for the time of a `with` block or until `cleanup`."""
    folder = tempfile.TemporaryDirectory(prefix=PREFIX)
    descriptor = os.open(folder.name, os.O_RDONLY)
    weakref.finalize(folder, os.close, descriptor)
    # On a file system without locks, removal cannot acquire its lock either.
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    return folder


def remove_abandoned() -> None:
    """Removes the temporary folders of processes of this machine that have ended."""
    for entry in os.scandir(tempfile.gettempdir()):
        if NAME.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
            with contextlib.suppress(OSError):  # in use, removed meanwhile, or another user's
                _remove_unless_held(entry.path)


def _remove_unless_held(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if time.time() - os.fstat(descriptor).st_mtime >= FRESH_SECONDS:
            shutil.rmtree(folder)
    finally:
        os.close(descriptor)
