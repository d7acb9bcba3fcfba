"""Segment Anything (Kirillov et al., ICCV 2023): boxes or points on images -> masks.

The model is that of transformers; see `sam_model.load_sam`. Prompts, preprocessing and enlarging
are as in the package segment-anything; SAM-HQ (Ke et al., NeurIPS 2023) has the same. SAM 2 (Ravi
et al., ICLR 2025) and EdgeTAM stretch images to a square instead of padding them.

The image encoder accounts for nearly all of the cost and runs once per image, for any number of
prompts.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch.nn.functional import interpolate, pad
from torchvision.ops import masks_to_boxes, nms
from torchvision.transforms.functional import resize, to_pil_image

from ovref_inference.images import check_image
from ovref_inference.pixels import BatchSize, batched
from ovref_inference.proposers.config import SamGridConfig

UPSCALED_PIXELS = 2**26
"""Number of mask logits upsampled at once: 256 MB of float32."""

STABILITY_OFFSET = 1.0
"""A mask is stable if its area changes little between thresholds this far above and below its own,
in logits (as in segment-anything)."""


MASK_THRESHOLD = 0.0
"""Pixels with logits above it are in the mask."""

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
"""Mean and standard deviation of RGB in [0, 255], of the training of all models."""


class SamMasks:
    """Masks for boxes, or for a grid of points, at the size of the images."""

    def __init__(self, sam: Any, *, batch_size: int = 8, prompts_at_once: int = 64) -> None:
        """
        Args:
            sam: from `load_sam`, on its device.
            batch_size: maximum number of images per pass of the image encoder.
            prompts_at_once: maximum number of boxes or points per pass of the mask decoder.
        """
        self._sam, self._kind = sam, sam.config.model_type
        # SAM 2 and EdgeTAM give features of several sizes, and see the image stretched.
        self._stretched = hasattr(sam, "backbone_feature_sizes")
        config = sam.config.prompt_encoder_config if self._stretched else sam.config.vision_config
        side = config.image_size
        self._side: int = side if isinstance(side, int) else side[0]
        self._batch_size, self._prompts_at_once = BatchSize(batch_size), prompts_at_once

    @torch.inference_mode()
    def of_boxes(
        self,
        images: Sequence[np.ndarray],
        boxes_xyxy: Sequence[np.ndarray],
        *,
        multimask: bool = False,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """One mask for every box.

        Args:
            images: (H, W, 3) uint8 RGB, of any sizes.
            boxes_xyxy: for every image (n, 4) in its pixels, n may be 0.
            multimask: as `SamConfig.multimask`.

        Yields:
            For every image (n, H, W) bool masks, which may overlap or be empty, and their predicted
            IoU, (n,) float32, about [0, 1]; one image at a time, because masks are large. An image
            without boxes is not encoded.
        """
        asked = [index for index, boxes in enumerate(boxes_xyxy) if len(boxes)]
        encoded = self._embeddings([images[index] for index in asked])
        embeddings = dict(zip(asked, encoded, strict=True))
        for index, (image_hwc, boxes_n4) in enumerate(zip(images, boxes_xyxy, strict=True)):
            size_hw = image_hwc.shape[:2]
            if index not in embeddings:
                yield np.zeros((0, *size_hw), dtype=bool), np.zeros(0, dtype=np.float32)
                continue
            corners_n22 = np.asarray(boxes_n4, dtype=np.float64).reshape(-1, 2, 2)
            best = [
                _best(*self._decode(embeddings[index], part, size_hw, "box", multimask))
                for part in self._parts(corners_n22)
            ]
            logits_nhw, ious_n = (torch.cat(part) for part in zip(*best, strict=True))
            yield self._masks(logits_nhw, size_hw), ious_n.cpu().numpy()

    @torch.inference_mode()
    def of_grid(
        self, images: Sequence[np.ndarray], config: SamGridConfig
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Masks for a grid of points, each point prompted alone.

        As in the paper's automatic mask generation, without its extra passes over crops: three
        masks per point; those with a high predicted IoU and stability are kept; duplicates are
        removed by box NMS.

        Yields:
            For every image (n, H, W) bool masks, which may overlap, by descending predicted IoU,
            and the predicted IoU, (n,) float32.
        """
        side = (np.arange(config.points_per_side) + 0.5) / config.points_per_side
        grid_n2 = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
        for image_hwc, embedding in zip(images, self._embeddings(images), strict=True):
            size_hw = image_hwc.shape[:2]
            points_n12 = (grid_n2 * size_hw[::-1])[:, None]
            kept = [
                self._stable(*self._decode(embedding, part, size_hw, "point", True), size_hw,
                             config)
                for part in self._parts(points_n12)
            ]  # fmt: skip
            logits_nhw, ious_n, boxes_n4 = (torch.cat(part) for part in zip(*kept, strict=True))
            left = nms(boxes_n4, ious_n, config.nms_iou)
            yield self._masks(logits_nhw[left], size_hw), ious_n[left].cpu().numpy()

    def _stable(
        self,
        logits_nkhw: torch.Tensor,
        ious_nk: torch.Tensor,
        size_hw: tuple[int, int],
        config: SamGridConfig,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The masks to keep, at low resolution, with their predicted IoU and boxes (n, 4)."""
        good = ious_nk > config.min_predicted_iou
        logits_nhw, ious_n = logits_nkhw[good], ious_nk[good]
        stable, boxes = [], [torch.zeros(0, 4, device=ious_n.device)]
        for large_nhw in self._at_size(logits_nhw, size_hw):
            threshold = MASK_THRESHOLD
            inner = (large_nhw > threshold + STABILITY_OFFSET).sum((1, 2))
            outer = (large_nhw > threshold - STABILITY_OFFSET).sum((1, 2))
            masks_nhw = large_nhw > threshold
            keep = masks_nhw.any(2).any(1) & (inner >= config.min_stability * outer)
            stable.append(keep)
            boxes.append(masks_to_boxes(masks_nhw[keep]))
        if stable:
            keep = torch.cat(stable)
            logits_nhw, ious_n = logits_nhw[keep], ious_n[keep]
        return logits_nhw, ious_n, torch.cat(boxes)

    def _embeddings(self, images: Sequence[np.ndarray]) -> list[dict[str, Any]]:
        """What the mask decoder needs of every image, each encoded once."""
        return [one for part in batched(images, self._batch_size, self._encode) for one in part]

    def _encode(self, images: Sequence[np.ndarray]) -> list[dict[str, Any]]:
        mean = torch.tensor(MEAN, device=self._sam.device)[:, None, None]
        std = torch.tensor(STD, device=self._sam.device)[:, None, None]
        fitted = []
        for image_hwc in images:
            check_image(image_hwc)
            pixels = (self._fitted(image_hwc).to(self._sam.device) - mean) / std
            height, width = pixels.shape[1:]
            fitted.append(pad(pixels, (0, self._side - width, 0, self._side - height)))
        pixels_n3hw = torch.stack(fitted)
        if self._stretched:
            levels = [level.split(1) for level in self._sam.get_image_embeddings(pixels_n3hw)]
            return [{"image_embeddings": list(one)} for one in zip(*levels, strict=True)]
        if self._kind == "sam_hq":
            found = self._sam.vision_encoder(pixels_n3hw)
            pairs = zip(
                found.last_hidden_state.split(1), found.intermediate_embeddings[0].split(1),
                strict=True,
            )  # fmt: skip
            return [{"image_embeddings": a, "intermediate_embeddings": [b]} for a, b in pairs]
        encoded_ndhw = self._sam.vision_encoder(pixels_n3hw).last_hidden_state
        return [{"image_embeddings": part_1dhw} for part_1dhw in encoded_ndhw.split(1)]

    def _fitted(self, image_hwc: np.ndarray) -> torch.Tensor:
        """(3, h, w) float32 in [0, 255]: the image at the size at which it is encoded."""
        size = list(self._fitted_hw(image_hwc.shape[:2]))
        if self._stretched:
            pixels = torch.as_tensor(np.ascontiguousarray(image_hwc)).permute(2, 0, 1).float()
            return resize(pixels, size, antialias=True)
        small = resize(to_pil_image(image_hwc), size)
        return torch.as_tensor(np.array(small)).permute(2, 0, 1)

    def _fitted_hw(self, size_hw: tuple[int, int]) -> tuple[int, int]:
        """The size at which an image is encoded: its longer side fills the square, or all of it."""
        if self._stretched:
            return self._side, self._side
        scale = self._side / max(size_hw)
        height, width = (max(1, int(side * scale + 0.5)) for side in size_hw)
        return height, width

    def _parts(self, prompts: np.ndarray) -> list[np.ndarray]:
        starts = range(0, len(prompts), self._prompts_at_once)
        return [prompts[start : start + self._prompts_at_once] for start in starts]

    def _decode(
        self,
        embedding: dict[str, Any],
        points_nk2: np.ndarray,
        size_hw: tuple[int, int],
        kind: Literal["box", "point"],
        multimask: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Low-resolution logits (n, masks, h, w) and predicted IoU (n, masks) of prompts in image
        pixels."""
        fitted_hw = self._fitted_hw(size_hw)
        scale_xy = np.divide(fitted_hw, size_hw)[::-1]
        prompts = torch.as_tensor(
            points_nk2 * scale_xy, dtype=torch.float32, device=self._sam.device
        )
        found = self._sam(
            **embedding,
            input_boxes=prompts.flatten(1)[None] if kind == "box" else None,
            input_points=prompts[None] if kind == "point" else None,
            multimask_output=multimask,
        )
        return found.pred_masks[0], found.iou_scores[0]

    def _masks(self, logits_nhw: torch.Tensor, size_hw: tuple[int, int]) -> np.ndarray:
        masks = [np.zeros((0, *size_hw), dtype=bool)]
        for large_nhw in self._at_size(logits_nhw, size_hw):
            masks.append((large_nhw > MASK_THRESHOLD).cpu().numpy())
        return np.concatenate(masks)

    def _at_size(
        self, logits_nhw: torch.Tensor, size_hw: tuple[int, int]
    ) -> Iterator[torch.Tensor]:
        """The logits at the size of the image, a few masks at a time."""
        (height, width), square = self._fitted_hw(size_hw), (self._side, self._side)
        at_once = max(1, UPSCALED_PIXELS // max(size_hw[0] * size_hw[1], self._side**2))
        for part_nhw in logits_nhw.split(at_once) if len(logits_nhw) else ():
            large = part_nhw[:, None]
            if not self._stretched:
                large = interpolate(large, square, mode="bilinear")[..., :height, :width]
            yield interpolate(large, size_hw, mode="bilinear")[:, 0]


def _best(logits_nkhw: torch.Tensor, ious_nk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mask with the highest predicted IoU for every prompt: (n, h, w) and (n,)."""
    rows, best = torch.arange(len(ious_nk), device=ious_nk.device), ious_nk.argmax(1)
    return logits_nkhw[rows, best], ious_nk[rows, best]
