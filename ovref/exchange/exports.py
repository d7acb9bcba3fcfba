"""Exports collections for other programs; see docs/guides/publish-and-exchange.md.

Each `.pt` file is one tensor, which `torch.load(..., weights_only=True)` reads.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ovref.contract import base_key
from ovref.errors import InputError
from ovref.exchange.exemplars import best_references, click_points
from ovref.exchange.picture_files import Picture
from ovref.ops.run_lengths import rle
from ovref.stored_images import png_of
from ovref_inference.collection.reference_collection import ReferenceCollection
from ovref_inference.images import box_of
from ovref_inference.vectors import check_readable, l2_normalised

Pictures = Callable[[Sequence[dict[str, Any]]], list[Picture | None]]
"""Rows of the collection -> their images and masks; None for one that no longer exists."""

IMAGES_AT_ONCE = 256
"""Images requested at a time: they are read from files that hold many."""
PQ_ROWS = 10_000
"""Number of references from which CorrCLIPv2's index is compressed, as by its builder. Fewer are
too few for training; its loader then accepts a flat index."""
PQ_PARTS = 32


@dataclass(frozen=True, kw_only=True)
class Exported:
    """Summary of an export."""

    folder: Path
    counts: dict[str, int]
    left_out: tuple[str, ...] = ()
    """Nouns or references left out, with the reason."""


def export_prototypes(collection: ReferenceCollection, folder: Path) -> Exported:
    """Writes `prototypes.npy` (p, d) float32; `prototypes.safetensors` with the same and `noun`,
    the line of each row's noun in `nouns.txt`; and `prototypes.json`, which names the models."""
    from safetensors.numpy import save_file

    vectors, owners = _prototypes(collection)
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "prototypes.npy", vectors)
    tensors = {"vectors": vectors, "noun": owners}
    save_file(tensors, folder / "prototypes.safetensors", metadata={"made_by": "ovref"})
    (folder / "nouns.txt").write_text("\n".join(collection.nouns) + "\n", encoding="utf-8")
    manifest = collection.manifest
    about = {
        "visual": {"model": manifest.visual.model, "settings": manifest.visual.settings},
        "textual": {"model": manifest.textual.model, "settings": manifest.textual.settings},
        "fingerprint": manifest.fingerprint,
        "licences": list(manifest.licences),
    }
    _write_json(folder / "prototypes.json", about)
    return Exported(
        folder=folder, counts={"nouns": len(collection.nouns), "prototypes": len(vectors)}
    )


def export_segrag(collection: ReferenceCollection, folder: Path) -> Exported:
    """SegRAG's bank: `<noun>/prototypes.pt`, one float32 tensor (k, d), rows L2-normalised.

    SegRAG compares them with DINOv3-L features; it must use the collection's backbone instead if
    that is another.
    """
    import torch

    vectors, owners = _prototypes(collection)
    left_out, written, total = [], 0, 0
    for row, noun in enumerate(collection.nouns):
        own = vectors[owners == row]
        if not _is_name(noun):
            left_out.append(f"{noun}: no name of a folder")
        elif not len(own):
            left_out.append(f"{noun}: no prototypes")
        else:
            (folder / noun).mkdir(parents=True, exist_ok=True)
            torch.save(torch.from_numpy(np.ascontiguousarray(own)), folder / noun / "prototypes.pt")
            written += 1
            total += len(own)
    return Exported(
        folder=folder,
        counts={"nouns": written, "prototypes": total},
        left_out=tuple(left_out),
    )


def export_corrclip(
    collection: ReferenceCollection,
    pictures: Pictures,
    folder: Path,
    *,
    name: str = "ovref",
    clip: str = "metaclip_l",
    vfm: str = "dinov2",
) -> Exported:
    """CorrCLIPv2's memory bank: manifests, masks, CLIP and vision embeddings, and the index.

    The CLIP embeddings are the collection's textual ones, as in `CorrClipSegmenter`. CorrCLIPv2
    must run with the models that the collection was built with.

    Args:
        name: name of the bank. `clip` and `vfm` are CorrCLIPv2's names of the two models. All
            become file names.

    Raises:
        InputError: a reference has no image, or a name cannot be a file name.
        CollectionError: the textual embeddings cannot be read where the collection is.
    """
    import faiss
    import torch

    check_readable(collection.textual)
    for text in (name, clip, vfm):
        if not _is_name(text):
            raise InputError(f"{text!r} cannot be the name of a file")
    masks = f"masks/{name}/ovref"  # after the mask generator
    for part in ("manifests", masks, "clip_embeddings", "vfm_embeddings"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    table = collection.to_table(["id", "key"]).to_pydict()
    images: dict[str, list[int]] = {}
    for number, key in zip(table["id"], table["key"], strict=True):
        images.setdefault(base_key(key), []).append(number)
    order: list[int] = []
    regions, heads = (
        folder / f"manifests/{name}.manifest.txt",
        folder / f"manifests/{name}.images.tsv",
    )
    with open(regions, "w", encoding="utf-8") as keys, open(heads, "w", encoding="utf-8") as tsv:
        for stem, masks_nhw in _masks_of_images(collection, pictures, images):
            ids = images[stem]
            np.savez_compressed(folder / masks / f"{stem}.npz", instance_mask=masks_nhw)
            tsv.write(f"{stem}\t{len(order)}\t{len(ids)}\n")
            keys.writelines(f"{stem}#{number}\n" for number in range(len(ids)))
            order += ids
    visual = l2_normalised(np.asarray(collection.visual[order], dtype=np.float32))
    textual = np.asarray(collection.textual[order], dtype=np.float16)
    torch.save(torch.from_numpy(textual), folder / f"clip_embeddings/{name}_{clip}.pt")
    half = torch.from_numpy(visual.astype(np.float16))
    torch.save(half, folder / f"vfm_embeddings/{name}_{vfm}.pt")
    dim = visual.shape[1]
    inner: Any = faiss.IndexFlatIP(dim)
    if len(visual) >= PQ_ROWS and dim % PQ_PARTS == 0:
        lists = max(1, int(8 * np.sqrt(len(visual))))
        quantizer = faiss.IndexFlatIP(dim)
        inner = faiss.IndexIVFPQ(quantizer, dim, lists, PQ_PARTS, 8)
        inner.train(visual)
    index = faiss.IndexIDMap2(inner)
    index.add_with_ids(visual, np.arange(len(visual), dtype=np.int64))
    faiss.write_index(index, str(folder / f"vfm_embeddings/{name}_{vfm}.faiss"))
    return Exported(folder=folder, counts={"images": len(images), "references": len(order)})


def _masks_of_images(
    collection: ReferenceCollection, pictures: Pictures, images: dict[str, list[int]]
) -> Iterator[tuple[str, np.ndarray]]:
    """The images in order of key, with the (n, H, W) bool masks of their references."""
    stems = sorted(images)
    _check_names(stems)
    for start in range(0, len(stems), IMAGES_AT_ONCE):
        part = stems[start : start + IMAGES_AT_ONCE]
        found = iter(pictures(collection.rows([i for stem in part for i in images[stem]])))
        for stem in part:
            own = list(islice(found, len(images[stem])))
            known = [one.mask_hw for one in own if one is not None and one.mask_hw is not None]
            if len(known) != len(own):
                raise InputError(
                    f"{len(own) - len(known)} of {len(own)} masks of the image {stem} are missing; "
                    "a bank needs them all"
                )
            yield stem, np.stack(known)


def export_exemplars(
    collection: ReferenceCollection,
    pictures: Pictures,
    folder: Path,
    *,
    k: int = 5,
    nouns: Sequence[str] | None = None,
    coco: bool = False,
) -> Exported:
    """Writes k exemplars per noun, with image, box, mask and points, for exemplar-based programs.

    `exemplars.json`: noun -> list of `image`, `box_xyxy`, `mask` (COCO's run-length encoding),
    `points_xy` (inside the mask), `reference`, `caption`. With `coco`, instead `coco.json` and
    `references.json`: category id -> list of `img_id` and `ann_ids`, as in no-time-to-train, which
    takes categories with exactly k references: the others are in `coco.json` alone.

    Raises:
        InputError: a noun is not in the vocabulary, or no image exists.
    """
    wanted = list(nouns or collection.nouns)
    unknown = sorted(set(wanted) - set(collection.nouns))
    if unknown:
        raise InputError(f"{collection.url} has no nouns {', '.join(unknown[:10])}")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    chosen = dict(best_references(collection, wanted, k))
    tree: dict[str, list[dict[str, Any]]] = {}
    files: dict[str, tuple[int, int]] = {}
    left_out = []
    requests = [(noun, number) for noun, ids in chosen.items() for number in ids]
    for start in range(0, len(requests), IMAGES_AT_ONCE):
        part = requests[start : start + IMAGES_AT_ONCE]
        rows = collection.rows([number for _, number in part])
        _check_names([base_key(row["key"]) for row in rows])
        for (noun, _), row, picture in zip(part, rows, pictures(rows), strict=True):
            if picture is None or picture.mask_hw is None:
                left_out.append(f"{noun}: reference {row['id']} has no image")
                continue
            file = f"images/{base_key(row['key'])}.png"
            if file not in files:
                (folder / file).write_bytes(png_of(picture.image_hwc))
                files[file] = (picture.image_hwc.shape[0], picture.image_hwc.shape[1])
            tree.setdefault(noun, []).append(
                {
                    "image": file,
                    "box_xyxy": list(box_of(picture.mask_hw)),
                    "mask": rle(picture.mask_hw),
                    "area": int(picture.mask_hw.sum()),
                    "points_xy": [list(point) for point in click_points(picture.mask_hw)],
                    "reference": row["id"],
                    "caption": row["caption"],
                }
            )
    if not files:
        raise InputError(f"none of the references of {collection.url} has an image any more")
    if coco:
        _write_coco(tree, files, folder, k)
        left_out += [
            f"{noun}: {len(found)} of {k} exemplars, so it is not in references.json"
            for noun, found in tree.items()
            if len(found) < k
        ]
    else:
        _write_json(folder / "exemplars.json", tree)
    counts = {"nouns": len(tree), "images": len(files), "exemplars": sum(map(len, tree.values()))}
    return Exported(folder=folder, counts=counts, left_out=tuple(left_out))


def _write_coco(
    tree: dict[str, list[dict[str, Any]]], files: dict[str, tuple[int, int]], folder: Path, k: int
) -> None:
    numbers = {file: number for number, file in enumerate(files, start=1)}
    images = [
        {"id": numbers[file], "file_name": Path(file).name, "height": h, "width": w}
        for file, (h, w) in files.items()
    ]
    annotations: list[dict[str, Any]] = []
    references: dict[int, list[dict[str, Any]]] = {}
    for category, noun in enumerate(tree, start=1):
        for one in tree[noun]:
            x0, y0, x1, y1 = one["box_xyxy"]
            annotation = {
                "id": len(annotations) + 1,
                "image_id": numbers[one["image"]],
                "category_id": category,
                "segmentation": one["mask"],
                "area": one["area"],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "iscrowd": 0,
            }
            annotations.append(annotation)
            entry = {"img_id": annotation["image_id"], "ann_ids": [annotation["id"]]}
            if len(tree[noun]) == k:
                references.setdefault(category, []).append(entry)
    categories = [{"id": number, "name": noun} for number, noun in enumerate(tree, start=1)]
    _write_json(
        folder / "coco.json",
        {"images": images, "annotations": annotations, "categories": categories},
    )
    _write_json(folder / "references.json", references)


def _prototypes(collection: ReferenceCollection) -> tuple[np.ndarray, np.ndarray]:
    """The prototypes of all nouns, (p, d) float32, L2-normalised; (p,) int64, their nouns."""
    dim = collection.manifest.visual.dim
    parts, owners = [np.zeros((0, dim), dtype=np.float32)], [np.zeros(0, dtype=np.int64)]
    texts = collection.noun_embeddings
    for start in range(0, len(collection.nouns), 256):
        part = slice(start, start + 256)
        found = collection.prototypes(
            collection.nouns[part], text_embeddings=texts[part], floor=None
        )
        for row, (vectors, count) in enumerate(zip(found.vectors_nkd, found.counts, strict=True)):
            parts.append(vectors[:count])
            owners.append(np.full(count, start + row, dtype=np.int64))
    return np.concatenate(parts).astype(np.float32), np.concatenate(owners)


def _is_name(text: str) -> bool:
    return text not in ("", ".", "..") and not set(text) & set("/\\:\0")


def _check_names(stems: Sequence[str]) -> None:
    """Rejects keys that cannot be file names: a foreign key must not lead out of the folder."""
    bad = [stem for stem in stems if not _is_name(stem)]
    if bad:
        raise InputError(f"{bad[0]!r}, the key of an image, cannot be the name of a file")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False) + "\n", encoding="utf-8")
