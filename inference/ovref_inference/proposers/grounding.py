"""GroundingDINO (Liu et al., ECCV 2024), MM-Grounding-DINO and LLMDet: images and nouns -> boxes,
each with its noun and score.

All nouns of an image form one prompt, "noun. noun. ...", and images with different prompts run in
one batch. A box's score for a noun is the mean probability of that noun's tokens, and the box
belongs to the noun with the highest score. This separates nouns of several tokens and nouns that
contain one another ("light", "traffic light"), where joining the words above a threshold gives
"traffic light light".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torchvision.ops import batched_nms, box_convert, clip_boxes_to_image

from ovref_inference.errors import ModelError
from ovref_inference.images import check_image
from ovref_inference.pixels import BatchSize, batched
from ovref_inference.proposers.config import GroundingDinoConfig

NOUNS_REMEMBERED = 65_536


@dataclass(frozen=True, kw_only=True)
class DetectedBoxes:
    """The boxes found in one image, by descending score."""

    boxes_xyxy: np.ndarray
    """(n, 4) float32 in pixels of the image, within it, of positive width and height."""
    nouns: np.ndarray
    """(n,) int64: index of the noun in the request."""
    scores: np.ndarray
    """(n,) float32 in [0, 1]: mean probability of the noun's tokens."""


@dataclass(frozen=True)
class _Prompt:
    """Some of an image's nouns, tokenised."""

    ids: list[int]
    spans: list[tuple[int, int]]
    """Tokens [start, end) of each noun."""
    nouns: list[int]
    """Indices of the nouns in the request."""


class GroundingDino:
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
        """
        Args:
            model: of transformers, in evaluation mode, on its device.
            tokenizer, image_processor: of transformers, as the model was trained with.
            config: thresholds.
            batch_size: maximum number of images per forward pass.

        Raises:
            ModelError: the tokenizer and the model disagree on the ids of the tokens that end a
                phrase.
        """
        self._model, self._tokenizer, self._images = model, tokenizer, image_processor
        self._config, self._batch_size = config, BatchSize(batch_size)
        self._begin, self._end = tokenizer.cls_token_id, tokenizer.sep_token_id
        self._stop = tokenizer.convert_tokens_to_ids(".")
        # These tokens separate phrases in the model's attention mask; their ids are built into the
        # model.
        known = set(model.model.special_tokens.tolist())
        if not {self._begin, self._end, self._stop} <= known:
            raise ModelError(
                f"GroundingDINO ends phrases at the ids {sorted(known)}, but its tokenizer has "
                f"{self._begin}, {self._end} and {self._stop} for [CLS], [SEP] and '.'"
            )
        # Cached, because a proposer asks for all its classes in every image.
        self._ids = lru_cache(NOUNS_REMEMBERED)(self._tokenised)
        settings: Any = model.config
        self._longest = min(settings.max_text_len, settings.text_config.max_position_embeddings)

    @torch.inference_mode()
    def detect(
        self, images: Sequence[np.ndarray], nouns: Sequence[Sequence[str]]
    ) -> list[DetectedBoxes]:
        """Boxes of the nouns of every image.

        A repeated noun is found under its first index. Nouns that the tokenizer does not know at
        all, or that are longer than a prompt, are never found. Nouns that do not fit into one
        prompt go into several; a box then belongs to the best noun of its own prompt.

        Args:
            images: (H, W, 3) uint8 RGB, of any sizes.
            nouns: of every image, any number.
        """
        for image_hwc in images:
            check_image(image_hwc)
        asked = [
            (index, prompt) for index, texts in enumerate(nouns) for prompt in self._prompts(texts)
        ]
        found: list[list[tuple[torch.Tensor, ...]]] = [[] for _ in images]
        for batch in batched(asked, self._batch_size, lambda part: self._detect(images, part)):
            for index, boxes in batch:
                found[index].append(boxes)
        return [detections(parts) for parts in found]

    def _prompts(self, texts: Sequence[str]) -> list[_Prompt]:
        """The nouns as prompts within the model's maximum length."""
        prompts: list[_Prompt] = []
        for number, text in enumerate(texts):
            ids = self._ids(text)
            unknown = all(token == self._tokenizer.unk_token_id for token in ids)
            # With [CLS], the stop and [SEP].
            if unknown or len(ids) + 3 > self._longest or text in texts[:number]:
                continue
            if not prompts or len(prompts[-1].ids) + len(ids) + 2 > self._longest:
                prompts.append(_Prompt([self._begin], [], []))
            prompt = prompts[-1]
            prompt.spans.append((len(prompt.ids), len(prompt.ids) + len(ids)))
            prompt.nouns.append(number)
            prompt.ids.extend([*ids, self._stop])
        for prompt in prompts:
            prompt.ids.append(self._end)
        return prompts

    def _tokenised(self, text: str) -> list[int]:
        # A token that ends a phrase would split the noun.
        words = text.replace(".", " ").replace("?", " ")
        return self._tokenizer(words, add_special_tokens=False).input_ids

    def _detect(
        self, images: Sequence[np.ndarray], asked: Sequence[tuple[int, _Prompt]]
    ) -> list[tuple[int, tuple[torch.Tensor, ...]]]:
        device = self._model.device
        length = max(len(prompt.ids) for _, prompt in asked)
        ids_bl = torch.zeros(len(asked), length, dtype=torch.int64)
        mask_bl = torch.zeros_like(ids_bl)
        for row, (_, prompt) in enumerate(asked):
            ids_bl[row, : len(prompt.ids)] = torch.tensor(prompt.ids)
            mask_bl[row, : len(prompt.ids)] = 1
        # Images of different sizes are padded; the pixel mask marks where they end.
        # The channel axis is explicit, because for an image of three rows it would be guessed
        # wrongly.
        pixels = self._images(
            images=[np.ascontiguousarray(images[index]) for index, _ in asked],
            input_data_format="channels_last",
            return_tensors="pt",
        )
        outputs = self._model(
            pixel_values=pixels["pixel_values"].to(device),
            pixel_mask=pixels["pixel_mask"].to(device),
            input_ids=ids_bl.to(device),
            attention_mask=mask_bl.to(device),
        )
        probabilities_bql = outputs.logits.sigmoid().float().cpu()
        boxes_bq4 = outputs.pred_boxes.float().cpu()
        return [
            (index, self._select(probabilities_ql, boxes_q4, prompt, images[index].shape[:2]))
            for (index, prompt), probabilities_ql, boxes_q4 in zip(
                asked, probabilities_bql, boxes_bq4, strict=True
            )
        ]

    def _select(
        self,
        probabilities_ql: torch.Tensor,
        boxes_q4: torch.Tensor,
        prompt: _Prompt,
        size_hw: tuple[int, int],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Boxes above the thresholds, without duplicates: boxes (n, 4), nouns and scores (n,)."""
        config = self._config
        scores_qn = torch.stack(
            [probabilities_ql[:, start:end].mean(1) for start, end in prompt.spans], dim=1
        )
        scores_q, best_q = scores_qn.max(1)
        sure = probabilities_ql.amax(1) > config.box_threshold
        kept = sure & (scores_q > config.text_threshold)
        boxes, best, scores = kept_boxes(
            boxes_q4[kept], best_q[kept], scores_q[kept], size_hw, size_hw, config.nms_iou
        )
        return boxes, torch.tensor(prompt.nouns)[best], scores


def kept_boxes(
    centred_n4: torch.Tensor,
    nouns_n: torch.Tensor,
    scores_n: torch.Tensor,
    frame_hw: tuple[int, int],
    size_hw: tuple[int, int],
    nms_iou: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Boxes within the image and without duplicates of one noun.

    Args:
        centred_n4: centres and sizes, as shares of `frame_hw`.
        nouns_n, scores_n: of each box.
        frame_hw: height and width in pixels of what the detector saw, the image at its top left.
        size_hw: height and width of the image.
        nms_iou: as of `GroundingDinoConfig`.

    Returns:
        Boxes (m, 4), left, top, right and bottom in pixels of the image; nouns and scores (m,).
    """
    height, width = frame_hw
    boxes = box_convert(centred_n4, "cxcywh", "xyxy")
    boxes = clip_boxes_to_image(boxes * torch.tensor([width, height] * 2), size_hw)
    solid = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    boxes, scores, nouns = boxes[solid], scores_n[solid], nouns_n[solid]
    left = batched_nms(boxes, scores, nouns, nms_iou)
    return boxes[left], nouns[left], scores[left]


def detections(parts: list[tuple[torch.Tensor, ...]]) -> DetectedBoxes:
    """What was found in the passes over one image, each as `kept_boxes` gives it."""
    none = (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    boxes, nouns, scores = (torch.cat(group) for group in zip(none, *parts, strict=True))
    order = scores.argsort(descending=True, stable=True)
    return DetectedBoxes(
        boxes_xyxy=boxes[order].numpy(),
        nouns=nouns[order].numpy(),
        scores=scores[order].numpy(),
    )
