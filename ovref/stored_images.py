"""Image files as stored by builds.

Decoding is that of `ovref_inference.pictures`: pixels are always those of the *upright* image.
Stages with real images store `plain_image(file)` in `ImageRecord`s: the file itself if every
decoder reads the same pixels from it and it is small enough, otherwise a JPEG of the decoded
pixels. So any program that opens the stored file, even one that ignores EXIF, alpha or bit depth,
sees the pixels that the masks belong to.

    try:
        file, image_hwc = plain_image(prompt.image)
    except UnusableImageError as error:
        yield Dropped(prompt.key, error.reason)
    ... ImageRecord(image=file, regions=...)        # masks of image_hwc.shape[:2]
"""

import io

import numpy as np
from PIL import Image

from ovref_inference.pictures import FORMATS as FORMATS
from ovref_inference.pictures import REASONS as REASONS
from ovref_inference.pictures import UnusableImageError as UnusableImageError
from ovref_inference.pictures import decode_image as decode_image
from ovref_inference.pictures import decoded

MAX_SIDE = 2048
"""Maximum side of a stored image in pixels. No model uses more, and masks of a larger photograph
take gigabytes of memory."""
JPEG_QUALITY = 95


def plain_image(file: bytes) -> tuple[bytes, np.ndarray]:
    """The file to store for an image, and its pixels.

    Returns:
        The file: `file` itself if it is an upright, opaque, still JPEG, PNG or WebP of 8-bit RGB or
        grey and of at most MAX_SIDE, otherwise a JPEG of `decode_image(file)`, downscaled to
        MAX_SIDE if larger. And `decode_image` of that file: (H, W, 3) uint8 RGB.

    Raises:
        UnusableImageError: see `decode_image`.
    """
    image_hwc, plain = decoded(file)
    if plain and max(image_hwc.shape) <= MAX_SIDE:
        return file, image_hwc
    kept = jpeg_of(reduced(Image.fromarray(image_hwc), MAX_SIDE), JPEG_QUALITY)
    return kept, decode_image(kept)


def reduced(image: Image.Image, most: int) -> Image.Image:
    """The image with its longer side at most `most` pixels."""
    longer = max(image.size)
    if longer <= most:
        return image
    size = [max(1, round(side * most / longer)) for side in image.size]
    return image.resize(size, Image.Resampling.LANCZOS)


def jpeg_of(pixels: np.ndarray | Image.Image, quality: int) -> bytes:
    """A JPEG file of (H, W, 3) uint8 RGB, or of a Pillow image."""
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    # Without chroma subsampling, which would blur the edges of small regions.
    image.save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def png_of(pixels: np.ndarray | Image.Image) -> bytes:
    """A PNG file of (H, W, 3) uint8 RGB, of (H, W) uint8 or uint16 grey, or of a Pillow image."""
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, "PNG")
    return buffer.getvalue()
