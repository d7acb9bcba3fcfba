"""How well a collection covers a list of classes."""

from typing import Any

import numpy as np

from ovref.errors import InputError
from ovref.exchange.class_lists import Classes
from ovref.exchange.coverage import coverage as of_classes
from ovref_inference import ReferenceCollection

MOST = 2000
"""Maximum number of classes in a list."""


def class_names(text: str) -> list[str]:
    """The classes of a pasted list: one per line or separated by commas, without duplicates.

    Raises:
        InputError: there are none or more than `MOST`.
    """
    lines = text.splitlines() if "\n" in text.strip() else text.split(",")
    stripped = (line.strip(" ,\t\r\n") for line in lines)
    names = list(dict.fromkeys(name for name in stripped if name))
    if not 1 <= len(names) <= MOST:
        raise InputError(f"give 1 to {MOST} classes, one per line, found {len(names)}")
    return names


def coverage(collection: ReferenceCollection, names: list[str]) -> list[dict[str, Any]]:
    """Coverage of each class, the weakest first; see `ovref.exchange.coverage`.

    Raises:
        ModelError: the collection's text encoder, needed for classes that are not nouns, cannot be
            loaded.
    """
    classes = Classes(names=tuple(names), query_names=tuple(names), class_of=np.arange(len(names)))
    return [
        {
            "name": row.name, "verdict": row.verdict, "noun": row.noun, "count": row.references,
            "cosine": round(row.cosine, 3),
        }
        for row in of_classes(collection, classes, measured=False)
    ]  # fmt: skip
