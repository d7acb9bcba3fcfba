"""The light half of ovref: opens and queries reference collections, and segments with them.

    from ovref_inference import ReferenceCollection
    collection = ReferenceCollection.open("s3://bucket/coco-fossil")

Importing this needs numpy, pyarrow, fsspec and faiss only. So does importing the packages
`encoders`, `proposers` and `segmenters`; what they load needs torch and its companions
(`pip install 'ovref[segment]'`), which are imported when they are first used.
"""

from ovref_inference.collection.prototypes import PrototypeConfig, Prototypes
from ovref_inference.collection.reference_collection import ReferenceCollection
from ovref_inference.collection.retrieve import class_embeddings, retrieval_embedding
from ovref_inference.collection.support import Support
from ovref_inference.encoders.pooling import pool_regions
from ovref_inference.errors import CollectionError, ModelError

__all__ = [
    "CollectionError",
    "ModelError",
    "PrototypeConfig",
    "Prototypes",
    "ReferenceCollection",
    "Support",
    "class_embeddings",
    "pool_regions",
    "retrieval_embedding",
]
