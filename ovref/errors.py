"""The few errors ovref raises, chosen by what the caller can do about them.

    OvrefError
    |-- ConfigError       fix the configuration (unknown key, wrong type, value out of range)
    |-- InputError        fix the input (missing, unreadable or changed corpus)
    |-- MismatchError     the output belongs to another configuration: choose another folder
    |-- StorageError      fix the storage (full disk, credentials, no conditional create)
    |-- ModelError        a model cannot be loaded: fix its id, revision, path or files
    `-- AccountingError   a shard's inputs are not all answered: a bug in a stage

`ovref_inference.CollectionError` (a collection that is missing, cut off or foreign) lives in the
light half, which may not import this module. One bad record among millions is not an error but a
`ovref.contract.Dropped` with its reason.
"""


class OvrefError(Exception):
    """Root of the errors that ovref raises on purpose."""


class ConfigError(OvrefError):
    """The configuration is wrong; the message names the field."""


class InputError(OvrefError):
    """A corpus or other input is missing, unreadable or has changed since the build began."""


class MismatchError(OvrefError):
    """A folder was written under another fingerprint than the one asked for."""


class StorageError(OvrefError):
    """A write or read of the store failed in a way that trying again does not mend."""


class ModelError(OvrefError):
    """A model cannot be loaded."""


class AccountingError(OvrefError):
    """A stage did not answer each of its inputs exactly; the shard is not committed."""
