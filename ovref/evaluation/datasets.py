"""Labelled images to evaluate on, each data set with its class list and its label convention.

Label maps of the same data set exist with different orders and offsets in the wild, and a mismatch
looks like a bad model. So the class list, a name for its convention and its fingerprint travel with
every data set and into every result.
"""

from dataclasses import dataclass

import numpy as np

from ovref.identity import fingerprint
from ovref.miniature import scenes
from ovref.miniature.shapes import CLASSES, STUFF_COLOURS

HELD_OUT = ("validation", "test")
"""Splits whose combinations of thing, colour and ground the miniature was not trained on."""


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
    """(H, W) uint8 each: positions in `classes`, or 255 for pixels that are not judged."""
    colours: dict[str, tuple[int, int, int]]
    """Classes with a colour of their own in pictures, sRGB in [0, 255]; others get any."""

    @property
    def class_fingerprint(self) -> str:
        """Changes with any name, any order and the convention; 16 hexadecimal digits."""
        return fingerprint([self.convention, list(self.classes)])[:16]


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
    if count < 1:
        raise ValueError(f"count must be at least 1, found {count}")
    drawn = [scenes.render(seed, split) for seed in range(count)]
    return Dataset(
        name=f"miniature {split}, {count} scenes",
        classes=CLASSES,
        convention="miniature-1: position in the class list from 0, all pixels labelled",
        images=tuple(scene.image_hwc for scene in drawn),
        labels=tuple(scene.label_hw for scene in drawn),
        colours={name: next(iter(colours.values())) for name, colours in STUFF_COLOURS.items()},
    )
