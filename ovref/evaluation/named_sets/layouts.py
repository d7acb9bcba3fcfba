"""Definition of a named data set: class lists, folder layouts, label rules."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ovref.evaluation.named_sets.rules import LabelRule

SPLITS = ("train", "val")
"""Names of splits; layouts may have names of their own for them."""

TRAINING = {"train": "training", "val": "validation"}
COCO_SPLITS = {"train": "train2017", "val": "val2017"}


@dataclass(frozen=True, kw_only=True)
class FolderLayout:
    """A folder layout of a data set. Paths have the placeholders {split} and {id}; an id may
    contain folders."""

    what: str
    """Origin of the layout, for messages."""
    bases: tuple[str, ...]
    """Folders below the root that may contain the set."""
    images: tuple[str, ...]
    """Possible paths of an image, in order."""
    labels: str
    """Path of an image's labels, or of a single file with all labels."""
    rule: LabelRule
    ids: str
    """Description of the values in the label files, for messages."""
    listed_by: str = "images"
    """Where the image ids of a split are listed: `images` or `labels` (all files), or the path of a
    text file with one id per line, or of a panoptic JSON file."""
    not_labels: tuple[str, ...] = ()
    """Suffixes of files that match `labels` but belong to another layout."""
    splits: Mapping[str, str] = field(default_factory=lambda: {name: name for name in SPLITS})
    """Split -> value of {split}."""
    reader: Literal["index", "ade_full", "mat", "panoptic", "ade_instances", "context_json"] = (
        "index"
    )
    """Kind of label file (`label_files.READERS`)."""
    instances: str = ""
    """Path of an image's instance file, for `ade_instances`."""
    short_side: int | None = None
    """Maximum short side; larger images and labels are downscaled, as in the set's protocol."""


@dataclass(frozen=True, kw_only=True)
class NamedSet:
    """A data set for which papers report results."""

    name: str
    classes: str
    """Stem of the class list files."""
    lists: tuple[str, ...]
    """Bundled class lists; the first is the default."""
    layouts: tuple[FolderLayout, ...]
    """Possible layouts, in order."""
    images: Mapping[str, int]
    """Published number of images per split, if known."""
    unseen: tuple[str, ...] = ()
    """Classes unseen by zero-shot methods, by their names in the default list."""
    things: frozenset[int] | None = None
    """Classes that are things; None if unknown."""
