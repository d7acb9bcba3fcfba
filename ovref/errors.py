"""The errors of building, chosen by what the caller can do about them.

    OvrefError
    |-- ConfigError       fix the configuration (unknown key, wrong type, value out of range)
    |-- InputError        fix the input (missing, unreadable or changed corpus)
    |-- MismatchError     the output belongs to another configuration: choose another folder
    |-- StorageError      fix the storage (full disk, credentials, no conditional create)
    |-- ModelError        fix a model's id, revision, path or files
    |-- CollectionError   fix or replace a collection
    `-- AccountingError   a shard's inputs are not all answered: a bug in a stage

The root, `ModelError` and `CollectionError` are those of the light half. One bad record among
millions is not an error but a `ovref.contract.Dropped` with its reason.
"""

from ovref_inference.errors import CollectionError, ModelError, OvrefError

__all__ = [
    "AccountingError",
    "CollectionError",
    "ConfigError",
    "InputError",
    "MismatchError",
    "ModelError",
    "OvrefError",
    "StorageError",
]


class ConfigError(OvrefError):
    """The configuration is wrong; the message names the field."""


class InputError(OvrefError):
    """A corpus or other input is missing, unreadable or has changed since the build began."""


class MismatchError(OvrefError):
    """A folder was written under another fingerprint than the one asked for."""


class StorageError(OvrefError):
    """A write or read of the store failed in a way that a retry does not fix."""


class AccountingError(OvrefError):
    """A stage did not answer each of its inputs exactly once; the shard is not committed."""
