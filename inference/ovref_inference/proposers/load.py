"""Proposers: images -> class-agnostic masks, no two overlapping.

A proposer is any callable that maps a list of (H, W, 3) uint8 RGB images to one (n, H, W) bool
array per image. The segmenter classifies uncovered pixels by their patches. Where a model's masks
overlap, a pixel goes to the mask with the higher score (`without_overlap`).
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
import torch

from ovref_inference.pixels import device_of
from ovref_inference.proposers.config import (
    CrfConfig,
    GroundedSamConfig,
    MaskFormerConfig,
    ProposerConfig,
    SamGridConfig,
)
from ovref_inference.proposers.crf import cut_to_edges, to_edges
from ovref_inference.proposers.grounded_sam import GroundedSam, load_grounded_sam
from ovref_inference.proposers.mask_former import (
    MaskFormer,
    check_choice,
    load_mask_former,
    masks_of,
)
from ovref_inference.proposers.opencut import (
    OpenCutConfig,
    opencut,
    raw_cuts,
    refine,
    upsample_masks,
)
from ovref_inference.proposers.proposals import Proposals
from ovref_inference.proposers.sam import SamMasks
from ovref_inference.proposers.sam_model import load_sam


class Encoder(Protocol):
    """An encoder of images of any sizes to (n, h, w, d) float32, such as
    `encoders.VisualEncoder`."""

    def encode(self, images: Sequence[np.ndarray]) -> np.ndarray: ...


Proposer = Callable[[Sequence[np.ndarray]], list[np.ndarray]]
"""Images (H, W, 3) uint8 -> masks (n, H, W) bool, one array per image, n may be 0."""


def no_proposals(images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Proposes no masks: every pixel is classified by its patch."""
    return [np.zeros((0, *image_hwc.shape[:2]), dtype=bool) for image_hwc in images]


def opencut_proposer(
    encoder: Encoder,
    config: OpenCutConfig = OpenCutConfig(),  # noqa: B008 (frozen)
    *,
    crf: CrfConfig | None = CrfConfig(),  # noqa: B008 (frozen)
    crf_at: Literal["masks", "cuts"] = "masks",
    device: str | None = None,
    graph_bytes: int | None = None,
) -> Proposer:
    """OpenCut (FOSSIL section 3.4) on the keys of a self-supervised backbone.

    Args:
        encoder: gives (n, h, w, d) keys of the last attention layer; it resizes the images (to 480
            pixels in the paper).
        config: thresholds and refinement.
        crf: how masks are aligned with edges in the image; None leaves them on the patch grid.
        crf_at: as in `OpenCutProposerConfig`.
        device: where graphs are cut: "cpu", "cuda", ...; None selects a GPU if there is one.
        graph_bytes: as in `opencut.opencut`.
    """
    where = device_of(device)

    def propose(images: Sequence[np.ndarray]) -> list[np.ndarray]:
        keys_bhwd = torch.from_numpy(encoder.encode(images)).to(where)
        find = raw_cuts if crf_at == "cuts" else opencut
        cuts = find(keys_bhwd, config, graph_bytes)
        if crf is None:
            sizes = [image.shape[:2] for image in images]
            return [upsample_masks(*cut) for cut in zip(cuts, sizes, strict=True)]
        # Each CRF runs on one core, mostly without holding Python's GIL.
        with ThreadPoolExecutor(max(1, min(len(images), os.cpu_count() or 1))) as pool:
            if crf_at == "masks":
                return list(pool.map(partial(to_edges, config=crf), cuts, images))
            edged = pool.map(partial(cut_to_edges, config=crf), cuts, images)
            return list(pool.map(partial(refine, config=config), edged))

    return propose


def without_overlap(masks_nhw: np.ndarray, scores_n: np.ndarray) -> np.ndarray:
    """Makes masks disjoint: each pixel goes to the mask with the highest score that contains it.

    Args:
        masks_nhw: (n, H, W) bool.
        scores_n: (n,); ties go to the earlier mask.

    Returns:
        (m, H, W) bool by descending score; masks that are left without a pixel are dropped.
    """
    free_hw = np.ones(masks_nhw.shape[1:], dtype=bool)
    kept = [np.zeros((0, *masks_nhw.shape[1:]), dtype=bool)]
    for number in np.argsort(-np.asarray(scores_n), kind="stable"):
        mask_hw = masks_nhw[number] & free_hw
        if mask_hw.any():
            kept.append(mask_hw[None])
            free_hw &= ~mask_hw
    return np.concatenate(kept)


def sam_grid_proposer(sam: SamMasks, config: SamGridConfig) -> Proposer:
    """SAM's automatic masks for a grid of points; overlaps go to the higher predicted IoU, unless
    the config allows them."""

    def propose(images: Sequence[np.ndarray]) -> list[np.ndarray]:
        found = sam.of_grid(images, config)
        if config.exclusive:
            return [without_overlap(*one) for one in found]
        return [masks_nhw for masks_nhw, _ in found]

    return propose


def mask_former_proposer(model: MaskFormer, config: MaskFormerConfig) -> Proposer:
    """The masks of a MaskFormer or Mask2Former, without its classes (`mask_former.masks_of`); they
    overlap only if the config allows it."""

    def propose(images: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [masks_of(found, config)[0] for found in model.propose(images)]

    return propose


def grounded_sam_proposer(model: GroundedSam, class_names: Sequence[str]) -> Proposer:
    """GroundingDINO + SAM prompted with all classes (RetCLIP section 2.2, training-free); overlaps
    go to the higher detector score.

    Args:
        class_names: the prompt; the masks do not say which class they show.
    """

    def propose(images: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [
            without_overlap(found.masks_nhw, found.detections.scores)
            for found in model.find(images, [class_names] * len(images))
        ]

    return propose


def grounded_sam_proposals(
    model: GroundedSam, class_names: Sequence[str], config: GroundedSamConfig
) -> Callable[[Sequence[np.ndarray]], list[Proposals]]:
    """As `grounded_sam_proposer`, with the names of the classes found in each image; masks overlap
    if the config allows it."""

    def propose(images: Sequence[np.ndarray]) -> list[Proposals]:
        proposals = []
        for found in model.find(images, [class_names] * len(images)):
            masks_nhw = found.masks_nhw
            if config.exclusive:
                masks_nhw = without_overlap(masks_nhw, found.detections.scores)
            numbers = sorted(set(found.detections.nouns.tolist()))
            proposals.append(
                Proposals(
                    mask_probs_nhw=masks_nhw.astype(np.float32),
                    found_names=tuple(class_names[number] for number in numbers),
                )
            )
        return proposals

    return propose


def load_proposer(
    config: ProposerConfig, *, device: str | None = None, batch_size: int = 8
) -> Proposer:
    """Loads the models of a proposer of masks.

    Args:
        device: "cpu", "cuda", ...; None takes a GPU where there is one.
        batch_size: maximum number of images per forward pass.

    Raises:
        ModelError: a model cannot be found or read, or says nothing of objects.
        ValueError: `grounded_sam`, which needs class names, or `fcclip`, whose masks overlap
            (`load_proposals`).
    """
    if config.grounded_sam is not None:
        raise ValueError("grounded_sam needs class names; in a build use ground.detector")
    if config.fcclip is not None:
        raise ValueError("fcclip is for segmenters of regions; in a build use mask_former")
    if config.mask_former is not None:
        model = load_mask_former(config.mask_former, device=device, batch_size=batch_size)
        check_choice(model, config.mask_former)
        return mask_former_proposer(model, config.mask_former)
    if config.sam_grid is not None:
        chosen_sam = config.sam_grid.sam
        sam = load_sam(chosen_sam.model, device_of(device), revision=chosen_sam.revision)
        return sam_grid_proposer(SamMasks(sam, batch_size=batch_size), config.sam_grid)
    from ovref_inference.encoders import load_visual_encoder

    chosen = config.opencut
    assert chosen is not None  # ProposerConfig has exactly one
    keys = load_visual_encoder(chosen.keys, device=device, batch_size=batch_size)
    return opencut_proposer(keys, chosen.cut, crf=chosen.crf, crf_at=chosen.crf_at, device=device)


def load_proposals(
    config: ProposerConfig,
    class_names: Sequence[str],
    *,
    device: str | None = None,
    batch_size: int = 8,
) -> Callable[[Sequence[np.ndarray]], list[Any]]:
    """Loads a proposer for segmenters of regions, with all the output that they can use:

    `mask_former` gives soft masks and the probabilities of its own classes (VOCSeg eq. 4 and 5),
    `fcclip` what it says of any class with features of its own CLIP, `grounded_sam` the names of
    the classes found, others only masks.

    Args:
        class_names: prompt of `grounded_sam`; unused by others.
        device: as in `load_proposer`.
        batch_size: as in `load_proposer`.

    Raises:
        ModelError: a model cannot be found or read.
    """
    if config.mask_former is not None:
        model = load_mask_former(config.mask_former, device=device, batch_size=batch_size)
        return lambda images: list(model.propose(images))
    if config.fcclip is not None:
        from ovref_inference.proposers.fcclip import load_fcclip

        return load_fcclip(config.fcclip, device=device).propose
    if config.grounded_sam is not None:
        grounded = config.grounded_sam
        models = load_grounded_sam(
            grounded.detector, grounded.sam, device=device, batch_size=batch_size
        )
        return grounded_sam_proposals(models, class_names, grounded)
    return load_proposer(config, device=device, batch_size=batch_size)
