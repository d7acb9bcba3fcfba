"""Released checkpoints of other programs, converted by the names of their tensors.

Read are tensors alone, by a loader that refuses everything else in a file; written are safetensors.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
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


def read_tensors(path: Path) -> dict[str, Any]:
    """The tensors of a checkpoint by their names, on the CPU; a training's file keeps those of its
    model under `model` or `state_dict`.

    Args:
        path: a `.safetensors` file, or a `.pth` or `.bin` of torch.

    Raises:
        InputError: it is missing, damaged, or holds more than tensors: nothing is unpickled.
    """
    import pickle

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} holds more than tensors, which could run code when it is read: save its model "
            "alone, as torch.save(checkpoint['model'], ...), where you trust it"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, SafetensorError) as error:
        raise InputError(f"cannot read the checkpoint {path}: {error}") from error
    for key in ("model", "state_dict"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping):
        raise InputError(f"{path} holds no model but a {type(found).__name__}")
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def convert_fcclip(
    checkpoint: Path, output: Path, *, clip: str, trained_names: Sequence[str]
) -> dict[str, Any]:
    """Writes a released FC-CLIP, its frozen CLIP included, as a folder of `proposers.fcclip`.

    Args:
        checkpoint: as it was released.
        output: a new folder.
        clip: open_clip's name of the CLIP's architecture, such as `convnext_large_d_320`.
        trained_names: the names of the classes that it was trained on, synonyms included.

    Returns:
        `decoder` and `clip`: how many tensors each has; `queries`.

    Raises:
        InputError: the checkpoint cannot be read or is of something else; there is no such
            architecture; or the folder is there already.
    """
    import open_clip
    from safetensors.torch import save_file

    from ovref_inference.encoders import cnn_towers
    from ovref_inference.proposers import fcclip
    from ovref_inference.proposers.mask_decoder import MaskDecoder

    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} is not empty: convert into a new folder")
    names = tuple(name.strip() for name in trained_names if name.strip())
    if not names:
        raise InputError("name the classes that the model was trained on")
    settings = open_clip.get_model_config(clip)
    if settings is None:
        raise InputError(
            f"open_clip knows no architecture {clip!r}; FC-CLIP's are convnext_large_d_320 and "
            "RN50-quickgelu to RN50x64-quickgelu"
        )
    tensors = read_tensors(checkpoint)
    backbone = _without(tensors, "backbone.clip_model.")
    if not backbone or f"{HEAD}predictor.query_feat.weight" not in tensors:
        raise InputError(f"{checkpoint} is no FC-CLIP: it lacks backbone.clip_model or {HEAD}")
    model = _empty(lambda: open_clip.CLIP(**_random(settings)))
    _check(f"{checkpoint}: the CLIP is no {clip}", model.state_dict(), backbone)
    renamed = fcclip_names(tensors)
    decoder = _sizes(renamed, tuple(cnn_towers.widths(model.visual)))
    _check(f"{checkpoint}: its decoder", _empty(lambda: MaskDecoder(decoder)).state_dict(), renamed)
    (output / fcclip.CLIP).mkdir(parents=True)
    save_file(_stored(renamed), output / fcclip.WEIGHTS)
    save_file(_stored(backbone), output / fcclip.CLIP / "open_clip_model.safetensors")
    preprocessing = {
        "mean": list(open_clip.OPENAI_DATASET_MEAN), "std": list(open_clip.OPENAI_DATASET_STD),
        "interpolation": "bicubic",
    }  # fmt: skip
    (output / fcclip.CLIP / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": _random(settings), "preprocess_cfg": preprocessing}, indent=1)
    )
    fields = {
        "format": fcclip.FORMAT, "clip": fcclip.CLIP, "decoder": asdict(decoder),
        "trained_names": names, "templates": fcclip.TEMPLATES,
    }  # fmt: skip
    (output / fcclip.SETTINGS).write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
    return {"decoder": len(renamed), "clip": len(backbone), "queries": decoder.queries}


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
        for pattern, new in RENAMED:
            if re.fullmatch(pattern, short):
                found |= _split(re.sub(pattern, new, short), value)
                break
        else:
            raise InputError(f"the checkpoint has a tensor {name}, which FC-CLIP has not")
    return found


def _split(name: str, value: Any) -> dict[str, Any]:
    """Self-attention has its three projections apart, cross-attention keeps them together."""
    kind = re.fullmatch(r"(transformer\..+\.self_attn)\.in_proj_(weight|bias)", name)
    if kind is None:
        return {name: value}
    parts = dict(zip("qkv", value.chunk(3), strict=True))
    return {f"{kind[1]}.{part}_proj.{kind[2]}": one for part, one in parts.items()}


def _sizes(renamed: Mapping[str, Any], widths: tuple[int, ...]) -> Any:
    """The decoder's sizes, as its tensors have them."""
    from ovref_inference.proposers.mask_decoder import MaskDecoderConfig

    def layers(prefix: str) -> int:
        pattern = re.compile(rf"{re.escape(prefix)}\.(\d+)\.")
        return 1 + max((int(m[1]) for m in map(pattern.match, renamed) if m), default=-1)

    try:
        queries, hidden = renamed["transformer.queries_features.weight"].shape
        return MaskDecoderConfig(
            widths=widths,  # type: ignore[arg-type]
            dim=renamed["void"].shape[1],
            queries=queries,
            hidden=hidden,
            feedforward=len(renamed["transformer.decoder.layers.0.fc1.weight"]),
            encoder_feedforward=len(renamed["pixel_decoder.encoder.layers.0.fc1.weight"]),
            encoder_layers=layers("pixel_decoder.encoder.layers"),
            decoder_layers=layers("transformer.decoder.layers"),
        )
    except (KeyError, ValueError) as error:
        raise InputError(f"the checkpoint's decoder is incomplete: {error!r}") from error


def _check(what: str, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raises InputError where names or shapes differ."""
    lacking, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    shapes = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in sorted(set(wanted) & set(found))
        if found[name].shape != wanted[name].shape
    ]
    for problem, names in (("lacks", lacking), ("has besides", extra), ("has", shapes)):
        if names:
            raise InputError(f"{what}: it {problem} {', '.join(names[:3])} ({len(names)} in all)")


def _empty(make: Callable[[], Any]) -> Any:
    """A model without memory for its weights, for their names and shapes."""
    import torch

    with torch.device("meta"):
        return make()


def _random(settings: Mapping[str, Any]) -> dict[str, Any]:
    """An architecture of open_clip that fetches nothing."""
    vision = dict(settings["vision_cfg"])
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    return {**settings, "vision_cfg": vision}


def _stored(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.detach().clone().contiguous() for name, value in tensors.items()}


def _without(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
