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
    "ClipRcConfig",
    "ClipRcSegmenter",
    "CorrClipConfig",
    "CorrClipSegmenter",
    "FossilConfig",
    "FossilSegmenter",
    "FreedaConfig",
    "FreedaSegmenter",
    "Panoptic",
    "PrototypeHead",
    "RetClipConfig",
    "RetClipSegmenter",
    "RnsConfig",
    "RnsHeadConfig",
    "RnsSegmenter",
    "Segmentation",
    "Segmenter",
    "SegmenterModule",
    "SuperpixelConfig",
    "TextOnlySegmenter",
    "VocSegConfig",
    "VocSegSegmenter",
    "WindowConfig",
    "load_segmenter",
    "panoptic",
    "segment_features",
    "semantic",
]

_MODULES = {
    "ClipRcConfig": "clip_rc",
    "ClipRcSegmenter": "clip_rc",
    "CorrClipConfig": "corrclip",
    "CorrClipSegmenter": "corrclip",
    "FossilConfig": "fossil",
    "FossilSegmenter": "fossil",
    "FreedaConfig": "freeda",
    "FreedaSegmenter": "freeda",
    "Panoptic": "regions",
    "PrototypeHead": "modules",
    "RetClipConfig": "retclip",
    "RetClipSegmenter": "retclip",
    "RnsConfig": "rns",
    "RnsHeadConfig": "rns_head",
    "RnsSegmenter": "rns",
    "Segmentation": "regions",
    "Segmenter": "regions",
    "SegmenterModule": "modules",
    "SuperpixelConfig": "superpixels",
    "TextOnlySegmenter": "fossil",
    "VocSegConfig": "vocseg",
    "VocSegSegmenter": "vocseg",
    "WindowConfig": "windows",
    "load_segmenter": "load",
    "panoptic": "regions",
    "segment_features": "load",
    "semantic": "regions",
}

__getattr__ = lazy_exports(__name__, _MODULES)
