"""How a job ends early, besides the errors of `ovref.errors`, and the command's exit codes."""

from ovref_inference.errors import OvrefError

FAILED, MEND_FIRST, STOPPED, READER_GONE = 1, 2, 130, 141
"""Exit codes of the command `ovref`; its help says what each means."""


class JobError(OvrefError):
    """Too many shards or workers failed for the job to go on."""


class StoppedError(BaseException):
    """The job was asked to stop; what is committed stays.

    Like KeyboardInterrupt not an Exception: a second signal arrives in the middle of a stage, where
    it must not be taken for an error of the shard.
    """
