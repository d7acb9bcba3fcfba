"""Pasted lists of classes, and how well a collection covers them."""

from dataclasses import asdict
from typing import Any

from ovref.class_files import SYNONYMS
from ovref.errors import InputError
from ovref.exchange.class_lists import Classes, classes_of
from ovref.exchange.coverage import coverage as of_classes
from ovref_inference import ReferenceCollection

MOST = 2000
"""Maximum number of classes in a list."""


def pasted_classes(text: str) -> Classes:
    """The classes of a pasted list: one a line, or with commas between them, synonyms after `;`;
    each once.

    Raises:
        InputError: there are none or more than `MOST`.
    """
    lines = text.splitlines() if "\n" in text.strip() else text.split(",")
    found: dict[str, tuple[str, ...]] = {}
    for line in lines:
        names = [name.strip(" ,\t\r\n") for name in line.split(SYNONYMS)]
        if names := list(filter(None, names)):
            found.setdefault(names[0], tuple(names))
    if not 1 <= len(found) <= MOST:
        raise InputError(f"give 1 to {MOST} classes, one a line, found {len(found)}")
    return classes_of(tuple(found.values()), "the list")


def coverage(
    collection: ReferenceCollection, classes: Classes, *, measured: bool
) -> list[dict[str, Any]]:
    """For each class what stands for it, the weakest first; see `ovref.exchange.coverage`.

    Raises:
        ModelError: the collection's text encoder, needed for classes that are not nouns, cannot be
            loaded.
    """
    return [
        {name: round(value, 4) if isinstance(value, float) else value
         for name, value in asdict(row).items()}
        | {"count": row.references, "confusable": row.confusable}
        for row in of_classes(collection, classes, measured=measured)
    ]  # fmt: skip
