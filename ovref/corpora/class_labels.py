"""Labels in place of captions: their text and nouns, and formats that have only labels."""

import csv
from collections.abc import Iterator
from itertools import groupby
from pathlib import PurePosixPath
from typing import Any

from fsspec import AbstractFileSystem

from ovref.class_files import SYNONYMS
from ovref.corpora.formats import CorpusRow, open_text
from ovref.corpora.listing import open_place, shown, walk
from ovref.corpora.spec import IMAGE_SUFFIXES, CorpusSpec, LabelSpec
from ovref.errors import InputError
from ovref.identity import normalised
from ovref.ingest import KeySet
from ovref.records import Noun
from ovref_inference.places import store_errors

OPEN_IMAGES_COLUMNS = ("ImageID", "LabelName", "Confidence")


def names_of_label(label: str, synonyms: bool) -> tuple[str, ...]:
    """The names of a label, normalised; without `synonyms` only the first."""
    names = [name for part in label.split(SYNONYMS) if (name := normalised(part))]
    return tuple(names if synonyms else names[:1])


def labels_of_value(value: Any, spec: LabelSpec) -> list[tuple[str, ...]] | None:
    """The labels in a cell or field, each with its names; None if it does not hold labels.

    Args:
        value: a list of strings, or one string with separators; bytes are decoded as UTF-8.

    Raises:
        UnicodeDecodeError: bytes are not UTF-8.
    """
    if isinstance(value, str | bytes):
        text = value.decode("utf-8") if isinstance(value, bytes) else value
        value = text.split(spec.separator)
    if not isinstance(value, list) or not all(isinstance(each, str | bytes) for each in value):
        return None
    texts = [each.decode("utf-8") if isinstance(each, bytes) else each for each in value]
    return [names for text in texts if (names := names_of_label(text, spec.synonyms))]


def text_of_labels(labels: list[tuple[str, ...]]) -> tuple[str, tuple[Noun, ...], list[list[int]]]:
    """A text that names every label once, in order: `wall, brick wall, tree`.

    Args:
        labels: names of each label, normalised and not empty.

    Returns:
        The text; its nouns, which are the names in lower case; and the noun numbers of each label.
    """
    text, nouns, owners = "", list[Noun](), list[list[int]]()
    numbers: dict[str, int] = {}
    for names in labels:
        own = []
        for name in names:
            if name.lower() not in numbers:
                numbers[name.lower()] = len(nouns)
                start = len(text) + 2 if text else 0
                text = f"{text}, {name}" if text else name
                nouns.append(Noun(text=name.lower(), start=start, end=start + len(name)))
            own.append(numbers[name.lower()])
        owners.append(list(dict.fromkeys(own)))
    return text, tuple(nouns), owners


def read_class_folders(spec: CorpusSpec, fs: AbstractFileSystem, root: str) -> Iterator[CorpusRow]:
    """The images below a folder, at any depth; the label of each is its top-level folder in `root`,
    with spaces for underscores. An image in `root` itself is a malformed record."""
    root = root.rstrip("/")
    for folder, inside in walk(fs, root):
        label = folder.removeprefix(root).strip("/").partition("/")[0].replace("_", " ")
        for item in inside:
            path = PurePosixPath(item["name"])
            if item["type"] != "directory" and path.suffix.lower() in IMAGE_SUFFIXES:
                name = item["name"].removeprefix(f"{root}/")
                yield CorpusRow(name, [label] if label else None, name)


def read_open_images(spec: CorpusSpec, fs: AbstractFileSystem, path: str) -> Iterator[CorpusRow]:
    """The images of a CSV file of image-level labels, whose rows are sorted by image.

    A label counts for an image if its confidence is at least `labels.min_confidence` and no row of
    the image has it with confidence 0, which means that people rejected it.

    Raises:
        InputError: a column is missing, a label has no description, a confidence is not a number,
            or the rows of an image are not adjacent.
    """
    if spec.labels is None:
        raise ValueError("open_images is a format of labels")
    descriptions = _descriptions(spec.labels.names)
    seen = KeySet()
    with open_text(fs, path, newline="") as file:
        table = csv.DictReader(file)
        columns = table.fieldnames or []
        if missing := [name for name in OPEN_IMAGES_COLUMNS if name not in columns]:
            raise InputError(
                f"{path} lacks the columns {', '.join(missing)} of Open Images' image-level labels;"
                f" it has {', '.join(columns) or 'none'}"
            )
        for image, rows in groupby(table, lambda row: row["ImageID"]):
            line = table.line_num
            if not image or not seen.add(image):
                raise InputError(
                    f"{path}, line {line}: the rows of image {image!r} are not adjacent, as in the "
                    "published files; sort it by ImageID"
                )
            confidences: dict[str, list[float]] = {}
            for row in rows:
                try:
                    confidences.setdefault(row["LabelName"], []).append(float(row["Confidence"]))
                except (TypeError, ValueError) as error:
                    raise InputError(
                        f"{path}, image {image}: expected a number as Confidence, found "
                        f"{row['Confidence']!r}"
                    ) from error
            kept = [
                label
                for label, found in confidences.items()
                if max(found) >= spec.labels.min_confidence and min(found) > 0
            ]
            if unknown := [label for label in kept if label not in descriptions]:
                raise InputError(
                    f"{spec.labels.names} does not describe the label {unknown[0]} of {path}; give "
                    "the class descriptions of the same version of Open Images as labels.names"
                )
            yield CorpusRow(image, [descriptions[each] for each in kept], f"{image}.jpg")


def _descriptions(place: str) -> dict[str, str]:
    """Reads a file of class descriptions: label id -> name."""
    try:
        fs, path = open_place(place)
        with open_text(fs, path, newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except store_errors(csv.Error) as error:
        raise InputError(f"cannot read labels.names, {shown(place)}: {error}") from error
    if any(len(row) < 2 for row in rows) or not rows:
        raise InputError(f"{shown(place)} must have two columns, the id and the name of a label")
    return {row[0]: row[1] for row in rows}
