"""Masks as COCO's compressed run-length codes, by pycocotools."""

from collections.abc import Mapping
from typing import Any

import numpy as np


def rle(mask_hw: np.ndarray) -> dict[str, Any]:
    """(H, W) bool -> `size` [H, W] and `counts`, a text."""
    from pycocotools import mask as coco

    code = coco.encode(np.asfortranarray(mask_hw, dtype=np.uint8))
    return {"size": [int(side) for side in code["size"]], "counts": code["counts"].decode("ascii")}


def mask_of_rle(code: Mapping[str, Any]) -> np.ndarray:
    """The (H, W) bool mask of `size` and `counts`."""
    from pycocotools import mask as coco

    counts = code["counts"]
    plain = {"size": list(code["size"]), "counts": counts.encode("ascii")}
    return coco.decode(plain).astype(bool)
