"""Label files to integers: one value a pixel, never colours, nothing unpickled.

Palette images give their indices. A palette that was resolved to colours, or maps of eight bits
where a set has more classes, are refused, for they look like labels and are none.
"""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image, ImageOps

from ovref.errors import InputError

_ONE_BYTE = ("1", "L", "P")
_TWO_BYTES = ("I;16", "I;16B", "I;16L", "I")
_DAMAGED = (
    OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, struct.error,
    zlib.error, NotImplementedError, Image.DecompressionBombError,
    scipy.io.matlab.MatReadError,
)  # fmt: skip
"""What Pillow and SciPy raise for files that are damaged or of another kind."""


def index_map(path: Path, bits: int, file: bytes | None = None) -> np.ndarray:
    """Values of a greyscale or palette PNG or TIFF.

    Args:
        path: the file; its own EXIF orientation is applied.
        bits: 8, or 16 for sets whose values do not fit into eight bits.
        file: its content where that is at hand; `path` is then its name in messages.

    Returns:
        (H, W) int32, in [0, 65535].

    Raises:
        InputError: not readable, not one integer a pixel, or eight bits where 16 are needed.
    """
    image = _opened(path, file)
    if image.mode in ("RGB", "RGBA"):
        raise InputError(
            f"{path} holds colours ({image.mode}), expected one class index a pixel: the palette "
            "was resolved when the file was saved; use the file as published"
        )
    if image.mode not in _ONE_BYTE + _TWO_BYTES:
        raise InputError(
            f"{path} has pixels of mode {image.mode}, expected one integer a pixel: greyscale or "
            "palette"
        )
    if bits == 16 and image.mode in _ONE_BYTE:
        raise InputError(
            f"{path} has 8 bits a pixel, and this set has more classes than 8 bits can number: "
            "ids above 255 are lost; use 16-bit maps"
        )
    values_hw = np.asarray(image).astype(np.int32)
    if values_hw.min() < 0 or values_hw.max() > 0xFFFF:
        raise InputError(f"{path} holds values beyond 0 to 65535, expected class indices")
    return values_hw


def ade_full_map(path: Path, bits: int) -> np.ndarray:
    """Object ids of a `_seg.png` of ADE20K 2021: floor(red / 10) * 256 + green.

    Returns:
        (H, W) int32, in [0, 6655]; 0 is unlabelled.

    Raises:
        InputError: not readable, or not RGB.
    """
    return ade_full_ids(colours(path))


def ade_full_ids(colour_hwc: np.ndarray) -> np.ndarray:
    """(H, W) int32 object ids of (H, W, 3) uint8 colours."""
    colour_hwc = colour_hwc.astype(np.int32)
    return colour_hwc[..., 0] // 10 * 256 + colour_hwc[..., 1]


def panoptic_ids(path: Path) -> np.ndarray:
    """(H, W) int32 segment ids of a panoptic PNG: red + 256 green + 65536 blue; 0 is void.

    Raises:
        InputError: not readable, or not RGB.
    """
    return colours(path).astype(np.int32) @ np.array([1, 1 << 8, 1 << 16], dtype=np.int32)


def colours(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 of an RGB file whose colours are codes, as they are.

    Raises:
        InputError: not readable, or not RGB.
    """
    image = _opened(path)
    if image.mode != "RGB":
        raise InputError(
            f"{path} has pixels of mode {image.mode}, expected RGB, whose colours are ids"
        )
    return np.asarray(image)


def mat_map(path: Path, bits: int) -> np.ndarray:
    """Values of the variable `LabelMap` in a MATLAB file of Pascal Context.

    Returns:
        (H, W) int32, in [0, 65535].

    Raises:
        InputError: not readable, without a two-dimensional integer `LabelMap`, or of eight bits.
    """
    try:
        values_hw = scipy.io.loadmat(str(path), variable_names=["LabelMap"])["LabelMap"]
    except _DAMAGED as error:
        raise InputError(f"cannot read LabelMap of {path}: {error!r}") from error
    if values_hw.ndim != 2 or values_hw.dtype.kind not in "ui":
        raise InputError(
            f"{path} has a LabelMap of {values_hw.dtype} and shape {values_hw.shape}, expected "
            "(H, W) integers"
        )
    if bits == 16 and values_hw.dtype.itemsize == 1:
        raise InputError(f"{path} has a LabelMap of 8 bits: ids above 255 are lost")
    return values_hw.astype(np.int32)


READERS: dict[str, Callable[[Path, int], np.ndarray]] = {
    "index": index_map,
    "ade_instances": index_map,
    "ade_full": ade_full_map,
    "mat": mat_map,
}
"""How a layout's label files are read."""


def _opened(path: Path, file: bytes | None = None) -> Image.Image:
    """The upright image, in memory."""
    try:
        content = path if file is None else io.BytesIO(file)
        with Image.open(content, formats=("PNG", "TIFF")) as image:
            return ImageOps.exif_transpose(image)
    except _DAMAGED as error:
        raise InputError(f"cannot read the label map {path}: {error}") from error
