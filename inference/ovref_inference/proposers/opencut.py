"""OpenCut: class-agnostic masks from the keys of a self-supervised backbone, by normalised cuts.

FOSSIL section 3.4. One image is a graph whose nodes are patches; two patches are connected if the
cosine of their keys reaches a threshold tau (eq. 1). The second smallest eigenvector of the
normalised cut (eq. 2) splits the graph in two (eq. 3), the side with its largest absolute value is
a mask, its patches lose their edges, and the cut is repeated (MaskCut). OpenCut does this for a
list of thresholds, foreground first, and refines the cuts into disjoint masks.

The similarities of an image are computed once for all thresholds and stages. Eigenvectors come from
a Lanczos iteration on a batch of dense graphs (`second_eigenvectors`). The Conditional Random Field
that the paper runs on the masks comes last, on all masks of an image together (`crf.to_edges`),
while MaskCut runs it after each cut: one CRF instead of many, and the masks stay disjoint.

Differences from MaskCut's code: edges need `>= tau` as in eq. 1, not `> tau`; patches that were cut
out have no edges at any threshold, while MaskCut, which sets their keys to zero, connects them to
every patch if tau is negative; and its other foreground rule (swap the sides if three corners of
the image are foreground) is not used, because OpenCut also wants masks of the background. Instead,
`foreground="smaller"` avoids masks that merge several objects with the area between them.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from scipy import ndimage
from torch.nn.functional import normalize

from ovref_inference.proposers.config import OpenCutConfig

WEAK_LINK = 1e-5
"""Weight of a pair below the threshold (eq. 1), which keeps the graph connected."""

REFERENCE_GRID = 60 * 60
"""Number of patches in the paper's grid: DINO ViT-B/8 on images of 480 x 480 pixels."""

REFERENCE_PIXELS = 480 * 480
"""Pixels of those images."""

BASIS = 48
"""Maximum size of the eigensolver's basis before it restarts from the best third."""

CPU_GRAPH_BYTES = 2**26
"""Memory for graphs that are cut at once on a CPU; more would not fit into its cache."""

CHECK_EVERY = 4
"""Number of products between convergence checks of the eigensolver."""


def opencut(
    keys_bhwd: torch.Tensor, config: OpenCutConfig, graph_bytes: int | None = None
) -> list[np.ndarray]:
    """Disjoint masks for a batch of key grids of one size.

    The segmenter treats each uncovered patch as a region of its own.

    Args, errors: as in `raw_cuts`.

    Returns:
        For every image a (masks, h, w) bool array, in order of discovery, possibly with no mask.
    """
    return [refine(cuts_mhw, config) for cuts_mhw in raw_cuts(keys_bhwd, config, graph_bytes)]


def raw_cuts(
    keys_bhwd: torch.Tensor, config: OpenCutConfig, graph_bytes: int | None = None
) -> list[np.ndarray]:
    """Every cut of a batch of key grids of one size, before refinement.

    Args:
        keys_bhwd: (images, h, w, d) keys of the last attention layer, any float type, any scale.
        config: thresholds.
        graph_bytes: memory for the graphs cut at once; None uses a quarter of a GPU's free memory,
            or CPU_GRAPH_BYTES. Only affects speed.

    Returns:
        For every image a (taus x stages, h, w) bool array, in order of importance; some are empty.

    Raises:
        ValueError: `keys_bhwd` does not have four axes or has values that are not finite.
    """
    if keys_bhwd.ndim != 4:
        raise ValueError(f"keys_bhwd must be (images, h, w, d), found {tuple(keys_bhwd.shape)}")
    if not torch.isfinite(keys_bhwd).all():
        raise ValueError("keys_bhwd holds values that are not finite; check the backbone's input")
    images, height, width, _ = keys_bhwd.shape
    if images == 0:
        return []
    if graph_bytes is None:
        cuda = keys_bhwd.is_cuda
        graph_bytes = torch.cuda.mem_get_info(keys_bhwd.device)[0] // 4 if cuda else CPU_GRAPH_BYTES
    # A graph is one float64 matrix; a copy is made when other graphs of the batch finish first.
    at_once = max(1, graph_bytes // (2 * 8 * (height * width) ** 2))
    taus_t = torch.tensor(config.taus, dtype=torch.float32, device=keys_bhwd.device)
    cuts = []
    for keys_bnd in keys_bhwd.flatten(1, 2).split(max(1, at_once // len(taus_t))):
        cuts_btsn = maskcut(keys_bnd, taus_t, config.stages, config.foreground, at_once).cpu()
        for cuts_mn in cuts_btsn.flatten(1, 2).numpy():
            cuts.append(cuts_mn.reshape(-1, height, width))
    return cuts


def maskcut(
    keys_bnd: torch.Tensor,
    taus_t: torch.Tensor,
    stages: int,
    side: str = "peak",
    at_once: int | None = None,
) -> torch.Tensor:
    """Up to `stages` foreground masks at every threshold, by repeated normalised cuts.

    After each cut the patches of the foreground lose their edges; patches whose keys are zero have
    none. A graph is finished early if all its weights are equal, or if the cut only found patches
    without edges, which the next cut would find again.

    Args:
        keys_bnd: (images, n, d) float keys.
        taus_t: (taus,) similarity thresholds in (-1, 1).
        stages: maximum number of masks per graph.
        side: as in `OpenCutConfig.foreground`.
        at_once: graphs in memory at once; None for all, one for each image and threshold.

    Returns:
        (images, taus, stages, n) bool; the mask of a stage that was not reached is empty.
    """
    keys_bnd = normalize(keys_bnd.float(), dim=-1)
    images, n, _ = keys_bnd.shape
    similar_bnn = keys_bnd @ keys_bnd.mT
    # Every patch is similar to itself regardless of rounding.
    similar_bnn.diagonal(dim1=1, dim2=2).fill_(1)
    alive_bn = keys_bnd.any(2)
    unequal = (similar_bnn.amin((1, 2))[:, None] < taus_t) | ~alive_bn.all(1, keepdim=True)
    pairs_g2 = (unequal & alive_bn.any(1, keepdim=True)).nonzero()
    masks_btsn = alive_bn.new_zeros(images, len(taus_t), stages, n)
    at_once = min(at_once or len(pairs_g2), len(pairs_g2))
    # Memory is reused, because allocating it costs more than the computation.
    memory_gnn = similar_bnn.new_empty(at_once, n, n, dtype=torch.float64)
    for pairs in pairs_g2.split(at_once) if at_once else ():
        graphs, links_gnn = pairs, memory_gnn[: len(pairs)]
        for links_nn, (image, tau) in zip(links_gnn, pairs.tolist(), strict=True):
            torch.ge(similar_bnn[image], taus_t[tau], out=links_nn)
        alive_gn = alive_bn[graphs[:, 0]]
        for stage in range(stages):
            foreground_gn = foreground_of(second_eigenvectors(links_gnn, alive_gn)[0], side)
            new = (foreground_gn & alive_gn).any(1)
            masks_btsn[graphs[new, 0], graphs[new, 1], stage] = foreground_gn[new]
            alive_gn = alive_gn & ~foreground_gn
            left = new & alive_gn.any(1)
            if not left.any():
                break
            if not left.all():
                graphs, links_gnn, alive_gn = graphs[left], links_gnn[left], alive_gn[left]
    return masks_btsn


def foreground_of(x_bn: torch.Tensor, side: str = "peak") -> torch.Tensor:
    """The side of each cut (eq. 3) that becomes the mask.

    The result does not depend on the sign of the eigenvector. If several patches have the largest
    absolute value up to rounding, the first one decides.

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
    links_gnn: torch.Tensor,
    alive_gn: torch.Tensor | None = None,
    tolerance: float = 1e-9,
    max_products: int = 1000,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Second smallest solution of (D - W) x = lambda D x for a batch of dense graphs.

    W is 1 for edges and WEAK_LINK elsewhere; D has its row sums. With y = D^1/2 x this is the
    symmetric problem A y = (1 - lambda) y, A = D^-1/2 W D^-1/2. The top eigenvector of A is known,
    D^1/2 1; it is shifted to the bottom of the spectrum. The next one is found by a Lanczos
    iteration with full orthogonalisation and thick restarts (Wu and Simon, SIAM J. Matrix Anal.
    Appl. 2000), in double precision, because the eigenvalues of nearly disconnected parts differ
    only by weak links. The start is fixed, so the same graph gives the same vector. Converged
    graphs leave the batch; a graph that has not converged after `max_products` is solved densely.

    Args:
        links_gnn: (graphs, n, n) float64, symmetric, 1 for links and 0 elsewhere; n at least 2.
        alive_gn: (graphs, n) bool: nodes that have edges; None for all.
        tolerance: bound on the norm of A y - (1 - lambda) y, for y of norm 1.
        max_products: products with the matrices before the dense solver takes over.

    Returns:
        x (graphs, n) float64 with x' D x = 1, of arbitrary sign, and lambda (graphs,) float64 in
        [0, 2]. If lambda is (nearly) a multiple eigenvalue, x is some vector of its eigenspace.

    Raises:
        ValueError: the shape or type of `links_gnn` is wrong.
    """
    if links_gnn.ndim != 3 or links_gnn.shape[1] != links_gnn.shape[2]:
        raise ValueError(f"links_gnn must be (graphs, n, n), found {tuple(links_gnn.shape)}")
    if links_gnn.dtype != torch.float64 or links_gnn.shape[1] < 2:
        raise ValueError(
            "links_gnn must be float64 with n of at least 2, found "
            f"{links_gnn.dtype} with n = {links_gnn.shape[1]}"
        )
    graphs, n, _ = links_gnn.shape
    alive = torch.ones_like(links_gnn[:, 0]) if alive_gn is None else alive_gn.double()
    degree = WEAK_LINK * n + (1 - WEAK_LINK) * alive * _times(links_gnn, alive)
    inverse_gn = degree.rsqrt()
    x_gn, mu_g = torch.zeros_like(degree), torch.zeros_like(degree[:, 0])
    left = torch.arange(graphs, device=links_gnn.device)
    top_gn = normalize(degree.sqrt(), dim=1)
    operator = _Operator(links_gnn, alive * inverse_gn, inverse_gn, top_gn)
    width = min(BASIS, n)
    # Each new direction has a small random part, which finds another space if this one is
    # exhausted.
    noise = _directions(width + 1, n).to(links_gnn.device)
    basis = links_gnn.new_zeros(graphs, width, n)
    image = torch.zeros_like(basis)
    basis[:, 0], used = noise[width], 1
    for _ in range(max_products):
        image[:, used - 1] = operator(basis[:, used - 1])
        full = used == width
        if full or used % CHECK_EVERY == 0:
            small = basis[:, :used] @ image[:, :used].mT
            values, vectors = torch.linalg.eigh((small + small.mT) / 2)
            best = _combined(vectors[:, :, -1:], basis[:, :used])[:, 0]
            value = values[:, -1:]
            residual = _combined(vectors[:, :, -1:], image[:, :used])[:, 0] - value * best
            done = residual.norm(dim=1) < tolerance
            if done.any():
                x_gn[left[done]], mu_g[left[done]] = best[done], value[done, 0]
                if done.all():
                    left = left[:0]
                    break
                left, basis, image, vectors = (
                    kept[~done] for kept in (left, basis, image, vectors)
                )
                operator = operator.of(~done)
            if used == n:
                break
        fresh = normalize(image[:, used - 1], dim=1) + 1e-13 * noise[used - 1]
        # If the basis spans an invariant subspace, the first pass leaves rounding errors and the
        # second reintroduces directions of the basis; the third removes these too.
        known, fresh = basis[:, :used], fresh[:, :, None]
        for _ in range(3):
            fresh = torch.baddbmm(fresh, known.mT, known @ fresh, alpha=-1)
        fresh = (fresh / fresh.norm(dim=1, keepdim=True))[:, :, 0]
        if full:
            used = max(1, width // 3)
            basis[:, :used] = _combined(vectors[:, :, -used:], basis)
            image[:, :used] = _combined(vectors[:, :, -used:], image)
        basis[:, used] = fresh
        used += 1
    if len(left):
        values, vectors = torch.linalg.eigh(operator.matrix())
        x_gn[left], mu_g[left] = vectors[:, :, -1], values[:, -1]
    return x_gn * inverse_gn, 1 - mu_g


@dataclass(frozen=True)
class _Operator:
    """A - 2 top top' of every graph, without forming A."""

    links: torch.Tensor
    alive: torch.Tensor
    """D^-1/2 for nodes that have edges, 0 for others."""
    inverse: torch.Tensor
    """D^-1/2"""
    top: torch.Tensor
    """The known eigenvector of A, of length 1."""

    def __call__(self, y_gn: torch.Tensor) -> torch.Tensor:
        linked = self.alive * _times(self.links, self.alive * y_gn)
        anywhere = self.inverse * (self.inverse * y_gn).sum(1, keepdim=True)
        along = 2 * (self.top * y_gn).sum(1, keepdim=True)
        return (1 - WEAK_LINK) * linked + WEAK_LINK * anywhere - along * self.top

    def of(self, graphs: torch.Tensor) -> "_Operator":
        kept = (self.links, self.alive, self.inverse, self.top)
        return _Operator(*(tensor[graphs] for tensor in kept))

    def matrix(self) -> torch.Tensor:
        linked = self.alive[:, :, None] * self.links * self.alive[:, None, :]
        anywhere = self.inverse[:, :, None] * self.inverse[:, None, :]
        removed = 2 * self.top[:, :, None] * self.top[:, None, :]
        return (1 - WEAK_LINK) * linked + WEAK_LINK * anywhere - removed


@lru_cache(1)
def _directions(count: int, n: int) -> torch.Tensor:
    """(count, n) float64: random but fixed vectors of length 1."""
    generator = torch.Generator().manual_seed(0)
    return normalize(torch.randn(count, n, dtype=torch.float64, generator=generator), dim=1)


def _times(matrix_gnn: torch.Tensor, vector_gn: torch.Tensor) -> torch.Tensor:
    if matrix_gnn.is_cuda:
        return (matrix_gnn @ vector_gn[:, :, None])[:, :, 0]
    # On a CPU, batched products are several times slower than one after the other.
    products = [matrix @ vector for matrix, vector in zip(matrix_gnn, vector_gn, strict=True)]
    return torch.stack(products)


def _combined(weights_gkm: torch.Tensor, vectors_gkn: torch.Tensor) -> torch.Tensor:
    """(graphs, m, n): sums of k vectors, m times."""
    return weights_gkm.mT @ vectors_gkn


def refine(masks_mhw: np.ndarray, config: OpenCutConfig) -> np.ndarray:
    """Refines raw cuts into disjoint masks, on the patch grid or at pixel resolution (FOSSIL
    section 3.4, mask refinement).

    Each cut is split into 4-connected components. In order, a component is dropped if it is smaller
    than eta; merged with the earlier mask it overlaps most if their intersection over union is
    above mu, for then both show one object; dropped if more than rho of it lies in earlier masks;
    otherwise kept, without the patches that earlier masks hold. The paper's sentence on mu can also
    be read as merging what does *not* overlap; that would glue unrelated objects together, so it is
    not what is done. Overlaps are measured on the earlier masks as they stand, after their own
    subtraction.

    Args:
        masks_mhw: (m, h, w) bool, cuts in order of importance; empty ones are skipped.
        config: eta, mu and rho.

    Returns:
        (masks, h, w) bool, no two of them overlapping.
    """
    size_hw = masks_mhw.shape[1:]
    parts = REFERENCE_GRID if config.eta_unit == "patches" else REFERENCE_PIXELS
    smallest = config.eta * size_hw[0] * size_hw[1] / parts
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
    """Upsamples masks from the patch grid to the size of the image, still without overlap.

    Each mask, and the part that no mask covers, is interpolated bilinearly; a pixel goes to the
    largest. In a tie, a mask wins over the uncovered part.

    Args:
        masks_nhw: (masks, h, w) bool, no two overlapping.
        size_hw: height and width of the image in pixels.

    Returns:
        (masks, height, width) bool, no two overlapping.
    """
    return owned(shares(masks_nhw, size_hw))


def shares(masks_nhw: np.ndarray, size_hw: tuple[int, int]) -> torch.Tensor:
    """Share of every pixel of the image in each mask, and last in the uncovered part.

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
    """The pixels of which each mask has the largest share; ties go to the first.

    Takes `shares` or the like, (masks + 1, H, W), and gives (masks, H, W) bool.
    """
    count = len(shares_nhw) - 1
    return (shares_nhw.argmax(0) == torch.arange(count)[:, None, None]).numpy()
