"""L2 normalisation, which every embedding here passes through, offline and online."""

import numpy as np


def l2_normalised(vectors: np.ndarray) -> np.ndarray:
    """(..., d) real vectors -> (..., d) float32 of length 1.

    Raises:
        ValueError: a vector is zero or not finite; it has no direction, and a NaN in an index
            would spoil every search.
    """
    vectors = np.asarray(vectors, dtype=np.float32)
    # Scaled by the largest entry first, so that squares neither overflow nor vanish.
    largest = np.abs(vectors).max(axis=-1, keepdims=True, initial=0.0)
    bad = ~(np.isfinite(largest) & (largest > 0))
    if bad.any():
        where = np.argwhere(bad[..., 0])[0].tolist()
        raise ValueError(
            f"{int(bad.sum())} of {bad.size} vectors are zero or not finite, the first at {where}"
        )
    scaled = vectors / largest
    return scaled / np.linalg.norm(scaled, axis=-1, keepdims=True)
