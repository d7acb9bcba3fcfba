"""True masks as proposals: what a segmenter would reach if its proposals were perfect."""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from ovref.evaluation.cached import RegionProposer, array_key
from ovref.evaluation.metrics_semantic import IGNORE


def label_masks(label_hw: np.ndarray, ignore: int = IGNORE) -> np.ndarray:
    """Each connected part of each class of a true label map as one mask.

    Args:
        label_hw: (H, W) integer class labels.
        ignore: label that belongs to no mask.

    Returns:
        (n, H, W) bool, by class and then from top to bottom; connected pixels share a side.
    """
    parts = [np.zeros((0, *label_hw.shape), dtype=bool)]
    for label in np.unique(label_hw[label_hw != ignore]):
        numbers_hw, count = ndimage.label(label_hw == label)
        parts.append(numbers_hw == np.arange(1, count + 1)[:, None, None])
    return np.concatenate(parts)


def oracle_proposer(images: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> RegionProposer:
    """Known masks as a proposer.

    Args:
        images: (H, W, 3) uint8 each.
        masks: (n, H, W) bool of each of these images.

    Returns:
        A proposer that accepts exactly these images, whole, in any order and number; it raises
        ValueError for others.
    """
    known = {array_key(image): masks_nhw for image, masks_nhw in zip(images, masks, strict=True)}

    def propose(asked: Sequence[np.ndarray]) -> list[np.ndarray]:
        keys = [array_key(image) for image in asked]
        unknown = [index for index, key in enumerate(keys) if key not in known]
        if unknown:
            raise ValueError(
                f"oracle masks exist for the {len(known)} given images only, found others at "
                f"positions {unknown[:5]} (windows of an image are images of their own)"
            )
        return [known[key] for key in keys]

    return propose
