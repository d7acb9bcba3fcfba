"""A trained head in an evaluation: the one row of `method=clip_rc`."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ovref.config import dump
from ovref.errors import InputError
from ovref.evaluation.apply_protocol import segment_with_protocol
from ovref.evaluation.cached import CachedModels
from ovref.evaluation.methods import prediction_of, query_names, seen_of_names
from ovref.evaluation.named_sets.opening import Example, LabelledSet
from ovref.evaluation.predictions import Prediction
from ovref.evaluation.spec import EvaluateSpec
from ovref_inference.encoders.config import TextEncoderConfig
from ovref_inference.pixels import device_of
from ovref_inference.segmenters.clip_rc import ClipRcHead, ClipRcSegmenter, load_clip_rc


def head_identity(head: ClipRcHead) -> dict[str, Any]:
    """The identity of the trained head that is evaluated."""
    return {
        "weights": head.weights_sha256,
        "network": dump(head.network),
        "seen": list(head.seen),
        "templates": list(head.templates),
    }


class TrainedMethod:
    """CLIP-RC, in place of `methods.Methods`."""

    def __init__(self, spec: EvaluateSpec, data: LabelledSet, models: CachedModels) -> None:
        """The head is read; models are loaded at the first image.

        Raises:
            ModelError: as `read_head`.
            InputError: it was trained on a class that counts as unseen.
        """
        self._spec, self._data, self._models = spec, data, models
        self._protocol = spec.chosen_protocol()
        self._read = models.head(spec.clip_rc.weights)
        trained = {name.strip().casefold() for name in self._read[0].seen}
        unseen = data.seen is not None and [
            name for name, seen in zip(data.class_names, data.seen, strict=True)
            if not seen and name.strip().casefold() in trained
        ]  # fmt: skip
        if unseen and self._read[0].setting != "supervised":
            raise InputError(
                f"{spec.clip_rc.weights} was trained on masks of {', '.join(unseen)}, which count "
                f"as unseen in {data.name}: evaluate with the split that it was trained with"
            )
        self.names, self._class_of = query_names(data, spec)
        self._seen = seen_of_names(data, self._class_of)
        self._segmenter: ClipRcSegmenter | None = None

    @property
    def segmenter(self) -> ClipRcSegmenter:
        """Loaded once."""
        if self._segmenter is None:
            spec, head = self._spec, self._read[0]
            config = spec.clip_rc
            if self._protocol is not None and self._protocol.seen_penalty:
                config = replace(config, seen_penalty=0.0)  # the protocol has it
            clip = TextEncoderConfig(model=head.network.model, revision=head.network.revision)
            collection = self._models.collection(spec.collection) if spec.collection else None
            try:
                self._segmenter = load_clip_rc(
                    config, self._models.text(clip), collection, device_of(self._models.device),
                    head=self._read,
                )  # fmt: skip
            except ValueError as error:
                raise InputError(str(error)) from error
        return self._segmenter

    def encode_batch(self, examples: Sequence[Example]) -> None:
        """Nothing is encoded before it is asked for: one row asks for each image once."""

    def predict(self, row: Any, image_hwc: np.ndarray, segments: bool = False) -> Prediction:
        """As `Methods.predict`; the segments are connected pixels of a class."""
        found = segment_with_protocol(
            self.segmenter, image_hwc, self.names, self._protocol, self._seen
        )
        return prediction_of(found, self._class_of, self._data, segments)
