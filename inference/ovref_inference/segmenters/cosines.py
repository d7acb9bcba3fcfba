"""Cosines of features to the prototypes of classes, which each method combines in its own way."""

import numpy as np
import torch

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
    return cosines_on(None, features_nd, prototypes).numpy()


def cosines_on(
    device: torch.device | None, features_nd: np.ndarray, prototypes: Prototypes
) -> torch.Tensor:
    """`prototype_cosines` as a tensor on a device, None for the CPU."""
    classes, most, dim = prototypes.vectors_nkd.shape
    if features_nd.shape[1:] != (dim,):
        raise ValueError(
            f"expected features (n, {dim}) like the prototypes, found {features_nd.shape}; use the "
            "visual encoder that made the collection"
        )
    unit_nd = torch.as_tensor(l2_normalised(features_nd), device=device)
    vectors_xd = torch.as_tensor(prototypes.vectors_nkd.reshape(-1, dim), device=device)
    cosines_nck = (unit_nd @ vectors_xd.T).unflatten(1, (classes, most))
    absent_ck = np.arange(most) >= prototypes.counts[:, None]
    return cosines_nck.masked_fill_(torch.as_tensor(absent_ck, device=device), -torch.inf)


def best_cosines(cosines_nck: np.ndarray) -> np.ndarray:
    """(n, c, K) -> (n, c): to the nearest prototype of each class; -inf for a class without any."""
    return cosines_nck.max(2, initial=-np.inf)


def sigmoid(values: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-values)); 0 at -inf."""
    return 1 / (1 + np.exp(-values))
