"""Vision transformers of the library transformers: loading, and access to all their tokens."""

import inspect
import threading
from collections.abc import Callable
from typing import Any

import torch
from transformers import MODEL_MAPPING, AutoConfig, AutoImageProcessor

from ovref_inference.errors import ModelError
from ovref_inference.models import check_complete, model_errors, pretrained

PREFIX_TOKENS = {"deit": 2, "ijepa": 0, "siglip_vision_model": 0}
"""Number of tokens before the patch tokens, by model type; other types have a class token and
registers."""

JOINT_MODELS = ("clip", "siglip")
"""Types of image-text models whose vision tower can be loaded alone."""


def load_vit(model_id: str, revision: str, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """A vision transformer in evaluation mode on the CPU, and the fields of its image processor.

    Args:
        model_id: `miniature:<name>`, a folder or a hub id.
        revision: of a hub repository; empty for the newest.

    Raises:
        ModelError: it cannot be found or read, or is not a model whose tokens are patches.
    """
    path, options = pretrained(model_id, revision)
    with model_errors(f"load the visual encoder {model_id}"):
        settings = AutoConfig.from_pretrained(path, **options)
        if settings.model_type in JOINT_MODELS:
            settings = settings.vision_config
        patch = getattr(settings, "patch_size", None)
        if type(settings) not in MODEL_MAPPING or not isinstance(patch, int):
            raise ModelError(
                f"{model_id} is a model of type {settings.model_type!r}, which has no patches of "
                "one size; expected a vision transformer (DINO, DINOv2, DINOv3, ViT, DeiT, MAE, "
                "I-JEPA) or a CLIP or SigLIP model"
            )
        architecture: Any = MODEL_MAPPING[type(settings)]
        # Nothing here reads the pooled output, and DINO's weights have no layer for it.
        if "add_pooling_layer" in inspect.signature(architecture).parameters:
            options["add_pooling_layer"] = False
        model, report = architecture.from_pretrained(
            path, config=settings, dtype=dtype, output_loading_info=True, **options
        )
        options.pop("add_pooling_layer", None)
        processor = AutoImageProcessor.from_pretrained(path, **options).to_dict()
    check_complete(model_id, report)
    return model.eval(), processor


def prefix_tokens(model: Any) -> int:
    """Number of class, distillation and register tokens before the patch tokens."""
    registers = getattr(model.config, "num_register_tokens", 0) or 0
    return PREFIX_TOKENS.get(model.config.model_type, 1 + registers)


def all_tokens(model: Any, cells: int, kind: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Pixels (n, 3, H, W) -> (n, prefix + cells, d): a model's tokens.

    Args:
        model: from `load_vit`, on its device.
        cells: patches of an image.
        kind: `tokens`: of the last layer, after its norm; `keys`: of the last attention layer.

    Raises:
        ModelError: the model has no layer of keys.
    """
    options: dict[str, Any] = {}
    if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
        options["interpolate_pos_encoding"] = True
    masked = model.config.model_type == "vit_mae"
    if masked:
        model.config.mask_ratio = 0.0
    # CLIP applies its last norm only to the class token.
    is_clip = model.config.model_type == "clip_vision_model"
    norm = model.post_layernorm if is_clip else torch.nn.Identity()
    keys = _last_keys(model) if kind == "keys" else None
    # Thread-local, because several threads may encode at the same time.
    caught = threading.local()
    if keys:
        keys.register_forward_hook(lambda *call: setattr(caught, "keys", call[2]))

    def tokens(pixels: torch.Tensor) -> torch.Tensor:
        # Even without masking, a MAE sorts patches by this noise.
        order = {"noise": torch.arange(cells, device=pixels.device).expand(len(pixels), -1)}
        found = model(pixel_values=pixels, **options, **(order if masked else {}))
        return caught.__dict__.pop("keys") if keys else norm(found.last_hidden_state)

    return tokens


def _last_keys(model: Any) -> torch.nn.Linear:
    """The linear layer that makes the keys of the last attention layer."""
    layers = [
        module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in ("k_proj", "key") and isinstance(module, torch.nn.Linear)
    ]
    if not layers:
        raise ModelError(f"{type(model).__name__} has no layer of keys")
    return layers[-1]
