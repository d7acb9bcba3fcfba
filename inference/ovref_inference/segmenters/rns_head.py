"""The linear head that RNS fits to each image (Aravanis et al., CVPR 2026), in plain torch."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize

from ovref_inference.collection.clustering import MAX_SEED
from ovref_inference.ranges import STRICT, require_above, require_at_least, require_within

_TEXT_SCALE = 100.0
"""CLIP's own factor of cosines in a softmax over classes."""


@dataclass(frozen=True, kw_only=True)
class RnsHeadConfig:
    """What the head learns from, and how; the defaults are those of RNS's released code."""

    __pydantic_config__ = STRICT

    k: int = 4
    """References that a region or patch retrieves, at least 1."""
    mixtures: tuple[float, ...] = (0.9, 0.8, 0.6, 0.4, 0.2, 0.0)
    """Weights of the mean reference against the text, in [0, 1]: one row of each class for each."""
    mixture_weight: float = 1.5
    """Weight of these rows against the retrieved references."""
    pseudo_weight: float = 0.2
    """The same of rows for classes without references, see `RnsConfig.unsupported`."""
    steps: int = 700
    """Steps of AdamW, each over all rows."""
    learning_rate: float = 2e-3
    """AdamW's learning rate."""
    weight_decay: float = 5e-4
    """AdamW's weight decay, for weights and biases."""
    seed: int = 0
    """Seed of the weights that training starts from."""

    def __post_init__(self) -> None:
        for name in ("k", "steps"):
            require_at_least(name, getattr(self, name), 1)
        for name in ("mixture_weight", "pseudo_weight", "weight_decay"):
            require_at_least(name, getattr(self, name), 0)
        if not self.mixtures:
            raise ValueError("mixtures must name at least one weight, found none")
        for weight in self.mixtures:
            require_within("mixtures", weight, 0, 1)
        require_above("learning_rate", self.learning_rate, 0)
        require_within("seed", self.seed, 0, MAX_SEED)


@dataclass(frozen=True, kw_only=True)
class References:
    """The references of c classes."""

    vectors_md: np.ndarray
    """(m, d) float32, L2-normalised; m at least 1."""
    labels_m: np.ndarray
    """(m,) int64: the class of each."""
    means_cd: np.ndarray
    """(c, d) float32: the mean reference of each class, L2-normalised; zero without references."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Training rows of one head."""

    vectors_rd: torch.Tensor
    """(r, d) float32, L2-normalised."""
    targets_rc: torch.Tensor
    """(r, classes) float32 probabilities."""
    weights_r: torch.Tensor
    """(r,) float32."""


@torch.no_grad()
def head_scores(
    items_nd: np.ndarray,
    references: References,
    weights_c: np.ndarray,
    config: RnsHeadConfig,
    *,
    texts_cd: np.ndarray | None,
    device: Any = None,
) -> np.ndarray:
    """Fits the head of one image and applies it to what it is fitted for.

    Args:
        items_nd: (n, d) float32, L2-normalised: the image's regions or patches.
        references: of the c classes.
        weights_c: (c,) float32 at least 0: how much the rows of each class count.
        config: of the head.
        texts_cd: (c, d) texts in the space of the items; None mixes with mean references instead.
        device: where the head is fitted; None is the CPU.

    Returns:
        (n, c) float32 probabilities.
    """
    items = torch.as_tensor(items_nd, device=device)
    means = torch.as_tensor(references.means_cd, device=device)
    texts = means if texts_cd is None else torch.as_tensor(texts_cd, device=device)
    rows = rows_of(
        items,
        torch.as_tensor(references.vectors_md, device=device),
        torch.as_tensor(references.labels_m, device=device),
        means,
        texts,
        torch.as_tensor(weights_c, device=device),
        config,
    )
    weight_cd, bias_c = fitted_head(rows, config)
    return (items @ weight_cd.T + bias_c).softmax(1).cpu().numpy()


def rows_of(
    items_nd: torch.Tensor,
    vectors_md: torch.Tensor,
    labels_m: torch.Tensor,
    means_cd: torch.Tensor,
    texts_cd: torch.Tensor,
    weights_c: torch.Tensor,
    config: RnsHeadConfig,
) -> Rows:
    """What the head of one image learns from: references that it retrieves, mixtures of the classes
    of these, and mixtures of what text finds of classes without references.

    Args: as of `head_scores` and `References`; float32 tensors, but for the int64 labels.

    Returns:
        Rows; the weight of a row is its class's, all of them brought to a sum of 1, times the
        weight of its kind.
    """
    classes = len(means_cd)
    near = (items_nd @ vectors_md.T).topk(min(config.k, len(vectors_md)), dim=1).indices.unique()
    labels = labels_m[near]
    shares = torch.tensor(config.mixtures, device=items_nd.device)[:, None, None]
    retrieved = labels.unique()
    mixed = _mixed(shares, means_cd[retrieved], texts_cd[retrieved])
    found = (items_nd @ texts_cd.T).argmax(1)
    without = [label for label in found.unique().tolist() if not bool((labels_m == label).any())]
    pseudo = items_nd[:0]
    if without:
        means = torch.stack([items_nd[found == label].mean(0) for label in without])
        pseudo = _mixed(shares, normalize(means, dim=1), texts_cd[without])
    soft = (_TEXT_SCALE * (pseudo @ texts_cd.T)).softmax(1)
    one_hot = torch.eye(classes, device=items_nd.device)
    targets_rc = torch.cat(
        [one_hot[labels], one_hot[retrieved].repeat(len(config.mixtures), 1), soft]
    )
    weights_r = weights_c[targets_rc.argmax(1)]
    weights_r = weights_r / weights_r.sum()
    weights_r[len(labels) : len(labels) + len(mixed)] *= config.mixture_weight
    weights_r[len(labels) + len(mixed) :] *= config.pseudo_weight
    return Rows(
        vectors_rd=torch.cat([vectors_md[near], mixed, pseudo]),
        targets_rc=targets_rc,
        weights_r=weights_r,
    )


def fitted_head(rows: Rows, config: RnsHeadConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """(c, d) weights and (c,) biases of a linear head after `steps` steps of AdamW on the weighted
    cross-entropy of all rows, from Kaiming's uniform start."""
    device, classes = rows.vectors_rd.device, rows.targets_rc.shape[1]
    start = torch.empty(classes, rows.vectors_rd.shape[1])
    generator = torch.Generator().manual_seed(config.seed)
    torch.nn.init.kaiming_uniform_(start, nonlinearity="relu", generator=generator)
    ones_r1 = torch.ones_like(rows.vectors_rd[:, :1])
    inputs_ri = torch.cat([rows.vectors_rd, ones_r1], dim=1)
    weighted_ri = inputs_ri * (rows.weights_r / len(inputs_ri))[:, None]
    head_ci = torch.cat([start, torch.zeros(classes, 1)], dim=1).to(device)
    optimizer = torch.optim.AdamW(
        [head_ci],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=device.type in ("cpu", "cuda"),
    )
    for _ in range(config.steps):
        # The gradient of the mean of the rows' weighted cross-entropies, without autograd, which
        # would take most of the time of so small a model.
        errors_rc = (inputs_ri @ head_ci.T).softmax(1) - rows.targets_rc
        head_ci.grad = errors_rc.T @ weighted_ri
        optimizer.step()
    return head_ci[:, :-1], head_ci[:, -1]


def _mixed(shares: torch.Tensor, means_cd: torch.Tensor, texts_cd: torch.Tensor) -> torch.Tensor:
    """(shares x c, d): every mixture of all classes, L2-normalised, share by share."""
    return normalize(shares * means_cd + (1 - shares) * texts_cd, dim=2).flatten(0, 1)
