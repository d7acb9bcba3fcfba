"""Opening a named set: finding its files, and reading one image with its labels at a time.

    data = open_set("ade150", "/data/ade")
    for example in data:
        example.image_hwc, example.label_hw     # classes in data.class_names, or IGNORE

Nothing is kept: memory does not grow with the number of images, but for their names.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import numpy as np

from ovref.class_files import ClassList, list_of_file
from ovref.errors import InputError
from ovref.evaluation.metrics_panoptic import PanopticMap
from ovref.evaluation.named_sets.bundled_classes import bundled_list
from ovref.evaluation.named_sets.context_json import context_values
from ovref.evaluation.named_sets.definitions import SETS
from ovref.evaluation.named_sets.finding import Found, find_files
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
"""Label files looked at to say which set's ids they hold, once one has a wrong value."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One image and its labels."""

    id: str
    """Name in the set, without folders of the layout and suffixes."""
    image_path: Path
    """File of the image."""
    image_hwc: np.ndarray
    """(H, W, 3) uint8 RGB, upright."""
    label_hw: np.ndarray
    """(H, W) int32 positions in the class list, or IGNORE (-1)."""
    panoptic: PanopticMap | None = None
    """True segments; None where the set has none."""


@dataclass(frozen=True, kw_only=True)
class LabelledSet:
    """A set that was found on disk. Iterating reads its images, one at a time."""

    name: str
    """Set, split and number of images, for people."""
    class_list: ClassList
    """Names and synonyms of the classes."""
    convention: str
    """Layout and meaning of the label files, for results."""
    ids: tuple[str, ...]
    """Ids of the images, in order."""
    read: Callable[[str], Example]
    """Reads the image and labels of an id.

    Raises InputError where a file is missing or unreadable, sizes differ, or a label has a value
    without meaning."""
    seen: tuple[bool, ...] | None = None
    """Whether a zero-shot method may have seen masks of each class; None without a split."""
    things: tuple[bool, ...] | None = None
    """Whether each class is a thing; None where the set does not say."""
    folders: tuple[Path, ...] = ()
    """Folders, or single files, of the images and labels; none where they are not files."""
    colours: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    """Classes with a colour of their own in pictures, sRGB in [0, 255]; others get any."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """The first name of each class."""
        return self.class_list.names

    @property
    def class_fingerprint(self) -> str:
        """Changes with any name, synonym, order and the convention; 16 hexadecimal digits."""
        return fingerprint([self.convention, self.class_list.fingerprint])[:16]

    def first(self, limit: int | None) -> "LabelledSet":
        """The first so many images; all of them for None."""
        if limit is None or limit >= len(self):
            return self
        return replace(self, name=f"{self.name}, the first {limit}", ids=self.ids[:limit])

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[Example]:
        return map(self.read, self.ids)


def open_set(name: str, root: str | Path, split: str = "val", names: str = "") -> LabelledSet:
    """Finds a set on disk.

    Args:
        name: one of SETS.
        root: folder that holds the set, or one of its usual parents.
        split: one of SPLITS.
        names: a class list that comes with the set (`mmseg`, `fcclip`, `corrclip`, ...), or the
            path of a text file; empty takes the set's first.

    Returns:
        The set in the first of its layouts that is found.

    Raises:
        InputError: no such set, split, class list or files; a list that does not fit; an image
            without labels, or labels without an image. The message names what was looked for.
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
    """Reads images and labels of a layout."""

    def __init__(self, named: NamedSet, found: Found) -> None:
        self._named, self._found = named, found
        self._table = found.layout.rule.table()

    def read(self, image_id: str) -> Example:
        """The image and its labels."""
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

    def _panoptic(self, image_id: str, label_path: Path) -> PanopticMap | None:
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
        """The message for values that the rule does not know, with the set they would fit."""
        layout, ids = self._found.layout, self._found.ids
        seen: set[int] = set()
        for image_id in ids[:: max(1, len(ids) // _SAMPLE)]:
            try:
                values_hw = self._values(image_id)
            except InputError:  # the file at hand is the one to report
                continue
            seen.update(np.unique(values_hw).tolist())
        seen.update(np.unique(self._values(bad_id)).tolist())
        message = (
            f"{self._found.label(bad_id)} holds the values {wrong}, which {self._named.name} does "
            f"not have: "
            f"{layout.what} has {layout.ids}. Values found in {self._found.folder}: {spans(seen)}"
        )
        better = likely(seen, layout)
        return f"{message}. These look like {better}" if better else message


def read_image(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB of a photograph, upright. Raises InputError if it cannot be read."""
    try:
        return decode_image(path.read_bytes())
    except (OSError, UnusableImageError) as error:
        raise InputError(f"cannot read {path}: {error}") from error


def likely(values: set[int], other_than: FolderLayout) -> str:
    """The ids, and the sets that have them, that label values fit most tightly; empty if none."""
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
    return f"{ids} (data set {' or '.join(dict.fromkeys(fits[ids][1]))})"


def check_sizes(path: Path, image_hwc: np.ndarray, label_path: Path, label_hw: np.ndarray) -> None:
    """Raises InputError unless the label map has the size of the upright image."""
    size, label_size = image_hwc.shape[:2], label_hw.shape
    if size == label_size:
        return
    message = f"{path} is {size[0]} x {size[1]}, its label map {label_path} "
    message += f"{label_size[0]} x {label_size[1]} (height x width)"
    if size == label_size[::-1]:
        message += (
            ". If the image file says in its EXIF data that it is to be turned, the map was drawn "
            "on the pixels as stored: turn the map, or take the orientation out of the image"
        )
    raise InputError(message)


def class_list_of(named: NamedSet, names: str) -> ClassList:
    """One of a set's own class lists, or that of a file. Raises InputError as `open_set`."""
    if not names or names in named.lists:
        return bundled_list(named.classes, names or named.lists[0])
    if "/" not in names and PurePosixPath(names).suffix == "":
        raise InputError(
            f"{named.name} has no class list {names!r}; choose from {', '.join(named.lists)}, or "
            "give the path of a text file"
        )
    count = len(bundled_list(named.classes, named.lists[0]).classes)
    return list_of_file(Path(names), count)
