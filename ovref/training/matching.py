"""Losses of sets of masks: each true segment is matched with one query (Cheng et al., MaskFormer,
NeurIPS 2021, and Mask2Former, CVPR 2022).

Matching and losses are transformers' own modules, applied to one image at a time: what an image
costs does not depend on those beside it, so that a step is the same on any number of workers. The
originals divide by the masks and queries of the whole batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss
from transformers.models.maskformer.modeling_maskformer import (
    MaskFormerHungarianMatcher,
    MaskFormerLoss,
)

from ovref.config import STRICT
from ovref.identity import fingerprint
from ovref.training.labelled_batches import LabelledBatch
from ovref.training.loop import Losses
from ovref_inference.pixels import Pixels
from ovref_inference.proposers.mask_decoder import Decoded, class_logits
from ovref_inference.ranges import require_above, require_at_least, require_within

TERMS = {"classes": "loss_cross_entropy", "masks": "loss_mask", "dice": "loss_dice"}
"""Terms of the loss, and what transformers calls them."""


@dataclass(frozen=True, kw_only=True)
class MatchingLosses:
    """Weights of the losses and of the costs by which queries are matched with segments; the
    defaults are Mask2Former's, and FC-CLIP's."""

    __pydantic_config__ = STRICT

    classes: float = 2.0
    """Weight of the cross-entropy of classes."""
    masks: float = 5.0
    """Weight of the pixels' cross-entropy; without `points` of their focal loss."""
    dice: float = 5.0
    """Weight of the dice loss."""
    void: float = 0.1
    """Weight of a query without a segment in the cross-entropy of classes."""
    points: int = 12544
    """Random points at which masks are compared (Mask2Former); 0 compares all pixels
    (MaskFormer)."""
    oversample: float = 3.0
    """Points drawn for each that is kept, of which the most uncertain are taken."""
    uncertain: float = 0.75
    """Share of the points that are taken for their uncertainty; all others are plainly random."""

    def __post_init__(self) -> None:
        for name in ("classes", "masks", "dice"):
            require_above(name, getattr(self, name), 0)
        require_within("void", self.void, 0, 1)
        require_at_least("points", self.points, 0)
        require_at_least("oversample", self.oversample, 1)
        require_within("uncertain", self.uncertain, 0, 1)


Criterion = Callable[..., dict[str, torch.Tensor]]


def criterion_of(config: MatchingLosses, classes: int) -> Criterion:
    """transformers' loss of one layer's masks and classes, its terms not yet weighted."""
    if config.points:
        settings = Mask2FormerConfig(
            num_labels=classes,  # type: ignore[call-arg]
            class_weight=config.classes,
            mask_weight=config.masks,
            dice_weight=config.dice,
            no_object_weight=config.void,
            train_num_points=config.points,
            oversample_ratio=config.oversample,
            importance_sample_ratio=config.uncertain,
        )
        return Mask2FormerLoss(settings, {})
    matcher = MaskFormerHungarianMatcher(config.classes, config.masks, config.dice)
    return MaskFormerLoss(classes, matcher, {}, config.void)


def segment_targets(
    segments_hw: torch.Tensor, labels_hw: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The true masks and classes of one image.

    Args:
        segments_hw: integers, below 0 where there is no segment.
        labels_hw: integers: the class of each pixel.

    Returns:
        (k, H, W) float32, which are 0 on pixels without a segment, and (k,) int64.
    """
    numbers = segments_hw[segments_hw >= 0].unique()
    masks_khw = segments_hw == numbers[:, None, None]
    first = masks_khw.flatten(1).int().argmax(1)
    return masks_khw.float(), labels_hw.flatten()[first]


def best_names(logits: torch.Tensor, class_of: torch.Tensor) -> torch.Tensor:
    """(..., classes + 1): the highest logit of each class over its names, and that of void.

    Args:
        logits: (..., names + 1), the last of void.
        class_of: (names,) int64, which every class occurs in.
    """
    columns = torch.cat([class_of, class_of.max()[None] + 1])
    found = logits.new_zeros((*logits.shape[:-1], int(columns[-1]) + 1))
    return found.scatter_reduce(
        -1, columns.expand(logits.shape), logits, "amax", include_self=False
    )


def losses_of(
    config: MatchingLosses,
    texts_nd: torch.Tensor,
    class_of: Sequence[int],
    pixels: Pixels,
    seed: int,
) -> Losses:
    """The losses of a batch, as the loop takes them: summed over the layers of the decoder.

    Args:
        config: weights.
        texts_nd: of all names of all classes, L2-normalised, on the network's device.
        class_of: the class of each name, from 0, in order.
        pixels: of the network.
        seed: of the random points, which are the same for an image wherever it is processed.
    """
    columns = torch.tensor(class_of, device=texts_nd.device)
    criterion = criterion_of(config, int(columns.max()) + 1)
    if isinstance(criterion, torch.nn.Module):
        criterion.to(texts_nd.device)
    weights = {name: getattr(config, name) for name in TERMS}

    def losses(network: Any, batch: LabelledBatch) -> dict[str, torch.Tensor]:
        layers: list[Decoded] = network(pixels(list(batch.images_nhwc), batch.labels_nhw.shape[1:]))
        device = texts_nd.device
        # In full precision, as in the originals.
        with torch.autocast(device.type, enabled=False):
            logits = [
                best_names(
                    class_logits(network.head, layer.embeddings_bqd.float(), texts_nd), columns
                )
                for layer in layers
            ]
            found = []
            for row, (segments, labels) in enumerate(
                zip(batch.segments_nhw, batch.labels_nhw, strict=True)
            ):
                torch.manual_seed(int(fingerprint([seed, batch.first + row])[:15], 16))
                masks, classes = segment_targets(
                    torch.from_numpy(segments).to(device), torch.from_numpy(labels).to(device)
                )
                one = slice(row, row + 1)
                found.append([
                    criterion(layer.masks_bqhw[one].float(), said[one], [masks], [classes])
                    for layer, said in zip(layers, logits, strict=True)
                ])  # fmt: skip
        return {
            name: torch.stack([
                weight * torch.stack([layer[TERMS[name]] for layer in image]).sum()
                for image in found
            ])
            for name, weight in weights.items()
        }  # fmt: skip

    return losses
