"""Rasterises COCO's polygons and run lengths, with the same pixels as pycocotools."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_SCALE = 5
"""Factor of the finer grid on which polygons are traced, as in COCO's reference code."""


def mask_of(segmentation: Any, size_hw: tuple[int, int]) -> np.ndarray:
    """(H, W) bool mask of a list of polygons, or of run lengths as a list or a string.

    Raises:
        ValueError: run lengths have another size, or a polygon has fewer than three points.
    """
    if isinstance(segmentation, Mapping):
        if tuple(segmentation["size"]) != size_hw:
            raise ValueError(f"a mask has size {segmentation['size']}, its image {size_hw}")
        counts = segmentation["counts"]
        runs = np.array(_decoded(counts) if isinstance(counts, str) else counts, dtype=np.int64)
        if (runs < 0).any() or runs.sum() != size_hw[0] * size_hw[1]:
            raise ValueError("run lengths do not fill the mask")
        flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
        return flat.reshape(size_hw[::-1]).T
    mask_hw = np.zeros(size_hw, dtype=bool)
    for polygon in segmentation:
        if len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(f"a polygon has {len(polygon)} numbers, expected pairs of at least 3")
        mask_hw |= _polygon_mask(polygon, size_hw)
    return mask_hw


def _decoded(text: str) -> list[int]:
    """Decodes COCO's compressed run lengths: 5 bits per character, differences from the third
    on."""
    runs: list[int] = []
    position = 0
    while position < len(text):
        value, shift, more = 0, 0, True
        while more:
            bits = ord(text[position]) - 48
            value |= (bits & 0x1F) << shift
            more = bool(bits & 0x20)
            position, shift = position + 1, shift + 5
            if not more and bits & 0x10:
                value |= -1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
    return runs


def _polygon_mask(polygon: Sequence[float], size_hw: tuple[int, int]) -> np.ndarray:
    """(H, W) bool by COCO's rule: edges are traced on a finer grid, and the mask begins or ends
    where they cross the middle of a pixel column."""
    height, width = size_hw
    xs = [int(_SCALE * x + 0.5) for x in polygon[::2]]
    ys = [int(_SCALE * y + 0.5) for y in polygon[1::2]]
    us, vs = [], []
    for start in range(len(xs)):
        end = (start + 1) % len(xs)
        edge_us, edge_vs = _traced(xs[start], ys[start], xs[end], ys[end])
        us.append(edge_us)
        vs.append(edge_vs)
    u, v = np.concatenate(us), np.concatenate(vs)
    crosses = u[1:] != u[:-1]
    column = (np.where(u[1:] < u[:-1], u[1:], u[1:] - 1)[crosses] + 0.5) / _SCALE - 0.5
    row = (np.minimum(v[1:], v[:-1])[crosses] + 0.5) / _SCALE - 0.5
    kept = (np.floor(column) == column) & (column >= 0) & (column <= width - 1)
    row = np.ceil(np.clip(row[kept], 0, height)).astype(np.int64)
    toggles = np.bincount(
        column[kept].astype(np.int64) * height + row, minlength=height * width + 1
    )
    return (np.cumsum(toggles[:-1]) % 2 == 1).reshape(width, height).T


def _traced(x0: int, y0: int, x1: int, y1: int) -> tuple[np.ndarray, np.ndarray]:
    """The grid points of an edge from the first to the second end, inclusive."""
    dx, dy = abs(x1 - x0), abs(y1 - y0)
    flipped = (dx >= dy and x0 > x1) or (dx < dy and y0 > y1)
    if flipped:
        x0, x1, y0, y1 = x1, x0, y1, y0
    steps = np.arange(max(dx, dy) + 1)
    if flipped:
        steps = steps[::-1]
    # Truncated as in the reference code, which matters left of and above the image.
    if dx >= dy:
        slope = (y1 - y0) / dx if dx else 0.0
        return steps + x0, np.trunc(y0 + slope * steps + 0.5).astype(np.int64)
    slope = (x1 - x0) / dy
    return np.trunc(x0 + slope * steps + 0.5).astype(np.int64), steps + y0
