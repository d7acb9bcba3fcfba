"""Runs a chain of stages over one shard: read, apply, account, commit."""

from collections.abc import Sequence

from ovref.contract import Stage
from ovref.storage.steps import Commit, StepFolder


def run_shard(
    stages: Sequence[Stage], source: StepFolder, target: StepFolder, shard: str, attempt: int = 0
) -> Commit:
    """Reads `shard` of `source`, applies the stages in turn, commits the same name in `target`.

    Records flow one by one; a `Dropped` passes the later stages untouched. A shard that `target`
    has already is not run again: its marker is returned.

    Raises:
        AccountingError: a stage left an input unanswered, answered an unknown key, or answered
            with one key twice. Nothing is committed.
        StorageError: the source shard is damaged, or the target cannot be written (full disk).
        Exception: whatever a stage raises; nothing is committed.
    """
    raise NotImplementedError
