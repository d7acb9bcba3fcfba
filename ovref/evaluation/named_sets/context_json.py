"""Masks of Pascal Context from the challenge PASCAL in Detail: `trainval_merged.json`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ovref.corpora.json_stream import stream_items
from ovref.errors import InputError
from ovref.ops.run_lengths import mask_of


@dataclass(frozen=True, kw_only=True)
class ContextMasks:
    """The masks of an image."""

    size_hw: tuple[int, int]
    masks: tuple[tuple[int, Mapping[str, Any]], ...]
    """Category (one of the 459 classes) and run lengths, in file order."""


def read_context(path: Path, phase: str) -> dict[str, ContextMasks]:
    """Reads the masks of a phase, `train` or `val`, by stem of the image file.

    The file has hundreds of megabytes, most of which are not needed; it is streamed twice.

    Raises:
        InputError: the file cannot be read, is not such a file, or has no images of the phase.
    """
    sizes: dict[int, tuple[str, tuple[int, int]]] = {}
    masks: dict[int, list[tuple[int, Mapping[str, Any]]]] = {}
    try:
        with open(path, encoding="utf-8-sig") as file:
            for _, each in stream_items(file, "images"):
                if each["phase"] == phase:
                    size_hw = (int(each["height"]), int(each["width"]))
                    sizes[int(each["image_id"])] = (Path(each["file_name"]).stem, size_hw)
            file.seek(0)
            for _, each in stream_items(file, "annos_segmentation"):
                if int(each["image_id"]) in sizes:
                    mask = (int(each["category_id"]), each["segmentation"])
                    masks.setdefault(int(each["image_id"]), []).append(mask)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"cannot read the masks of Pascal Context in {path}: {error!r}") from error
    if not masks:
        raise InputError(f"{path} has no masks of the phase {phase}")
    found = {
        name: ContextMasks(size_hw=size_hw, masks=tuple(masks[number]))
        for number, (name, size_hw) in sizes.items()
        if number in masks
    }
    return dict(sorted(found.items()))


def context_values(path: Path, image: ContextMasks) -> np.ndarray:
    """(H, W) int32 ids of the 459 classes, 0 without a mask; later masks are on top.

    Raises:
        InputError: run lengths are broken or have another size.
    """
    values_hw = np.zeros(image.size_hw, dtype=np.int32)
    for category, segmentation in image.masks:
        try:
            values_hw[mask_of(segmentation, image.size_hw)] = category
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise InputError(f"{path} has a broken mask of category {category}: {error}") from error
    return values_hw
