"""Segment Anything (Kirillov et al., ICCV 2023): boxes or points on images -> masks.

The model is the one of the package `segment-anything`, in its own checkpoint layout: a state dict,
as `.safetensors`, or as `.pth`, read by a loader that refuses anything but tensors. The three
published sizes are recognised by their weights; any other has a `config.json` beside its checkpoint
that holds the fields of `SamArchitecture`.

The image encoder is nearly all of the cost and runs once an image, however many prompts follow.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import load_file
from segment_anything.modeling import (
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    Sam,
    TwoWayTransformer,
)
from torchvision.ops import masks_to_boxes, nms
from torchvision.transforms.functional import resize, to_pil_image

from ovref_inference.images import check_image
from ovref_inference.models import model_errors, resolve
from ovref_inference.pixels import BatchSize, batched
from ovref_inference.proposers.config import SamGridConfig

UPSCALED_PIXELS = 2**26
"""Logits of masks brought to the image's size at once: 256 MB of float32."""

STABILITY_OFFSET = 1.0
"""A mask is stable if its area changes little between thresholds this far above and below its own,
in logits (as in segment-anything)."""


@dataclass(frozen=True, kw_only=True)
class SamArchitecture:
    """Sizes of a SAM. The defaults are those that the published checkpoints share."""

    embed_dim: int
    """Width of the image encoder."""
    depth: int
    """Blocks of the image encoder."""
    num_heads: int
    """Attention heads of the image encoder."""
    global_attn_indexes: tuple[int, ...]
    """Blocks of the image encoder that attend to the whole image; the others to windows."""
    image_size: int = 1024
    """Pixels per side of the square that an image is fitted into; a multiple of `patch_size`."""
    patch_size: int = 16
    """Pixels per side of a cell of the embedding."""
    window_size: int = 14
    """Cells per side of a window."""
    out_chans: int = 256
    """Width of the image embedding, the prompts and the mask decoder; a multiple of 8."""
    mask_in_chans: int = 16
    """Channels of the prompt encoder's layers for mask prompts."""
    decoder_depth: int = 2
    """Blocks of the mask decoder."""
    decoder_num_heads: int = 8
    """Attention heads of the mask decoder."""
    decoder_mlp_dim: int = 2048
    """Hidden width of the mask decoder's blocks."""
    iou_head_depth: int = 3
    """Layers of the head that predicts a mask's IoU."""
    iou_head_hidden_dim: int = 256
    """Hidden width of that head."""


PUBLISHED = {
    "vit_b": SamArchitecture(
        embed_dim=768, depth=12, num_heads=12, global_attn_indexes=(2, 5, 8, 11)
    ),
    "vit_l": SamArchitecture(
        embed_dim=1024, depth=24, num_heads=16, global_attn_indexes=(5, 11, 17, 23)
    ),
    "vit_h": SamArchitecture(
        embed_dim=1280, depth=32, num_heads=16, global_attn_indexes=(7, 15, 23, 31)
    ),
}
"""The sizes of the published checkpoints."""


def build_sam(architecture: SamArchitecture) -> Sam:
    """A SAM with random weights, in training mode."""
    size = architecture
    grid = size.image_size // size.patch_size
    return Sam(
        image_encoder=ImageEncoderViT(
            img_size=size.image_size,
            patch_size=size.patch_size,
            embed_dim=size.embed_dim,
            depth=size.depth,
            num_heads=size.num_heads,
            out_chans=size.out_chans,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=size.window_size,
            global_attn_indexes=size.global_attn_indexes,
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=size.out_chans,
            image_embedding_size=(grid, grid),
            input_image_size=(size.image_size, size.image_size),
            mask_in_chans=size.mask_in_chans,
        ),
        mask_decoder=MaskDecoder(
            transformer_dim=size.out_chans,
            transformer=TwoWayTransformer(
                depth=size.decoder_depth,
                embedding_dim=size.out_chans,
                num_heads=size.decoder_num_heads,
                mlp_dim=size.decoder_mlp_dim,
            ),
            iou_head_depth=size.iou_head_depth,
            iou_head_hidden_dim=size.iou_head_hidden_dim,
        ),
    )


def load_sam(model: str) -> Sam:
    """A SAM with its weights, on the CPU, in evaluation mode, without gradients.

    Args:
        model: `miniature:sam`, a `.pth` or `.safetensors` file, or a folder with
            `model.safetensors` and `config.json`.

    Raises:
        ModelError: the files are missing, broken, or of another architecture.
    """
    path = Path(resolve(model))
    weights = path / "model.safetensors" if path.is_dir() else path
    advice = (
        ". Expected a checkpoint of segment-anything (.pth or .safetensors), with config.json "
        "beside it unless it is vit_b, vit_l or vit_h"
    )
    with model_errors(f"load SAM from {model}", advice):
        if weights.suffix == ".safetensors":
            state = load_file(weights)
        else:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        sam = build_sam(_architecture(weights.with_name("config.json"), state))
        sam.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return sam.eval().requires_grad_(False)


def config_json(architecture: SamArchitecture) -> str:
    """The text of the `config.json` that `load_sam` reads."""
    return json.dumps(asdict(architecture), indent=2) + "\n"


def _architecture(config: Path, state: dict[str, torch.Tensor]) -> SamArchitecture:
    if config.is_file():
        values = json.loads(config.read_text(encoding="utf-8"))
        unknown = sorted(set(values) - {field.name for field in fields(SamArchitecture)})
        if unknown:
            raise ValueError(f"{config} has unknown keys {unknown}")
        indexes = tuple(values.pop("global_attn_indexes"))
        return SamArchitecture(**values, global_attn_indexes=indexes)
    width = state["image_encoder.pos_embed"].shape[-1]
    for architecture in PUBLISHED.values():
        if architecture.embed_dim == width:
            return architecture
    raise ValueError(f"no config.json, and no published SAM has an encoder of width {width}")


class SamMasks:
    """Masks for boxes, or for a grid of points, at the size of the images."""

    def __init__(self, sam: Sam, *, batch_size: int = 8, prompts_at_once: int = 64) -> None:
        """
        Args:
            sam: as `load_sam` gives it, on its device.
            batch_size: images per pass of the image encoder at most.
            prompts_at_once: boxes or points per pass of the mask decoder at most.
        """
        self._sam = sam
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
            IoU, (n,) float32, about [0, 1]; one image at a time, for masks are large. An image
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
        """Masks of whatever is found at a grid of points, each point alone.

        As in the paper's automatic masks, without its extra passes over crops: three masks a point,
        those kept that are surely good and stable, duplicates removed by their boxes.

        Yields:
            For every image (n, H, W) bool masks, which may overlap, by falling predicted IoU, and
            these, (n,) float32.
        """
        side = (np.arange(config.points_per_side) + 0.5) / config.points_per_side
        grid_n2 = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
        for image_hwc, embedding_1dhw in zip(images, self._embeddings(images), strict=True):
            size_hw = image_hwc.shape[:2]
            points_n12 = (grid_n2 * size_hw[::-1])[:, None]
            kept = [
                self._stable(*self._decode(embedding_1dhw, part, size_hw, "point", True), size_hw,
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
        """The masks worth keeping, still small, with their predicted IoU and boxes (n, 4)."""
        good = ious_nk > config.min_predicted_iou
        logits_nhw, ious_n = logits_nkhw[good], ious_nk[good]
        stable, boxes = [], [torch.zeros(0, 4, device=ious_n.device)]
        for large_nhw in self._at_size(logits_nhw, size_hw):
            threshold = self._sam.mask_threshold
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

    def _embeddings(self, images: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """(1, d, h, w) of every image, each encoded once."""
        batches = batched(images, self._batch_size, self._encode)
        return [part_1dhw for batch_ndhw in batches for part_1dhw in batch_ndhw.split(1)]

    def _encode(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        fitted = []
        for image_hwc in images:
            check_image(image_hwc)
            small = resize(to_pil_image(image_hwc), list(self._fitted_hw(image_hwc.shape[:2])))
            pixels = torch.as_tensor(np.array(small), device=self._sam.device).permute(2, 0, 1)
            fitted.append(self._sam.preprocess(pixels))
        return self._sam.image_encoder(torch.stack(fitted))

    def _fitted_hw(self, size_hw: tuple[int, int]) -> tuple[int, int]:
        """The size of an image whose longer side fills the encoder's square."""
        scale = self._sam.image_encoder.img_size / max(size_hw)
        height, width = (max(1, int(side * scale + 0.5)) for side in size_hw)
        return height, width

    def _parts(self, prompts: np.ndarray) -> list[np.ndarray]:
        starts = range(0, len(prompts), self._prompts_at_once)
        return [prompts[start : start + self._prompts_at_once] for start in starts]

    def _decode(
        self,
        embedding_1dhw: torch.Tensor,
        points_nk2: np.ndarray,
        size_hw: tuple[int, int],
        kind: Literal["box", "point"],
        multimask: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Small logits (n, masks, h, w) and predicted IoU (n, masks) of prompts in image pixels."""
        fitted_hw = self._fitted_hw(size_hw)
        scale_xy = np.divide(fitted_hw, size_hw)[::-1]
        prompts = torch.as_tensor(
            points_nk2 * scale_xy, dtype=torch.float32, device=self._sam.device
        )
        if kind == "box":
            sparse, dense = self._sam.prompt_encoder(
                points=None, boxes=prompts.flatten(1), masks=None
            )
        else:
            foreground = torch.ones(prompts.shape[:2], dtype=torch.int, device=prompts.device)
            sparse, dense = self._sam.prompt_encoder(
                points=(prompts, foreground), boxes=None, masks=None
            )
        return self._sam.mask_decoder(
            image_embeddings=embedding_1dhw,
            image_pe=self._sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask,
        )

    def _masks(self, logits_nhw: torch.Tensor, size_hw: tuple[int, int]) -> np.ndarray:
        masks = [np.zeros((0, *size_hw), dtype=bool)]
        for large_nhw in self._at_size(logits_nhw, size_hw):
            masks.append((large_nhw > self._sam.mask_threshold).cpu().numpy())
        return np.concatenate(masks)

    def _at_size(
        self, logits_nhw: torch.Tensor, size_hw: tuple[int, int]
    ) -> Iterator[torch.Tensor]:
        """The logits at the size of the image, a few masks at a time."""
        fitted_hw, square = self._fitted_hw(size_hw), self._sam.image_encoder.img_size
        at_once = max(1, UPSCALED_PIXELS // max(size_hw[0] * size_hw[1], square**2))
        for part_nhw in logits_nhw.split(at_once) if len(logits_nhw) else ():
            yield self._sam.postprocess_masks(part_nhw[:, None], fitted_hw, size_hw)[:, 0]


def _best(logits_nkhw: torch.Tensor, ious_nk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every prompt the mask of the highest predicted IoU: (n, h, w) and (n,)."""
    rows, best = torch.arange(len(ious_nk), device=ious_nk.device), ious_nk.argmax(1)
    return logits_nkhw[rows, best], ious_nk[rows, best]
