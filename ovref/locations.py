"""Canonical forms of user-given locations: local paths, and URLs of object stores."""

import dataclasses
import os
from typing import Any

import fsspec

from ovref.errors import ConfigError
from ovref_inference.places import LOCAL_PROTOCOLS


def absolute(place: str, name: str = "place") -> str:
    """The location in a form that is the same from every folder, without a trailing slash.

    Local paths become absolute, with `~` expanded and without `file://`; URLs stay unchanged.

    Args:
        name: name of the setting or argument, for the message.

    Raises:
        ConfigError: the text is empty, contains `::` (which chains locations in fsspec), or is a
            URL with an unknown protocol.
    """
    if not place.strip():
        raise ConfigError(f"{name} must name a folder or URL, found an empty string")
    if "::" in place:
        raise ConfigError(f"{name} must be one place, found {place!r}: '::' joins several")
    protocol, separator, path = place.partition("://")
    if not separator or protocol in LOCAL_PROTOCOLS:
        return os.path.abspath(os.path.expanduser(path if separator else place))
    if protocol not in fsspec.available_protocols():
        raise ConfigError(
            f"{name}: unknown protocol {protocol}:// in {place!r}; give a local path or a URL such "
            "as s3://bucket/prefix"
        )
    return place.rstrip("/")


def absolute_local(place: str, name: str = "place") -> str:
    """Like `absolute`, for what must be a file or folder on this machine.

    Raises:
        ConfigError: see `absolute`; or the location is a URL.
    """
    found = absolute(place, name)
    if "://" in found:
        raise ConfigError(f"{name} must be on this machine, found {place!r}")
    return found


def is_relative(place: str) -> bool:
    """Whether a location depends on the current folder."""
    return "://" not in place and not os.path.isabs(place)


def with_absolute_models(spec: Any, folder: str | None = None) -> Any:
    """A copy of a stage's spec in which relative paths of models, as seen from `folder` (the
    current one if None), are absolute. Ids, and paths that do not exist, stay unchanged."""
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if dataclasses.is_dataclass(value):
            changed[field.name] = with_absolute_models(value, folder)
        elif field.name in ("model", "tagger") and is_relative(value):
            path = os.path.join(folder or os.getcwd(), os.path.expanduser(value))
            if os.path.exists(path):
                changed[field.name] = os.path.normpath(path)
    return dataclasses.replace(spec, **changed)
