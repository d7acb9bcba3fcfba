"""Aligns masks with edges in the image by a fully connected conditional random field (CRF).

Krähenbühl and Koltun, NeurIPS 2011 (arXiv 1210.5644), with which FOSSIL (section 4.1) and MaskCut
post-process their masks. Every pair of pixels is connected by a potential that depends on their
distance and on the difference of their colours; each step of mean-field inference needs a Gaussian
filter over positions and colours, which a permutohedral lattice computes in time linear in the
number of pixels (Adams, Baek and Davis, Eurographics 2010). The masks do not overlap, so they are
the labels of one field; the uncovered part is another label.
"""

from collections.abc import Callable

import numpy as np
import torch
from scipy import sparse
from scipy.special import softmax
from torch.nn.functional import interpolate

from ovref_inference.proposers.config import CrfConfig
from ovref_inference.proposers.opencut import owned, shares

REFERENCE_SIZE = 480
"""Shorter side, in pixels, of the images to which the distances of a `CrfConfig` refer; larger
images are reduced to it."""


Filters = list[tuple[float, Callable[[np.ndarray], np.ndarray]]]
"""Weight and Gaussian filter of each pairwise term of a field."""


def to_edges(
    masks_nhw: np.ndarray,
    image_hwc: np.ndarray,
    config: CrfConfig,
    filters: Filters | None = None,
) -> np.ndarray:
    """Masks on a patch grid to masks of the image, aligned with its edges.

    The unary terms are the masks, interpolated bilinearly.

    Args:
        masks_nhw: (masks, h, w) bool, no two overlapping, on a grid of any size.
        image_hwc: (H, W, 3) uint8 RGB.
        config: the field.
        filters: `filters_of` the image at REFERENCE_SIZE, if known.

    Returns:
        (n, H, W) bool, no two overlapping, in the same order; masks that are left without a pixel
        are dropped.
    """
    size_hw = image_hwc.shape[:2]
    if not len(masks_nhw):
        return np.zeros((0, *size_hw), dtype=bool)
    small_hwc = _reduced(image_hwc)
    small_hw = small_hwc.shape[:2]
    unary_nhw = shares(masks_nhw, small_hw).numpy()
    found_nhw = mean_field(unary_nhw, small_hwc, config, filters)
    found = torch.from_numpy(found_nhw)[None]
    if small_hw != size_hw:
        found = interpolate(found, size=size_hw, mode="bilinear", align_corners=False)
    edged_nhw = owned(found[0])
    return edged_nhw[edged_nhw.any((1, 2))]


def cut_to_edges(cuts_mhw: np.ndarray, image_hwc: np.ndarray, config: CrfConfig) -> np.ndarray:
    """Each cut on a patch grid to a mask of the image, aligned with its edges by a CRF of its own.

    As in MaskCut (FOSSIL section 4.1). A cut whose IoU with its result is below 0.5 is dropped.

    Args:
        cuts_mhw: (m, h, w) bool, which may overlap.
        image_hwc: (H, W, 3) uint8 RGB.
        config: the field.

    Returns:
        (n, H, W) bool in the same order, without empty and dropped ones.
    """
    size_hw = (image_hwc.shape[0], image_hwc.shape[1])
    kept = [np.zeros((0, *size_hw), dtype=bool)]
    cuts_mhw = cuts_mhw[cuts_mhw.any((1, 2))]
    # They depend on the image alone.
    filters = filters_of(_reduced(image_hwc), config) if len(cuts_mhw) else []
    for cut_hw in cuts_mhw:
        edged_nhw = to_edges(cut_hw[None], image_hwc, config, filters)
        before_hw = owned(shares(cut_hw[None], size_hw))[0]
        both = np.count_nonzero(edged_nhw & before_hw)
        if 2 * both >= np.count_nonzero(edged_nhw.any(0) | before_hw) and len(edged_nhw):
            kept.append(edged_nhw)
    return np.concatenate(kept)


def _reduced(image_hwc: np.ndarray) -> np.ndarray:
    """(H, W, 3) float32: the image with its shorter side at most REFERENCE_SIZE."""
    size_hw = image_hwc.shape[:2]
    scale = min(1.0, REFERENCE_SIZE / min(size_hw))
    small_hw = tuple(max(1, round(side * scale)) for side in size_hw)
    image = torch.from_numpy(image_hwc.astype(np.float32)).permute(2, 0, 1)[None]
    if small_hw != size_hw:
        image = interpolate(image, size=small_hw, mode="bilinear", antialias=True)
    return image[0].permute(1, 2, 0).numpy()


def mean_field(
    unary_nhw: np.ndarray,
    image_hwc: np.ndarray,
    config: CrfConfig,
    filters: Filters | None = None,
) -> np.ndarray:
    """Probabilities of labels under the field, after `config.steps` steps of mean-field inference.

    A step is Q = softmax(unary + sum of weight x filtered Q) with the Potts model; each filter K is
    normalised to D^-1/2 K D^-1/2, where D has the row sums of K.

    Args:
        unary_nhw: (labels, H, W) float, log-potentials of each pixel; higher for likelier labels.
        image_hwc: (H, W, 3) colours in [0, 255].
        config: weights and distances.
        filters: `filters_of` the image, if known.

    Returns:
        (labels, H, W) float32, sums to 1 over labels.
    """
    labels, height, width = unary_nhw.shape
    filters = filters_of(image_hwc, config) if filters is None else filters
    unary_nl = np.asarray(unary_nhw, dtype=np.float32).reshape(labels, -1).T
    q_nl = _softmax(unary_nl)
    for _ in range(config.steps):
        q_nl = _softmax(sum((weight * apply(q_nl) for weight, apply in filters), unary_nl))
    return q_nl.T.reshape(labels, height, width)


def filters_of(image_hwc: np.ndarray, config: CrfConfig) -> Filters:
    """The filters of an image's field: over positions and colours, and over positions alone."""
    height, width = image_hwc.shape[:2]
    unit = min(height, width) / REFERENCE_SIZE
    places_nd = np.stack(tuple(np.mgrid[:height, :width]), axis=-1).reshape(-1, 2) / unit
    colours_nd = np.asarray(image_hwc, dtype=np.float64).reshape(-1, 3)
    both_nd = (places_nd / config.appearance_distance, colours_nd / config.appearance_colour)
    filters: Filters = [
        (config.appearance_weight, gaussian_filter(np.concatenate(both_nd, axis=1)))
    ]
    if config.smoothness_weight:
        near = gaussian_filter(places_nd / config.smoothness_distance)
        filters.append((config.smoothness_weight, near))
    return filters


def _softmax(values_nl: np.ndarray) -> np.ndarray:
    """Softmax of each row; over the first axis, copies included, it takes a third of the time."""
    return np.ascontiguousarray(softmax(np.ascontiguousarray(values_nl.T), axis=0).T)


def gaussian_filter(points_nd: np.ndarray):
    """A function that filters values at points with the Gaussian exp(-|x - y|^2 / 2) of their
    distances, normalised on both sides by the square roots of the sums over all points.

    Args:
        points_nd: (n, d) positions, in standard deviations of the Gaussian.

    Returns:
        Values (n, labels) float32 -> filtered values (n, labels) float32.
    """
    slice_, blurs = _lattice(points_nd)

    def raw(values_nl: np.ndarray) -> np.ndarray:
        # The transpose splats points in order, so neighbouring vertices are close in memory.
        on_lattice = slice_.T @ values_nl
        for blur in blurs:
            on_lattice = blur @ on_lattice
        return slice_ @ on_lattice

    sums_n = raw(np.ones((len(points_nd), 1), dtype=np.float32))[:, 0]
    # The lattice blurs along one axis after the other, which is symmetric except at its boundary.
    root_n = 1 / np.sqrt(np.maximum(sums_n, np.finfo(np.float32).tiny))
    slice_.data *= np.repeat(root_n, np.diff(slice_.indptr))
    return raw


def _lattice(points_nd: np.ndarray):
    """The permutohedral lattice around points.

    Returns:
        slice, (n, vertices) sparse float32: barycentric weights of the d + 1 vertices of the
        simplex around each point; and d + 1 sparse (vertices, vertices) blurs with [1/4, 1/2, 1/4]
        along an axis of the lattice.
    """
    n, d = points_nd.shape
    # Embed into the plane of d + 1 coordinates that sum to zero, scaled so that the blurs below and
    # the two interpolations together have a standard deviation of 1. Coordinates are rows, so that
    # operations are contiguous along the points.
    axis = np.arange(1, d + 1)
    scale = (d + 1) * np.sqrt(2 / 3) / np.sqrt(axis * (axis + 1))
    scaled = np.ascontiguousarray(points_nd.T, dtype=np.float64) * scale[:, None]
    plane = np.zeros((d + 1, n))
    plane[:d] = np.cumsum(scaled[::-1], axis=0)[::-1]
    plane[1:] -= axis[:, None] * scaled
    # The nearest lattice point whose coordinates are multiples of d + 1, in units of d + 1, and the
    # order of the residuals, largest first, which identifies the simplex.
    down = np.round(plane / (d + 1))
    left = plane - down * (d + 1)
    rank = np.zeros((d + 1, n), dtype=np.int64)
    for row in range(d + 1):
        for later in range(row + 1, d + 1):
            larger = left[later] > left[row]
            rank[row] += larger
            rank[later] += ~larger
    off = down.sum(0).astype(np.int64)
    rank += off
    wrap = (rank < 0).astype(np.int64) - (rank > d)
    rank += (d + 1) * wrap
    down += wrap
    left -= (d + 1) * wrap
    # Barycentric weights, from differences of neighbours in the order.
    place = rank * n + np.arange(n)
    ordered = np.empty((d + 1, n))
    ordered.ravel()[place] = left
    weights_nv = np.empty((n, d + 1), dtype=np.float32)
    weights_nv[:, 1:] = ((ordered[:-1] - ordered[1:])[::-1] / (d + 1)).T
    weights_nv[:, 0] = 1 - weights_nv[:, 1:].sum(1)
    # Encode vertices as integers whose sums match those of the vertices. Vertex k of the simplex
    # adds k to every coordinate and subtracts d + 1 from those of rank above d - k; the last
    # coordinate follows from the others.
    base = _base(down[:d] * (d + 1))
    bases = np.empty((d + 1, n), dtype=np.int64)
    bases.ravel()[place] = np.append(base, 0)[:, None]
    keys_nv = np.empty((n, d + 1), dtype=np.int64)
    keys_nv[:, 0] = base @ down[:d].astype(np.int64) * (d + 1)
    for vertex in range(1, d + 1):
        keys_nv[:, vertex] = keys_nv[:, vertex - 1] + base.sum() - (d + 1) * bases[d + 1 - vertex]
    known, number = np.unique(keys_nv, return_inverse=True)
    slice_ = sparse.csr_matrix(
        (weights_nv.ravel(), number.ravel(), np.arange(n + 1) * (d + 1)), shape=(n, len(known))
    )
    return slice_, [_blur(known, base, direction) for direction in range(d + 1)]


def _base(lowest_dn: np.ndarray) -> np.ndarray:
    """(d,) place value of each coordinate in the integers that encode vertices.

    Args:
        lowest_dn: vertex 0 of every simplex; other vertices and the neighbours in a blur are at
            most 2 d + 1 away from one of them.
    """
    d = len(lowest_dn)
    spans = lowest_dn.max(1) - lowest_dn.min(1) + 4 * d + 3
    if spans.prod() >= 2**61:
        raise ValueError("points are spread over too many deviations of the Gaussian")
    return np.concatenate(([1], np.cumprod(spans[:-1].astype(np.int64))))


def _blur(known: np.ndarray, base: np.ndarray, direction: int) -> sparse.csr_matrix:
    d = len(base)
    offset = np.ones(d, dtype=np.int64)
    if direction < d:
        offset[direction] = -d
    step = offset @ base
    size = len(known)
    after = np.minimum(np.searchsorted(known, known + step), size - 1)
    here = np.flatnonzero(known[after] == known + step)
    pair = (np.concatenate((here, after[here])), np.concatenate((after[here], here)))
    side = sparse.csr_matrix(
        (np.full(len(pair[0]), 0.25, dtype=np.float32), pair), shape=(size, size)
    )
    return side + sparse.identity(size, dtype=np.float32, format="csr") * np.float32(0.5)
