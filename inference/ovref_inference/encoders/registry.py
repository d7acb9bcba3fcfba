"""Backbones of your own: a name, and a callable that makes the encoder.

    register_backbone("mine", lambda config, device: MyEncoder(device))
    VisualEncoderConfig(model="own:mine")                   # in a build, and in its manifest

An encoder has `encode(images)`, from (H, W, 3) uint8 images of any sizes to (n, h, w, d) float32.
An installed package may register a backbone for every process, workers of a cluster included, with
an entry point in the group `ovref.backbones`. A collection only names its backbone: whoever opens
it decides what the name means, and only installed packages are imported.
"""

import importlib.metadata
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from ovref_inference.encoders.config import VisualEncoderConfig
from ovref_inference.encoders.pooling import pool_each
from ovref_inference.errors import ModelError

OWN = "own:"
"""Prefix of the model id of a registered backbone."""
GROUP = "ovref.backbones"


class Backbone(Protocol):
    """An encoder of images of any sizes to (n, h, w, d) float32, finite."""

    def encode(self, images: Sequence[np.ndarray]) -> np.ndarray: ...


Load = Callable[[VisualEncoderConfig, str | None], Backbone]
"""(settings, name of a device or None for the best one) -> the encoder."""

_LOADERS: dict[str, Load] = {}


def register_backbone(name: str, load: Load) -> None:
    """Makes `own:<name>` a model id in this process; a later registration replaces an earlier one.

    Raises:
        ValueError: the name is empty.
    """
    if not name.strip():
        raise ValueError("a backbone needs a name, found an empty text")
    _LOADERS[name] = load


def load_own(config: VisualEncoderConfig, device: str | None) -> "OwnEncoder":
    """The encoder of a model id `own:<name>`, tried with one black image.

    Raises:
        ModelError: the name is not registered, or its encoder does not return finite (1, h, w, d)
            features.
    """
    name = config.model.removeprefix(OWN)
    load = _LOADERS.get(name)
    if load is None:
        installed = importlib.metadata.entry_points(group=GROUP, name=name)
        load = next(iter(installed)).load() if installed else None
    if load is None:
        raise ModelError(
            f"{config.model} is a custom backbone, and none of that name is registered "
            f"here: call ovref_inference.register_backbone({name!r}, load) first, or install the "
            f"package that has the entry point {name!r} of the group {GROUP}"
        )
    return OwnEncoder(load(config, device), config)


class OwnEncoder:
    """Adapts a backbone to what segmenters and builds need: dense features, and features pooled
    under each mask."""

    def __init__(self, backbone: Backbone, config: VisualEncoderConfig | None = None) -> None:
        self.backbone = backbone
        self.size_hw = config.size_hw if config else (64, 64)
        blank = np.zeros((*self.size_hw, 3), dtype=np.uint8)
        features = np.asarray(backbone.encode([blank]))
        if features.ndim != 4 or len(features) != 1 or not np.isfinite(features).all():
            raise ModelError(
                f"{type(backbone).__name__}.encode must give finite features (n, h, w, d), found "
                f"{features.shape} of one black image"
            )
        self.dim: int = features.shape[3]
        self.grid_hw: tuple[int, int] = (features.shape[1], features.shape[2])

    def encode(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """(n, h, w, d) float32."""
        if not len(images):
            return np.zeros((0, *self.grid_hw, self.dim), dtype=np.float32)
        return np.asarray(self.backbone.encode(images), dtype=np.float32)

    def encode_regions(
        self,
        images: Sequence[np.ndarray],
        masks: Sequence[np.ndarray],
        heatmaps: Sequence[np.ndarray] | None = None,
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """See `VisualEncoder.encode_regions`."""
        return [pool_each(*pair) for pair in zip(self.encode(images), masks, strict=True)]


def as_encoder(backbone: Any) -> Any:
    """An encoder unchanged, or a backbone that only has `encode` wrapped as an encoder."""
    return backbone if hasattr(backbone, "encode_regions") else OwnEncoder(backbone)
