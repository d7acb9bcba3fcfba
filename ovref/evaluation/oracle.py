"""True masks as proposals: the upper bound of a segmenter with perfect proposals."""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from ovref.evaluation.cached import RegionProposer, array_key
from ovref.evaluation.metrics_semantic import IGNORE


def label_masks(label_hw: np.ndarray, ignore: int = IGNORE) -> np.ndarray:
    """One mask for each connected component of each class in a true label map.

    Args:
        label_hw: (H, W) integer class labels.
        ignore: label without a mask.

    Returns:
        (n, H, W) bool, by class and then from top to bottom; components are 4-connected.
    """
    parts = [np.zeros((0, *label_hw.shape), dtype=bool)]
    for label in np.unique(label_hw[label_hw != ignore]):
        numbers_hw, count = ndimage.label(label_hw == label)
        parts.append(numbers_hw == np.arange(1, count + 1)[:, None, None])
    return np.concatenate(parts)


def oracle_proposer(images: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> RegionProposer:
    """A proposer that returns known masks.

    Args:
        images: (H, W, 3) uint8 each.
        masks: (n, H, W) bool for each of these images.

    Returns:
        A proposer that accepts exactly these whole images, in any order and number; it raises
        ValueError for others.
    """
    known = {array_key(image): masks_nhw for image, masks_nhw in zip(images, masks, strict=True)}

    def propose(queried: Sequence[np.ndarray]) -> list[np.ndarray]:
        keys = [array_key(image) for image in queried]
        unknown = [index for index, key in enumerate(keys) if key not in known]
        if unknown:
            raise ValueError(
                f"oracle masks exist for the {len(known)} given images only, found others at "
                f"positions {unknown[:5]} (windows of an image are images of their own)"
            )
        return [known[key] for key in keys]

    return propose
