"""Images of a labelled set to images with regions: each true mask is a region of its label."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image

from ovref.config import STRICT
from ovref.contract import Dropped
from ovref.ops.masks import image_record, reject_reason, require_areas
from ovref.records import NO, YES, ImageRecord, Prompt, Region, Segments
from ovref.stored_images import UnusableImageError, plain_image

SOURCE = "labels"
"""Source of the regions."""


@dataclass(frozen=True, kw_only=True)
class TrueMasks:
    """Makes regions of the masks that a labelled set comes with.

    The upper bound of what finding regions can reach: the row of true masks in RetCLIP's table 3,
    and how kNN-CLIP fills its database (section 3).
    """

    name: ClassVar[str] = "true_masks"
    version: ClassVar[int] = 1
    __pydantic_config__ = STRICT

    min_area: float = 0.002
    """Masks that are a smaller fraction of the image are dropped as `empty_mask`."""
    max_area: float = 0.95
    """Masks that are a larger fraction of the image are dropped as `full_mask`."""

    def __post_init__(self) -> None:
        require_areas(self.min_area, self.max_area)

    def build(self) -> "TrueMasksStage":
        """No model is loaded."""
        return TrueMasksStage(self)


class TrueMasksStage:
    """`Prompt` with image and segments in; `ImageRecord`, or `Dropped`, out.

    The stored image is upright (`stored_images.plain_image`); masks have its size. A segment with
    several names is a region of each. A region's score is 1.

    Dropped records: `no_image`, `no_masks` (the corpus has labels alone), those of
    `stored_images.REASONS`, `wrong_mask_size` (another shape than the image's), `no_regions`
    (all of its masks were dropped). Dropped regions, under `<key>#<number of the noun in the
    prompt>`: `empty_mask`, `full_mask`.
    """

    def __init__(self, spec: TrueMasks) -> None:
        self._spec = spec

    def __call__(self, prompts: Iterator[Prompt]) -> Iterator[ImageRecord | Dropped]:
        for prompt in prompts:
            if prompt.image is None:
                yield Dropped(prompt.key, "no_image")
            elif prompt.segments is None:
                yield Dropped(prompt.key, "no_masks")
            else:
                yield from self._record(prompt, prompt.image, prompt.segments)

    def _record(
        self, prompt: Prompt, image: bytes, segments: Segments
    ) -> Iterator[ImageRecord | Dropped]:
        try:
            file, image_hwc = plain_image(image)
        except UnusableImageError as error:
            yield Dropped(prompt.key, error.reason)
            return
        size_hw = (image_hwc.shape[0], image_hwc.shape[1])
        numbers_hw = _segment_numbers(segments, size_hw)
        if numbers_hw is None:
            yield Dropped(prompt.key, "wrong_mask_size")
            return
        regions = []
        for segment, nouns in enumerate(segments.nouns, start=1):
            mask_hw = np.where(numbers_hw == segment, YES, NO).astype(np.uint8)
            reason = reject_reason(mask_hw, self._spec.min_area, self._spec.max_area)
            for noun in nouns:
                if reason is not None:
                    yield Dropped(f"{prompt.key}#{noun}", reason)
                    continue
                regions.append(
                    Region(noun=prompt.nouns[noun], mask_hw=mask_hw, score=1.0, source=SOURCE)
                )
        yield image_record(prompt, file, regions)


def _segment_numbers(segments: Segments, size_hw: tuple[int, int]) -> np.ndarray | None:
    """(H, W) segment of each pixel, 0 for none, at the size of the stored image, which is smaller
    than the map where a large photograph was downscaled; None for a map of another shape."""
    with Image.open(io.BytesIO(segments.map_png), formats=("PNG",)) as map_image:
        height, width = size_hw
        if map_image.size == (width, height):
            return np.asarray(map_image)
        scale = map_image.size[0] / width
        if abs(map_image.size[1] / scale - height) > 1:
            return None
        # By indices, because Pillow resizes no 16-bit images in every release.
        numbers_hw = np.asarray(map_image)
    rows = (np.arange(height) + 0.5) * numbers_hw.shape[0] / height
    columns = (np.arange(width) + 0.5) * numbers_hw.shape[1] / width
    return numbers_hw[rows.astype(np.int64)[:, None], columns.astype(np.int64)]
