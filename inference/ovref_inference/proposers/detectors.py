"""Detectors of named things by the type of their model: GroundingDINO, MM-Grounding-DINO, LLMDet,
OWLv2."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    GroundingDinoForObjectDetection,
    MMGroundingDinoForObjectDetection,
    Owlv2ForObjectDetection,
)

from ovref_inference.errors import ModelError
from ovref_inference.models import check_complete, model_errors, pretrained
from ovref_inference.pixels import device_of
from ovref_inference.proposers.config import GroundingDinoConfig
from ovref_inference.proposers.grounding import DetectedBoxes, GroundingDino
from ovref_inference.proposers.owl import Owl

DETECTORS: dict[str, tuple[Any, Any]] = {
    "grounding-dino": (GroundingDinoForObjectDetection, GroundingDino),
    "mm-grounding-dino": (MMGroundingDinoForObjectDetection, GroundingDino),
    "owlv2": (Owlv2ForObjectDetection, Owl),
}
"""Network and detector by type of model. LLMDet is published as an MM-Grounding-DINO."""


class Detector(Protocol):
    """Whatever finds nouns in images: `GroundingDino`, `Owl`."""

    def detect(
        self, images: Sequence[np.ndarray], nouns: Sequence[Sequence[str]]
    ) -> list[DetectedBoxes]: ...


def load_detector(
    config: GroundingDinoConfig, *, device: str | None = None, batch_size: int = 8
) -> Detector:
    """Loads the detector that `config` names, with a loader that accepts only tensors, and tries it
    on one image.

    Args:
        device: "cpu", "cuda", ...; None takes a GPU where there is one.
        batch_size: images per forward pass at most.

    Raises:
        ModelError: it cannot be found or read, or is of another type.
    """
    path, options = pretrained(config.model, config.revision)
    with model_errors(f"load the detector {config.model}"):
        settings = AutoConfig.from_pretrained(path, **options)
        if settings.model_type not in DETECTORS:
            raise ModelError(
                f"{config.model} (type {settings.model_type!r}) cannot be used as a detector: it "
                "finds no boxes of nouns that are known here; expected a GroundingDINO, "
                "MM-Grounding-DINO, LLMDet or OWLv2 of transformers"
            )
        network, kind = DETECTORS[settings.model_type]
        model, report = network.from_pretrained(
            path, config=settings, dtype=torch.float32, output_loading_info=True, **options
        )
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        images = AutoImageProcessor.from_pretrained(path, **options)
    check_complete(config.model, report)
    if any("class_embed" in name for name in report["unexpected_keys"]):
        raise ModelError(
            f"{config.model} has weights of a class head that {type(model).__name__} lacks, so its "
            "scores would be wrong: it is LLMDet's first export (llmdet_swin_*_hf), for a changed "
            "GroundingDINO; use the one for transformers (iSEE-Laboratory/llmdet_tiny, _base, "
            "_large)"
        )
    model = model.to(device_of(device)).eval()
    detector: Detector = kind(model, tokenizer, images, config, batch_size=batch_size)
    with model_errors(f"use the detector {config.model}"):
        detector.detect([np.zeros((64, 64, 3), dtype=np.uint8)], [["photo"]])
    return detector
