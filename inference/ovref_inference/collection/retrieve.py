"""Textual retrieval embeddings of a noun in its caption, and of a class name.

The builder and the queries share these functions, so that both live in the same space.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ovref_inference.vectors import l2_normalised

TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
"""The seven zero-shot templates that CLIP's authors selected; `{}` is the name."""

WEIGHTS = (0.9, 0.1)
"""Weights of the noun in its templates and of its caption (FOSSIL 4)."""


class Texts(Protocol):
    """A text encoder: `encode` returns (n, d) float32, L2-normalised."""

    def encode(self, texts: list[str]) -> np.ndarray: ...


class ImageTexts(Texts, Protocol):
    """CLIP: texts and whole images, (n, d) float32, L2-normalised: `encoders.TextEncoder`."""

    def encode_images(self, images: Sequence[np.ndarray]) -> np.ndarray: ...


def checked_names(names: Sequence[str]) -> tuple[str, ...]:
    """The names as a tuple.

    Raises:
        ValueError: no name, a name that is empty or not a string, or one string in place of a list.
    """
    found = () if isinstance(names, str) else tuple(names)
    if not found or not all(isinstance(name, str) and name.strip() for name in found):
        raise ValueError(f"names must be a list of one or more non-empty texts, found {names!r}")
    return found


def class_embeddings(
    text_encoder: Texts, names: Sequence[str], templates: tuple[str, ...] = TEMPLATES
) -> np.ndarray:
    """(n, d) float32, L2-normalised: each name in every template, encoded, normalised, averaged.

    Raises:
        ValueError: as `checked_names`; or a template without exactly one `{}`.
    """
    names = checked_names(names)
    wrong = [template for template in templates if template.count("{}") != 1]
    if wrong or not templates:
        raise ValueError(f"each template needs exactly one {{}}, found {wrong or templates!r}")
    texts = [template.replace("{}", name) for name in names for template in templates]
    encoded = l2_normalised(text_encoder.encode(texts))
    return l2_normalised(encoded.reshape(len(names), len(templates), -1).mean(axis=1))


def retrieval_embedding(
    noun_embeddings: np.ndarray,
    caption_embeddings: np.ndarray,
    weights: tuple[float, float] = WEIGHTS,
) -> np.ndarray:
    """Textual retrieval embeddings of nouns in their captions (FOSSIL 3.2).

    Both are normalised, added with their weights, and the sum is normalised, so the weights mean
    the same for any encoder.

    Args:
        noun_embeddings: (..., d), from `class_embeddings`.
        caption_embeddings: (..., d), of the whole caption without a template.
        weights: of noun and caption, not negative, not both zero.

    Returns:
        (..., d) float32, L2-normalised.
    """
    noun_weight, caption_weight = weights
    if min(weights) < 0 or max(weights) <= 0:
        raise ValueError(f"weights must not be negative nor both zero, found {weights}")
    mixed = noun_weight * l2_normalised(noun_embeddings)
    return l2_normalised(mixed + caption_weight * l2_normalised(caption_embeddings))
