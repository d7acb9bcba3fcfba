"""Keys, seeds and fingerprints: identity comes from content, never from position or worker."""

import dataclasses
import hashlib
import json
import unicodedata
from typing import Any

KEY_BITS = 96

ADDED_LATER = {"fingerprint": "unless default"}
"""Metadata of a dataclass field that was added when fingerprints of its class were already written:
at its default, which must do what was done before, it is left out of them."""


def record_key(corpus_id: str, caption: str, draw: int = 0, image: str | None = None) -> str:
    """Key of one draw of one caption: 24 hexadecimal digits.

    Of a caption that comes with its image, the image's SHA-256 (`image`) is part of what it is:
    the same words tell of many images.

    Captions that differ only in Unicode normal form or in outer or repeated white space are the
    same caption.
    """
    content = [corpus_id, normalised(caption), draw]
    return _digest(content if image is None else [*content, image])[: KEY_BITS // 4]


def record_seed(run_seed: int, key: str) -> int:
    """Seed of one record's random generator, in [0, 2**63)."""
    return int(_digest([run_seed, key])[:16], 16) >> 1


INVISIBLE = dict.fromkeys(map(ord, "\u00ad\u200b\u2060\ufeff"))
"""Soft hyphen, zero-width blank, word joiner, byte order mark: captions from web pages have them,
and a word with one in it is another word. The joiners that emoji and some scripts need stay."""


def normalised(caption: str) -> str:
    """NFC without INVISIBLE, with every run of white space made one blank and none at the ends."""
    return " ".join(unicodedata.normalize("NFC", caption.translate(INVISIBLE)).split())


def fingerprint(value: Any) -> str:
    """SHA-256 over the canonical form of `value`: 64 hexadecimal digits.

    Accepted are None, bool, int, finite float, str, list, tuple, dict with str keys, and
    dataclasses of these; anything else has no canonical form.

    Raises:
        TypeError: for a value without a canonical form.
        ValueError: for a float that is not finite.
    """
    return _digest(canonical(value))


def spec_identity(spec: Any) -> dict[str, Any]:
    """What a stage's spec adds to the fingerprint of its step: name, version and fields."""
    return {"name": spec.name, "version": spec.version, "fields": canonical(spec)}


def canonical(value: Any) -> Any:
    """`value` in the plain JSON types that `fingerprint` hashes. Raises like `fingerprint`."""
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
    """Where two canonical values differ, as text for people: `a.b was 1 and is now 2`."""
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
"""Characters of a value in a message: a list of classes may have thousands."""


def _shown(value: Any) -> str:
    text = "absent" if value is _ABSENT else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 3]}..."
