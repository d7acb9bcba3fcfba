"""Lists of classes with synonyms, and their text files."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import fsspec

from ovref.errors import InputError
from ovref.identity import fingerprint

SYNONYMS = ";"
"""Separator of the names of a class in a text file, as in CorrCLIP's lists."""


@dataclass(frozen=True, kw_only=True)
class ClassList:
    """Class names of a data set, in the order of its labels."""

    name: str
    """Name of the list (`mmseg`, `fcclip`, `corrclip`, ...) or path of the user's file."""
    source: str
    """Repository and file that the names were taken from."""
    classes: tuple[tuple[str, ...], ...]
    """Names of each class, its own first; the score of a class is the maximum over its names."""

    @property
    def names(self) -> tuple[str, ...]:
        """The first name of each class."""
        return tuple(names[0] for names in self.classes)

    def query_names(self) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """All distinct names, and the class of each; a shared name belongs to the first class."""
        owners: dict[str, int] = {}
        for number, names in enumerate(self.classes):
            for name in names:
                owners.setdefault(name, number)
        return tuple(owners), tuple(owners.values())

    @property
    def fingerprint(self) -> str:
        """Hash of all names in order: 16 hexadecimal digits."""
        return fingerprint([list(names) for names in self.classes])[:16]


def names_of(text: str) -> tuple[str, ...]:
    """The names of a class in a line of text, separated by SYNONYMS."""
    return tuple(name.strip() for name in text.split(SYNONYMS) if name.strip())


def lines_of_file(path: str | Path, what: str) -> list[str]:
    """The lines of a UTF-8 text file, local or a URL; `what` names it in the error.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with fsspec.open(str(path), "rt", encoding="utf-8-sig") as file:  # no byte-order mark
            return list(file.read().splitlines())
    except (OSError, ValueError, ImportError) as error:
        advice = "; save it as UTF-8 text" if isinstance(error, UnicodeDecodeError) else ""
        raise InputError(f"cannot read the {what} {path}: {error}{advice}") from error


def list_of_file(path: str | Path, count: int | None = None) -> ClassList:
    """Reads a class list: UTF-8 text, one class per line, its names separated by SYNONYMS.

    Args:
        path: the file, local or a URL.
        count: expected number of classes; None accepts any, at least one.

    Raises:
        InputError: the file cannot be read, has another number of classes or numbers before their
            names, or its classes are not distinct (`check_distinct`).
    """
    lines = lines_of_file(path, "class list")
    classes = [names_of(line) for line in lines if line.strip(f"{SYNONYMS} \t")]
    if not classes:
        raise InputError(f"{path} has no class; give one per line")
    if count is not None and len(classes) != count:
        raise InputError(
            f"{path} has {len(classes)} classes, the data set {count}; give one class per line, "
            f"its synonyms separated by {SYNONYMS!r}"
        )
    numbers = [re.match(r"\s*(\d+)\s*[.:,;\s]\s*\S", line) for line in lines]
    found = [int(number[1]) for number in numbers if number]
    if len(found) == len(classes) > 1 and found in (
        list(range(len(found))), list(range(1, len(found) + 1))
    ):  # fmt: skip
        raise InputError(
            f"{path} numbers its classes ({lines[0]!r}): give the names alone, one class per line, "
            "in the order of the labels; a class whose name is its number has a synonym before it"
        )
    check_distinct(classes, str(path))
    return ClassList(name=str(path), source=str(path), classes=tuple(classes))


def check_distinct(classes: Sequence[Sequence[str]], place: str) -> None:
    """Checks that each class has a name of its own, ignoring case and Unicode's forms.

    Args:
        classes: the names of each class, its own first.
        place: the list, for messages.

    Raises:
        InputError: two classes have the same first name; or all names of a class are of earlier
            ones, so that it could never be predicted.
    """
    first: dict[str, int] = {}
    owners: dict[str, int] = {}
    for number, names in enumerate(classes):
        same = [unicodedata.normalize("NFC", name).casefold() for name in names]
        earlier = first.setdefault(same[0], number)
        if earlier != number:
            raise InputError(
                f"{place} has the class {names[0]!r} twice, ignoring case: classes {earlier + 1} "
                f"and {number + 1}"
            )
        taken = [owners.setdefault(name, number) for name in same]
        if number not in taken:
            raise InputError(
                f"{place} gives all names of class {number + 1}, {names[0]!r}, to earlier classes "
                f"({classes[taken[0]][0]!r}), ignoring case: no pixel could be of it"
            )
