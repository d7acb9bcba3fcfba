"""Image towers of open_clip models: loading, and dense features in CLIP's joint space."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch.nn.functional import interpolate, linear

from ovref_inference.encoders import cnn_towers, timm_towers
from ovref_inference.encoders.config import VisualEncoderConfig, rounded
from ovref_inference.encoders.towers import (
    Layer,
    Tower,
    keep_until,
    pair,
    parameters_of,
    unusable,
)
from ovref_inference.errors import ModelError
from ovref_inference.models import model_errors, resolve
from ovref_inference.pixels import Pixels


def open_tower(config: VisualEncoderConfig, device: torch.device) -> Tower:
    """The image tower of the model that `config` names, its features in the joint space.

    Raises:
        ModelError: it cannot be found or read, or has no dense features.
    """
    visual, images, patch, size_hw = open_parts(config, device)
    trunk: Any = getattr(visual, "trunk", None)
    name = type(visual).__name__ + ("" if trunk is None else f" with timm {type(trunk).__name__}")
    if patch is None:
        raise unusable(
            config.model, name, "dense features need a vision transformer without a pool inside, "
            "a network of timm with a feature map, or a ResNet with an attention pool",
            "features 'crop_binary' and the like need neither",
        )  # fmt: skip
    shape: dict[str, Any] = {
        "model_class": name, "size_hw": size_hw, "patch_size": patch, "images": images,
        "parameters": parameters_of(visual),
    }  # fmt: skip
    if config.aspect == "kept" and not is_vit(visual) and timm_towers.is_vit(trunk):
        raise timm_towers.one_size(config.model, name)
    if is_vit(visual):
        keep_until(visual.transformer.resblocks, config, name)
        features = vit_features(visual, config.features)
        fit = fitting(visual) if config.aspect == "kept" else None
        return Tower(forward=features, prefix_tokens=1, fit=fit, **shape)
    if cnn_towers.is_resnet(visual):
        if config.features == "values" or config.layer != -1:
            raise ModelError(
                f"{config.model} is no ViT and has no values and no layers; features 'tokens' of "
                "layer -1 work"
            )
        cells, head, pool = cnn_towers.resnet_features(
            visual, (size_hw[0] // patch, size_hw[1] // patch)
        )
        return Tower(forward=cells, head=head, pool=pool, **shape)
    if not timm_towers.is_vit(trunk):
        if config.features == "values":
            raise ModelError(f"{config.model} is no ViT and has no values; features 'tokens' are")
        timm_towers.shorten(trunk, config)
        return Tower(
            forward=timm_towers.features(trunk), head=cnn_towers.trunk_head(visual), **shape
        )
    timm_towers.shorten(trunk, config)
    if config.features == "values":
        timm_towers.attend_alone(trunk)
    patches, head = timm_towers.features(trunk), cnn_towers.trunk_head(visual)

    def joint(pixels: torch.Tensor) -> torch.Tensor:
        tokens_nld = patches(pixels)
        return head(tokens_nld.flatten(0, 1)).unflatten(0, tokens_nld.shape[:2])

    return Tower(forward=joint, prefix_tokens=trunk.num_prefix_tokens, **shape)


def open_parts(
    config: VisualEncoderConfig, device: torch.device
) -> tuple[Any, Pixels, int | None, tuple[int, int]]:
    """Image tower, its preprocessing, pixels per cell (None without any), and the size of images
    as multiples of that."""
    dtype = getattr(torch, config.precision)
    model, _ = load_clip(config.model, config.revision)
    visual, patch = model.visual, cell_pixels(model.visual)
    size_hw = rounded(config.size_hw, patch or 1)
    with model_errors(f"use {config.model}"):
        images = Pixels.of_open_clip(model, device, dtype)
        one_size = patch if config.aspect == "stretched" else None
        if one_size is not None and is_vit(visual):
            resize_positions(visual, (size_hw[0] // one_size, size_hw[1] // one_size))
        elif one_size is not None and not cnn_towers.is_resnet(visual):
            timm_towers.set_size(visual.trunk, size_hw)
    return visual.to(device=device, dtype=dtype), images, patch, size_hw


def load_clip(model_id: str, revision: str) -> tuple[Any, str]:
    """A CLIP model in evaluation mode on the CPU, and the name under which open_clip finds its
    tokenizer.

    Args:
        model_id: `miniature:clip`, a folder, `hf-hub:<id>`, or `<architecture>:<tag>`.
        revision: of a hub repository; empty for the newest.

    Raises:
        ModelError: it cannot be found or read, or has no safetensors.
    """
    path = resolve(model_id)
    options: dict[str, Any] = {"require_pretrained": True, "weights_only": True}
    with model_errors(f"load the CLIP model {model_id}"):
        if path.startswith("hf-hub:"):
            path = _snapshot(path.removeprefix("hf-hub:"), revision)
        if Path(path).is_dir():
            name = f"local-dir:{path}"
            if not list(Path(path).glob("*.safetensors")):
                raise ModelError(f"no *.safetensors in {path}")
            _refuse_code(Path(path), model_id)
        else:
            name, colon, tag = path.partition(":")
            if not colon:
                raise ModelError(
                    f"{model_id!r} is no folder; expected a folder, hf-hub:<id> or "
                    "<architecture>:<tag>"
                )
            if revision:
                raise ModelError(f"{model_id!r} has no revisions; hf-hub:<id> has")
            known = open_clip.get_pretrained_cfg(name, tag)
            options |= {"pretrained": tag, "force_quick_gelu": known.get("quick_gelu", False)}
        model = open_clip.create_model(name, **options)
    return model.eval(), name


def _refuse_code(folder: Path, model_id: str) -> None:
    """Refuses a folder whose configuration lets its tokenizer run code of its own."""
    settings = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
    text = settings.get("model_cfg", {}).get("text_cfg", {})
    if text.get("tokenizer_kwargs", {}).get("trust_remote_code"):
        raise ModelError(
            f"{model_id} asks for a tokenizer with code of its own, which is never run: take a "
            "model without trust_remote_code in open_clip_config.json"
        )


def _snapshot(repository: str, revision: str) -> str:
    """Folder with a hub repository's configuration, tokenizer and safetensors."""
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.txt", "*.safetensors"]
    return snapshot_download(repository, revision=revision or None, allow_patterns=patterns)


def is_vit(visual: Any) -> bool:
    """Whether an image tower is open_clip's own ViT, without attention pooling."""
    return isinstance(visual, open_clip.transformer.VisionTransformer) and not visual.attn_pool


def cell_pixels(visual: Any) -> int | None:
    """Pixels per side of a patch, or of a cell of the last feature map; None if the tower is no
    plain ViT of open_clip, no network of timm with the usual pool before its head, and no ResNet
    with an attention pool."""
    if is_vit(visual):
        return pair(visual.patch_size)[0]
    if cnn_towers.is_resnet(visual):
        return cnn_towers.STRIDES[-1]
    trunk: Any = getattr(visual, "trunk", None)
    if trunk is None or "pool" in dict(visual.head.named_children()):
        return None
    return timm_towers.cell_pixels(trunk)


def vit_features(visual: Any, kind: str) -> Layer:
    """Pixels (n, 3, H, W) -> (n, cells, d): a ViT's patches in the joint space.

    `tokens`: output of the last layer. `values`: of the last layer with each patch attending only
    to itself, which localises better (MaskCLIP).
    """
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

    layer = values if kind == "values" else tokens
    return lambda pixels: visual.ln_post(layer(pixels)) @ visual.proj


def resize_positions(visual: Any, grid_hw: tuple[int, int]) -> None:
    """Resizes a CLIP ViT's learned position embeddings to another grid, as open_clip does when
    loading."""
    if tuple(visual.grid_size) == grid_hw:
        return
    positions = visual.positional_embedding.detach()
    first, grid = positions[:1].float(), positions[1:].float().reshape(1, *visual.grid_size, -1)
    grid = interpolate(grid.permute(0, 3, 1, 2), size=grid_hw, mode="bicubic", antialias=True)
    resized = torch.cat([first, grid.flatten(2)[0].T]).to(positions)
    visual.positional_embedding = torch.nn.Parameter(resized, requires_grad=False)
    visual.grid_size = grid_hw


def fitting(visual: Any) -> Callable[[tuple[int, int]], None]:
    """`resize_positions` of a CLIP ViT to one grid after another, each time from its own."""
    learned, own_hw = visual.positional_embedding, tuple(visual.grid_size)

    def fit(grid_hw: tuple[int, int]) -> None:
        if tuple(visual.grid_size) == grid_hw:
            return
        visual.positional_embedding, visual.grid_size = learned, own_hw
        resize_positions(visual, grid_hw)

    return fit


def _patches(visual: Any, pixels: torch.Tensor, layer: int) -> torch.Tensor:
    """(n, cells, width): the patch tokens that leave a layer."""
    found = visual.forward_intermediates(
        pixels, indices=[layer], stop_early=True, intermediates_only=True, output_fmt="NLC"
    )
    return found["image_intermediates"][0]
