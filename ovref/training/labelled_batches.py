"""Labelled images for training: crops, flips and colours, and labels without what must not be seen.

What a step shows is a function of (seed, step, place in the batch) alone, however many workers
there are.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image

from ovref.config import STRICT
from ovref.errors import InputError
from ovref.evaluation.datasets import training_scenes
from ovref.evaluation.metrics_semantic import IGNORE
from ovref.evaluation.named_sets.huggingface import open_any_set
from ovref.evaluation.named_sets.label_folder import LabelFolder, open_label_folder, seen_of
from ovref.evaluation.named_sets.opening import LabelledSet
from ovref.training.losses import HIDDEN, UNLABELLED
from ovref_inference.ranges import require_at_least, require_within
from ovref_inference.segmenters.windows import WindowConfig, resized_size

ATTEMPTS = 10
"""Crops tried for one of varied classes, as in mmsegmentation; and images tried for one with a
labelled pixel."""

SCENES_KEPT = 5000
"""Scenes of the miniature held in memory, 45 kB each."""


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Labelled images, and how they are varied; the defaults are those of ZegCLIP."""

    __pydantic_config__ = STRICT

    dataset: str = ""
    """A set of the field by its name (`voc_15_5`, `coco_stuff_156_15`, ...), whose split `train` is
    used."""
    root: str = ""
    """Folder that holds `dataset`."""
    names: str = ""
    """Class list of `dataset`; empty takes its first."""
    folder: LabelFolder | None = None
    """Images and labels of your own instead."""
    scenes: int = 0
    """Number of training scenes of the miniature to use instead."""
    seen: tuple[str, ...] = ()
    """Classes whose masks are shown; empty takes all that are not unseen."""
    unseen: tuple[str, ...] = ()
    """Classes whose masks are never shown, in place of the set's own split; empty takes those of
    that split."""
    limit: int | None = None
    """Number of images used, the first ones of the set; null uses all."""
    short_side: int = 512
    """Short side that images are brought to, before `scale`."""
    long_side: int = 2048
    """Images whose long side would be above this are brought to it instead."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Range of a random factor of both."""
    most_of_one: float = 0.75
    """Share of one class in a crop above which another crop is tried."""
    flip: float = 0.5
    """Probability that an image is mirrored."""
    colour: bool = True
    """Whether brightness, contrast, saturation and hue are varied."""
    threads: int = 4
    """Threads of a worker that read images."""

    def __post_init__(self) -> None:
        given = sum(map(bool, (self.dataset, self.folder, self.scenes)))
        if given != 1 or bool(self.dataset) != bool(self.root):
            raise ValueError("give one of dataset with root, folder, and scenes")
        both = {n.strip().casefold() for n in self.seen} & {
            n.strip().casefold() for n in self.unseen
        }
        if both:
            raise ValueError(f"classes must be seen or unseen, found both of {sorted(both)}")
        require_at_least("scenes", self.scenes, 0)
        for name in ("limit", "short_side", "threads"):
            if getattr(self, name) is not None:
                require_at_least(name, getattr(self, name), 1)
        require_at_least("long_side", self.long_side, self.short_side)
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale must be a range above 0, found {self.scale}")
        require_within("most_of_one", self.most_of_one, 0, 1, "(]")
        require_within("flip", self.flip, 0, 1)

    def open(self) -> LabelledSet:
        """The images; none is read yet. `seen` of the set says which classes may be shown, None
        that all may.

        Raises:
            InputError: the data is missing or not as it should be, a class is not in its list, or
                one of `seen` is unseen in the set's own split.
        """
        if self.scenes:
            data = _kept_scenes(self.scenes)
        elif self.folder:
            data = open_label_folder(self.folder)
        else:
            data = open_any_set(self.dataset, self.root, "train", self.names)
        if self.seen or self.unseen:
            data = replace(data, seen=self._split(data))
        return data.first(self.limit)

    def _split(self, data: LabelledSet) -> tuple[bool, ...]:
        names = data.class_names
        seen = seen_of(names, self.unseen, data.name) or (True,) * len(names)
        if others := seen_of(names, self.seen, data.name):  # what is not named here
            seen = tuple(a and not b for a, b in zip(seen, others, strict=True))
        if not self.unseen and data.seen:
            both = [n for n, a, b in zip(names, seen, data.seen, strict=True) if a and not b]
            if both:
                raise InputError(
                    f"{data.name}: classes must be seen or unseen, found {both} in data.seen, "
                    "which the set's own split has as unseen; name all unseen classes in "
                    "data.unseen to replace that split"
                )
        return seen


@dataclass(frozen=True)
class LabelledBatch:
    """Crops of one size."""

    names: tuple[str, ...]
    """The images that they are of."""
    images_nhwc: np.ndarray
    """(n, H, W, 3) uint8 RGB."""
    labels_nhw: np.ndarray
    """(n, H, W) int64: positions among the classes that are trained, UNLABELLED or HIDDEN."""
    segments_nhw: np.ndarray
    """(n, H, W) int64: numbers of the image's segments, each of one class, where the batches are
    made with `instances` and the set has them; otherwise as `labels_nhw`. Below 0 as there."""
    first: int
    """Place of the first image among all images that the training shows."""


class LabelledBatches:
    """The batches of a training. Calling it as the loop does gives one part of a step's batch."""

    def __init__(
        self,
        data: LabelledSet,
        classes: Sequence[int],
        config: TrainingData,
        *,
        shown: Sequence[int],
        size_hw: tuple[int, int],
        batch: int,
        seed: int,
        instances: bool = False,
    ) -> None:
        """
        Args:
            data: images and labels.
            classes: positions in the set's class list of those that are trained, in the order of
                the batches' labels.
            config: how images are varied.
            shown: those of `classes` whose masks may be shown. Pixels of any other class of the set
                are HIDDEN.
            size_hw: of the crops.
            batch: images of a step, of all parts.
            seed: of the order of images, and of what is varied.
            instances: whether each segment of a panoptic set keeps a number of its own. Crowds
                are then UNLABELLED, as in Mask2Former.
        """
        self._data, self._config, self._size_hw = data, config, size_hw
        self._instances = instances
        self._batch, self._seed = batch, seed
        self._table = np.full(len(data.class_names) + 1, HIDDEN, dtype=np.int64)
        for number, label in enumerate(classes):
            if label in shown:
                self._table[label] = number
        self._table[IGNORE] = UNLABELLED  # the last one
        self._pool = ThreadPoolExecutor(config.threads)

    def __call__(self, step: int, part: int, parts: int) -> LabelledBatch:
        """One of `parts` equal parts of a step's images.

        Raises:
            InputError: an image cannot be read, a label has a value outside of the class list, or
                none of many images in a row has a labelled pixel.
        """
        share = self._batch // parts
        first = step * self._batch + part * share
        crops = list(self._pool.map(self._one, range(first, first + share)))
        names, images, labels, segments = zip(*crops, strict=True)
        return LabelledBatch(
            tuple(names), np.stack(images), np.stack(labels), np.stack(segments), first
        )

    def _one(self, place: int) -> tuple[str, np.ndarray, np.ndarray, np.ndarray]:
        """The crop at a place in the order of all images of the training, its labels and
        segments."""
        tried = []
        for attempt in range(ATTEMPTS):
            epoch, number = divmod(place + attempt, len(self._data))
            name = self._data.ids[_order(self._seed, epoch, len(self._data))[number]]
            rng = np.random.default_rng([self._seed, place, attempt])
            image_hwc, segments_hw, classes_s = self._read(name)
            image_hwc, segments_hw = self._varied(image_hwc, segments_hw, classes_s, rng)
            if (segments_hw >= 0).any():
                return name, image_hwc, _classes_of(segments_hw, classes_s), segments_hw
            tried.append(name)
        raise InputError(
            f"no crop of {', '.join(tried)} in {self._data.name} has a pixel of a class that is "
            "trained: check labels, seen and unseen classes"
        )

    def _read(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """An image, its segments, and the class of each of these."""
        example, classes = self._data.read(name), len(self._data.class_names)
        values = (int(example.label_hw.min()), int(example.label_hw.max()))
        if values[0] < IGNORE or values[1] >= classes:
            raise InputError(
                f"{name} of {self._data.name} has labels from {values[0]} to {values[1]}, expected "
                f"{IGNORE} (none) to {classes - 1}"
            )
        if not (self._instances and example.panoptic is not None):
            every = np.arange(len(self._table))
            return example.image_hwc, self._table[example.label_hw], every
        found = example.panoptic
        ids, inverse = np.unique(found.ids_hw, return_inverse=True)
        labels = [found.labels.get(int(one), IGNORE) for one in ids]  # of VOID, there is none
        crowd = [int(one) in found.crowd for one in ids]
        classes_s = np.where(crowd, UNLABELLED, self._table[labels])
        numbers = np.where(classes_s < 0, classes_s, np.arange(len(ids)))
        return example.image_hwc, numbers[inverse].reshape(found.ids_hw.shape), classes_s

    def _varied(
        self,
        image_hwc: np.ndarray,
        segments_hw: np.ndarray,
        classes_s: np.ndarray,
        rng: np.random.Generator,
    ) -> tuple[np.ndarray, np.ndarray]:
        config = self._config
        factor = rng.uniform(*config.scale)
        sides = WindowConfig(short_side=config.short_side, long_side=config.long_side)
        height, width = resized_size(image_hwc.shape[:2], sides)
        size_wh = (max(1, round(width * factor)), max(1, round(height * factor)))
        if size_wh != image_hwc.shape[1::-1]:
            image = Image.fromarray(image_hwc).resize(size_wh, Image.Resampling.BILINEAR)
            image_hwc = np.asarray(image)
            segments = Image.fromarray(segments_hw.astype(np.int32))
            segments = segments.resize(size_wh, Image.Resampling.NEAREST)
            segments_hw = np.asarray(segments).astype(np.int64)
        top, left = self._corner(_classes_of(segments_hw, classes_s), rng)
        height, width = self._size_hw
        image_hwc = image_hwc[top : top + height, left : left + width]
        segments_hw = segments_hw[top : top + height, left : left + width]
        if rng.random() < config.flip:
            image_hwc, segments_hw = image_hwc[:, ::-1], segments_hw[:, ::-1]
        if config.colour:
            image_hwc = distorted(image_hwc, rng)
        below, right = height - image_hwc.shape[0], width - image_hwc.shape[1]
        return (
            np.pad(image_hwc, ((0, below), (0, right), (0, 0))),
            np.pad(segments_hw, ((0, below), (0, right)), constant_values=UNLABELLED),
        )

    def _corner(self, labels_hw: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
        """Top and left of a crop; of many tries the first of varied classes, or else the last. One
        try where a class may fill a crop."""
        height, width = self._size_hw
        room = [
            max(0, side - crop) for side, crop in zip(labels_hw.shape, self._size_hw, strict=True)
        ]
        top = left = 0
        for _ in range(ATTEMPTS):
            top, left = (int(rng.integers(most + 1)) for most in room)
            if self._config.most_of_one == 1:
                break
            crop_hw = labels_hw[top : top + height, left : left + width]
            counts = np.bincount(crop_hw[crop_hw >= 0])
            if (
                np.count_nonzero(counts) > 1
                and counts.max() < self._config.most_of_one * counts.sum()
            ):
                break
        return top, left


@lru_cache(maxsize=1)
def _kept_scenes(count: int) -> LabelledSet:
    """Training scenes, each drawn once in a process: that takes longer than a small network needs
    for it."""
    data = training_scenes(count)
    return replace(data, read=lru_cache(SCENES_KEPT)(data.read))


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, images: int) -> np.ndarray:
    """The order of the images in an epoch."""
    return np.random.default_rng([seed, epoch, 0x0EDE]).permutation(images)


def _classes_of(segments_hw: np.ndarray, classes_s: np.ndarray) -> np.ndarray:
    """The class of each pixel; where there is no segment, the segment's number below 0."""
    return np.where(segments_hw < 0, segments_hw, classes_s[np.maximum(segments_hw, 0)])


def distorted(image_hwc: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brightness, contrast, saturation and hue varied as in mmsegmentation (SSD's distortion): each
    with probability 1/2, brightness by up to 32 of 255, contrast and saturation by factors from 0.5
    to 1.5, hue by up to a tenth of its circle.

    Args:
        image_hwc: (H, W, 3) uint8 RGB.
    """
    pixels = image_hwc.astype(np.float32)
    if rng.random() < 0.5:
        pixels += rng.uniform(-32, 32)
    contrast, first = rng.random() < 0.5, rng.random() < 0.5
    factor = rng.uniform(0.5, 1.5)
    if contrast and first:
        pixels *= factor
    saturation = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
    hue = rng.uniform(-18, 18) if rng.random() < 0.5 else 0.0
    if saturation != 1.0 or hue:
        hsv = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).convert("HSV")
        values = np.asarray(hsv).astype(np.float32)
        values[..., 0] = (values[..., 0] + hue * 256 / 180) % 256  # Pillow's circle has 256 steps
        values[..., 1] = np.clip(values[..., 1] * saturation, 0, 255)
        rgb = Image.fromarray(values.astype(np.uint8), "HSV").convert("RGB")
        pixels = np.asarray(rgb).astype(np.float32)
    if contrast and not first:
        pixels *= factor
    return np.clip(pixels, 0, 255).astype(np.uint8)
