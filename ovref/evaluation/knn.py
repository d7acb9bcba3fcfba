"""k-nearest-neighbour segmentation of dense features: evaluates a backbone without a collection.

Balazevic et al., Towards In-context Scene Understanding (NeurIPS 2023, section 3), as in
vpariza/open-hummingbird-eval: patches of training images are stored in a memory bank with their
class shares; each patch of an image attends to its nearest neighbours, whose averaged shares,
upsampled to the image, are its class scores. Differences: pixels without a class are left out
(there they count as the first class), predictions keep their classes (there they are matched to the
true ones by overlap), and images are evaluated at their own size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array, vstack
from torch.nn.functional import interpolate

from ovref.check_models import weights_fingerprint
from ovref.config import dump
from ovref.corpora.corpus_identity import identify_files
from ovref.errors import InputError
from ovref.evaluation.cached import CachedModels, kept_arrays
from ovref.evaluation.metrics_semantic import IGNORE
from ovref.evaluation.named_sets.opening import Example, LabelledSet
from ovref.evaluation.predictions import Prediction, prediction_of_labels
from ovref.evaluation.spec import EvaluateSpec, KnnConfig
from ovref.identity import fingerprint, record_seed
from ovref_inference.pixels import device_of
from ovref_inference.places import whole_file
from ovref_inference.vectors import l2_normalised

MEMORY = "memory.npz"
"""The memory bank in an evaluation's output."""
BLOCK = 65_536
"""Patches of the memory bank compared at a time."""
IMAGES_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True)
class MemoryBank:
    """A memory bank: patches of training images."""

    features_nd: np.ndarray
    """(n, d) float16, L2-normalised."""
    shares_nc: csr_array
    """(n, classes) float32: class shares among the labelled pixels of each patch; rows sum to 1."""


def memory_bank_identity(spec: EvaluateSpec, training: LabelledSet) -> dict[str, Any]:
    """Identity of a memory bank."""
    model = spec.knn.encoder
    return {
        "encoder": dump(model),
        "weights": weights_fingerprint(model.model, model.revision or ""),
        "patches": spec.knn.memory,
        "seed": spec.knn.seed,
        "training": [training.name, training.class_fingerprint, fingerprint(list(training.ids))],
        "files": identify_files(training.folders),
    }


def make_memory_bank(
    spec: EvaluateSpec,
    training: LabelledSet,
    models: CachedModels,
    report: Callable[[int], None] = lambda done: None,
) -> MemoryBank:
    """Makes a memory bank of training images, or opens the one that an earlier call with the same
    settings stored in the output.

    Each image contributes equally many patches; patches whose classes are rare in the image are
    more probable (`sample_patches`).

    Raises:
        InputError: a training image cannot be read, or no image has a labelled pixel.
        StorageError: the stored file is damaged.
    """
    path = Path(spec.output) / MEMORY
    identity = fingerprint(memory_bank_identity(spec, training))
    if (found := _read(path, identity)) is not None:
        return found
    encoder, classes = models.encoder(spec.knn.encoder), len(training.class_names)
    quota = max(1, spec.knn.memory // len(training))
    features, shares = [], []
    for start in range(0, len(training), IMAGES_AT_ONCE):
        examples = [training.read(name) for name in training.ids[start : start + IMAGES_AT_ONCE]]
        grids_nhwd = encoder.encode([example.image_hwc for example in examples])
        for example, grid_hwd in zip(examples, grids_nhwd, strict=True):
            shares_pc = patch_class_shares(example.label_hw, grid_hwd.shape[:2], classes)
            rng = np.random.default_rng(record_seed(spec.knn.seed, example.id))
            chosen = sample_patches(shares_pc, quota, rng)
            flat_pd = grid_hwd.reshape(-1, grid_hwd.shape[-1])
            features.append(l2_normalised(flat_pd[chosen]).astype(np.float16))
            shares.append(csr_array(shares_pc[chosen]))
        models.clear()
        report(start + len(examples))
    memory = MemoryBank(
        features_nd=np.concatenate(features), shares_nc=vstack(shares, format="csr")
    )
    if not len(memory.features_nd):
        raise InputError(f"no image of {training.name} has a labelled pixel")
    _write(path, memory, identity)
    return memory


def patch_class_shares(label_hw: np.ndarray, grid_hw: tuple[int, int], classes: int) -> np.ndarray:
    """(h * w, classes) float32: class shares among the labelled pixels of each patch; zeros for a
    patch of the grid without any. A pixel belongs to the patch that contains its centre."""
    rows, columns = (
        ((np.arange(size) + 0.5) * cells / size).astype(np.int64)
        for size, cells in zip(label_hw.shape, grid_hw, strict=True)
    )
    patches_hw = rows[:, None] * grid_hw[1] + columns
    known_hw = label_hw != IGNORE
    pairs = patches_hw[known_hw] * classes + label_hw[known_hw]
    counts = np.bincount(pairs, minlength=grid_hw[0] * grid_hw[1] * classes)
    counts_pc = counts.reshape(-1, classes).astype(np.float32)
    return counts_pc / np.maximum(counts_pc.sum(1, keepdims=True), 1)


def sample_patches(shares_pc: np.ndarray, quota: int, rng: np.random.Generator) -> np.ndarray:
    """Samples at most `quota` labelled patches of one image: (n,) int64.

    A patch's score is the number of patches with one of its classes, summed over its classes, times
    a uniform random number; the lowest scores are taken (section 3.1 of the paper).
    """
    present_pc = shares_pc > 0
    usable = np.flatnonzero(present_pc.any(1))
    scores = (present_pc @ present_pc.sum(0))[usable] * rng.random(len(usable))
    return np.sort(usable[np.argsort(scores, kind="stable")[:quota]])


class NearestPatches:
    """Class scores of patches by their nearest neighbours in the memory bank."""

    def __init__(self, memory: MemoryBank, config: KnnConfig, device: str | None = None) -> None:
        self._config, self._shares_nc = config, memory.shares_nc
        self._device = device_of(device)
        # CPUs multiply float32 faster than float16.
        kind = torch.float16 if self._device.type == "cuda" else torch.float32
        self._features_nd = torch.from_numpy(memory.features_nd).to(self._device, kind)

    def __call__(self, features_qd: np.ndarray) -> np.ndarray:
        """(q, classes) float32, rows sum to 1: the shares of the k nearest patches by cosine,
        weighted by the softmax of cosine / temperature. Features may have any norm."""
        cosines_qk, rows_qk = self._nearest(l2_normalised(features_qd))
        weights_qk = torch.softmax(cosines_qk / self._config.temperature, dim=1).cpu().numpy()
        count, k = weights_qk.shape
        starts = np.arange(0, count * k + 1, k)
        parts = (weights_qk.ravel(), rows_qk.cpu().numpy().ravel(), starts)
        weights_qn = csr_array(parts, shape=(count, len(self._features_nd)))
        return (weights_qn @ self._shares_nc).toarray().astype(np.float32)

    def _nearest(self, queries_qd: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and rows of the k nearest patches."""
        queries = torch.from_numpy(queries_qd).to(self._device, self._features_nd.dtype)
        k = min(self._config.neighbours, len(self._features_nd))
        cosines = torch.zeros((len(queries), 0), device=self._device)
        rows = torch.zeros((len(queries), 0), dtype=torch.int64, device=self._device)
        for start in range(0, len(self._features_nd), BLOCK):
            block = (queries @ self._features_nd[start : start + BLOCK].T).float()
            best = block.topk(min(k, block.shape[1]), dim=1)
            cosines = torch.cat([cosines, best.values], dim=1)
            rows = torch.cat([rows, best.indices + start], dim=1)
            kept = cosines.topk(min(k, cosines.shape[1]), dim=1)
            cosines, rows = kept.values, rows.gather(1, kept.indices)
        return cosines, rows


class KnnMethod:
    """The only row of `method=knn`, in place of `methods.Methods`."""

    def __init__(self, spec: EvaluateSpec, data: LabelledSet, models: CachedModels) -> None:
        """The memory bank, made by `make_memory_bank`, is opened with the first image."""
        self._spec, self._data, self._models = spec, data, models
        self._nearest: NearestPatches | None = None

    def encode_batch(self, examples: Sequence[Example]) -> None:
        """Encodes images in one batch."""
        if self._nearest is None:
            training = self._spec.open_training(self._data)
            memory = make_memory_bank(self._spec, training, self._models)
            self._nearest = NearestPatches(memory, self._spec.knn, self._models.device)
        self._encoder.encode([example.image_hwc for example in examples])

    @property
    def _encoder(self) -> Any:
        return self._models.encoder(self._spec.knn.encoder)

    def predict(self, row: Any, image_hwc: np.ndarray, segments: bool = False) -> Prediction:
        """See `Methods.predict`."""
        if self._nearest is None:
            raise ValueError("encode_batch must be called with an image before predict")
        grid_hwd = self._encoder.encode([image_hwc])[0]
        height, width = grid_hwd.shape[:2]
        scores_pc = self._nearest(grid_hwd.reshape(height * width, -1))
        labels_hw, scores_hw = upsampled_labels(scores_pc, (height, width), image_hwc.shape[:2])
        things = self._data.is_thing if segments else None
        return prediction_of_labels(labels_hw, scores_hw, things)


def upsampled_labels(
    scores_pc: np.ndarray, grid_hw: tuple[int, int], size_hw: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """The best class of each pixel after bilinear upsampling of (h * w, classes) scores of at least
    0: (H, W) int32, and its score."""
    found = np.flatnonzero(scores_pc.max(0) > 0)  # a class without a score never wins
    grid_chw = torch.from_numpy(np.ascontiguousarray(scores_pc[:, found].T))
    large = interpolate(grid_chw.reshape(1, -1, *grid_hw), size=size_hw, mode="bilinear")[0]
    best = large.max(0)
    return found[best.indices.numpy()].astype(np.int32), best.values.numpy()


def _read(path: Path, identity: str) -> MemoryBank | None:
    """The stored memory bank; None if there is none or its settings differ."""
    if not path.exists():
        return None
    with kept_arrays(path) as kept:
        if str(kept["identity"]) != identity:
            return None
        parts = (kept["shares"], kept["classes"], kept["starts"])
        shares_nc = csr_array(parts, shape=tuple(kept["shape"].tolist()))
        return MemoryBank(features_nd=kept["features"], shares_nc=shares_nc)


def _write(path: Path, memory: MemoryBank, identity: str) -> None:
    """Writes the file, which appears completely or not at all."""
    shares = memory.shares_nc
    with whole_file(path) as partial, open(partial, "wb") as file:
        np.savez(
            file, identity=np.array(identity), features=memory.features_nd, shares=shares.data,
            classes=shares.indices, starts=shares.indptr, shape=np.array(shares.shape),
        )  # fmt: skip
