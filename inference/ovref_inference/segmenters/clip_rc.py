"""CLIP-RC (Zhang et al., CVPR 2024) as a segmenter: trained on some classes, it answers any.

    segmenter = load_segmenter(None, "clip_rc", config=ClipRcConfig(weights="runs/clip_rc"))
    labels_hw = segmenter.segment([image_hwc], ["red panda", "grass"])[0].labels_hw

`ovref train` leaves two files: `clip_rc.json`, which says what was trained on which classes, and
`clip_rc.safetensors`, the trained weights without CLIP's own.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_of

from ovref_inference.collection.class_support import FLOOR
from ovref_inference.collection.reference_collection import ReferenceCollection
from ovref_inference.collection.retrieve import Texts
from ovref_inference.errors import ModelError
from ovref_inference.images import check_images
from ovref_inference.models import copy_weights, resolve
from ovref_inference.pixels import Pixels
from ovref_inference.places import describe, open_place, store_errors
from ovref_inference.ranges import STRICT, require_within
from ovref_inference.segmenters.clip_rc_config import ClipRcNetworkConfig
from ovref_inference.segmenters.clip_rc_network import ClipRcNetwork, load_network
from ovref_inference.segmenters.labels import (
    NamedTexts,
    missing_names,
    prepared_once,
    supported_classes,
)
from ovref_inference.segmenters.regions import Segmentation
from ovref_inference.segmenters.windows import WindowConfig, resize_scores, segment_images
from ovref_inference.vectors import l2_normalised

HEAD, WEIGHTS = "clip_rc.json", "clip_rc.safetensors"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ClipRcConfig:
    """How a trained CLIP-RC segments; the defaults are the paper's."""

    __pydantic_config__ = STRICT

    weights: str = ""
    """Output of `ovref train`: a folder or URL, or `miniature:clip_rc`."""
    classes: Literal["text", "prototypes"] = "text"
    """What stands for a class: its name in CLIP's text space, or the mean of its prototypes in a
    reference collection of the same CLIP's features."""
    seen_penalty: float = 0.1
    """Taken off the scores of classes that it was trained on, so that they do not drown the others;
    the original has 0.1, and 0 after transductive or supervised training."""
    windows: WindowConfig | None = WindowConfig(short_side=512, crop=512, stride=426)  # noqa: RUF009
    """Sliding window; null sees each image as a whole."""

    def __post_init__(self) -> None:
        require_within("seen_penalty", self.seen_penalty, 0, 1)


@dataclass(frozen=True, kw_only=True)
class ClipRcHead:
    """What was trained, without its weights."""

    network: ClipRcNetworkConfig
    """The architecture and the CLIP that it is trained for."""
    dim: int
    """Width of CLIP's joint space."""
    seen: tuple[str, ...]
    """Classes whose masks it was trained on."""
    unseen: tuple[str, ...]
    """Classes of the training set whose masks it was not shown; with none it was supervised."""
    setting: str
    """`inductive`, `transductive` or `supervised`."""
    templates: tuple[str, ...]
    """What class names were put into, for their text embeddings."""
    training: Mapping[str, Any]
    """Steps, data and settings, for people."""
    weights_sha256: str
    """Checksum of the weights' file."""

    def encoded(self) -> bytes:
        """The JSON file."""
        return json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=1).encode()


def read_head(place: str) -> tuple[ClipRcHead, dict[str, torch.Tensor]]:
    """A trained head and its weights.

    Args:
        place: folder or URL, or `miniature:clip_rc`.

    Raises:
        ModelError: it is missing, damaged, or of another format version.
    """
    if not place:
        raise ModelError(
            "clip_rc needs its trained weights: give weights, the output of ovref train"
        )
    folder = resolve(place).rstrip("/")
    try:
        fs, root = open_place(folder)
        described, weights = (fs.cat_file(f"{root}/{name}") for name in (HEAD, WEIGHTS))
    except store_errors(ValueError) as error:
        raise ModelError(
            f"cannot read {HEAD} and {WEIGHTS} in {place}: {describe(error)}; ovref train writes "
            "them"
        ) from error
    try:
        tree = json.loads(described)
        version = tree.pop("format_version")
        if version != FORMAT_VERSION:
            raise ModelError(
                f"{place}/{HEAD} has format version {version}, this ovref reads {FORMAT_VERSION}"
            )
        tree["network"] = ClipRcNetworkConfig(**_tuples(tree["network"]))
        head = ClipRcHead(**_tuples(tree))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{place}/{HEAD} is damaged: {error!r}") from error
    if hashlib.sha256(weights).hexdigest() != head.weights_sha256:
        raise ModelError(f"{place}/{WEIGHTS} is damaged, or not the file that {HEAD} belongs to")
    try:
        return head, tensors_of(weights)
    except SafetensorError as error:
        raise ModelError(f"{place}/{WEIGHTS} is damaged: {error}") from error


class ClipRcSegmenter:
    """A trained CLIP-RC; each class is its name, or the prototypes that a collection has of it."""

    def __init__(
        self,
        head: ClipRcHead,
        network: ClipRcNetwork,
        pixels: Pixels,
        text: Texts,
        config: ClipRcConfig = ClipRcConfig(),
        collection: ReferenceCollection | None = None,
    ) -> None:
        """
        Args:
            head: what was trained.
            network: from `load_network`, with the head's weights.
            pixels: from `load_network`: CLIP's preprocessing.
            text: the text encoder of the head's CLIP.
            config: how to segment.
            collection: for `classes=prototypes`.

        Raises:
            ValueError: prototypes are asked for without a collection, or of one whose features are
                not in the joint space of the head's CLIP.
        """
        self.head, self.config, self.collection = head, config, collection
        self._network, self._pixels = network, pixels
        templates = head.templates
        if config.classes == "prototypes":
            templates = _checked_collection(head, collection).manifest.templates
        self.texts = NamedTexts(text, templates)

    @prepared_once
    def prepare(self, names: tuple[str, ...]) -> tuple[np.ndarray, tuple[str, ...]]:
        """(classes, d) float32 embeddings of the classes, L2-normalised, zero for those without
        any; and the names of these.

        Raises:
            ValueError: no class names, an empty one, or no prototypes of any of them.
        """
        if self.config.classes == "prototypes" and self.collection is not None:
            return _mean_prototypes(self.collection, names, self.texts)
        return self.texts(names), ()

    def segment(
        self, images: Sequence[np.ndarray], class_names: Sequence[str]
    ) -> list[Segmentation]:
        """Label maps of images; arguments, result and errors as of `Segmenter.segment`."""
        check_images(images)
        embeddings_cd, missing = self.prepare(class_names)
        present = np.array([name not in missing for name in class_names])
        score = partial(self._score, embeddings_cd=embeddings_cd[present],
                        penalty_c=self._penalties(class_names)[present])  # fmt: skip
        return segment_images(images, score, self.config.windows, present, missing)

    def _penalties(self, class_names: Sequence[str]) -> np.ndarray:
        """(classes,) float32: of classes that it was trained on, letter case aside."""
        seen = {name.strip().casefold() for name in self.head.seen}
        trained = [name.strip().casefold() in seen for name in class_names]
        return np.where(trained, np.float32(self.config.seen_penalty), np.float32(0))

    @torch.inference_mode()
    def _score(
        self, crops: Sequence[np.ndarray], embeddings_cd: np.ndarray, penalty_c: np.ndarray
    ) -> list["ClassLogits"]:
        device = self._pixels.device
        classes, penalties = (torch.from_numpy(a).to(device) for a in (embeddings_cd, penalty_c))
        scores = []
        for crop in crops:
            pixels = self._pixels([crop], self.head.network.size_hw)
            logits_chw = self._network(pixels, classes).logits_nchw[0].float()
            if not torch.isfinite(logits_chw).all():
                raise ValueError("scores of an image are not finite: broken weights")
            scores.append(ClassLogits(logits_chw, penalties, crop.shape[:2]))
        return scores


@dataclass(frozen=True)
class ClassLogits:
    """Scores of a crop: probabilities of classes that do not exclude each other, less penalties."""

    logits_chw: torch.Tensor
    """(classes, h, w) on the grid of patches."""
    penalty_c: torch.Tensor
    size_hw: tuple[int, ...]
    """The crop's."""

    def pixels(self, classes: slice) -> torch.Tensor:
        """(classes in the slice, *size_hw) float32: logits are enlarged, not probabilities."""
        logits_chw = self.logits_chw[classes]
        large_chw = resize_scores(logits_chw, self.size_hw)
        # In place where it can be: at 512 x 512 new tensors cost a third of all that pixels take.
        scores_chw = large_chw.sigmoid() if large_chw is logits_chw else large_chw.sigmoid_()
        return scores_chw.sub_(self.penalty_c[classes, None, None])


def load_clip_rc(
    config: ClipRcConfig,
    text: Texts,
    collection: ReferenceCollection | None = None,
    device: torch.device = torch.device("cpu"),  # noqa: B008 (immutable)
    head: tuple[ClipRcHead, dict[str, torch.Tensor]] | None = None,
) -> ClipRcSegmenter:
    """The segmenter of trained weights.

    Args:
        text: the text encoder of the head's CLIP.
        head: of `read_head`, if it was read already.

    Raises:
        ModelError: as of `read_head` and `load_network`, or the weights do not fit.
        ValueError: as of `ClipRcSegmenter`.
    """
    described, tensors = head or read_head(config.weights)
    network, pixels = load_network(described.network, device)
    if network.dim != described.dim:
        raise ModelError(
            f"{config.weights} was trained for a CLIP of {described.dim} dimensions, "
            f"{described.network.model} has {network.dim}"
        )
    copy_weights(network.trained_state(with_recovery=False), tensors, config.weights)
    return ClipRcSegmenter(described, network, pixels, text, config, collection)


def _checked_collection(
    head: ClipRcHead, collection: ReferenceCollection | None
) -> ReferenceCollection:
    if collection is None:
        raise ValueError("classes=prototypes needs a reference collection")
    visual = collection.visual_config
    if visual.library != "open_clip" or resolve(visual.model) != resolve(head.network.model):
        raise ValueError(
            f"prototypes must be of {head.network.model}'s features in its joint space; "
            f"{collection.url} has those of {visual.model} ({visual.library})"
        )
    return collection


def _mean_prototypes(
    collection: ReferenceCollection, names: tuple[str, ...], texts: NamedTexts
) -> tuple[np.ndarray, tuple[str, ...]]:
    """The mean prototype of each class, L2-normalised, and the classes without any."""
    support = supported_classes(collection, names, texts, FLOOR)
    prototypes = collection.prototypes(list(names), text_embeddings=texts(names), floor=None)
    prototypes = prototypes.supported(support)
    there = prototypes.counts > 0
    means_cd = np.zeros((len(names), prototypes.vectors_nkd.shape[2]), dtype=np.float32)
    means_cd[there] = l2_normalised(prototypes.vectors_nkd[there].sum(1))
    return means_cd, missing_names(names, support)


def _tuples(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The same with lists as tuples, as dataclasses of settings have them."""
    known = {one.name for kind in (ClipRcHead, ClipRcNetworkConfig) for one in fields(kind)}
    if unknown := tree.keys() - known:
        raise ValueError(f"unknown keys {sorted(unknown)}")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in tree.items()}
