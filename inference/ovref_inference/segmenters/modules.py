"""Segmenters as torch modules: a frozen one that takes tensors of images, and FOSSIL's comparison
with prototypes as a head on the features of your own model."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ovref_inference.collection.prototypes import Prototypes
from ovref_inference.segmenters.regions import Segmenter


class SegmenterModule(torch.nn.Module):
    """A segmenter with its classes as a frozen module: images in, scores out, no gradients.

        module = SegmenterModule(segmenter, ["tree", "grass"])
        labels_bhw = module(images_bchw).argmax(1)

    Its models stay on the device that the segmenter was loaded on.
    """

    def __init__(self, segmenter: Segmenter, class_names: Sequence[str]) -> None:
        super().__init__()
        self.segmenter = segmenter
        self.class_names = tuple(class_names)

    @torch.no_grad()
    def forward(self, images_bchw: torch.Tensor) -> torch.Tensor:
        """Scores of images.

        Args:
            images_bchw: (b, 3, H, W) RGB, uint8, or floats in [0, 1].

        Returns:
            (b, classes, H, W) float32 on the images' device; -inf for a class without support.

        Raises:
            ValueError: tensors of another shape, or floats outside of [0, 1].
        """
        if images_bchw.ndim != 4 or images_bchw.shape[1] != 3:
            raise ValueError(f"expected images (b, 3, H, W), found {tuple(images_bchw.shape)}")
        pixels = images_bchw
        if pixels.is_floating_point():
            if pixels.numel() and not (pixels.min() >= 0 and pixels.max() <= 1):
                raise ValueError("images of floats must lie in [0, 1], without normalisation")
            pixels = (pixels * 255).round().to(torch.uint8)
        images = list(np.ascontiguousarray(pixels.permute(0, 2, 3, 1).cpu().numpy()))
        found = self.segmenter.segment(images, list(self.class_names))
        scores = np.stack([one.scores_chw for one in found])
        return torch.as_tensor(scores, device=images_bchw.device)


class PrototypeHead(torch.nn.Module):
    """FOSSIL eq. 5 on dense features, differentiable: the torch counterpart of `prototype_scores`.

        head = PrototypeHead(segmenter.prepare(["tree", "grass"]))      # of a FossilSegmenter
        scores_bchw = head(features_bdhw)

    Prototypes are a buffer: they move with the module, are saved with it, and are not trained.
    """

    vectors_ckd: torch.Tensor
    counts: torch.Tensor

    def __init__(self, prototypes: Prototypes, gamma: float = 0.5) -> None:
        super().__init__()
        self.gamma = gamma
        self.register_buffer("vectors_ckd", _tensor(prototypes.vectors_nkd, torch.float32))
        self.register_buffer("counts", _tensor(prototypes.counts, torch.int64))

    def forward(self, features_bdhw: torch.Tensor) -> torch.Tensor:
        """(b, d, h, w) features of any length but zero -> (b, classes, h, w) scores in (0, 1);
        0 for a class without prototypes. Raises ValueError for features of another width."""
        dim = self.vectors_ckd.shape[2]
        if features_bdhw.ndim != 4 or features_bdhw.shape[1] != dim:
            raise ValueError(
                f"expected features (b, {dim}, h, w), found {tuple(features_bdhw.shape)}"
            )
        unit = torch.nn.functional.normalize(features_bdhw, dim=1)
        vectors = self.vectors_ckd.to(unit.dtype)
        similarity = torch.einsum("bdhw,ckd->bckhw", unit, vectors).sigmoid()
        there_ck = torch.arange(vectors.shape[1], device=unit.device) < self.counts[:, None]
        similarity = similarity * there_ck[None, :, :, None, None]
        mean = similarity.sum(2) / self.counts.clamp(min=1)[None, :, None, None]
        best = similarity.amax(2)
        return (1 - self.gamma) * mean + self.gamma * best


def _tensor(values: Any, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(np.asarray(values), dtype=dtype)
