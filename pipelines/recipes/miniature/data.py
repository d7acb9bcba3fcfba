"""Training data of the miniature, rendered once and stored as arrays in a work folder.

Two pools of train scenes: `single` shows one thing at a time, `mixed` the full variety; those
called `many` continue them, for training on a GPU. Training code sees images, captions and the
classes that a caption names; it never sees a mask. (`present` is only for the classifier that
evaluates generated images.)
"""

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ovref.miniature.scenes import render
from ovref.miniature.shapes import CLASSES

_ONE_THING = {"pair_share": 0.0, "plural_share": 0.0, "empty_share": 0.04}
POOLS = {
    "single": (12_000, 0, _ONE_THING),
    "mixed": (16_000, 1_000_000, {}),
    "single_many": (16_000, 0, _ONE_THING),
    "mixed_many": (48_000, 1_000_000, {}),
}
"""Pool -> (number of scenes, first seed, shares of `scenes.draw_layout`)."""
PART = 250
"""Scenes that are drawn at a time."""


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


def draw_pool(work, name, processes=1):
    """Renders a pool into `work/scenes_<name>/` unless it exists, and returns that folder.

    With several `processes` the caller must not have used a GPU yet: they are forked.
    """
    folder = Path(work) / f"scenes_{name}"
    if (folder / "captions.json").is_file():
        return folder
    count, first_seed, shares = POOLS[name]
    folder.mkdir(parents=True, exist_ok=True)
    images = np.empty((count, 64, 64, 3), np.uint8)
    named, present = np.zeros((2, count, len(CLASSES)), bool)
    captions = []
    starts = range(0, count, PART)
    sizes = [min(PART, count - start) for start in starts]
    arguments = ([first_seed + start for start in starts], sizes, [shares] * len(sizes))
    if processes == 1:
        drawn = map(_draw, *arguments)
        pool = None
    else:
        pool = ProcessPoolExecutor(processes, multiprocessing.get_context("fork"))
        drawn = pool.map(_draw, *arguments)
    for start, part in zip(starts, drawn, strict=True):
        at = slice(start, start + len(part.captions))
        images[at], named[at], present[at] = part.images_nhwc, part.named_nc, part.present_nc
        captions += part.captions
    if pool is not None:
        pool.shutdown()
    np.save(folder / "images.npy", images)
    np.save(folder / "named.npy", named)
    np.save(folder / "present.npy", present)
    # Written last: its existence marks the pool as complete.
    (folder / "captions.json").write_text(json.dumps(captions))
    return folder


def _draw(first_seed, count, shares):
    """A Pool of consecutive seeds."""
    scenes = [render(first_seed + i, "train", **shares) for i in range(count)]
    named, present = np.zeros((2, count, len(CLASSES)), bool)
    for i, scene in enumerate(scenes):
        named[i, [CLASSES.index(noun.lemma) for noun in scene.nouns]] = True
        present[i] = np.bincount(scene.label_hw.ravel(), minlength=len(CLASSES)) >= 20
    return Pool(
        images_nhwc=np.stack([scene.image_hwc for scene in scenes]),
        captions=tuple(scene.caption for scene in scenes),
        named_nc=named,
        present_nc=present,
    )


def load_pool(work, *names, processes=1):
    """The named pools, rendered if necessary and concatenated into one Pool."""
    folders = [draw_pool(work, name, processes) for name in names]
    images = [np.load(folder / "images.npy", mmap_mode="r") for folder in folders]
    return Pool(
        images_nhwc=images[0] if len(images) == 1 else np.concatenate(images),
        captions=tuple(c for f in folders for c in json.loads((f / "captions.json").read_text())),
        named_nc=np.concatenate([np.load(folder / "named.npy") for folder in folders]),
        present_nc=np.concatenate([np.load(folder / "present.npy") for folder in folders]),
    )
