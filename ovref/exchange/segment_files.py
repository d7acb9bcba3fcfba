"""Segmentations as files: overlays, label maps with a palette, COCO JSON and panoptic COCO.

COCO's formats are described at cocodataset.org/#format-data; masks are run-length encoded by
pycocotools. Category ids are positions in the class list plus one. Annotations are written as they
are made, so memory does not grow with the number of images.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from typing import IO, Any

import numpy as np
from PIL import Image

from ovref.exchange.class_lists import Classes
from ovref.ops.palette import class_palette
from ovref.ops.run_lengths import rle
from ovref.stored_images import png_of
from ovref_inference.images import box_of
from ovref_inference.segmenters.regions import Panoptic, ScoredRegions, best_of_names, panoptic

NO_LABEL_8, NO_LABEL_16 = 255, 65535
"""Value of unlabelled pixels in label maps of 8 and 16 bits."""
OPACITY = 0.55
"""Weight of the class's colour in an overlay, in [0, 1]."""


def segments_of_regions(
    regions: ScoredRegions, classes: Classes, *, min_score: float, overlap: float
) -> Panoptic:
    """Segments of scored regions, as RetCLIP has them (`regions.panoptic`): every thing's region
    is one segment, connected or not. A class has the best score of its names."""
    scores_nc = best_of_names(regions.scores_nc, classes.class_of, len(classes.names))
    return panoptic(
        replace(regions, scores_nc=scores_nc), classes.is_thing, min_score=min_score,
        overlap=overlap,
    )  # fmt: skip


def label_png(labels_hw: np.ndarray, classes: int) -> bytes:
    """Encodes a label map: 8 bits with a palette for up to 255 classes, 16-bit grey for more.

    Args:
        labels_hw: (H, W) int32 positions in the class list; below 0 for no class, which becomes
            NO_LABEL_8 or NO_LABEL_16.

    Raises:
        ValueError: there are too many classes for 16 bits.
    """
    if classes > NO_LABEL_16:
        raise ValueError(f"a label map has at most {NO_LABEL_16} classes, found {classes}")
    if classes > NO_LABEL_8:
        values = np.where(labels_hw < 0, NO_LABEL_16, labels_hw).astype(np.uint16)
        return png_of(Image.fromarray(values))
    image = Image.fromarray(np.where(labels_hw < 0, NO_LABEL_8, labels_hw).astype(np.uint8))
    colours = np.zeros((256, 3), dtype=np.uint8)
    colours[:classes] = class_palette(classes)[:classes]
    image.putpalette(colours.tobytes())
    return png_of(image)


def overlay_png(image_hwc: np.ndarray, labels_hw: np.ndarray, classes: int) -> bytes:
    """The image overlaid with class colours, with white edges between classes."""
    colours_hwc = class_palette(classes)[np.where(labels_hw < 0, classes, labels_hw)]
    given_hw1 = (labels_hw >= 0)[:, :, None]
    mixed = np.where(given_hw1, (1 - OPACITY) * image_hwc + OPACITY * colours_hwc, image_hwc)
    edges_hw = np.zeros(labels_hw.shape, dtype=bool)
    edges_hw[1:] |= labels_hw[1:] != labels_hw[:-1]
    edges_hw[:, 1:] |= labels_hw[:, 1:] != labels_hw[:, :-1]
    mixed[edges_hw] = 255
    return png_of(Image.fromarray(mixed.round().astype(np.uint8)))


def coco_annotations(segments: Panoptic, image_id: int) -> list[dict[str, Any]]:
    """Annotations of one image, without ids: category, RLE mask, box (x, y, width, height), area in
    pixels, score."""
    annotations = []
    for segment, label in segments.labels.items():
        mask_hw = segments.ids_hw == segment
        x0, y0, x1, y1 = box_of(mask_hw)
        annotations.append(
            {
                "image_id": image_id,
                "category_id": label + 1,
                "segmentation": rle(mask_hw),
                "area": int(mask_hw.sum()),
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "iscrowd": 0,
                "score": round(segments.scores[segment], 5),
            }
        )
    return annotations


def panoptic_annotation(segments: Panoptic, image_id: int, file_name: str) -> dict[str, Any]:
    """The annotation of one image in COCO's panoptic format, for the map of `panoptic_png`."""
    infos = []
    for one in coco_annotations(segments, image_id):
        infos.append({k: v for k, v in one.items() if k not in ("image_id", "segmentation")})
    for segment, info in zip(segments.labels, infos, strict=True):
        info["id"] = int(segment)
    return {"image_id": image_id, "file_name": file_name, "segments_info": infos}


def panoptic_png(segments: Panoptic) -> bytes:
    """Segment ids as colours: id = R + 256 G + 256^2 B, 0 without a segment."""
    ids_hw = segments.ids_hw.astype(np.uint32)
    rgb = np.stack([ids_hw % 256, ids_hw // 256 % 256, ids_hw // 65536], axis=2)
    return png_of(Image.fromarray(rgb.astype(np.uint8)))


def categories(classes: Classes) -> list[dict[str, Any]]:
    """COCO's categories, with `isthing` and the colours of overlays and label maps."""
    colours = class_palette(len(classes.names)).tolist()
    return [
        {"id": number, "name": name, "isthing": int(thing), "color": colour}
        for number, (name, thing, colour) in enumerate(
            zip(classes.names, classes.is_thing, colours, strict=False), start=1
        )
    ]


class CocoFile:
    """Writes a COCO file image by image."""

    def __init__(self, heads: Sequence[dict[str, Any]]) -> None:
        """`heads` are the categories."""
        self._categories = list(heads)
        self._images = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 - closed by close
        self._annotations = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        self.images = self.annotations = 0

    def add(self, image: dict[str, Any], annotations: Sequence[dict[str, Any]]) -> None:
        """Adds an image and its annotations, which get the next ids unless they are panoptic."""
        _append(self._images, image, self.images)
        self.images += 1
        for annotation in annotations:
            if "segments_info" not in annotation:
                annotation = {"id": self.annotations + 1, **annotation}
            _append(self._annotations, annotation, self.annotations)
            self.annotations += 1

    def write(self, file: IO[str]) -> None:
        """Writes the whole file as JSON and removes the parts."""
        file.write('{"images": [')
        _copy(self._images, file)
        file.write('],\n"annotations": [')
        _copy(self._annotations, file)
        file.write(f'],\n"categories": {json.dumps(self._categories, ensure_ascii=False)}}}\n')

    def close(self) -> None:
        """Removes the parts."""
        self._images.close()
        self._annotations.close()


def _append(file: IO[str], value: dict[str, Any], number: int) -> None:
    file.write((",\n" if number else "\n") + json.dumps(value, ensure_ascii=False))


def _copy(part: IO[str], file: IO[str]) -> None:
    part.seek(0)
    while text := part.read(1 << 20):
        file.write(text)
    part.close()
