"""Detectors of named things by the type of their model: GroundingDINO, MM-Grounding-DINO, LLMDet,
OWLv2."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from transformers import AutoConfig

from ovref_inference.errors import ModelError
from ovref_inference.models import model_errors, pretrained
from ovref_inference.proposers import grounding, owl
from ovref_inference.proposers.config import GroundingDinoConfig
from ovref_inference.proposers.grounding import DetectedBoxes


class Detector(Protocol):
    """Whatever finds nouns in images: `grounding.GroundingDino`, `owl.Owl`."""

    def detect(
        self, images: Sequence[np.ndarray], nouns: Sequence[Sequence[str]]
    ) -> list[DetectedBoxes]: ...


def load_detector(
    config: GroundingDinoConfig, *, device: str | None = None, batch_size: int = 8
) -> Detector:
    """Loads the detector that `config` names and tries it on one image.

    Args:
        device: "cpu", "cuda", ...; None takes a GPU where there is one.
        batch_size: images per forward pass at most.

    Raises:
        ModelError: it cannot be found or read, or is of another type.
    """
    path, options = pretrained(config.model, config.revision)
    with model_errors(f"load the detector {config.model}"):
        kind = AutoConfig.from_pretrained(path, **options).model_type
    if kind == "owlv2":
        return owl.load_owl(config, device=device, batch_size=batch_size)
    if kind not in grounding.CLASSES:
        raise ModelError(
            f"{config.model} (type {kind!r}) cannot be used as a detector: it finds no boxes of "
            "nouns that are known here; expected a GroundingDINO, MM-Grounding-DINO, LLMDet or "
            "OWLv2 of transformers"
        )
    return grounding.load_grounding_dino(config, device=device, batch_size=batch_size)
