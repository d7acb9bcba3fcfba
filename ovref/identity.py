"""Keys, seeds and fingerprints: identity comes from content, never from position or worker."""

import dataclasses
import hashlib
import json
import unicodedata
from typing import Any

KEY_BITS = 96

ADDED_LATER = {"fingerprint": "unless default"}
"""Metadata of a dataclass field that was added after fingerprints of its class had been stored. At
its default, which must preserve the earlier behaviour, it is left out of fingerprints."""


def record_key(corpus_id: str, caption: str, draw: int = 0, image: str | None = None) -> str:
    """Key of one draw of a caption: 24 hexadecimal digits.

    If a caption has an image, `image`, its SHA-256, is part of the key, because many images may
    have the same caption. Unicode normal form and outer or repeated white space do not matter.
    """
    content = [corpus_id, normalised(caption), draw]
    return _digest(content if image is None else [*content, image])[: KEY_BITS // 4]


def record_seed(run_seed: int, key: str) -> int:
    """Seed of one record's random generator, in [0, 2**63)."""
    return int(_digest([run_seed, key])[:16], 16) >> 1


INVISIBLE = dict.fromkeys(map(ord, "\u00ad\u200b\u2060\ufeff"))
"""Soft hyphen, zero-width space, word joiner, byte order mark: captions from web pages have them,
and they would make different words. Joiners that emoji and some scripts need are kept."""


def normalised(caption: str) -> str:
    """NFC, without INVISIBLE characters, outer white space and repeated white space."""
    return " ".join(unicodedata.normalize("NFC", caption.translate(INVISIBLE)).split())


def fingerprint(value: Any) -> str:
    """SHA-256 over the canonical form of `value`: 64 hexadecimal digits.

    Accepts None, bool, int, finite float, str, list, tuple, dict with str keys, and dataclasses of
    these.

    Raises:
        TypeError: a value of another type.
        ValueError: a float that is not finite.
    """
    return _digest(canonical(value))


def spec_identity(spec: Any) -> dict[str, Any]:
    """A stage's part of the fingerprint of its step: name, version and fields."""
    return {"name": spec.name, "version": spec.version, "fields": canonical(spec)}


def canonical(value: Any) -> Any:
    """Converts `value` to the JSON types that `fingerprint` hashes. Raises like `fingerprint`."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            raise ValueError(f"a fingerprint needs finite numbers, found {value}")
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: canonical(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if field.metadata != ADDED_LATER or getattr(value, field.name) != field.default
        }
    if isinstance(value, list | tuple):
        return [canonical(item) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: canonical(item) for key, item in value.items()}
    raise TypeError(f"{type(value).__name__} has no canonical form to fingerprint: {value!r}")


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def changes(found: Any, wanted: Any, path: str = "") -> list[str]:
    """Describes the differences of two canonical values: `a.b was 1 and is now 2`."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        pairs = [(key, found.get(key, _ABSENT), wanted.get(key, _ABSENT)) for key in found | wanted]
    elif isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        pairs = [(str(i), *pair) for i, pair in enumerate(zip(found, wanted, strict=True))]
    else:
        different = type(found) is not type(wanted) or found != wanted
        return [f"{path} was {_shown(found)} and is now {_shown(wanted)}"] if different else []
    return [
        change
        for key, old, new in pairs
        for change in changes(old, new, f"{path}.{key}" if path else key)
    ]


_ABSENT = object()
LONGEST_SHOWN = 300
"""Maximum length of a value in a message: a class list may be very long."""


def _shown(value: Any) -> str:
    text = "absent" if value is _ABSENT else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 3]}..."
