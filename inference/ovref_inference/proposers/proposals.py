"""Proposals for one image: soft or binary masks, and class probabilities of trained proposers."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Proposals:
    """Class-agnostic regions of one image; they may overlap and leave pixels uncovered."""

    mask_probs_nhw: np.ndarray
    """(n, H, W) float32 in [0, 1]: probability that a pixel belongs to the region; n may be 0."""
    class_probs_nc: np.ndarray | None = None
    """(n, trained classes + 1) float32: the proposer's own probabilities, the last one of `no
    object`; None for a proposer without classes."""
    trained_names: tuple[str, ...] = ()
    """The classes that the proposer was trained on."""
    found_names: tuple[str, ...] | None = None
    """Requested names that the proposer found in the image; None for a proposer without names."""

    def __post_init__(self) -> None:
        found = self.mask_probs_nhw
        if found.ndim != 3 or found.dtype != np.float32:
            raise ValueError(
                f"mask_probs_nhw must be (n, H, W) float32, found {found.shape} {found.dtype}"
            )
        # Min and max, because (found >= 0) & (found <= 1) needs large temporary arrays; NaN fails
        # too.
        if found.size and not (found.min() >= 0 and found.max() <= 1):
            raise ValueError("mask_probs_nhw must lie in [0, 1] and be finite")
        if self.class_probs_nc is None:
            return
        wanted = (len(found), len(self.trained_names) + 1)
        if self.class_probs_nc.shape != wanted or len(self.trained_names) == 0:
            raise ValueError(
                f"class_probs_nc must be {wanted}, a column for each trained class and one for no "
                f"object, found {self.class_probs_nc.shape}"
            )
        if not (np.isfinite(self.class_probs_nc) & (self.class_probs_nc >= 0)).all():
            raise ValueError(
                "class_probs_nc must be probabilities, found negative or not finite ones"
            )

    def masks(self, threshold: float) -> np.ndarray:
        """(n, H, W) bool: the pixels whose probability is above the threshold."""
        return self.mask_probs_nhw > threshold

    def chosen(self, rows: np.ndarray) -> "Proposals":
        """The proposals at a bool or integer index; `self` if that is all of them."""
        if rows.dtype == bool and rows.all():
            return self
        return Proposals(
            mask_probs_nhw=self.mask_probs_nhw[rows],
            class_probs_nc=None if self.class_probs_nc is None else self.class_probs_nc[rows],
            trained_names=self.trained_names,
            found_names=self.found_names,
        )

    def with_rest(self, threshold: float) -> "Proposals":
        """Adds one region of all pixels that no mask covers at this threshold, if there are any
        (VOCSeg eq. 1). The proposer's own classes are all equally probable there."""
        rest_hw = ~np.any(self.masks(threshold), axis=0)
        if not rest_hw.any():
            return self
        class_probs_nc = self.class_probs_nc
        if class_probs_nc is not None:
            even_c = np.full(
                (1, class_probs_nc.shape[1]), 1 / class_probs_nc.shape[1], dtype=np.float32
            )
            class_probs_nc = np.concatenate([class_probs_nc, even_c])
        return Proposals(
            mask_probs_nhw=np.concatenate([self.mask_probs_nhw, rest_hw[None].astype(np.float32)]),
            class_probs_nc=class_probs_nc,
            trained_names=self.trained_names,
            found_names=self.found_names,
        )


def owned_masks(
    mask_probs_nhw: np.ndarray, weights_n: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Disjoint masks, as in MaskFormer's panoptic inference (its section 3.4).

    A pixel belongs to the region with the highest product of weight and probability (ties go to the
    first), and is in that region's mask if its probability reaches the threshold.

    Args:
        mask_probs_nhw: (n, H, W) float32 in [0, 1]; n may be 0.
        weights_n: (n,) at least 0; a region of weight 0 has no pixel.
        threshold: in [0, 1].

    Returns:
        (n, H, W) bool masks; and (n,) int64, number of pixels of each region that reach the
        threshold, including those of other masks.
    """
    highest_hw = np.zeros(mask_probs_nhw.shape[1:], dtype=np.float32)
    owner_hw = np.full(highest_hw.shape, -1, dtype=np.int32)
    # Much faster than argmax over the first axis.
    for number, probs_hw in enumerate(mask_probs_nhw):
        weighted_hw = probs_hw * weights_n[number]
        np.copyto(owner_hw, number, where=weighted_hw > highest_hw)
        np.maximum(highest_hw, weighted_hw, out=highest_hw)
    masks_nhw = np.zeros(mask_probs_nhw.shape, dtype=bool)
    areas_n = np.zeros(len(mask_probs_nhw), dtype=np.int64)
    for number, probs_hw in enumerate(mask_probs_nhw):
        whole_hw = probs_hw >= threshold
        areas_n[number] = np.count_nonzero(whole_hw)
        np.logical_and(whole_hw, owner_hw == number, out=masks_nhw[number])
    return masks_nhw, areas_n


def as_proposals(found: "np.ndarray | Proposals", *, rest: bool) -> Proposals:
    """The output of any proposer for one image, as `Proposals`.

    Args:
        found: (n, H, W) bool masks, or Proposals, which pass unchanged.
        rest: adds one region of all uncovered pixels to masks, if there are any, so that regions
            cover the image (VOCSeg eq. 1).

    Raises:
        ValueError: `found` is neither.
    """
    if isinstance(found, Proposals):
        return found
    if found.ndim != 3 or found.dtype != bool:
        raise ValueError(
            f"proposals must be (n, H, W) bool masks or Proposals, found {found.shape} "
            f"{found.dtype}"
        )
    if rest and not (covered_hw := np.any(found, axis=0)).all():
        found = np.concatenate([found, ~covered_hw[None]])
    return Proposals(mask_probs_nhw=found.astype(np.float32))
