"""Image files to pixels. Every real image that enters a build is decoded here, and only here.

Pixels are always those of the *upright* image, with EXIF orientation applied, and every mask and
box refers to them. The ground stage stores `plain_image(file)` in its `ImageRecord`s: the file
itself if every decoder reads the same pixels from it and it is small enough, otherwise a JPEG of
the decoded pixels. So any program that opens the stored file, even one that ignores EXIF, alpha or
bit depth, sees the pixels that the masks belong to.

    try:
        file, image_hwc = plain_image(prompt.image)
    except UnusableImageError as error:
        yield Dropped(prompt.key, error.reason)
    ... ImageRecord(image=file, regions=...)        # masks of image_hwc.shape[:2]

Colour profiles are not applied: pixels are read as sRGB, as in the models' training.
"""

import io
import struct
import warnings
import zlib

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats that are decoded. Pillow knows more, some of which start other programs (EPS)."""

MAX_PIXELS = 1 << 26
"""Maximum number of pixels: 64 Mi take 192 MiB decoded. Larger files are not decoded."""
MAX_ASPECT = 20.0
"""Maximum aspect ratio; beyond it (rulers, banners) nothing is recognisable after resizing."""
MAX_SIDE = 2048
"""Longest side of a stored image, in pixels. No model uses more, and masks of a larger photograph
take gigabytes of memory."""
BACKGROUND_RGB = (255, 255, 255)
"""Colour of transparent pixels: white, the page that images with alpha are made for."""
JPEG_QUALITY = 95

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
    return _decode(file)[0]


def plain_image(file: bytes) -> tuple[bytes, np.ndarray]:
    """The file to store for an image, and its pixels.

    Returns:
        The file: `file` itself if it is an upright, opaque, still JPEG, PNG or WebP of 8-bit RGB
        or grey and of at most MAX_SIDE, otherwise a JPEG of `decode_image(file)`, downscaled to
        MAX_SIDE if it is larger. And `decode_image` of that file: (H, W, 3) uint8 RGB.

    Raises:
        UnusableImageError: as `decode_image`.
    """
    image_hwc, plain = _decode(file)
    longer = max(image_hwc.shape)
    if plain and longer <= MAX_SIDE:
        return file, image_hwc
    image = Image.fromarray(image_hwc)
    if longer > MAX_SIDE:
        smaller = [max(1, round(side * MAX_SIDE / longer)) for side in image.size]
        image = image.resize(smaller, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    # Colour at full resolution: half of it would blur the edges of small regions.
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    kept = buffer.getvalue()
    return kept, decode_image(kept)


def _decode(file: bytes) -> tuple[np.ndarray, bool]:
    """The pixels, and whether every decoder reads the same ones from the file."""
    if not file:
        raise UnusableImageError("empty_image", "the file has no bytes")
    with warnings.catch_warnings():
        # Pillow warns of damaged metadata, which does not matter here, and of bombs.
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
