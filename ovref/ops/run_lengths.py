"""Masks as COCO's compressed run-length encoding, by pycocotools."""

from typing import Any

import numpy as np


def rle(mask_hw: np.ndarray) -> dict[str, Any]:
    """Encodes an (H, W) bool mask: `size` [H, W] and `counts`, a str."""
    from pycocotools import mask as coco

    code = coco.encode(np.asfortranarray(mask_hw, dtype=np.uint8))
    return {"size": [int(side) for side in code["size"]], "counts": code["counts"].decode("ascii")}
