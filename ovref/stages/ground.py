"""Captioned images to images with regions: locates each noun of the caption."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ovref.config import STRICT
from ovref.contract import Dropped
from ovref.models.blank import blank_prompt
from ovref.models.noun_grounding import (
    DetectorRoute,
    Finder,
    GroundedNoun,
    ProposalRoute,
    detector_finder,
    proposal_finder,
)
from ovref.ops.binarisation import resized
from ovref.ops.masks import image_record, reject_reason, require_areas
from ovref.records import NO, YES, ImageRecord, Prompt, Region
from ovref.stored_images import UnusableImageError, plain_image
from ovref_inference.ranges import require_at_least

HEATMAP_STRIDE = 4
"""Image pixels per value of a stored heatmap, about MaskFormer's resolution."""


@dataclass(frozen=True, kw_only=True)
class Ground:
    """Finds the nouns of captions in their images, by one of two routes.

    The device is not a setting: `build` uses CUDA if available.
    """

    name: ClassVar[str] = "ground"
    version: ClassVar[int] = 2
    __pydantic_config__ = STRICT

    detector: DetectorRoute | None = None
    """RetCLIP's route."""
    proposals: ProposalRoute | None = None
    """VOCSeg's route."""
    min_area: float = 0.002
    """Regions that are a smaller fraction of the image are dropped as `empty_mask`."""
    max_area: float = 0.95
    """Regions that are a larger fraction of the image are dropped as `full_mask`."""
    batch_size: int = 8
    """Images per forward pass. Part of the identity: at another batch size, kernels round the last
    bits differently."""

    def __post_init__(self) -> None:
        if (self.detector is None) == (self.proposals is None):
            raise ValueError("name one route, detector or proposals, and not the other")
        require_areas(self.min_area, self.max_area)
        require_at_least("batch_size", self.batch_size, 1)

    def build(self) -> "GroundStage":
        """Loads the models of the route.

        Raises:
            ModelError: one cannot be found, read or used.
        """
        if self.detector is not None:
            return GroundStage(self, detector_finder(self.detector, self.batch_size))
        if self.proposals is not None:
            return GroundStage(self, proposal_finder(self.proposals, self.batch_size))
        raise ValueError("name one route, detector or proposals")

    def check(self) -> list["ImageRecord | Dropped"]:
        """Feeds a blank image to each model, and then to the stage; see `ovref.check_models`."""
        stage = self.build()
        stage.finder.check()
        return list(stage(iter([blank_prompt()])))


class GroundStage:
    """`Prompt` with image in; `ImageRecord`, or `Dropped`, out.

    Stores the upright image (`stored_images.plain_image`); masks have its size. The provenance has
    the models and a list `regions`: the detector's `box_xyxy` in pixels and SAM's `predicted_iou`
    of each region. A region's score is the detector's, or the cosine of noun and mask. A repeated
    noun counts once; it may have several regions.

    Dropped records: `no_image`, `no_nouns`, those of `stored_images.REASONS`, `no_regions` (all
    of its nouns were dropped). Dropped regions, under `<key>#<number of the noun in the prompt>`:
    `no_box` (no box above the thresholds) or `no_match` (no proposal, or none similar enough),
    `empty_mask`, `full_mask`.
    """

    def __init__(self, spec: Ground, finder: Finder) -> None:
        self._spec, self.finder = spec, finder

    def __call__(self, prompts: Iterator[Prompt]) -> Iterator[ImageRecord | Dropped]:
        batch: list[tuple[Prompt, bytes, np.ndarray]] = []
        for prompt in prompts:
            if prompt.image is None:
                yield Dropped(prompt.key, "no_image")
                continue
            if not prompt.nouns:
                yield Dropped(prompt.key, "no_nouns")
                continue
            try:
                file, image_hwc = plain_image(prompt.image)
            except UnusableImageError as error:
                yield Dropped(prompt.key, error.reason)
                continue
            batch.append((prompt, file, image_hwc))
            if len(batch) == self._spec.batch_size:
                yield from self._ground(batch)
                batch = []
        if batch:
            yield from self._ground(batch)

    def _ground(
        self, batch: list[tuple[Prompt, bytes, np.ndarray]]
    ) -> Iterator[ImageRecord | Dropped]:
        # A repeated noun is searched once, under its first mention.
        firsts = [_first_mentions(prompt) for prompt, _, _ in batch]
        found = self.finder.find([image_hwc for _, _, image_hwc in batch], [*map(list, firsts)])
        for (prompt, file, _), numbers, answers in zip(batch, firsts, found, strict=True):
            yield from self._record(prompt, file, list(numbers.values()), answers)

    def _record(
        self, prompt: Prompt, file: bytes, numbers: list[int], answers: list[GroundedNoun]
    ) -> Iterator[ImageRecord | Dropped]:
        spec, finder = self._spec, self.finder
        for missing in sorted(set(range(len(numbers))) - {answer.noun for answer in answers}):
            yield Dropped(f"{prompt.key}#{numbers[missing]}", finder.missing)
        regions, facts, heatmaps = [], [], []
        for answer in answers:
            number = numbers[answer.noun]
            mask_hw = np.where(answer.mask_hw, YES, NO).astype(np.uint8)
            reason = reject_reason(mask_hw, spec.min_area, spec.max_area)
            if reason is not None:
                yield Dropped(f"{prompt.key}#{number}", reason)
                continue
            regions.append(
                Region(
                    noun=prompt.nouns[number],
                    mask_hw=mask_hw,
                    score=answer.score,
                    source=finder.source,
                )
            )
            facts.append(answer.facts)
            if answer.heatmap_hw is not None:
                height, width = mask_hw.shape
                small_hw = (-(-height // HEATMAP_STRIDE), -(-width // HEATMAP_STRIDE))
                heatmap_hw = resized(answer.heatmap_hw, small_hw).clip(0, 1)
                heatmaps.append(heatmap_hw.astype(np.float16))
        provenance = {**finder.provenance, "regions": facts}
        yield image_record(prompt, file, regions, heatmaps, provenance=provenance)


def _first_mentions(prompt: Prompt) -> dict[str, int]:
    """Each noun's text with the number of its first mention."""
    firsts: dict[str, int] = {}
    for number, noun in enumerate(prompt.nouns):
        firsts.setdefault(noun.text, number)
    return firsts
