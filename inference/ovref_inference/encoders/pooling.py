"""Mean-region pooling (FOSSIL eq. 4), the only way from dense features to a region's embedding."""

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np

NO, UNSURE, YES = 0, 128, 255
"""Values of a tri-state mask. Only YES pixels are pooled; UNSURE is neither foreground nor
background."""

_CHUNK_PIXELS = 1 << 24


class DenseEncoder(Protocol):
    """An encoder of images to (n, h, w, d) float32, such as `encoders.VisualEncoder`."""

    def encode(self, images: Sequence[np.ndarray]) -> np.ndarray: ...


class RegionEncoder(Protocol):
    """An encoder of regions: `encoders.VisualEncoder` or `crop_encoder.CropEncoder`."""

    def encode_regions(
        self,
        images: Sequence[np.ndarray],
        masks: Sequence[np.ndarray],
        heatmaps: Sequence[np.ndarray] | None = None,
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Features (n, d) float32, not normalised, and (n,) bool, False for a mask without
        features."""
        ...


def pool_regions(
    features_hwd: np.ndarray,
    masks_nhw: np.ndarray,
    mask_grid: Literal["area", "bilinear"] = "area",
) -> tuple[np.ndarray, np.ndarray]:
    """Mean of the features under each mask, weighted by how much of each cell the mask covers.

    FOSSIL eq. 4, with M_l resized to the feature grid by area averaging: the weight of a cell is
    the fraction of its pixels that are in the mask, so a mask smaller than one cell still counts.

    Args:
        features_hwd: (h, w, d) dense features, any real dtype.
        masks_nhw: (n, H, W) masks at the image's size, bool, or uint8 tri-state (0, UNSURE, YES:
            YES alone is pooled). The grid covers the whole image.
        mask_grid: as in `mask_weights`.

    Returns:
        The pooled features, (n, d) float32, not normalised; and (n,) bool, False where a mask is
        empty or the features under it are not finite. Such a row of features is zero, never NaN.

    Raises:
        ValueError: shapes or mask values are not as above.
    """
    if features_hwd.ndim != 3:
        raise ValueError(f"features_hwd must be (h, w, d), found {features_hwd.shape}")
    h, w, d = features_hwd.shape
    weights_nhw = mask_weights(masks_nhw, (h, w), mask_grid)
    weights = weights_nhw.reshape(len(masks_nhw), h * w)
    features = features_hwd.reshape(h * w, d).astype(np.float32)
    finite_cells = np.isfinite(features).all(axis=1)
    spoilt = weights[:, ~finite_cells].any(axis=1)
    features[~finite_cells] = 0.0
    totals = weights.sum(axis=1)
    valid = (totals > 0) & ~spoilt
    pooled = (weights @ features) / np.where(totals > 0, totals, 1.0)[:, None]
    pooled[~valid] = 0.0
    return pooled, valid


def pool_each(features_hwd: np.ndarray, masks_nhw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`pool_regions` of each mask alone.

    A product with many rows rounds differently from one with a single row. This way the bits of a
    region do not depend on the number of other regions.
    """
    pooled = np.zeros((len(masks_nhw), features_hwd.shape[-1]), dtype=np.float32)
    valid = np.zeros(len(masks_nhw), dtype=bool)
    for row in range(len(masks_nhw)):
        one, sound = pool_regions(features_hwd, masks_nhw[row : row + 1])
        pooled[row], valid[row] = one[0], sound[0]
    return pooled, valid


def mask_weights(
    masks_nhw: np.ndarray,
    size_hw: tuple[int, int],
    mask_grid: Literal["area", "bilinear"] = "area",
) -> np.ndarray:
    """(n, H, W) masks as in `pool_regions` -> (n, h, w) float32: the covered part of each cell.

    Cells are equal rectangles that tile the image; a pixel on a border counts proportionally for
    both sides, so sizes need not divide each other. With `bilinear` the weight of a cell is the
    mask interpolated at the cell's centre, from the four pixels around it (FOSSIL eq. 4 taken
    literally).
    """
    if masks_nhw.ndim != 3:
        raise ValueError(f"masks_nhw must be (n, H, W), found {masks_nhw.shape}")
    if masks_nhw.dtype == np.uint8:
        yes = masks_nhw == YES
        known = np.count_nonzero(yes) + np.count_nonzero(masks_nhw == UNSURE)
        if known != np.count_nonzero(masks_nhw):
            raise ValueError(f"uint8 masks hold 0, {UNSURE} or {YES} only; use bool for 0 and 1")
    elif masks_nhw.dtype == bool:
        yes = masks_nhw
    else:
        raise ValueError(f"masks_nhw must be bool or uint8, found {masks_nhw.dtype}")
    count, height, width = yes.shape
    if height == 0 or width == 0:
        raise ValueError(f"masks_nhw must have pixels, found {masks_nhw.shape}")
    matrix = _averaging if mask_grid == "area" else _interpolating
    rows, columns = matrix(size_hw[0], height), matrix(size_hw[1], width).T
    weights = np.empty((count, *size_hw), dtype=np.float32)
    step = max(1, _CHUNK_PIXELS // (height * width))
    for start in range(0, count, step):
        chunk = yes[start : start + step].astype(np.float32)
        weights[start : start + step] = rows @ (chunk @ columns)
    return weights


def _averaging(cells: int, pixels: int) -> np.ndarray:
    """(cells, pixels): fraction of each cell that each pixel covers; rows sum to 1."""
    edges = np.arange(cells + 1) * (pixels / cells)
    left = np.maximum(edges[:-1, None], np.arange(pixels)[None, :])
    right = np.minimum(edges[1:, None], np.arange(1, pixels + 1)[None, :])
    return (np.clip(right - left, 0.0, None) * (cells / pixels)).astype(np.float32)


def _interpolating(cells: int, pixels: int) -> np.ndarray:
    """(cells, pixels): weights of the two pixels next to each cell's centre."""
    centres = np.clip((np.arange(cells) + 0.5) * (pixels / cells) - 0.5, 0, pixels - 1)
    left = np.floor(centres).astype(np.int64)
    matrix = np.zeros((cells, pixels), dtype=np.float32)
    np.add.at(matrix, (np.arange(cells), left), 1 - (centres - left))
    np.add.at(matrix, (np.arange(cells), np.minimum(left + 1, pixels - 1)), centres - left)
    return matrix
