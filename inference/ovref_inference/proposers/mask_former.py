"""MaskFormer and Mask2Former (Cheng et al., 2021 and 2022) as class-agnostic proposers.

The classes that the model was trained on are not used: a query's score is one minus its probability
of "no object" (VOCSeg section 3.2, after Xu et al., 2022: proposals are good for unseen classes
too). One with open classes (`open_mask_former`) says of any class what a query shows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate
from transformers import AutoConfig, AutoImageProcessor, AutoModelForUniversalSegmentation

from ovref_inference.errors import ModelError
from ovref_inference.images import check_image
from ovref_inference.models import check_complete, model_errors, pretrained
from ovref_inference.pixels import BatchSize, batched, device_of
from ovref_inference.proposers.config import MaskFormerConfig
from ovref_inference.proposers.mask_decoder import class_logits
from ovref_inference.proposers.open_mask_former import OpenMaskFormer
from ovref_inference.proposers.proposals import OpenClasses, Proposals, owned_masks


class MaskFormer:
    """Class-agnostic masks of images. Made by `load_mask_former`."""

    def __init__(
        self, model: Any, image_processor: Any, config: MaskFormerConfig, *, batch_size: int = 8
    ) -> None:
        """
        Args:
            model: a MaskFormer or Mask2Former of transformers, in evaluation mode, on its device.
            image_processor: of transformers, as the model was trained with.
            config: thresholds.
            batch_size: maximum number of images per forward pass.
        """
        self._model, self._images = model, image_processor
        self._config, self._batch_size = config, BatchSize(batch_size)
        names = model.config.id2label
        self._names = tuple(names[number] for number in range(len(names)))

    @property
    def knows_objects(self) -> bool:
        """Whether it says how probably a query shows an object."""
        model = self._model
        return not isinstance(model, OpenMaskFormer) or len(model.trained_texts) > 0

    @torch.inference_mode()
    def propose(self, images: Sequence[np.ndarray]) -> Iterator[Proposals]:
        """The queries that show an object, by descending probability of an object; of a model with
        open classes and without the texts of its trained ones, all whose mask has a pixel.

        Args:
            images: (H, W, 3) uint8 RGB, of any sizes.

        Yields:
            For every image the masks' probabilities at its size, and the probabilities of the
            classes that the model was trained on; one image at a time, because masks are large.
        """
        for image_hwc in images:
            check_image(image_hwc)
        for batch in batched(images, self._batch_size, self._queries):
            for queries in batch:
                yield self._proposals(queries)

    def _queries(self, images: Sequence[np.ndarray]) -> list["_Queries"]:
        # Explicit, because an image of three rows would be taken for one with channels first.
        inputs = self._images(
            images=[np.ascontiguousarray(image_hwc) for image_hwc in images],
            input_data_format="channels_last",
            return_tensors="pt",
        ).to(self._model.device)
        outputs = self._model(pixel_values=inputs["pixel_values"], pixel_mask=inputs["pixel_mask"])
        found = []
        for image_hwc, logits_qhw, classes_qc, inside_hw in zip(
            images,
            outputs.masks_queries_logits.float(),
            outputs.class_queries_logits.float(),
            inputs["pixel_mask"],
            strict=True,
        ):
            said_qd = classes_qc
            classes_qc = self._classes(said_qd)
            if classes_qc is None:
                kept = (logits_qhw > 0).flatten(1).any(1).nonzero()[:, 0]
            else:
                order = classes_qc[:, -1].argsort(stable=True)
                kept = order[1 - classes_qc[order, -1] > self._config.min_score]
            valid_hw = int(inside_hw.any(1).sum()), int(inside_hw.any(0).sum())
            found.append(
                _Queries(
                    logits_qhw[kept],
                    None if classes_qc is None else classes_qc[kept],
                    said_qd[kept],
                    inside_hw.shape,
                    valid_hw,
                    image_hwc.shape[:2],
                )
            )
        return found

    def _proposals(self, queries: "_Queries") -> Proposals:
        # Images of different sizes were padded at the bottom and right to form one batch.
        mask_probs_nhw = image_probabilities(
            queries.logits_qhw, queries.padded_hw, queries.valid_hw, queries.size_hw
        )
        known, model = queries.classes_qc, self._model
        said = None
        if isinstance(model, OpenMaskFormer):
            said = OpenClasses(
                embeddings_nd=queries.said_qd.cpu().numpy(),
                void_d=model.void[0].float().cpu().numpy(),
                scale=model.scale,
                templates=model.templates,
            )
        return Proposals(
            mask_probs_nhw=mask_probs_nhw,
            class_probs_nc=None if known is None else known.cpu().numpy(),
            trained_names=self._names,
            open_classes=said,
        )

    def _classes(self, said_qd: torch.Tensor) -> torch.Tensor | None:
        """(queries, trained classes + 1) probabilities, the last of no object."""
        model = self._model
        if not isinstance(model, OpenMaskFormer):
            return said_qd.softmax(-1)
        if not self.knows_objects:
            return None
        return class_logits(model, said_qd, model.trained_texts).softmax(-1)


@dataclass(frozen=True)
class _Queries:
    """Output for one image before its masks are upsampled."""

    logits_qhw: torch.Tensor
    classes_qc: torch.Tensor | None
    said_qd: torch.Tensor
    """What the model says of classes: logits, or embeddings."""
    padded_hw: tuple[int, int]
    valid_hw: tuple[int, int]
    size_hw: tuple[int, int]


def image_probabilities(
    logits_qhw: torch.Tensor,
    padded_hw: tuple[int, ...],
    valid_hw: tuple[int, int],
    size_hw: tuple[int, int],
) -> np.ndarray:
    """(q, *size_hw) float32 mask probabilities at the size of an image.

    Args:
        logits_qhw: mask logits of the padded image.
        padded_hw: size of the padded image.
        valid_hw: size of the part of it that is the image, at the top left.
        size_hw: size of the image.
    """
    found = np.empty((len(logits_qhw), *size_hw), dtype=np.float32)
    # One query at a time: upsampling all at once takes gigabytes for a photograph.
    for number, logits_hw in enumerate(logits_qhw):
        seen = interpolate(logits_hw[None, None], padded_hw, mode="bilinear")
        seen = seen[..., : valid_hw[0], : valid_hw[1]]
        large = interpolate(seen, size_hw, mode="bilinear")
        found[number] = large[0, 0].sigmoid().float().cpu().numpy()
    return found


def masks_of(proposals: Proposals, config: MaskFormerConfig) -> tuple[np.ndarray, np.ndarray]:
    """`exclusive_masks` or, if `config.exclusive` is False, the overlapping masks of all pixels
    above the threshold; the result has the same form."""
    if config.exclusive:
        return exclusive_masks(proposals, config)
    masks_nhw = proposals.mask_probs_nhw >= config.mask_threshold
    rows = np.flatnonzero(masks_nhw.any((1, 2)))
    return masks_nhw[rows], rows


def exclusive_masks(
    proposals: Proposals, config: MaskFormerConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Disjoint masks, as in the papers' panoptic inference.

    These are `owned_masks`, weighted by the probability of an object. Queries that keep too little
    of their own mask are dropped, and their pixels stay uncovered.

    Args:
        proposals: of `MaskFormer.propose`.
        config: `mask_threshold` and `min_kept`.

    Returns:
        (m, H, W) bool masks, and (m,) int64, their indices in `proposals`, ascending.
    """
    if proposals.class_probs_nc is None:
        raise ValueError("proposals must have the proposer's own probabilities, found none")
    object_n = 1 - proposals.class_probs_nc[:, -1]
    masks_nhw, areas_n = owned_masks(proposals.mask_probs_nhw, object_n, config.mask_threshold)
    left_n = np.count_nonzero(masks_nhw, axis=(1, 2))
    rows = np.flatnonzero((left_n > 0) & (left_n > config.min_kept * areas_n))
    return masks_nhw[rows], rows


def check_choice(model: MaskFormer, config: MaskFormerConfig) -> None:
    """Raises ModelError if masks are chosen by how probably they show an object, which the model
    does not say."""
    if not model.knows_objects and (config.exclusive or config.min_score > 0):
        raise ModelError(
            f"{config.model} has open classes and no texts of its trained ones, so it does not say "
            "which masks are of objects: take all of them (min_score 0, exclusive false), or use "
            "it for VOCSeg and RetCLIP alone (load_proposals)"
        )


def load_mask_former(
    config: MaskFormerConfig, *, device: str | None = None, batch_size: int = 8
) -> MaskFormer:
    """Loads a MaskFormer or Mask2Former, with a loader that accepts only tensors, and tries it on
    one image.

    Args:
        device: "cpu", "cuda", ...; None selects a GPU if there is one.
        batch_size: maximum number of images per forward pass.

    Raises:
        ModelError: the model cannot be found or read, or is of another type.
    """
    path, options = pretrained(config.model, config.revision)
    with model_errors(f"load MaskFormer from {config.model}"):
        settings = AutoConfig.from_pretrained(path, **options)
        if settings.model_type not in ("maskformer", "mask2former"):
            raise ValueError(f"it is a {settings.model_type}, not a maskformer or mask2former")
        kind: Any = AutoModelForUniversalSegmentation
        if getattr(settings, "open_classes", None):
            kind = OpenMaskFormer
        model, report = kind.from_pretrained(
            path, config=settings, dtype=torch.float32, output_loading_info=True, **options
        )
        image_processor = AutoImageProcessor.from_pretrained(path, **options)
    check_complete(config.model, report)
    model = model.to(device_of(device)).eval()
    proposer = MaskFormer(model, image_processor, config, batch_size=batch_size)
    with model_errors(f"use MaskFormer from {config.model}"):
        list(proposer.propose([np.zeros((64, 64, 3), dtype=np.uint8)]))
    return proposer
