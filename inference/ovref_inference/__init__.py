"""The light half of ovref: opens and queries reference collections, and segments with them.

    import ovref_inference
    segmenter = ovref_inference.open("s3://bucket/coco-fossil").segmenter("fossil")
    image_hwc = ovref_inference.read_image("photo.jpg")
    labels_hw = segmenter.segment([image_hwc], ["red panda", "grass"])[0].labels_hw

Each name is imported when it is first used. Collections need numpy, pyarrow, fsspec and faiss;
segmenters, encoders and proposers need torch and its companions (`pip install 'ovref[segment]'`).
"""

from typing import TYPE_CHECKING, Any

from ovref_inference.lazy import lazy_exports

if TYPE_CHECKING:
    from ovref_inference.collection.prototypes import Prototypes
    from ovref_inference.collection.reference_collection import ReferenceCollection
    from ovref_inference.collection.support import Support
    from ovref_inference.encoders.registry import register_backbone
    from ovref_inference.errors import CollectionError, ModelError, OvrefError
    from ovref_inference.pictures import read_image
    from ovref_inference.segmenters.load import load_segmenter, segment_features
    from ovref_inference.segmenters.modules import PrototypeHead, SegmenterModule
    from ovref_inference.segmenters.regions import Segmentation, Segmenter

__all__ = [
    "CollectionError", "ModelError", "OvrefError", "PrototypeHead", "Prototypes",
    "ReferenceCollection", "Segmentation", "Segmenter", "SegmenterModule", "Support",
    "load_segmenter", "open", "read_image", "register_backbone", "segment_features",
]  # fmt: skip

__getattr__ = lazy_exports(__name__, {
    "collection.prototypes": "Prototypes",
    "collection.reference_collection": "ReferenceCollection",
    "collection.support": "Support",
    "encoders.registry": "register_backbone",
    "errors": "CollectionError ModelError OvrefError",
    "pictures": "read_image",
    "segmenters.load": "load_segmenter segment_features",
    "segmenters.modules": "PrototypeHead SegmenterModule",
    "segmenters.regions": "Segmentation Segmenter",
})  # fmt: skip


def open(url: Any, **options: Any) -> "ReferenceCollection":
    """`ReferenceCollection.open`, with its options and errors."""
    from ovref_inference.collection.reference_collection import ReferenceCollection

    return ReferenceCollection.open(url, **options)
