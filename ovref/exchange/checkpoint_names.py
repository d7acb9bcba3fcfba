"""Names of tensors in released checkpoints of other programs, and here."""

import re
from collections.abc import Mapping
from typing import Any

from ovref.errors import InputError

HEAD = "sem_seg_head."

RENAMED: tuple[tuple[str, str], ...] = (
    (r"pixel_decoder\.adapter_1\.(weight|bias)", r"pixel_decoder.adapter_1.0.\1"),
    (r"pixel_decoder\.adapter_1\.norm\.(\w+)", r"pixel_decoder.adapter_1.1.\1"),
    (r"pixel_decoder\.layer_1\.(weight|bias)", r"pixel_decoder.layer_1.0.\1"),
    (r"pixel_decoder\.layer_1\.norm\.(\w+)", r"pixel_decoder.layer_1.1.\1"),
    (r"pixel_decoder\.input_proj\.(.+)", r"pixel_decoder.input_projections.\1"),
    (r"pixel_decoder\.transformer\.level_embed", r"pixel_decoder.level_embed"),
    (r"pixel_decoder\.transformer\.(encoder\.layers\.\d+)\.linear([12])\.(\w+)",
     r"pixel_decoder.\1.fc\2.\3"),
    (r"pixel_decoder\.transformer\.(encoder\.layers\.\d+)\.norm1\.(\w+)",
     r"pixel_decoder.\1.self_attn_layer_norm.\2"),
    (r"pixel_decoder\.transformer\.(encoder\.layers\.\d+)\.norm2\.(\w+)",
     r"pixel_decoder.\1.final_layer_norm.\2"),
    (r"pixel_decoder\.transformer\.(encoder\.layers\.\d+\.self_attn\..+)", r"pixel_decoder.\1"),
    (r"pixel_decoder\.mask_features\.(\w+)", r"pixel_decoder.mask_projection.\1"),
    (r"predictor\.query_embed\.weight", r"transformer.queries_embedder.weight"),
    (r"predictor\.query_feat\.weight", r"transformer.queries_features.weight"),
    (r"predictor\.level_embed\.weight", r"transformer.level_embed.weight"),
    (r"predictor\.transformer_self_attention_layers\.(\d+)\.self_attn\.(.+)",
     r"transformer.decoder.layers.\1.self_attn.\2"),
    (r"predictor\.transformer_self_attention_layers\.(\d+)\.norm\.(\w+)",
     r"transformer.decoder.layers.\1.self_attn_layer_norm.\2"),
    (r"predictor\.transformer_cross_attention_layers\.(\d+)\.multihead_attn\.(.+)",
     r"transformer.decoder.layers.\1.cross_attn.\2"),
    (r"predictor\.transformer_cross_attention_layers\.(\d+)\.norm\.(\w+)",
     r"transformer.decoder.layers.\1.cross_attn_layer_norm.\2"),
    (r"predictor\.transformer_ffn_layers\.(\d+)\.linear([12])\.(\w+)",
     r"transformer.decoder.layers.\1.fc\2.\3"),
    (r"predictor\.transformer_ffn_layers\.(\d+)\.norm\.(\w+)",
     r"transformer.decoder.layers.\1.final_layer_norm.\2"),
    (r"predictor\.decoder_norm\.(\w+)", r"transformer.decoder.layernorm.\1"),
    (r"predictor\.mask_embed\.layers\.(\d+)\.(\w+)",
     r"transformer.decoder.mask_predictor.mask_embedder.\1.0.\2"),
    (r"predictor\._mask_pooling_proj\.(.+)", r"pooled_projection.\1"),
    (r"predictor\.logit_scale", r"log_scale"),
)  # fmt: skip
"""FC-CLIP's names, after HEAD, and those of `mask_decoder.MaskDecoder`. FC-CLIP is built on
Mask2Former, whose names transformers renames in the same way."""


SWIN = "model.pixel_level_module.encoder.model."

_PIXELS = "model.pixel_level_module.decoder."
_DECODER = "model.transformer_module."

RENAMED_OPEN: tuple[tuple[str, str], ...] = (
    (r"backbone\.patch_embed\.proj\.(\w+)", SWIN + r"embeddings.patch_embeddings.projection.\1"),
    (r"backbone\.patch_embed\.norm\.(\w+)", SWIN + r"embeddings.norm.\1"),
    (r"backbone\.(layers\.\d+\.blocks\.\d+)\.norm1\.(\w+)",
     SWIN + r"encoder.\1.layernorm_before.\2"),
    (r"backbone\.(layers\.\d+\.blocks\.\d+)\.norm2\.(\w+)",
     SWIN + r"encoder.\1.layernorm_after.\2"),
    (r"backbone\.(layers\.\d+\.blocks\.\d+)\.attn\.(relative_\w+)",
     SWIN + r"encoder.\1.attention.self.\2"),
    (r"backbone\.(layers\.\d+\.blocks\.\d+)\.attn\.proj\.(\w+)",
     SWIN + r"encoder.\1.attention.output.dense.\2"),
    (r"backbone\.(layers\.\d+\.blocks\.\d+)\.mlp\.fc1\.(\w+)",
     SWIN + r"encoder.\1.intermediate.dense.\2"),
    (r"backbone\.(layers\.\d+\.blocks\.\d+)\.mlp\.fc2\.(\w+)",
     SWIN + r"encoder.\1.output.dense.\2"),
    (r"backbone\.(layers\.\d+\.downsample\..+)", SWIN + r"encoder.\1"),
    (r"backbone\.norm(\d)\.(\w+)", r"model.pixel_level_module.encoder.hidden_states_norms.\1.\2"),
    (HEAD + r"pixel_decoder\.layer_4\.weight", _PIXELS + "fpn.stem.0.weight"),
    (HEAD + r"pixel_decoder\.layer_4\.norm\.(\w+)", _PIXELS + r"fpn.stem.1.\1"),
    *(
        row
        for ours, theirs in enumerate((3, 2, 1))  # from the coarsest map to the finest
        for row in (
            (HEAD + rf"pixel_decoder\.adapter_{theirs}\.weight",
             _PIXELS + f"fpn.layers.{ours}.proj.0.weight"),
            (HEAD + rf"pixel_decoder\.adapter_{theirs}\.norm\.(\w+)",
             _PIXELS + rf"fpn.layers.{ours}.proj.1.\1"),
            (HEAD + rf"pixel_decoder\.layer_{theirs}\.weight",
             _PIXELS + f"fpn.layers.{ours}.block.0.weight"),
            (HEAD + rf"pixel_decoder\.layer_{theirs}\.norm\.(\w+)",
             _PIXELS + rf"fpn.layers.{ours}.block.1.\1"),
        )
    ),
    (HEAD + r"pixel_decoder\.mask_features\.(\w+)", _PIXELS + r"mask_projection.\1"),
    (HEAD + r"predictor\.query_embed\.weight", _DECODER + "queries_embedder.weight"),
    (HEAD + r"predictor\.input_proj\.(\w+)", _DECODER + r"input_projection.\1"),
    (HEAD + r"predictor\.transformer\.decoder\.norm\.(\w+)", _DECODER + r"decoder.layernorm.\1"),
    (HEAD + r"predictor\.transformer\.(decoder\.layers\.\d+\.self_attn\..+)", _DECODER + r"\1"),
    (HEAD + r"predictor\.transformer\.(decoder\.layers\.\d+)\.multihead_attn\.(.+)",
     _DECODER + r"\1.encoder_attn.\2"),
    (HEAD + r"predictor\.transformer\.(decoder\.layers\.\d+)\.linear([12])\.(\w+)",
     _DECODER + r"\1.fc\2.\3"),
    (HEAD + r"predictor\.transformer\.(decoder\.layers\.\d+)\.norm1\.(\w+)",
     _DECODER + r"\1.self_attn_layer_norm.\2"),
    (HEAD + r"predictor\.transformer\.(decoder\.layers\.\d+)\.norm2\.(\w+)",
     _DECODER + r"\1.encoder_attn_layer_norm.\2"),
    (HEAD + r"predictor\.transformer\.(decoder\.layers\.\d+)\.norm3\.(\w+)",
     _DECODER + r"\1.final_layer_norm.\2"),
    (HEAD + r"predictor\.mask_embed\.layers\.(\d+)\.(\w+)", r"mask_embedder.\1.0.\2"),
)  # fmt: skip
"""The same of OVSeg's and zsseg's MaskFormer and `open_mask_former.OpenMaskFormer`."""


def fcclip_names(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """FC-CLIP's tensors under the names of `MaskDecoder`; those of its CLIP, of its preprocessing
    and of its training's criterion are left out.

    Raises:
        InputError: a tensor of the head has a name that is not FC-CLIP's.
    """
    found: dict[str, Any] = {}
    for name, value in tensors.items():
        if name == "void_embedding.weight":
            found["void"] = value
            continue
        if not name.startswith(HEAD):
            continue
        short = name.removeprefix(HEAD)
        if match := re.fullmatch(r"predictor\.class_embed\.layers\.(\d+)\.(\w+)", short):
            # A ReLU stands between two of these layers.
            found[f"class_embed.{2 * int(match[1])}.{match[2]}"] = value
            continue
        found |= _renamed(short, value, RENAMED, "FC-CLIP")
    return found


def open_mask_former_names(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """OVSeg's and zsseg's tensors under the names of `OpenMaskFormer`; those of their CLIP and of
    the training's criterion are left out.

    Raises:
        InputError: a tensor of the backbone or head has a name that is not one of theirs.
    """
    found: dict[str, Any] = {}
    for name, value in tensors.items():
        if name == "clip_adapter.non_object_embedding":
            found["void"] = value
            continue
        if not name.startswith(("backbone.", HEAD)):
            continue
        if match := re.fullmatch(rf"{HEAD}predictor\.class_embed\.layers\.(\d+)\.(\w+)", name):
            found[f"class_predictor.{2 * int(match[1])}.{match[2]}"] = value
            continue
        if match := re.fullmatch(r"backbone\.(layers\.\d+\.blocks\.\d+)\.attn\.qkv\.(\w+)", name):
            for part, one in zip(("query", "key", "value"), value.chunk(3), strict=True):
                found[f"{SWIN}encoder.{match[1]}.attention.self.{part}.{match[2]}"] = one
            continue
        found |= _renamed(name, value, RENAMED_OPEN, "OVSeg's MaskFormer")
    return found


def _renamed(
    name: str, value: Any, table: tuple[tuple[str, str], ...], whose: str
) -> dict[str, Any]:
    """A tensor under its name of the table; in three where transformers has projections apart
    (Mask2Former's cross-attention keeps them as one). Raises InputError for a name not there."""
    new = next((re.sub(old, new, name) for old, new in table if re.fullmatch(old, name)), None)
    if new is None:
        raise InputError(f"the checkpoint has a tensor {name}, which {whose} has not")
    kind = re.fullmatch(r"(.+\.(?:self_attn|encoder_attn))\.in_proj_(weight|bias)", new)
    if kind is None:
        return {new: value}
    parts = dict(zip("qkv", value.chunk(3), strict=True))
    return {f"{kind[1]}.{part}_proj.{kind[2]}": one for part, one in parts.items()}
