"""Training data of the miniature, rendered once and stored as arrays in a work folder.

Two pools of train scenes: `single` shows one thing at a time, `mixed` the full variety. Training
code sees images, captions and the classes that a caption names; it never sees a mask. (`present`
is only for the classifier that evaluates generated images.)
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ovref.miniature.scenes import render
from ovref.miniature.shapes import CLASSES

POOLS = {
    "single": (12_000, 0, {"pair_share": 0.0, "plural_share": 0.0, "empty_share": 0.04}),
    "mixed": (16_000, 1_000_000, {}),
}
"""Pool -> (number of scenes, first seed, shares of `scenes.draw_layout`)."""


@dataclass(frozen=True)
class Pool:
    """Scenes as arrays; n scenes, c classes."""

    images_nhwc: np.ndarray
    """uint8 RGB (n, 64, 64, 3), memory-mapped."""
    captions: tuple[str, ...]
    named_nc: np.ndarray
    """bool (n, c): the caption names the class."""
    present_nc: np.ndarray
    """bool (n, c): the class covers at least 20 pixels."""


def draw_pool(work, name):
    """Renders a pool into `work/scenes_<name>/` unless it exists, and returns that folder."""
    folder = Path(work) / f"scenes_{name}"
    if (folder / "captions.json").is_file():
        return folder
    count, first_seed, shares = POOLS[name]
    folder.mkdir(parents=True, exist_ok=True)
    images = np.empty((count, 64, 64, 3), np.uint8)
    named, present = np.zeros((2, count, len(CLASSES)), bool)
    captions = []
    for i in range(count):
        scene = render(first_seed + i, "train", **shares)
        images[i] = scene.image_hwc
        named[i, [CLASSES.index(noun.lemma) for noun in scene.nouns]] = True
        present[i] = np.bincount(scene.label_hw.ravel(), minlength=len(CLASSES)) >= 20
        captions.append(scene.caption)
    np.save(folder / "images.npy", images)
    np.save(folder / "named.npy", named)
    np.save(folder / "present.npy", present)
    # Written last: its existence marks the pool as complete.
    (folder / "captions.json").write_text(json.dumps(captions))
    return folder


def load_pool(work, *names):
    """The named pools, rendered if necessary and concatenated into one Pool."""
    folders = [draw_pool(work, name) for name in names]
    images = [np.load(folder / "images.npy", mmap_mode="r") for folder in folders]
    return Pool(
        images_nhwc=images[0] if len(images) == 1 else np.concatenate(images),
        captions=tuple(c for f in folders for c in json.loads((f / "captions.json").read_text())),
        named_nc=np.concatenate([np.load(folder / "named.npy") for folder in folders]),
        present_nc=np.concatenate([np.load(folder / "present.npy") for folder in folders]),
    )
