"""Frozen encoders: images -> dense features and regions, texts (and images) -> CLIP's joint space.

The builder and the segmenters load their encoders here, so that resizing, normalisation, the choice
of features and the way from masks to regions' features agree. Weights are read as safetensors, or
else by a loader that refuses anything but tensors; models are in evaluation mode; a local folder is
loaded without the network.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import open_clip
import torch
from transformers import AutoConfig, AutoModel
from transformers.image_processing_base import ImageProcessingMixin

from ovref_inference.encoders import clip_towers
from ovref_inference.encoders.clip_towers import LOAD_ERRORS
from ovref_inference.encoders.config import TextEncoderConfig, VisualEncoderConfig
from ovref_inference.encoders.crop_encoder import CropEncoder
from ovref_inference.encoders.pooling import pool_each
from ovref_inference.errors import ModelError
from ovref_inference.models import PRETRAINED_ERRORS, check_complete, pretrained
from ovref_inference.pixels import BatchSize, Pixels, batched


class VisualEncoder:
    """Dense features of images. Made by `load_visual_encoder`."""

    def __init__(
        self,
        forward: Callable[[torch.Tensor], torch.Tensor],
        *,
        dim: int,
        size_hw: tuple[int, int],
        patch_size: int,
        images: Pixels,
        batch_size: int,
        head: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        """`head` takes (m, c) of what `forward` gives to (m, dim), after pooling."""
        self._forward = forward
        self._head = head
        self._images = images
        self._batch_size = BatchSize(batch_size)
        self.dim = dim
        """Width of the features."""
        self.size_hw = size_hw
        """Height and width that images are resized to, in pixels."""
        self.patch_size = patch_size
        """Pixels per side of a grid cell, after resizing."""

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self._images.device

    @property
    def grid_hw(self) -> tuple[int, int]:
        """Rows and columns of the feature grid."""
        return self.size_hw[0] // self.patch_size, self.size_hw[1] // self.patch_size

    @torch.inference_mode()
    def encode(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """(H, W, 3) uint8 RGB images, of any sizes -> (n, h, w, dim) float32, not normalised.

        The grid covers the whole of each image. Out of GPU memory, the batch is halved.
        """
        maps = self._maps(images)
        if self._head:
            maps = [self._headed(map_lc) for map_lc in maps]
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

        What a ConvNeXt gives is pooled before its head (FC-CLIP); a ViT's patches are in their
        space already.

        Args:
            images: (H, W, 3) uint8 RGB each, of any sizes.
            masks: of each image (n, H, W), bool or tri-state uint8; n may be 0.
            heatmaps: not used here.

        Returns:
            Of each image the features (n, dim) float32, not normalised; and (n,) bool, False where
            a mask is empty or the features under it are not finite: such a row is zero.
        """
        found = []
        for map_lc, masks_nhw in zip(self._maps(images), masks, strict=True):
            pooled, valid = pool_each(map_lc.reshape(*self.grid_hw, -1), masks_nhw)
            if self._head:
                headed = np.zeros((len(pooled), self.dim), np.float32)
                headed[valid] = self._headed(pooled[valid])
                pooled, valid = headed, valid & np.isfinite(headed).all(1)
                pooled[~valid] = 0.0
            found.append((pooled, valid))
        return found

    def _maps(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """(cells, c) of each image."""
        batches = batched(images, self._batch_size, self._encode)
        return [map_lc for batch in batches for map_lc in batch]

    def _encode(self, images: Sequence[np.ndarray]) -> np.ndarray:
        tokens = self._forward(self._images(images, self.size_hw))
        return tokens.float().cpu().numpy()

    def _headed(self, features: np.ndarray) -> np.ndarray:
        if not len(features):
            return np.zeros((0, self.dim), np.float32)
        pooled = torch.from_numpy(features).to(self._images.device, self._images.dtype)
        return self._head(pooled).float().cpu().numpy()


class TextEncoder:
    """CLIP's joint space: texts, and whole images. Made by `load_text_encoder`."""

    def __init__(self, model: Any, tokenizer: Any, images: Pixels, batch_size: int) -> None:
        self._model, self._tokenizer, self._images = model, tokenizer, images
        self._batch_size = BatchSize(batch_size)
        self._size_hw = _pair(model.visual.image_size)
        self.dim: int = clip_towers.joint_dim(model)
        """Width of the embeddings."""

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """(n, dim) float32, L2-normalised. A text longer than the context loses its end."""
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
    config: VisualEncoderConfig, *, device: str | None = None, batch_size: int = 32
) -> VisualEncoder:
    """Loads a visual backbone.

    Args:
        device: "cpu", "cuda", ...; None takes a GPU where there is one.
        batch_size: images per forward pass at most.

    Raises:
        ModelError: the model cannot be found, read, or is neither a plain ViT nor, of
            open_clip, a ConvNeXt; or the configured features are not dense.
    """
    if config.masking:
        raise ModelError(
            f"features {config.features!r} are of regions, not dense; load_region_encoder has them"
        )
    load = _transformers_vit if config.library == "transformers" else _open_clip_tower
    return load(config, _device(device), batch_size)


def load_region_encoder(
    config: VisualEncoderConfig, *, device: str | None = None, batch_size: int = 32
) -> VisualEncoder | CropEncoder:
    """Loads what embeds regions as configured: by pooling, or by masked crops.

    Args and errors as `load_visual_encoder`; the batch size counts images or crops.
    """
    if config.masking:
        return _open_clip_tower(config, _device(device), batch_size)
    return load_visual_encoder(config, device=device, batch_size=batch_size)


def load_text_encoder(
    config: TextEncoderConfig, *, device: str | None = None, batch_size: int = 256
) -> TextEncoder:
    """Loads a CLIP model and its tokenizer. Arguments and errors as `load_visual_encoder`."""
    where = _device(device)
    model, name = clip_towers.load_clip(config.model, config.revision)
    try:
        tokenizer = open_clip.get_tokenizer(name)
    except LOAD_ERRORS as error:
        raise ModelError(
            f"cannot load the tokenizer of {config.model}: {error}; its folder must hold the "
            "tokenizer files that open_clip_config.json asks for"
        ) from error
    images = Pixels.of_open_clip(model, where, torch.float32)
    return TextEncoder(model.to(where), tokenizer, images, batch_size)


def _transformers_vit(
    config: VisualEncoderConfig, device: torch.device, batch_size: int
) -> VisualEncoder:
    path, options = pretrained(config.model, config.revision)
    dtype = getattr(torch, config.precision)
    try:
        settings = AutoConfig.from_pretrained(path, **options)
        # Nothing here reads the pooled output, and DINO's weights have no layer for it.
        without_pooler = {"add_pooling_layer": False} if settings.model_type == "vit" else {}
        model, report = AutoModel.from_pretrained(
            path,
            config=settings,
            dtype=dtype,
            output_loading_info=True,
            **without_pooler,
            **options,
        )
        processor, _ = ImageProcessingMixin.get_image_processor_dict(path, **options)
        mean, std = tuple(processor["image_mean"]), tuple(processor["image_std"])
        patch = settings.patch_size
    except PRETRAINED_ERRORS as error:
        raise ModelError(f"cannot load the visual encoder {config.model}: {error}") from error
    check_complete(config.model, report)
    model = model.to(device).eval()
    # PIL's number for bilinear is 2; ViTs are otherwise trained on bicubic resizing.
    mode = "bilinear" if processor.get("resample") == 2 else "bicubic"
    size_hw = _rounded(config.size_hw, patch)
    cells = (size_hw[0] // patch) * (size_hw[1] // patch)
    prefix = 1 + (getattr(settings, "num_register_tokens", 0) or 0)
    interpolation = {"interpolate_pos_encoding": True} if settings.model_type == "vit" else {}
    keys = _last_keys(model) if config.features == "keys" else None
    # Of each thread its own: several may encode at the same time.
    caught = threading.local()
    if keys:
        keys.register_forward_hook(lambda *call: setattr(caught, "keys", call[2]))

    def forward(pixels: torch.Tensor) -> torch.Tensor:
        tokens = model(pixel_values=pixels, **interpolation).last_hidden_state
        tokens = caught.__dict__.pop("keys") if keys else tokens
        if tokens.ndim != 3 or tokens.shape[1] != prefix + cells:
            raise ModelError(
                f"{config.model} is not a plain ViT: expected {prefix} + {cells} tokens, found "
                f"{tuple(tokens.shape)}"
            )
        return tokens[:, prefix:]

    return VisualEncoder(
        forward,
        dim=keys.out_features if keys else settings.hidden_size,
        size_hw=size_hw,
        patch_size=patch,
        images=Pixels(mean, std, mode, device, dtype),
        batch_size=batch_size,
    )


def _last_keys(model: Any) -> Any:
    """The linear layer that makes the keys of the last attention layer."""
    layers = [
        module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in ("k_proj", "key") and isinstance(module, torch.nn.Linear)
    ]
    if not layers:
        raise ModelError(f"{type(model).__name__} has no layer of keys")
    return layers[-1]


def _open_clip_tower(
    config: VisualEncoderConfig, device: torch.device, batch_size: int
) -> VisualEncoder | CropEncoder:
    dtype = getattr(torch, config.precision)
    model, _ = clip_towers.load_clip(config.model, config.revision)
    visual, dim = model.visual, clip_towers.joint_dim(model)
    try:
        patch = clip_towers.cell_pixels(visual)
    except ModelError as error:
        raise ModelError(f"{config.model}: {error}") from error
    if config.features == "values" and not clip_towers.is_vit(visual):
        raise ModelError(f"{config.model} is no ViT and has no values; features 'tokens' are")
    size_hw = _rounded(config.size_hw, patch)
    if clip_towers.is_vit(visual):
        clip_towers.resize_positions(visual, (size_hw[0] // patch, size_hw[1] // patch))
    images = Pixels.of_open_clip(model, device, dtype)
    visual = visual.to(device=device, dtype=dtype)
    shape = {"size_hw": size_hw, "patch_size": patch, "images": images, "batch_size": batch_size}
    if config.masking:
        return CropEncoder(visual, dim=dim, masking=config.masking, **shape)
    if clip_towers.is_vit(visual):
        return VisualEncoder(clip_towers.vit_features(visual, config.features), dim=dim, **shape)
    cells, head = clip_towers.convnext_features(visual)
    return VisualEncoder(cells, head=head, dim=dim, **shape)


def _device(name: str | None) -> torch.device:
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _pair(size: Any) -> tuple[int, int]:
    return tuple(size) if isinstance(size, tuple | list) else (size, size)


def _rounded(size_hw: tuple[int, int], patch: int) -> tuple[int, int]:
    """The nearest multiples of the patch, at least one."""
    height, width = (max(1, (side + patch // 2) // patch) * patch for side in size_hw)
    return height, width
