"""Image classifiers that say whether an image is safe to show."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ovref.ops.measures import SafetySpec
from ovref_inference.errors import ModelError
from ovref_inference.models import check_complete, model_errors, pretrained
from ovref_inference.pixels import device_of


class SafetyClassifier:
    """How sure a model is that images are not safe. Made by `load_safety`."""

    def __init__(self, model: Any, processor: Any, unsafe: list[int]) -> None:
        self._model, self._processor, self._unsafe = model, processor, unsafe

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """(n,) float32 in [0, 1] of (H, W, 3) uint8 RGB images of any sizes."""
        import torch

        if not images:
            return np.zeros(0, np.float32)
        with torch.inference_mode():
            inputs = self._processor(images=list(images), return_tensors="pt")
            logits = self._model(pixel_values=inputs["pixel_values"].to(self._model.device)).logits
            shares = logits.float().softmax(-1)[:, self._unsafe].sum(-1)
        return np.asarray(shares.cpu().numpy(), np.float32)


def load_safety(spec: SafetySpec, device: str | None = None) -> SafetyClassifier:
    """Loads the classifier and tries it on a black image.

    Args:
        device: "cpu", "cuda", ...; None takes a GPU where there is one.

    Raises:
        ModelError: it cannot be found or read, is no image classifier, or has none of the labels.
    """
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    path, options = pretrained(spec.model, spec.revision)
    with model_errors(f"load the safety classifier {spec.model}"):
        model, report = AutoModelForImageClassification.from_pretrained(
            path, use_safetensors=True, output_loading_info=True, **options
        )
        processor = AutoImageProcessor.from_pretrained(path, **options)
    check_complete(spec.model, report)
    names = {int(number): str(label) for number, label in model.config.id2label.items()}
    wanted = {label.casefold() for label in spec.unsafe}
    unsafe = [number for number, label in names.items() if label.casefold() in wanted]
    if not unsafe:
        raise ModelError(
            f"{spec.model} has the labels {', '.join(names.values())}, none of which is unsafe: "
            "name those that are by `unsafe`"
        )
    classifier = SafetyClassifier(model.to(device_of(device)).eval(), processor, unsafe)
    with model_errors(f"use the safety classifier {spec.model}"):
        classifier([np.zeros((64, 64, 3), np.uint8)])
    return classifier
