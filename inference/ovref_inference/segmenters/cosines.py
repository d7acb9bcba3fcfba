"""Cosines of features to the prototypes of classes, which each method combines in its own way."""

import numpy as np

from ovref_inference.collection.prototypes import Prototypes
from ovref_inference.vectors import l2_normalised


def prototype_cosines(features_nd: np.ndarray, prototypes: Prototypes) -> np.ndarray:
    """Cosines to every prototype.

    Args:
        features_nd: (n, d) of any length but zero.
        prototypes: of c classes; a class may have fewer than K or none.

    Returns:
        (n, c, K) float32; -inf where a class has fewer prototypes.

    Raises:
        ValueError: features of another width, zero or not finite.
    """
    classes, most, dim = prototypes.vectors_nkd.shape
    cosines = unit_features(features_nd, dim) @ prototypes.vectors_nkd.reshape(-1, dim).T
    cosines_nck = cosines.reshape(len(features_nd), classes, most)
    cosines_nck[:, np.arange(most) >= prototypes.counts[:, None]] = -np.inf
    return cosines_nck


def unit_features(features_nd: np.ndarray, dim: int) -> np.ndarray:
    """(n, d) float32, L2-normalised. Raises ValueError as `prototype_cosines`."""
    if features_nd.shape[1:] != (dim,):
        raise ValueError(
            f"expected features (n, {dim}) like the prototypes, found {features_nd.shape}; use the "
            "visual encoder that made the collection"
        )
    return l2_normalised(features_nd)


def best_cosines(cosines_nck: np.ndarray) -> np.ndarray:
    """(n, c, K) -> (n, c): to the nearest prototype of each class; -inf for a class without any."""
    return cosines_nck.max(2, initial=-np.inf)


def sigmoid(values: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-values)); 0 at -inf."""
    return 1 / (1 + np.exp(-values))
