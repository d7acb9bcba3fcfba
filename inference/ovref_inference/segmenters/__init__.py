"""Segmenters: images and class names -> label maps. All but CLIP-RC need no training.

Each is imported when its name is first used: FOSSIL, the text-only baseline, FreeDA, RNS and
CLIP-RC need torch; VOCSeg, RetCLIP and CorrCLIPv2 accept any encoder of regions and need nothing
else themselves.
"""

from typing import TYPE_CHECKING

from ovref_inference.lazy import lazy_exports

if TYPE_CHECKING:
    from ovref_inference.segmenters.clip_rc import ClipRcConfig, ClipRcSegmenter
    from ovref_inference.segmenters.corrclip import CorrClipConfig, CorrClipSegmenter
    from ovref_inference.segmenters.fossil import FossilConfig, FossilSegmenter, TextOnlySegmenter
    from ovref_inference.segmenters.freeda import FreedaConfig, FreedaSegmenter
    from ovref_inference.segmenters.load import load_segmenter, segment_features
    from ovref_inference.segmenters.modules import PrototypeHead, SegmenterModule
    from ovref_inference.segmenters.regions import (
        Panoptic,
        Segmentation,
        Segmenter,
        panoptic,
        semantic,
    )
    from ovref_inference.segmenters.retclip import RetClipConfig, RetClipSegmenter
    from ovref_inference.segmenters.rns import RnsConfig, RnsSegmenter
    from ovref_inference.segmenters.rns_head import RnsHeadConfig
    from ovref_inference.segmenters.superpixels import SuperpixelConfig
    from ovref_inference.segmenters.vocseg import VocSegConfig, VocSegSegmenter
    from ovref_inference.segmenters.windows import WindowConfig

__all__ = [
    "ClipRcConfig", "ClipRcSegmenter", "CorrClipConfig", "CorrClipSegmenter", "FossilConfig",
    "FossilSegmenter", "FreedaConfig", "FreedaSegmenter", "Panoptic", "PrototypeHead",
    "RetClipConfig", "RetClipSegmenter", "RnsConfig", "RnsHeadConfig", "RnsSegmenter",
    "Segmentation", "Segmenter", "SegmenterModule", "SuperpixelConfig", "TextOnlySegmenter",
    "VocSegConfig", "VocSegSegmenter", "WindowConfig", "load_segmenter", "panoptic",
    "segment_features", "semantic",
]  # fmt: skip

__getattr__ = lazy_exports(__name__, {
    "clip_rc": "ClipRcConfig ClipRcSegmenter",
    "corrclip": "CorrClipConfig CorrClipSegmenter",
    "fossil": "FossilConfig FossilSegmenter TextOnlySegmenter",
    "freeda": "FreedaConfig FreedaSegmenter",
    "load": "load_segmenter segment_features",
    "modules": "PrototypeHead SegmenterModule",
    "regions": "Panoptic Segmentation Segmenter panoptic semantic",
    "retclip": "RetClipConfig RetClipSegmenter",
    "rns": "RnsConfig RnsSegmenter",
    "rns_head": "RnsHeadConfig",
    "superpixels": "SuperpixelConfig",
    "vocseg": "VocSegConfig VocSegSegmenter",
    "windows": "WindowConfig",
})  # fmt: skip
