"""Decodes image files. Builds, evaluations and segmenters all decode here, and only here.

Pixels are always those of the *upright* image, with EXIF orientation applied, and every mask and
box refers to them. Colour profiles are not applied: pixels are read as sRGB, as in the models'
training.
"""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats that are decoded. Pillow knows more, some of which start other programs (EPS)."""

MAX_PIXELS = 1 << 26
"""Maximum number of pixels: 64 Mi take 192 MiB decoded. Larger files are not decoded."""
MAX_ASPECT = 20.0
"""Maximum aspect ratio; beyond it (rulers, banners) nothing is recognisable after resizing."""
BACKGROUND_RGB = (255, 255, 255)
"""Colour behind transparent pixels: white, for which most images with alpha are made."""

REASONS = (
    "empty_image",
    "corrupt_image",
    "truncated_image",
    "image_too_large",
    "extreme_aspect",
    "unsupported_pixels",
)
"""Why an image is unusable, in this order: no bytes; unknown format or zero size; valid header but
missing or damaged pixels; more pixels than MAX_PIXELS; aspect ratio above MAX_ASPECT; pixels with
no agreed meaning as 8-bit RGB (floats, 32-bit integers)."""

_DAMAGED = (
    OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, OverflowError,
    NotImplementedError, struct.error, zlib.error,
)  # fmt: skip
"""Exceptions that Pillow raises for bytes that are not an image, or for a damaged image."""

_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Operation that turns each EXIF orientation upright (Exif 2.32, tag 0x0112). Pillow's
`ImageOps.exif_transpose` also rewrites the other tags, and fails at those that it can read but not
write."""

_PLAIN_FORMATS, _PLAIN_MODES = ("JPEG", "PNG", "WEBP"), ("RGB", "L")


class UnusableImageError(ValueError):
    """An image file that cannot be decoded to usable pixels."""

    reason: str
    """One of REASONS, for `Dropped`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason


def decode_image(file: bytes) -> np.ndarray:
    """The pixels of an image file.

    Applies the EXIF orientation; converts grey, palettes and CMYK (without a profile) to RGB;
    rescales 16 bits to 8; composites transparency over BACKGROUND_RGB; takes the first frame of an
    animation.

    Returns:
        (H, W, 3) uint8 RGB, a new array.

    Raises:
        UnusableImageError: its `reason` is one of REASONS.
    """
    return decoded(file)[0]


def read_image(path: str | Path) -> np.ndarray:
    """`decode_image` for a local file.

    Raises:
        OSError: it cannot be read.
        UnusableImageError: it is not an image, or it is damaged.
    """
    return decode_image(Path(path).read_bytes())


def decoded(file: bytes) -> tuple[np.ndarray, bool]:
    """The pixels, and whether every decoder would read the same ones."""
    if not file:
        raise UnusableImageError("empty_image", "the file has no bytes")
    with warnings.catch_warnings():
        # Pillow warns about damaged metadata, which does not matter here, and decompression bombs.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(file), formats=FORMATS)
        except _BOMB as error:
            raise UnusableImageError("image_too_large", str(error)) from error
        except Image.UnidentifiedImageError as error:  # whose text is an address in memory
            message = f"no image of the formats {', '.join(FORMATS)}"
            raise UnusableImageError("corrupt_image", message) from error
        except _DAMAGED as error:
            raise UnusableImageError("corrupt_image", repr(error)) from error
        with image:
            return _pixels(image)


def _pixels(image: Image.Image) -> tuple[np.ndarray, bool]:
    width, height = image.size
    if width * height > MAX_PIXELS:
        message = f"the image is {height} x {width}; it may have {MAX_PIXELS:,} pixels"
        raise UnusableImageError("image_too_large", message)
    if max(width, height) > MAX_ASPECT * min(width, height):
        message = f"the image is {height} x {width}; one side may be {MAX_ASPECT:g} times the other"
        raise UnusableImageError("extreme_aspect", message)
    plain = (
        image.format in _PLAIN_FORMATS
        and image.mode in _PLAIN_MODES
        and not image.has_transparency_data
        and getattr(image, "n_frames", 1) == 1
    )
    try:
        image.load()
    except _BOMB as error:  # the header of a later part may promise more than the first
        raise UnusableImageError("image_too_large", str(error)) from error
    except _DAMAGED as error:
        raise UnusableImageError("truncated_image", repr(error)) from error
    turn = _UPRIGHT.get(_orientation(image) or 1)
    rgb = _rgb(image)
    if turn is not None:
        rgb = rgb.transpose(turn)
    # Copied, because Pillow's array is read-only, about which PyTorch warns.
    return np.array(rgb), plain and turn is None


def _orientation(image: Image.Image) -> int | None:
    try:
        value = image.getexif().get(_ORIENTATION_TAG)
    except _DAMAGED:
        return None  # as in browsers: unreadable metadata rotates nothing
    return value if isinstance(value, int) else None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey_hw = np.asarray(image)
        if image.mode == "I" and (grey_hw.min() < 0 or grey_hw.max() > 0xFFFF):
            raise UnusableImageError(
                "unsupported_pixels", "integers of 32 bits have no agreed white"
            )
        grey_hw = (grey_hw.astype(np.uint32) * 255 + 0x7FFF) // 0xFFFF
        return Image.fromarray(grey_hw.astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise UnusableImageError("unsupported_pixels", "floating-point pixels have no agreed white")
    try:
        if not image.has_transparency_data:
            return image.convert("RGB")
        over = image.convert("RGBA")
        under = Image.new("RGBA", over.size, (*BACKGROUND_RGB, 255))
        return Image.alpha_composite(under, over).convert("RGB")
    except ValueError as error:
        raise UnusableImageError("unsupported_pixels", str(error)) from error
