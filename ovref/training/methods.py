"""Which module trains what."""

from typing import Any

from ovref.training import train_clip_rc, train_masks
from ovref.training.mask_settings import MaskTraining
from ovref.training.train_clip_rc import ClipRcTraining

Training = ClipRcTraining | MaskTraining
"""Settings of a training."""


def module_of(spec: Training) -> Any:
    """The module with `run`, `run_as_worker` and `check` for these settings."""
    return train_clip_rc if isinstance(spec, ClipRcTraining) else train_masks
