"""Frozen encoders: images -> dense features and regions, texts (and images) -> CLIP's joint space.

The builder and the segmenters load their encoders here, so that resizing, normalisation, the choice
of features and the pooling of regions agree. Weights are read as safetensors, or else by a loader
that refuses anything but tensors; models are in evaluation mode; a local folder is loaded without
the network. Each visual encoder encodes one black image when it is loaded, so that an unsuitable
model is refused before a build starts.
"""

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import open_clip
import torch

from ovref_inference.encoders import clip_towers, registry, text_towers, timm_towers, vit_towers
from ovref_inference.encoders.config import TextEncoderConfig, VisualEncoderConfig
from ovref_inference.encoders.crop_encoder import CropEncoder
from ovref_inference.encoders.crops import Masking
from ovref_inference.encoders.pooling import mask_weights, pool_each
from ovref_inference.encoders.positions import without_positions
from ovref_inference.encoders.towers import Tower, pair, parameters_of
from ovref_inference.errors import ModelError
from ovref_inference.images import check_image
from ovref_inference.models import model_errors
from ovref_inference.pixels import BatchSize, Pixels, batched, device_of

BATCH = 32
"""Images per forward pass at most, unless another number is given."""

CPU_PIXELS = 1 << 19
"""Pixels per forward pass at most on a CPU, two images of 512 x 512, unless a number of images is
given: larger passes take more memory there, and at most a tenth less time
(`tests/benchmarks/results/evaluation_memory.md`)."""


@dataclass(kw_only=True, eq=False)
class VisualEncoder(Tower):
    """Dense features of images. Made by `load_visual_encoder`."""

    dim: int
    """Width of the features."""
    batch_size: int | None
    """Maximum number of images per forward pass; None for BATCH, and on a CPU no more than
    CPU_PIXELS."""
    size_of: Callable[[tuple[int, int]], tuple[int, int]] | None = None
    """The size to which an image of a size is resized, in place of `size_hw`."""

    def __post_init__(self) -> None:
        self._batch_size = BatchSize(self.batch_size or BATCH)
        self._fitted = threading.Lock()

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.images.device

    def grid_of(self, size_hw: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the feature grid of an image of this size."""
        return self._cells(self._resized(size_hw))

    def _resized(self, size_hw: tuple[int, int]) -> tuple[int, int]:
        return self.size_hw if self.size_of is None else self.size_of(size_hw)

    def _cells(self, size_hw: tuple[int, int]) -> tuple[int, int]:
        return size_hw[0] // self.patch_size, size_hw[1] // self.patch_size

    @torch.inference_mode()
    def encode(self, images: Sequence[np.ndarray]) -> Any:
        """(H, W, 3) uint8 RGB images, of any sizes -> (n, h, w, dim) float32, not normalised; where
        images keep their aspect, a list of (h, w, dim).

        The grid covers the whole image. If GPU memory runs out, the batch size is halved.
        """
        maps = self._maps(images)
        if self.head:
            maps = [self._headed(map_lc) for map_lc in maps]
        if self.size_of is not None:
            grids = [self.grid_of(image_hwc.shape[:2]) for image_hwc in images]
            return [map_lc.reshape(*grid, -1) for map_lc, grid in zip(maps, grids, strict=True)]
        features = np.concatenate([np.zeros((0, self.dim), np.float32), *maps])
        return features.reshape(len(images), *self.grid_hw, self.dim)

    @torch.inference_mode()
    def encode_regions(
        self,
        images: Sequence[np.ndarray],
        masks: Sequence[np.ndarray],
        heatmaps: Sequence[np.ndarray] | None = None,
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Mean-region pooling (`pooling.pool_regions`), each mask alone.

        What a ConvNeXt of open_clip gives is pooled before its head, and what a ResNet gives by its
        attention pool (both FC-CLIP); a ViT's patches are in their space already.

        Args:
            images: (H, W, 3) uint8 RGB each, of any sizes.
            masks: (n, H, W) for each image, bool or tri-state uint8; n may be 0.
            heatmaps: not used here.

        Returns:
            For each image the features (n, dim) float32, not normalised; and (n,) bool, False where
            a mask is empty or the features under it are not finite; such a row is zero.
        """
        found = []
        for image_hwc, map_lc, masks_nhw in zip(images, self._maps(images), masks, strict=True):
            grid_hw = self.grid_of(image_hwc.shape[:2])
            if self.pool:
                found.append(self._attended(map_lc, masks_nhw, grid_hw))
                continue
            pooled, valid = pool_each(map_lc.reshape(*grid_hw, -1), masks_nhw)
            if self.head:
                headed = np.zeros((len(pooled), self.dim), np.float32)
                headed[valid] = self._headed(pooled[valid])
                pooled, valid = headed, valid & np.isfinite(headed).all(1)
                pooled[~valid] = 0.0
            found.append((pooled, valid))
        return found

    def _attended(
        self, map_lc: np.ndarray, masks_nhw: np.ndarray, grid_hw: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """`encode_regions` of one image by `pool`, each mask alone as in `pool_each`."""
        assert self.pool is not None
        device, dtype = self.images.device, self.images.dtype
        cells = torch.from_numpy(map_lc).to(device, dtype)
        pooled = np.zeros((len(masks_nhw), self.dim), np.float32)
        valid = np.zeros(len(masks_nhw), dtype=bool)
        for row in range(len(masks_nhw)):
            weights = mask_weights(masks_nhw[row : row + 1], grid_hw).reshape(1, -1)
            if weights.any():
                one = self.pool(cells, torch.from_numpy(weights).to(device, dtype), grid_hw)
                pooled[row] = one[0].float().cpu().numpy()
                valid[row] = np.isfinite(pooled[row]).all()
        pooled[~valid] = 0.0
        return pooled, valid

    def _maps(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """(cells, c) of each image."""
        by_size: dict[tuple[int, int], list[int]] = {}
        for number, image_hwc in enumerate(images):
            check_image(image_hwc)
            by_size.setdefault(self._resized(image_hwc.shape[:2]), []).append(number)
        found: dict[int, np.ndarray] = {}
        for size_hw, numbers in by_size.items():
            encode = partial(self._encode, size_hw=size_hw)
            at_once: int | BatchSize = self._batch_size
            if self.batch_size is None and self.device.type == "cpu":
                at_once = min(BATCH, max(1, CPU_PIXELS // math.prod(size_hw)))
            batches = batched([images[number] for number in numbers], at_once, encode)
            maps = (map_lc for batch in batches for map_lc in batch)
            found |= zip(numbers, maps, strict=True)
        return [found[number] for number in range(len(images))]

    def _encode(self, images: Sequence[np.ndarray], size_hw: tuple[int, int]) -> np.ndarray:
        pixels = self.images(images, size_hw)
        if self.fit is None:
            return self.forward(pixels).float().cpu().numpy()
        with self._fitted:  # threads may encode images of other sizes at the same time
            self.fit(self._cells(size_hw))
            return self.forward(pixels).float().cpu().numpy()

    def _headed(self, features: np.ndarray) -> np.ndarray:
        if not len(features):
            return np.zeros((0, self.dim), np.float32)
        pooled = torch.from_numpy(features).to(self.images.device, self.images.dtype)
        headed = pooled if self.head is None else self.head(pooled)
        return headed.float().cpu().numpy()


class TextEncoder:
    """The joint space of texts and whole images. Made by `load_text_encoder`."""

    def __init__(self, model: Any, tokenizer: Any, images: Pixels, batch_size: int) -> None:
        """
        Args:
            model: of open_clip, or `text_towers.JointModel`.
            tokenizer: texts -> what the model's `encode_text` takes.
        """
        self._model, self._tokenizer, self._images = model, tokenizer, images
        self._batch_size = BatchSize(batch_size)
        self._size_hw = pair(model.visual.image_size)
        with torch.inference_mode():
            self.dim: int = self._encode_texts(["a photo"]).shape[1]
        """Width of the embeddings."""

    @property
    def model_class(self) -> str:
        """Class of the model in its library."""
        return type(getattr(self._model, "model", self._model)).__name__

    @property
    def parameters(self) -> int:
        """How many numbers the weights are, the image tower's with them."""
        return parameters_of(getattr(self._model, "model", self._model))

    def tokens_of(self, text: str) -> tuple[int, int]:
        """How many tokens a text has, those that begin and end it with them, and can have."""
        ids = self._tokenizer([text])
        ids = ids if isinstance(ids, torch.Tensor) else ids.input_ids
        blank = self._tokenizer([""])
        blank = blank if isinstance(blank, torch.Tensor) else blank.input_ids
        return int((ids != blank[0, -1]).sum()), ids.shape[1]

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """(n, dim) float32, L2-normalised. A text longer than the context is truncated."""
        batches = batched(texts, self._batch_size, self._encode_texts)
        return np.concatenate([np.zeros((0, self.dim), np.float32), *batches])

    @torch.inference_mode()
    def encode_images(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """(H, W, 3) uint8 RGB images -> (n, dim) float32, L2-normalised global embeddings.

        Each image is resized to CLIP's own input size as a whole, without cropping.
        """
        batches = batched(images, self._batch_size, self._encode_images)
        return np.concatenate([np.zeros((0, self.dim), np.float32), *batches])

    def _encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        tokens = self._tokenizer(list(texts)).to(self._images.device)
        return self._model.encode_text(tokens, normalize=True).float().cpu().numpy()

    def _encode_images(self, images: Sequence[np.ndarray]) -> np.ndarray:
        pixels = self._images(images, self._size_hw)
        return self._model.encode_image(pixels, normalize=True).float().cpu().numpy()


def load_visual_encoder(
    config: VisualEncoderConfig, *, device: str | None = None, batch_size: int | None = None
) -> VisualEncoder | registry.OwnEncoder:
    """Loads a visual backbone and encodes one black image with it.

    Args:
        device: "cpu", "cuda", ...; None selects a GPU if there is one.
        batch_size: maximum number of images per forward pass; None for BATCH, and on a CPU no more
            than CPU_PIXELS.

    Raises:
        ModelError: the model cannot be found or read, has no grid of features, or gives no finite
            ones at the configured size; or the configured features are not dense.
    """
    if config.model.startswith(registry.OWN):
        if config.aspect == "kept":
            raise ModelError(f"{config.model} resizes images itself: leave out aspect")
        if config.position_debias:
            raise ModelError(f"{config.model} is of your own code: leave out position_debias")
        return registry.load_own(config, device)
    if config.masking:
        raise ModelError(
            f"features {config.features!r} are of regions, not dense; load_region_encoder has them"
        )
    tower = _LIBRARIES[config.library](config, device_of(device))
    if tower.fit is not None:
        tower.fit(tower.grid_hw)
    size_of = partial(config.size_of, patch=tower.patch_size) if config.aspect == "kept" else None
    check = partial(_try, config, images=tower.images, size_hw=tower.size_hw,
                    model_class=tower.model_class)  # fmt: skip
    dim = check(tower.forward, cells=math.prod(tower.grid_hw))
    if (head := tower.head) is not None:
        dim = check(lambda pixels: head(tower.forward(pixels).mean(1)), cells=None)
    if config.position_debias:
        tower.forward = without_positions(tower, config, dim)
    return VisualEncoder(dim=dim, batch_size=batch_size, size_of=size_of, **vars(tower))


def load_region_encoder(
    config: VisualEncoderConfig, *, device: str | None = None, batch_size: int | None = None
) -> VisualEncoder | registry.OwnEncoder | CropEncoder:
    """Loads the encoder of regions as configured: by pooling or by masked crops.

    Arguments and errors as in `load_visual_encoder`; the batch size counts images or crops, at most
    BATCH crops if it is None. Masked crops need no dense features, so any open_clip image tower
    works.
    """
    if config.masking:
        return _crop_encoder(config, config.masking, device_of(device), batch_size or BATCH)
    return load_visual_encoder(config, device=device, batch_size=batch_size)


def load_text_encoder(
    config: TextEncoderConfig, *, device: str | None = None, batch_size: int = 256
) -> TextEncoder:
    """Loads a model of images and texts, and its tokenizer. Arguments and errors as in
    `load_visual_encoder`."""
    where = device_of(device)
    if config.library == "transformers":
        joint, pixels = text_towers.open_joint(config, where)
        return _finite(config, TextEncoder(joint, joint.tokens, pixels, batch_size))
    model, name = clip_towers.load_clip(config.model, config.revision)
    advice = "; its folder must hold the tokenizer files that open_clip_config.json asks for"
    with model_errors(f"load the tokenizer of {config.model}", advice):
        tokenizer = open_clip.get_tokenizer(name)
    with model_errors(f"use {config.model}"):
        images = Pixels.of_open_clip(model, where, torch.float32)
        encoder = TextEncoder(model.to(where), tokenizer, images, batch_size)
    return _finite(config, encoder)


def _finite(config: TextEncoderConfig, encoder: TextEncoder) -> TextEncoder:
    if not np.isfinite(encoder.encode(["a photo"])).all():
        raise ModelError(f"{config.model} gives embeddings that are not finite: broken weights")
    return encoder


def _crop_encoder(
    config: VisualEncoderConfig, masking: Masking, device: torch.device, batch_size: int
) -> CropEncoder:
    visual, images, patch, size_hw = clip_towers.open_parts(config, device)
    return CropEncoder(
        visual,
        dim=_try(config, visual, images, size_hw, None, type(visual).__name__),
        size_hw=size_hw,
        grid_hw=None if patch is None else (size_hw[0] // patch, size_hw[1] // patch),
        masking=masking,
        images=images,
        batch_size=batch_size,
        fill_rgb=(0.0, 0.0, 0.0) if config.features == "crop_heatmap_black" else None,
    )


@torch.inference_mode()
def _try(
    config: VisualEncoderConfig,
    forward: Callable[[torch.Tensor], torch.Tensor],
    images: Pixels,
    size_hw: tuple[int, int],
    cells: int | None,
    model_class: str,
) -> int:
    """Width of the model's output for one black image.

    Args:
        cells: how many vectors there must be; None for one alone, without that axis.

    Raises:
        ModelError: the model fails, or gives another shape or values that are not finite.
    """
    size = f"{size_hw[0]} x {size_hw[1]} pixels"
    with model_errors(f"use {config.model} on images of {size}"):
        found = forward(images([np.zeros((*size_hw, 3), dtype=np.uint8)], size_hw))
    wanted = (1,) if cells is None else (1, cells)
    if not isinstance(found, torch.Tensor) or tuple(found.shape[:-1]) != wanted:
        shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise ModelError(
            f"{config.model} ({model_class}) is not supported: for an image of {size} its features "
            f"must be {(*wanted, 'width')}, one vector for each patch, found {shape}; a vision "
            "transformer of one resolution or a network with one feature map works"
        )
    if not torch.isfinite(found).all():
        raise ModelError(
            f"{config.model} gives values that are not finite for a black image in "
            f"{config.precision}; with precision float16 try bfloat16 or float32, else its weights "
            "are broken"
        )
    return found.shape[-1]


_LIBRARIES: dict[str, Callable[[VisualEncoderConfig, torch.device], Tower]] = {
    "transformers": vit_towers.open_tower,
    "open_clip": clip_towers.open_tower,
    "timm": timm_towers.open_tower,
}
