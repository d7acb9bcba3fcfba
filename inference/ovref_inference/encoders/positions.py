"""Features without what only their place says."""

import numpy as np
import torch
from torch.nn import functional

from ovref_inference.encoders.config import VisualEncoderConfig
from ovref_inference.encoders.towers import Layer, Tower, unusable


def without_positions(tower: Tower, config: VisualEncoderConfig, dim: int) -> Layer:
    """`tower.forward` less the `config.position_debias` leading directions in which the features of
    a black image, normalised, differ from place to place (INSID3's positional debiasing).

    The directions are found once for each size of images. Images that keep their aspect may have
    fewer patches than there are directions; all in which these patches differ go then.

    Args:
        dim: width of the features.

    Raises:
        ModelError: the network pools its features before it projects them; or at least as many
            directions are to go as `dim` or the number of patches of an image of `config.size_hw`.
    """
    number, cells = config.position_debias, tower.grid_hw[0] * tower.grid_hw[1]
    if tower.head is not None or tower.pool is not None:
        raise unusable(config.model, tower.model_class, "position_debias needs the patches of a "
                       "vision transformer", "0, the default, works")  # fmt: skip
    if number >= min(dim, cells):
        raise unusable(
            config.model, tower.model_class, f"position_debias={number} leaves nothing of features "
            f"of {dim} numbers that {cells} patches have", "a smaller number works",
        )  # fmt: skip
    forward = tower.forward
    found: dict[tuple[int, ...], torch.Tensor] = {}

    def directions(size_hw: tuple[int, int]) -> torch.Tensor:
        black = np.zeros((*size_hw, 3), dtype=np.uint8)
        (features_lc,) = forward(tower.images([black], size_hw)).float()
        features_lc = functional.normalize(features_lc, dim=1)
        centred_lc = features_lc - features_lc.mean(0)
        most = min(number, len(centred_lc) - 1)
        return torch.linalg.svd(centred_lc, full_matrices=False).Vh[:most]

    def rest(pixels_nchw: torch.Tensor) -> torch.Tensor:
        height, width = pixels_nchw.shape[-2:]
        if (height, width) not in found:
            found[height, width] = directions((height, width))
        basis_rc, features_nlc = found[height, width], forward(pixels_nchw).float()
        return features_nlc - features_nlc @ basis_rc.T @ basis_rc

    return rest
