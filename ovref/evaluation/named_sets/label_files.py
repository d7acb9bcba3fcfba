"""Reads label files as integers, one per pixel; nothing is unpickled.

Palette images give their indices. Maps whose palette was converted to colours, and 8-bit maps of
sets with more classes, are refused, because they look like labels but are not.
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
"""Exceptions of Pillow and SciPy for files that are damaged or of another type."""


def index_map(path: Path, bits: int, file: bytes | None = None) -> np.ndarray:
    """The values of a greyscale or palette PNG or TIFF.

    Args:
        path: the file; its EXIF orientation is applied.
        bits: 8, or 16 for sets whose values do not fit into 8 bits.
        file: the file's contents if already read; `path` is then only used in messages.

    Returns:
        (H, W) int32, in [0, 65535].

    Raises:
        InputError: the file cannot be read, does not have one integer per pixel, or has 8 bits
            although 16 are needed.
    """
    image = _opened(path, file)
    if image.mode in ("RGB", "RGBA"):
        raise InputError(
            f"{path} holds colours ({image.mode}), expected one class index per pixel: its palette "
            "was resolved when the file was saved; use the file as published"
        )
    if image.mode not in _ONE_BYTE + _TWO_BYTES:
        raise InputError(
            f"{path} has pixels of mode {image.mode}, expected one integer per pixel: greyscale or "
            "palette"
        )
    if bits == 16 and image.mode in _ONE_BYTE:
        raise InputError(
            f"{path} has 8 bits per pixel, but this set has more classes than 8 bits allow: "
            "ids above 255 are lost; use 16-bit maps"
        )
    values_hw = np.asarray(image).astype(np.int32)
    if values_hw.min() < 0 or values_hw.max() > 0xFFFF:
        raise InputError(f"{path} holds values beyond 0 to 65535, expected class indices")
    return values_hw


def ade_full_map(path: Path, bits: int) -> np.ndarray:
    """The object ids in a `_seg.png` of ADE20K 2021: floor(red / 10) * 256 + green.

    Returns:
        (H, W) int32, in [0, 6655]; 0 is unlabelled.

    Raises:
        InputError: the file cannot be read, or is not RGB.
    """
    return ade_full_ids(colours(path))


def ade_full_ids(colour_hwc: np.ndarray) -> np.ndarray:
    """(H, W) int32 object ids from (H, W, 3) uint8 colours."""
    colour_hwc = colour_hwc.astype(np.int32)
    return colour_hwc[..., 0] // 10 * 256 + colour_hwc[..., 1]


def panoptic_ids(path: Path) -> np.ndarray:
    """(H, W) int32 segment ids in a panoptic PNG: red + 256 green + 65536 blue; 0 is void.

    Raises:
        InputError: the file cannot be read, or is not RGB.
    """
    return colours(path).astype(np.int32) @ np.array([1, 1 << 8, 1 << 16], dtype=np.int32)


def colours(path: Path) -> np.ndarray:
    """The unmodified (H, W, 3) uint8 pixels of an RGB file whose colours are codes.

    Raises:
        InputError: the file cannot be read, or is not RGB.
    """
    image = _opened(path)
    if image.mode != "RGB":
        raise InputError(
            f"{path} has pixels of mode {image.mode}, expected RGB, whose colours are ids"
        )
    return np.asarray(image)


def mat_map(path: Path, bits: int) -> np.ndarray:
    """The variable `LabelMap` in a MATLAB file of Pascal Context.

    Returns:
        (H, W) int32, in [0, 65535].

    Raises:
        InputError: the file cannot be read, has no two-dimensional integer `LabelMap`, or has 8
            bits.
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
"""Kind of label file -> reader."""


def _opened(path: Path, file: bytes | None = None) -> Image.Image:
    """Reads the upright image into memory."""
    try:
        content = path if file is None else io.BytesIO(file)
        with Image.open(content, formats=("PNG", "TIFF")) as image:
            return ImageOps.exif_transpose(image)
    except _DAMAGED as error:
        raise InputError(f"cannot read the label map {path}: {error}") from error
