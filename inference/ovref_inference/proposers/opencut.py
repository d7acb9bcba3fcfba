"""OpenCut: class-agnostic masks from the keys of a self-supervised backbone, by normalised cuts.

FOSSIL section 3.4. One image is a graph whose nodes are patches; two patches are linked when the
cosine of their keys reaches a threshold tau (eq. 1). The second smallest eigenvector of the
normalised cut (eq. 2) splits the graph in two (eq. 3), the side that holds its largest value is a
mask, its patches leave the graph, and the cut is repeated (MaskCut). OpenCut does this for a list
of thresholds, foreground first, and refines what comes out into masks that share no patch.

Graphs of many images and many thresholds are cut in one batch: the eigenvector comes from an
iterative solver for a stack of dense graphs (`second_eigenvectors`), not from one factorisation per
graph. The Conditional Random Field that the paper runs on the masks comes last, on all masks of an
image together (`crf.to_edges`), where MaskCut has it after each cut: one field instead of many, and
the masks still share no pixel. MaskCut's other rule for the foreground (swap the sides when three
corners of the image are foreground) is not used: OpenCut wants the masks of the background too.
Instead, `foreground="smaller"` avoids masks of several objects with what lies between them.
"""

from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage

from ovref_inference.proposers.config import OpenCutConfig

WEAK_LINK = 1e-5
"""Weight of a pair below the threshold (eq. 1): it keeps the graph connected."""

REFERENCE_GRID = 60 * 60
"""Patches of the grid that the paper cuts: DINO ViT-B/8 on images of 480 x 480 pixels."""

BLOCK = 4
"""Vectors per block of the eigenvector solver: how many near-equal eigenvalues it tells apart
without slowing down."""

DEPTH = 16
"""Blocks per cycle of the eigenvector solver."""


def opencut(
    keys_bhwd: torch.Tensor, config: OpenCutConfig, graph_bytes: int = 2**29
) -> list[np.ndarray]:
    """Masks that share no patch, for a batch of key grids of one size.

    Patches in no mask are left to the segmenter, each as a region of its own.

    Args:
        keys_bhwd: (images, h, w, d) keys of the last attention layer, any float type, any scale.
        config: thresholds and refinement.
        graph_bytes: memory for the graphs cut at once. It changes speed only.

    Returns:
        For every image a (masks, h, w) bool array, in order of discovery, possibly with no mask.

    Raises:
        ValueError: `keys_bhwd` has not four axes, or holds a value that is not finite.
    """
    if keys_bhwd.ndim != 4:
        raise ValueError(f"keys_bhwd must be (images, h, w, d), found {tuple(keys_bhwd.shape)}")
    if not torch.isfinite(keys_bhwd).all():
        raise ValueError("keys_bhwd holds values that are not finite; check the backbone's input")
    images, height, width, _ = keys_bhwd.shape
    if images == 0:
        return []
    keys_bnd = keys_bhwd.flatten(1, 2).float()
    image_of_graph = torch.arange(images).repeat_interleave(len(config.taus))
    tau_of_graph = torch.tensor(config.taus, dtype=torch.float32).repeat(images)
    # A graph is one matrix of doubles; the solver holds two or three of them.
    at_once = max(1, graph_bytes // (3 * 8 * (height * width) ** 2))
    cuts = [
        maskcut(
            keys_bnd[image_of_graph[start : start + at_once].to(keys_bnd.device)],
            tau_of_graph[start : start + at_once].to(keys_bnd.device),
            config.stages,
            config.foreground,
        ).cpu()
        for start in range(0, len(tau_of_graph), at_once)
    ]
    masks_bmhw = torch.cat(cuts).reshape(images, -1, height, width).numpy()
    return [refine(masks_mhw, config) for masks_mhw in masks_bmhw]


def maskcut(
    keys_bnd: torch.Tensor, taus_b: torch.Tensor, stages: int, side: str = "peak"
) -> torch.Tensor:
    """Up to `stages` foreground masks of every graph, by repeated normalised cuts.

    After each cut the keys of the foreground are set to zero. A graph is finished early when all
    its weights are equal, or when the cut only found patches whose keys are zero already: the next
    cut would find them again.

    Args:
        keys_bnd: (graphs, n, d) float keys.
        taus_b: (graphs,) similarity thresholds in (-1, 1).
        stages: masks per graph at most.
        side: as `OpenCutConfig.foreground`.

    Returns:
        (graphs, stages, n) bool; the mask of a stage that was not reached is empty.
    """
    keys_bnd = torch.nn.functional.normalize(keys_bnd, dim=-1)
    graphs, n, _ = keys_bnd.shape
    masks_bsn = torch.zeros(graphs, stages, n, dtype=torch.bool, device=keys_bnd.device)
    active = torch.arange(len(keys_bnd), device=keys_bnd.device)
    for stage in range(stages):
        similarity = keys_bnd[active] @ keys_bnd[active].mT
        linked = similarity >= taus_b[active, None, None]
        cuttable = linked.flatten(1).any(1) & ~linked.flatten(1).all(1)
        active, linked = active[cuttable], linked[cuttable]
        if len(active) == 0:
            break
        affinity = linked.double().clamp_(min=WEAK_LINK)
        foreground = foreground_of(second_eigenvectors(affinity)[0], side)
        new = (foreground & keys_bnd[active].any(2)).any(1)
        active, foreground = active[new], foreground[new]
        masks_bsn[active, stage] = foreground
        keys_bnd[active] = keys_bnd[active].masked_fill(foreground[..., None], 0)
    return masks_bsn


def foreground_of(x_bn: torch.Tensor, side: str = "peak") -> torch.Tensor:
    """The side of each cut (eq. 3) that becomes the mask.

    The result does not depend on the sign of the eigenvector. Where several patches share the
    largest absolute value up to rounding, the first of them decides.

    Args:
        x_bn: (graphs, n) eigenvectors.
        side: as `OpenCutConfig.foreground`.

    Returns:
        (graphs, n) bool.
    """
    size = x_bn.abs()
    seed = (size >= size.amax(1, keepdim=True) * (1 - 1e-6)).int().argmax(1, keepdim=True)
    x_bn = x_bn * torch.where(x_bn.gather(1, seed) < 0, -1, 1)
    above = x_bn > x_bn.mean(1, keepdim=True)
    if side == "smaller":
        above = above ^ (2 * above.sum(1, keepdim=True) > x_bn.shape[1])
    return above


def second_eigenvectors(
    affinity_bnn: torch.Tensor, tolerance: float = 1e-9, max_cycles: int = 50
) -> tuple[torch.Tensor, torch.Tensor]:
    """Second smallest solution of (D - W) x = lambda D x for a stack of dense graphs.

    With y = D^1/2 x this is the symmetric problem A y = (1 - lambda) y, A = D^-1/2 W D^-1/2. The
    top eigenvector of A is known, D^1/2 1; it is moved to the bottom of the spectrum. The next one
    is found by restarted block Krylov iteration with Rayleigh-Ritz: a cycle builds an orthonormal
    basis of [X, AX, A^2 X, ...], solves the small problem in it and restarts from its best vectors.
    The start is fixed, so the same graph gives the same vector. Finished graphs leave the batch; a
    graph that is not finished after `max_cycles` is solved densely, which is slow but exact.

    Args:
        affinity_bnn: (graphs, n, n) float64 W, symmetric, positive; n at least 2.
        tolerance: bound on the norm of A y - (1 - lambda) y, for y of norm 1.
        max_cycles: cycles before the dense solver takes over.

    Returns:
        x (graphs, n) float64 with x' D x = 1, of arbitrary sign, and lambda (graphs,) float64 in
        [0, 2]. Where lambda is (nearly) a multiple solution, x is some vector of its eigenspace.

    Raises:
        ValueError: the shape or type of `affinity_bnn` is wrong.
    """
    if affinity_bnn.ndim != 3 or affinity_bnn.shape[1] != affinity_bnn.shape[2]:
        raise ValueError(f"affinity_bnn must be (graphs, n, n), found {tuple(affinity_bnn.shape)}")
    if affinity_bnn.dtype != torch.float64 or affinity_bnn.shape[1] < 2:
        raise ValueError(
            "affinity_bnn must be float64 with n of at least 2, found "
            f"{affinity_bnn.dtype} with n = {affinity_bnn.shape[1]}"
        )
    graphs, n, _ = affinity_bnn.shape
    root_bn = affinity_bnn.sum(2).sqrt()
    a_bnn = affinity_bnn / root_bn[:, :, None] / root_bn[:, None, :]
    top_bn1 = torch.nn.functional.normalize(root_bn, dim=1)[:, :, None]

    def apply(a: torch.Tensor, top: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        return a @ vectors - 2 * top * (top.mT @ vectors)

    # Double precision throughout: the eigenvalues of hardly linked parts differ by weak links only.
    block = min(BLOCK, n)
    depth = max(1, min(DEPTH, n // block))
    start = torch.randn(n, block, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = torch.linalg.qr(start.to(a_bnn.device))[0].expand(graphs, n, block)
    y_bn = torch.zeros(graphs, n, dtype=torch.float64, device=a_bnn.device)
    mu_b = torch.zeros(graphs, dtype=torch.float64, device=a_bnn.device)
    left, a, top = torch.arange(graphs, device=a_bnn.device), a_bnn, top_bn1
    for _ in range(max_cycles):
        if len(left) == 0:
            break
        basis, image = x, apply(a, top, x)
        for _ in range(depth - 1):
            # Where the basis already spans an invariant space, the first pass leaves rounding noise
            # and the second some directions of the basis again; the third removes these too.
            fresh = image[:, :, -block:]
            for _ in range(3):
                fresh = torch.linalg.qr(fresh - basis @ (basis.mT @ fresh))[0]
            basis = torch.cat((basis, fresh), dim=2)
            image = torch.cat((image, apply(a, top, fresh)), dim=2)
        small = basis.mT @ image
        values, vectors = torch.linalg.eigh((small + small.mT) / 2)
        x = basis @ vectors[:, :, -block:]
        best, value = x[:, :, -1], values[:, -1]
        residual = ((image @ vectors[:, :, -1:])[:, :, 0] - value[:, None] * best).norm(dim=1)
        done = residual < tolerance
        y_bn[left[done]], mu_b[left[done]] = best[done], value[done]
        left, x = left[~done], x[~done]
        if done.any():
            a, top = a[~done], top[~done]
    if len(left):
        values, vectors = torch.linalg.eigh(a - 2 * top * top.mT)
        y_bn[left], mu_b[left] = vectors[:, :, -1], values[:, -1]
    return y_bn / root_bn, 1 - mu_b


def refine(masks_mhw: Sequence[np.ndarray], config: OpenCutConfig) -> np.ndarray:
    """Raw cuts into masks that share no patch (FOSSIL section 3.4, mask refinement).

    Each cut is split into connected components (patches that touch by a side). In order, a
    component is dropped if it is smaller than eta; merged with the earlier mask it overlaps most if
    their intersection over union is above mu, for then both show one object; dropped if more than
    rho of it lies in earlier masks; otherwise kept, without the patches that earlier masks hold.
    The paper's sentence on mu can also be read as merging what does *not* overlap; that would glue
    unrelated objects together, so it is not what is done. Overlaps are measured on the earlier
    masks as they stand, after their own subtraction.

    Args:
        masks_mhw: cuts in order of importance, (h, w) bool each; empty ones are passed over.
        config: eta, mu and rho.

    Returns:
        (masks, h, w) bool, no two of them overlapping.
    """
    masks_mhw = np.asarray(masks_mhw, dtype=bool)
    size_hw = masks_mhw.shape[1:]
    smallest = config.eta * size_hw[0] * size_hw[1] / REFERENCE_GRID
    kept: list[np.ndarray] = []
    covered_hw = np.zeros(size_hw, dtype=bool)
    for mask_hw in masks_mhw:
        numbers_hw, count = ndimage.label(mask_hw)
        for number in range(1, count + 1):
            part_hw = numbers_hw == number
            area = part_hw.sum()
            if area < smallest:
                continue
            ious = [(part_hw & other).sum() / (part_hw | other).sum() for other in kept]
            if ious and max(ious) > config.mu:
                kept[int(np.argmax(ious))] |= part_hw & ~covered_hw
            elif (part_hw & covered_hw).sum() <= config.rho * area:
                kept.append(part_hw & ~covered_hw)
            else:
                continue
            covered_hw |= part_hw
    return np.array(kept, dtype=bool).reshape(-1, *size_hw)


def upsample_masks(masks_nhw: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Masks of a patch grid at the size of the image, still without overlap.

    Each mask, and the part that no mask covers, is interpolated bilinearly; a pixel goes to the
    largest. Where a mask and the uncovered part are equal the mask has it.

    Args:
        masks_nhw: (masks, h, w) bool, no two overlapping.
        size_hw: height and width of the image in pixels.

    Returns:
        (masks, height, width) bool, no two overlapping.
    """
    return owned(shares(masks_nhw, size_hw))


def shares(masks_nhw: np.ndarray, size_hw: tuple[int, int]) -> torch.Tensor:
    """What each mask has of every pixel of the image, and last the part that no mask covers.

    Args:
        masks_nhw: (masks, h, w) bool, no two overlapping.
        size_hw: height and width of the image in pixels.

    Returns:
        (masks + 1, height, width) float32 in [0, 1], interpolated bilinearly, of sum 1.
    """
    masks = torch.from_numpy(np.asarray(masks_nhw, dtype=np.float32))
    rest = 1 - masks.sum(0, keepdim=True)
    return torch.nn.functional.interpolate(
        torch.cat((masks, rest))[None], size=tuple(size_hw), mode="bilinear", align_corners=False
    )[0]


def owned(shares_nhw: torch.Tensor) -> np.ndarray:
    """Of `shares` or the like, (masks + 1, H, W): the pixels of which each mask has the most, the
    first of equal ones, (masks, H, W) bool."""
    count = len(shares_nhw) - 1
    return (shares_nhw.argmax(0) == torch.arange(count)[:, None, None]).numpy()
