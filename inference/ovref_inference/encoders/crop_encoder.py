"""Regions as masked crops, each encoded by CLIP as an image of its own (VOCSeg 3.2)."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from ovref_inference.encoders.crops import Masking, masked_crop
from ovref_inference.encoders.pooling import YES
from ovref_inference.pixels import BatchSize, Pixels, batched


class CropEncoder:
    """CLIP's global embeddings of masked crops (VOCSeg 3.2). Made by `load_region_encoder`."""

    def __init__(
        self,
        forward: Callable[[torch.Tensor], torch.Tensor],
        *,
        dim: int,
        size_hw: tuple[int, int],
        grid_hw: tuple[int, int] | None,
        masking: Masking,
        images: Pixels,
        batch_size: int,
        fill_rgb: tuple[float, float, float] | None = None,
    ) -> None:
        """`fill_rgb`: colour in [0, 255] of erased pixels; None uses the model's mean."""
        red, green, blue = (255 * value for value in images.mean)
        self._fill_rgb = fill_rgb or (red, green, blue)
        self._forward = forward
        self._images = images
        self._batch_size = BatchSize(batch_size)
        self.dim = dim
        """Width of the features."""
        self.size_hw = size_hw
        """Height and width in pixels to which crops are resized."""
        self.grid_hw = grid_hw
        """Rows and columns of patches per crop; None for towers without patches."""
        self.masking = masking
        """How the background of a region is treated."""

    @torch.inference_mode()
    def encode_regions(
        self,
        images: Sequence[np.ndarray],
        masks: Sequence[np.ndarray],
        heatmaps: Sequence[np.ndarray] | None = None,
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Encodes the crop of each region (`crops.masked_crop`), its background treated as
        configured.

        Args, returns: as in `VisualEncoder.encode_regions`. With the strategy `heatmap`, heatmaps
        (n, H, W) are needed, each as in `masked_crop`.

        Raises:
            ValueError: masks or heatmaps of another size than their image; no heatmaps.
        """
        soft = (
            heatmaps if self.masking == "heatmap" and heatmaps is not None else [None] * len(masks)
        )
        crops: list[np.ndarray] = []
        owners: list[np.ndarray] = []
        for image_hwc, masks_nhw, maps_nhw in zip(images, masks, soft, strict=True):
            yes = masks_nhw == YES if masks_nhw.dtype == np.uint8 else masks_nhw
            owners.append(np.any(yes, axis=(1, 2)))
            crops += [
                masked_crop(
                    image_hwc,
                    yes[i],
                    self.masking,
                    heatmap_hw=None if maps_nhw is None else maps_nhw[i],
                    fill_rgb=self._fill_rgb,
                )
                for i in np.flatnonzero(owners[-1])
            ]
        batches = batched(crops, self._batch_size, self._encode)
        encoded = np.concatenate([np.zeros((0, self.dim), np.float32), *batches])
        start = 0
        found: list[tuple[np.ndarray, np.ndarray]] = []
        for cropped in owners:
            features = np.zeros((len(cropped), self.dim), np.float32)
            features[cropped] = encoded[start : start + cropped.sum()]
            start += cropped.sum()
            valid = cropped & np.isfinite(features).all(1)
            features[~valid] = 0.0
            found.append((features, valid))
        return found

    def _encode(self, crops: Sequence[np.ndarray]) -> np.ndarray:
        return self._forward(self._images(crops, self.size_hw)).float().cpu().numpy()
