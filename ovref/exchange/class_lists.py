"""Class lists from the command line: words, a file, or the name of a published list."""

import re
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np

from ovref.class_files import list_of_file, names_of
from ovref.errors import InputError
from ovref.evaluation.named_sets.bundled_classes import bundled_list
from ovref.evaluation.named_sets.definitions import SETS


@dataclass(frozen=True, kw_only=True)
class Classes:
    """Classes and their synonyms. A segmenter is queried with all names; each name counts for its
    class."""

    classes: tuple[tuple[str, ...], ...]
    """(c,) names of each class, its own first; no name is of two classes."""
    things: frozenset[int] | None = None
    """Classes that are things; None if unknown."""

    @cached_property
    def names(self) -> tuple[str, ...]:
        """(c,) the name of each class."""
        return tuple(names[0] for names in self.classes)

    @cached_property
    def query_names(self) -> tuple[str, ...]:
        """(n,) all names: the query for a segmenter."""
        return tuple(chain.from_iterable(self.classes))

    @cached_property
    def class_of(self) -> np.ndarray:
        """(n,) int64: the class of each name."""
        return np.repeat(np.arange(len(self.classes)), [len(names) for names in self.classes])

    @property
    def is_thing(self) -> list[bool]:
        """Whether each class is a thing; False where it is unknown."""
        return [number in (self.things or ()) for number in range(len(self.names))]

    def labels(self, labels_hw: np.ndarray) -> np.ndarray:
        """Maps a label map of names to (H, W) int32 classes; unlabelled pixels stay below 0."""
        found = self.class_of[np.maximum(labels_hw, 0)]
        return np.where(labels_hw < 0, labels_hw, found).astype(np.int32)

    def missing(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Classes whose names are all among these."""
        kept = set(self.class_of[[name not in names for name in self.query_names]].tolist())
        return tuple(name for i, name in enumerate(self.names) if i not in kept)


def read_classes(text: str, things: str | None = None) -> Classes:
    """Reads a class list.

    Args:
        text: a text file (one class per line, synonyms after `;`); or the name of a published set,
            with the name of its list unless it is the first (`ade150`, `voc21:fcclip`); or names
            separated by commas, with synonyms after `;`. A file takes precedence over a set, and a
            set over names.
        things: `all`, `none`, or names separated by commas; None takes the things of a set.

    Raises:
        InputError: there are no names, two classes share a name, the set has no such list, a word
            looks like a misspelt set, or `things` are not classes.
    """
    known: frozenset[int] | None = None
    name, _, listed = text.partition(":")
    if Path(text).expanduser().is_file():
        found = list_of_file(Path(text).expanduser(), None).classes
    elif name in SETS:
        of_set = SETS[name]
        if listed and listed not in of_set.lists:
            raise InputError(f"{name} has the class lists {', '.join(of_set.lists)}, not {listed}")
        found = bundled_list(of_set.classes, listed or of_set.lists[0]).classes
        known = of_set.things
    else:
        found = tuple(names for part in text.split(",") if (names := names_of(part)))
        if len(found) == 1 and text.endswith((".txt", ".csv", ".json")):
            raise InputError(
                f"there is no class list {text}; give a file, names separated by commas, or "
                f"one of {', '.join(SETS)}"
            )
        if re.fullmatch(r"[a-z]+[\d_]\w*", name) and (close := get_close_matches(name, SETS, 1)):
            raise InputError(
                f"there is no set {name}; did you mean {close[0]}? For a class of that name give a "
                "text file"
            )
    return classes_of(found, text, things, known)


def classes_of(
    found: tuple[tuple[str, ...], ...],
    text: str,
    things: str | None = None,
    known: frozenset[int] | None = None,
) -> Classes:
    """The classes of a list that was read.

    Args:
        found: names of each class, its own first.
        text: what it was read from, for messages.
        things: as of `read_classes`; known: those that a set says.

    Raises:
        InputError: as of `read_classes`.
    """
    if not found:
        raise InputError(f"expected one class or more, found none in {text!r}")
    owner: dict[str, int] = {}
    listed: list[tuple[str, ...]] = []
    for number, names in enumerate(found):
        # A synonym that classes share belongs to the first.
        own = [name for name in dict.fromkeys(names) if owner.setdefault(name, number) == number]
        if names[0] not in own:
            raise InputError(f"two classes of {text!r} have the name {names[0]!r}")
        listed.append(tuple(own))
    classes = Classes(classes=tuple(listed), things=known)
    if things is None:
        return classes
    wanted = {"all": classes.names, "none": ()}.get(things)
    if wanted is None:
        wanted = tuple(name.strip() for name in things.split(",") if name.strip())
    unknown = sorted(set(wanted) - set(classes.names))
    if unknown:
        raise InputError(f"things must be classes, found {', '.join(unknown)}")
    numbers = frozenset(i for i, name in enumerate(classes.names) if name in wanted)
    return replace(classes, things=numbers)
