"""Models that are loaded once and compute each answer once, for evaluations that ask many times.

The segmenters take them in place of the models themselves, so that an ablation of a segmenter's
parameters costs no further forward passes.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from ovref_inference.collection.reference_collection import ReferenceCollection
from ovref_inference.encoders.config import TextEncoderConfig, VisualEncoderConfig
from ovref_inference.encoders.load import load_region_encoder, load_text_encoder

RegionProposer = Callable[[Sequence[np.ndarray]], list[Any]]
"""Images -> masks or `Proposals`, one answer an image."""


class CachedModels:
    """Collections and encoders, each opened or loaded at first use. Use as a context manager."""

    def __init__(self, device: str | None = None) -> None:
        """`device`: "cpu", "cuda", ...; None takes a GPU where there is one."""
        self.device = device
        self._open = ExitStack()
        self._collections: dict[str, ReferenceCollection] = {}
        self._encoders: dict[VisualEncoderConfig, CachedEncoder] = {}
        self._texts: dict[TextEncoderConfig, CachedTexts] = {}

    def __enter__(self) -> "CachedModels":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def collection(self, url: str) -> ReferenceCollection:
        """The open collection; closed at the end of the context."""
        if url not in self._collections:
            self._collections[url] = self._open.enter_context(ReferenceCollection.open(url))
        return self._collections[url]

    def encoder(self, config: VisualEncoderConfig) -> "CachedEncoder":
        """A visual encoder, of dense features or of masked crops."""
        if config not in self._encoders:
            encoder = load_region_encoder(config, device=self.device)
            self._encoders[config] = CachedEncoder(encoder)
        return self._encoders[config]

    def text(self, config: TextEncoderConfig) -> "CachedTexts":
        """A text encoder."""
        if config not in self._texts:
            self._texts[config] = CachedTexts(load_text_encoder(config, device=self.device))
        return self._texts[config]


class CachedEncoder:
    """A visual encoder that keeps its results; other attributes are the wrapped encoder's."""

    def __init__(self, encoder: Any) -> None:
        self._encoder = encoder
        self._dense: dict[bytes, np.ndarray] = {}
        self._regions: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def encode(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """As `VisualEncoder.encode`."""
        keys = [array_key(image) for image in images]
        found = _cached(
            self._dense, keys, lambda new: self._encoder.encode([images[i] for i in new])
        )
        return np.stack(found) if found else self._encoder.encode([])

    def encode_regions(
        self,
        images: Sequence[np.ndarray],
        masks: Sequence[np.ndarray],
        heatmaps: Sequence[np.ndarray] | None = None,
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """As `RegionEncoder.encode_regions`."""
        given = [images, masks] if heatmaps is None else [images, masks, heatmaps]
        keys = [array_key(*arrays) for arrays in zip(*given, strict=True)]

        def encode(new: list[int]) -> Any:
            some = None if heatmaps is None else [heatmaps[i] for i in new]
            return self._encoder.encode_regions(
                [images[i] for i in new], [masks[i] for i in new], some
            )

        return _cached(self._regions, keys, encode)


class CachedTexts:
    """CLIP's joint space: keeps the embeddings of each list of texts and of each image."""

    def __init__(self, encoder: Any) -> None:
        self._encoder = encoder
        self._known: dict[tuple[str, ...], np.ndarray] = {}
        self._images: dict[bytes, np.ndarray] = {}

    def encode(self, texts: list[str]) -> np.ndarray:
        """As `TextEncoder.encode`."""
        key = tuple(texts)
        if key not in self._known:
            self._known[key] = self._encoder.encode(list(texts))
        return self._known[key]

    def encode_images(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """As `TextEncoder.encode_images`."""
        keys = [array_key(image) for image in images]
        found = _cached(
            self._images, keys, lambda new: self._encoder.encode_images([images[i] for i in new])
        )
        return np.stack(found) if found else self._encoder.encode_images([])


def cached_proposer(proposer: RegionProposer) -> RegionProposer:
    """A proposer that keeps its results."""
    known: dict[bytes, Any] = {}

    def propose(images: Sequence[np.ndarray]) -> list[Any]:
        keys = [array_key(image) for image in images]
        return _cached(known, keys, lambda new: proposer([images[i] for i in new]))

    return propose


def _cached(
    known: dict[bytes, Any], keys: list[bytes], make: Callable[[list[int]], Sequence[Any]]
) -> list[Any]:
    """The result of each key; `make` gets the positions of new keys, each key once."""
    new = list({key: i for i, key in enumerate(keys) if key not in known}.values())
    if new:
        known |= {keys[i]: result for i, result in zip(new, make(new), strict=True)}
    return [known[key] for key in keys]


def array_key(*arrays: np.ndarray | None) -> bytes:
    """Digest of shapes, dtypes and values."""
    digest = hashlib.sha256()
    for array in arrays:
        if array is not None:
            digest.update(f"{array.shape}{array.dtype}".encode())
            digest.update(np.ascontiguousarray(array).data)
        digest.update(b"|")
    return digest.digest()
