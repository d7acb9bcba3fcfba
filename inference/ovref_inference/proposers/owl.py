"""OWLv2 (Minderer et al., NeurIPS 2023): images and nouns -> boxes, each with its noun and score.

Every noun is a text of its own, so any number of nouns fits; an image is padded to a square at its
right or bottom. A box belongs to the noun it scores highest for.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from ovref_inference.images import check_image
from ovref_inference.pixels import BatchSize, batched
from ovref_inference.proposers.config import GroundingDinoConfig
from ovref_inference.proposers.grounding import (
    NOUNS_REMEMBERED,
    DetectedBoxes,
    detections,
    kept_boxes,
)


class Owl:
    """Finds nouns in images. Made by `load_detector`."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        image_processor: Any,
        config: GroundingDinoConfig,
        *,
        batch_size: int = 8,
    ) -> None:
        """See `GroundingDino`."""
        self._model, self._tokenizer, self._images = model, tokenizer, image_processor
        self._config, self._batch_size = config, BatchSize(batch_size)
        settings: Any = model.config
        self._longest = settings.text_config.max_position_embeddings
        self._ids = lru_cache(NOUNS_REMEMBERED)(self._tokenised)

    @torch.inference_mode()
    def detect(
        self, images: Sequence[np.ndarray], nouns: Sequence[Sequence[str]]
    ) -> list[DetectedBoxes]:
        """Boxes of the nouns of every image, as of `GroundingDino.detect`; a noun whose text is too
        long loses its end."""
        for image_hwc in images:
            check_image(image_hwc)
        pairs = zip(images, nouns, strict=True)
        asked = [
            (index, image_hwc, list(dict.fromkeys(texts)))
            for index, (image_hwc, texts) in enumerate(pairs)
            if len(texts)
        ]
        parts: list[list[tuple[torch.Tensor, ...]]] = [[] for _ in images]
        for batch in batched(asked, self._batch_size, self._detect):
            for index, (boxes, best, scores) in batch:
                texts = list(nouns[index])
                first = [texts.index(text) for text in dict.fromkeys(texts)]
                parts[index].append((boxes, torch.tensor(first)[best], scores))
        return [detections(part) for part in parts]

    def _tokenised(self, noun: str) -> tuple[torch.Tensor, torch.Tensor]:
        found = self._tokenizer(
            self._config.template.format(noun), padding="max_length", max_length=self._longest,
            truncation=True, return_tensors="pt",
        )  # fmt: skip
        return found.input_ids, found.attention_mask

    def _detect(
        self, asked: Sequence[tuple[int, np.ndarray, list[str]]]
    ) -> list[tuple[int, tuple[torch.Tensor, ...]]]:
        device = self._model.device
        most = max(len(texts) for _, _, texts in asked)
        # An image with fewer nouns is asked for its last one again; those answers are not read.
        tokens = [self._ids(text) for _, _, texts in asked
                  for text in (texts + texts[-1:] * (most - len(texts)))]  # fmt: skip
        ids, mask = (torch.cat(group).to(device) for group in zip(*tokens, strict=True))
        pixels = self._images(
            images=[np.ascontiguousarray(image_hwc) for _, image_hwc, _ in asked],
            input_data_format="channels_last",
            return_tensors="pt",
        )
        outputs = self._model(
            input_ids=ids, attention_mask=mask, pixel_values=pixels["pixel_values"].to(device)
        )
        probabilities_bqn = outputs.logits.sigmoid().float().cpu()
        boxes_bq4 = outputs.pred_boxes.float().cpu()
        answers: list[tuple[int, tuple[torch.Tensor, ...]]] = []
        for row, (index, image_hwc, texts) in enumerate(asked):
            scores_q, best_q = probabilities_bqn[row, :, : len(texts)].max(1)
            kept = scores_q > self._config.box_threshold
            size_hw = (image_hwc.shape[0], image_hwc.shape[1])
            side = max(size_hw)
            answers.append((index, kept_boxes(
                boxes_bq4[row][kept], best_q[kept], scores_q[kept], (side, side), size_hw,
                self._config.nms_iou,
            )))  # fmt: skip
        return answers
