"""A segmenter from a collection alone: encoders from its manifest, and settings that fit it."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ovref_inference.collection.reference_collection import ReferenceCollection
from ovref_inference.encoders.load import VisualEncoder, load_region_encoder, load_text_encoder
from ovref_inference.proposers.load import opencut_proposer
from ovref_inference.segmenters.corrclip import CorrClipConfig, CorrClipSegmenter
from ovref_inference.segmenters.fossil import FossilConfig, FossilSegmenter
from ovref_inference.segmenters.freeda import FreedaConfig, FreedaSegmenter
from ovref_inference.segmenters.regions import Segmenter
from ovref_inference.segmenters.retclip import RetClipConfig, RetClipSegmenter
from ovref_inference.segmenters.vocseg import VocSegConfig, VocSegSegmenter
from ovref_inference.segmenters.windows import WindowConfig

METHODS: dict[str, Any] = {
    "fossil": (FossilSegmenter, FossilConfig),
    "freeda": (FreedaSegmenter, FreedaConfig),
    "vocseg": (VocSegSegmenter, VocSegConfig),
    "retclip": (RetClipSegmenter, RetClipConfig),
    "corrclip": (CorrClipSegmenter, CorrClipConfig),
}


def load_segmenter(
    collection: ReferenceCollection | str | Path,
    method: Literal["fossil", "freeda", "vocseg", "retclip", "corrclip"] = "fossil",
    *,
    proposer: Any = None,
    config: Any = None,
    device: str | None = None,
) -> Segmenter:
    """A segmenter with the encoders that the collection was built with.

        segmenter = load_segmenter("runs/demo/collection")
        labels_hw = segmenter.segment([image_hwc], ["tree", "grass", "sky"])[0].labels_hw

    Args:
        collection: an open one, or where it is; it stays open with the segmenter.
        method: which segmenter.
        proposer: masks; None cuts them out of the dense features of the collection's own encoder
            (OpenCut), which a collection of masked crops lacks. FreeDA has superpixels instead.
        config: of the method; None takes its paper's settings, but no more references than the
            collection has for the usual noun, and windows no larger than its encoder's images.
        device: "cpu", "cuda", ...; None takes a GPU where there is one.

    Raises:
        CollectionError: the collection cannot be opened.
        ModelError: an encoder cannot be loaded.
        ValueError: no such method; a proposer is needed; or CorrCLIPv2 with a collection that is
            not in CLIP's space, for which `CorrClipSegmenter` takes the other encoder.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, found {method!r}")
    if not isinstance(collection, ReferenceCollection):
        collection = ReferenceCollection.open(collection)
    kind, config_kind = METHODS[method]
    visual_config = collection.visual_config
    if proposer is None and method != "freeda" and visual_config.masking:
        raise ValueError(
            f"{collection.url} is of masked crops, of which no masks can be cut: give a proposer, "
            "see ovref_inference.proposers"
        )
    if method == "corrclip" and visual_config.library != "open_clip":
        raise ValueError(
            f"{collection.url} is not in CLIP's space: make a CorrClipSegmenter with the image "
            "tower of its text encoder as well"
        )
    visual = load_region_encoder(visual_config, device=device)
    text = load_text_encoder(collection.text_config, device=device)
    config = config or fitting(config_kind(), collection)
    if method == "freeda":
        return kind(collection, visual, text, config)
    if proposer is None and isinstance(visual, VisualEncoder):
        proposer = opencut_proposer(visual, device=device)
    encoders = (visual, visual, text) if method == "corrclip" else (visual, text)
    return kind(collection, *encoders, proposer, config)


def fitting(config: Any, collection: ReferenceCollection) -> Any:
    """The settings with as many references (`n`) as the median noun of the collection has, at least
    10, and windows of its encoder's image size, where these are smaller."""
    changes: dict[str, Any] = {}
    counts = collection.noun_counts
    if hasattr(config, "n") and (counts > 0).any():
        changes["n"] = min(config.n, max(10, int(np.median(counts[counts > 0]))))
    side = min(collection.visual_config.size_hw)
    windows = getattr(config, "windows", None)
    if windows is not None and side < windows.crop:
        changes["windows"] = WindowConfig(short_side=side, crop=side, stride=max(1, side // 2))
    return replace(config, **changes)
