"""Small collections for the tests of this folder."""

import pytest

from paper_tables.spec import Collections
from scene_collections import clip_collections, collection_url, embed

__all__ = ["clip_collections", "collection_url", "embed"]


@pytest.fixture(scope="session")
def table_collections(collection_url, clip_collections):
    """What the papers' tables ask."""
    return Collections(
        fossil=collection_url,
        vocseg_binary=clip_collections["crop_binary"],
        vocseg_heatmap=clip_collections["crop_binary"],
        vocseg_none=clip_collections["crop_none"],
        retclip=clip_collections["values"],
    )
