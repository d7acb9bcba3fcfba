"""Labelled images to evaluate on, each data set with its class list and its label convention.

Label maps of the same data set exist with different orders and offsets in the wild, and a mismatch
looks like a bad model. So the class list, a name for its convention and its fingerprint travel with
every data set and into every result.
"""

import mimetypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ovref.config import STRICT
from ovref.corpora.spec import IMAGE_SUFFIXES
from ovref.errors import InputError
from ovref.evaluation.metrics import IGNORE
from ovref.evaluation.metrics_ap import TrueInstances
from ovref.evaluation.metrics_panoptic import PanopticMap
from ovref.identity import fingerprint
from ovref.images import FORMATS, UnusableImageError, decode_image
from ovref.miniature import scenes
from ovref.miniature.shapes import CLASSES, STUFF_COLOURS, THINGS
from ovref_inference.ranges import require_at_least

HELD_OUT = ("validation", "test")
"""Splits whose combinations of thing, colour and ground the miniature was not trained on."""

LABEL_MODES = ("1", "L", "P", "I;16", "I")
"""Pillow's modes of a label map: one integer a pixel."""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Labelled images in memory."""

    name: str
    classes: tuple[str, ...]
    """Class names as asked of a segmenter; a label is a position in this list."""
    convention: str
    """Name and version of the meaning of the labels."""
    images: tuple[np.ndarray, ...]
    """(H, W, 3) uint8 RGB each."""
    labels: tuple[np.ndarray, ...]
    """(H, W) uint8 each: positions in `classes`, or 255 for pixels that are not evaluated."""
    colours: dict[str, tuple[int, int, int]]
    """Classes with a colour of their own in pictures, sRGB in [0, 255]; others get any."""
    things: tuple[bool, ...] | None = None
    """Whether each class is a thing; None where that is not known."""
    panoptic: tuple[PanopticMap, ...] | None = None
    """True segments with instances, one map an image; None where they are not known."""
    seen: tuple[bool, ...] | None = None
    """Whether trained models saw masks of each class; None without a split."""

    @property
    def class_fingerprint(self) -> str:
        """Changes with any name, any order and the convention; 16 hexadecimal digits."""
        return fingerprint([self.convention, list(self.classes)])[:16]


@dataclass(frozen=True, kw_only=True)
class LabelFolder:
    """Images and label maps in two folders: `images/x/a.jpg` belongs to `labels/x/a.png`."""

    __pydantic_config__ = STRICT

    images: str
    """Folder of images, at any depth; hidden files and folders are left out."""
    labels: str
    """Folder of label maps of the upright images: .png, greyscale or palette (whose indices are the
    labels)."""
    classes: str
    """Text file, one class name a line, in the order of the labels; different names, letter case
    aside."""
    first_label: int = 0
    """Value of the first class in the maps; 1 for ADE20k, whose 0 is no class."""
    ignored: tuple[int, ...] = (255,)
    """Values of pixels that are not evaluated; those below `first_label` never are."""
    unseen: tuple[str, ...] = ()
    """Classes whose masks trained models never saw, for hIoU; none means no split."""
    limit: int | None = None
    """Number of images, the first in order of path; null takes all. All are kept in memory."""

    def __post_init__(self) -> None:
        require_at_least("first_label", self.first_label, 0)
        if self.limit is not None:
            require_at_least("limit", self.limit, 1)


def miniature_scenes(split: str, count: int) -> Dataset:
    """The first `count` held-out scenes of a split: seeds 0 to count - 1, 64 x 64 pixels.

    Args:
        split: `validation`, to choose parameters, or `test`, to report.
        count: scenes, at least 1.

    Raises:
        ValueError: another split (training scenes are not for evaluation), or `count` below 1.
    """
    if split not in HELD_OUT:
        raise ValueError(f"split must be one of {HELD_OUT}, found {split!r}")
    require_at_least("count", count, 1)
    drawn = [scenes.render(seed, split) for seed in range(count)]
    return Dataset(
        name=f"miniature {split}, {count} scenes",
        classes=CLASSES,
        convention="miniature-1: position in the class list from 0, all pixels labelled",
        images=tuple(scene.image_hwc for scene in drawn),
        labels=tuple(scene.label_hw for scene in drawn),
        colours={name: next(iter(colours.values())) for name, colours in STUFF_COLOURS.items()},
        things=tuple(name in THINGS for name in CLASSES),
        panoptic=tuple(panoptic_truth(scene.label_hw, scene.instance_hw) for scene in drawn),
    )


def label_folder(folder: LabelFolder) -> Dataset:
    """Reads a data set of images and label maps.

    Raises:
        InputError: a folder, file or label map is missing or unreadable, sizes differ, there are
            no images or classes, a map holds a value that is no class and not ignored, or an
            unseen class is not in the list.
    """
    classes = _class_names(Path(folder.classes))
    root = Path(folder.images)
    if not root.is_dir():
        raise InputError(f"{root} is no folder of images")
    paths = _image_paths(root)
    images, labels = [], []
    for path in paths[: folder.limit]:
        label_path = (Path(folder.labels) / path.relative_to(root)).with_suffix(".png")
        images.append(_image(path))
        labels.append(_label_map(label_path, folder, classes))
        if images[-1].shape[:2] != labels[-1].shape:
            raise InputError(
                f"{path} has size {images[-1].shape[:2]}, its label map {labels[-1].shape}"
            )
    data = Dataset(
        name=f"{root.name}, {len(images)} images",
        classes=classes,
        convention=f"label folder: position in the class list from {folder.first_label}",
        images=tuple(images),
        labels=tuple(labels),
        colours={},
    )
    try:
        return with_unseen(data, folder.unseen) if folder.unseen else data
    except ValueError as error:
        raise InputError(f"{folder.classes}: {error}") from error


def with_unseen(data: Dataset, unseen: Sequence[str]) -> Dataset:
    """The data set with its classes split into unseen ones and the rest; letter case is ignored.

    Raises:
        ValueError: a name is no class, or no class would be seen.
    """
    classes = [name.casefold() for name in data.classes]
    names = [name.strip().casefold() for name in unseen]
    unknown = [name for name in names if name not in classes]
    if unknown:
        raise ValueError(f"unseen classes {unknown} are not among the classes {data.classes}")
    seen = tuple(name not in names for name in classes)
    if not any(seen):
        raise ValueError("at least one class must be seen, found all of them unseen")
    return replace(data, seen=seen)


def panoptic_truth(label_hw: np.ndarray, instance_hw: np.ndarray) -> PanopticMap:
    """Segments of a label map and an instance map: each instance, and the rest of each class.

    Args:
        label_hw: (H, W) integer classes, or IGNORE, which becomes void.
        instance_hw: (H, W) integers: 0 where there is no instance (stuff), others number them. The
            pixels of one number have one class.

    Returns:
        Segments by instance number, then stuff by class.

    Raises:
        ValueError: shapes differ, or an instance has pixels of several classes.
    """
    if label_hw.shape != instance_hw.shape:
        raise ValueError(f"shapes differ: {label_hw.shape} and {instance_hw.shape}")
    ids_hw = np.zeros(label_hw.shape, dtype=np.int32)
    labels: dict[int, int] = {}
    for number in np.unique(instance_hw[instance_hw > 0]).tolist():
        found = np.unique(label_hw[instance_hw == number]).tolist()
        if len(found) > 1:
            raise ValueError(f"instance {number} has pixels of several classes: {found}")
        if found != [IGNORE]:
            labels[len(labels) + 1] = found[0]
            ids_hw[instance_hw == number] = len(labels)
    stuff_hw = (instance_hw == 0) & (label_hw != IGNORE)
    for label in np.unique(label_hw[stuff_hw]).tolist():
        labels[len(labels) + 1] = label
        ids_hw[stuff_hw & (label_hw == label)] = len(labels)
    return PanopticMap(ids_hw=ids_hw, labels=labels)


def true_instances(panoptic: PanopticMap, things: Sequence[bool]) -> TrueInstances:
    """The segments of things as instances, for average precision; stuff has none."""
    chosen = [segment for segment, label in panoptic.labels.items() if things[label]]
    return TrueInstances(
        masks_nhw=panoptic.ids_hw == np.array(chosen, dtype=np.int64)[:, None, None],
        labels=np.array([panoptic.labels[segment] for segment in chosen], dtype=np.int64),
        crowd=np.array([segment in panoptic.crowd for segment in chosen], dtype=bool),
    )


def _class_names(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # without a byte-order mark
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the class list {path}: {error}") from error
    names = tuple(line.strip() for line in lines if line.strip())
    different = len({name.casefold() for name in names})
    if not names or different < len(names) or len(names) > IGNORE:
        raise InputError(
            f"{path} must hold 1 to {IGNORE} different class names, one a line, found {len(names)} "
            f"({different} different, letter case aside)"
        )
    return names


def _image_paths(root: Path) -> list[Path]:
    """Files with IMAGE_SUFFIXES that are not hidden, nor in a hidden folder, sorted."""
    paths = []
    for path in sorted(root.rglob("*")):
        if any(part.startswith(".") for part in path.relative_to(root).parts) or path.is_dir():
            continue
        if path.suffix.lower() in IMAGE_SUFFIXES:
            paths.append(path)
        elif (mimetypes.guess_type(path.name)[0] or "").startswith("image/"):
            raise InputError(
                f"{path} is an image of a format that is not read; convert it to one of "
                f"{', '.join(FORMATS)}, or take it out of the folder"
            )
    if not paths:
        raise InputError(f"{root} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    return paths


def _image(path: Path) -> np.ndarray:
    try:
        return decode_image(path.read_bytes())
    except (OSError, UnusableImageError) as error:
        raise InputError(f"cannot read {path}: {error}") from error


def _label_map(path: Path, folder: LabelFolder, classes: Sequence[str]) -> np.ndarray:
    """(H, W) uint8 positions in the class list, or IGNORE."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            if image.mode not in LABEL_MODES:
                raise InputError(
                    f"{path} has pixels of mode {image.mode}, expected one integer a pixel: "
                    "greyscale or palette"
                )
            values_hw = np.asarray(ImageOps.exif_transpose(image)).astype(np.int64)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    ignored_hw = np.isin(values_hw, folder.ignored) | (values_hw < folder.first_label)
    label_hw = np.where(ignored_hw, IGNORE, values_hw - folder.first_label)
    wrong = np.unique(values_hw[~ignored_hw & (label_hw >= len(classes))])
    if len(wrong):
        raise InputError(
            f"{path} holds the values {wrong[:5].tolist()}; with {len(classes)} classes from "
            f"{folder.first_label} the last is {folder.first_label + len(classes) - 1} (ignored: "
            f"{list(folder.ignored)}); check the class list and first_label"
        )
    return label_hw.astype(np.uint8)
