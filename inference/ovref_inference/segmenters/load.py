"""Loads a segmenter from a collection alone: encoders from its manifest, and settings to match."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ovref_inference.collection.reference_collection import ReferenceCollection
from ovref_inference.encoders.config import TextEncoderConfig, VisualEncoderConfig
from ovref_inference.encoders.load import load_region_encoder, load_text_encoder
from ovref_inference.encoders.registry import as_encoder
from ovref_inference.pixels import device_of
from ovref_inference.proposers.load import no_proposals, opencut_proposer
from ovref_inference.segmenters.clip_rc import (
    ClipRcConfig,
    ClipRcSegmenter,
    load_clip_rc,
    read_head,
)
from ovref_inference.segmenters.corrclip import CorrClipConfig, CorrClipSegmenter
from ovref_inference.segmenters.fossil import FossilConfig, FossilSegmenter
from ovref_inference.segmenters.freeda import FreedaConfig, FreedaSegmenter
from ovref_inference.segmenters.regions import Segmentation, Segmenter
from ovref_inference.segmenters.retclip import RetClipConfig, RetClipSegmenter
from ovref_inference.segmenters.rns import RnsConfig, RnsSegmenter
from ovref_inference.segmenters.vocseg import VocSegConfig, VocSegSegmenter
from ovref_inference.segmenters.windows import WindowConfig

METHODS: dict[str, Any] = {
    "fossil": (FossilSegmenter, FossilConfig),
    "freeda": (FreedaSegmenter, FreedaConfig),
    "vocseg": (VocSegSegmenter, VocSegConfig),
    "retclip": (RetClipSegmenter, RetClipConfig),
    "corrclip": (CorrClipSegmenter, CorrClipConfig),
    "rns": (RnsSegmenter, RnsConfig),
}


def load_segmenter(
    collection: ReferenceCollection | str | Path,
    method: Literal[
        "fossil", "freeda", "vocseg", "retclip", "corrclip", "rns", "clip_rc"
    ] = "fossil",
    *,
    proposer: Any = None,
    config: Any = None,
    visual: Any = None,
    device: str | None = None,
) -> Segmenter:
    """A segmenter with the encoders that the collection was built with.

        segmenter = load_segmenter("runs/demo/collection")
        labels_hw = segmenter.segment([image_hwc], ["tree", "grass", "sky"])[0].labels_hw

    Args:
        collection: an open collection, or its place; it stays open while the segmenter is used. For
            `clip_rc`, the output of `ovref train`; or a collection, if `config` names that output.
        method: name of the segmenter.
        proposer: makes the masks; None uses OpenCut on the dense features of the collection's own
            encoder, which a collection of masked crops lacks. FreeDA uses superpixels instead.
        config: settings of the method; None uses the paper's, but at most as many references as the
            median noun of the collection has, and windows no larger than the encoder's images.
        visual: an encoder that is already loaded, or your own backbone with `encode(images)`, from
            uint8 (H, W, 3) to (n, h, w, d) float32; None loads the manifest's.
        device: "cpu", "cuda", ...; None selects a GPU if there is one.

    Raises:
        CollectionError: the collection cannot be opened.
        ModelError: an encoder cannot be loaded.
        ValueError: the method is unknown, or a proposer is needed.
    """
    if method == "clip_rc":
        return _clip_rc(collection, config, device)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, clip_rc, found {method!r}")
    if not isinstance(collection, ReferenceCollection):
        collection = ReferenceCollection.open(collection)
    kind, config_kind = METHODS[method]
    if visual is None:
        visual = _visual_of(collection, method, proposer, device)
    else:
        visual = as_encoder(visual)
    text = load_text_encoder(collection.text_config, device=device)
    config = config or fitting(config_kind(), collection)
    if method == "freeda":
        return kind(collection, visual, text, config)
    if proposer is None and hasattr(visual, "encode"):
        proposer = opencut_proposer(visual, device=device)
    encoders: tuple[Any, ...] = (visual, text)
    if method == "corrclip":
        encoders = (visual, _clip_of(collection, visual, device), text)
    return kind(collection, *encoders, proposer, config)


def _clip_rc(
    place: ReferenceCollection | str | Path, config: ClipRcConfig | None, device: str | None
) -> ClipRcSegmenter:
    """CLIP-RC of the output of a training, or of a collection and `config.weights`."""
    if config is None or not config.weights:
        if isinstance(place, ReferenceCollection):
            raise ValueError("clip_rc needs config.weights, the output of ovref train")
        config = replace(config or ClipRcConfig(), weights=str(place))
    head = read_head(config.weights)
    network = head[0].network
    if config.windows is not None and (side := min(network.size_hw)) < config.windows.crop:
        stride = max(1, side * config.windows.stride // config.windows.crop)
        windows = WindowConfig(short_side=side, crop=side, stride=stride)
        config = replace(config, windows=windows)
    collection: ReferenceCollection | None = None
    if isinstance(place, ReferenceCollection):
        collection = place
    elif config.classes == "prototypes":
        collection = ReferenceCollection.open(place)
    text = load_text_encoder(
        TextEncoderConfig(model=network.model, revision=network.revision), device=device
    )
    return load_clip_rc(config, text, collection, device_of(device), head=head)


def _visual_of(
    collection: ReferenceCollection, method: str, proposer: Any, device: str | None
) -> Any:
    """The encoder that the manifest names. Raises ValueError if it does not suit the method."""
    visual_config = collection.visual_config
    if proposer is None and method != "freeda" and visual_config.masking:
        raise ValueError(
            f"{collection.url} is of masked crops, of which no masks can be cut: give a proposer, "
            "see ovref_inference.proposers"
        )
    return load_region_encoder(visual_config, device=device)


def _clip_of(collection: ReferenceCollection, visual: Any, device: str | None) -> Any:
    """The encoder of regions in the space of the collection's texts: its own encoder, or the image
    tower of its text encoder with dense (MaskCLIP) features at the same image size."""
    config, text = collection.visual_config, collection.text_config
    if config.library == "open_clip":
        return visual
    if config.features == "values" and config.model == text.model:
        return visual  # of transformers
    return load_region_encoder(
        VisualEncoderConfig(
            model=text.model, revision=text.revision, library=text.library, features="values",
            size_hw=config.size_hw,
        ),
        device=device,
    )  # fmt: skip


def segment_features(
    collection: ReferenceCollection | str | Path,
    features_hwd: np.ndarray,
    masks_nhw: np.ndarray,
    class_names: Sequence[str],
    *,
    config: FossilConfig | None = None,
    text: Any = None,
) -> Segmentation:
    """FOSSIL's label map of one image from your own features and masks; no image is encoded.

    Args:
        collection: an open collection, or its place.
        features_hwd, masks_nhw, class_names: as in `FossilSegmenter.segment_features`.
        config: as in `load_segmenter`.
        text: the collection's text encoder, if it is already loaded; None loads it.

    Raises:
        CollectionError, ModelError: as in `load_segmenter`.
        ValueError: as in `FossilSegmenter.segment_features`.
    """
    if not isinstance(collection, ReferenceCollection):
        collection = ReferenceCollection.open(collection)
    config = config or fitting(FossilConfig(), collection, windows=False)
    text = text or load_text_encoder(collection.text_config)
    visual: Any = None  # encodes nothing
    segmenter = FossilSegmenter(collection, visual, text, no_proposals, config)
    return segmenter.segment_features(features_hwd, masks_nhw, class_names)


def fitting(config: Any, collection: ReferenceCollection, *, windows: bool = True) -> Any:
    """The settings with `n` reduced to the number of references of the collection's median noun, at
    least 10, and windows reduced to its encoder's image size."""
    changes: dict[str, Any] = {}
    counts = collection.noun_counts
    if hasattr(config, "n") and (counts > 0).any():
        changes["n"] = min(config.n, max(10, int(np.median(counts[counts > 0]))))
    asked = getattr(config, "windows", None) if windows else None
    if asked is not None and (side := min(collection.visual_config.size_hw)) < asked.crop:
        changes["windows"] = WindowConfig(short_side=side, crop=side, stride=max(1, side // 2))
    return replace(config, **changes)
