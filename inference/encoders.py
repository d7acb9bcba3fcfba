"""Frozen encoders: images -> dense visual features, texts (and images) -> CLIP's joint space.

The builder and the segmenters load their encoders here, so that resizing, normalisation and the
choice of features agree. Weights are read as safetensors, or else by a loader that refuses
anything but tensors; models are in evaluation mode; a local folder is loaded without the network.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from ovref_inference.encoder_config import TextEncoderConfig, VisualEncoderConfig
from ovref_inference.errors import ModelLoadError
from ovref_inference.models import resolve
from torch.nn.functional import interpolate, linear
from transformers import AutoConfig, AutoModel
from transformers.image_processing_base import ImageProcessingMixin

_LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError)
"""What the libraries raise when a model's files are missing, broken or of another architecture."""


class VisualEncoder:
    """Dense features of images. Made by `load_visual_encoder`."""

    def __init__(
        self,
        forward: Callable[[torch.Tensor], torch.Tensor],
        *,
        dim: int,
        size_hw: tuple[int, int],
        patch_size: int,
        images: "_Images",
        batch_size: int,
    ) -> None:
        self._forward = forward
        self._images = images
        self._batch_size = batch_size
        self.dim = dim
        """Width of the features."""
        self.size_hw = size_hw
        """Height and width that images are resized to, in pixels."""
        self.patch_size = patch_size
        """Pixels per side of a grid cell, after resizing."""

    @property
    def grid_hw(self) -> tuple[int, int]:
        """Rows and columns of the feature grid."""
        return self.size_hw[0] // self.patch_size, self.size_hw[1] // self.patch_size

    @torch.inference_mode()
    def encode(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """(H, W, 3) uint8 RGB images, of any sizes -> (n, h, w, dim) float32, not normalised.

        The grid covers the whole of each image. Out of GPU memory, the batch is halved.
        """
        height, width = self.grid_hw
        batches = _batched(images, self._batch_size, lambda some: self._encode(some))
        features = np.concatenate([np.zeros((0, height * width, self.dim), np.float32), *batches])
        return features.reshape(len(images), height, width, self.dim)

    def _encode(self, images: Sequence[np.ndarray]) -> np.ndarray:
        tokens = self._forward(self._images(images, self.size_hw))
        return tokens.float().cpu().numpy()


class TextEncoder:
    """CLIP's joint space: texts, and whole images. Made by `load_text_encoder`."""

    def __init__(self, model: Any, tokenizer: Any, images: "_Images", batch_size: int) -> None:
        self._model, self._tokenizer, self._images = model, tokenizer, images
        self._batch_size = batch_size
        self._size_hw = _pair(model.visual.image_size)
        self.dim: int = model.visual.output_dim
        """Width of the embeddings."""

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """(n, dim) float32, L2-normalised. A text longer than the context loses its end."""
        batches = _batched(texts, self._batch_size, self._encode_texts)
        return np.concatenate([np.zeros((0, self.dim), np.float32), *batches])

    @torch.inference_mode()
    def encode_images(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """(H, W, 3) uint8 RGB images -> (n, dim) float32, L2-normalised global embeddings.

        Each image is resized to CLIP's own input size as a whole, without cropping.
        """
        batches = _batched(images, self._batch_size, self._encode_images)
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
        ModelLoadError: the model cannot be found, read, or is not a plain ViT.
    """
    load = _transformers_vit if config.library == "transformers" else _open_clip_vit
    return load(config, _device(device), batch_size)


def load_text_encoder(
    config: TextEncoderConfig, *, device: str | None = None, batch_size: int = 256
) -> TextEncoder:
    """Loads a CLIP model and its tokenizer. Arguments and errors as `load_visual_encoder`."""
    where = _device(device)
    model, name = _open_clip_model(config.model, config.revision)
    try:
        tokenizer = open_clip.get_tokenizer(name)
    except _LOAD_ERRORS as error:
        raise ModelLoadError(
            f"cannot load the tokenizer of {config.model}: {error}; its folder must hold the "
            "tokenizer files that open_clip_config.json asks for"
        ) from error
    images = _Images.of_open_clip(model, where, torch.float32)
    return TextEncoder(model.to(where), tokenizer, images, batch_size)


@dataclass(frozen=True)
class _Images:
    """Images -> normalised pixels, as the model was trained on."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    mode: str
    device: torch.device
    dtype: torch.dtype

    @staticmethod
    def of_open_clip(model: Any, device: torch.device, dtype: torch.dtype) -> "_Images":
        settings = model.visual.preprocess_cfg
        mean, std = tuple(settings["mean"]), tuple(settings["std"])
        return _Images(mean, std, settings["interpolation"], device, dtype)

    def __call__(self, images: Sequence[np.ndarray], size_hw: tuple[int, int]) -> torch.Tensor:
        """(n, 3, *size_hw)."""
        resized = []
        for image in images:
            if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
                raise ValueError(
                    f"an image must be (H, W, 3) uint8, found {image.shape} {image.dtype}"
                )
            pixels = torch.tensor(image, device=self.device).permute(2, 0, 1)[None].float()
            if pixels.shape[2:] != size_hw:
                pixels = interpolate(pixels, size=size_hw, mode=self.mode, antialias=True)
            resized.append(pixels.clamp(0, 255))
        mean = torch.tensor(self.mean, device=self.device)[:, None, None]
        std = torch.tensor(self.std, device=self.device)[:, None, None]
        return ((torch.cat(resized) / 255 - mean) / std).to(self.dtype)


def _transformers_vit(
    config: VisualEncoderConfig, device: torch.device, batch_size: int
) -> VisualEncoder:
    path = resolve(config.model)
    dtype = getattr(torch, config.precision)
    options = {"revision": config.revision or None, "local_files_only": Path(path).is_dir()}
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
    except (*_LOAD_ERRORS, AttributeError) as error:
        raise ModelLoadError(f"cannot load the visual encoder {config.model}: {error}") from error
    if report["missing_keys"]:
        raise ModelLoadError(
            f"{config.model} lacks weights for {sorted(report['missing_keys'])[:5]}: it was saved "
            "from another architecture"
        )
    model = model.to(device).eval()
    # PIL's number for bilinear is 2; ViTs are otherwise trained on bicubic resizing.
    mode = "bilinear" if processor.get("resample") == 2 else "bicubic"
    size_hw = _rounded(config.size_hw, patch)
    cells = (size_hw[0] // patch) * (size_hw[1] // patch)
    prefix = 1 + (getattr(settings, "num_register_tokens", 0) or 0)
    interpolation = {"interpolate_pos_encoding": True} if settings.model_type == "vit" else {}
    keys = _last_keys(model) if config.features == "keys" else None

    def forward(pixels: torch.Tensor) -> torch.Tensor:
        caught: list[torch.Tensor] = []
        hook = keys.register_forward_hook(lambda *call: caught.append(call[2])) if keys else None
        try:
            tokens = model(pixel_values=pixels, **interpolation).last_hidden_state
        finally:
            if hook:
                hook.remove()
        tokens = caught[0] if caught else tokens
        if tokens.ndim != 3 or tokens.shape[1] != prefix + cells:
            raise ModelLoadError(
                f"{config.model} is not a plain ViT: expected {prefix} + {cells} tokens, found "
                f"{tuple(tokens.shape)}"
            )
        return tokens[:, prefix:]

    return VisualEncoder(
        forward,
        dim=keys.out_features if keys else settings.hidden_size,
        size_hw=size_hw,
        patch_size=patch,
        images=_Images(mean, std, mode, device, dtype),
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
        raise ModelLoadError(f"{type(model).__name__} has no layer of keys")
    return layers[-1]


def _open_clip_vit(
    config: VisualEncoderConfig, device: torch.device, batch_size: int
) -> VisualEncoder:
    dtype = getattr(torch, config.precision)
    model, _ = _open_clip_model(config.model, config.revision)
    visual = model.visual
    if not isinstance(visual, open_clip.transformer.VisionTransformer) or visual.attn_pool:
        raise ModelLoadError(f"{config.model}: dense features need a plain ViT image tower")
    patch = _pair(visual.patch_size)[0]
    size_hw = _rounded(config.size_hw, patch)
    _resize_positions(visual, (size_hw[0] // patch, size_hw[1] // patch))
    images = _Images.of_open_clip(model, device, dtype)
    visual = visual.to(device=device, dtype=dtype)
    blocks = visual.transformer.resblocks

    def tokens(pixels: torch.Tensor) -> torch.Tensor:
        return _patches(visual, pixels, len(blocks) - 1)

    def values(pixels: torch.Tensor) -> torch.Tensor:
        entering, last = _patches(visual, pixels, len(blocks) - 2), blocks[-1]
        weight, bias = last.attn.in_proj_weight, last.attn.in_proj_bias
        third = 2 * weight.shape[0] // 3
        own = linear(last.ln_1(entering), weight[third:], bias[third:])
        attended = entering + last.ls_1(last.attn.out_proj(own))
        return attended + last.ls_2(last.mlp(last.ln_2(attended)))

    layer = tokens if config.features == "tokens" else values
    return VisualEncoder(
        lambda pixels: visual.ln_post(layer(pixels)) @ visual.proj,
        dim=visual.output_dim,
        size_hw=size_hw,
        patch_size=patch,
        images=images,
        batch_size=batch_size,
    )


def _patches(visual: Any, pixels: torch.Tensor, layer: int) -> torch.Tensor:
    """(n, cells, width): the patch tokens that leave a layer."""
    found = visual.forward_intermediates(
        pixels, indices=[layer], stop_early=True, intermediates_only=True, output_fmt="NLC"
    )
    return found["image_intermediates"][0]


def _resize_positions(visual: Any, grid_hw: tuple[int, int]) -> None:
    """Brings a CLIP ViT's learned positions to another grid, as its library does when loading."""
    if tuple(visual.grid_size) == grid_hw:
        return
    positions = visual.positional_embedding.detach()
    first, grid = positions[:1], positions[1:].reshape(1, *visual.grid_size, -1)
    grid = interpolate(grid.permute(0, 3, 1, 2), size=grid_hw, mode="bicubic", antialias=True)
    resized = torch.cat([first, grid.flatten(2)[0].T])
    visual.positional_embedding = torch.nn.Parameter(resized, requires_grad=False)
    visual.grid_size = grid_hw


def _open_clip_model(model_id: str, revision: str) -> tuple[Any, str]:
    """A CLIP model in evaluation mode on the CPU, and the name by which its tokenizer is found."""
    path = resolve(model_id)
    options: dict[str, Any] = {"require_pretrained": True, "weights_only": True}
    try:
        if path.startswith("hf-hub:"):
            path = _snapshot(path.removeprefix("hf-hub:"), revision)
        if Path(path).is_dir():
            name = f"local-dir:{path}"
            if not list(Path(path).glob("*.safetensors")):
                raise ModelLoadError(f"no *.safetensors in {path}")
        else:
            name, colon, tag = path.partition(":")
            if not colon:
                raise ModelLoadError(
                    f"{model_id!r} is no folder; expected a folder, hf-hub:<id> or "
                    "<architecture>:<tag>"
                )
            if revision:
                raise ModelLoadError(f"{model_id!r} has no revisions; hf-hub:<id> has")
            known = open_clip.get_pretrained_cfg(name, tag)
            options |= {"pretrained": tag, "force_quick_gelu": known.get("quick_gelu", False)}
        model = open_clip.create_model(name, **options)
    except _LOAD_ERRORS as error:
        raise ModelLoadError(f"cannot load the CLIP model {model_id}: {error}") from error
    return model.eval(), name


def _snapshot(repository: str, revision: str) -> str:
    """Folder with a hub repository's configuration, tokenizer and safetensors."""
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.txt", "*.safetensors"]
    return snapshot_download(repository, revision=revision or None, allow_patterns=patterns)


def _device(name: str | None) -> torch.device:
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _pair(size: Any) -> tuple[int, int]:
    return tuple(size) if isinstance(size, tuple | list) else (size, size)


def _rounded(size_hw: tuple[int, int], patch: int) -> tuple[int, int]:
    """The nearest multiples of the patch, at least one."""
    height, width = (max(1, (side + patch // 2) // patch) * patch for side in size_hw)
    return height, width


def _batched(
    items: Sequence[Any], batch_size: int, run: Callable[[Sequence[Any]], np.ndarray]
) -> list[np.ndarray]:
    """`run` over all items in batches; out of GPU memory, with half the batch from there on."""
    done: list[np.ndarray] = []
    start = 0
    while start < len(items):
        try:
            done.append(run(items[start : start + batch_size]))
            start += batch_size
        except torch.cuda.OutOfMemoryError:
            if batch_size == 1:
                raise
            torch.cuda.empty_cache()
            batch_size //= 2
    return done
