"""The user's own images and label maps, in two folders, as a labelled set."""

import mimetypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ovref.class_files import list_of_file
from ovref.config import STRICT
from ovref.corpora.spec import IMAGE_SUFFIXES
from ovref.errors import InputError
from ovref.evaluation.metrics_semantic import IGNORE
from ovref.evaluation.named_sets.coco_masks import open_coco_masks
from ovref.evaluation.named_sets.label_files import index_map
from ovref.evaluation.named_sets.opening import Example, LabelledSet, check_sizes, read_image
from ovref.evaluation.named_sets.rules import spans
from ovref.stored_images import FORMATS
from ovref_inference.ranges import require_at_least


@dataclass(frozen=True, kw_only=True)
class LabelFolder:
    """Images and label maps in two folders (`images/x/a.jpg` belongs to `labels/x/a.png`), or
    images and the masks of a COCO JSON file."""

    __pydantic_config__ = STRICT

    images: str
    """Folder of images, at any depth; hidden files and folders are ignored."""
    labels: str
    """Folder of label maps of the upright images: .png, greyscale or palette (whose indices are the
    labels); or a .json file of COCO annotations, whose categories are the classes."""
    classes: str = ""
    """Text file, one class per line, in the order of the labels, its synonyms separated by `;`;
    names must be distinct, ignoring case. Not for COCO annotations."""
    background: str = ""
    """For COCO annotations: name of an additional first class for pixels without a mask; empty does
    not evaluate them."""
    first_label: int = 0
    """Value of the first class in the maps; 1 for ADE20k, in which 0 is not a class."""
    ignored: tuple[int, ...] = (255,)
    """Values of pixels that are not evaluated, in addition to those below `first_label`."""
    unseen: tuple[str, ...] = ()
    """Classes that trained models have not seen, for hIoU; empty for no split."""

    def __post_init__(self) -> None:
        require_at_least("first_label", self.first_label, 0)
        if self.is_coco == bool(self.classes):
            raise ValueError(
                "classes must name the class list of label maps, but COCO annotations have "
                f"their own: found labels {self.labels!r} with classes {self.classes!r}"
            )
        if self.background and not self.is_coco:
            raise ValueError("background is for COCO annotations; label maps list it in classes")

    @property
    def is_coco(self) -> bool:
        """Whether the labels are COCO annotations."""
        return self.labels.lower().endswith(".json")


def open_label_folder(folder: LabelFolder) -> LabelledSet:
    """Opens a data set of images and label maps, which are read on demand.

    Raises:
        InputError: a folder or the class list is missing or cannot be read, there are no images, an
            image has no label map or shares it with another, or an unseen class is not in the
            list.
    """
    if folder.is_coco:
        found = open_coco_masks(folder.images, folder.labels, folder.background)
        return replace(found, seen=seen_of(found.class_names, folder.unseen, folder.labels))
    classes = list_of_file(Path(folder.classes))
    root, labels = Path(folder.images), Path(folder.labels)
    if not root.is_dir():
        raise InputError(f"{root} is not a folder of images")
    paths = {path.relative_to(root).as_posix(): path for path in _image_paths(root)}
    label_paths = {name: (labels / name).with_suffix(".png") for name in paths}
    missing = [path for path in label_paths.values() if not path.is_file()]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(paths)} images in {root} have no label map, for one there is "
            f"no {missing[0]}"
        )
    images_of: dict[Path, str] = {}
    for name, path in label_paths.items():
        if (other := images_of.setdefault(path, name)) != name:
            raise InputError(f"the images {other} and {name} in {root} have one label map, {path}")
    seen = seen_of(classes.names, folder.unseen, folder.classes)

    def read(name: str) -> Example:
        image_hwc = read_image(paths[name])
        label_hw = _label_map(label_paths[name], folder, len(classes.names))
        check_sizes(paths[name], image_hwc, label_paths[name], label_hw)
        return Example(id=name, image_path=paths[name], image_hwc=image_hwc, label_hw=label_hw)

    return LabelledSet(
        name=f"{root.name}, {len(paths)} images",
        class_list=classes,
        convention=f"label folder: position in the class list from {folder.first_label}",
        ids=tuple(paths),
        read=read,
        seen=seen,
        folders=tuple(dict.fromkeys((root, labels))),
    )


def seen_of(
    classes: Sequence[str], unseen: Sequence[str], source: str
) -> tuple[bool, ...] | None:
    """Whether each class is seen, that is, not among the unseen ones, ignoring case; None if there
    are none of these.

    Args:
        source: where the classes are from, for messages.

    Raises:
        InputError: a name is not a class, or no class would be seen.
    """
    if not unseen:
        return None
    known = [name.casefold() for name in classes]
    names = [name.strip().casefold() for name in unseen]
    unknown = [name for name in names if name not in known]
    if unknown:
        first = f"{', '.join(classes[:10])}{', ...' if len(classes) > 10 else ''}"
        raise InputError(
            f"{source}: unseen classes {unknown} are not among the {len(classes)} classes ({first})"
        )
    seen = tuple(name not in names for name in known)
    if not any(seen):
        raise InputError(f"{source}: at least one class must be seen, found all unseen")
    return seen


def _image_paths(root: Path) -> list[Path]:
    """Sorted files with IMAGE_SUFFIXES, without hidden files and folders."""
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


def _label_map(path: Path, folder: LabelFolder, classes: int) -> np.ndarray:
    """(H, W) int32 positions in the class list, or IGNORE."""
    last = folder.first_label + classes - 1
    values_hw = index_map(path, 16 if last > 0xFF else 8)
    ignored_hw = np.isin(values_hw, folder.ignored) | (values_hw < folder.first_label)
    wrong = np.unique(values_hw[~ignored_hw & (values_hw > last)])
    if len(wrong):
        raise InputError(
            f"{path} holds the values {spans(wrong.tolist())}; with {classes} classes from "
            f"{folder.first_label} the last is {last} (ignored: {list(folder.ignored)}); check the "
            "class list, first_label and ignored"
        )
    return np.where(ignored_hw, IGNORE, values_hw - folder.first_label).astype(np.int32)
