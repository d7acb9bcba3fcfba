"""Reference collections: their files, how they are opened, searched and published."""

from ovref_inference.collection.prototypes import PrototypeConfig, Prototypes
from ovref_inference.collection.reference_collection import ReferenceCollection
from ovref_inference.collection.support import Support

__all__ = ["PrototypeConfig", "Prototypes", "ReferenceCollection", "Support"]
