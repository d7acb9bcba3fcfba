"""Reference shards to a published collection: gather, filter, index, prototypes, publish."""

from ovref.reduce.collection import reduce_collection
from ovref.reduce.spec import FilterSpec, ReduceSpec

__all__ = ["FilterSpec", "ReduceSpec", "reduce_collection"]
