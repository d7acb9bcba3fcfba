"""Encoders and proposers that answer each question once: ablations ask the same many times over."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Proposer = Callable[[Sequence[np.ndarray]], Sequence[Any]]
"""Images -> masks or `Proposals`, one answer an image."""


class RememberingEncoder:
    """An encoder that keeps what it has encoded; for the rest it is the encoder it wraps."""

    def __init__(self, encoder: Any) -> None:
        self._encoder = encoder
        self._dense: dict[bytes, np.ndarray] = {}
        self._regions: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def encode(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """As of the wrapped encoder."""
        keys = [_key(image) for image in images]
        found = _remembered(
            self._dense, keys, lambda new: self._encoder.encode([images[i] for i in new])
        )
        return np.stack(found) if found else self._encoder.encode([])

    def encode_regions(
        self,
        images: Sequence[np.ndarray],
        masks: Sequence[np.ndarray],
        heatmaps: Sequence[np.ndarray] | None = None,
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """As of the wrapped encoder."""
        maps = heatmaps or [None] * len(masks)
        keys = [_key(*arrays) for arrays in zip(images, masks, maps, strict=True)]

        def encode(new: list[int]) -> Any:
            some = None if heatmaps is None else [heatmaps[i] for i in new]
            return self._encoder.encode_regions(
                [images[i] for i in new], [masks[i] for i in new], some
            )

        return _remembered(self._regions, keys, encode)


class RememberingTexts:
    """CLIP's joint space: keeps what it has encoded, texts list by list, images one by one."""

    def __init__(self, encoder: Any) -> None:
        self._encoder = encoder
        self._known: dict[tuple[str, ...], np.ndarray] = {}
        self._images: dict[bytes, np.ndarray] = {}

    def encode(self, texts: list[str]) -> np.ndarray:
        """As of the wrapped encoder."""
        key = tuple(texts)
        if key not in self._known:
            self._known[key] = self._encoder.encode(list(texts))
        return self._known[key]

    def encode_images(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """As of the wrapped encoder."""
        keys = [_key(image) for image in images]
        found = _remembered(
            self._images, keys, lambda new: self._encoder.encode_images([images[i] for i in new])
        )
        return np.stack(found) if found else self._encoder.encode_images([])


def remembering_proposer(proposer: Proposer) -> Proposer:
    """A proposer that keeps what it has proposed."""
    known: dict[bytes, Any] = {}

    def propose(images: Sequence[np.ndarray]) -> list[Any]:
        keys = [_key(image) for image in images]
        return _remembered(known, keys, lambda new: proposer([images[i] for i in new]))

    return propose


def _remembered(
    known: dict[bytes, Any], keys: list[bytes], make: Callable[[list[int]], Sequence[Any]]
) -> list[Any]:
    """The answer of each key; `make` gets the positions of new keys, each key once."""
    new = list({key: i for i, key in enumerate(keys) if key not in known}.values())
    if new:
        known |= {keys[i]: answer for i, answer in zip(new, make(new), strict=True)}
    return [known[key] for key in keys]


def _key(*arrays: np.ndarray | None) -> bytes:
    digest = hashlib.sha256()
    for array in arrays:
        if array is not None:
            digest.update(f"{array.shape}{array.dtype}".encode())
            digest.update(np.ascontiguousarray(array).data)
        digest.update(b"|")
    return digest.digest()
