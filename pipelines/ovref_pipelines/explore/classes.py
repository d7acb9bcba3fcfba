"""Pasted lists of classes, and how well a collection covers them."""

from dataclasses import asdict
from functools import partial
from typing import Any

from ovref.class_files import names_of
from ovref.errors import InputError
from ovref.exchange.class_lists import Classes, classes_of
from ovref.exchange.coverage import coverage as of_classes
from ovref_pipelines.explore.library import Library
from ovref_pipelines.verbs.reference_images import each_picture

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
        if names := names_of(line.strip(", ")):
            found.setdefault(names[0], names)
    if not 1 <= len(found) <= MOST:
        raise InputError(f"give 1 to {MOST} classes, one a line, found {len(found)}")
    return classes_of(tuple(found.values()), "the list")


def coverage(
    library: Library, classes: Classes, *, measured: bool, clip: bool = False
) -> list[dict[str, Any]]:
    """For each class what stands for it, the weakest first; see `ovref.exchange.coverage`.

    Args:
        clip: whether CLIP is asked about the images of references; needs `measured`.

    Raises:
        ModelError: the collection's encoder, needed for classes that are not nouns and for `clip`,
            cannot be loaded.
        InputError: `clip`, and the images are not here.
    """
    build = str(library.build.store.url) if library.build else None
    pictures = partial(each_picture, library.collection_url, build=build) if clip else None
    found = of_classes(library.open().collection, classes, measured=measured, pictures=pictures)
    return [
        {name: round(value, 4) if isinstance(value, float) else value
         for name, value in asdict(row).items()}
        | {"count": row.references, "confusable": row.confusable}
        for row in found
    ]  # fmt: skip
