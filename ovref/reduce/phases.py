"""Listed, restartable phases: each has a folder, which appears whole or not at all.

A phase writes into `<name>.partial` and ends by renaming it to `<name>`. So a folder that is there
is complete, and after a kill the next run repeats the phase that was under way and no other.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

SUMMARY = "summary.json"

Report = Callable[[str, int, int], None]
"""Called with the phase's name, the work done and the work there is; for progress bars."""


def run_phase(work: Path, name: str, phase: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """The summary of the phase `name`, run now unless it has been run before.

    Args:
        work: the folder of this reduction; another configuration has another folder.
        phase: gets an empty folder to write into and returns plain JSON values.
    """
    done = work / name
    if not done.exists():
        partial = work / f"{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        summary = phase(partial)
        text = json.dumps(summary, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
        (partial / SUMMARY).write_text(text + "\n", encoding="utf-8")
        _sync_files(partial)
        os.replace(partial, done)
    return json.loads((done / SUMMARY).read_text(encoding="utf-8"))


def _sync_files(folder: Path) -> None:
    """The rename must not reach the disk before the content does."""
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
