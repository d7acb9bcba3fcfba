"""The light half of ovref: opens and queries reference collections, and segments with them.

    import ovref_inference
    segmenter = ovref_inference.load_segmenter("s3://bucket/coco-fossil")
    labels_hw = segmenter.segment([image_hwc], ["red panda", "grass"])[0].labels_hw

Everything is imported when it is first used. Collections need numpy, pyarrow, fsspec and faiss;
segmenters, encoders and proposers need torch and its companions (`pip install 'ovref[segment]'`).
"""

from typing import TYPE_CHECKING

from ovref_inference.lazy import lazy_exports

if TYPE_CHECKING:
    from ovref_inference.collection.prototypes import Prototypes
    from ovref_inference.collection.reference_collection import ReferenceCollection
    from ovref_inference.collection.support import Support
    from ovref_inference.errors import CollectionError, ModelError, OvrefError
    from ovref_inference.segmenters.load import load_segmenter
    from ovref_inference.segmenters.regions import Segmentation, Segmenter

__all__ = [
    "CollectionError",
    "ModelError",
    "OvrefError",
    "Prototypes",
    "ReferenceCollection",
    "Segmentation",
    "Segmenter",
    "Support",
    "load_segmenter",
]

_MODULES = {
    "CollectionError": "errors",
    "ModelError": "errors",
    "OvrefError": "errors",
    "Prototypes": "collection.prototypes",
    "ReferenceCollection": "collection.reference_collection",
    "Segmentation": "segmenters.regions",
    "Segmenter": "segmenters.regions",
    "Support": "collection.support",
    "load_segmenter": "segmenters.load",
}

__getattr__ = lazy_exports(__name__, _MODULES)
