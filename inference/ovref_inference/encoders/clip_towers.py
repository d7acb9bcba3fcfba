"""Image towers of open_clip models: loading, and dense features in CLIP's joint space."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch.nn.functional import interpolate, linear

from ovref_inference.encoders import cnn_towers
from ovref_inference.errors import ModelError
from ovref_inference.models import model_errors, resolve

Layer = Callable[[torch.Tensor], torch.Tensor]


def load_clip(model_id: str, revision: str) -> tuple[Any, str]:
    """A CLIP model in evaluation mode on the CPU, and the name by which its tokenizer is found.

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


def _snapshot(repository: str, revision: str) -> str:
    """Folder with a hub repository's configuration, tokenizer and safetensors."""
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.txt", "*.safetensors"]
    return snapshot_download(repository, revision=revision or None, allow_patterns=patterns)


@torch.inference_mode()
def joint_dim(model: Any) -> int:
    """Width of CLIP's joint space, seen on a text: not every image tower says its own."""
    device = next(model.parameters()).device
    tokens = torch.zeros(1, model.context_length, dtype=torch.long, device=device)
    return model.encode_text(tokens).shape[-1]


def is_vit(visual: Any) -> bool:
    """Whether an image tower is open_clip's own ViT, without attention pooling."""
    return isinstance(visual, open_clip.transformer.VisionTransformer) and not visual.attn_pool


def cell_pixels(visual: Any) -> int | None:
    """Pixels per side of a cell of the tower's last feature map; None if the tower is neither a
    plain ViT nor one of `cnn_towers`."""
    if is_vit(visual):
        size = visual.patch_size
        return size[0] if isinstance(size, tuple | list) else size
    return cnn_towers.cell_pixels(visual)


def vit_features(visual: Any, kind: str) -> Layer:
    """Pixels (n, 3, H, W) -> (n, cells, d): a ViT's patches in the joint space.

    `tokens`: the last layer's. `values`: of the last layer with each patch attending to itself
    alone, which keeps the place of things better (MaskCLIP).
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
    """Brings a CLIP ViT's learned positions to another grid, as its library does when loading."""
    if tuple(visual.grid_size) == grid_hw:
        return
    positions = visual.positional_embedding.detach()
    first, grid = positions[:1], positions[1:].reshape(1, *visual.grid_size, -1)
    grid = interpolate(grid.permute(0, 3, 1, 2), size=grid_hw, mode="bicubic", antialias=True)
    resized = torch.cat([first, grid.flatten(2)[0].T])
    visual.positional_embedding = torch.nn.Parameter(resized, requires_grad=False)
    visual.grid_size = grid_hw


def _patches(visual: Any, pixels: torch.Tensor, layer: int) -> torch.Tensor:
    """(n, cells, width): the patch tokens that leave a layer."""
    found = visual.forward_intermediates(
        pixels, indices=[layer], stop_early=True, intermediates_only=True, output_fmt="NLC"
    )
    return found["image_intermediates"][0]
