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
        self._collections: dict[str, ReferenceCollection] = {}
        self._heads: dict[str, tuple[ClipRcHead, dict[str, torch.Tensor]]] = {}
        self._encoders: dict[VisualEncoderConfig, CachedEncoder] = {}
        self._texts: dict[TextEncoderConfig, CachedTexts] = {}
        self._proposers: dict[ProposerConfig, CachedProposer] = {}
        self._proposals: dict[tuple[ProposerConfig, tuple[str, ...]], CachedProposer] = {}

    def __enter__(self) -> "CachedModels":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def collection(self, url: str) -> ReferenceCollection:
        """The collection, which stays open until the end of the context."""
        if url not in self._collections:
            self._collections[url] = self._open.enter_context(ReferenceCollection.open(url))
        return self._collections[url]

    def head(self, weights: str) -> tuple[ClipRcHead, dict[str, torch.Tensor]]:
        """A trained head and its weights, read once; see `read_head`."""
        if weights not in self._heads:
            self._heads[weights] = read_head(weights)
        return self._heads[weights]

    def encoder(self, config: VisualEncoderConfig) -> "CachedEncoder":
        """A visual encoder, of dense features or of masked crops."""
        if config not in self._encoders:
            encoder = load_region_encoder(config, device=self.device)
            self._encoders[config] = CachedEncoder(encoder, self._disk_cache(config))
        return self._encoders[config]

    def text(self, config: TextEncoderConfig) -> "CachedTexts":
        """A text encoder."""
        if config not in self._texts:
            self._texts[config] = CachedTexts(load_text_encoder(config, device=self.device))
        return self._texts[config]

    def proposer(self, config: ProposerConfig) -> "CachedProposer":
        """A class-agnostic proposer. OpenCut cuts features of `encoder`, which are cached, too."""
        if config not in self._proposers:
            cut = config.opencut
            loaded: Any
            if cut is None:
                loaded = load_proposer(config, device=self.device)
            else:
                keys = self.encoder(cut.keys)
                loaded = opencut_proposer(
                    keys, cut.cut, crf=cut.crf, crf_at=cut.crf_at, device=self.device
                )
            self._proposers[config] = CachedProposer(loaded, self._disk_cache(config))
        return self._proposers[config]

    def proposals(self, config: ProposerConfig, class_names: tuple[str, ...]) -> "CachedProposer":
        """A proposer with everything that region segmenters can use (`load_proposals`). Soft masks
        are not kept for later runs, because they are large."""
        if config.mask_former is config.grounded_sam is config.fcclip is None:
            return self.proposer(config)
        key = (config, class_names)
        if key not in self._proposals:
            loaded = load_proposals(config, class_names, device=self.device)
            self._proposals[key] = CachedProposer(loaded)
        return self._proposals[key]

    def clear(self) -> None:
        """Drops the results of images; models and text embeddings stay."""
        for encoder in self._encoders.values():
            encoder.clear()
        for text in self._texts.values():
            text.clear()
        for proposer in (*self._proposers.values(), *self._proposals.values()):
            proposer.clear()

    def _disk_cache(self, config: Any) -> "DiskCache | None":
        """The folder of a model's results, specific to model, size and device."""
        if not self._folder:
            return None
        weights = [weights_fingerprint(name, revision) for _, name, revision in models_of(config)]
        made_by = [type(config).__name__, dump(config), weights, device_of(self.device).type]
        return DiskCache(Path(self._folder).expanduser() / fingerprint(made_by)[:24])


@contextmanager
def kept_arrays(path: Path) -> Iterator[Any]:
    """The arrays of a file that can be made again. Raises StorageError where the block finds it
    damaged."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as kept:
            yield kept
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise StorageError(f"{path} is damaged ({error}): delete it to rebuild it") from error


class DiskCache:
    """Arrays in files, by image key."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, key: bytes) -> Any:
        """Reads an array or a tuple of arrays; None if there is none.

        Raises:
            StorageError: the file is damaged.
        """
        path = self._path(key)
        if not path.exists():
            return None
        with kept_arrays(path) as kept:
            arrays = tuple(kept[name] for name in kept.files)
        return arrays[0] if len(arrays) == 1 else arrays

    def write(self, key: bytes, value: Any) -> None:
        """Writes an array or a tuple of arrays. The file appears completely or not at all."""
        path, arrays = self._path(key), value if isinstance(value, tuple) else (value,)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Masks compress well; compressing features is not worth the time.
        save = np.savez_compressed if arrays[0].dtype == bool else np.savez
        with whole_file(path) as partial, open(partial, "wb") as file:
            save(file, *arrays)

    def _path(self, key: bytes) -> Path:
        name = key.hex()
        return self._folder / name[:2] / f"{name[2:40]}.npz"


class CachedEncoder:
    """A visual encoder that caches its results; other attributes are the wrapped encoder's."""

    def __init__(self, encoder: Any, kept: DiskCache | None = None) -> None:
        self._encoder, self._disk_cache = encoder, kept
        self._dense: dict[bytes, np.ndarray] = {}
        self._regions: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}

    def clear(self) -> None:
        """Drops the cached results."""
        self._dense.clear()
        self._regions.clear()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def encode(self, images: Sequence[np.ndarray]) -> Any:
        """See `VisualEncoder.encode`."""
        keys = [array_key(image) for image in images]
        found = _cached(
            self._dense,
            keys,
            lambda new: self._encoder.encode([images[i] for i in new]),
            self._disk_cache,
        )
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
        keys = [array_key(*arrays) for arrays in zip(*given, strict=True)]

        def encode(new: list[int]) -> Any:
            some = None if heatmaps is None else [heatmaps[i] for i in new]
            return self._encoder.encode_regions(
                [images[i] for i in new], [masks[i] for i in new], some
            )

        return _cached(self._regions, keys, encode, self._disk_cache)


class CachedTexts:
    """A text encoder that caches the embeddings of each list of texts and each image."""

    def __init__(self, encoder: Any) -> None:
        self._encoder = encoder
        self._known: dict[tuple[str, ...], np.ndarray] = {}
        self._images: dict[bytes, np.ndarray] = {}

    def clear(self) -> None:
        """Drops the cached results of images."""
        self._images.clear()

    def encode(self, texts: list[str]) -> np.ndarray:
        """See `TextEncoder.encode`."""
        key = tuple(texts)
        if key not in self._known:
            self._known[key] = self._encoder.encode(list(texts))
        return self._known[key]

    def encode_images(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """See `TextEncoder.encode_images`."""
        keys = [array_key(image) for image in images]
        found = _cached(
            self._images, keys, lambda new: self._encoder.encode_images([images[i] for i in new])
        )
        return np.stack(found) if found else self._encoder.encode_images([])


class CachedProposer:
    """A proposer that caches its results."""

    def __init__(self, proposer: RegionProposer, kept: DiskCache | None = None) -> None:
        self._proposer, self._disk_cache = proposer, kept
        self._known: dict[bytes, Any] = {}

    def clear(self) -> None:
        """Drops the cached results."""
        self._known.clear()

    def __call__(self, images: Sequence[np.ndarray]) -> list[Any]:
        keys = [array_key(image) for image in images]
        return _cached(
            self._known,
            keys,
            lambda new: self._proposer([images[i] for i in new]),
            self._disk_cache,
        )


def _cached(
    known: dict[bytes, Any],
    keys: list[bytes],
    make: Callable[[list[int]], Sequence[Any]],
    kept: DiskCache | None = None,
) -> list[Any]:
    """The result of each key; `make` is called with the positions of new, distinct keys."""
    new = list({key: i for i, key in enumerate(keys) if key not in known}.values())
    if kept is not None:
        found = {i: value for i in new if (value := kept.read(keys[i])) is not None}
        known |= {keys[i]: value for i, value in found.items()}
        new = [i for i in new if i not in found]
    if new:
        made = dict(zip((keys[i] for i in new), make(new), strict=True))
        known |= made
        if kept is not None:
            for key, value in made.items():
                kept.write(key, value)
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
