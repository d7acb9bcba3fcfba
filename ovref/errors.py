"""Errors of the builder, by what the caller can do about them.

    OvrefError
    |-- ConfigError       fix the configuration (unknown key, wrong type, value out of range)
    |-- InputError        fix the input (missing, unreadable or changed corpus)
    |-- MismatchError     the output belongs to another configuration: choose another folder
    |-- StorageError      fix the storage (full disk, credentials, no conditional create)
    |-- ModelError        fix a model's id, revision, path or files
    |-- CollectionError   fix or replace a collection
    `-- AccountingError   a shard's inputs are not all answered: a bug in a stage

`OvrefError`, `ModelError` and `CollectionError` are those of `ovref_inference`. One bad record
among millions is not an error but an `ovref.contract.Dropped` with a reason.
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
    """The configuration is invalid; the message names the field."""


class InputError(OvrefError):
    """A corpus or other input is missing, unreadable or has changed since the build began."""


class MismatchError(OvrefError):
    """A folder was written with a fingerprint other than the requested one."""


class StorageError(OvrefError):
    """A read or write of a store failed in a way that a retry does not fix."""


class AccountingError(OvrefError):
    """A stage did not answer each of its inputs exactly once; the shard is not committed."""
