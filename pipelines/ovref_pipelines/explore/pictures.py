"""Small pictures for the page: a region's image, its mask and its heatmap, a label map."""

import io

import numpy as np
from PIL import Image

from ovref.exchange.picture_files import Picture
from ovref.ops.overlays import heated, masked
from ovref.stored_images import reduced
from ovref_inference.images import box_of

LAYERS = ("image", "mask", "heatmap", "crop")
QUALITY = 85


def picture(found: Picture, layer: str, side: int) -> bytes:
    """A WebP of one reference.

    Args:
        found: its image and mask; without a mask all of the image counts.
        layer: `image`; `mask`, with everything else dimmed; `heatmap` over the image (the mask if
            there is no heatmap); `crop`, the mask's box with a margin.
        side: maximum length of the longer side in pixels; small images are enlarged by a whole
            factor.
    """
    image_hwc, mask_hw = found.image_hwc, found.mask_hw
    if mask_hw is None:
        mask_hw = np.ones(image_hwc.shape[:2], bool)
    if layer == "heatmap" and found.heatmap_hw is not None:
        image_hwc = heated(image_hwc, found.heatmap_hw)
    elif layer in ("mask", "heatmap"):
        image_hwc = masked(image_hwc, mask_hw)
    elif layer == "crop":
        image_hwc = cropped(image_hwc, mask_hw)
    return webp(resized(image_hwc, side))


def cropped(image_hwc: np.ndarray, mask_hw: np.ndarray) -> np.ndarray:
    """The box of a mask, with a tenth of its longer side around it; all of it without a mask."""
    if not mask_hw.any():
        return image_hwc
    left, top, right, bottom = box_of(mask_hw)
    margin = 1 + max(bottom - top - 1, right - left - 1) // 10
    return image_hwc[max(0, top - margin) : bottom + margin, max(0, left - margin) : right + margin]


def labelled(image_hwc: np.ndarray, labels_hw: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """The image under its label map, class i in colour i; pixels of no class (-1) stay grey."""
    grey_hwc = np.repeat(image_hwc.mean(2, keepdims=True), 3, axis=2)
    under_hwc = 0.45 * grey_hwc + 0.55 * colours[np.maximum(labels_hw, 0)]
    return np.where((labels_hw < 0)[..., None], grey_hwc * 0.7, under_hwc).astype(np.uint8)


def resized(image_hwc: np.ndarray, side: int) -> np.ndarray:
    """The image with its longer side at most `side`; a smaller one enlarged by a whole factor."""
    image = reduced(Image.fromarray(image_hwc), side)
    times = side // max(image.size)
    size = image.width * times, image.height * times
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC))


def webp(image_hwc: np.ndarray) -> bytes:
    """(H, W, 3) uint8 RGB as a WebP file."""
    buffer = io.BytesIO()
    Image.fromarray(image_hwc).save(buffer, "WEBP", quality=QUALITY, method=2)
    return buffer.getvalue()
