"""Reads reference sets of other programs as arrays for `own_arrays.collection_from_arrays`.

    FreeDA       prototype_embeddings.tar or folder, one .npy per reference; faiss_index/knn.index
    CorrCLIPv2   vfm_embeddings/<bank>_<vfm>.pt, clip_embeddings/<bank>_<clip>.pt, manifests/

Neither has nouns: each reference gets the class of a list whose text is nearest in CLIP space, with
the cosine as its score. Nothing is unpickled, except by torch's reader of plain tensors.
"""

import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ovref.errors import InputError
from ovref.exchange.own_arrays import OwnArrays
from ovref_inference.collection.retrieve import TEMPLATES, Texts, class_embeddings
from ovref_inference.vectors import l2_normalised

ROWS = 65_536


def read_freeda(
    embeddings: Path, index: Path, classes: Sequence[str], texts: Texts, scratch: Path
) -> OwnArrays:
    """FreeDA's released reference set.

    As in FreeDA's code, row i of the index belongs to the i-th sorted embedding name, and
    references that are not finite are left out.

    Args:
        embeddings: the archive, or the folder that it was unpacked into.
        index: `knn.index` of the textual embeddings, which are reconstructed from it.
        classes: class names to choose nouns from.
        texts: OpenAI's CLIP ViT-L/14, which made the index.
        scratch: local folder for the matrix.

    Raises:
        InputError: files are missing or of the wrong type, or their lengths differ.
    """
    textual = _stored_vectors(index)
    names, rows = _embedding_files(embeddings)
    if len(names) != len(textual):
        raise InputError(
            f"{embeddings} has {len(names)} embeddings, {index} {len(textual)} vectors: they are "
            "not from the same release"
        )
    place = {name: row for row, name in enumerate(sorted(names))}
    if len(place) != len(names):
        raise InputError(f"{embeddings} has two embeddings with the same name")
    visual: np.ndarray | None = None
    for name, file in rows:
        try:
            vector = np.load(file, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise InputError(f"cannot read {name} of {embeddings}: {error}") from error
        vector = np.asarray(vector, dtype=np.float32).reshape(-1)
        if visual is None:
            path, shape = scratch / "visual.npy", (len(names), len(vector))
            visual = np.lib.format.open_memmap(path, "w+", np.float32, shape)
        if vector.shape != (visual.shape[1],):
            raise InputError(
                f"{name} of {embeddings} has {len(vector)} numbers, others {visual.shape[1]}"
            )
        visual[place[name]] = vector
    if visual is None:
        raise InputError(f"there is no .npy file in {embeddings}")
    finite = np.isfinite(visual).all(1) & visual.any(1)
    keys = np.array(sorted(names))
    if not finite.all():
        visual, textual, keys = visual[finite], textual[finite], keys[finite]
    return _named(visual, textual, [Path(key).stem for key in keys], classes, texts)


def read_corrclip(
    bank: Path, name: str, clip: str, vfm: str, classes: Sequence[str], texts: Texts
) -> OwnArrays:
    """One of CorrCLIPv2's memory banks.

    Args:
        bank: the folder `memory_bank`.
        name, clip, vfm: names of the bank and its two models, as in the file names.
        classes: class names to choose nouns from.
        texts: the CLIP model called `clip`.

    Raises:
        InputError: a file is missing or of the wrong type, or lengths differ.
    """
    visual = _tensor(bank / f"vfm_embeddings/{name}_{vfm}.pt")
    textual = _tensor(bank / f"clip_embeddings/{name}_{clip}.pt")
    regions = bank / f"manifests/{name}.manifest.txt"
    try:
        keys = regions.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"cannot read the manifest {regions}: {error}") from error
    if not len(visual) == len(textual) == len(keys):
        raise InputError(
            f"the bank {name} has {len(keys)} regions, {len(visual)} vision and {len(textual)} "
            "CLIP embeddings: it is not complete"
        )
    return _named(visual, textual, keys, classes, texts)


def _named(
    visual: np.ndarray, textual: np.ndarray, keys: list[str], classes: Sequence[str], texts: Texts
) -> OwnArrays:
    """Rows with the `nearest_names`; a caption has the row's key, too."""
    nouns, scores = nearest_names(textual, classes, texts)
    captions = [f"{noun} ({key})" for noun, key in zip(nouns, keys, strict=True)]
    return OwnArrays(
        visual=visual, nouns=nouns, captions=captions, textual=textual, more={"score": scores}
    )


def nearest_names(
    textual: np.ndarray, classes: Sequence[str], texts: Texts
) -> tuple[list[str], list[float]]:
    """The class with the nearest text for each row, and the cosine.

    Raises:
        InputError: the widths of text encoder and rows differ.
    """
    texts_cd = class_embeddings(texts, list(classes), TEMPLATES)
    if texts_cd.shape[1] != textual.shape[1]:
        raise InputError(
            f"the CLIP embeddings have {textual.shape[1]} dimensions, those of the text encoder "
            f"{texts_cd.shape[1]}: give the CLIP model that made them"
        )
    nouns: list[str] = []
    scores: list[float] = []
    for start in range(0, len(textual), ROWS):
        cosines = l2_normalised(textual[start : start + ROWS]) @ texts_cd.T
        nouns += [classes[label] for label in cosines.argmax(1)]
        scores += cosines.max(1).tolist()
    return nouns, scores


def _stored_vectors(path: Path) -> np.ndarray:
    """Reconstructs (n, d) float32 from a faiss index that stores its vectors, exactly or not."""
    import faiss

    try:
        index = faiss.read_index(str(path))
    except RuntimeError as error:
        raise InputError(f"cannot read the index {path}: {error}") from error
    inverted: Any = faiss.try_extract_index_ivf(index)
    if inverted is not None:
        inverted.make_direct_map()
    try:
        return index.reconstruct_n(0, index.ntotal)
    except RuntimeError as error:
        raise InputError(f"{path} does not store its vectors: {error}") from error


def _embedding_files(place: Path) -> tuple[list[str], Iterator[tuple[str, BinaryIO]]]:
    """The names of all .npy files, and an iterator of each with its content, in stored order."""
    if place.is_dir():
        paths = sorted(place.glob("*.npy"))

        def opened() -> Iterator[tuple[str, BinaryIO]]:
            for path in paths:
                with open(path, "rb") as file:
                    yield path.name, file

        return [path.name for path in paths], opened()
    try:
        with tarfile.open(place) as tar:
            names = [Path(item.name).name for item in tar if item.name.endswith(".npy")]
    except (OSError, tarfile.TarError) as error:
        raise InputError(f"cannot read the archive {place}: {error}") from error

    def unpacked() -> Iterator[tuple[str, BinaryIO]]:
        import io

        with tarfile.open(place) as tar:  # read in memory, so no path can escape the archive
            for item in tar:
                content = tar.extractfile(item) if item.name.endswith(".npy") else None
                if content is not None:
                    yield Path(item.name).name, io.BytesIO(content.read())

    return names, unpacked()


def _tensor(path: Path) -> np.ndarray:
    """Reads (n, d) float16 from a `.pt` file with a single tensor."""
    import torch

    try:
        tensor = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, torch.serialization.pickle.UnpicklingError) as error:
        raise InputError(f"cannot read the tensor {path}: {str(error)[:300]}") from error
    if not isinstance(tensor, torch.Tensor) or tensor.ndim != 2:
        raise InputError(f"{path} must be one tensor (n, d)")
    return tensor.numpy()
