"""The errors that ovref raises on purpose, chosen by what the caller can do about them.

    OvrefError
    |-- CollectionError   a collection is missing, truncated, foreign or of another format version
    |-- ModelError        a model cannot be loaded or used: fix its id, revision, path or files
    |-- MissingPackageError   an extra of ovref is not installed: the message has the pip command
    `-- ...               the errors of building: `ovref.errors`

A single bad query is a ValueError.
"""


class OvrefError(Exception):
    """Root of the errors that ovref raises on purpose."""


class CollectionError(OvrefError):
    """A reference collection is missing, truncated, foreign or of another format version."""


class ModelError(OvrefError):
    """A model cannot be loaded or used: its id, revision, path or files are wrong."""


class MissingPackageError(OvrefError, ImportError):
    """A package of one of ovref's extras is not installed."""
