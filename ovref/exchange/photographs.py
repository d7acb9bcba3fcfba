"""Photographs to segment: files, folders and patterns, local or in an object store."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from ovref.corpora.listing import MAGIC, find, matches, open_place, shown
from ovref.corpora.spec import IMAGE_SUFFIXES
from ovref.errors import InputError
from ovref.stored_images import decode_image
from ovref_inference.places import describe, store_errors


@dataclass(frozen=True, kw_only=True)
class Photograph:
    """An image file that has not been read yet. Picklable."""

    place: str
    """Path or URL."""
    file_name: str
    """Path relative to the given folder."""

    @property
    def name(self) -> str:
        """`file_name` without its suffix: the name of output files."""
        return str(PurePosixPath(self.file_name).with_suffix(""))

    def image_hwc(self) -> np.ndarray:
        """(H, W, 3) uint8 RGB, upright.

        Raises:
            UnusableImageError: it is not an image, or is damaged.
            InputError: it cannot be read.
        """
        fs, path = open_place(self.place)
        try:
            file = fs.cat_file(path)
        except store_errors() as error:
            raise InputError(f"cannot read {self.place}: {describe(error)}") from error
        return decode_image(file)


def find_photographs(places: Sequence[str]) -> list[Photograph]:
    """The image files at these locations, in order: a file, all files below a folder, or those that
    match a pattern (`*`, `?`, `[...]`, `**`). Folders are searched for image suffixes only.

    Raises:
        InputError: nothing was found, or two files would have the same name.
    """
    found: list[Photograph] = []
    for place in places:
        inside = _photographs(place)
        if not inside:
            raise InputError(
                f"there is no image at {shown(place)}: expected a file, or a folder with files "
                f"that end in {', '.join(sorted(IMAGE_SUFFIXES))}"
            )
        found += inside
    names: dict[str, str] = {}
    for photograph in found:
        other = names.setdefault(photograph.name, photograph.place)
        if other != photograph.place:
            beside = PurePosixPath(other).parent == PurePosixPath(photograph.place).parent
            raise InputError(
                f"{other} and {photograph.place} would both be written as {photograph.name}: "
                f"{'rename one' if beside else 'give their common folder'}, or segment them into "
                "two outputs"
            )
    return list({photograph.place: photograph for photograph in found}.values())


def _photographs(place: str) -> list[Photograph]:
    fs, path = open_place(place)
    protocol = place.partition("://")[0] + "://" if "://" in place else ""
    try:
        if fs.isfile(path):
            return [Photograph(place=place, file_name=PurePosixPath(path).name)]
        pattern = any(mark in path for mark in MAGIC) and not fs.exists(path)
        files = matches(fs, path) if pattern else sorted(find(fs, path))
    except FileNotFoundError:
        return []
    except store_errors() as error:
        raise InputError(f"cannot list {shown(place)}: {describe(error)}") from error
    root = path
    if pattern:
        parts = path.split("/")
        root = "/".join(parts[: next(i for i, p in enumerate(parts) if any(m in p for m in MAGIC))])
    inside = [file for file in files if PurePosixPath(file).suffix.lower() in IMAGE_SUFFIXES]
    return [
        Photograph(
            place=f"{protocol}{file}",
            file_name=file.removeprefix(root.rstrip("/") + "/"),
        )
        for file in inside
    ]
