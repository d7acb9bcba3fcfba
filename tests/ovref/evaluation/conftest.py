"""Small collections for the tests of this folder."""

from scene_collections import clip_collections, collection_url, embed

__all__ = ["clip_collections", "collection_url", "embed"]
