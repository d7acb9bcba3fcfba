"""Image towers of timm, alone or inside a model of open_clip: vision transformers, and networks
with a feature map.

    VisualEncoderConfig(model="timm/vit_large_patch16_dinov3.lvd1689m", library="timm")
"""

import threading
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config

from ovref_inference.encoders.config import VisualEncoderConfig, rounded
from ovref_inference.encoders.towers import (
    Alone,
    Layer,
    Tower,
    check_precision,
    keep_until,
    pair,
    parameters_of,
    unusable,
)
from ovref_inference.errors import ModelError
from ovref_inference.models import model_errors, pretrained
from ovref_inference.pixels import RESAMPLING, Pixels


def open_tower(config: VisualEncoderConfig, device: torch.device) -> Tower:
    """The network that `config` names.

    Raises:
        ModelError: it cannot be found or read, or has neither patches nor a feature map.
    """
    dtype = getattr(torch, config.precision)
    path = _folder_of(config.model, config.revision)
    with model_errors(f"read the configuration of {config.model}"), torch.device("meta"):
        empty: Any = timm.create_model(f"local-dir:{path}", pretrained=False)
    name = type(empty).__name__
    check_precision(config, str(empty.default_cfg.get("architecture", "")))
    patch = cell_pixels(empty)
    if patch is None:
        raise unusable(
            config.model, name, "its last features are no grid of the image",
            "expected a vision transformer, or a network with a feature map such as ConvNeXt",
        )  # fmt: skip
    if config.aspect == "kept" and is_vit(empty):
        raise one_size(config.model, name)
    size_hw = rounded(config.size_hw, patch)
    model = load_timm(path, config.model, size_hw if is_vit(empty) else None)
    with model_errors(f"use the preprocessing of {config.model}"):
        images = _pixels(model, config.model, device, dtype)
    shorten(model, config)
    forward = features(model)
    if config.features == "keys":
        forward = _keys(model, config.model)
    model.to(device=device, dtype=dtype)
    return Tower(
        model_class=f"timm {name}",
        forward=forward,
        size_hw=size_hw,
        patch_size=patch,
        prefix_tokens=getattr(model, "num_prefix_tokens", 0),
        images=images,
        parameters=parameters_of(model),
    )


def one_size(model_id: str, model_class: str) -> ModelError:
    """The error of a vision transformer of timm that is asked for images of several sizes."""
    return unusable(
        model_id, model_class, "timm brings its positions to one size, so images cannot keep their "
        "aspect", "aspect stretched works, and a ViT of open_clip or transformers",
    )  # fmt: skip


def _folder_of(model_id: str, revision: str) -> str:
    """The folder of timm's layout, from the hub if need be. Raises ModelError."""
    path, _ = pretrained(model_id, revision)
    with model_errors(f"load the visual encoder {model_id} with timm"):
        if not Path(path).is_dir():
            from huggingface_hub import snapshot_download

            path = snapshot_download(
                path, revision=revision or None, allow_patterns=["config.json", "*.safetensors"]
            )
        if not list(Path(path).glob("*.safetensors")):
            raise ModelError(f"no *.safetensors in {path}")
    return path


def load_timm(path: str, model_id: str, size_hw: tuple[int, int] | None) -> Any:
    """A network in evaluation mode on the CPU; all of its weights must be there.

    Args:
        path: folder of timm's layout.
        model_id: for messages.
        size_hw: of the images of a vision transformer, to which timm brings positions while it
            loads them; None for other networks.

    Raises:
        ModelError: it cannot be read.
    """
    sized: dict[str, Any] = {} if size_hw is None else {"img_size": size_hw}
    with model_errors(f"load the visual encoder {model_id} with timm"):
        return timm.create_model(f"local-dir:{path}", pretrained=True, **sized).eval()


def is_vit(model: Any) -> bool:
    """Whether a network is one of timm's plain vision transformers (`VisionTransformer`, `Eva`)."""
    return hasattr(model, "blocks") and hasattr(model, "num_prefix_tokens")


def cell_pixels(model: Any) -> int | None:
    """Pixels per side of a patch, or of a cell of the last feature map; None without either."""
    if is_vit(model):
        size = getattr(model.patch_embed, "patch_size", None)
        ratio = getattr(model.patch_embed, "feat_ratio", None)
        if ratio is not None:  # of patches and of the network before them, if there is one
            size = ratio()
        size = pair(size)
        return int(size[0]) if size[0] is not None and size[0] == size[1] else None
    found = getattr(model, "feature_info", None)
    return int(found[-1]["reduction"]) if isinstance(found, list) and found else None


def set_size(model: Any, size_hw: tuple[int, int]) -> None:
    """Brings the positions of a vision transformer to images of another size."""
    if is_vit(model):
        model.set_input_size(img_size=size_hw)


def shorten(model: Any, config: VisualEncoderConfig) -> None:
    """Makes the configured layer of a vision transformer the last one. Raises ModelError."""
    keep_until(model.blocks if is_vit(model) else None, config, type(model).__name__)


def features(model: Any) -> Layer:
    """Pixels (n, 3, H, W) -> (n, cells, c): patches of the last layer after its norm, or the cells
    of the last feature map."""
    if is_vit(model):
        return lambda pixels: model.forward_features(pixels)[:, model.num_prefix_tokens :]
    last = getattr(model, "output_fmt", "NCHW") == "NHWC"
    order = (0, 1, 2, 3) if last else (0, 2, 3, 1)
    return lambda pixels: model.forward_features(pixels).permute(order).flatten(1, 2)


def attend_alone(model: Any) -> None:
    """Makes each token of a vision transformer's last layer attend to itself alone."""
    model.blocks[-1] = Alone(model.blocks[-1])


def head(model: Any) -> Layer:
    """(m, c) -> (m, d): what the network does with a whole image's features, done with each vector
    as if it were the image: pooling, its norm and its projection."""
    if not is_vit(model):
        return lambda rows: model.forward_head(rows[:, :, None, None])

    def one_token(rows: torch.Tensor) -> torch.Tensor:
        pooled = model.attn_pool(rows[:, None]) if model.attn_pool is not None else rows
        return model.head(model.head_drop(model.fc_norm(pooled)))

    return one_token


def _pixels(model: Any, model_id: str, device: torch.device, dtype: torch.dtype) -> Pixels:
    settings = resolve_model_data_config(model)
    mode = settings["interpolation"]
    if mode not in RESAMPLING.values():
        raise ModelError(f"{model_id} resizes with {mode!r}, not one of {RESAMPLING.values()}")
    return Pixels(tuple(settings["mean"]), tuple(settings["std"]), mode, device, dtype)


def _keys(model: Any, model_id: str) -> Layer:
    """Pixels -> (n, cells, c): keys of the last attention layer, heads concatenated, before any
    rotation of positions."""
    attention = getattr(model.blocks[-1], "attn", None) if is_vit(model) else None
    if attention is None or not (
        getattr(attention, "k_proj", None) is not None
        or isinstance(getattr(attention, "qkv", None), torch.nn.Linear)
    ):
        raise unusable(
            model_id, type(model).__name__, "it has no layer of keys", "features 'tokens' work"
        )
    # Threads may encode at the same time: each has its own.
    caught = threading.local()
    attention.register_forward_pre_hook(lambda *call: setattr(caught, "entering", call[1][0]))
    prefix = model.num_prefix_tokens

    def keys(pixels: torch.Tensor) -> torch.Tensor:
        model.forward_features(pixels)
        entering = caught.__dict__.pop("entering")[:, prefix:]
        if attention.qkv is None:
            return attention.k_proj(entering)
        third = attention.qkv.out_features // 3
        weight, bias = attention.qkv.weight[third : 2 * third], attention.qkv.bias
        return torch.nn.functional.linear(
            entering, weight, None if bias is None else bias[third : 2 * third]
        )  # a bias apart from the layer (EVA's) is zero for keys

    return keys
