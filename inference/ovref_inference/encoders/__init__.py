"""Encoders: images and regions -> features, texts -> CLIP's joint space.

Importing this package is light; the names below that load models import torch, transformers and
open_clip when they are first used.
"""

from typing import TYPE_CHECKING

from ovref_inference.lazy import lazy_exports

if TYPE_CHECKING:
    from ovref_inference.encoders.config import TextEncoderConfig, VisualEncoderConfig
    from ovref_inference.encoders.crop_encoder import CropEncoder
    from ovref_inference.encoders.load import (
        TextEncoder,
        VisualEncoder,
        load_region_encoder,
        load_text_encoder,
        load_visual_encoder,
    )
    from ovref_inference.encoders.pooling import RegionEncoder, pool_regions
    from ovref_inference.encoders.registry import register_backbone

__all__ = [
    "CropEncoder", "RegionEncoder", "TextEncoder", "TextEncoderConfig", "VisualEncoder",
    "VisualEncoderConfig", "load_region_encoder", "load_text_encoder", "load_visual_encoder",
    "pool_regions", "register_backbone",
]  # fmt: skip

__getattr__ = lazy_exports(__name__, {
    "config": "TextEncoderConfig VisualEncoderConfig",
    "crop_encoder": "CropEncoder",
    "load": "TextEncoder VisualEncoder load_region_encoder load_text_encoder load_visual_encoder",
    "pooling": "RegionEncoder pool_regions",
    "registry": "register_backbone",
})  # fmt: skip
