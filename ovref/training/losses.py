"""Losses of masks whose classes do not exclude each other (ZegCLIP 3.3, CLIP-RC eq. 11)."""

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

UNLABELLED = -1
"""Label of a pixel without a class."""
HIDDEN = -2
"""Label of a pixel whose class a training must not see."""


def class_targets(labels_nhw: torch.Tensor, classes: int) -> torch.Tensor:
    """(n, classes, H, W) float32: 1 where a pixel has the class; nothing for labels below 0."""
    numbers = torch.arange(classes, device=labels_nhw.device)
    return (labels_nhw[:, None] == numbers[:, None, None]).float()


def focal_loss(
    logits_nchw: torch.Tensor,
    targets_nchw: torch.Tensor,
    known_nhw: torch.Tensor,
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> torch.Tensor:
    """Focal loss of each image (Lin et al., ICCV 2017): the mean over its known pixels, summed over
    all classes, and divided by the number of classes that it shows.

    Args:
        logits_nchw: one for each class; classes do not exclude each other.
        targets_nchw: of `class_targets`.
        known_nhw: bool, pixels that count.
        alpha: weight of pixels that have a class; those that have not weigh 1 - alpha.
        gamma: exponent by which what is nearly right counts less.

    Returns:
        (n,) float32; 0 for an image without known pixels.
    """
    logits = logits_nchw.float()
    entropy = binary_cross_entropy_with_logits(logits, targets_nchw, reduction="none")
    right = torch.exp(-entropy)  # the probability of what is so
    weight = alpha * targets_nchw + (1 - alpha) * (1 - targets_nchw)
    losses = weight * (1 - right) ** gamma * entropy * known_nhw[:, None]
    pixels = known_nhw.sum((1, 2)).clamp(min=1)
    return losses.sum((1, 2, 3)) / pixels / _present(targets_nchw).sum(1).clamp(min=1)


def dice_loss(
    logits_nchw: torch.Tensor, targets_nchw: torch.Tensor, known_nhw: torch.Tensor
) -> torch.Tensor:
    """Dice loss of each image, the mean over the classes that it shows (Milletari et al., 2016).

    Arguments and result as of `focal_loss`; 1 is added to both sides of the fraction.
    """
    probabilities = logits_nchw.float().sigmoid() * known_nhw[:, None]
    both = (probabilities * targets_nchw).sum((2, 3))
    total = probabilities.sum((2, 3)) + targets_nchw.sum((2, 3))
    present = _present(targets_nchw)
    losses = (1 - (2 * both + 1) / (total + 1)) * present
    return losses.sum(1) / present.sum(1).clamp(min=1)


def recovery_loss(found: torch.Tensor, wanted: torch.Tensor, kind: str) -> torch.Tensor:
    """(n,) float32: the mean absolute (`l1`, eq. 10) or squared (`l2`) difference of each image."""
    difference = found.float() - wanted.float()
    values = difference.abs() if kind == "l1" else difference**2
    return values.flatten(1).mean(1)


def pseudo_labels(
    logits_nchw: torch.Tensor, labels_nhw: torch.Tensor, unseen_c: torch.Tensor
) -> torch.Tensor:
    """Self-training: each HIDDEN pixel takes the unseen class that the network itself finds best.

    Args:
        logits_nchw: of all classes, at the size of the labels; no gradient passes.
        labels_nhw: (n, H, W) int64.
        unseen_c: (classes,) bool.
    """
    scores = logits_nchw.detach().masked_fill(~unseen_c[:, None, None], -torch.inf)
    return torch.where(labels_nhw == HIDDEN, scores.argmax(1), labels_nhw)


def _present(targets_nchw: torch.Tensor) -> torch.Tensor:
    """(n, classes) float32: 1 for a class that an image shows."""
    return targets_nchw.amax((2, 3))
