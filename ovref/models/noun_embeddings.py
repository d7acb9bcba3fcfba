"""Cached text embeddings of nouns."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from ovref_inference.collection.retrieve import Texts, class_embeddings

CACHED_NOUNS = 65_536


def noun_embedding(texts: Texts, templates: tuple[str, ...]) -> Callable[[str], np.ndarray]:
    """A cached function from a noun to its (d,) text embedding, averaged over the templates.

    Each noun is encoded alone, so that its bits do not depend on other nouns of a batch.
    """
    return lru_cache(CACHED_NOUNS)(lambda noun: class_embeddings(texts, [noun], templates)[0])


def require_templates(templates: tuple[str, ...]) -> None:
    """Raises ValueError unless there are templates and each has exactly one `{}`."""
    if not templates or any(text.count("{}") != 1 for text in templates):
        raise ValueError(f"templates must have one {{}} each, found {templates}")
