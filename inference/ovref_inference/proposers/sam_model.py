"""Loading of Segment Anything: SAM, SAM 2, SAM-HQ and EdgeTAM of transformers, and checkpoints of
the package segment-anything, whose weights are SAM's under other names.
"""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    EdgeTamModel,
    Sam2Model,
    SamConfig,
    SamHQModel,
    SamModel,
)

from ovref_inference.models import check_complete, model_errors, pretrained, resolve

CLASSES: dict[str, Any] = {
    "sam": SamModel,
    "sam_hq": SamHQModel,
    "sam2": Sam2Model,
    "sam2_video": Sam2Model,
    "edgetam": EdgeTamModel,
    "edgetam_video": EdgeTamModel,
}
"""Classes of transformers by type of model. SAM 2 and EdgeTAM are published for videos; what they
need for images is a part of that."""

PUBLISHED = {
    768: {"num_hidden_layers": 12, "num_attention_heads": 12, "global_attn_indexes": [2, 5, 8, 11]},
    1024: {
        "num_hidden_layers": 24, "num_attention_heads": 16, "global_attn_indexes": [5, 11, 17, 23]
    },
    1280: {
        "num_hidden_layers": 32, "num_attention_heads": 16, "global_attn_indexes": [7, 15, 23, 31]
    },
}  # fmt: skip
"""The image encoders of the published checkpoints (vit_b, vit_l, vit_h) by their width; all other
settings of these models are transformers' defaults."""

_RENAMED = [
    (re.compile(old), new)
    for old, new in (
        (r"^image_encoder\.", "vision_encoder."),
        (r"\.patch_embed\.proj\.", ".patch_embed.projection."),
        (r"^vision_encoder\.blocks\.", "vision_encoder.layers."),
        (r"\.neck\.0\.", ".neck.conv1."),
        (r"\.neck\.1\.", ".neck.layer_norm1."),
        (r"\.neck\.2\.", ".neck.conv2."),
        (r"\.neck\.3\.", ".neck.layer_norm2."),
        (r"\.norm(\d)\.", r".layer_norm\1."),
        (r"\.norm_final_attn\.", ".layer_norm_final_attn."),
        (r"\.point_embeddings\.", ".point_embed."),
        (r"\.mask_downscaling\.0\.", ".mask_embed.conv1."),
        (r"\.mask_downscaling\.1\.", ".mask_embed.layer_norm1."),
        (r"\.mask_downscaling\.3\.", ".mask_embed.conv2."),
        (r"\.mask_downscaling\.4\.", ".mask_embed.layer_norm2."),
        (r"\.mask_downscaling\.6\.", ".mask_embed.conv3."),
        (r"\.output_upscaling\.0\.", ".upscale_conv1."),
        (r"\.output_upscaling\.1\.", ".upscale_layer_norm."),
        (r"\.output_upscaling\.3\.", ".upscale_conv2."),
        # The heads have three layers in every published model.
        (r"(_mlps\.\d+|_head)\.layers\.0\.", r"\1.proj_in."),
        (r"(_mlps\.\d+|_head)\.layers\.1\.", r"\1.layers.0."),
        (r"(_mlps\.\d+|_head)\.layers\.2\.", r"\1.proj_out."),
    )
]
_POSITIONS = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"


def load_sam(model: str, device: str | torch.device = "cpu", *, revision: str = "") -> Any:
    """A SAM with its weights, in float32, in evaluation mode, without gradients.

    Args:
        model: `miniature:sam`, a folder or hub id of transformers; or a published checkpoint of
            segment-anything, `.pth` or `.safetensors`, which is read by a loader that refuses
            anything but tensors.
        revision: of a hub repository; empty for the newest.

    Raises:
        ModelError: the files are missing, broken, or of another architecture.
    """
    path = Path(resolve(model))
    advice = (
        ". Expected a published checkpoint of segment-anything (.pth or .safetensors), or a folder "
        "or hub id of transformers' SAM, SAM 2, SAM-HQ or EdgeTAM"
    )
    report: dict[str, Any] = {"missing_keys": []}
    with model_errors(f"load SAM from {model}", advice):
        if path.suffix in (".pth", ".pt", ".safetensors"):
            sam: Any = from_segment_anything(_tensors(path))
        else:
            where, options = pretrained(model, revision)
            # The class reads the configuration itself, which may be of a video model.
            kind = AutoConfig.from_pretrained(where, **options).model_type
            if kind not in CLASSES:
                raise ValueError(f"it is a {kind}, not a sam")
            sam, report = CLASSES[kind].from_pretrained(
                where, dtype=torch.float32, output_loading_info=True, **options
            )
    check_complete(model, report)
    torch.nn.Module.to(sam, device)  # transformers' own hides its arguments from type checkers
    return sam.eval().requires_grad_(False)


def from_segment_anything(
    state: dict[str, torch.Tensor], config: SamConfig | None = None
) -> SamModel:
    """The model of transformers with weights of segment-anything.

    Args:
        state: of `segment_anything.modeling.Sam`, in any dtype.
        config: sizes of the model; None infers them for published checkpoints.

    Raises:
        ValueError, KeyError, RuntimeError: the weights are of another architecture.
    """
    sam = SamModel(_published(state) if config is None else config)
    sam.load_state_dict({name: tensor.float() for name, tensor in _renamed(state).items()})
    return sam


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _published(state: dict[str, torch.Tensor]) -> SamConfig:
    width = state["image_encoder.pos_embed"].shape[-1]
    if width not in PUBLISHED:
        raise ValueError(f"no published SAM has an image encoder of width {width}")
    return SamConfig(vision_config={"hidden_size": width, **PUBLISHED[width]})


def _renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, tensor in state.items():
        if name == _POSITIONS:
            # Prompts and the image share one positional encoding.
            renamed["shared_image_embedding.positional_embedding"] = tensor
            renamed["prompt_encoder.shared_embedding.positional_embedding"] = tensor
            continue
        for old, new in _RENAMED:
            name = old.sub(new, name)
        renamed[name] = tensor
    return renamed
