"""A small collection of the miniature for the tests of this folder."""

from scene_collections import collection_url

__all__ = ["collection_url"]
