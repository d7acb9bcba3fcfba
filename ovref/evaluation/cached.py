"""Models that cache their results, for evaluations that need the same results repeatedly.

Segmenters take them in place of the models themselves, so that an ablation of a segmenter's
parameters needs no further forward passes. Results are kept until `CachedModels.clear`, and, if a
folder is given, on disk between runs.
"""

import hashlib
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ovref.check_models import models_of, weights_fingerprint
from ovref.config import dump
from ovref.errors import StorageError
from ovref.identity import fingerprint
from ovref_inference.collection.reference_collection import ReferenceCollection
from ovref_inference.encoders.config import TextEncoderConfig, VisualEncoderConfig
from ovref_inference.encoders.load import load_region_encoder, load_text_encoder
from ovref_inference.pixels import device_of
from ovref_inference.places import whole_file
from ovref_inference.proposers.config import ProposerConfig
from ovref_inference.proposers.load import load_proposals, load_proposer, opencut_proposer
from ovref_inference.segmenters.clip_rc import ClipRcHead, read_head

RegionProposer = Callable[[Sequence[np.ndarray]], list[Any]]
"""Images -> masks or `Proposals` of each image."""


class CachedModels:
    """Collections and models, each opened or loaded on first use. Use as a context manager."""

    def __init__(self, device: str | None = None, folder: str = "") -> None:
        """
        Args:
            device: "cpu", "cuda", ...; None takes a GPU if there is one.
            folder: where features and masks are kept for later runs; empty keeps none.
        """
        self.device = device
        self._folder = folder
        self._open = ExitStack()
        self._made: dict[tuple[Any, ...], Any] = {}
        self._caches: list[ResultCache] = []

    def __enter__(self) -> "CachedModels":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def collection(self, url: str) -> ReferenceCollection:
        """The collection, which stays open until the end of the context."""
        return self._once(
            ("collection", url), lambda: self._open.enter_context(ReferenceCollection.open(url))
        )

    def head(self, weights: str) -> tuple[ClipRcHead, dict[str, torch.Tensor]]:
        """A trained head and its weights, read once; see `read_head`."""
        return self._once(("head", weights), lambda: read_head(weights))

    def encoder(self, config: VisualEncoderConfig) -> "CachedEncoder":
        """A visual encoder, of dense features or of masked crops."""

        def load() -> CachedEncoder:
            encoder = load_region_encoder(config, device=self.device)
            return CachedEncoder(encoder, self._cache(config))

        return self._once(("encoder", config), load)

    def text(self, config: TextEncoderConfig) -> "CachedTexts":
        """A text encoder."""

        def load() -> CachedTexts:
            return CachedTexts(load_text_encoder(config, device=self.device), self._cache())

        return self._once(("text", config), load)

    def proposer(self, config: ProposerConfig) -> "CachedProposer":
        """A class-agnostic proposer. OpenCut cuts features of `encoder`, which are cached, too."""

        def load() -> CachedProposer:
            loaded: Any
            if (cut := config.opencut) is None:
                loaded = load_proposer(config, device=self.device)
            else:
                keys = self.encoder(cut.keys)
                loaded = opencut_proposer(
                    keys, cut.cut, crf=cut.crf, crf_at=cut.crf_at, device=self.device
                )
            return CachedProposer(loaded, self._cache(config))

        return self._once(("proposer", config), load)

    def proposals(self, config: ProposerConfig, class_names: tuple[str, ...]) -> "CachedProposer":
        """A proposer with everything that region segmenters can use (`load_proposals`). Soft masks
        are not kept for later runs, because they are large."""
        if config.mask_former is config.grounded_sam is config.fcclip is None:
            return self.proposer(config)

        def load() -> CachedProposer:
            return CachedProposer(
                load_proposals(config, class_names, device=self.device), self._cache()
            )

        return self._once(("proposals", config, class_names), load)

    def clear(self) -> None:
        """Drops the results of images; models and text embeddings stay."""
        for cache in self._caches:
            cache.clear()

    def _once(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _cache(self, config: Any = None) -> "ResultCache":
        """A cache; of a model's settings also on disk, specific to weights, size and device."""
        folder = None
        if self._folder and config is not None:
            models = models_of(config)
            weights = [weights_fingerprint(name, revision) for _, name, revision in models]
            made_by = [type(config).__name__, dump(config), weights, device_of(self.device).type]
            folder = Path(self._folder).expanduser() / fingerprint(made_by)[:24]
        self._caches.append(ResultCache(folder))
        return self._caches[-1]


@contextmanager
def kept_arrays(path: Path) -> Iterator[Any]:
    """The arrays of a file that can be made again. Raises StorageError where the block finds it
    damaged."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as kept:
            yield kept
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise StorageError(f"{path} is damaged ({error}): delete it to rebuild it") from error


class ResultCache:
    """Results by key: in memory until `clear`, and in the files of a folder, if one is given."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._known: dict[bytes, Any] = {}

    def clear(self) -> None:
        """Drops what is in memory."""
        self._known.clear()

    def of_images(
        self, images: Sequence[np.ndarray], make: Callable[[list[np.ndarray]], Sequence[Any]]
    ) -> list[Any]:
        """The result of each image; `make` is called with those that are new."""
        keys = [array_key(image) for image in images]
        return self.of_keys(keys, lambda new: make([images[i] for i in new]))

    def of_keys(
        self, keys: list[bytes], make: Callable[[list[int]], Sequence[Any]]
    ) -> list[Any]:
        """The result of each key, an array or a tuple of arrays; `make` is called with the
        positions of new, distinct keys.

        Raises:
            StorageError: a file is damaged.
        """
        known = self._known
        new = list({key: i for i, key in enumerate(keys) if key not in known}.values())
        if self._folder is not None:
            known |= {keys[i]: value for i in new if (value := self._read(keys[i])) is not None}
            new = [i for i in new if keys[i] not in known]
        if new:
            made = dict(zip((keys[i] for i in new), make(new), strict=True))
            known |= made
            if self._folder is not None:
                for key, value in made.items():
                    self._write(key, value)
        return [known[key] for key in keys]

    def _read(self, key: bytes) -> Any:
        path = self._path(key)
        if not path.exists():
            return None
        with kept_arrays(path) as kept:
            arrays = tuple(kept[name] for name in kept.files)
        return arrays[0] if len(arrays) == 1 else arrays

    def _write(self, key: bytes, value: Any) -> None:
        """The file appears completely or not at all."""
        path, arrays = self._path(key), value if isinstance(value, tuple) else (value,)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Masks compress well; compressing features is not worth the time.
        save = np.savez_compressed if arrays[0].dtype == bool else np.savez
        with whole_file(path) as partial, open(partial, "wb") as file:
            save(file, *arrays)

    def _path(self, key: bytes) -> Path:
        name = key.hex()
        return Path(self._folder or "", name[:2], f"{name[2:40]}.npz")


class CachedEncoder:
    """A visual encoder that caches its results; other attributes are the wrapped encoder's."""

    def __init__(self, encoder: Any, cache: ResultCache | None = None) -> None:
        self._encoder, self._cache = encoder, cache or ResultCache()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def encode(self, images: Sequence[np.ndarray]) -> Any:
        """See `VisualEncoder.encode`."""
        found = self._cache.of_images(images, self._encoder.encode)
        if not found:
            return self._encoder.encode([])
        return np.stack(found) if len({one.shape for one in found}) == 1 else found

    def encode_regions(
        self,
        images: Sequence[np.ndarray],
        masks: Sequence[np.ndarray],
        heatmaps: Sequence[np.ndarray] | None = None,
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """See `RegionEncoder.encode_regions`."""
        given = [images, masks] if heatmaps is None else [images, masks, heatmaps]

        def encode(new: list[int]) -> Any:
            return self._encoder.encode_regions(*([arrays[i] for i in new] for arrays in given))

        keys = [array_key(*arrays) for arrays in zip(*given, strict=True)]
        return self._cache.of_keys(keys, encode)


class CachedTexts:
    """A text encoder that caches the embeddings of each list of texts and each image."""

    def __init__(self, encoder: Any, images: ResultCache | None = None) -> None:
        self._encoder, self._images = encoder, images or ResultCache()
        self._texts: dict[tuple[str, ...], np.ndarray] = {}

    def encode(self, texts: list[str]) -> np.ndarray:
        """See `TextEncoder.encode`."""
        key = tuple(texts)
        if key not in self._texts:
            self._texts[key] = self._encoder.encode(list(texts))
        return self._texts[key]

    def encode_images(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """See `TextEncoder.encode_images`."""
        found = self._images.of_images(images, self._encoder.encode_images)
        return np.stack(found) if found else self._encoder.encode_images([])


class CachedProposer:
    """A proposer that caches its results."""

    def __init__(self, proposer: RegionProposer, cache: ResultCache | None = None) -> None:
        self._proposer, self._cache = proposer, cache or ResultCache()

    def __call__(self, images: Sequence[np.ndarray]) -> list[Any]:
        return self._cache.of_images(images, self._proposer)


def array_key(*arrays: np.ndarray) -> bytes:
    """Digest of shapes, dtypes and values."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.shape}{array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).data)
        digest.update(b"|")
    return digest.digest()
