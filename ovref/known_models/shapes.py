"""What the configuration of an encoder says about it, without its weights: for `ovref check
--shapes`."""

from pathlib import Path
from typing import Any

import torch

from ovref.known_models.random_weights import open_clip_model
from ovref_inference.encoders.config import TextEncoderConfig, VisualEncoderConfig, rounded
from ovref_inference.encoders.towers import parameters_of
from ovref_inference.models import model_errors, resolve


def shape_of(config: VisualEncoderConfig | TextEncoderConfig) -> tuple[str, ...]:
    """Lines for people: class, grid or length of texts, and the size of the weights.

    Raises:
        ModelError: the configuration cannot be read, or is of a model that cannot be used.
    """
    with model_errors(f"read the configuration of {config.model}"):
        if isinstance(config, VisualEncoderConfig):
            return _visual(config)
        return _text(config)


def _visual(config: VisualEncoderConfig) -> tuple[str, ...]:
    from ovref_inference.encoders import clip_towers, timm_towers, vit_towers

    settings: Any = None
    if config.library == "transformers":
        settings, _, _ = vit_towers.settings_of(config.model, config.revision)
    if config.library == "open_clip":
        tower = _open_clip(config.model)[0].visual
        patch, prefix = clip_towers.cell_pixels(tower), 1
        if not clip_towers.is_vit(tower):
            prefix = getattr(getattr(tower, "trunk", None), "num_prefix_tokens", 0)
    elif settings is None or settings.model_type == "timm_wrapper":
        tower = _timm(config.model)
        patch, prefix = timm_towers.cell_pixels(tower), getattr(tower, "num_prefix_tokens", 0)
    else:
        patch = vit_towers.patch_of(settings, config.model)
        settings = getattr(settings, "vision_config", settings)
        prefix = vit_towers.prefix_tokens(settings)
        with torch.device("meta"):
            tower = vit_towers.class_of(settings)(settings)
    if patch is None:
        raise ValueError(f"{type(tower).__name__} has neither patches nor a feature map")
    height, width = rounded(config.size_hw, patch)
    cells = f"{height // patch} x {width // patch} cells of {patch} pixels"
    return (
        f"class     {type(tower).__name__} of {config.library}",
        f"grid      {cells} for images of {height} x {width} pixels; {prefix} class and register "
        "tokens are left out",
        _weights(tower),
    )


def _text(config: TextEncoderConfig) -> tuple[str, ...]:
    if config.library == "open_clip":
        model, settings = _open_clip(config.model)
        longest, kind = settings["text_cfg"].get("context_length", 77), type(model).__name__
    else:
        from transformers import MODEL_MAPPING

        from ovref_inference.encoders import text_towers

        found, _, _ = text_towers.settings_of(config)
        longest = found.text_config.max_position_embeddings
        with torch.device("meta"):
            cls: Any = MODEL_MAPPING[type(found)]
            model = cls(found)
        kind = type(model).__name__
    return (
        f"class     {kind} of {config.library}",
        f"texts     up to {longest} tokens",
        _weights(model),
    )


def _open_clip(model: str) -> tuple[Any, dict[str, Any]]:
    """A model without weights, and its configuration."""
    import open_clip

    path = resolve(model)
    name = f"local-dir:{path}" if Path(path).is_dir() else path
    if not name.startswith(("local-dir:", "hf-hub:")):
        name = name.partition(":")[0]
    found = open_clip.get_model_config(name)
    if found is None:
        raise ValueError(f"open_clip knows no {name}")
    with torch.device("meta"):
        return open_clip_model(found), found


def _timm(model: str) -> Any:
    import timm

    path = resolve(model)
    source = "local-dir" if Path(path).is_dir() else "hf-hub"
    with torch.device("meta"):
        return timm.create_model(f"{source}:{path}", pretrained=False)


def _weights(model: torch.nn.Module) -> str:
    count = parameters_of(model)
    return (
        f"weights   {count / 1e6:.1f} million numbers: {count * 4 / 1e9:.2f} GB in float32, "
        f"{count * 2 / 1e9:.2f} GB in bfloat16"
    )
