"""Released checkpoints of other programs, converted by the names of their tensors.

Read are tensors alone, by a loader that refuses everything else in a file; written are safetensors.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ovref.errors import InputError
from ovref.exchange.checkpoint_names import HEAD, SWIN, fcclip_names, open_mask_former_names


def read_tensors(path: Path) -> dict[str, Any]:
    """The tensors of a checkpoint by their names, on the CPU; a training's file keeps those of its
    model under `model` or `state_dict`.

    Args:
        path: a `.safetensors` file, or a `.pth` or `.bin` of torch.

    Raises:
        InputError: it is missing, damaged, or holds more than tensors: nothing is unpickled.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except torch.serialization.pickle.UnpicklingError as error:
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

    names = _ready(output, trained_names)
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


def convert_open_mask_former(
    checkpoint: Path, output: Path, *, trained_names: Sequence[str]
) -> dict[str, Any]:
    """Writes the MaskFormer of a released OVSeg or zsseg with a Swin backbone as a folder of
    `proposers.open_mask_former`; its CLIP is left out, for a collection brings its own.

    Args:
        checkpoint, output: as of `convert_fcclip`.
        trained_names: the classes that it was trained on, as of `convert_fcclip`.

    Returns:
        `tensors` and `queries`.

    Raises:
        InputError: as of `convert_fcclip`; or the backbone is another one.
    """
    from safetensors.torch import load_file, save_file

    from ovref_inference.proposers.fcclip import TEMPLATES
    from ovref_inference.proposers.open_mask_former import OpenMaskFormer, processing

    names = _ready(output, trained_names)
    tensors = read_tensors(checkpoint)
    if "backbone.patch_embed.proj.weight" not in tensors:
        raise InputError(
            f"{checkpoint} has no Swin backbone: of OVSeg and zsseg only models with one are read"
        )
    renamed = open_mask_former_names(tensors)
    model = OpenMaskFormer(_open_settings(renamed, names, TEMPLATES))
    images = processing(
        640, 2560, [value / 255 for value in (123.675, 116.28, 103.53)],
        [value / 255 for value in (58.395, 57.12, 57.375)],
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        # Names in files are not those in memory: the library keeps the first for old files.
        model.save_pretrained(scratch)
        images.save_pretrained(scratch)
        weights = Path(scratch, "model.safetensors")
        wanted = load_file(weights)
        # Ours: weights of a loss that is not used, a norm that no feature map passes, and no texts.
        ours = ("criterion.", f"{SWIN}layernorm.", "trained_texts")
        stored = renamed | {name: one for name, one in wanted.items() if name.startswith(ours)}
        _check(str(checkpoint), wanted, stored)
        save_file(_stored(stored), weights, metadata={"format": "pt"})
        shutil.copytree(scratch, output, dirs_exist_ok=True)
    decoder: Any = model.config.decoder_config
    return {"tensors": len(renamed), "queries": decoder.num_queries}


def _open_settings(
    renamed: Mapping[str, Any], names: tuple[str, ...], templates: tuple[str, ...]
) -> Any:
    """transformers' configuration of a MaskFormer whose sizes are those of its tensors."""
    from ovref_inference.proposers.open_mask_former import OpenMaskFormerConfig, settings_of

    layers = partial(_layers, renamed)
    try:
        swin, decoder = f"{SWIN}encoder.layers", "model.transformer_module.decoder.layers"
        stages = range(layers(swin))
        tables = [
            renamed[f"{swin}.{i}.blocks.0.attention.self.relative_position_bias_table"]
            for i in stages
        ]
        patch = renamed[f"{SWIN}embeddings.patch_embeddings.projection.weight"]
        queries, hidden = renamed["model.transformer_module.queries_embedder.weight"].shape
        first = renamed[f"{swin}.0.blocks.0.intermediate.dense.weight"]
        heads = [name for name in renamed if re.fullmatch(r"class_predictor\.\d+\.weight", name)]
        heads.sort(key=lambda name: int(name.split(".")[1]))
        widths = [renamed[heads[0]].shape[1], *(len(renamed[name]) for name in heads)]
        pixel = "model.pixel_level_module.decoder"
        sizes = OpenMaskFormerConfig(
            embed_dim=len(patch),
            depths=tuple(layers(f"{swin}.{i}.blocks") for i in stages),
            swin_heads=tuple(table.shape[1] for table in tables),
            window=(round(len(tables[0]) ** 0.5) + 1) // 2,
            patch=patch.shape[-1],
            mlp_ratio=len(first) / first.shape[1],
            drop_path=0.0,
            features=len(renamed[f"{pixel}.fpn.stem.0.weight"]),
            mask_features=len(renamed[f"{pixel}.mask_projection.weight"]),
            queries=queries,
            hidden=hidden,
            decoder_layers=layers(decoder),
            feedforward=len(renamed[f"{decoder}.0.fc1.weight"]),
            dropout=0.0,
        )
    except (KeyError, IndexError, ValueError) as error:
        raise InputError(f"the checkpoint's MaskFormer is incomplete: {error!r}") from error
    return settings_of(sizes, names, widths[-1], templates=templates, texts=0, widths=widths)


def _ready(output: Path, trained_names: Sequence[str]) -> tuple[str, ...]:
    """The names, without blanks; raises InputError where a conversion cannot begin."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} is not empty: convert into a new folder")
    names = tuple(name.strip() for name in trained_names if name.strip())
    if not names:
        raise InputError("name the classes that the model was trained on")
    return names


def _sizes(renamed: Mapping[str, Any], widths: tuple[int, ...]) -> Any:
    """The decoder's sizes, as its tensors have them."""
    from ovref_inference.proposers.mask_decoder import MaskDecoderConfig

    try:
        queries, hidden = renamed["transformer.queries_features.weight"].shape
        return MaskDecoderConfig(
            widths=widths,  # type: ignore[arg-type]
            dim=renamed["void"].shape[1],
            queries=queries,
            hidden=hidden,
            feedforward=len(renamed["transformer.decoder.layers.0.fc1.weight"]),
            encoder_feedforward=len(renamed["pixel_decoder.encoder.layers.0.fc1.weight"]),
            encoder_layers=_layers(renamed, "pixel_decoder.encoder.layers"),
            decoder_layers=_layers(renamed, "transformer.decoder.layers"),
        )
    except (KeyError, ValueError) as error:
        raise InputError(f"the checkpoint's decoder is incomplete: {error!r}") from error


def _layers(names: Iterable[str], prefix: str) -> int:
    """How many numbered parts come after a prefix."""
    pattern = re.compile(rf"{re.escape(prefix)}\.(\d+)\.")
    return 1 + max((int(m[1]) for m in map(pattern.match, names) if m), default=-1)


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
