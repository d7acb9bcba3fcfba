"""FreeDA at inference (CVPR 2024): superpixels against the mean of the references of each class.

The settings are those of its released code (aimagelab/freeda).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Protocol

import numpy as np

from ovref_inference.collection.prototypes import Prototypes
from ovref_inference.collection.reference_collection import ReferenceCollection
from ovref_inference.collection.retrieve import checked_names
from ovref_inference.images import check_images
from ovref_inference.segmenters.labels import NamedTexts, Recent, check_same_encoders
from ovref_inference.segmenters.regions import Segmentation, labelled, with_background
from ovref_inference.segmenters.superpixels import SuperpixelConfig, pool_labels, superpixels
from ovref_inference.segmenters.windows import WindowConfig, resize_scores, sliding_scores
from ovref_inference.vectors import l2_normalised


class DenseEncoder(Protocol):
    """Whatever encodes images to (n, h, w, d) float32: `encoders.VisualEncoder`."""

    def encode(self, images: Sequence[np.ndarray]) -> np.ndarray: ...


class ImageTexts(Protocol):
    """CLIP: texts and whole images, (n, d) float32, L2-normalised: `encoders.TextEncoder`."""

    def encode(self, texts: list[str]) -> np.ndarray: ...
    def encode_images(self, images: Sequence[np.ndarray]) -> np.ndarray: ...


@dataclass(frozen=True, kw_only=True)
class FreedaConfig:
    """Parameters of FreeDA's inference; the defaults are its own for ADE."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "strict": True}

    n: int = 350
    """References retrieved for each class, at least 1; their mean is its prototype."""
    local: float = 0.8
    """Weight of the superpixel against the whole window's CLIP embedding, in [0, 1]."""
    superpixels: SuperpixelConfig = field(default_factory=SuperpixelConfig)
    """How windows are cut into superpixels."""
    windows: WindowConfig | None = field(default_factory=WindowConfig)
    """Sliding window; null takes each image as a whole, for images of the encoder's size."""
    around: int = 10
    """Background prototypes of a class, at least 1: clusters of its n references' surroundings,
    which are many things at once. Used with a collection of surroundings alone."""
    background: float | None = None
    """Pixels whose best score is below this get no class (0.4 there); null for data without
    background."""

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n must be at least 1, found {self.n}")
        if self.around < 1:
            raise ValueError(f"around must be at least 1, found {self.around}")
        if not 0 <= self.local <= 1:
            raise ValueError(f"local must lie in [0, 1], found {self.local}")


class FreedaSegmenter:
    """FreeDA's inference with a frozen backbone, CLIP and a reference collection.

        segmenter = FreedaSegmenter(collection, visual, text)
        labels_hw = segmenter.segment([image_hwc], ["red panda", "grass"])[0].labels_hw

    Score of a class at a superpixel: local sigmoid(cos(mean feature, prototype)) + (1 - local)
    cos(CLIP embedding of the window, text).

    With `surroundings`, a collection of what was around the references (`Embed.part`), a class
    counts at a superpixel only if its prototype is at least as near as those of its surroundings.
    A pixel where no class counts gets none. OVDiff (Karazija et al., ECCV 2024) has background
    prototypes too, but lets those of all classes compete with every class: then the grass around
    cows suppresses the class grass.
    """

    def __init__(
        self,
        collection: ReferenceCollection,
        visual: DenseEncoder,
        text: ImageTexts,
        config: FreedaConfig = FreedaConfig(),
        *,
        surroundings: ReferenceCollection | None = None,
    ) -> None:
        """The encoders must be the ones that both collections were built with.

        Raises:
            ValueError: `surroundings` was built with other encoders, or of regions.
        """
        if surroundings is not None:
            check_same_encoders(collection, surroundings)
            embed = surroundings.manifest.build.get("embed")
            if embed is not None and embed["fields"].get("part") != "surroundings":
                raise ValueError(
                    f"{surroundings.url} holds regions, not what is around them; build it with "
                    "embed.part=surroundings"
                )
        self.collection = collection
        self.surroundings = surroundings
        self.visual = visual
        self.text = text
        self.texts = NamedTexts(text, collection.manifest.templates)
        self.config = config
        self._prepared: dict[tuple[str, ...], tuple[np.ndarray, Prototypes | None]] = Recent()

    def prepare(self, class_names: Sequence[str]) -> tuple[np.ndarray, Prototypes | None]:
        """Prototypes of the classes, (classes, d) float32, L2-normalised, and of their
        surroundings; made at the first call, remembered for the next.

        Raises:
            ValueError: no class names, an empty one, or a collection without references.
        """
        names = checked_names(class_names)
        if names not in self._prepared:
            texts_cd = self.texts(names)
            around = None
            if self.surroundings is not None:
                around = self.surroundings.fossil_prototypes(
                    texts_cd, n=self.config.n, k=self.config.around
                )
                if not around.counts.all():
                    raise ValueError(f"{self.surroundings.url} has no references")
            self._prepared[names] = (
                mean_prototypes(self.collection, texts_cd, self.config.n),
                around,
            )
        return self._prepared[names]

    def segment(
        self, images: Sequence[np.ndarray], class_names: Sequence[str]
    ) -> list[Segmentation]:
        """Label maps of images.

        Args:
            images: (H, W, 3) uint8 RGB each, of any sizes.
            class_names: what to look for, as text; at least one.

        Returns:
            One Segmentation an image, at the image's size; NO_CLASS for background, and scores of
            -inf where a class does not count.

        Raises:
            ValueError: like `prepare`; images of another kind; or features of an image are zero or
                not finite.
        """
        check_images(images)
        prototypes, around = self.prepare(class_names)
        texts_cd = self.texts(class_names)
        windows = self.config.windows

        def score(crops: Sequence[np.ndarray]) -> list[np.ndarray]:
            return self._score(crops, prototypes, around, texts_cd)

        if windows is None:
            maps = score(images)
        else:
            maps = [sliding_scores(image_hwc, score, windows) for image_hwc in images]
        threshold = -np.inf if self.config.background is None else self.config.background
        return [
            with_background(
                labelled(
                    partial(_at_size, map_chw, len(class_names), image_hwc.shape[:2]),
                    len(class_names),
                    image_hwc.shape[:2],
                ),
                threshold,
            )
            for map_chw, image_hwc in zip(maps, images, strict=True)
        ]

    def _score(
        self,
        crops: Sequence[np.ndarray],
        prototypes: np.ndarray,
        around: Prototypes | None,
        texts_cd: np.ndarray,
    ) -> list[np.ndarray]:
        """Of each crop (classes, H, W) scores; with surroundings as many margins after them."""
        whole_nc = self.text.encode_images(crops) @ texts_cd.T
        maps = []
        for crop, features_hwd, whole_c in zip(
            crops, self.visual.encode(crops), whole_nc, strict=True
        ):
            labels_hw = superpixels(crop, self.config.superpixels)
            pooled = l2_normalised(pool_labels(features_hwd, labels_hw))
            near = sigmoid(pooled @ prototypes.T)
            planes = [self.config.local * near + (1 - self.config.local) * whole_c]
            if around is not None:
                planes.append(near - sigmoid(best_cosines(pooled, around)))
            maps.append(np.concatenate(planes, axis=1).astype(np.float32).T[:, labels_hw])
        return maps


def mean_prototypes(collection: ReferenceCollection, texts_cd: np.ndarray, n: int) -> np.ndarray:
    """(classes, d) float32, L2-normalised: the mean of the n references nearest to each text.

    Raises:
        ValueError: the collection has no reference, or texts are of another width.
    """
    found = collection.fossil_prototypes(texts_cd, n=n, k=1)
    if not found.counts.all():
        raise ValueError(f"{collection.url} has no references")
    return found.vectors_nkd[:, 0]


def _at_size(
    map_chw: np.ndarray, count: int, size_hw: tuple[int, int], classes: slice
) -> np.ndarray:
    """Scores of some of the `count` classes; after those of all, a map may have their margins."""
    scores_chw = resize_scores(map_chw[:count][classes], size_hw)
    if len(map_chw) == count:
        return scores_chw
    margins_chw = resize_scores(map_chw[count:][classes], size_hw)
    return np.where(margins_chw >= 0, scores_chw, -np.inf)


def best_cosines(features_nd: np.ndarray, prototypes: Prototypes) -> np.ndarray:
    """(n, classes) float32: the cosine of L2-normalised features to each class's nearest."""
    classes, most, dim = prototypes.vectors_nkd.shape
    cosines = features_nd @ prototypes.vectors_nkd.reshape(-1, dim).T
    used = np.arange(most) < prototypes.counts[:, None]
    return np.where(used, cosines.reshape(-1, classes, most), -np.inf).max(2)


def sigmoid(values: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-values))."""
    return 1 / (1 + np.exp(-values))
