"""What a named set is: its class lists, the folders it is found in, and its label rules."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ovref.evaluation.named_sets.rules import LabelRule

SPLITS = ("train", "val")
"""Names of splits here; layouts that call them otherwise say so."""

TRAINING = {"train": "training", "val": "validation"}
COCO_SPLITS = {"train": "train2017", "val": "val2017"}


@dataclass(frozen=True, kw_only=True)
class FolderLayout:
    """One way in which a set lies on disk. In paths, {split} and {id} are put in; an id may have
    folders in it."""

    what: str
    """Who lays it out like this, for messages."""
    bases: tuple[str, ...]
    """Folders below the root, each of which may hold the set."""
    images: tuple[str, ...]
    """Paths of an image, in the order they are tried."""
    labels: str
    """Path of an image's labels."""
    rule: LabelRule
    ids: str
    """The values of the label files, for messages."""
    listed_by: str = "images"
    """What lists the images of a split: `images` or `labels` (all files there are), or the path of
    a text file of ids, one a line, or of a panoptic JSON file."""
    not_labels: tuple[str, ...] = ()
    """Ends of file names that match `labels` and are of another layout."""
    splits: Mapping[str, str] = field(default_factory=lambda: {name: name for name in SPLITS})
    """What {split} becomes."""
    reader: Literal["index", "ade_full", "mat", "panoptic", "ade_instances"] = "index"
    """How a label file is read."""
    instances: str = ""
    """Path of an image's instances, for `ade_instances`."""
    short_side: int | None = None
    """Images and labels with a longer short side are made smaller, as the set's protocol has it."""


@dataclass(frozen=True, kw_only=True)
class NamedSet:
    """A set that papers report numbers for."""

    name: str
    classes: str
    """Stem of its class-list files."""
    lists: tuple[str, ...]
    """Class lists that come with ovref; the first is the default."""
    layouts: tuple[FolderLayout, ...]
    """Ways to lie on disk, in the order they are tried."""
    images: Mapping[str, int]
    """Published number of images of a split, where known."""
    unseen: tuple[str, ...] = ()
    """Classes that a zero-shot method must not have seen masks of, by the default list's names."""
    things: frozenset[int] | None = None
    """Classes that are things; None where the set does not say."""
