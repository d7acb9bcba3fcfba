"""The light half of ovref: opens and queries reference collections, and segments with them.

    from ovref_inference import ReferenceCollection
    collection = ReferenceCollection.open("s3://bucket/coco-fossil")

Importing this needs numpy, pyarrow, fsspec and faiss only. Modules to import by name: `encoders`
and `proposers`, which need torch (`pip install 'ovref[segment]'`), and the segmenters: `segmenters`
(FOSSIL, text alone) and `freeda`, which need it too; `vocseg`, `retclip` and `corrclip`, which take
whatever encodes regions and need nothing more themselves.
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
