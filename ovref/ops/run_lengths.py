"""COCO's masks, polygons and run lengths, by pycocotools."""

from collections.abc import Mapping
from typing import Any

import numpy as np


def rle(mask_hw: np.ndarray) -> dict[str, Any]:
    """Encodes an (H, W) bool mask: `size` [H, W] and `counts`, a str."""
    from pycocotools import mask as coco

    code = coco.encode(np.asfortranarray(mask_hw, dtype=np.uint8))
    return {"size": [int(side) for side in code["size"]], "counts": code["counts"].decode("ascii")}


def mask_of(segmentation: Any, size_hw: tuple[int, int]) -> np.ndarray:
    """(H, W) bool mask of a list of polygons, or of run lengths as a list or a string.

    Raises:
        ValueError: run lengths have another size, or a polygon has fewer than three points.
    """
    if isinstance(segmentation, Mapping):
        if tuple(segmentation["size"]) != size_hw:
            raise ValueError(f"a mask has size {segmentation['size']}, its image {size_hw}")
        counts = segmentation["counts"]
        # Not by pycocotools, which fills what broken run lengths leave open.
        runs = np.array(_decoded(counts) if isinstance(counts, str) else counts, dtype=np.int64)
        if (runs < 0).any() or runs.sum() != size_hw[0] * size_hw[1]:
            raise ValueError("run lengths do not fill the mask")
        flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
        return flat.reshape(size_hw[::-1]).T
    for polygon in segmentation:
        if len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(f"a polygon has {len(polygon)} numbers, expected pairs of at least 3")
    if not segmentation:
        return np.zeros(size_hw, dtype=bool)
    from pycocotools import mask as coco

    return coco.decode(coco.merge(coco.frPyObjects(segmentation, *size_hw))).astype(bool)


def _decoded(text: str) -> list[int]:
    """Decodes compressed run lengths: 5 bits per character, differences from the third on."""
    runs: list[int] = []
    position = 0
    while position < len(text):
        value, shift, more = 0, 0, True
        while more:
            bits = ord(text[position]) - 48
            value |= (bits & 0x1F) << shift
            more = bool(bits & 0x20)
            position, shift = position + 1, shift + 5
            if not more and bits & 0x10:
                value |= -1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
    return runs
