"""Opens a named data set and reads its images with their labels, one at a time.

    data = open_set("ade150", "/data/ade")
    for example in data:
        example.image_hwc, example.label_hw     # classes in data.class_names, or IGNORE

Only image names are kept in memory.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import numpy as np

from ovref.class_files import ClassList, list_of_file
from ovref.errors import InputError
from ovref.evaluation.metrics_panoptic import TruePanoptic
from ovref.evaluation.named_sets.bundled_classes import bundled_list
from ovref.evaluation.named_sets.context_json import context_values
from ovref.evaluation.named_sets.definitions import SETS
from ovref.evaluation.named_sets.finding import FoundLayout, find_files
from ovref.evaluation.named_sets.label_files import READERS
from ovref.evaluation.named_sets.layouts import SPLITS, FolderLayout, NamedSet
from ovref.evaluation.named_sets.panoptic import (
    ade_instances,
    labels_of_segments,
    panoptic_file,
)
from ovref.evaluation.named_sets.resizing import within_short_side
from ovref.evaluation.named_sets.rules import labels_of_values, spans
from ovref.evaluation.named_sets.sets_scenes import ADE_INSTANCES
from ovref.identity import fingerprint
from ovref.stored_images import UnusableImageError, decode_image

_SAMPLE = 50
"""Number of label files examined to find out whose ids they have, once a value is wrong."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """An image and its labels."""

    id: str
    """Name in the set, without the layout's folders and suffixes."""
    image_path: Path
    """Path of the image."""
    image_hwc: np.ndarray
    """(H, W, 3) uint8 RGB, upright."""
    label_hw: np.ndarray
    """(H, W) int32 positions in the class list, or IGNORE (-1)."""
    panoptic: TruePanoptic | None = None
    """True segments; None if the set has none."""


@dataclass(frozen=True, kw_only=True)
class LabelledSet:
    """A data set on disk. Iterating reads its images one at a time."""

    name: str
    """Set, split and number of images, for people."""
    class_list: ClassList
    """Names and synonyms of the classes."""
    convention: str
    """Label convention: layout and meaning of the label files, for results."""
    ids: tuple[str, ...]
    """Ids of the images, in order."""
    read: Callable[[str], Example]
    """Reads the image and labels of an id.

    Raises InputError if a file is missing or cannot be read, sizes differ, or a label has an
    unknown value."""
    seen: tuple[bool, ...] | None = None
    """Whether each class was seen by zero-shot methods; None without a split."""
    things: tuple[bool, ...] | None = None
    """Whether each class is a thing; None if unknown."""
    folders: tuple[Path, ...] = ()
    """Folders, or single files, of images and labels; empty if they are not files."""
    colours: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    """Colours of classes in pictures, sRGB in [0, 255]; other classes get arbitrary ones."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """The first name of each class."""
        return self.class_list.names

    @property
    def is_thing(self) -> list[bool]:
        """Whether each class is a thing; False where it is unknown."""
        return list(self.things or [False] * len(self.class_names))

    @property
    def class_fingerprint(self) -> str:
        """Hash of names, synonyms, order and convention: 16 hexadecimal digits."""
        return fingerprint([self.convention, self.class_list.fingerprint])[:16]

    def first(self, limit: int | None) -> "LabelledSet":
        """The first `limit` images; None for all."""
        if limit is None or limit >= len(self):
            return self
        return replace(self, name=f"{self.name}, the first {limit}", ids=self.ids[:limit])

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[Example]:
        return map(self.read, self.ids)


def open_set(name: str, root: str | Path, split: str = "val", names: str = "") -> LabelledSet:
    """Finds a data set on disk, in the first of its layouts that exists.

    Args:
        name: one of SETS.
        root: folder that contains the set, or one of its usual parents.
        split: one of SPLITS.
        names: one of the set's class lists (`mmseg`, `fcclip`, `corrclip`, ...), or the path of a
            text file; empty takes the set's first.

    Raises:
        InputError: the set, split, class list or files do not exist; the list does not match; an
            image has no labels, or labels have no image. The message names what was searched for.
    """
    if name not in SETS:
        raise InputError(f"there is no data set {name!r}; choose from {', '.join(SETS)}")
    if split not in SPLITS:
        raise InputError(f"split must be one of {', '.join(SPLITS)}, found {split!r}")
    named = SETS[name]
    class_list = class_list_of(named, names)
    found = find_files(named, Path(root), split)
    published = named.images.get(split)
    count = len(found.ids)
    known = f"{count} images" if published in (None, count) else f"{count} of {published} images"
    every = range(len(class_list.classes))
    own = bundled_list(named.classes, named.lists[0]).names
    return LabelledSet(
        name=f"{name} {split}, {known}",
        class_list=class_list,
        convention=f"{named.name}: {found.layout.what}; {found.layout.ids}",
        ids=found.ids,
        read=_Reader(named, found).read,
        seen=tuple(own[i] not in named.unseen for i in every) if named.unseen else None,
        things=None if named.things is None else tuple(i in named.things for i in every),
        folders=found.folders,
    )


class _Reader:
    """Reads the images and labels of a layout."""

    def __init__(self, named: NamedSet, found: FoundLayout) -> None:
        self._named, self._found = named, found
        self._table = found.layout.rule.table()

    def read(self, image_id: str) -> Example:
        """Reads an image and its labels."""
        path, label_path = self._found.image(image_id), self._found.label(image_id)
        image_hwc = read_image(path)
        panoptic = self._panoptic(image_id, label_path)
        label_hw = labels_of_segments(panoptic) if panoptic else self._labels(image_id)
        check_sizes(path, image_hwc, label_path, label_hw)
        if self._found.layout.short_side is not None:
            image_hwc, label_hw = within_short_side(
                image_hwc, label_hw, self._found.layout.short_side
            )
        return Example(
            id=image_id,
            image_path=path,
            image_hwc=image_hwc,
            label_hw=label_hw,
            panoptic=panoptic,
        )

    def _panoptic(self, image_id: str, label_path: Path) -> TruePanoptic | None:
        if self._found.segments is not None:
            return panoptic_file(label_path, self._found.segments[image_id])
        if self._found.layout.instances:
            label_hw = self._labels(image_id)
            return ade_instances(self._found.instances(image_id), label_hw, ADE_INSTANCES)
        return None

    def _values(self, image_id: str) -> np.ndarray:
        layout, label_path = self._found.layout, self._found.label(image_id)
        if self._found.masks is not None:
            return context_values(label_path, self._found.masks[image_id])
        return READERS[layout.reader](label_path, layout.rule.bits)

    def _labels(self, image_id: str) -> np.ndarray:
        values_hw = self._values(image_id)
        try:
            return labels_of_values(values_hw, self._table)
        except ValueError as error:
            raise InputError(self._foreign(image_id, str(error))) from error

    def _foreign(self, bad_id: str, wrong: str) -> str:
        """The error message for unknown values, with the set whose ids they would match."""
        layout, ids = self._found.layout, self._found.ids
        seen: set[int] = set()
        for image_id in ids[:: max(1, len(ids) // _SAMPLE)]:
            try:
                values_hw = self._values(image_id)
            except InputError:  # the present file is the one to report
                continue
            seen.update(np.unique(values_hw).tolist())
        seen.update(np.unique(self._values(bad_id)).tolist())
        return (
            f"{self._found.label(bad_id)} holds the values {wrong}, which {self._named.name} does "
            f"not have: {layout.what} has {layout.ids}. Values found in {self._found.folder}: "
            f"{spans(seen)}{looks_like(seen, layout)}"
        )


def read_image(path: Path) -> np.ndarray:
    """The upright (H, W, 3) uint8 RGB image. Raises InputError if it cannot be read."""
    try:
        return decode_image(path.read_bytes())
    except (OSError, UnusableImageError) as error:
        raise InputError(f"cannot read {path}: {error}") from error


def looks_like(values: set[int], other_than: FolderLayout) -> str:
    """The end of a message about unknown values: whose ids match them most closely; empty if none
    do."""
    fits: dict[str, tuple[int, list[str]]] = {}
    for named in SETS.values():
        for layout in named.layouts:
            rule = layout.rule
            if layout.ids == other_than.ids or layout.reader != other_than.reader:
                continue
            if rule.others_ignored or (rule.bits == 16 and max(values) < 256):
                continue
            if not rule.accepts(values):
                continue
            size = len(rule.classes) + len(rule.ignored)
            fits.setdefault(layout.ids, (size, []))[1].append(named.name)
    if not fits:
        return ""
    ids = min(fits, key=lambda each: fits[each][0])
    return f". These look like {ids} (data set {' or '.join(dict.fromkeys(fits[ids][1]))})"


def check_sizes(path: Path, image_hwc: np.ndarray, label_path: Path, label_hw: np.ndarray) -> None:
    """Raises InputError unless the label map has the size of the upright image."""
    size, label_size = image_hwc.shape[:2], label_hw.shape
    if size == label_size:
        return
    message = f"{path} is {size[0]} x {size[1]}, its label map {label_path} "
    message += f"{label_size[0]} x {label_size[1]} (height x width)"
    if size == label_size[::-1]:
        message += (
            ". If the image file has an EXIF orientation, the map was drawn on the pixels as "
            "stored: rotate the map, or remove the orientation from the image"
        )
    raise InputError(message)


def class_list_of(named: NamedSet, names: str) -> ClassList:
    """One of the set's class lists, or that of a file. Raises InputError like `open_set`."""
    if not names or names in named.lists:
        return bundled_list(named.classes, names or named.lists[0])
    if "/" not in names and PurePosixPath(names).suffix == "":
        raise InputError(
            f"{named.name} has no class list {names!r}; choose from {', '.join(named.lists)}, or "
            "give the path of a text file"
        )
    count = len(bundled_list(named.classes, named.lists[0]).classes)
    return list_of_file(Path(names), count)
