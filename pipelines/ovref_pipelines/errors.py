"""Errors that end a job early, besides those of `ovref.errors`, and the exit codes."""

from ovref_inference.errors import OvrefError

FAILED, MEND_FIRST, STOPPED, READER_GONE = 1, 2, 130, 141
"""Exit codes of the command `ovref`, explained in its help."""


class JobError(OvrefError):
    """Too many shards or workers failed."""


class StoppedError(BaseException):
    """The job was asked to stop; committed shards stay.

    Like KeyboardInterrupt not an Exception: a second signal arrives inside a stage, where it must
    not be treated as an error of the shard.
    """
