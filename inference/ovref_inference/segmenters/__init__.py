"""Segmenters that need no training: images and class names -> label maps.

Each is imported when its name is first used: FOSSIL, text alone and FreeDA need torch; VOCSeg,
RetCLIP and CorrCLIPv2 take whatever encodes regions and need nothing more themselves.
"""

from typing import TYPE_CHECKING

from ovref_inference.lazy import lazy_exports

if TYPE_CHECKING:
    from ovref_inference.segmenters.corrclip import CorrClipConfig, CorrClipSegmenter
    from ovref_inference.segmenters.fossil import FossilConfig, FossilSegmenter, TextOnlySegmenter
    from ovref_inference.segmenters.freeda import FreedaConfig, FreedaSegmenter
    from ovref_inference.segmenters.load import load_segmenter
    from ovref_inference.segmenters.regions import (
        Panoptic,
        Segmentation,
        Segmenter,
        panoptic,
        semantic,
    )
    from ovref_inference.segmenters.retclip import RetClipConfig, RetClipSegmenter
    from ovref_inference.segmenters.superpixels import SuperpixelConfig
    from ovref_inference.segmenters.vocseg import VocSegConfig, VocSegSegmenter
    from ovref_inference.segmenters.windows import WindowConfig

__all__ = [
    "CorrClipConfig",
    "CorrClipSegmenter",
    "FossilConfig",
    "FossilSegmenter",
    "FreedaConfig",
    "FreedaSegmenter",
    "Panoptic",
    "RetClipConfig",
    "RetClipSegmenter",
    "Segmentation",
    "Segmenter",
    "SuperpixelConfig",
    "TextOnlySegmenter",
    "VocSegConfig",
    "VocSegSegmenter",
    "WindowConfig",
    "load_segmenter",
    "panoptic",
    "semantic",
]

_MODULES = {
    "CorrClipConfig": "corrclip",
    "CorrClipSegmenter": "corrclip",
    "FossilConfig": "fossil",
    "FossilSegmenter": "fossil",
    "FreedaConfig": "freeda",
    "FreedaSegmenter": "freeda",
    "Panoptic": "regions",
    "RetClipConfig": "retclip",
    "RetClipSegmenter": "retclip",
    "Segmentation": "regions",
    "Segmenter": "regions",
    "SuperpixelConfig": "superpixels",
    "TextOnlySegmenter": "fossil",
    "VocSegConfig": "vocseg",
    "VocSegSegmenter": "vocseg",
    "WindowConfig": "windows",
    "load_segmenter": "load",
    "panoptic": "regions",
    "semantic": "regions",
}

__getattr__ = lazy_exports(__name__, _MODULES)
