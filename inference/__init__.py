"""The light half of ovref: opens and queries reference collections, and segments with them.

    from ovref_inference import ReferenceCollection
    collection = ReferenceCollection.open("s3://bucket/coco-fossil")

Importing this needs numpy, pyarrow, fsspec and faiss only. `encoders`, `proposers`, `opencut` and
`segmenters` are modules to import by name; they need torch (`pip install 'ovref[segment]'`).
"""

from ovref_inference.collection import ReferenceCollection
from ovref_inference.errors import CollectionError, ModelLoadError
from ovref_inference.pooling import pool_regions
from ovref_inference.prototypes import PrototypeConfig, Prototypes
from ovref_inference.retrieve import class_embeddings, retrieval_embedding
from ovref_inference.support import Support

__all__ = [
    "CollectionError",
    "ModelLoadError",
    "PrototypeConfig",
    "Prototypes",
    "ReferenceCollection",
    "Support",
    "class_embeddings",
    "pool_regions",
    "retrieval_embedding",
]
