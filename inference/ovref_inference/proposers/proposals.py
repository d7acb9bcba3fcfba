"""Proposals for one image: soft or binary masks, and class probabilities of trained proposers."""

from dataclasses import dataclass, replace

import numpy as np

from ovref_inference.vectors import l2_normalised


@dataclass(frozen=True, kw_only=True)
class OpenClasses:
    """What a proposer that was trained on texts says of any class: an embedding of each region."""

    embeddings_nd: np.ndarray
    """(n, d) float32 in the space of the texts, L2-normalised."""
    void_d: np.ndarray
    """(d,) float32: the learnt embedding of no class at all, L2-normalised."""
    scale: float
    """Factor of cosines in the softmax over classes."""
    templates: tuple[str, ...]
    """Those that it was trained with."""

    def __post_init__(self) -> None:
        if self.embeddings_nd.ndim != 2 or self.void_d.shape != self.embeddings_nd.shape[1:]:
            raise ValueError(
                "embeddings_nd must be (n, d) and void_d (d,), found "
                f"{self.embeddings_nd.shape} and {self.void_d.shape}"
            )
        object.__setattr__(self, "embeddings_nd", l2_normalised(self.embeddings_nd))
        object.__setattr__(self, "void_d", l2_normalised(self.void_d))

    def probabilities(self, texts_cd: np.ndarray) -> np.ndarray:
        """(n, classes + 1) float32, the last of void, from texts that are L2-normalised.

        Raises:
            ValueError: texts of another width.
        """
        if texts_cd.shape[1:] != self.void_d.shape:
            raise ValueError(
                f"the proposer's embeddings are {len(self.void_d)} wide and the texts "
                f"{texts_cd.shape[1]}; it must have been trained with the collection's texts"
            )
        known = np.concatenate([texts_cd, self.void_d[None]])
        logits = self.scale * (self.embeddings_nd @ known.T).astype(np.float64)
        powers = np.exp(logits - logits.max(1, keepdims=True))
        return (powers / powers.sum(1, keepdims=True)).astype(np.float32)


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
    open_classes: OpenClasses | None = None
    """What is said of any class, by a proposer that was trained on texts; `trained_names` are then
    the classes that it has seen. Segmenters ask this rather than `class_probs_nc`."""
    features_nd: np.ndarray | None = None
    """(n, d) float32: embeddings of the regions by the proposer's own frozen CLIP."""
    features_of: str = ""
    """The model that made them; empty without any."""

    @property
    def knows_classes(self) -> bool:
        """Whether the proposer scores classes: those that it was trained on, or any."""
        return self.class_probs_nc is not None or self.open_classes is not None

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
        if bool(self.features_of) != (self.features_nd is not None):
            raise ValueError("features_nd and features_of are given together")
        for name in ("features_nd", "open_classes"):
            rows = getattr(self, name)
            rows = rows.embeddings_nd if isinstance(rows, OpenClasses) else rows
            if rows is not None and len(rows) != len(found):
                raise ValueError(f"{name} must have {len(found)} rows, found {len(rows)}")
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
        known, said = self.class_probs_nc, self.open_classes
        return replace(
            self,
            mask_probs_nhw=self.mask_probs_nhw[rows],
            class_probs_nc=None if known is None else known[rows],
            open_classes=said and replace(said, embeddings_nd=said.embeddings_nd[rows]),
            features_nd=None if self.features_nd is None else self.features_nd[rows],
        )

    def with_rest(self, threshold: float) -> "Proposals":
        """Adds one region of all pixels that no mask covers at this threshold, if there are any
        (VOCSeg eq. 1). The proposer's own classes are all equally probable there, and features are
        left out, for there are none of the rest.

        Raises:
            ValueError: the proposer says of any class what a region shows, but not of this one.
        """
        rest_hw = ~np.any(self.masks(threshold), axis=0)
        if not rest_hw.any():
            return self
        if self.open_classes is not None:
            raise ValueError("the rest has no embedding by a proposer that was trained on texts")
        class_probs_nc = self.class_probs_nc
        if class_probs_nc is not None:
            even_c = np.full(
                (1, class_probs_nc.shape[1]), 1 / class_probs_nc.shape[1], dtype=np.float32
            )
            class_probs_nc = np.concatenate([class_probs_nc, even_c])
        return replace(
            self,
            mask_probs_nhw=np.concatenate([self.mask_probs_nhw, rest_hw[None].astype(np.float32)]),
            class_probs_nc=class_probs_nc,
            features_nd=None,
            features_of="",
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
