"""Image towers of open_clip models: loading, and dense features in CLIP's joint space."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch.nn.functional import interpolate, linear

from ovref_inference.errors import ModelError
from ovref_inference.models import model_errors, resolve

Layer = Callable[[torch.Tensor], torch.Tensor]


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
    """Width of CLIP's joint space, measured on a text: not every image tower states it."""
    device = next(model.parameters()).device
    tokens = torch.zeros(1, model.context_length, dtype=torch.long, device=device)
    return model.encode_text(tokens).shape[-1]


def is_vit(visual: Any) -> bool:
    """Whether an image tower is open_clip's own ViT, without attention pooling."""
    return isinstance(visual, open_clip.transformer.VisionTransformer) and not visual.attn_pool


def is_convnext(visual: Any) -> bool:
    """Whether an image tower is timm's ConvNeXt with an average pool before its head."""
    trunk = getattr(visual, "trunk", None)
    return type(trunk).__name__ == "ConvNeXt" and "pool" not in dict(visual.head.named_children())


def cell_pixels(visual: Any) -> int | None:
    """Side in pixels of a cell of the tower's last feature map; None if it is neither a plain ViT
    nor a ConvNeXt."""
    if is_vit(visual):
        size = visual.patch_size
        return size[0] if isinstance(size, tuple | list) else size
    if is_convnext(visual):
        return visual.trunk.feature_info[-1]["reduction"]
    return None


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


def convnext_features(visual: Any) -> tuple[Layer, Layer]:
    """A ConvNeXt's dense features, and the head that maps them to the joint space (FC-CLIP).

    Returns:
        Pixels (n, 3, H, W) -> (n, cells, c), the trunk's last feature map; and (m, c) -> (m, d),
        the trunk's norm and CLIP's projection, which FC-CLIP applies after mask pooling; applied to
        features pooled over the whole image they give its CLIP embedding.
    """
    trunk = visual.trunk

    def cells(pixels: torch.Tensor) -> torch.Tensor:
        return trunk.forward_features(pixels).flatten(2).transpose(1, 2)

    def head(pooled: torch.Tensor) -> torch.Tensor:
        return visual.head(trunk.forward_head(pooled[:, :, None, None]))

    return cells, head


def resize_positions(visual: Any, grid_hw: tuple[int, int]) -> None:
    """Resizes a CLIP ViT's learned position embeddings to another grid, as open_clip does when
    loading."""
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
