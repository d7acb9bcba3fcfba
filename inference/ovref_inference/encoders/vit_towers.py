"""Image towers of the library transformers: vision transformers, and DINOv3's ConvNeXt.

Code that a model's repository brings along is never run: what transformers has no class for is
refused (the first releases of C-RADIO, for example; later ones load as `radio`).
"""

import inspect
import threading
from typing import Any

import torch
import transformers
from transformers import MODEL_MAPPING, AutoConfig, AutoImageProcessor

from ovref_inference.encoders.config import VisualEncoderConfig, rounded
from ovref_inference.encoders.towers import (
    Alone,
    Layer,
    Tower,
    check_precision,
    keep_until,
    parameters_of,
    unusable,
)
from ovref_inference.models import check_complete, model_errors, pretrained
from ovref_inference.pixels import Pixels

PREFIX_TOKENS = {
    "deit": 2, "ijepa": 0, "siglip_vision_model": 0, "siglip2_vision_model": 0,
    "aimv2_vision_model": 0,
}  # fmt: skip
"""Tokens before those of the patches, by type of model; others have a class token and registers."""

TEXT_MODELS = ("clip", "metaclip_2", "siglip", "siglip2", "tipsv2")
"""Types of models of images and texts whose features and texts share a space here."""

JOINT_MODELS = (*TEXT_MODELS, "aimv2")
"""Types of models of images and texts whose vision tower alone can be loaded."""

NORM_OF_CLASS_TOKEN = ("clip_vision_model", "metaclip_2_vision_model")
"""Types whose last norm is applied to the class token alone by the model."""

KNOWN = (
    "a vision transformer (DINO, DINOv2, DINOv3, C-RADIO, ViT, DeiT, MAE, I-JEPA, Pixio), a DINOv3 "
    "ConvNeXt, or a CLIP, MetaCLIP 2, SigLIP, SigLIP2 or TIPSv2 model"
)
OWN_CODE = (
    ". Code from a model's repository is never run: a model that needs it must be of a type that "
    "the installed transformers knows"
)


def open_tower(config: VisualEncoderConfig, device: torch.device) -> Tower:
    """The tower that `config` names; a folder of timm's layout goes to timm.

    Raises:
        ModelError: it cannot be found or read, has no patches, or not the features asked for.
    """
    dtype = getattr(torch, config.precision)
    settings, path, options = settings_of(config.model, config.revision)
    if settings.model_type == "timm_wrapper":
        from ovref_inference.encoders import timm_towers

        return timm_towers.open_tower(config, device)
    patch, joint = patch_of(settings, config.model), settings
    settings = getattr(settings, "vision_config", settings)
    check_precision(config, settings.model_type)
    project = config.features == "values"
    model, processor = load_vit(config.model, path, options, settings, dtype, project=project)
    with model_errors(f"use the image processor of {config.model}"):
        images = Pixels.of_transformers(processor, device, dtype)
    if settings.model_type == "radio" and (set(images.mean), set(images.std)) != ({0.0}, {1.0}):
        raise unusable(
            config.model, type(model).__name__,
            "it normalises images itself, but its image processor does, too",
            "set do_normalize to false in preprocessor_config.json",
        )  # fmt: skip
    _shorten(model, config)
    size_hw = rounded(config.size_hw, patch)
    model = model.to(device)
    if project:
        forward = _joint_values(model, joint, config.model)
    else:
        forward = _tokens(model, config.features == "keys", config.model)
    prefix = prefix_tokens(settings)
    return Tower(
        model_class=type(model).__name__,
        forward=lambda pixels: forward(pixels)[:, prefix:],
        size_hw=size_hw,
        patch_size=patch,
        prefix_tokens=prefix,
        images=images,
        parameters=parameters_of(model),
    )


def settings_of(model_id: str, revision: str) -> tuple[Any, str, dict[str, Any]]:
    """A model's configuration, and path and options for `from_pretrained`. Raises ModelError."""
    path, options = pretrained(model_id, revision)
    with model_errors(f"load the visual encoder {model_id}", OWN_CODE):
        return AutoConfig.from_pretrained(path, **options), path, options


def patch_of(settings: Any, model_id: str) -> int:
    """Pixels per side of a patch, or of a cell of a ConvNeXt's last feature map.

    Raises:
        ModelError: the model has no patches of one size, or is of no type that can be used.
    """
    kind = settings.model_type
    if kind in JOINT_MODELS:
        settings = settings.vision_config
    if settings.model_type == "dinov3_convnext":
        return int(2 ** (settings.num_stages + 1))
    patch = getattr(settings, "patch_size", None)
    if isinstance(patch, list | tuple) and len(set(patch)) == 1:
        patch = patch[0]
    if class_of(settings) is None or not isinstance(patch, int):
        raise unusable(
            model_id, f"type {kind!r}", f"it is of type {kind!r}, which has no patches of one size "
            "that transformers can find alone", f"expected {KNOWN}",
        )  # fmt: skip
    return patch


def load_vit(
    model_id: str,
    path: str,
    options: dict[str, Any],
    settings: Any,
    dtype: torch.dtype,
    *,
    project: bool = False,
) -> tuple[Any, dict[str, Any]]:
    """A vision tower in evaluation mode on the CPU, and the fields of its image processor.

    Args:
        model_id: for messages.
        path, options: as of `settings_of`.
        settings: its configuration, of a model of images and texts that of its vision tower.
        project: whether a projection into the joint space is needed.

    Raises:
        ModelError: it cannot be read.
    """
    architecture: Any = class_of(settings, project)
    options = dict(options)
    with model_errors(f"load the visual encoder {model_id}", OWN_CODE):
        processor = AutoImageProcessor.from_pretrained(path, **options).to_dict()
        # Nothing here reads the pooled output, and DINO's weights have no layer for it.
        if "add_pooling_layer" in inspect.signature(architecture).parameters:
            options["add_pooling_layer"] = False
        model, report = architecture.from_pretrained(
            path, config=settings, dtype=dtype, output_loading_info=True, **options
        )
    check_complete(model_id, report)
    return model.eval(), processor


def prefix_tokens(settings: Any) -> int:
    """How many class, distillation and register tokens come before those of the patches."""
    if settings.model_type == "radio":
        return int(settings.num_cls_tokens + settings.num_registers)
    if settings.model_type == "pixio":
        return int(settings.n_cls_tokens)
    registers = getattr(settings, "num_register_tokens", 0) or 0
    return PREFIX_TOKENS.get(settings.model_type, 1 + registers)


def class_of(settings: Any, project: bool = False) -> Any:
    """The class of a vision tower, with its projection into a joint space where that is a layer of
    its own; None if there is none."""
    name = type(settings).__name__.removesuffix("Config")  # CLIPVision, Siglip2Vision, ViT, ...
    if project and name in ("CLIPVision", "MetaClip2Vision"):
        return getattr(transformers, f"{name}ModelWithProjection")
    if type(settings) in MODEL_MAPPING:
        return MODEL_MAPPING[type(settings)]
    # MetaCLIP 2's is in no table of automatic classes.
    return getattr(transformers, f"{name}Model", None) if name.endswith("Vision") else None


def _layers(model: Any) -> Any:
    """The list of a transformer's layers; None in a model that has no single one."""
    count = getattr(model.config, "num_hidden_layers", None)
    lists = [
        module
        for module in model.modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == count
    ]
    return lists[0] if lists else None


def _shorten(model: Any, config: VisualEncoderConfig) -> None:
    """Makes the configured layer the last one."""
    layers = _layers(model)
    keep_until(layers, config, type(model).__name__)
    if layers is not None:
        model.config.num_hidden_layers = len(layers)


def _tokens(model: Any, keys: bool, model_id: str) -> Layer:
    """Pixels (n, 3, H, W) -> (n, prefix + cells, d): all tokens of the last layer after its norm,
    or the keys of its attention."""
    run = _runner(model)
    if not keys:
        is_clip = model.config.model_type in NORM_OF_CLASS_TOKEN
        norm = model.post_layernorm if is_clip else torch.nn.Identity()
        return lambda pixels: norm(run(pixels))
    # Threads may encode at the same time: each has its own.
    caught = threading.local()
    layer = _last_keys(model, model_id)
    layer.register_forward_hook(lambda *call: setattr(caught, "keys", call[2]))

    def last_keys(pixels: torch.Tensor) -> torch.Tensor:
        run(pixels)
        return caught.__dict__.pop("keys")

    return last_keys


def _joint_values(model: Any, joint: Any, model_id: str) -> Layer:
    """Pixels -> (n, prefix + cells, d): tokens in the space of the model's texts, each attending to
    itself alone in the last layer (MaskCLIP), and in SigLIP's attention pool."""
    if joint.model_type not in TEXT_MODELS:
        raise unusable(
            model_id, type(model).__name__,
            f"features 'values' are in the space of texts, which type {joint.model_type!r} lacks",
            "features 'tokens' work, and 'values' of a CLIP, MetaCLIP 2, SigLIP, SigLIP2 or TIPSv2",
        )  # fmt: skip
    vision = getattr(model, "vision_model", model)
    layers = _layers(vision)
    needs_mask = "attention_mask" in inspect.signature(layers[-1].forward).parameters
    layers[-1] = Alone(layers[-1], **({"attention_mask": None} if needs_mask else {}))
    run = _runner(vision)
    if joint.model_type == "tipsv2":
        return run
    if joint.model_type in ("clip", "metaclip_2"):
        return lambda pixels: model.visual_projection(vision.post_layernorm(run(pixels)))

    def pooled_alone(pixels: torch.Tensor) -> torch.Tensor:
        tokens_nld = run(pixels)
        pooled = vision.head(tokens_nld.flatten(0, 1)[:, None])
        return pooled.view(*tokens_nld.shape[:2], -1)

    return pooled_alone


def _runner(model: Any) -> Layer:
    """Pixels (n, 3, H, W) -> (n, prefix + cells, d): the model's last hidden state."""
    kind: str = model.config.model_type
    patch: Any = getattr(model.config, "patch_size", None)
    if kind == "siglip2_vision_model":
        return lambda pixels: model(**flexible(pixels, patch)).last_hidden_state
    options: dict[str, Any] = {}
    if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
        options["interpolate_pos_encoding"] = True
    if kind != "vit_mae":
        return lambda pixels: model(pixel_values=pixels, **options).last_hidden_state
    model.config.mask_ratio = 0.0

    def unmasked(pixels: torch.Tensor) -> torch.Tensor:
        # Even when it masks nothing, a MAE puts patches in the order of this noise.
        cells = (pixels.shape[2] // patch) * (pixels.shape[3] // patch)
        noise = torch.arange(cells, device=pixels.device).expand(len(pixels), -1)
        return model(pixel_values=pixels, noise=noise, **options).last_hidden_state

    return unmasked


def flexible(pixels: torch.Tensor, patch: int) -> dict[str, torch.Tensor]:
    """Pixels as SigLIP2 of any aspect ratio (NaFlex) takes them: patches, rows of pixels in each,
    colours last; no padding."""
    count, _, height, width = pixels.shape
    rows, columns = height // patch, width // patch
    patches = pixels.unflatten(3, (columns, patch)).unflatten(2, (rows, patch))
    patches = patches.permute(0, 2, 4, 3, 5, 1).reshape(count, rows * columns, -1)
    shapes = torch.tensor([[rows, columns]], device=pixels.device).expand(count, -1)
    mask = torch.ones(count, rows * columns, dtype=torch.int64, device=pixels.device)
    return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def _last_keys(model: Any, model_id: str) -> torch.nn.Linear:
    """The linear layer that makes the keys of the last attention layer."""
    layers = _layers(model)
    found = [
        module
        for name, module in (model if layers is None else layers[-1]).named_modules()
        if name.rpartition(".")[2] in ("k_proj", "key") and isinstance(module, torch.nn.Linear)
    ]
    if not found:
        raise unusable(
            model_id, type(model).__name__, "it has no layer of keys", "features 'tokens' work"
        )
    return found[-1]
